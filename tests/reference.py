"""A slow, obvious float64 model of everything the package computes, in NumPy alone.

Written from the equations of the Q-SNN paper and of the two hosts, it shares no code with the
package, so that a mistake has to be made twice to go unnoticed. Forward passes are loops over
time steps; gradients are the pseudo-gradients of the method, derived by hand: the surrogate for
the spike, the straight-through estimator for every rounding, every scale held constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray
Derivative = Callable[[Array], Array]


# ------------------------------------------------------------------ surrogates and signs


def triangle_derivative(x: Array, beta: float = 1.0) -> Array:
    """Eq. 5, with x = u - theta."""
    return np.maximum(0.0, beta - np.abs(x))


def sigmoid_derivative(x: Array, alpha: float = 4.0) -> Array:
    """SpikingJelly's default surrogate: the slope of the logistic function of alpha * x."""
    p = 1.0 / (1.0 + np.exp(-alpha * x))
    return alpha * p * (1.0 - p)


def atan_derivative(x: Array, alpha: float = 2.0) -> Array:
    """snnTorch's default surrogate, the slope of an arctangent."""
    return alpha / 2.0 / (1.0 + (np.pi / 2.0 * alpha * x) ** 2)


def sign(x: Array) -> Array:
    """Values in {-1, +1}; sign(0) = +1 (Eq. 6)."""
    return np.where(x >= 0.0, 1.0, -1.0)


def sign_gradient(x: Array, g: Array, kind: str, temperature: float = 1.0) -> Array:
    if kind == "identity":
        return g
    if kind == "clipped":
        return g * (np.abs(x) <= 1.0)
    k = max(1.0 / temperature, 1.0)
    return g * k * temperature * (1.0 - np.tanh(temperature * x) ** 2)


# ------------------------------------------------------------------ weights


def _groups(w: Array, over: str) -> list[tuple[int, ...]]:
    """The index of each set of weights that shares one mean and standard deviation."""
    return [()] if over == "layer" else [(c,) for c in range(w.shape[0])]


def standardize(w: Array, over: str) -> Array:
    out = np.empty_like(w)
    for at in _groups(w, over):
        group = w[at]
        deviation = group - group.sum() / group.size
        std = np.sqrt((deviation**2).sum() / (group.size - 1))
        out[at] = deviation / std
    return out


def standardize_gradient(w: Array, g: Array, over: str) -> Array:
    """Chain rule through the mean and the unbiased standard deviation."""
    out = np.empty_like(w)
    for at in _groups(w, over):
        group, grad = w[at], g[at]
        n = group.size
        deviation = group - group.sum() / n
        std = np.sqrt((deviation**2).sum() / (n - 1))
        y = deviation / std
        out[at] = (grad - grad.sum() / n - y * (grad * y).sum() / (n - 1)) / std
    return out


def channel_scale(w_hat: Array, scale: str | None) -> Array:
    """alpha_w, one number per output channel, shaped to multiply the weight."""
    alpha = np.ones((w_hat.shape[0],) + (1,) * (w_hat.ndim - 1))
    for c in range(w_hat.shape[0]):
        mean = np.abs(w_hat[c]).sum() / w_hat[c].size
        if scale == "mean":
            alpha[c] = mean
        elif scale == "power_of_two":
            alpha[c] = 2.0 ** np.round(np.log2(mean))
    return alpha


def binary_weight(w: Array, over: str | None, scale: str | None) -> tuple[Array, Array, Array]:
    """Eq. 6 on the standardised weight of Eq. 16: value, signs, channel scale."""
    w_hat = w if over is None else standardize(w, over)
    alpha = channel_scale(w_hat, scale)
    signs = sign(w_hat)
    return alpha * signs, signs, alpha


def binary_weight_gradient(
    w: Array, g: Array, over: str | None, scale: str | None, kind: str, temperature: float = 1.0
) -> Array:
    w_hat = w if over is None else standardize(w, over)
    g_hat = sign_gradient(w_hat, g * channel_scale(w_hat, scale), kind, temperature)
    return g_hat if over is None else standardize_gradient(w, g_hat, over)


def int_weight(w: Array, bits: int = 8) -> tuple[Array, Array, float]:
    """Symmetric integers over max|w|: value, codes, step. The gradient is the identity."""
    n = 2 ** (bits - 1) - 1
    top = np.abs(w).max()
    if top == 0.0:
        return np.zeros_like(w), np.zeros_like(w), 0.0
    codes = np.round(w / top * n)
    return codes * (top / n), codes, top / n


# ------------------------------------------------------------------ the k-bit membrane


@dataclass(frozen=True)
class Membrane:
    """How a membrane potential is rounded; ``bits=None`` leaves it alone."""

    bits: int | None
    scale: str = "max"
    squash: str | None = None
    frozen_alpha: float | None = None

    @property
    def n(self) -> int:
        assert self.bits is not None
        return 2 ** (self.bits - 1) - 1

    def squashed(self, u: Array) -> Array:
        return np.tanh(u) if self.squash == "tanh" else u

    def alpha(self, u: Array) -> float:
        if self.frozen_alpha is not None:
            return self.frozen_alpha
        v = self.squashed(u)
        return float(np.max(v) if self.scale == "max" else np.max(np.abs(v)))

    def unit(self, u: Array) -> float:
        """The distance of two levels; 0 where everything rounds to zero."""
        return max(self.alpha(u), 0.0) / self.n

    def ratio(self, u: Array) -> Array:
        """v / alpha * n before rounding (for telling ties)."""
        alpha = self.alpha(u)
        if alpha <= 0.0:
            return np.zeros_like(u)
        return np.clip(self.squashed(u) / alpha, -1.0, 1.0) * self.n

    def codes(self, u: Array) -> Array:
        return np.round(self.ratio(u))  # NumPy rounds half to even

    def __call__(self, u: Array) -> Array:
        """Eq. 10."""
        if self.bits is None:
            return u
        return self.codes(u) * self.unit(u)

    def gradient(self, u: Array, g: Array) -> Array:
        """Straight through, inside the clip; the scale is a constant."""
        if self.bits is None:
            return g
        alpha = self.alpha(u)
        if alpha <= 0.0:
            return np.zeros_like(g)
        v = self.squashed(u)
        g = g * (np.abs(v / alpha) <= 1.0)
        return g * (1.0 - v**2) if self.squash == "tanh" else g


PAPER = {"scale": "max", "squash": None}
OFFICIAL = {"scale": "absmax", "squash": "tanh"}
PRESET_MEMBRANE = {"paper": PAPER, "official": OFFICIAL}


# ------------------------------------------------------------------ SpikingJelly's neuron


@dataclass(frozen=True)
class SpikingJellyLIF:
    """Charge h = decay v + gain x + offset, fire at h >= theta, reset at once."""

    membrane: Membrane
    decay: float = 0.5
    gain: float = 0.5
    offset: float = 0.0
    theta: float = 1.0
    v_reset: float | None = 0.0
    order: str = "fire_first"
    detach_reset: bool = False
    derivative: Derivative = sigmoid_derivative

    @classmethod
    def from_tau(
        cls, membrane: Membrane, tau: float, decay_input: bool, v_reset: float | None, **kwargs
    ) -> SpikingJellyLIF:
        return cls(
            membrane,
            decay=1.0 - 1.0 / tau,
            gain=1.0 / tau if decay_input else 1.0,
            offset=(v_reset or 0.0) / tau,
            v_reset=v_reset,
            **kwargs,
        )

    def initial(self, x: Array) -> Array:
        return np.full_like(x, self.v_reset or 0.0)

    def reset(self, h: Array, s: Array) -> Array:
        if self.v_reset is None:
            return h - self.theta * s
        return h * (1.0 - s) + self.v_reset * s

    def step(self, x: Array, v: Array) -> dict[str, Array]:
        """One time step; ``u`` is the tensor that decides the spike, ``pre`` the one rounded."""
        h = self.decay * v + self.gain * x + self.offset
        if self.order == "fire_first":  # Eq. 12: the carried state is rounded
            s = (h - self.theta >= 0.0).astype(float)
            after = self.reset(h, s)
            return {"x": x, "from": v, "u": h, "pre": after, "s": s, "v": self.membrane(after)}
        q = self.membrane(h)  # Algorithm 1: the charge is rounded
        s = (q - self.theta >= 0.0).astype(float)
        return {"x": x, "from": v, "u": q, "pre": h, "s": s, "v": self.reset(q, s)}

    def forward(self, x_seq: Array, v: Array | None = None) -> Trace:
        v = self.initial(x_seq[0]) if v is None else v
        trace = Trace()
        for x in x_seq:
            trace.steps.append(self.step(x, v))
            v = trace.steps[-1]["v"]
        return trace

    def backward(self, trace: Trace, g_s: Array, g_v: Array) -> dict[str, Array | float]:
        """Backward through time; ``g_s[t]`` and ``g_v[t]`` arrive from outside at step t."""
        g_x = np.zeros_like(g_s)
        carry = np.zeros_like(g_s[0])
        g_decay = g_gain = g_offset = 0.0
        for t in reversed(range(len(trace.steps))):
            step = trace.steps[t]
            u, s = step["u"], step["s"]
            g_state = carry + g_v[t]
            if self.order == "fire_first":
                g_state = self.membrane.gradient(step["pre"], g_state)
            g_spike = g_s[t].copy()
            if self.v_reset is None:
                g_u = g_state
                if not self.detach_reset:
                    g_spike = g_spike - self.theta * g_state
            else:
                g_u = g_state * (1.0 - s)
                if not self.detach_reset:
                    g_spike = g_spike + g_state * (self.v_reset - u)
            g_u = g_u + g_spike * self.derivative(u - self.theta)
            if self.order == "quantize_first":
                g_u = self.membrane.gradient(step["pre"], g_u)
            g_x[t] = self.gain * g_u
            g_decay += float((g_u * step["from"]).sum())
            g_gain += float((g_u * step["x"]).sum())
            g_offset += float(g_u.sum())
            carry = self.decay * g_u
        return {"x": g_x, "v0": carry, "decay": g_decay, "gain": g_gain, "offset": g_offset}


@dataclass
class Trace:
    """What a neuron did, step by step."""

    steps: list[dict[str, Array]] = field(default_factory=list)

    def stack(self, name: str) -> Array:
        return np.stack([step[name] for step in self.steps])


# ------------------------------------------------------------------ snnTorch's neuron


@dataclass(frozen=True)
class SnnTorchLeaky:
    """u = beta m + x less the reset, fire at u > theta; the next step's reset is read from m.

    With ``reset_delay`` the membrane handed over is the one before the reset. Rounding it could
    lift a silent neuron over the threshold or put a firing one under it; then spikes and resets
    would no longer correspond. So what is rounded is the state after the reset, r = Q(v), and the
    membrane handed over is r + s theta, forced to the side of the threshold that the spike says.
    """

    membrane: Membrane
    beta: float = 0.9
    theta: float = 1.0
    reset_mechanism: str = "subtract"
    reset_delay: bool = True
    order: str = "fire_first"
    derivative: Derivative = atan_derivative
    graded: float = 1.0
    dtype: type = np.float64  # the format in which "the next number above theta" is meant

    def _above(self) -> float:
        return float(np.nextafter(self.dtype(self.theta), self.dtype(np.inf)))

    def _grid_below(self, unit: float) -> float:
        """The largest level that does not exceed theta."""
        level = 0.0
        for code in range(self.membrane.n + 1):
            if code * unit <= self.theta:
                level = code * unit
        return level

    def _reset(self, u: Array, s: Array) -> Array:
        if self.reset_mechanism == "subtract":
            return u - s * self.theta
        if self.reset_mechanism == "zero":
            return u * (1.0 - s)
        return u

    def step(self, x: Array, m: Array) -> dict[str, Array]:
        reset = (m - self.theta > 0.0).astype(float)
        if self.reset_mechanism == "none":
            reset = np.zeros_like(reset)
        if self.membrane.bits is not None and not self.reset_delay:
            # What fired was reset in its own step. A state over theta may have been rounded there,
            # and to reset it now would be a reset without a spike.
            reset = np.zeros_like(reset)
        if self.reset_mechanism == "zero":
            charge = self.beta * ((1.0 - reset) * m) + x
        else:
            charge = self.beta * m + x - reset * self.theta

        u = charge
        if self.membrane.bits is not None and self.order == "quantize_first":
            u = self.membrane(charge)
        s = (u - self.theta > 0.0).astype(float)

        rounds_state = self.membrane.bits is not None and self.order == "fire_first"
        if self.reset_delay:
            pre = self._reset(u, s) if rounds_state else charge
            out = self.membrane(pre) if rounds_state else u
            if rounds_state and self.reset_mechanism != "none":
                out = self._consistent(out, s, self.membrane.unit(pre))
        else:
            # snnTorch takes back a reset made at the start of the step: `s - reset` is what is
            # left to do, so that the step as a whole resets by s.
            after = self._reset(u, s - reset)
            pre = after if rounds_state else charge
            out = self.membrane(after) if rounds_state else after
        return {
            "x": x, "from": m, "reset": reset, "u": u, "pre": pre,
            "s": self.graded * s, "b": s, "v": out,
        }  # fmt: skip

    def _consistent(self, r: Array, s: Array, unit: float) -> Array:
        out = np.empty_like(r)
        for i in np.ndindex(r.shape):
            if s[i] == 0.0:
                out[i] = r[i] if r[i] <= self.theta else self._grid_below(unit)
            else:
                out[i] = r[i] + self.theta
                if out[i] <= self.theta:
                    out[i] = self._above()
        return out

    def forward(self, x_seq: Array, m: Array | None = None) -> Trace:
        m = np.zeros_like(x_seq[0]) if m is None else m
        trace = Trace()
        for x in x_seq:
            trace.steps.append(self.step(x, m))
            m = trace.steps[-1]["v"]
        return trace

    def backward(self, trace: Trace, g_s: Array, g_v: Array) -> dict[str, Array | float]:
        """As snnTorch differentiates: the delayed reset is a constant, the immediate one is not."""
        g_x = np.zeros_like(g_s)
        carry = np.zeros_like(g_s[0])
        g_beta = g_theta = 0.0
        subtract, zero = self.reset_mechanism == "subtract", self.reset_mechanism == "zero"
        quantized = self.membrane.bits is not None
        rounds_state = quantized and self.order == "fire_first"
        for t in reversed(range(len(trace.steps))):
            step = trace.steps[t]
            u, s, reset = step["u"], step["b"], step["reset"]
            g_m = carry + g_v[t]
            g_spike = self.graded * g_s[t]
            if rounds_state and self.reset_delay:
                # m = Q(reset(u, s)) + s theta with s held constant
                g_state = self.membrane.gradient(step["pre"], g_m)
                g_u = g_state * (1.0 - s) if zero else g_state
                if subtract or zero:
                    g_theta += float((g_m * s).sum())
                if subtract:
                    g_theta -= float((g_state * s).sum())
            elif self.reset_delay:
                g_u = g_m
            else:
                # m = Q(u - (s - reset) theta), and the spike is differentiated here
                g_state = self.membrane.gradient(step["pre"], g_m) if rounds_state else g_m
                extra = s - reset
                g_u = g_state * (1.0 - extra) if zero else g_state
                if subtract:
                    g_spike = g_spike - self.theta * g_state
                    g_theta -= float((g_state * extra).sum())
                elif zero:
                    g_spike = g_spike - u * g_state
            slope = self.derivative(u - self.theta)
            g_u = g_u + g_spike * slope
            g_theta -= float((g_spike * slope).sum())
            if quantized and self.order == "quantize_first":
                g_u = self.membrane.gradient(step["pre"], g_u)
            g_x[t] = g_u
            kept = (1.0 - reset) if zero else np.ones_like(reset)
            g_beta += float((g_u * kept * step["from"]).sum())
            if subtract:
                g_theta -= float((g_u * reset).sum())
            carry = self.beta * kept * g_u
        return {"x": g_x, "m0": carry, "beta": g_beta, "theta": g_theta}


# ------------------------------------------------------------------ the regularizer


def firing_rate(spikes: Array) -> float:
    """Spikes per neuron and time step, over everything in the tensor."""
    return float(spikes.sum() / spikes.size)


def entropy(p: float) -> float:
    """Eq. 14 in nats, with 0 ln 0 = 0."""
    return float(-sum(q * np.log(q) for q in (p, 1.0 - p) if q > 0.0))


def firing_rate_loss(
    rates: list[float], strength: float, target: float = 0.5, reduction: str = "sum"
) -> float:
    """Eq. 17 over the hidden layers' rates; the authors' code takes the mean."""
    total = sum((f - target) ** 2 for f in rates)
    return strength * (total if reduction == "sum" else total / len(rates))


# ------------------------------------------------------------------ neurons with further states


def step_quantizers(bits: int, n: int) -> list[Membrane]:
    """One quantizer for each of ``n`` states: they have scales of their own."""
    return [Membrane(bits) for _ in range(n)]


def delayed_store(u: Array, s: Array, theta: float, reset: str, membrane: Membrane) -> Array:
    """What snnTorch's neurons store, see :class:`SnnTorchLeaky`."""
    return SnnTorchLeaky(membrane, theta=theta, reset_mechanism=reset)._consistent(
        membrane(after := u - s * theta if reset == "subtract" else u * (1 - s)),
        s,
        membrane.unit(after),
    )


def synaptic(x_seq: Array, alpha: float, beta: float, theta: float, bits: int) -> dict[str, Array]:
    """snnTorch's Synaptic, subtraction: i = alpha i + x, u = beta u + i - r theta."""
    q_syn, q_mem = step_quantizers(bits, 2)
    i = m = np.zeros_like(x_seq[0])
    spikes = []
    for x in x_seq:
        r = (m > theta).astype(float)
        i = alpha * i + x
        u = beta * m + i - r * theta
        s = (u > theta).astype(float)
        i, m = q_syn(i), delayed_store(u, s, theta, "subtract", q_mem)
        spikes.append(s)
    return {"s": np.stack(spikes), "syn": i, "mem": m}


def recurrent_leaky(x_seq: Array, beta: float, V: float, theta: float, bits: int) -> dict:
    """snnTorch's RLeaky, one to one: u = beta u + x + V s[t-1] - r theta."""
    (q,) = step_quantizers(bits, 1)
    s = m = np.zeros_like(x_seq[0])
    spikes = []
    for x in x_seq:
        r = (m > theta).astype(float)
        u = beta * m + x + V * s - r * theta
        s = (u > theta).astype(float)
        m = delayed_store(u, s, theta, "subtract", q)
        spikes.append(s)
    return {"s": np.stack(spikes), "mem": m}


def spikingjelly_node(
    x_seq: Array, charge: Callable[[Array, Array, Array], tuple[Array, Array]], theta: float,
    v_reset: float, bits: int, start: tuple[float, float] = (0.0, 0.0),
) -> dict[str, Array]:  # fmt: skip
    """A node of SpikingJelly with a hard reset: ``h, w = charge(x, v, w)``, fire, reset, round."""
    q_v, q_w = step_quantizers(bits, 2)
    v, w = (np.full_like(x_seq[0], value) for value in start)
    spikes = []
    for x in x_seq:
        h, w = charge(x, v, w)
        s = (h >= theta).astype(float)
        v, w = q_v(h * (1 - s) + v_reset * s), q_w(w)
        spikes.append(s)
    return {"s": np.stack(spikes), "v": v, "w": w}
