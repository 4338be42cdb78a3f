"""The recurrence on the CPU without a compiler, in blocks of neurons that stay in the cache.

Plain tensor operations, each a pass over memory, cost what they read and write. Here they run over
blocks of neurons small enough that all passes but the first find their operands in the cache,
write into buffers that are kept, and use floating point throughout: an operation on booleans takes
several times as long as the same on floats. Hence spikes come from a comparison that writes floats,
and gradients are masked by the backward functions of ``threshold`` and ``hardtanh``.

Forward results are those of the compiled core bit for bit: a product is only left to an operation
that might round it together with a sum where it is exact. What the core makes of an infinite
current would take more passes; where one shows itself in the extremes, the core is run instead.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qsnn_ext import functional as F
from qsnn_ext.kernels.backends import Call, function
from qsnn_ext.kernels.options import LIFOptions
from qsnn_ext.kernels.surrogates import DERIVATIVES, Surrogate

#: Neurons of a block, per thread: PyTorch gives a thread no less than this many.
NEURONS = 1 << 15

_aten: Any = torch.ops.aten


def covers(call: Call) -> bool:
    """float32 and float64, the order of Eq. 12, the reset in the step, fixed parameters."""
    o = call.options
    whole = call.dtype in (torch.float32, torch.float64) and call.device.type == "cpu"
    plain = o.save != "input" and not o.delayed and not (o.bits and o.order == "quantize_first")
    return whole and plain and not call.need_params


def run(call: Call, *args: Tensor | None) -> Any:
    """What the core of this call returns."""
    return _function(call)(*args)


@functools.lru_cache(maxsize=256)
def _function(call: Call) -> Callable[..., Any]:
    if call.kind == "forward":
        return _forward(call.options, call.dtype, function.core(call))
    return _backward(call.options, call.dtype, call.need_v)


def _blocks(count: int) -> Iterator[slice]:
    size = NEURONS * torch.get_num_threads()
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _exact(factor: float) -> bool:
    """Whether multiplying by it is exact: 0, or a power of two of either sign."""
    return math.frexp(factor)[0] in (0.0, 0.5, -0.5)


def _beside(value: float, towards: float, dtype: torch.dtype) -> float:
    """The next number of ``dtype``."""
    return torch.nextafter(
        torch.tensor(value, dtype=dtype), torch.tensor(towards, dtype=dtype)
    ).item()


def _spikes(h: Tensor, theta: float, s: Surrogate, out: Tensor) -> Tensor:
    compare = torch.gt if s.strict else torch.ge
    compare(h, theta, out=out)
    return out


def _reset(h: Tensor, spikes: Tensor, theta: float, o: LIFOptions, out: Tensor) -> Tensor:
    if o.reset == "hard":
        torch.addcmul(h, h, spikes, value=-1, out=out)
        return out.add_(spikes, alpha=o.v_reset) if o.v_reset else out
    if o.reset == "soft":
        return torch.add(h, spikes, alpha=-theta, out=out)
    return out.copy_(h)


def _forward(o: LIFOptions, dtype: torch.dtype, core: Callable[..., Any]) -> Callable[..., Any]:
    """What the forward core returns: ``(x, v, params, alpha, *out) -> spikes, ...``.

    Args:
        o: the layer's :class:`~qsnn_ext.kernels.LIFOptions`.
        dtype: of the input.
        core: the forward core, for what is not finite.
    """
    n = F.levels(o.bits) if o.bits else 0
    observes = bool(o.bits) and o.alpha != "given"
    # Hard reset makes NaN of infinity, and NaN passes through maxima; otherwise both ends are read.
    both_ends = bool(o.bits) and o.reset != "hard" and not o.squash and o.scale == "max"
    looks = observes or (bool(o.bits) and o.reset != "hard" and not o.squash)

    def round_(state: Tensor, alpha: float, scale: float) -> float:
        """Quantize in place; returns the factor that is left to apply."""
        if alpha <= 0:
            state.zero_()
            return 1.0
        state.div_(alpha).clamp_(-1, 1)
        if n > 1:
            state.mul_(n).round_().mul_(scale)
            return 1.0
        state.round_()
        return scale

    def charge(v: Tensor | None, factor: float, x: Tensor, p: list[float], h: Tensor) -> None:
        """``decay * (factor * v) + gain * x + offset``; with a factor ``v`` is -1, 0 or 1."""
        decay, gain, offset, _ = p
        if v is None:
            torch.mul(x, gain, out=h)
        else:
            whole = factor == 1.0
            if gain == 1.0 and (not whole or _exact(decay)):
                weight = decay if whole else (torch.tensor(factor, dtype=dtype) * decay).item()
                torch.add(x, v, alpha=weight, out=h)
            else:
                torch.mul(v, factor, out=h).mul_(decay)
                h.add_(x if gain == 1.0 else x * gain)
        if offset:
            h.add_(offset)

    def run(
        x: Tensor, v: Tensor | None, params: Tensor, running: Tensor | None, *out: Tensor
    ) -> Any:
        steps, count = x.shape
        first = running
        p = params.tolist()
        blocks = list(_blocks(count))
        spikes = out[:steps] or torch.empty_like(x)
        state = out[steps] if out else x.new_empty(count)
        charges = torch.empty_like(x) if o.save == "charge" else None
        scratch = None if charges is not None else x.new_empty(blocks[0].stop)
        maxima, minima = x.new_empty(len(blocks)), x.new_zeros(len(blocks))
        fired = x.new_empty(steps, len(blocks), dtype=torch.float32)
        alphas: list[Tensor] = []
        alpha = scale = factor = 1.0
        for t in range(steps):
            for i, block in enumerate(blocks):
                part = state[block]
                before: Tensor | None = part
                if t == 0:
                    before = None if v is None else v[block]
                elif o.bits:
                    factor = round_(part, alpha, scale)
                if charges is not None:
                    h = charges[t, block]
                else:
                    assert scratch is not None
                    h = scratch[: len(part)]
                charge(before, factor, x[t, block], p, h)
                spike = _spikes(h, p[3], o.surrogate, spikes[t][block])
                # No more than 2**24 of them, so float32 counts them exactly.
                torch.sum(spike, 0, dtype=torch.float32, out=fired[t, i])
                _reset(h, spike, p[3], o, part)
                if o.squash and o.bits:
                    part.tanh_()
                if both_ends:
                    torch.aminmax(part, out=(minima[i], maxima[i]))
                elif looks:
                    extreme = part.abs() if o.scale == "absmax" else part
                    torch.amax(extreme, 0, out=maxima[i])
            if looks and not math.isfinite((maxima.amax() - minima.amin()).item()):
                return core(x, v, params, first, *out)
            if o.bits:
                used = maxima.amax() if observes else params.new_zeros(())
                if o.alpha != "dynamic":
                    assert running is not None
                    observed, used = used.clamp(min=0), running
                    if o.alpha == "running":
                        used = torch.where(used > 0, used, observed)
                        running = used + o.momentum * (observed - used)
                alphas.append(used)
                alpha, scale = used.item(), (used / n).item()
        for block in blocks if o.bits else ():
            left = round_(state[block], alpha, scale)
            if left != 1.0:
                state[block].mul_(left)
        if not observes and math.isnan(state.amax().item()):
            return core(x, v, params, first, *out)
        last = params.new_zeros(()) if running is None else running
        alphas = alphas or [params.new_zeros(())] * steps
        alphas.append(last)
        made = (None, None) if out else (spikes, state)
        results = (*made, torch.stack(alphas), fired.sum(1))
        return results if charges is None else (*results, charges)

    return run


def _backward(o: LIFOptions, dtype: torch.dtype, need_v: bool) -> Callable[..., Any]:
    """What the backward core returns, from saved charges and without gradients of ``params``.

    Args:
        o: the layer's :class:`~qsnn_ext.kernels.LIFOptions`.
        dtype: of the input.
        need_v: whether the gradient of the first state is wanted.
    """
    derivative = DERIVATIVES[o.surrogate.kind]
    # Nothing exceeds its own maximum.
    unmasked = o.scale == "absmax" and o.alpha == "dynamic"

    def unround(
        g: Tensor, h: Tensor, alpha: float, bounds: tuple[float, float], theta: float, free: Tensor
    ) -> Tensor:
        """Straight-through gradient of rounding the state left by charge ``h``."""
        low, high = bounds
        if not o.bits:
            return g
        if alpha <= 0:
            return free[0].zero_()
        if unmasked and not o.squash:
            return g
        simple = o.scale == "max" and o.alpha == "dynamic" and o.reset == "hard"
        if simple and not o.squash and o.v_reset == 0 and theta > 0:
            # What fired was reset to 0, and what did not is no more than alpha.
            _aten.threshold_backward.grad_input(g, h, low, grad_input=free[0])
            return free[0]
        state = _reset(h, _spikes(h, theta, o.surrogate, free[0]), theta, o, free[1])
        if not o.squash:
            _aten.hardtanh_backward.grad_input(g, state, low, high, grad_input=free[0])
            return free[0]
        state.tanh_()
        if not unmasked:
            _aten.hardtanh_backward.grad_input(g, state, low, high, grad_input=free[0])
            g = free[0]
        _aten.tanh_backward.grad_input(g, state, grad_input=free[0])
        return free[0]

    def slope(g_fired: Tensor, h: Tensor, theta: float, free: Tensor) -> Tensor:
        """``g_fired`` times the surrogate's derivative."""
        s = o.surrogate
        x = torch.sub(h, theta, out=free)
        if s.kind == "sigmoid":
            x.mul_(s.a).sigmoid_()
            _aten.sigmoid_backward.grad_input(g_fired, x, grad_input=free)
            return free.mul_(s.a)
        if s.kind == "triangle":
            return x.abs_().sub_(s.a).clamp_(max=0).mul_(g_fired).neg_()
        return torch.mul(derivative(x, s.a, s.b), g_fired, out=free)

    def run(
        g_spikes: Tensor | None,
        g_v: Tensor | None,
        g_counts: Tensor,
        charges: Tensor,
        v: Tensor | None,
        params: Tensor,
        alphas: Tensor,
        *rows: Tensor,
    ) -> Any:
        steps, count = charges.shape
        decay, gain, _, theta = params.tolist()
        # The largest charge that does not fire is below this.
        ceiling = _beside(theta, math.inf, dtype) if o.surrogate.strict else theta
        scales = alphas.tolist()
        bounds = [(_beside(-a, -math.inf, dtype), _beside(a, math.inf, dtype)) for a in scales]
        per_spike = g_counts.tolist()
        blocks = list(_blocks(count))
        g_x = rows or torch.empty_like(charges)
        g_v0 = charges.new_empty(count) if need_v else None
        buffers = charges.new_empty(5, blocks[0].stop)
        for block in blocks:
            a, b, c, d, carry = (buffer[: block.stop - block.start] for buffer in buffers)
            g_next = None if g_v is None else g_v[block]
            factor = 1.0
            for t in reversed(range(steps)):
                h = charges[t, block]
                g_fired = d.fill_(per_spike[t]) if g_spikes is None else g_spikes[t, block]
                if g_spikes is not None and per_spike[t]:
                    g_fired = torch.add(g_fired, per_spike[t], out=d)
                g_h = None
                if g_next is not None:
                    g_h = unround(g_next, h, scales[t], bounds[t], theta, buffers[:2, : len(a)])
                    if o.reset == "soft" and not o.detach_reset:
                        g_fired = torch.add(g_fired, g_h, alpha=-theta * factor, out=d)
                    elif o.reset == "hard":
                        if not o.detach_reset:
                            g_fired = torch.addcmul(g_fired, g_h, h, value=-factor, out=d)
                            if o.v_reset:
                                g_fired.add_(g_h, alpha=o.v_reset * factor)
                        g_h = _aten.hardtanh_backward.grad_input(
                            g_h, h, -math.inf, ceiling, grad_input=b
                        )
                total = slope(g_fired, h, theta, c)
                out = g_x[t][block] if gain == 1.0 else carry
                if g_h is None:
                    out.copy_(total)
                else:
                    torch.add(total, g_h, alpha=factor, out=out)
                if gain != 1.0:
                    torch.mul(carry, gain, out=g_x[t][block])
                g_next, factor = out, decay
            if g_v0 is not None:
                assert g_next is not None
                torch.mul(g_next, decay, out=g_v0[block])
        result = None if rows else g_x
        return (result,) if g_v0 is None else (result, g_v0)

    return run
