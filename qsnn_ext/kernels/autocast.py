"""What ``torch.autocast`` does to the operations of this package.

A neuron computes in float32 whatever its input has (half precision only carries the state), so
autocast has nothing to lower: currents, spikes and states keep the dtype they come with. Weights
are standardised in float32; the layer that multiplies with them lowers the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library: Any = torch.library.Library("qsnn_ext", "FRAGMENT")  # type: ignore[no-untyped-call]
_DEVICES = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def register(name: str, rule: Callable[..., tuple[Any, ...]] | None = None) -> None:
    """Register the autocast rule of an operation.

    Args:
        name: of the operation, without ``qsnn_ext::``.
        rule: maps its arguments to those to run with; ``None`` leaves them as they are.
    """
    for device, key in _DEVICES.items():
        _library.impl(name, _kernel(name, device, rule), key)


def _kernel(
    name: str, device: str, rule: Callable[..., tuple[Any, ...]] | None
) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return getattr(torch.ops.qsnn_ext, name)(*(args if rule is None else rule(*args)))

    return run


def widened(tensor: Tensor) -> Tensor:
    """Half precision as float32, everything else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
