"""The loop over time in plain autograd: the reference, and what runs where no kernel covers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from qsnn_ext import functional as F
from qsnn_ext.kernels.grid import compute_dtype
from qsnn_ext.kernels.options import LIFOptions
from qsnn_ext.kernels.surrogates import DERIVATIVES, Surrogate

#: Rounds potentials; also returns the 0-dim distance of two levels.
Quantize = Callable[[Tensor], tuple[Tensor, Tensor]]


def run(
    x: Tensor,
    v: Tensor | None,
    numbers: Mapping[str, float | Tensor],
    *,
    reset: F.Reset,
    v_reset: float,
    detach_reset: bool,
    delayed: bool,
    order: F.StepOrder,
    fire: Callable[[Tensor], Tensor],
    quantize: Quantize | None,
) -> tuple[Tensor, Tensor]:
    """All steps of a layer.

    Args:
        x: input ``[T, N, ...]``.
        v: state before the first step ``[N, ...]``; ``None`` is zero.
        numbers: ``decay``, ``gain``, ``offset`` and ``threshold``, of any shape that broadcasts.
        reset: see :func:`qsnn_ext.functional.lif_step`, as for what follows.
        v_reset: as there.
        detach_reset: as there.
        delayed: take the steps of :func:`qsnn_ext.functional.delayed_lif_step`.
        order: as there.
        fire: the surrogate.
        quantize: ``None`` leaves the membrane potential in floating point.

    Returns:
        Spikes ``[T, N, ...]`` and the state after the last step ``[N, ...]``, like ``x``.
    """
    dtype = compute_dtype(x)
    state = torch.full_like(x[0], 0.0) if v is None else v.to(x.dtype)
    spikes = []
    for current in x:
        step, before = current.to(dtype), state.to(dtype)
        if delayed:
            spike, after = F.delayed_lif_step(
                step, before, **numbers,
                reset=reset, surrogate=fire, quantize=quantize, order=order,
            )  # fmt: skip
        else:
            spike, after = F.lif_step(
                step, before, **numbers,
                reset=reset, v_reset=v_reset, detach_reset=detach_reset, surrogate=fire,
                quantize=None if quantize is None else lambda u: quantize(u)[0], order=order,
            )  # fmt: skip
        spikes.append(spike.to(x.dtype))
        state = after.to(x.dtype)
    return torch.stack(spikes), state


class Rounding:
    """The quantizer that :class:`~qsnn_ext.kernels.LIFOptions` name, with its running scale.

    Attributes:
        alphas: the scale of each step so far.
        running: the running scale, 0-dim; ``None`` with dynamic scales.
    """

    def __init__(self, options: LIFOptions, alpha: Tensor | None) -> None:
        self._options = options
        self.running = alpha
        self.alphas: list[Tensor] = []

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The rounded potentials and the distance of two levels."""
        o = self._options
        assert o.bits
        v = torch.tanh(u) if o.squash else u
        used = F.membrane_alpha(v, o.scale) if self.running is None else self.running
        if o.alpha == "running":
            observed = F.membrane_alpha(v, o.scale).clamp(min=0)
            used = torch.where(used > 0, used, observed)
            self.running = used + o.momentum * (observed - used)
        self.alphas.append(used)
        return F.quantize_symmetric(v, used, o.bits), used.clamp(min=0) / F.levels(o.bits)


def surrogate(options: Surrogate) -> Callable[[Tensor], Tensor]:
    """A :class:`Surrogate` as the callable that the loop wants."""
    return lambda x: _Fire.apply(x, options)  # type: ignore[no-untyped-call]


class _Fire(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, options: Surrogate) -> Tensor:
        return (x > 0 if options.strict else x >= 0).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, ctx.options = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        o = ctx.options
        return grad * DERIVATIVES[o.kind](x, o.a, o.b), None
