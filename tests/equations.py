"""One step of the hosts' neurons in float64 NumPy, from the equations of their documentation.

Each function takes the input of a step and what the step before has left, and returns the output
and what is carried on, unrounded. :func:`run` rounds every state by a scale of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import reference as ref

Array = ref.Array
States = tuple[Array, ...]
Step = Callable[[Array, States], tuple[Array, States]]


def run(
    x_seq: Array,
    start: tuple[float, ...],
    step: Step,
    bits: int | None,
    delayed: tuple[float, str] | None = None,
    floating: tuple[int, ...] = (),
) -> tuple[Array, States]:
    """Outputs of all steps and the states after the last.

    Args:
        x_seq: ``[T, N, ...]``.
        start: reset values of the states.
        step: see the module.
        bits: of every state.
        delayed: threshold and reset of a neuron of snnTorch, whose last state, the potential, is
            stored before its reset.
        floating: places of states that are not rounded.
    """
    shape = x_seq.shape[1:]
    states: States = tuple(np.full(shape, value) for value in start)
    membranes = ref.step_quantizers(bits, len(start))
    outputs = []
    for x in x_seq:
        out, states = step(x, states)
        rounded = [
            v if at in floating else q(v)
            for at, (q, v) in enumerate(zip(membranes, states, strict=True))
        ]
        if delayed is not None:
            theta, reset = delayed
            fired = (states[-1] > theta).astype(float)
            rounded[-1] = ref.delayed_store(states[-1], fired, theta, reset, membranes[-1])
        states = tuple(rounded)
        outputs.append(out)
    return np.stack(outputs), states


def heaviside(u: Array) -> Array:
    return (u >= 0).astype(float)


def above(u: Array) -> Array:
    """snnTorch's: the threshold itself does not fire."""
    return (u > 0).astype(float)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


# ------------------------------------------------------------------ SpikingJelly


def simple_lif(x: Array, states: States) -> tuple[Array, States]:
    """tau = 2, no decay of the input."""
    (v,) = states
    h = v - v / 2 + x
    s = heaviside(h - 1)
    return s, (h * (1 - s),)


def simple_if(x: Array, states: States) -> tuple[Array, States]:
    h = states[0] + x
    s = heaviside(h - 1)
    return s, (h * (1 - s),)


def liaf(x: Array, states: States) -> tuple[Array, States]:
    """Emits relu of the charge; spikes only reset it."""
    h = states[0] - states[0] / 2 + x / 2
    return np.maximum(h, 0), (h * (1 - heaviside(h - 1)),)


def ottt(x: Array, states: States) -> tuple[Array, States]:
    """Soft reset, no decay of the input; the trace of the spikes only serves training."""
    v, trace = states
    h = v - v / 2 + x
    s = heaviside(h - 1)
    return s, (h - s, trace / 2 + s)


def sltt(x: Array, states: States) -> tuple[Array, States]:
    h = states[0] + (x - states[0]) / 2
    s = heaviside(h - 1)
    return s, (h * (1 - s),)


def integer_lif(x: Array, states: States) -> tuple[Array, States]:
    """Up to four spikes in a step, each of which takes one threshold; tau = 4/3."""
    h = states[0] - states[0] * 3 / 4 + x
    s = np.round(np.clip(h, 0, 4))
    return s, (h - s,)


def half_threshold(x: Array, states: States) -> tuple[Array, States]:
    h = states[0] + x
    s = heaviside(h - 1)
    return s, (h - s,)


def ternary_lif(x: Array, states: States) -> tuple[Array, States]:
    """Fires -1, too."""
    h = states[0] + (x - states[0]) / 2
    s = heaviside(h - 1) - heaviside(-h - 1)
    return s, (h * (1 - np.abs(s)),)


def complementary(x: Array, states: States) -> tuple[Array, States]:
    """m decays with the potential and counts spikes; a spike also takes sigmoid(m)."""
    v, m = states
    h = v - v / 2 + x
    s = heaviside(h - 1)
    m = m * sigmoid(h / 2) + s
    return s, (h - s * (1 + sigmoid(m)), m)


def cuba(x: Array, states: States) -> tuple[Array, States]:
    v, c = states
    c = 0.5 * c + x
    h = 0.75 * v + c
    s = heaviside(h - 0.5)
    return s, (h * (1 - s), c)


def resonate(x: Array, states: States) -> tuple[Array, States]:
    """A damped rotation of u + iv."""
    v, u = states
    decay, c, s = math.exp(-0.2), math.cos(1.0), math.sin(1.0)
    u, h = decay * (u * c - v * s) + x, decay * (u * s + v * c)
    fired = heaviside(h - 1)
    return fired, (h * (1 - fired), u)


def synapse_filter(x: Array, states: States) -> tuple[Array, States]:
    """Decays where no spike comes: i - (1 - x) i / tau + x, tau = 4."""
    (i,) = states
    i = i - (1 - x) * i / 4 + x
    return i, (i,)


def gated(parameters: dict[str, Array], conduct: Array) -> Step:
    """Gated LIF; its gates are sigmoids of parameters, and the last spike is an input."""
    g = {name: sigmoid(value) for name, value in parameters.items()}
    steps = iter(sigmoid(conduct))
    last: list[Array] = []

    def step(x: Array, states: States) -> tuple[Array, States]:
        (v,) = states
        s = last.pop() if last else np.zeros_like(x)
        leak = 1 - g["alpha"] * (1 - g["tau"])
        u = leak * v - (1 - g["alpha"]) * g["linear_decay"]
        u = u + x * (1 - g["beta"] * (1 - next(steps)))
        u = u - leak * v * g["gamma"] * s - (1 - g["gamma"]) * g["v_subreset"] * s
        last.append(heaviside(u - g["v_threshold"]))
        return last[0], (u,)

    return step


def lstm_cell(w_x: Array, w_h: Array, b: Array, gate: Callable[[Array], Array]) -> Step:
    """SpikingJelly's: c = min(c f + i g, 1), h = c o, all gates by one function."""
    h: list[Array] = []

    def step(x: Array, states: States) -> tuple[Array, States]:
        (c,) = states
        before = h.pop() if h else np.zeros_like(c)
        i, f, g, o = np.split(gate(x @ w_x.T + before @ w_h.T + b), 4, axis=1)
        c = np.minimum(c * f + i * g, 1)
        h.append(c * o)
        return h[0], (c,)

    return step


def gru_cell(
    w_x: Array, w_h: Array, b_x: Array, b_h: Array, gate: Callable[[Array], Array]
) -> Step:
    """SpikingJelly's: h = (1 - z) n + z h."""

    def step(x: Array, states: States) -> tuple[Array, States]:
        (h,) = states
        x_r, x_z, x_n = np.split(x @ w_x.T + b_x, 3, axis=1)
        h_r, h_z, h_n = np.split(h @ w_h.T + b_h, 3, axis=1)
        r, z = gate(x_r + h_r), gate(x_z + h_z)
        h = (1 - z) * gate(x_n + r * h_n) + z * h
        return h, (h,)

    return step


def leaky_readout(x: Array, states: States) -> tuple[Array, States]:
    """Only integrates: v + (x - v) / 2."""
    v = states[0] + (x - states[0]) / 2
    return v, (v,)


# ------------------------------------------------------------------ snnTorch: subtraction, delayed


def lapicque(beta: float, theta: float) -> Step:
    """R = 1, C = 1 / ln(1/beta): u = (1 - 1/C) u + x / C - r theta."""
    rate = math.log(1 / beta)

    def step(x: Array, states: States) -> tuple[Array, States]:
        (m,) = states
        u = (1 - rate) * m + rate * x - above(m - theta) * theta
        return above(u - theta), (u,)

    return step


def alpha(a: float, b: float, theta: float) -> Step:
    """Exciting and inhibiting currents; tau = ln a / (ln b - ln a) + 1."""
    tau = math.log(a) / (math.log(b) - math.log(a)) + 1

    def step(x: Array, states: States) -> tuple[Array, States]:
        excite, inhibit, m = states
        r = above(m - theta)
        new_excite, new_inhibit = a * excite + x, b * inhibit - x
        u = tau * (new_excite + new_inhibit) + r * inhibit
        return above(u - theta), (new_excite - r * theta, new_inhibit * (1 - r), u)

    return step


def recurrent_synaptic(a: float, b: float, V: float, theta: float) -> Step:
    last: list[Array] = []

    def step(x: Array, states: States) -> tuple[Array, States]:
        i, m = states
        i = a * i + x + V * (last.pop() if last else 0.0)
        u = b * m + i - above(m - theta) * theta
        last.append(above(u - theta))
        return last[0], (i, u)

    return step


def spiking_lstm(w_x: Array, w_h: Array, b: Array, theta: float) -> Step:
    """An LSTM cell whose hidden state is the potential; torch's order of gates: i, f, g, o."""

    def step(x: Array, states: States) -> tuple[Array, States]:
        c, m = states
        i, f, g, o = np.split(x @ w_x.T + m @ w_h.T + b, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        u = sigmoid(o) * np.tanh(c) - above(m - theta) * theta
        return above(u - theta), (c, u)

    return step


def spiking_conv_lstm(w: Array, b: Array, theta: float) -> Step:
    """The same of images, by a 1x1 convolution of [input, potential]; gates i, f, o, g."""

    def step(x: Array, states: States) -> tuple[Array, States]:
        c, m = states
        both = np.concatenate([x, m], axis=1)
        gates = np.einsum("oc,nchw->nohw", w, both) + b[:, None, None]
        i, f, o, g = np.split(gates, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        u = sigmoid(o) * np.tanh(c) - above(m - theta) * theta
        return above(u - theta), (c, u)

    return step


def delta_leaky(beta: float, theta: float) -> Step:
    """Fires where the potential changes by theta; no reset."""

    def step(x: Array, states: States) -> tuple[Array, States]:
        (m,) = states
        u = beta * m + x
        return above(np.abs(u - m) - theta), (u,)

    return step


def ternary_if(x: Array, states: States) -> tuple[Array, States]:
    h = states[0] + x
    s = heaviside(h - 1) - heaviside(-h - 1)
    return s, (h * (1 - np.abs(s)),)


def activation_aware(threshold: Array, offset: Array) -> Step:
    """A threshold and an offset for each channel, which only firing sees; soft reset."""

    def step(x: Array, states: States) -> tuple[Array, States]:
        h = states[0] + x
        s = heaviside(h + offset - threshold)
        return s, (h - s * threshold,)

    return step


def normalized_lif(mean: Array, var: Array, weight: Array, bias: Array) -> Step:
    """The charge goes through a batch norm with fixed statistics before it fires; tau = 2."""

    def step(x: Array, states: States) -> tuple[Array, States]:
        h = states[0] - states[0] / 2 + x
        h = (h - mean) / np.sqrt(var + 1e-5) * weight + bias
        s = heaviside(h - 1)
        return s, (h * (1 - s),)

    return step


def between_layers(w: Array, b: Array, c_decay: float | None, v_decay: float, theta: float) -> Step:
    """Spikes of one group of a population feed its next input; ``w`` is ``[out, group]``.

    Without ``c_decay`` there is no synaptic current.
    """
    last: list[Array] = []
    group = w.shape[1]

    def step(x: Array, states: States) -> tuple[Array, States]:
        if last:
            s = last.pop().reshape(len(x), -1, 1, group)
            x = x + ((s * w.reshape(-1, group, group)).sum(-1)).reshape(x.shape) + b
        c = x if c_decay is None else c_decay * states[1] + x
        h = v_decay * states[0] + c
        s = heaviside(h - theta)
        last.append(s)
        return s, (h * (1 - s), c)[: len(states)]

    return step
