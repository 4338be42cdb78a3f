"""The steps of a layer as functions of plain tensors: the cores that are compiled, or run as is.

Forward and backward of :func:`qsnn_ext.functional.lif_step`, and with ``delayed`` of
:func:`qsnn_ext.functional.delayed_lif_step`, over tensors ``[T, M]``. The parameters ``p`` are
decay, gain, offset, threshold and, for the delayed reset, the next float above the threshold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qsnn_ext.kernels import backend as B
from qsnn_ext.kernels import grid
from qsnn_ext.kernels.options import LIFOptions
from qsnn_ext.kernels.surrogates import DERIVATIVES


def _fired(h: Tensor, p: Tensor, o: LIFOptions) -> Tensor:
    return h > p[3] if o.surrogate.strict else h >= p[3]


def _reset(h: Tensor, fired: Tensor, p: Tensor, o: LIFOptions) -> Tensor:
    if o.reset == "hard":
        return torch.where(fired, h * 0.0 + o.v_reset, h)  # NaN of infinity, as the host's (1-s)*h
    if o.reset == "soft":
        return torch.where(fired, h - p[3], h)
    return h


def _charge(v: Tensor | None, x: Tensor, p: Tensor, o: LIFOptions) -> Tensor:
    driven = p[1] * x
    if not o.delayed:
        return (driven if v is None else p[0] * v + driven) + p[2]
    v = torch.zeros_like(x) if v is None else v
    due = _fired(v, p, o)
    if o.reset == "hard":
        v = torch.where(due, v * 0.0, v)
    h = p[0] * v + driven + p[2]
    return torch.where(due, h - p[3], h) if o.reset == "soft" else h


def _squash(v: Tensor, o: LIFOptions) -> Tensor:
    return torch.tanh(v) if o.squash else v


def _left(h: Tensor, fired: Tensor, p: Tensor, o: LIFOptions) -> Tensor:
    """What is rounded in the order of Eq. 12: the (squashed) potential after the reset."""
    return _squash(_reset(h, fired, p, o), o)


def _stored(left: Tensor, fired: Tensor, alpha: Tensor, p: Tensor, o: LIFOptions) -> Tensor:
    """What is carried of :func:`_left`."""
    value = grid.round_(left, alpha, o)
    if not o.delayed or o.reset == "none":
        return value
    stored = torch.where(fired, value + p[3], value)
    return grid.beside_threshold(stored, fired, alpha, p, o)


def forward_core(o: LIFOptions, steps: int, dtype: torch.dtype) -> Callable[..., Any]:
    """``(x, v, p, alpha) -> spikes, last v, alphas [T + 1], counts [T] (, charges)``."""
    half = dtype in grid.HALF

    def scale(v: Tensor, running: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The scale of these (squashed) potentials, and the running one afterwards."""
        if o.alpha == "dynamic":
            return grid.maximum(v, o), None
        assert running is not None
        alpha = running
        if o.alpha == "running":
            observed = grid.maximum(v, o).clamp(min=0)
            alpha = torch.where(alpha > 0, alpha, observed)  # 0: no value yet
            running = alpha + o.momentum * (observed - alpha)
        return alpha, running

    def forward(x: Tensor, v: Tensor | None, p: Tensor, running: Tensor | None) -> Any:
        spikes, alphas, counts, charges = [], [], [], []
        state = None if v is None else v.to(p.dtype)
        for t in range(steps):
            h = _charge(state, x[t].to(p.dtype), p, o)
            if o.save == "charge":
                charges.append(h)
            if o.bits and o.order == "quantize_first":
                h = _squash(h, o)
                alpha, running = scale(h, running)
                h = grid.round_(h, alpha, o)
                alphas.append(alpha)
            fired = _fired(h, p, o)
            spikes.append(fired.to(dtype))
            counts.append(B.count(fired))
            if o.bits and o.order == "fire_first":
                left = _left(h, fired, p, o)
                alpha, running = scale(left, running)
                state = _stored(left, fired, alpha, p, o)
                alphas.append(alpha)
            else:
                state = h if o.delayed else _reset(h, fired, p, o)
            if half:
                state = grid.narrowed(state, dtype)
        assert state is not None
        last = p.new_zeros(()) if running is None else running
        alphas = alphas or [p.new_zeros(())] * steps
        results = (
            torch.stack(spikes),
            state.to(dtype),
            torch.stack([*alphas, last]),
            torch.stack(counts),
        )
        return (*results, torch.stack(charges)) if o.save == "charge" else results

    return forward


def needs_first_state(o: LIFOptions) -> bool:
    """Whether the backward reads the states from which the steps started, charges saved or not."""
    return o.delayed and o.reset == "hard"


def backward_core(
    o: LIFOptions, steps: int, dtype: torch.dtype, need_v: bool, need_params: bool
) -> Callable[..., Any]:
    """``(g_spikes, g_v, g_counts, saved, v, p, alphas) -> g_x (, g_v0) (, g_p)``."""
    half = dtype in grid.HALF
    derivative = DERIVATIVES[o.surrogate.kind]
    quantize_first = bool(o.bits) and o.order == "quantize_first"
    fire_first = bool(o.bits) and o.order == "fire_first"
    replays = o.save == "input" or needs_first_state(o)

    def decided(charge: Tensor, alpha: Tensor) -> Tensor:
        """The potential that decided the spike."""
        return grid.round_(_squash(charge, o), alpha, o) if quantize_first else charge

    def backward(
        g_spikes: Tensor | None,
        g_v: Tensor | None,
        g_counts: Tensor,
        saved: Tensor,
        v: Tensor | None,
        p: Tensor,
        alphas: Tensor,
    ) -> Any:
        # The charges, and the state each of them started from where it is needed.
        charges: list[Tensor] = []
        before: list[Tensor | None] = []
        state = None if v is None else v.to(p.dtype)
        for t in range(steps):
            step = saved[t].to(p.dtype)
            before.append(state)
            charges.append(step if o.save == "charge" else _charge(state, step, p, o))
            if not replays or t == steps - 1:
                continue
            h = decided(charges[t], alphas[t])
            fired = _fired(h, p, o)
            if fire_first:
                state = _stored(_left(h, fired, p, o), fired, alphas[t], p, o)
            else:
                state = h if o.delayed else _reset(h, fired, p, o)
            if half:
                state = grid.narrowed(state, dtype)

        g_x: list[Tensor] = []
        g_p: list[Tensor | float] = [0.0, 0.0, 0.0, 0.0]
        g_state = None if g_v is None else g_v.to(p.dtype)
        for t in reversed(range(steps)):
            charge, previous = charges[t], before[t]
            h = decided(charge, alphas[t])
            fired = _fired(h, p, o)
            g_fired = g_counts[t].to(p.dtype)
            if g_spikes is not None:
                g_fired = g_fired + g_spikes[t].to(p.dtype)
            g_h: Tensor | None = None
            if g_state is not None and o.delayed and not fire_first:
                g_h = g_state  # the charge is stored as it is
            elif g_state is not None:
                g_left = g_state
                if fire_first:
                    g_left = grid.unround(g_state, _left(h, fired, p, o), alphas[t], o)
                g_h = torch.where(fired, 0.0, g_left) if o.reset == "hard" else g_left
                if need_params and o.delayed and o.reset != "none":
                    g_p[3] = g_p[3] + B.total(torch.where(fired, g_state, 0.0))
                if o.reset == "soft":
                    if not o.detach_reset and not o.delayed:
                        g_fired = g_fired - g_left * p[3]
                    if need_params:
                        g_p[3] = g_p[3] - B.total(torch.where(fired, g_left, 0.0))
                elif o.reset == "hard" and not o.detach_reset and not o.delayed:
                    g_fired = g_fired + g_left * (o.v_reset - h)
            slope = g_fired * derivative(h - p[3], o.surrogate.a, o.surrogate.b)
            g_h = slope if g_h is None else g_h + slope
            if need_params:
                g_p[3] = g_p[3] - B.total(slope)
            if quantize_first:
                g_h = grid.unround(g_h, _squash(charge, o), alphas[t], o)
            g_x.append((p[1] * g_h).to(dtype))
            due: Tensor | None = None
            if o.delayed and previous is not None and o.reset != "none":
                due = _fired(previous, p, o)
            if need_params:
                if previous is not None:
                    kept = previous
                    if due is not None and o.reset == "hard":
                        kept = torch.where(due, 0.0, previous)
                    g_p[0] = g_p[0] + B.total(g_h * kept)
                if due is not None and o.reset == "soft":
                    g_p[3] = g_p[3] - B.total(torch.where(due, g_h, 0.0))
                g_p[1] = g_p[1] + B.total(g_h * saved[t].to(p.dtype))
                g_p[2] = g_p[2] + B.total(g_h)
            g_state = p[0] * g_h
            if due is not None and o.reset == "hard":
                g_state = torch.where(due, 0.0, g_state)
        assert g_state is not None
        results = [torch.stack(g_x[::-1])]
        if need_v:
            results.append(g_state.to(dtype))
        if need_params:
            zero = p.new_zeros(())
            results.append(torch.stack([zero + g for g in g_p] + [zero] * (len(p) - 4)))
        return tuple(results)

    return backward
