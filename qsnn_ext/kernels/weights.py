"""Binary weights: standardise, sign and scale as one operation, prepared once per optimizer step.

``qsnn_ext::binary_weight`` computes what :class:`qsnn_ext.quantizers.BinaryWeight` does and has an
analytic backward that saves the latent weights and two numbers per group. Means and deviations are
summed in another order than the quantizer's, so scales agree to rounding (1e-6 relative), and a
sign can differ only where a standardised weight is zero to that rounding.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qsnn_ext.errors import StateError
from qsnn_ext.kernels import autocast, buffers
from qsnn_ext.kernels import backend as B
from qsnn_ext.quantizers import BinaryWeight, Quantizer

# --------------------------------------------------------------------------- cores


# Sums run over rows (output channels) first and over the rows' sums after that, so that one loop
# over a row makes all sums that need the row.


def _forward_core(standardize: str, scale: str) -> Callable[..., Any]:
    """``(w [C, K] (, out)) -> value [C, K], mean, std ([1, 1] or [C, 1]), alpha [C, 1]``.

    With ``out``, like ``w``, the value is written into it and ``None`` is returned.
    """

    def row(x: Tensor) -> Tensor:
        return B.total(x, (1,), keepdim=True)

    def over_group(rows: Tensor) -> Tensor:
        return B.total(rows, (0,), keepdim=True) if standardize == "layer" else rows

    def forward(w: Tensor, *out: Tensor) -> Any:
        if standardize == "none":
            mean, std = w.new_zeros(1, 1), w.new_ones(1, 1)
            alpha = row(w.abs()) / w.shape[1]
            centred = w
        else:
            count = w.numel() if standardize == "layer" else w.shape[1]
            # Counted from one of them, weights that are all equal have exactly that as their mean.
            origin = w[:1, :1] if standardize == "layer" else w[:, :1]
            mean = origin + over_group(row(w - origin)) / count
            centred = w - mean
            variance = over_group(row(centred.square())) / (count - 1)
            std = torch.where(variance == 0, 1.0, variance).sqrt()
            alpha = row(centred.abs()) / w.shape[1] / std
        if scale == "power_of_two":
            alpha = torch.where(alpha > 0, torch.exp2(torch.round(torch.log2(alpha))), alpha)
        elif scale == "none":
            alpha = torch.ones_like(alpha)
        # A NaN weight compares false twice and stays NaN.
        value = torch.where(centred >= 0, alpha, torch.where(centred < 0, -alpha, centred))
        return buffers.collect(value, out), mean, std, alpha

    return forward


def _backward_core(standardize: str, gradient: str) -> Callable[..., Any]:
    """``(g, w, mean, std, alpha, temperature (, out)) -> g_w`` ``[C, K]``; statistics ``[G]``.

    With ``out``, like ``w``, the gradient is written into it and ``None`` is returned.
    """

    def row(x: Tensor) -> Tensor:
        return B.total(x, (1,), keepdim=True)

    def over_group(rows: Tensor) -> Tensor:
        return B.total(rows, (0,), keepdim=True) if standardize == "layer" else rows

    def backward(
        g: Tensor, w: Tensor, mean: Tensor, std: Tensor, alpha: Tensor, t: Tensor, *out: Tensor
    ) -> Tensor | None:
        mean, std, alpha = mean[:, None], std[:, None], alpha[:, None]
        # Divided by the deviation only where it is a factor of a whole row: a division per weight
        # costs as much as all the rest.
        centred = w if standardize == "none" else w - mean
        inside = centred.abs() <= std if gradient == "clipped" else None
        if gradient == "annealed":
            t = t.to(w.dtype)
            g = g * ((1 / t).clamp(min=1) * t * (1 - torch.tanh(t / std * centred).square()))

        def passed(g: Tensor) -> Tensor:
            return g if inside is None else torch.where(inside, g, 0.0)

        if standardize == "none":
            return buffers.collect(passed(g * alpha), out)
        # What sign and scale hand on, ``passed(g * alpha)``, is computed twice and not stored.
        count = w.numel() if standardize == "layer" else w.shape[1]
        along = over_group(alpha * row(passed(g) * centred)) / (count - 1) / std.pow(3)
        mean_g = over_group(alpha * row(passed(g))) / count / std
        return buffers.collect(passed(g * (alpha / std)) - mean_g - centred * along, out)

    return backward


# --------------------------------------------------------------------------- the operation


@torch.library.custom_op("qsnn_ext::binary_weight", mutates_args=())
def _weight_op(
    w: Tensor, temperature: Tensor, standardize: str, scale: str, gradient: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Binary weights of one layer.

    Args:
        w: latent weights ``[C, K]``.
        temperature: 0-dim, for the annealed gradient.
        standardize: ``"layer"``, ``"channel"`` or ``"none"``.
        scale: ``"mean"``, ``"power_of_two"`` or ``"none"``.
        gradient: ``"clipped"``, ``"identity"`` or ``"annealed"``; used by the backward.

    Returns:
        ``alpha * sign(What)`` ``[C, K]``, mean and deviation of the groups, alpha ``[C, 1]``.
    """
    out = buffers.like(w)
    key = ("binary_weight", standardize, scale)
    free = (2, *[2] * len(out))
    core = B.core(key, w, w.numel(), free, lambda: _forward_core(standardize, scale))
    with torch.no_grad():
        value, mean, std, alpha = core(w.detach(), *out)
    return out[0] if out else value, mean, std, alpha


@_weight_op.register_fake
def _(
    w: Tensor, temperature: Tensor, standardize: str, scale: str, gradient: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    groups = w.shape[0] if standardize == "channel" else 1
    return (
        torch.empty_like(w, memory_format=torch.contiguous_format),
        w.new_empty(groups, 1),
        w.new_empty(groups, 1),
        w.new_empty(w.shape[0], 1),
    )


@torch.library.custom_op("qsnn_ext::binary_weight_backward", mutates_args=())
def _weight_backward_op(
    g: Tensor,
    w: Tensor,
    mean: Tensor,
    std: Tensor,
    alpha: Tensor,
    temperature: Tensor,
    standardize: str,
    gradient: str,
) -> Tensor:
    """Gradient of the latent weights ``[C, K]``."""
    # One value per channel is as free a length as the channels of ``w``; one per layer is fixed.
    groups = 1 if standardize == "channel" else 0
    out = buffers.like(w)
    free = (2, 2, groups, groups, 1, 0, *[2] * len(out))
    key = ("binary_weight_backward", standardize, gradient)
    core = B.core(key, w, w.numel(), free, lambda: _backward_core(standardize, gradient))
    with torch.no_grad():
        value: Tensor = core(
            g.detach().contiguous(),
            w.detach(),
            mean.detach().flatten(),
            std.detach().flatten(),
            alpha.detach().flatten(),
            temperature.detach(),
            *out,
        )
    return out[0] if out else value


@_weight_backward_op.register_fake
def _(
    g: Tensor,
    w: Tensor,
    mean: Tensor,
    std: Tensor,
    alpha: Tensor,
    temperature: Tensor,
    standardize: str,
    gradient: str,
) -> Tensor:
    return torch.empty_like(w, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    w, temperature, standardize, _, gradient = inputs
    _, mean, std, alpha = output
    ctx.options = (standardize, gradient)
    ctx.save_for_backward(w, mean, std, alpha, temperature)


def _backward(ctx: Any, g: Tensor, *_statistics: Any) -> Any:
    g_w = torch.ops.qsnn_ext.binary_weight_backward(g, *ctx.saved_tensors, *ctx.options)
    return g_w, None, None, None, None


_weight_op.register_autograd(_backward, setup_context=_setup_context)
autocast.register("binary_weight", lambda w, *rest: (autocast.widened(w), *rest))
autocast.register("binary_weight_backward")


# --------------------------------------------------------------------------- once per step


def covers(quantizer: Quantizer, weight: Tensor) -> bool:
    """Whether the operation computes what this quantizer does (and nobody watches it)."""
    if type(quantizer) is not BinaryWeight or weight.dim() < 2 or not weight.is_floating_point():
        return False
    if quantizer._forward_hooks or quantizer._forward_pre_hooks or weight.shape[0] == 0:
        return False
    # A group without a deviation is the quantizer's error to report.
    group = {"layer": weight.numel(), "channel": weight[0].numel(), None: 2}
    return group[quantizer.standardize] > 1


def _names(quantizer: BinaryWeight) -> tuple[str, str, str]:
    return quantizer.standardize or "none", quantizer.scale or "none", quantizer.gradient


def binary_weight(weight: Tensor, quantizer: BinaryWeight) -> Tensor:
    """``quantizer(weight)`` through the fused operation.

    Args:
        weight: latent weights ``[C_out, ...]``.
        quantizer: one for which :func:`covers` holds.
    """
    flat = weight.reshape(weight.shape[0], -1)
    out: Tensor = torch.ops.qsnn_ext.binary_weight(flat, quantizer.temperature, *_names(quantizer))[
        0
    ]
    return out.view(weight.shape)


class _Prepared(torch.autograd.Function):
    """The fused operation with a node that can run its backward more than once.

    What it needs is kept on the node and not as saved tensors, which the first backward would
    free: the same prepared weights then serve all micro-batches of an optimizer step.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, quantizer: BinaryWeight) -> Tensor:
        flat = weight.reshape(weight.shape[0], -1)
        standardize, scale, gradient = _names(quantizer)
        value, *statistics = torch.ops.qsnn_ext.binary_weight(
            flat, quantizer.temperature, standardize, scale, gradient
        )
        ctx.weight, ctx.version = weight, weight._version
        ctx.constants = (*statistics, quantizer.temperature.clone())
        ctx.options = (standardize, gradient)
        out: Tensor = value.view(weight.shape)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        weight = ctx.weight
        if weight._version != ctx.version:
            raise StateError(
                "latent weights were changed between forward and backward; "
                "call the optimizer's step() after backward()."
            )
        w = weight.detach().reshape(weight.shape[0], -1)
        g = g.reshape(w.shape)
        g_w = torch.ops.qsnn_ext.binary_weight_backward(g, w, *ctx.constants, *ctx.options)
        return g_w.view(weight.shape), None


class PreparedWeight:
    """The quantized weights of one layer, recomputed only when something they depend on changed.

    Time steps and micro-batches between two optimizer steps share one preparation. A change is
    noticed by PyTorch's version counter of the parameter (optimizers, ``load_state_dict`` and
    in-place operations under ``no_grad`` move it). Writing through ``.data`` does not move it; on
    the CPU such a write is noticed by the sum of the weights, elsewhere call :meth:`clear`.

    A copied or unpickled layer starts without prepared weights.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._weight: Callable[[], Tensor | None] = lambda: None
        self._value: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return (PreparedWeight, ())

    def __deepcopy__(self, memo: Any) -> PreparedWeight:
        return PreparedWeight()

    def clear(self) -> None:
        """Forget the prepared weights."""
        self.__init__()  # type: ignore[misc]

    def get(self, weight: Tensor, quantizer: Quantizer) -> Tensor:
        """``quantizer(weight)``, differentiable, prepared anew only when necessary.

        Args:
            weight: latent weights ``[C_out, ...]``.
            quantizer: the layer's.
        """
        fused = covers(quantizer, weight) and B.current_backend() != "eager"
        if torch.compiler.is_compiling():
            # A compiled program has no version counters to ask.
            return binary_weight(weight, quantizer) if fused else quantizer(weight)  # type: ignore[arg-type]
        differentiable = torch.is_grad_enabled() and weight.requires_grad
        if (differentiable and not fused) or torch.is_inference_mode_enabled():
            # Plain autograd frees what its backward needs, so its result serves one backward only.
            return quantizer(weight)  # type: ignore[no-any-return]
        key = (
            weight._version,
            weight.data_ptr(),
            weight.dtype,
            differentiable,
            tuple(quantizer.options().items()) if not fused else _names(quantizer),  # type: ignore[arg-type]
            quantizer.temperature._version if fused else 0,
            weight.detach().sum().item() if self._probed(weight) else None,
        )
        if self._value is None or self._key != key or self._weight() is not weight:
            self._value = None  # its memory serves again
            if differentiable:
                self._value = _Prepared.apply(weight, quantizer)  # type: ignore[no-untyped-call]
            else:
                self._value = quantizer(weight)
            self._key, self._weight = key, weakref.ref(weight)
        assert self._value is not None
        return self._value

    @staticmethod
    def _probed(weight: Tensor) -> bool:
        return weight.device.type == "cpu"


__all__ = ["PreparedWeight", "binary_weight", "covers"]
