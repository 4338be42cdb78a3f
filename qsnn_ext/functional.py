"""Pure tensor mathematics of Q-SNNs: no modules, no state, no host library.

Equation numbers are those of Wei et al., "Q-SNNs: Quantized Spiking Neural Networks", ACM MM 2024.
A function that rounds has one forward, used by training and by export alike, and a backward that
is a straight-through estimator stated in its docstring.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qsnn_ext.errors import ConfigError, InputError, InputTypeError

SignGradient = Literal["clipped", "identity", "annealed"]
Standardize = Literal["layer", "channel"]
MembraneScale = Literal["max", "absmax"]
Squash = Literal["tanh"]
Reset = Literal["hard", "soft", "none"]
StepOrder = Literal["fire_first", "quantize_first"]


def check_floating(x: Tensor, what: str) -> None:
    """Raise :class:`InputTypeError` unless ``x`` is a real floating point tensor.

    Args:
        x: tensor of any shape.
        what: name of the thing the tensor was given to, for the message.
    """
    if not isinstance(x, Tensor):
        raise InputTypeError(f"{what} needs a tensor, got a {type(x).__name__}.")
    if not x.is_floating_point():
        raise InputTypeError(
            f"{what} needs a floating point tensor, got {x.dtype}; convert it with x.float()."
        )


# --------------------------------------------------------------------------- signs


class _Function(torch.autograd.Function):
    """Forward and context apart, which is what the transforms of ``torch.func`` ask for."""

    generate_vmap_rule = True


class _Sign(_Function):
    @staticmethod
    def forward(x: Tensor, gradient: str, temperature: Tensor | None) -> Tensor:
        # Not torch.sign: one bit has no room for a zero, so sign(0) = +1 (and sign(NaN) = NaN).
        one = torch.ones_like(x)
        return torch.where(x >= 0, one, torch.where(x < 0, -one, x))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, ctx.gradient, temperature = inputs
        if ctx.gradient == "annealed":
            assert temperature is not None  # sign() has checked it
            ctx.save_for_backward(x, temperature)
        elif ctx.gradient == "clipped":
            ctx.save_for_backward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.gradient == "clipped":
            (x,) = ctx.saved_tensors
            grad = grad * (x.abs() <= 1)
        elif ctx.gradient == "annealed":
            x, t = ctx.saved_tensors
            t = t.to(x.dtype)
            k = torch.clamp(1 / t, min=1)
            grad = grad * (k * t * (1 - torch.tanh(t * x).square()))
        return grad, None, None


def sign(
    x: Tensor, gradient: SignGradient = "clipped", temperature: Tensor | float | None = None
) -> Tensor:
    """Sign with values in {-1, +1}, ``sign(0) = +1`` (Eq. 6), and a chosen pseudo-gradient.

    Backward, for an incoming gradient ``g``:

    - ``"clipped"``: ``g * 1[|x| <= 1]``, the clipped straight-through estimator;
    - ``"identity"``: ``g``;
    - ``"annealed"``: ``g * k*t*(1 - tanh(t*x)**2)`` with ``k = max(1/t, 1)``, the error decay
      estimator of IR-Net (Qin et al., CVPR 2020), where ``t`` is the temperature.

    Args:
        x: real tensor of any shape.
        gradient: which pseudo-gradient.
        temperature: ``t``, for ``"annealed"`` only; a number or a 0-dim tensor.

    Returns:
        Tensor like ``x`` (NaN stays NaN).

    Raises:
        ConfigError: unknown ``gradient``, or ``"annealed"`` without a temperature.
        InputTypeError: ``x`` is not floating point.
    """
    check_floating(x, "sign")
    if gradient not in ("clipped", "identity", "annealed"):
        raise ConfigError(
            f"sign gradient {gradient!r} is unknown; choose 'clipped', 'identity' or 'annealed'."
        )
    if gradient == "annealed":
        if temperature is None:
            raise ConfigError("the annealed sign gradient needs a temperature (0.1 to 10).")
        temperature = torch.as_tensor(temperature, dtype=x.dtype, device=x.device)
    else:
        temperature = None
    out: Tensor = _Sign.apply(x, gradient, temperature)  # type: ignore[no-untyped-call]
    return out


def check_standardize(shape: torch.Size, over: Standardize) -> None:
    """Raise :class:`ConfigError` unless weights of this shape can be standardised over ``over``.

    Args:
        shape: of the weights, ``[C_out, ...]``.
        over: ``"layer"`` or ``"channel"``.
    """
    if over not in ("layer", "channel"):
        raise ConfigError(f"standardize={over!r} is unknown; choose 'layer', 'channel' or None.")
    group = math.prod(shape if over == "layer" else shape[1:]) if shape[0] else 0
    if group < 2:
        raise ConfigError(
            f"weights of shape {tuple(shape)} have {group} weight(s) per {over}, which has no "
            f"standard deviation; use standardize={'None' if over == 'layer' else repr('layer')}."
        )


def standardize(w: Tensor, over: Standardize) -> Tensor:
    """``(w - mean) / std`` over the whole layer (Eq. 16) or over each output channel.

    The standard deviation is the unbiased one. Mean and deviation are differentiated through.

    Args:
        w: latent weights ``[C_out, ...]``.
        over: ``"layer"`` (the paper) or ``"channel"`` (the authors' code; dimension 0).

    Returns:
        Tensor like ``w``. Where all weights are equal the deviation is taken as 1, giving zeros.

    Raises:
        ConfigError: unknown ``over``, or a group of a single weight, which has no deviation.
    """
    check_standardize(w.shape, over)
    dims = tuple(range(0 if over == "layer" else 1, w.dim()))
    variance, mean = torch.var_mean(w, dim=dims, keepdim=True)
    # sqrt has an infinite slope at 0, so constant weights are kept away from it.
    constant = variance == 0
    std = torch.where(constant, torch.ones_like(variance), variance).sqrt()
    return (w - mean) / std


# --------------------------------------------------------------------------- k-bit grids


def levels(bits: int) -> int:
    """``n = 2**(bits-1) - 1``: the largest code of the symmetric ``bits``-bit grid (Eq. 10).

    Args:
        bits: 2 to 8.
    """
    return int(2 ** (bits - 1)) - 1


def symmetric_codes(x: Tensor, alpha: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round to the symmetric ``bits``-bit grid of step ``alpha/n`` (Eq. 10, 11).

    ``codes = round_half_even(clip(x/alpha, -1, 1) * n)`` and ``scale = alpha/n`` with
    ``n = 2**(bits-1) - 1``; the quantized value is exactly ``codes * scale``. This is the one
    rounding function of the package. Where ``alpha <= 0`` (all membrane potentials at or below
    zero) codes and scale are 0. NaN in ``x`` or ``alpha`` stays NaN, and infinity in ``x`` becomes
    it: no level stands for either.

    Args:
        x: real tensor.
        alpha: largest representable value, broadcastable to ``x``.
        bits: 2 to 8.

    Returns:
        ``codes`` like ``x`` (whole numbers in floating point) and ``scale`` like ``alpha``.
    """
    n = levels(bits)
    empty = alpha <= 0
    # Dividing by infinity gives code 0 with one select, instead of a second one on the codes.
    ratio = x / torch.where(empty, torch.inf, alpha)
    codes = torch.round(ratio.clamp(-1, 1) * n) + x * 0.0
    scale = torch.where(empty, 0, alpha / n)
    return codes, scale


class _QuantizeSymmetric(_Function):
    @staticmethod
    def forward(x: Tensor, alpha: Tensor, bits: int) -> Tensor:
        codes, scale = symmetric_codes(x, alpha, bits)
        return codes * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, alpha, _ = inputs
        ctx.save_for_backward((x.abs() <= alpha) & (alpha > 0))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None


def quantize_symmetric(x: Tensor, alpha: Tensor, bits: int) -> Tensor:
    """Value of :func:`symmetric_codes` with the straight-through gradient ``g * 1[|x| <= alpha]``.

    ``alpha`` is a constant of the backward pass; where ``alpha <= 0`` the gradient is 0.

    Args:
        x: real tensor.
        alpha: largest representable value, broadcastable to ``x``.
        bits: 2 to 8.

    Returns:
        Tensor like ``x``.
    """
    out: Tensor = _QuantizeSymmetric.apply(x, alpha, bits)  # type: ignore[no-untyped-call]
    return out


class _QuantizeLearned(_Function):
    @staticmethod
    def forward(x: Tensor, alpha: Tensor, bits: int) -> Tensor:
        codes, scale = symmetric_codes(x, alpha, bits)
        return codes * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, alpha, ctx.bits = inputs
        ctx.save_for_backward(x, alpha)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, alpha = ctx.saved_tensors
        n = levels(ctx.bits)
        inside = (x.abs() <= alpha) & (alpha > 0)
        codes, _ = symmetric_codes(x, alpha, ctx.bits)
        slope = codes / n - torch.where(inside, x / alpha, 0.0)
        features = max(1, x[0].numel() if x.dim() > 1 else x.numel())
        return grad * inside, (grad * slope).sum() / math.sqrt(features * n), None


def quantize_learned(x: Tensor, alpha: Tensor, bits: int) -> Tensor:
    """Value of :func:`symmetric_codes` with gradients of ``x`` and of its scale (LSQ).

    Learned step size quantization (Esser et al., ICLR 2020, Eq. 3 and Section 2.2), with
    ``n = 2**(bits-1) - 1`` and ``F`` neurons in a sample: ``dq/dx = 1[|x| <= alpha]`` and
    ``dq/dalpha = codes/n - 1[|x| <= alpha] * x/alpha``, the latter times ``1/sqrt(F*n)``, so that
    layers of any size take steps of a size.

    Args:
        x: real tensor ``[N, ...]``.
        alpha: 0-dim, largest representable value; where it is 0 or below, ``x`` has no gradient.
        bits: 2 to 8.

    Returns:
        Tensor like ``x``.
    """
    out: Tensor = _QuantizeLearned.apply(x, alpha, bits)  # type: ignore[no-untyped-call]
    return out


def membrane_alpha(v: Tensor, scale: MembraneScale) -> Tensor:
    """The layer's scale ``alpha_u``: ``max(v)`` (the paper) or ``max|v|`` (the authors' code).

    NaN and infinity are left out, so that one neuron that holds them does not take the others'
    levels away.

    Args:
        v: membrane potentials, any shape; an empty tensor has alpha 0.
        scale: ``"max"`` or ``"absmax"``.

    Returns:
        0-dim tensor, detached. It may be negative for ``"max"``; :func:`symmetric_codes` turns
        that into a zero state.

    Raises:
        ConfigError: unknown ``scale``.
    """
    if scale not in ("max", "absmax"):
        raise ConfigError(f"scale={scale!r} is unknown; choose 'max' or 'absmax'.")
    v = v.detach()
    if v.numel() == 0:
        return v.new_zeros(())
    v = v if scale == "max" else v.abs()
    return torch.where(torch.isfinite(v), v, -torch.inf if scale == "max" else 0.0).amax()


def quantize_membrane(u: Tensor, bits: int, alpha: Tensor, squash: Squash | None = None) -> Tensor:
    """The ``bits``-bit membrane potential ``Qu(u)`` (Eq. 10, 11).

    With ``squash="tanh"`` (the authors' code) ``v = tanh(u)`` is quantized instead of ``u``, and
    ``alpha`` must be a scale of ``v``.

    Backward: ``g * 1[|v| <= alpha]``, times ``1 - v**2`` with the squash; ``alpha`` is a constant.

    Args:
        u: membrane potentials, any shape.
        bits: 2 to 8.
        alpha: 0-dim scale, see :func:`membrane_alpha`.
        squash: ``None`` or ``"tanh"``.

    Returns:
        Tensor like ``u``.
    """
    v = torch.tanh(u) if squash == "tanh" else u
    return quantize_symmetric(v, alpha, bits)


# --------------------------------------------------------------------------- straight-through


class _StraightThrough(_Function):
    @staticmethod
    def forward(x: Tensor, value: Tensor) -> Tensor:
        return value.expand_as(x).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        """Nothing is needed."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """``value`` going forward, the gradient of ``x`` going back.

    Args:
        x: tensor of any shape.
        value: broadcastable to ``x``; a constant of the backward pass.

    Returns:
        Tensor of the shape of ``x`` and the dtype of ``value``.
    """
    out: Tensor = _StraightThrough.apply(x, value)  # type: ignore[no-untyped-call]
    return out


# --------------------------------------------------------------------------- neuron


class _Triangle(_Function):
    @staticmethod
    def forward(x: Tensor, beta: float, strict: bool) -> Tensor:
        return (x > 0 if strict else x >= 0).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, ctx.beta, _ = inputs
        ctx.save_for_backward(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return grad * (ctx.beta - x.abs()).clamp(min=0), None, None


def check_beta(beta: float) -> float:
    """Half-width and height of a triangular surrogate, checked.

    Raises:
        ConfigError: not positive.
    """
    if not beta > 0:
        raise ConfigError(f"beta={beta!r} of the triangular surrogate must be positive.")
    return beta


def triangle(x: Tensor, beta: float = 1.0, strict: bool = False) -> Tensor:
    """Fire with the triangular surrogate gradient (Eq. 2, 5).

    Forward ``1[x >= 0]`` (``1[x > 0]`` when ``strict``, snnTorch's convention), backward
    ``g * max(0, beta - |x|)``, for ``x = u - theta``.

    Args:
        x: membrane potential less the threshold, any shape.
        beta: half-width and height of the triangle; positive.
        strict: whether the threshold itself does not fire.

    Returns:
        Spikes, 0 or 1, like ``x``.
    """
    out: Tensor = _Triangle.apply(x, beta, strict)  # type: ignore[no-untyped-call]
    return out


def reset_membrane(
    h: Tensor, spike: Tensor, reset: Reset, threshold: float | Tensor, v_reset: float = 0.0
) -> Tensor:
    """The membrane potential after firing (Eq. 3).

    ``hard``: ``h*(1-s) + v_reset*s``; ``soft``: ``h - theta*s``; ``none``: ``h``.

    Args:
        h: membrane potential before the reset, any shape.
        spike: the spikes ``s``, 0 or 1, like ``h``.
        reset: ``"hard"``, ``"soft"`` or ``"none"``.
        threshold: firing threshold ``theta``, for the soft reset.
        v_reset: target of the hard reset.

    Returns:
        Tensor like ``h``.

    Raises:
        ConfigError: unknown ``reset``.
    """
    if reset == "hard":
        v = (1.0 - spike) * h
        return v if v_reset == 0.0 else v + spike * v_reset
    if reset == "soft":
        return h - spike * threshold
    if reset != "none":
        raise ConfigError(f"reset={reset!r} is unknown; choose 'hard', 'soft' or 'none'.")
    return h


def lif_step(
    x: Tensor,
    v: Tensor,
    *,
    decay: float | Tensor,
    gain: float | Tensor = 1.0,
    offset: float | Tensor = 0.0,
    threshold: float | Tensor = 1.0,
    reset: Reset = "hard",
    v_reset: float = 0.0,
    detach_reset: bool = False,
    surrogate: Callable[[Tensor], Tensor] = triangle,
    quantize: Callable[[Tensor], Tensor] | None = None,
    order: StepOrder = "fire_first",
) -> tuple[Tensor, Tensor]:
    """One time step of a leaky integrate-and-fire layer with a quantized membrane potential.

    ``fire_first`` (Eq. 12)::

        h = decay*v + gain*x + offset;  s = Theta(h - theta);  v' = Q(reset(h, s))

    ``quantize_first`` (Algorithm 1)::

        h = Q(decay*v + gain*x + offset);  s = Theta(h - theta);  v' = reset(h, s)

    Args:
        x: input current ``[N, ...]``.
        v: membrane potential carried from the step before, like ``x``.
        decay: leak factor ``tau`` of Eq. 1.
        gain: factor of the input.
        offset: constant added to every charge.
        threshold: firing threshold ``theta``.
        reset: see :func:`reset_membrane`.
        v_reset: target of the hard reset.
        detach_reset: take the spike inside the reset as a constant of the backward pass.
        surrogate: maps ``h - theta`` to spikes and carries the surrogate gradient.
        quantize: ``Qu``; ``None`` leaves the membrane potential in floating point.
        order: which of the two models above.

    Returns:
        ``(spikes, v')``, both like ``x``.

    Raises:
        ConfigError: unknown ``order`` or ``reset``.
    """
    check_order(order)
    h = decay * v + gain * x
    if not isinstance(offset, float) or offset != 0.0:
        h = h + offset
    if quantize is not None and order == "quantize_first":
        h = quantize(h)
    spike = surrogate(h - threshold)
    v = reset_membrane(h, spike.detach() if detach_reset else spike, reset, threshold, v_reset)
    if quantize is not None and order == "fire_first":
        v = quantize(v)
    return spike, v


def delayed_state(
    u: Tensor,
    fired: Tensor,
    threshold: float | Tensor,
    reset: Reset,
    quantize: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """What to store of a potential whose reset the next step reads from the stored value.

    Rounding ``u`` itself could lift a silent neuron over the threshold, or put one that fired below
    it. So what is rounded is the potential after the reset, ``v``; stored is ``Q(v) + s*theta``,
    and where that lies on the wrong side of the threshold the largest level not above it (no
    spike) or the next number above it (a spike). One spike is followed by exactly one reset.

    Args:
        u: potential before the reset ``[N, ...]``.
        fired: 1 where ``u`` is above the threshold, else 0; a constant of the backward pass.
        threshold: firing threshold.
        reset: the reset that is due; with ``"none"`` ``u`` is simply rounded.
        quantize: rounds potentials; also returns the 0-dim distance of two levels.

    Returns:
        Tensor like ``u``.
    """
    if reset == "none":
        return quantize(u)[0]
    value, step = quantize(reset_membrane(u, fired, reset, threshold))
    stored = value + fired * threshold
    with torch.no_grad():
        theta = torch.as_tensor(threshold, dtype=stored.dtype, device=stored.device)
        # The largest level not above theta; the product may round up past it, hence the second try.
        code = torch.floor(theta / torch.where(step > 0, step, 1))
        below = torch.where(code * step > theta, (code - 1) * step, code * step)
        above = torch.nextafter(theta, torch.full_like(theta, torch.inf))
        is_fired = fired > 0
        # NaN is neither above nor below, and stays.
        sided = torch.where(is_fired & (stored <= theta), above, stored)
        sided = torch.where(~is_fired & (sided > theta), torch.minimum(below, theta), sided)
    return straight_through(stored, sided)


def delayed_lif_step(
    x: Tensor,
    v: Tensor,
    *,
    decay: float | Tensor,
    gain: float | Tensor = 1.0,
    offset: float | Tensor = 0.0,
    threshold: float | Tensor = 1.0,
    reset: Reset = "soft",
    surrogate: Callable[[Tensor], Tensor] = triangle,
    quantize: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    order: StepOrder = "fire_first",
) -> tuple[Tensor, Tensor]:
    """One step of a layer that resets at the start of the next step (snnTorch's ``Leaky``).

    The reset is read from the stored potential, ``r = Theta(v - theta)``::

        soft:  h = decay*v + gain*x + offset - r*theta
        hard:  h = decay*(1-r)*v + gain*x + offset

    then ``s = Theta(h - theta)``, and stored is :func:`delayed_state` of ``h``, or in the order
    ``quantize_first`` the rounded ``h`` that decided the spike.

    Args:
        x: input current ``[N, ...]``.
        v: stored potential of the step before, like ``x``.
        decay: leak factor.
        gain: factor of the input.
        offset: constant added to every charge.
        threshold: firing threshold ``theta``.
        reset: ``"soft"``, ``"hard"`` (to zero) or ``"none"``.
        surrogate: maps ``h - theta`` to spikes; it should not fire at the threshold itself.
        quantize: see :func:`delayed_state`; ``None`` stores ``h``.
        order: see :func:`lif_step`.

    Returns:
        ``(spikes, v')``, both like ``x``.

    Raises:
        ConfigError: unknown ``order`` or ``reset``.
    """
    check_order(order)
    due = surrogate(v - threshold).detach()
    if reset == "hard":
        v = (1 - due) * v
    h = decay * v + gain * x
    if not isinstance(offset, float) or offset != 0.0:
        h = h + offset
    if reset == "soft":
        h = h - due * threshold
    if quantize is not None and order == "quantize_first":
        h = quantize(h)[0]
    spike = surrogate(h - threshold)
    if quantize is None or order == "quantize_first":
        return spike, h
    return spike, delayed_state(h, spike.detach(), threshold, reset, quantize)


def check_order(order: object) -> None:
    """Raise :class:`ConfigError` unless ``order`` is one of the two step orders."""
    if order not in ("fire_first", "quantize_first"):
        raise ConfigError(
            f"order={order!r} is unknown; choose 'fire_first' (Eq. 12) or "
            "'quantize_first' (Algorithm 1)."
        )


def check_rank(x: Tensor, what: str, minimum: int, layout: str) -> None:
    """Raise :class:`InputError` when ``x`` has fewer than ``minimum`` dimensions.

    Args:
        x: tensor of any shape.
        what: name of the thing the tensor was given to, for the message.
        minimum: the number of dimensions it needs.
        layout: these dimensions by name, for the message.
    """
    if x.dim() < minimum:
        raise InputError(
            f"{what} expects input of shape {layout}, got {tuple(x.shape)}; "
            f"add the missing dimension or change the step mode."
        )


def entropy(p: Tensor) -> Tensor:
    """``H = -[p ln p + (1-p) ln(1-p)]`` in nats (Eq. 14), 0 at p = 0 and p = 1.

    Args:
        p: probabilities, any shape.

    Returns:
        Tensor like ``p``.
    """
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))
