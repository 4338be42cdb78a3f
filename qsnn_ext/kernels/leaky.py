"""One step of a neuron whose reset is delayed to the next step (snnTorch's convention), fused.

Such a neuron stores its membrane potential before the reset and decides the reset of the next step
from it. ``qsnn_ext::leaky_step`` does what :class:`qsnn_ext.snntorch.QLeaky` does in plain tensor
operations: reset by the stored state, charge, fire, quantize what is left after the reset, and
store it on the side of the threshold that the spike was on. Saved for backward is the charge; with
reset to zero or a learnable decay the state given to the step too, which the caller holds anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qsnn_ext import functional as F
from qsnn_ext.kernels import autocast
from qsnn_ext.kernels import backend as B
from qsnn_ext.kernels.lif import (
    LIFOptions,
    _decode,
    _Layout,
    _maximum,
    _round,
    _unround,
    compute_dtype,
)
from qsnn_ext.kernels.surrogates import DERIVATIVES

# params: decay, threshold, the next float above the threshold.


def _above(u: Tensor, params: Tensor, o: LIFOptions) -> Tensor:
    return u > params[1] if o.surrogate.strict else u >= params[1]


def _left(u: Tensor, fired: Tensor, params: Tensor, o: LIFOptions) -> Tensor:
    """What remains after the reset that the next step will make."""
    if o.reset == "soft":
        return torch.where(fired, u - params[1], u)
    return torch.where(fired, u * 0.0, u) if o.reset == "hard" else u


def _forward_core(o: LIFOptions, dtype: torch.dtype) -> Callable[..., Any]:
    """``(x, mem, params, alpha) -> spikes, stored, [alpha, running], count, u`` of ``[M]``."""
    n = F.levels(o.bits)

    def quantize(v: Tensor, running: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        v = torch.tanh(v) if o.squash else v
        if running is None:
            alpha = _maximum(v, o)
            return _round(v, alpha, o), alpha, None
        alpha = running
        if o.alpha == "running":
            observed = _maximum(v, o).clamp(min=0)
            alpha = torch.where(alpha > 0, alpha, observed)  # 0: no value yet
            running = alpha + o.momentum * (observed - alpha)
        return _round(v, alpha, o), alpha, running

    def beside_threshold(stored: Tensor, fired: Tensor, alpha: Tensor, params: Tensor) -> Tensor:
        theta, step = params[1], alpha.clamp(min=0) / n
        code = torch.floor(theta / torch.where(step > 0, step, 1.0))
        level = code * step
        below = torch.minimum(torch.where(level > theta, (code - 1) * step, level), theta)
        above = _above(stored, params, o)
        under = stored <= params[1] if o.surrogate.strict else stored < params[1]
        stored = torch.where(fired & under, params[2], stored)
        return torch.where(above & ~fired, below, stored)

    def forward(x: Tensor, mem: Tensor, params: Tensor, running: Tensor | None) -> Any:
        reset = _above(mem, params, o)
        if o.reset == "hard":
            u = params[0] * torch.where(reset, 0.0, mem) + x
        else:
            u = params[0] * mem + x
            if o.reset == "soft":
                u = torch.where(reset, u - params[1], u)
        charge = u
        if o.order == "quantize_first":
            u, alpha, running = quantize(u, running)
        fired = _above(u, params, o)
        if o.order == "quantize_first":
            stored = u
        else:
            stored, alpha, running = quantize(_left(u, fired, params, o), running)
            if o.reset != "none":
                stored = torch.where(fired, stored + params[1], stored)
                stored = beside_threshold(stored, fired, alpha, params)
        spikes = fired.to(dtype)
        count = B.count(fired)
        after = alpha if running is None else running
        results = (spikes, stored, torch.stack([alpha, after]), count.reshape(1))
        return results if o.save == "nothing" else (*results, charge)

    return forward


def _backward_core(o: LIFOptions, need_decay: bool) -> Callable[..., Any]:
    """``(g_spikes, g_stored, g_count, u, mem, params, alphas) -> g_x, g_mem (, g_decay)``."""
    derivative = DERIVATIVES[o.surrogate.kind]

    def backward(
        g_spikes: Tensor | None,
        g_stored: Tensor | None,
        g_count: Tensor,
        charge: Tensor,
        mem: Tensor | None,
        params: Tensor,
        alphas: Tensor,
    ) -> Any:
        alpha = alphas[0]
        squashed = torch.tanh(charge) if o.squash else charge
        u = _round(squashed, alpha, o) if o.order == "quantize_first" else charge
        fired = _above(u, params, o)
        g_fired = g_count[0].to(u.dtype)
        if g_spikes is not None:
            g_fired = g_fired + g_spikes
        g = g_fired * derivative(u - params[1], o.surrogate.a, o.surrogate.b)
        if g_stored is not None:
            if o.order == "fire_first":
                left = _left(u, fired, params, o)
                g_stored = _unround(g_stored, torch.tanh(left) if o.squash else left, alpha, o)
                if o.reset == "hard":
                    g_stored = torch.where(fired, 0.0, g_stored)
            g = g + g_stored
        if o.order == "quantize_first":
            g = _unround(g, squashed, alpha, o)
        g_mem = params[0] * g
        if o.reset == "hard":
            assert mem is not None
            reset = _above(mem, params, o)
            mem = torch.where(reset, 0.0, mem)
            g_mem = torch.where(reset, 0.0, g_mem)
        if not need_decay:
            return g, g_mem
        assert mem is not None
        return g, g_mem, B.total(g * mem).reshape(1)

    return backward


@torch.library.custom_op("qsnn_ext::leaky_step", mutates_args=())
def _leaky_op(
    x: Tensor, mem: Tensor, params: Tensor, alpha: Tensor | None, options: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One step of one layer.

    Args:
        x: input ``[N, ...]``.
        mem: stored state, like ``x``.
        params: decay, threshold, the next float above the threshold ``[3]``.
        alpha: 0-dim scale, for ``"given"`` and ``"running"``.
        options: :meth:`~qsnn_ext.kernels.LIFOptions.encode`; ``reset`` names the delayed reset.

    Returns:
        Spikes and stored state like ``x``; scale used and running scale afterwards ``[2]``; number
        of spikes ``[1]`` (float32); charge like ``x``, or empty with ``save="nothing"``.
    """
    o = _decode(options)
    layout = _Layout(x.unsqueeze(0))
    saved = x.new_empty(0)
    if not x.numel():
        alphas = params.new_zeros(2) if alpha is None else alpha.detach().expand(2).clone()
        if o.save != "nothing":
            saved = layout.state_like(x)
        count = x.new_zeros(1, dtype=torch.float32)
        return layout.state_like(x), layout.state_like(x), alphas, count, saved
    flat, state = layout.state(x, x.dtype), layout.state(mem, x.dtype)
    assert flat is not None
    key = ("leaky_forward", options, alpha is None)
    core = B.core(key, x, flat.numel(), (1, 1, 0, 0), lambda: _forward_core(o, x.dtype))
    with torch.no_grad():
        spikes, stored, alphas, count, *charge = core(
            flat, state, params.detach(), None if alpha is None else alpha.detach()
        )
    if charge:
        saved = layout.back(charge[0])
    return layout.back(spikes), layout.back(stored), alphas, count, saved


@_leaky_op.register_fake
def _(
    x: Tensor, mem: Tensor, params: Tensor, alpha: Tensor | None, options: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    layout = _Layout(x.unsqueeze(0))
    saved = x.new_empty(0) if _decode(options).save == "nothing" else layout.state_like(x)
    return (
        layout.state_like(x),
        layout.state_like(x),
        params.new_empty(2),
        x.new_empty(1, dtype=torch.float32),
        saved,
    )


@torch.library.custom_op("qsnn_ext::leaky_step_backward", mutates_args=())
def _leaky_backward_op(
    g_spikes: Tensor | None,
    g_stored: Tensor | None,
    g_count: Tensor | None,
    charge: Tensor,
    mem: Tensor | None,
    params: Tensor,
    alphas: Tensor,
    options: str,
    need_decay: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input and state, like them, and of the decay ``[1]``."""
    o = _decode(options)
    layout = _Layout(charge.unsqueeze(0))
    if not charge.numel():
        return layout.state_like(charge), layout.state_like(charge), params.new_zeros(1)
    key = ("leaky_backward", options, need_decay, g_spikes is None, g_stored is None, mem is None)
    free = (1, 1, 0, 1, 1, 0, 0)
    core = B.core(key, charge, charge.numel(), free, lambda: _backward_core(o, need_decay))
    if g_count is None:
        g_count = params.new_zeros(1)
    with torch.no_grad():
        g_x, g_mem, *g_decay = core(
            layout.state(g_spikes, charge.dtype),
            layout.state(g_stored, charge.dtype),
            g_count.detach(),
            layout.state(charge, charge.dtype),
            layout.state(mem, charge.dtype),
            params.detach(),
            alphas.detach(),
        )
    decay = g_decay[0] if g_decay else params.new_zeros(1)
    return layout.back(g_x), layout.back(g_mem), decay


@_leaky_backward_op.register_fake
def _(
    g_spikes: Tensor | None,
    g_stored: Tensor | None,
    g_count: Tensor | None,
    charge: Tensor,
    mem: Tensor | None,
    params: Tensor,
    alphas: Tensor,
    options: str,
    need_decay: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    layout = _Layout(charge.unsqueeze(0))
    return layout.state_like(charge), layout.state_like(charge), params.new_empty(1)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, mem, params, _, options = inputs
    _, _, alphas, _, charge = output
    ctx.set_materialize_grads(False)
    ctx.options = options
    ctx.need_decay = params.requires_grad
    keeps_mem = ctx.need_decay or _decode(options).reset == "hard"
    ctx.save_for_backward(charge, mem if keeps_mem else None, params, alphas)


def _backward(ctx: Any, g_spikes: Any, g_stored: Any, _a: Any, g_count: Any, _c: Any) -> Any:
    if g_spikes is None and g_stored is None and g_count is None:
        return None, None, None, None, None
    charge, mem, params, alphas = ctx.saved_tensors
    g_x, g_mem, g_decay = torch.ops.qsnn_ext.leaky_step_backward(
        g_spikes, g_stored, g_count, charge, mem, params, alphas, ctx.options, ctx.need_decay
    )
    g_params = torch.cat([g_decay, params.new_zeros(2)]) if ctx.need_decay else None
    return g_x, g_mem, g_params, None, None


_leaky_op.register_autograd(_backward, setup_context=_setup_context)


def _autocast(
    x: Tensor, mem: Tensor, params: Tensor, alpha: Tensor | None, options: str
) -> tuple[Any, ...]:
    """The state and all numbers follow the input, which is not in half precision."""
    scale = None if alpha is None else alpha.to(x.dtype)
    return x, mem.to(x.dtype), params.to(x.dtype), scale, options


autocast.register("leaky_step", _autocast)
autocast.register("leaky_step_backward")


def leaky_step(
    x: Tensor, mem: Tensor, params: Tensor, options: LIFOptions, alpha: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step with a delayed reset.

    Args:
        x: input ``[N, ...]``, float32 or float64.
        mem: stored state, like ``x``.
        params: decay, threshold, the next float above the threshold ``[3]``, of ``x``'s dtype; only
            the decay receives a gradient.
        options: ``reset`` is ``"soft"`` (subtract), ``"hard"`` (to zero) or ``"none"``; ``save`` is
            chosen here.
        alpha: 0-dim scale, for ``options.alpha`` ``"given"`` and ``"running"``.

    Returns:
        Spikes, the state to store, the running scale afterwards (0-dim, detached), the number of
        spikes ``[1]``.
    """
    needed = torch.is_grad_enabled() and (
        x.requires_grad or mem.requires_grad or params.requires_grad
    )
    text = options.encode("charge" if needed else "nothing")
    scale = None if alpha is None else alpha.to(compute_dtype(x))
    spikes, stored, alphas, count, _ = torch.ops.qsnn_ext.leaky_step(x, mem, params, scale, text)
    return spikes, stored, alphas.detach()[1], count
