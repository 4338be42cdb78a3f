"""Binary weights: standardise, sign and scale as one operation, and quantized weights kept for use.

``qsnn_ext::binary_weight`` computes what :class:`qsnn_ext.quantizers.BinaryWeight` does and has an
analytic backward that saves the latent weights and two numbers per group. Means and deviations are
summed in another order than the quantizer's, so scales agree to rounding (1e-6 relative), and a
sign can differ only where a standardised weight is zero to that rounding.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from qsnn_ext.errors import StateError
from qsnn_ext.kernels import _native, autocast
from qsnn_ext.kernels import backend as B
from qsnn_ext.quantizers import KINDS, BinaryWeight, Quantizer

# --------------------------------------------------------------------------- cores


# Sums run over rows (output channels) first and over the rows' sums after that, so that one loop
# over a row makes all sums that need the row.


def _forward_core(standardize: str, scale: str) -> Callable[..., Any]:
    """``w [C, K] -> value [C, K], mean, std ([1, 1] or [C, 1]), alpha [C, 1]``."""

    def row(x: Tensor) -> Tensor:
        return B.total(x, (1,), keepdim=True)

    def over_group(rows: Tensor) -> Tensor:
        return B.total(rows, (0,), keepdim=True) if standardize == "layer" else rows

    def forward(w: Tensor) -> Any:
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
        return value, mean, std, alpha

    return forward


def _backward_core(standardize: str, gradient: str) -> Callable[..., Any]:
    """``(g, w, mean, std, alpha, temperature) -> g_w`` ``[C, K]``; statistics ``[G]``."""

    def row(x: Tensor) -> Tensor:
        return B.total(x, (1,), keepdim=True)

    def over_group(rows: Tensor) -> Tensor:
        return B.total(rows, (0,), keepdim=True) if standardize == "layer" else rows

    def backward(
        g: Tensor, w: Tensor, mean: Tensor, std: Tensor, alpha: Tensor, t: Tensor
    ) -> Tensor:
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
            return passed(g * alpha)
        # What sign and scale hand on, ``passed(g * alpha)``, is computed twice and not stored.
        count = w.numel() if standardize == "layer" else w.shape[1]
        along = over_group(alpha * row(passed(g) * centred)) / (count - 1) / std.pow(3)
        mean_g = over_group(alpha * row(passed(g))) / count / std
        return passed(g * (alpha / std)) - mean_g - centred * along

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
    native = _native.wanted(w, (torch.float32, torch.float64))
    if native is not None:
        return _native.weight_forward(native, w, standardize, scale)
    key = ("binary_weight", standardize, scale)
    core = B.core(
        key, w.dtype, w.device, w.numel(), (2,), lambda: _forward_core(standardize, scale)
    )
    with torch.no_grad():
        value, mean, std, alpha = core(w.detach())
    return value, mean, std, alpha


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
    native = _native.wanted(w, (torch.float32, torch.float64))
    if native is not None:
        return _native.weight_backward(
            native, g, w, mean, std, alpha, temperature.item(), standardize, gradient
        )
    # One value per channel is as free a length as the channels of ``w``; one per layer is fixed.
    groups = 1 if standardize == "channel" else 0
    dynamic_dims = (2, 2, groups, groups, 1, 0)
    key = ("binary_weight_backward", standardize, gradient)
    core = B.core(
        key,
        w.dtype,
        w.device,
        w.numel(),
        dynamic_dims,
        lambda: _backward_core(standardize, gradient),
    )
    with torch.no_grad():
        value: Tensor = core(
            g.detach().contiguous(),
            w.detach(),
            mean.detach().flatten(),
            std.detach().flatten(),
            alpha.detach().flatten(),
            temperature.detach(),
        )
    return value


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


# --------------------------------------------------------------------------- prepared weights


def covers(quantizer: Quantizer, weight: Tensor) -> bool:
    """Whether the operation computes what this quantizer does (and nobody watches it)."""
    if type(quantizer) is not BinaryWeight or weight.dim() < 2 or not weight.is_floating_point():
        return False
    if not _is_function(quantizer) or weight.shape[0] == 0:
        return False
    # A group without a deviation is the quantizer's error to report.
    count = weight.numel()
    group = {"layer": count, "channel": count // weight.shape[0], None: 2}
    return group[quantizer.standardize] > 1


def _is_function(quantizer: Quantizer) -> bool:
    """Whether the result follows from the weights and ``options()`` alone.

    That is so for the package's own classes; a quantizer of somebody else's may keep anything.
    """
    return type(quantizer) in KINDS.values() and not (
        quantizer._forward_hooks or quantizer._forward_pre_hooks
    )


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
    """The fused operation, with its numbers on the node, where others like it can take them.

    As saved tensors the first backward would free them: the same numbers serve all micro-batches of
    an optimizer step. Each has a node of its own, since autograd runs nodes in the reverse of the
    order in which they were made: sharded training collects a layer's gradients before a node of
    an earlier micro-batch would have added its own. Both directions compute from ``copy``, so the
    gradient is that of the forward pass whatever has been written to ``weight`` since.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        copy: Tensor,
        quantizer: BinaryWeight,
        earlier: tuple[Tensor, tuple[Tensor, ...]] | None,
    ) -> Tensor:
        standardize, scale, gradient = _names(quantizer)
        ctx.weight, ctx.version = weight, weight._version
        ctx.options = (standardize, gradient)
        ctx.has_run = False
        if earlier is not None:
            value, ctx.inputs = earlier
            return value.detach()
        temperature = quantizer.temperature.clone()
        flat = copy.view(weight.shape[0], -1)
        value, *statistics = torch.ops.qsnn_ext.binary_weight(
            flat, temperature, standardize, scale, gradient
        )
        ctx.inputs = (flat, *statistics, temperature)
        out: Tensor = value.view(weight.shape)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.has_run = True
        if ctx.weight._version != ctx.version:
            raise StateError(
                "latent weights were changed between forward and backward; "
                "call the optimizer's step() after backward()."
            )
        with _unobserved():
            g = g.reshape(ctx.inputs[0].shape)
            g_w = torch.ops.qsnn_ext.binary_weight_backward(g, *ctx.inputs, *ctx.options)
            return g_w.view(ctx.weight.shape), None, None, None


@dataclass(frozen=True)
class _Preparation:
    """Quantized weights, and all they were made from."""

    weight: weakref.ref[Tensor]
    copy: Tensor
    options: tuple[Any, ...]
    value: Tensor

    def serves(self, weight: Tensor, options: tuple[Any, ...]) -> bool:
        return (
            self.options == options
            and self.weight() is weight  # whose gradient it is
            and self.copy.shape == weight.shape
            and self.copy.dtype == weight.dtype
            and self.copy.device == weight.device
            and torch.equal(self.copy, weight)
        )


class PreparedWeight:
    """The quantized weights of one layer.

    The rule: prepared weights are used again only after the latent weights have been compared,
    value by value, with a copy of those they were prepared from, and found equal. Nothing else
    decides it, neither version counters nor optimizers nor hooks, so whoever writes to the weights
    in whatever way, the next call sees it. Time steps, micro-batches and evaluation then share one
    preparation, whose gradient is computed once.

    Comparing is a twentieth of preparing on the CPU. On other devices the answer would have to be
    waited for, which costs more than to prepare the weights: there each call prepares them anew.
    So do weights that are computed from others, quantizers this package does not know, and
    programs that are traced or transformed.

    A copied or unpickled layer starts without prepared weights.
    """

    def __init__(self) -> None:
        # Replaced as a whole: threads that share a layer each see a consistent one.
        self._kept: _Preparation | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return (PreparedWeight, ())

    def __deepcopy__(self, memo: Any) -> PreparedWeight:
        return PreparedWeight()

    def get(self, weight: Tensor, quantizer: Quantizer) -> Tensor:
        """``quantizer(weight)``, differentiable.

        Args:
            weight: latent weights ``[C_out, ...]``.
            quantizer: the layer's.
        """
        if torch.compiler.is_compiling():
            if covers(quantizer, weight):
                return binary_weight(weight, quantizer)  # type: ignore[arg-type]
            return quantizer(weight)  # type: ignore[no-any-return]
        if _is_recorded(weight) or not _is_function(quantizer):
            return quantizer(weight)  # type: ignore[no-any-return]
        with _unobserved():
            return self._get(weight, quantizer)

    def _get(self, weight: Tensor, quantizer: Quantizer) -> Tensor:
        fused = covers(quantizer, weight) and B.current_backend() != "eager"
        differentiable = torch.is_grad_enabled() and weight.requires_grad
        kept = weight.device.type == "cpu" and weight.is_leaf
        if differentiable and not (fused and kept):
            # Plain autograd frees what its backward needs, so its result serves one backward only.
            return binary_weight(weight, quantizer) if fused else quantizer(weight)  # type: ignore[arg-type]
        if not kept:
            return quantizer(weight)  # type: ignore[no-any-return]
        options = _options(quantizer, differentiable)
        found = self._kept
        if found is not None and found.serves(weight, options):
            node: Any = found.value.grad_fn
            if node is None:
                return found.value
            if node.has_run:
                # In a tuple, where autograd does not look for earlier nodes.
                earlier = (found.value, node.inputs)
                value = _Prepared.apply(weight, found.copy, quantizer, earlier)  # type: ignore[no-untyped-call]
                self._kept = replace(found, value=value)
                return value  # type: ignore[no-any-return]
            # A step of an optimizer that moved nothing counts as a write all the same.
            node.version = weight._version
            return found.value
        found = self._kept = None
        # Kept from inference mode, the value would be of no use outside of it.
        with torch.inference_mode(False), torch.no_grad():
            copy = weight.clone(memory_format=torch.contiguous_format)
            value = None if differentiable else quantizer(copy)
        if value is None:
            value = _Prepared.apply(weight, copy, quantizer, None)  # type: ignore[no-untyped-call]
        self._kept = _Preparation(weakref.ref(weight), copy, options, value)
        return value  # type: ignore[no-any-return]


def _options(quantizer: Quantizer, differentiable: bool) -> tuple[Any, ...]:
    """What besides the weights the result depends on: the autocast mode widens half precision."""
    autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
    if not isinstance(quantizer, BinaryWeight):
        return (*quantizer.options().items(), autocast)
    temperature = quantizer.temperature.item() if differentiable else None
    return (*_names(quantizer), temperature, autocast)


def _is_recorded(weight: Tensor) -> bool:
    """Whether somebody records or transforms the program, in which no kept tensor may appear."""
    return (
        type(weight) not in (Tensor, torch.nn.Parameter)  # fake, distributed, quantized by others
        or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        or torch._C._are_functorch_transforms_active()
        or any(mode.is_infra_mode() for mode in _get_current_dispatch_mode_stack())
    )


@contextlib.contextmanager
def _unobserved() -> Iterator[None]:
    """Hidden from modes that watch operations: counters of a network's work count none of this.

    Weights are quantized ahead of time, and by an amount that depends on what was kept.
    """
    with contextlib.ExitStack() as stack:
        if torch._C._len_torch_dispatch_stack():
            stack.enter_context(_disable_current_modes())
        if torch._C._len_torch_function_stack():
            stack.enter_context(torch._C.DisableTorchFunction())
        yield


__all__ = ["PreparedWeight", "binary_weight", "covers"]
