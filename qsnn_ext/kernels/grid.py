"""Rounding inside a core: :mod:`qsnn_ext.functional`'s grid in operations that compile well."""

from __future__ import annotations

import torch
from torch import Tensor

from qsnn_ext import functional as F
from qsnn_ext.kernels.options import LIFOptions

HALF = (torch.float16, torch.bfloat16)


def compute_dtype(x: Tensor) -> torch.dtype:
    """float32 for half precision, else the tensor's own: steps are computed in this dtype."""
    return torch.float32 if x.dtype in HALF else x.dtype


def narrowed(v: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 values rounded to half precision ``dtype``, still float32.

    The compiler drops a conversion to half precision and back. Bit for bit the same is rounding the
    integers that the floats are.
    """
    if not torch.compiler.is_compiling():
        return v.to(dtype).to(v.dtype)
    dropped = 16 if dtype == torch.bfloat16 else 13
    bits = v.view(torch.int32)
    up = ((bits >> dropped) & 1) + ((1 << (dropped - 1)) - 1)  # half to even
    rounded = ((bits + up) & (-1 << dropped)).view(torch.float32)
    if dtype == torch.float16:
        # Its exponents end earlier at both ends.
        rounded = torch.where(v.abs() < 2.0**-14, (v * 2.0**24).round() * 2.0**-24, rounded)
        infinite = torch.where(v > 0, torch.inf, -torch.inf)
        rounded = torch.where(v.abs() >= 65520.0, infinite, rounded)
    return torch.where(v.isnan(), v, rounded)


def maximum(v: Tensor, o: LIFOptions) -> Tensor:
    """:func:`qsnn_ext.functional.membrane_alpha`."""
    v = v if o.scale == "max" else v.abs()
    return torch.where(torch.isfinite(v), v, -torch.inf if o.scale == "max" else 0.0).amax()


def round_(v: Tensor, alpha: Tensor, o: LIFOptions) -> Tensor:
    """The value of :func:`qsnn_ext.functional.symmetric_codes`, bit for bit."""
    assert o.bits
    n = F.levels(o.bits)
    empty = alpha <= 0
    zero = v * 0.0  # NaN where v is NaN or infinite
    if n == 1 and o.alpha == "dynamic":
        # round(v/alpha) is 1 exactly where v > alpha/2 (a tie goes to 0, which is even): for
        # floats v > alpha/2 implies that the rounded quotient exceeds 1/2. No division.
        half = torch.where(empty, torch.inf, alpha * 0.5)
        return torch.where(v > half, alpha, torch.where(v < -half, -alpha, 0.0)) + zero
    ratio = v / torch.where(empty, torch.inf, alpha)
    return (torch.round(ratio.clamp(-1, 1) * n) + zero) * torch.where(empty, 0.0, alpha / n)


def unround(grad: Tensor, v: Tensor, alpha: Tensor, o: LIFOptions) -> Tensor:
    """Straight-through gradient of :func:`round_` for (squashed) potentials ``v``."""
    if o.scale == "absmax" and o.alpha == "dynamic":
        inside = torch.where(alpha > 0, grad, 0.0)  # nothing exceeds its own maximum
    else:
        inside = torch.where(v.abs() <= torch.where(alpha > 0, alpha, -1.0), grad, 0.0)
    return inside * (1 - v * v) if o.squash else inside


def beside_threshold(
    stored: Tensor, fired: Tensor, alpha: Tensor, p: Tensor, o: LIFOptions
) -> Tensor:
    """:func:`qsnn_ext.functional.delayed_state`'s last step; ``p`` as for the cores."""
    assert o.bits
    theta, above, step = p[3], p[4], alpha.clamp(min=0) / F.levels(o.bits)
    code = torch.floor(theta / torch.where(step > 0, step, 1.0))
    level = code * step
    below = torch.minimum(torch.where(level > theta, (code - 1) * step, level), theta)
    if o.surrogate.strict:
        under, over = stored <= theta, stored > theta
    else:
        under, over = stored < theta, stored >= theta
    # NaN is neither, and stays.
    stored = torch.where(fired & under, above, stored)
    return torch.where(over & ~fired, below, stored)
