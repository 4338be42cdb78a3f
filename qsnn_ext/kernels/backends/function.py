"""The core as it stands: plain tensor operations, everywhere."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from qsnn_ext.kernels.backends import Call
from qsnn_ext.kernels.recurrence import backward_core, forward_core


def covers(call: Call) -> bool:
    """Everything."""
    return True


@functools.lru_cache(maxsize=256)
def core(call: Call) -> Callable[..., Any]:
    """The function of plain tensors that computes a call."""
    o, steps, dtype = call.options, call.steps, call.dtype
    if call.kind == "forward":
        return forward_core(o, steps, dtype)
    return backward_core(o, steps, dtype, call.need_v, call.need_params)


def run(call: Call, *args: Tensor | None) -> Any:
    """What :func:`core` returns."""
    return core(call)(*args)
