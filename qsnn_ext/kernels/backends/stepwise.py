"""One time step compiled and called again and again: long sequences without a long compilation.

The other compiled core is unrolled over time, and compiling takes longer with every step. Here the
code of a single step serves sequences of any length; in return the potentials travel through memory
between the steps. It runs only where it is asked for.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qsnn_ext.kernels import backend as B
from qsnn_ext.kernels import grid
from qsnn_ext.kernels.backends import Call, compiled
from qsnn_ext.kernels.recurrence import needs_first_state


def covers(call: Call) -> bool:
    """float32 and float64, where the backward can say from what every step started."""
    narrow = call.dtype in grid.HALF  # their gradients are rounded once, at the end
    unknown = call.options.save == "charge" and needs_first_state(call.options)
    return not narrow and not (call.kind == "backward" and unknown)


def run(call: Call, *args: Any) -> Any:
    """What the core of this call returns."""
    with B.use_backend("compiled"):
        return _forward(call, *args) if call.kind == "forward" else _backward(call, *args)


def _forward(
    call: Call, x: Tensor, v: Tensor | None, params: Tensor, running: Tensor | None
) -> Any:
    one = replace(call, steps=1, absent=(False, running is None))
    state = torch.zeros_like(x[0]) if v is None else v
    spikes, alphas, counts, charges = [], [], [], []
    for current in torch.split(x, 1):
        spike, state, scales, count, *charge = compiled.run(one, current, state, params, running)
        running = None if running is None else scales[1]
        spikes.append(spike)
        alphas.append(scales[:1])
        counts.append(count)
        charges += charge
    last = params.new_zeros(1) if running is None else running.reshape(1)
    kept = (torch.cat(charges),) if charges else ()
    return (torch.cat(spikes), state, torch.cat([*alphas, last]), torch.cat(counts), *kept)


def _backward(
    call: Call,
    g_spikes: Tensor | None,
    g_v: Tensor | None,
    g_counts: Tensor,
    saved: Tensor,
    v: Tensor | None,
    params: Tensor,
    alphas: Tensor,
) -> Any:
    before = _states(call, saved, v, params, alphas)
    g_x: list[Tensor] = []
    g_params = torch.zeros_like(params)
    for t in reversed(range(call.steps)):
        now = slice(t, t + 1)
        one = replace(
            call, steps=1, need_v=True, absent=(g_spikes is None, g_v is None, before[t] is None)
        )
        g_step, g_v, *rest = compiled.run(
            one, None if g_spikes is None else g_spikes[now], g_v, g_counts[now], saved[now],
            before[t], params, alphas[now],
        )  # fmt: skip
        g_x.append(g_step)
        if rest:
            g_params = g_params + rest[0]
    results = [torch.cat(g_x[::-1])]
    return (*results, *[g_v] * call.need_v, *[g_params] * call.need_params)


def _states(
    call: Call, saved: Tensor, v: Tensor | None, params: Tensor, alphas: Tensor
) -> list[Tensor | None]:
    """The state before each step; computed again where the input was saved, as the core does."""
    if call.options.save == "charge":
        return [v] * call.steps
    mode: Any = "given" if call.options.bits else "dynamic"
    options = replace(call.options, save="nothing", alpha=mode)
    one = replace(
        call, kind="forward", options=options, steps=1, absent=(False, not options.bits),
        need_v=False, need_params=False,
    )  # fmt: skip
    state = torch.zeros_like(saved[0]) if v is None else v
    states: list[Tensor | None] = [state]
    for t in range(call.steps - 1):
        alpha = alphas[t] if options.bits else None
        state = compiled.run(one, saved[t : t + 1], state, params, alpha)[1]
        states.append(state)
    return states
