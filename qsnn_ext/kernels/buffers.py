"""Memory for what large layers return, used again on the CPU.

The C library maps a large buffer anew for every tensor, and the operating system clears it page by
page as it is first written, which takes as long as computing what is written. A training step
returns tensors of the same sizes again and again, so memory whose tensor has died is kept for the
next of its size. Devices other than the CPU have allocators that do this already.

A core that is given such memory writes its result there, in the loop that computes it, where a
stack of results would be another pass.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from qsnn_ext.kernels import backend as B

#: Bytes kept at most while no tensor uses them. Beyond that all is let go, so that sizes nobody
#: asks for any more do not stay for ever.
MOST = 1 << 30

# Unused memory by its size. Tensors die in any thread, at any time: nothing here takes a lock, and
# what is done to a deque is one call, which nothing interrupts.
_unused: dict[int, deque[Tensor]] = {}


def sequence(like: Tensor, steps: int, size: int) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """An unwritten tensor ``[steps, size]`` and its rows; ``None, ()`` where little is gained.

    That is on other devices and below the size from which cores have parallel loops, so that no
    core is needed both with memory given to it and without.

    Each row has a storage of its own over the same memory: to a compiler that is told to write into
    several of them they are different tensors, as which they can be fused with other loops.

    Args:
        like: gives dtype and device.
        steps: number of rows, one per time step.
        size: values of a row.
    """
    width = size * like.element_size()
    if like.device.type != "cpu" or size < B.PARALLEL_FROM:
        return None, ()
    memory = _take(steps * width)
    # The tensors hold this object, and it holds nothing: when the last of them is gone it dies.
    block = (ctypes.c_char * (steps * width)).from_address(memory.data_ptr())
    weakref.finalize(block, _keep, memory).atexit = False
    whole = torch.frombuffer(block, dtype=like.dtype).view(steps, size)
    offsets = range(0, steps * width, width)
    rows = (torch.frombuffer(block, dtype=like.dtype, count=size, offset=o) for o in offsets)
    return whole, tuple(rows)


def reusable_like(x: Tensor) -> tuple[Tensor, ...]:
    """An unwritten contiguous tensor of the shape of ``x``; none where little is gained."""
    whole, rows = sequence(x, 1, x.numel())
    return () if whole is None else (rows[0].view(x.shape),)


def collect(value: Tensor, out: Sequence[Tensor]) -> Tensor | None:
    """Inside a core: a result, written into the buffer if one was given."""
    if not out:
        return value
    out[0].copy_(value)
    return None


def _take(nbytes: int) -> Tensor:
    try:
        return _unused[nbytes].pop()
    except (KeyError, IndexError):
        return torch.empty(nbytes, dtype=torch.uint8)


def _keep(memory: Tensor) -> None:
    if sum(size * len(kept) for size, kept in list(_unused.items())) + memory.numel() > MOST:
        clear()
    _unused.setdefault(memory.numel(), deque()).append(memory)


def clear() -> None:
    """Let go of all unused memory."""
    _unused.clear()
