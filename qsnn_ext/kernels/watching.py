"""Counters of a host's operations, from which the rounding of states is kept.

They price a network by the operations of its neurons, and raise or skip at others. Rounding what a
neuron carries is storage and no operation of the neuron, so they are to see what they would see of
the float neuron.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode, _pop_mode, _push_mode

#: Packages whose dispatch modes count operations; a host's module adds its own.
COUNTERS: set[str] = set()


def is_watched() -> bool:
    """Whether operations are seen one by one: by a dispatch mode, or a ``torch.func`` transform."""
    if torch.compiler.is_compiling():
        return False
    transformed: bool = torch._C._are_functorch_transforms_active()
    return transformed or _get_current_dispatch_mode() is not None


@contextmanager
def uncounted() -> Iterator[None]:
    """What runs in here is not seen by :data:`COUNTERS`; every other mode sees it."""
    hidden: list[Any] = []
    if not torch.compiler.is_compiling():
        while type(_get_current_dispatch_mode()).__module__.startswith(tuple(COUNTERS)):
            hidden.append(_pop_mode())
    try:
        yield
    finally:
        for mode in reversed(hidden):
            _push_mode(mode)
