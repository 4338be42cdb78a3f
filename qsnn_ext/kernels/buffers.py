"""Memory for what large layers return, used again on the CPU.

The C library maps a large buffer anew for every tensor, and the operating system clears it page by
page as it is first written, which takes as long as computing what is written. A training step
returns tensors of the same sizes again and again, so memory whose tensor has died is kept for the
next of its size. Devices other than the CPU have allocators that do this already.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import deque

import torch
from torch import Tensor

#: Bytes from which memory is kept; smaller tensors get theirs from the heap, which keeps it too.
LEAST = 1 << 20
#: Bytes kept at most while no tensor uses them. Beyond that all is let go, so that sizes nobody
#: asks for any more do not stay for ever.
MOST = 1 << 30

# Unused memory by its size. Tensors die in any thread, at any time: nothing here takes a lock, and
# what is done to a deque is one call, which nothing interrupts.
_unused: dict[int, deque[Tensor]] = {}


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``torch.empty_like(x, dtype=dtype)`` for a dense tensor on the CPU."""
    dtype = dtype or x.dtype
    size = x.numel() * dtype.itemsize
    if size < LEAST:
        return torch.empty_like(x, dtype=dtype)
    memory = _take(size)
    # The tensor holds this object, and it holds nothing: when the last of them is gone it dies.
    block = (ctypes.c_char * size).from_address(memory.data_ptr())
    weakref.finalize(block, _keep, memory).atexit = False
    return torch.frombuffer(block, dtype=dtype).as_strided(x.shape, x.stride())


def _take(size: int) -> Tensor:
    try:
        return _unused[size].pop()
    except (KeyError, IndexError):
        return torch.empty(size, dtype=torch.uint8, device="cpu")


def _keep(memory: Tensor) -> None:
    if sum(size * len(kept) for size, kept in list(_unused.items())) + memory.numel() > MOST:
        clear()
    _unused.setdefault(memory.numel(), deque()).append(memory)


def clear() -> None:
    """Let go of all unused memory."""
    _unused.clear()
