"""The steps of a layer of neurons with a quantized membrane potential, as one operation.

``qsnn_ext::lif_multi_step`` runs all ``T`` steps of :func:`qsnn_ext.functional.lif_step`, or of
:func:`qsnn_ext.functional.delayed_lif_step`, and has an analytic backward. Its backends
(:mod:`qsnn_ext.kernels.backends`) agree with the eager loop bit for bit in float32 (``tanh``
excepted: see ``docs/performance.md``).

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
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qsnn_ext.errors import ConfigError
from qsnn_ext.kernels import _native, autocast, backends
from qsnn_ext.kernels import backend as B
from qsnn_ext.kernels.backends import Call, eager, triton
from qsnn_ext.kernels.grid import compute_dtype
from qsnn_ext.kernels.options import LIFOptions, Save, decode
from qsnn_ext.kernels.recurrence import needs_first_state
from qsnn_ext.kernels.watching import is_watched


class _Layout:
    """Between ``[T, N, ...]`` in any memory order and the cores' ``[T, M]``.

    Neurons are flattened in the order in which they lie in memory, time outermost, so that a
    channels-last input is neither copied nor given back in another layout.
    """

    def __init__(self, x: Tensor) -> None:
        strides = x.stride()
        self.order = [0, *sorted(range(1, x.dim()), key=lambda d: -strides[d])]
        self.shape = [x.shape[d] for d in self.order]
        self.inverse = [self.order.index(d) for d in range(len(self.order))]

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
            shaped = flat.view(self.shape).permute(self.inverse)
        else:
            shaped = flat.view(self.shape[1:]).permute([d - 1 for d in self.inverse[1:]])
        # Not a view in autograd's books: hosts call detach_() on states, which views refuse.
        return shaped.data

    def like(self, x: Tensor) -> Tensor:
        """An unwritten tensor of the input's shape in the layout of :meth:`back`."""
        return x.new_empty(self.shape).permute(self.inverse)

    def state_like(self, x: Tensor) -> Tensor:
        """Likewise for a state ``[N, ...]``."""
        return x.new_empty(self.shape[1:]).permute([d - 1 for d in self.inverse[1:]])


def _forward(
    x: Tensor, v: Tensor | None, params: Tensor, alpha: Tensor | None, options: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All steps of one layer.

    Args:
        x: input ``[T, N, ...]``.
        v: state before the first step ``[N, ...]``; ``None`` is zero.
        params: decay, gain, offset, threshold ``[4]`` and, for the delayed reset, the next float
            above the threshold ``[5]``, in the compute dtype.
        alpha: 0-dim scale, for ``"given"`` and ``"running"``.
        options: :meth:`LIFOptions.encode`.

    Returns:
        Spikes ``[T, N, ...]``; state after the last step ``[N, ...]``; scale of each step and,
        last, the running scale afterwards ``[T + 1]``; spikes of each step ``[T]`` (float32);
        charges like the input with ``save="charge"``, else empty.
    """
    o = decode(options)
    layout = _Layout(x)
    if not x.numel():
        return _empty_result(x, v, params, alpha, o, layout)
    flat = layout.sequence(x)
    steps, size = flat.shape
    call = Call("forward", o, steps, x.dtype, x.device, size, (v is None, alpha is None))
    with torch.no_grad():
        spikes, last, alphas, counts, *charges = backends.run(
            call,
            flat,
            layout.state(v, x.dtype),
            params.detach(),
            None if alpha is None else alpha.detach(),
        )
    kept = layout.back(charges[0]) if charges else x.new_empty(0)
    return layout.back(spikes), layout.back(last), alphas, counts, kept


_lif_op = torch.library.custom_op("qsnn_ext::lif_multi_step", _forward, mutates_args=())


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
        layout.like(x) if decode(options).save == "charge" else x.new_empty(0),
    )


def _gradients(
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
    """Gradients of input and first state (or empty), like them, and of params."""
    o = decode(options)
    layout = _Layout(saved)
    if not saved.numel():
        g_v0 = layout.state_like(saved).zero_() if need_v else saved.new_empty(0)
        return layout.like(saved), g_v0, torch.zeros_like(params)
    flat = layout.sequence(saved)
    steps, size = flat.shape
    absent = (g_spikes is None, g_v is None, v is None)
    call = Call("backward", o, steps, saved.dtype, saved.device, size, absent, need_v, need_params)
    if g_counts is None:
        g_counts = params.new_zeros(steps, dtype=torch.float32)
    with torch.no_grad():
        results = list(
            backends.run(
                call,
                None if g_spikes is None else layout.sequence(g_spikes),
                layout.state(g_v, saved.dtype),
                g_counts.detach(),
                flat,
                layout.state(v, saved.dtype),
                params.detach(),
                alphas.detach(),
            )
        )
    g_params = results.pop() if need_params else torch.zeros_like(params)
    g_v0 = layout.back(results[1]) if need_v else saved.new_empty(0)
    return layout.back(results[0]), g_v0, g_params


_lif_backward_op = torch.library.custom_op(
    "qsnn_ext::lif_multi_step_backward", _gradients, mutates_args=()
)


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
    # Forward and backward are run alike: another tanh may pass over the largest potential, whose
    # gradient is then cut off. And a backward may run in another thread than its forward.
    ctx.backend = B.current_backend()
    _, _, alphas, _, charges = output
    o = decode(options)
    if o.save == "charge":
        # A gradient of params would need the first state too, and then the input is saved.
        ctx.save_for_backward(charges, v if needs_first_state(o) else None, params, alphas)
    else:
        ctx.save_for_backward(x, v, params, alphas)


def _backward_by(gradients: Callable[..., Any]) -> Callable[..., Any]:
    def backward(ctx: Any, g_spikes: Any, g_v: Any, _a: Any, g_counts: Any, _c: Any) -> Any:
        if g_spikes is None and g_v is None and g_counts is None:
            return None, None, None, None, None
        _, need_v, need_params = ctx.needs_input_grad[:3]
        with B.use_backend(ctx.backend):
            g_x, g_v0, g_params = gradients(
                g_spikes, g_v, g_counts, *ctx.saved_tensors, ctx.options, need_v, need_params
            )
        return g_x, g_v0 if need_v else None, g_params if need_params else None, None, None

    return backward


_lif_op.register_autograd(_backward_by(_lif_backward_op), setup_context=_setup_context)


class _Function(torch.autograd.Function):
    """The operation without the dispatcher, whose way through Python outlasts a small layer."""

    # With a `setup_context` of its own PyTorch would look at the signature in every call.
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        outputs = _forward(*inputs)
        _setup_context(ctx, inputs, outputs)
        return outputs

    backward = staticmethod(once_differentiable(_backward_by(_gradients)))  # type: ignore[assignment]


def _operation(x: Tensor) -> Callable[..., Any]:
    """The operation as whoever looks on needs it: compilers, tracers, transforms and autocast."""
    seen = (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or is_watched()
        or type(x) not in (Tensor, torch.nn.Parameter)
        or x.device.type not in ("cpu", "cuda")  # without data
        or torch.is_autocast_enabled(x.device.type)
    )
    return torch.ops.qsnn_ext.lif_multi_step if seen else _Function.apply


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
    values: tuple[float, ...], delayed: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    with torch.inference_mode(False):
        params = torch.tensor(values, dtype=dtype, device=device)
        return _with_above(params) if delayed else params


def _with_above(params: Tensor) -> Tensor:
    theta = params.detach()[3:]
    return torch.cat([params, torch.nextafter(theta, torch.full_like(theta, torch.inf))])


def _params(
    values: tuple[float | Tensor, ...], delayed: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    if not torch.compiler.is_compiling() and not torch._C._is_tracing():
        # Reading a number costs less than stacking tensors, but waits for other devices than the
        # CPU. Nothing is kept by identity: whoever writes to a decay is heard.
        numbers = [n for value in values if (n := _number(value)) is not None]
        if len(numbers) == len(values):
            return _constant_params(tuple(numbers), delayed, dtype, device)
    params = torch.stack(
        [torch.as_tensor(value, dtype=dtype, device=device).reshape(()) for value in values]
    )
    return _with_above(params) if delayed else params


def _number(value: float | Tensor) -> float | None:
    """The value as a number, where reading it waits for nothing and loses no gradient."""
    if not isinstance(value, Tensor):
        return value
    if value.device.type != "cpu" or (value.requires_grad and torch.is_grad_enabled()):
        return None
    return float(value.item())


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

    The recurrence is :func:`qsnn_ext.functional.lif_step`'s, with ``options.delayed``
    :func:`qsnn_ext.functional.delayed_lif_step`'s. float16 and bfloat16 inputs are computed in
    float32 within a step; what is carried and returned has the input's dtype.

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
        ConfigError: ``alpha`` missing or superfluous, unknown backend, or a delayed reset in half
            precision, which cannot say on which side of the threshold a state is.
    """
    o = options
    if (alpha is None) == (bool(o.bits) and o.alpha != "dynamic"):
        raise ConfigError(
            f"alpha mode {o.alpha!r} takes {'no alpha' if alpha is not None else 'an alpha'}."
        )
    if backend is not None and backend != B.current_backend():
        with B.use_backend(backend):
            return lif_multi_step(
                x, v, o, decay=decay, gain=gain, offset=offset, threshold=threshold, alpha=alpha
            )
    dtype = compute_dtype(x)
    if o.delayed:
        if dtype != x.dtype:
            raise ConfigError(f"a delayed reset needs currents in float32, got {x.dtype}.")
        v = torch.zeros_like(x[0]) if v is None else v
    if B.current_backend() == "eager":
        return _run_eagerly(
            x, v, o, decay=decay, gain=gain, offset=offset, threshold=threshold, alpha=alpha
        )
    params = _params((decay, gain, offset, threshold), o.delayed, dtype, x.device)
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
    spikes, last, alphas, counts, _ = _operation(x)(
        x, v, params, None if alpha is None else alpha.to(dtype), o.encode(save)
    )
    alphas = alphas.detach()
    return LIFResult(spikes, last, alphas[:-1], alphas[-1], counts)


def _recompute(x: Tensor) -> bool:
    """Whether to save the input and compute the charges again: pays where the core is fused."""
    # A compiler that traces this shall not look into how the others decide.
    return x.shape[0] > 1 and (
        torch.compiler.is_compiling()
        or _native.wanted(x) is not None
        or triton.recomputes(x)
        or B.compiles(x.numel(), x.shape[0])
    )


def _run_eagerly(
    x: Tensor, v: Tensor | None, o: LIFOptions, *, alpha: Tensor | None, **numbers: float | Tensor
) -> LIFResult:
    """The reference: the eager loop with the quantizer and the surrogate that the options name."""
    dtype = compute_dtype(x)
    rounding = eager.Rounding(o, None if alpha is None else alpha.to(dtype))
    spikes, state = eager.run(
        x, v, numbers,
        reset=o.reset, v_reset=o.v_reset, detach_reset=o.detach_reset, delayed=o.delayed,
        order=o.order, fire=eager.surrogate(o.surrogate), quantize=rounding if o.bits else None,
    )  # fmt: skip
    alphas = rounding.alphas
    scales = torch.stack(alphas) if alphas else x.new_zeros(x.shape[0], dtype=dtype)
    counts = spikes.flatten(1).sum(1, dtype=torch.promote_types(torch.float32, dtype)).float()
    last = x.new_zeros((), dtype=dtype) if rounding.running is None else rounding.running
    return LIFResult(spikes, state, scales, last, counts)
