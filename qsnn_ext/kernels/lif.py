"""The multi-step LIF recurrence with a quantized membrane potential, as one operation.

``qsnn_ext::lif_multi_step`` runs all ``T`` steps of :func:`qsnn_ext.functional.lif_step` and has an
analytic backward. :func:`lif_multi_step_eager` is the loop it replaces; the two agree bit for bit
in float32 (``tanh`` excepted: see ``docs/performance.md``).

Cost of a layer of ``M`` neurons: the scale of each step is a maximum over all of them, so the
forward is ``T + 1`` passes over ``M`` values; the backward is one pass over everything.

Saved for backward: either the input itself (``save="input"``: no new memory; the backward computes
the charges again), or the charges (``save="charge"``): one times the input in both cases, and
nothing that is saved grows with the options.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from qsnn_ext import functional as F
from qsnn_ext.errors import ConfigError
from qsnn_ext.kernels import autocast, blocked, buffers
from qsnn_ext.kernels import backend as B
from qsnn_ext.kernels.surrogates import DERIVATIVES, Surrogate

AlphaMode = Literal["dynamic", "running", "given"]
Save = Literal["nothing", "input", "charge"]


@dataclass(frozen=True)
class LIFOptions:
    """Everything about a layer that is compiled into its core.

    Attributes:
        surrogate: firing rule and pseudo-gradient.
        bits: width of the membrane potential, 2 to 8; 0 leaves it in floating point.
        scale: ``"max"`` or ``"absmax"``.
        alpha: ``"dynamic"`` (this step's maximum), ``"given"``, or ``"running"`` (given, and moved
            towards the maximum after each step, as frozen mode does while training).
        momentum: weight of the newest step of ``"running"``.
        squash: whether ``tanh`` comes before rounding.
        order: ``"fire_first"`` (Eq. 12) or ``"quantize_first"`` (Algorithm 1).
        reset: ``"hard"``, ``"soft"`` or ``"none"``.
        v_reset: target of the hard reset.
        detach_reset: whether the spike inside the reset is a constant of the backward pass.
        save: what the forward keeps for the backward.
    """

    surrogate: Surrogate
    bits: int = 2
    scale: F.MembraneScale = "max"
    alpha: AlphaMode = "dynamic"
    momentum: float = 0.1
    squash: bool = False
    order: F.StepOrder = "fire_first"
    reset: F.Reset = "hard"
    v_reset: float = 0.0
    detach_reset: bool = False
    save: Save = "nothing"

    def encode(self, save: Save | None = None) -> str:
        """One string: operations of ``torch.library`` take tensors, numbers and strings.

        Args:
            save: in place of the option's own.
        """
        s = self.surrogate
        return (
            f"{s.kind},{s.a!r},{s.b!r},{int(s.strict)},{self.bits},{self.scale},{self.alpha},"
            f"{self.momentum!r},{int(self.squash)},{self.order},{self.reset},{self.v_reset!r},"
            f"{int(self.detach_reset)},{save or self.save}"
        )


@functools.cache
def _decode(text: str) -> LIFOptions:
    (
        kind,
        a,
        b,
        strict,
        bits,
        scale,
        alpha,
        momentum,
        squash,
        order,
        reset,
        v_reset,
        detach,
        save,
    ) = text.split(",")
    return LIFOptions(
        Surrogate(kind, float(a), float(b), strict == "1"),
        int(bits),
        scale,  # type: ignore[arg-type]
        alpha,  # type: ignore[arg-type]
        float(momentum),
        squash == "1",
        order,  # type: ignore[arg-type]
        reset,  # type: ignore[arg-type]
        float(v_reset),
        detach == "1",
        save,  # type: ignore[arg-type]
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """float32 for half precision, else the tensor's own: steps are computed in this dtype."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _narrowed(v: Tensor, dtype: torch.dtype) -> Tensor:
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


# --------------------------------------------------------------------------- pieces of a step


def _charge(v: Tensor | None, x: Tensor, params: Tensor) -> Tensor:
    driven = params[1] * x
    return (driven if v is None else params[0] * v + driven) + params[2]


def _fired(h: Tensor, params: Tensor, o: LIFOptions) -> Tensor:
    return h > params[3] if o.surrogate.strict else h >= params[3]


def _reset(h: Tensor, fired: Tensor, params: Tensor, o: LIFOptions) -> Tensor:
    if o.reset == "hard":
        return torch.where(fired, h * 0.0 + o.v_reset, h)  # NaN of infinity, as the host's (1-s)*h
    if o.reset == "soft":
        return torch.where(fired, h - params[3], h)
    return h


def _maximum(v: Tensor, o: LIFOptions) -> Tensor:
    """:func:`qsnn_ext.functional.membrane_alpha`."""
    v = v if o.scale == "max" else v.abs()
    return torch.where(torch.isfinite(v), v, -torch.inf if o.scale == "max" else 0.0).amax()


def _round(v: Tensor, alpha: Tensor, o: LIFOptions) -> Tensor:
    """The value of :func:`qsnn_ext.functional.symmetric_codes`, bit for bit."""
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


def _unround(grad: Tensor, v: Tensor, alpha: Tensor, o: LIFOptions) -> Tensor:
    """Straight-through gradient of :func:`_round` for (squashed) potentials ``v``."""
    if o.scale == "absmax" and o.alpha == "dynamic":
        inside = torch.where(alpha > 0, grad, 0.0)  # nothing exceeds its own maximum
    else:
        inside = torch.where(v.abs() <= torch.where(alpha > 0, alpha, -1.0), grad, 0.0)
    return inside * (1 - v * v) if o.squash else inside


# --------------------------------------------------------------------------- cores


def _collect(values: list[Tensor], rows: tuple[Tensor, ...]) -> Tensor | None:
    """One value per step: written into the rows if there are any, or else stacked."""
    if not rows:
        return torch.stack(values)
    for row, value in zip(rows, values, strict=True):
        row.copy_(value)
    return None


def _forward_core(o: LIFOptions, steps: int, dtype: torch.dtype) -> Callable[..., Any]:
    """``(x, v, params, alpha, *out) -> spikes, last v, alphas [T + 1], counts [T] (, charges)``.

    With ``out``, ``T + 1`` tensors ``[M]``, spikes and last v are written into them and ``None`` is
    returned for both.
    """
    half = dtype in (torch.float16, torch.bfloat16)

    def quantize(v: Tensor, running: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        if o.squash:
            v = torch.tanh(v)
        if o.alpha == "dynamic":
            alpha = _maximum(v, o)
            return _round(v, alpha, o), alpha, None
        assert running is not None
        alpha = running
        if o.alpha == "running":
            observed = _maximum(v, o).clamp(min=0)
            alpha = torch.where(alpha > 0, alpha, observed)  # 0: no value yet
            running = alpha + o.momentum * (observed - alpha)
        return _round(v, alpha, o), alpha, running

    def forward(
        x: Tensor, v: Tensor | None, params: Tensor, running: Tensor | None, *out: Tensor
    ) -> Any:
        spikes, alphas, counts, charges = [], [], [], []
        state = None if v is None else v.to(params.dtype)
        for t in range(steps):
            h = _charge(state, x[t].to(params.dtype), params)
            if o.save == "charge":
                charges.append(h)
            if o.bits and o.order == "quantize_first":
                h, alpha, running = quantize(h, running)
                alphas.append(alpha)
            fired = _fired(h, params, o)
            spikes.append(fired.to(dtype))
            counts.append(B.count(fired))
            state = _reset(h, fired, params, o)
            if o.bits and o.order == "fire_first":
                state, alpha, running = quantize(state, running)
                alphas.append(alpha)
            if half:
                state = _narrowed(state, dtype)
        assert state is not None
        last = params.new_zeros(()) if running is None else running
        alphas = alphas or [params.new_zeros(())] * steps
        results = (
            _collect(spikes, out[:steps]),
            buffers.collect(state.to(dtype), out[steps:]),
            torch.stack([*alphas, last]),
            torch.stack(counts),
        )
        return (*results, torch.stack(charges)) if o.save == "charge" else results

    return forward


def _backward_core(
    o: LIFOptions, steps: int, dtype: torch.dtype, need_v: bool, need_params: bool
) -> Callable[..., Any]:
    """``(g_spikes, g_v, g_counts, saved, v, params, alphas, *rows) -> g_x, g_v0 (, g_params)``.

    With ``rows``, ``T`` tensors ``[M]``, ``g_x`` is written into them and ``None`` is returned.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    derivative = DERIVATIVES[o.surrogate.kind]
    quantize_first = bool(o.bits) and o.order == "quantize_first"
    fire_first = bool(o.bits) and o.order == "fire_first"

    def squash(v: Tensor) -> Tensor:
        return torch.tanh(v) if o.squash else v

    def backward(
        g_spikes: Tensor | None,
        g_v: Tensor | None,
        g_counts: Tensor,
        saved: Tensor,
        v: Tensor | None,
        params: Tensor,
        alphas: Tensor,
        *rows: Tensor,
    ) -> Any:
        # The charges, and the state each of them started from where it is known.
        charges: list[Tensor] = []
        before: list[Tensor | None] = []
        state = None if v is None else v.to(params.dtype)
        for t in range(steps):
            step = saved[t].to(params.dtype)
            before.append(state)
            charges.append(step if o.save == "charge" else _charge(state, step, params))
            if o.save == "charge" or t == steps - 1:
                continue
            h = _round(squash(charges[t]), alphas[t], o) if quantize_first else charges[t]
            state = _reset(h, _fired(h, params, o), params, o)
            if fire_first:
                state = _round(squash(state), alphas[t], o)
            if half:
                state = _narrowed(state, dtype)

        g_x: list[Tensor] = []
        g_params: list[Tensor | float] = [0.0, 0.0, 0.0, 0.0]
        g_state = None if g_v is None else g_v.to(params.dtype)
        for t in reversed(range(steps)):
            charge = charges[t]
            h = _round(squash(charge), alphas[t], o) if quantize_first else charge
            fired = _fired(h, params, o)
            g_fired = g_counts[t].to(params.dtype)
            if g_spikes is not None:
                g_fired = g_fired + g_spikes[t].to(params.dtype)
            g_h: Tensor | None = None
            if g_state is not None:
                if fire_first:
                    after = squash(_reset(h, fired, params, o))
                    g_state = _unround(g_state, after, alphas[t], o)
                g_h = torch.where(fired, 0.0, g_state) if o.reset == "hard" else g_state
                if o.reset == "soft":
                    if not o.detach_reset:
                        g_fired = g_fired - g_state * params[3]
                    if need_params:
                        g_params[3] = g_params[3] - B.total(torch.where(fired, g_state, 0.0))
                elif o.reset == "hard" and not o.detach_reset:
                    g_fired = g_fired + g_state * (o.v_reset - h)
            slope = g_fired * derivative(h - params[3], o.surrogate.a, o.surrogate.b)
            g_h = slope if g_h is None else g_h + slope
            if need_params:
                g_params[3] = g_params[3] - B.total(slope)
            if quantize_first:
                g_h = _unround(g_h, squash(charge), alphas[t], o)
            g_x.append((params[1] * g_h).to(dtype))
            if need_params:
                previous = before[t]
                if previous is not None:
                    g_params[0] = g_params[0] + B.total(g_h * previous)
                g_params[1] = g_params[1] + B.total(g_h * saved[t].to(params.dtype))
                g_params[2] = g_params[2] + B.total(g_h)
            g_state = params[0] * g_h
        assert g_state is not None
        results = [_collect(g_x[::-1], rows)]
        if need_v:
            results.append(g_state.to(dtype))
        if need_params:
            zero = params.new_zeros(())
            results.append(torch.stack([zero + g for g in g_params]))
        return tuple(results)

    return backward


# --------------------------------------------------------------------------- the operation


class _Layout:
    """Between ``[T, N, ...]`` in any memory order and the cores' ``[T, M]``.

    Neurons are flattened in the order in which they lie in memory, time outermost, so that a
    channels-last input is neither copied nor given back in another layout.
    """

    def __init__(self, x: Tensor) -> None:
        strides = x.stride()
        self.order = [0, *sorted(range(1, x.dim()), key=lambda d: -strides[d])]
        self.shape = [x.shape[d] for d in self.order]

    def sequence(self, x: Tensor) -> Tensor:
        """``[T, N, ...]`` as ``[T, M]``; a copy only where the memory is not dense."""
        ordered = x.detach().permute(self.order).contiguous()
        return ordered.view(self.shape[0], -1) if ordered.numel() else ordered.new_empty(0, 0)

    def state(self, v: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """``[N, ...]`` as ``[M]``."""
        if v is None:
            return None
        return v.detach().permute([d - 1 for d in self.order[1:]]).to(dtype).reshape(-1)

    def back(self, flat: Tensor) -> Tensor:
        """``[T, M]`` or ``[M]`` as it came."""
        if flat.dim() == 2:
            shaped = flat.view(self.shape).permute(self._inverse())
        else:
            shaped = flat.view(self.shape[1:]).permute([d - 1 for d in self._inverse()[1:]])
        # Not a view in autograd's books: hosts call detach_() on states, which views refuse.
        return shaped.data

    def _inverse(self) -> list[int]:
        return [self.order.index(d) for d in range(len(self.order))]

    def like(self, x: Tensor) -> Tensor:
        """An unwritten tensor of the input's shape in the layout of :meth:`back`."""
        return x.new_empty(self.shape).permute(self._inverse())

    def state_like(self, x: Tensor) -> Tensor:
        """Likewise for a state ``[N, ...]``."""
        return x.new_empty(self.shape[1:]).permute([d - 1 for d in self._inverse()[1:]])


@torch.library.custom_op("qsnn_ext::lif_multi_step", mutates_args=())
def _lif_op(
    x: Tensor, v: Tensor | None, params: Tensor, alpha: Tensor | None, options: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All steps of one layer.

    Args:
        x: input ``[T, N, ...]``.
        v: state before the first step ``[N, ...]``; ``None`` is zero.
        params: decay, gain, offset, threshold ``[4]``, in the compute dtype.
        alpha: 0-dim scale, for ``"given"`` and ``"running"``.
        options: :meth:`LIFOptions.encode`.

    Returns:
        Spikes ``[T, N, ...]``; state after the last step ``[N, ...]``; scale of each step and,
        last, the running scale afterwards ``[T + 1]``; spikes of each step ``[T]`` (float32);
        charges like the input with ``save="charge"``, else empty.
    """
    o = _decode(options)
    layout = _Layout(x)
    steps = x.shape[0]
    if not x.numel():
        return _empty_result(x, v, params, alpha, o, layout)
    flat = layout.sequence(x)
    whole, rows = buffers.sequence(x, steps, flat.shape[1])
    out = (*rows, *buffers.like(flat[0]))
    key = ("lif_forward", options, steps, v is None, alpha is None)
    core = B.core(
        key,
        x,
        flat.shape[1],
        (1, 1, 0, 0, *[1] * len(out)),
        lambda: _forward_core(o, steps, x.dtype),
        blocked.forward(o, x.dtype, _forward_core(o, steps, x.dtype))
        if blocked.covers(o, x)
        else None,
        steps,
    )
    with torch.no_grad():
        spikes, last, alphas, counts, *charges = core(
            flat,
            layout.state(v, x.dtype),
            params.detach(),
            None if alpha is None else alpha.detach(),
            *out,
        )
    if whole is not None:
        spikes, last = whole, out[steps]
    kept = layout.back(charges[0]) if charges else x.new_empty(0)
    return layout.back(spikes), layout.back(last), alphas, counts, kept


def _empty_result(
    x: Tensor,
    v: Tensor | None,
    params: Tensor,
    alpha: Tensor | None,
    o: LIFOptions,
    layout: _Layout,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    state = layout.state_like(x).zero_()
    if v is not None:
        state.copy_(v)
    alphas = params.new_zeros(x.shape[0] + 1)
    if alpha is not None:
        alphas += alpha
    charges = layout.like(x) if o.save == "charge" else x.new_empty(0)
    counts = x.new_zeros(x.shape[0], dtype=torch.float32)
    return layout.like(x), state, alphas, counts, charges


@_lif_op.register_fake
def _(
    x: Tensor, v: Tensor | None, params: Tensor, alpha: Tensor | None, options: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    steps = x.shape[0]
    layout = _Layout(x)
    return (
        layout.like(x),
        layout.state_like(x),
        params.new_empty(steps + 1),
        x.new_empty(steps, dtype=torch.float32),
        layout.like(x) if _decode(options).save == "charge" else x.new_empty(0),
    )


@torch.library.custom_op("qsnn_ext::lif_multi_step_backward", mutates_args=())
def _lif_backward_op(
    g_spikes: Tensor | None,
    g_v: Tensor | None,
    g_counts: Tensor | None,
    saved: Tensor,
    v: Tensor | None,
    params: Tensor,
    alphas: Tensor,
    options: str,
    need_v: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input and first state (or empty), like them, and of params ``[4]``."""
    o = _decode(options)
    layout = _Layout(saved)
    steps = saved.shape[0]
    if not saved.numel():
        g_v0 = layout.state_like(saved).zero_() if need_v else saved.new_empty(0)
        return layout.like(saved), g_v0, torch.zeros_like(params)
    flat = layout.sequence(saved)
    whole, rows = buffers.sequence(saved, steps, flat.shape[1])
    key = (
        ("lif_backward", options, steps, need_v, need_params),
        (g_spikes is None, g_v is None, v is None),
    )
    core = B.core(
        key,
        saved,
        flat.shape[1],
        (1, 1, 0, 1, 1, 0, 0, *[1] * len(rows)),
        lambda: _backward_core(o, steps, saved.dtype, need_v, need_params),
        blocked.backward(o, saved.dtype, need_v)
        if blocked.covers(o, saved) and not need_params
        else None,
        steps,
    )
    if g_counts is None:
        g_counts = params.new_zeros(steps, dtype=torch.float32)
    with torch.no_grad():
        results = list(
            core(
                None if g_spikes is None else layout.sequence(g_spikes),
                layout.state(g_v, saved.dtype),
                g_counts.detach(),
                flat,
                layout.state(v, saved.dtype),
                params.detach(),
                alphas.detach(),
                *rows,
            )
        )
    g_x = results[0] if whole is None else whole
    g_params = results.pop() if need_params else torch.zeros_like(params)
    g_v0 = layout.back(results[1]) if need_v else saved.new_empty(0)
    return layout.back(g_x), g_v0, g_params


@_lif_backward_op.register_fake
def _(
    g_spikes: Tensor | None,
    g_v: Tensor | None,
    g_counts: Tensor | None,
    saved: Tensor,
    v: Tensor | None,
    params: Tensor,
    alphas: Tensor,
    options: str,
    need_v: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    layout = _Layout(saved)
    g_v0 = layout.state_like(saved) if need_v else saved.new_empty(0)
    return layout.like(saved), g_v0, torch.empty_like(params)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, v, params, _, options = inputs
    # An unused membrane potential then costs no tensor of zeros as its gradient.
    ctx.set_materialize_grads(False)
    ctx.options = options
    _, _, alphas, _, charges = output
    if _decode(options).save == "charge":
        # Only a gradient of params would need the first state, and then the input is saved.
        ctx.save_for_backward(charges, None, params, alphas)
    else:
        ctx.save_for_backward(x, v, params, alphas)


def _backward(ctx: Any, g_spikes: Any, g_v: Any, _a: Any, g_counts: Any, _c: Any) -> Any:
    if g_spikes is None and g_v is None and g_counts is None:
        return None, None, None, None, None
    _, need_v, need_params = ctx.needs_input_grad[:3]
    g_x, g_v0, g_params = torch.ops.qsnn_ext.lif_multi_step_backward(
        g_spikes, g_v, g_counts, *ctx.saved_tensors, ctx.options, need_v, need_params
    )
    return g_x, g_v0 if need_v else None, g_params if need_params else None, None, None


_lif_op.register_autograd(_backward, setup_context=_setup_context)


def _autocast(
    x: Tensor, v: Tensor | None, params: Tensor, alpha: Tensor | None, options: str
) -> tuple[Any, ...]:
    """The state follows the input, and numbers are kept in the dtype of the computation."""
    dtype = compute_dtype(x)
    return (
        x,
        None if v is None else v.to(x.dtype),
        params.to(dtype),
        None if alpha is None else alpha.to(dtype),
        options,
    )


autocast.register("lif_multi_step", _autocast)
autocast.register("lif_multi_step_backward")


# --------------------------------------------------------------------------- calling it


@dataclass
class LIFResult:
    """What a layer's steps give.

    Attributes:
        spikes: ``[T, N, ...]`` like the input.
        v: state after the last step ``[N, ...]``.
        alphas: scale used at each step ``[T]``, detached; zeros where nothing is quantized.
        running_alpha: 0-dim running scale after the last step (``alpha="running"``), detached.
        counts: spikes of each step ``[T]`` (float32), differentiable: a firing rate made from it
            adds a constant to the spikes' gradient and reads nothing.
    """

    spikes: Tensor
    v: Tensor
    alphas: Tensor
    running_alpha: Tensor
    counts: Tensor


@functools.lru_cache(maxsize=256)
def _constant_params(
    values: tuple[float, float, float, float], dtype: torch.dtype, device: torch.device
) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def _params(values: tuple[float | Tensor, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if not any(isinstance(value, Tensor) for value in values):
        if torch.compiler.is_compiling():
            return torch.tensor(values, dtype=dtype, device=device)
        return _constant_params(values, dtype, device)
    return torch.stack(
        [torch.as_tensor(value, dtype=dtype, device=device).reshape(()) for value in values]
    )


def fits(*values: float | Tensor) -> bool:
    """Whether decay, gain, offset and threshold are numbers or single-element tensors."""
    return all(not isinstance(value, Tensor) or value.numel() == 1 for value in values)


def lif_multi_step(
    x: Tensor,
    v: Tensor | None,
    options: LIFOptions,
    *,
    decay: float | Tensor,
    gain: float | Tensor = 1.0,
    offset: float | Tensor = 0.0,
    threshold: float | Tensor = 1.0,
    alpha: Tensor | None = None,
    backend: B.Backend | None = None,
) -> LIFResult:
    """All time steps of a leaky integrate-and-fire layer with a quantized membrane potential.

    The recurrence is :func:`qsnn_ext.functional.lif_step`'s. float16 and bfloat16 inputs are
    computed in float32 within a step; what is carried and returned has the input's dtype.

    Args:
        x: input ``[T, N, ...]``; channels-last memory stays so.
        v: state before the first step ``[N, ...]``; ``None`` is zero.
        options: see :class:`LIFOptions`; ``save`` is chosen here.
        decay: leak factor, a number or a 0-dim tensor (which receives a gradient).
        gain: factor of the input, likewise.
        offset: added to every charge, likewise.
        threshold: firing threshold, likewise.
        alpha: 0-dim scale, for ``options.alpha`` ``"given"`` and ``"running"``.
        backend: overrides :func:`qsnn_ext.kernels.use_backend`.

    Returns:
        See :class:`LIFResult`.

    Raises:
        ConfigError: ``alpha`` missing or superfluous, or unknown backend.
    """
    if (alpha is None) == (options.bits > 0 and options.alpha != "dynamic"):
        raise ConfigError(
            f"alpha mode {options.alpha!r} takes {'no alpha' if alpha is not None else 'an alpha'}."
        )
    if backend is not None and backend != B.current_backend():
        with B.use_backend(backend):
            return lif_multi_step(
                x, v, options,
                decay=decay, gain=gain, offset=offset, threshold=threshold, alpha=alpha,
            )  # fmt: skip
    if B.current_backend() == "eager":
        return lif_multi_step_eager(
            x, v, options, decay=decay, gain=gain, offset=offset, threshold=threshold, alpha=alpha
        )
    dtype = compute_dtype(x)
    params = _params((decay, gain, offset, threshold), dtype, x.device)
    needed = torch.is_grad_enabled() and (
        x.requires_grad or params.requires_grad or (v is not None and v.requires_grad)
    )
    save: Save = "nothing"
    if needed:
        # Charges have the compute dtype, twice as wide as a half-precision input. A gradient of
        # the parameters needs input and first state.
        narrow = dtype != x.dtype
        recompute = v is None and _recompute(x)
        save = "input" if params.requires_grad or narrow or recompute else "charge"
    text = options.encode(save)
    spikes, last, alphas, counts, _ = torch.ops.qsnn_ext.lif_multi_step(
        x, v, params, None if alpha is None else alpha.to(dtype), text
    )
    alphas = alphas.detach()
    return LIFResult(spikes, last, alphas[:-1], alphas[-1], counts)


def _recompute(x: Tensor) -> bool:
    """Whether to save the input and compute the charges again: pays where the core is fused."""
    return x.shape[0] > 1 and (torch.compiler.is_compiling() or B.compiles(x.numel(), x.shape[0]))


def lif_multi_step_eager(
    x: Tensor,
    v: Tensor | None,
    options: LIFOptions,
    *,
    decay: float | Tensor,
    gain: float | Tensor = 1.0,
    offset: float | Tensor = 0.0,
    threshold: float | Tensor = 1.0,
    alpha: Tensor | None = None,
    surrogate: Callable[[Tensor], Tensor] | None = None,
) -> LIFResult:
    """The reference: a loop of :func:`qsnn_ext.functional.lif_step` in plain autograd.

    Takes and returns what :func:`lif_multi_step` does, and any ``surrogate`` callable in place of
    the one named in ``options``.
    """
    o = options
    dtype = compute_dtype(x)
    fire = surrogate or (lambda x: _EagerSurrogate.apply(x, o.surrogate))  # type: ignore[no-untyped-call]
    running = None if alpha is None else alpha.to(dtype)
    alphas: list[Tensor] = []

    def quantize(u: Tensor) -> Tensor:
        nonlocal running
        squashed = torch.tanh(u) if o.squash else u
        used = F.membrane_alpha(squashed, o.scale) if running is None else running
        if o.alpha == "running":
            observed = F.membrane_alpha(squashed, o.scale).clamp(min=0)
            used = torch.where(used > 0, used, observed)
            running = used + o.momentum * (observed - used)
        alphas.append(used)
        return F.quantize_symmetric(squashed, used, o.bits)

    state = torch.zeros_like(x[0]) if v is None else v.to(x.dtype)
    spikes = []
    for step in x:
        spike, after = F.lif_step(
            step.to(dtype),
            state.to(dtype),
            decay=decay,
            gain=gain,
            offset=offset,
            threshold=threshold,
            reset=o.reset,
            v_reset=o.v_reset,
            detach_reset=o.detach_reset,
            surrogate=fire,
            quantize=quantize if o.bits else None,
            order=o.order,
        )
        spikes.append(spike.to(x.dtype))
        state = after.to(x.dtype)
    stacked = torch.stack(spikes)
    scales = torch.stack(alphas) if alphas else x.new_zeros(x.shape[0], dtype=dtype)
    counts = stacked.flatten(1).sum(1, dtype=torch.promote_types(torch.float32, dtype)).float()
    last = x.new_zeros((), dtype=dtype) if running is None else running
    return LIFResult(stacked, state, scales, last, counts)


class _EagerSurrogate(torch.autograd.Function):
    """A :class:`Surrogate` as the callable that the eager loop wants."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, options: Surrogate) -> Tensor:
        ctx.save_for_backward(x)
        ctx.options = options
        return (x > 0 if options.strict else x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        o = ctx.options
        return grad * DERIVATIVES[o.kind](x, o.a, o.b), None
