"""The core compiled by ``torch.compile``: C++ on the CPU, Triton on a GPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qsnn_ext.kernels import backend as B
from qsnn_ext.kernels.backends import Call, function


def covers(call: Call) -> bool:
    """Layers that are neither tiny nor run over many steps, where a compiler works."""
    return B.compiles(call.size * call.steps, call.steps)


def run(call: Call, *args: Tensor | None) -> Any:
    """What the core returns."""
    # Tensors that no option fixes: of these the last dimension is a symbol of the compiled code.
    fixed = {2, 3} if call.kind == "forward" else {2, 5, 6}
    dynamic_dims = tuple(0 if i in fixed else 1 for i in range(len(args)))
    key = (call.kind, call.options, call.steps, call.absent, call.need_v, call.need_params)
    core = B.core(
        key,
        call.dtype,
        call.device,
        call.size,
        dynamic_dims,
        lambda: function.core(call),
        steps=call.steps,
    )
    return core(*args)
