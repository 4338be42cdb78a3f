"""Layers with weights, and batch norms.

Convolutions and linear layers become convolutions with integer weight codes; their scales and
biases, and those of batch norms, stay real numbers until something reads the result
(:mod:`~qsnn_ext.deploy.lowering.settle`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from qsnn_ext import hosts
from qsnn_ext.deploy.lowering.axes import (
    along,
    arrange,
    full,
    is_whole,
    lead_axes,
    natural,
    padded_index,
    per_sample_axes,
    permute,
    pick,
    rest_axes,
    size_of,
    sizes,
)
from qsnn_ext.deploy.lowering.draft import Array, Draft, Geometry, PendingConv, Shape
from qsnn_ext.deploy.lowering.neurons import Real
from qsnn_ext.deploy.lowering.settle import CURRENT_BITS, rescaled, settle
from qsnn_ext.deploy.program import IntArray, output_size, words


@dataclass(frozen=True, eq=False)
class Weights:
    """What a layer multiplies with: ``codes * alpha`` per output channel, and its bias.

    Args:
        codes: ``[C_out, C_in / groups, ...]``.
        alpha, bias: ``[C_out]``.
        binary: Whether the codes are -1 and 1.
    """

    codes: IntArray
    alpha: Real
    bias: Real
    binary: bool


@dataclass(frozen=True, eq=False)
class Kernel:
    """How a convolution is laid over its input, as torch says it.

    Args:
        stride, dilation: One number for each axis, as in ``output_padding``.
        padding: Likewise, or ``"valid"`` or ``"same"``.
        groups: Channel groups.
        padding_mode: What stands outside.
    """

    stride: Sequence[int]
    padding: Sequence[int] | str
    dilation: Sequence[int]
    groups: int
    padding_mode: str = "zeros"


def lower_conv(draft: Draft, weights: Weights, kernel: Kernel, x: Array) -> Array:
    """``nn.Conv1d`` and ``nn.Conv2d``; one dimension is a row of pixels."""
    codes = weights.codes
    one = codes.ndim == 3
    if codes.ndim > 4:
        raise draft.fail(
            "three-dimensional convolutions are not part of the integer program",
            "use two-dimensional ones, with time as steps",
        )
    if one:
        codes = codes[:, :, None, :]
        weights = replace(weights, codes=codes)
    size = codes.shape[2:]
    stride, dilation = (
        ((1, v[0]) if one else (v[0], v[1])) for v in (kernel.stride, kernel.dilation)
    )
    if kernel.padding == "valid":
        padding = (0, 0, 0, 0)
    elif kernel.padding == "same":
        total = [d * (k - 1) for k, d in zip(size, dilation, strict=True)]
        before = [t // 2 for t in total]
        padding = (before[0], before[1], total[0] - before[0], total[1] - before[1])
    else:
        p = (0, kernel.padding[0]) if one else kernel.padding
        padding = (int(p[0]), int(p[1]), int(p[0]), int(p[1]))
    rank = len(rest_axes(draft, x))
    if rank != (2 if one else 3):
        raise draft.fail(
            f"its input has {rank} axes besides batch and time",
            f"give it {'[C, L]' if one else '[C, H, W]'} per sample",
        )
    if kernel.padding_mode != "zeros":
        x = settle(draft, x)
        for place, (first, last) in enumerate((padding[::2], padding[1::2])[-rank + 1 :]):
            dim = len(x.axes) - rank + 1 + place
            index = padded_index(draft, sizes(x)[dim], first, last, kernel.padding_mode)
            x = pick(draft, x, dim, index)
        padding = (0, 0, 0, 0)
    geometry = Geometry(stride, padding, dilation, kernel.groups)
    x = _convolvable(draft, x, codes)
    if size == (1, 1) and geometry == Geometry(groups=kernel.groups):
        y = _pointwise(draft, weights, x, geometry, len(lead_axes(draft, x)))
        if y is not None:
            return y
    x = natural(draft, x)
    if one and draft.shape(x)[1] > 1:
        x = arrange(draft, x)  # rows that were flattened become one
    y = convolve(draft, weights, x, geometry)
    return replace(y, axes=per_sample_axes(lead_axes(draft, x), draft.shape(y), rank))


def lower_transposed_conv(
    draft: Draft, weights: Weights, kernel: Kernel, x: Array, target: Sequence[int]
) -> Array:
    """``nn.ConvTranspose1d`` and ``2d``: zeros between the pixels, then a plain convolution.

    Args:
        draft: The program so far.
        weights: Those of the layer, output channels first.
        kernel: How it is laid over its output.
        x: Its input.
        target: Shape of its output, which tells the output padding.
    """
    codes = np.flip(weights.codes, axis=tuple(range(2, weights.codes.ndim))).copy()
    dims = codes.ndim - 2
    if dims > 2:
        raise draft.fail(
            "three-dimensional convolutions are not part of the integer program",
            "use two-dimensional ones, with time as steps",
        )
    assert not isinstance(kernel.padding, str)
    rank = len(rest_axes(draft, x))
    if rank != dims + 1:
        raise draft.fail(
            f"its input has {rank} axes besides batch and time",
            f"give it {'[C, L]' if dims == 1 else '[C, H, W]'} per sample",
        )
    x = settle(draft, x)
    for place in range(dims):
        dim = len(x.axes) - dims + place
        n, stride, dilation = sizes(x)[dim], kernel.stride[place], kernel.dilation[place]
        reach = dilation * (codes.shape[2 + place] - 1)
        length = target[len(target) - dims + place] + reach
        at = np.arange(length) - (reach - kernel.padding[place])
        inside = (at >= 0) & (at % stride == 0) & (at // stride < n)
        index = [int(i) for i in np.where(inside, at // stride, -1)]
        if index != list(range(n)):
            x = pick(draft, x, dim, index)
    if dims == 1:
        codes = codes[:, :, None, :]
    down, across = (1, *kernel.dilation)[-2:]
    geometry = Geometry(dilation=(down, across), groups=kernel.groups)
    x = natural(draft, _convolvable(draft, x, codes))
    if dims == 1 and draft.shape(x)[1] > 1:
        x = arrange(draft, x)
    y = convolve(draft, replace(weights, codes=codes), x, geometry)
    return replace(y, axes=per_sample_axes(lead_axes(draft, x), draft.shape(y), rank))


def _pointwise(
    draft: Draft, weights: Weights, x: Array, geometry: Geometry, channel: int
) -> Array | None:
    """A layer that looks at one pixel, whatever the order of pixels; None if that is not all.

    ``channel`` is the axis of the channels.
    """
    if not is_whole(draft, x) or x.axes[channel] != full("C", draft.shape(x)[0]):
        return None
    y = convolve(draft, weights, x, geometry)
    axes = list(x.axes)
    axes[channel] = full("C", weights.codes.shape[0])
    return replace(y, axes=tuple(axes))


def lower_linear(draft: Draft, weights: Weights, x: Array) -> Array:
    """``nn.Linear``: a kernel of one pixel over channels, or one that covers all it flattens."""
    codes = weights.codes
    pixel = replace(weights, codes=codes[:, :, None, None])
    lead, rest = lead_axes(draft, x), rest_axes(draft, x)
    x = _convolvable(draft, x, pixel.codes)
    if all(size_of(axis) == 1 for axis in rest[:-1]):
        x = natural(draft, replace(x, axes=(*lead, rest[-1])))
        codes = codes.reshape(codes.shape[0], *draft.shape(x))
        y = convolve(draft, replace(weights, codes=codes), x, Geometry())
        return replace(y, axes=(*lead, *rest[:-1], full("C", codes.shape[0])))
    last = len(x.axes) - 1
    found = _pointwise(draft, pixel, x, Geometry(), last)
    if found is None:
        x = arrange(draft, permute(x, [*range(len(lead)), last, *range(len(lead), last)]))
        x = permute(x, [*range(len(lead)), *range(len(lead) + 1, last + 1), len(lead)])
        found = _pointwise(draft, pixel, x, Geometry(), last)
    if found is None:
        raise draft.fail(
            f"it reads features of a tensor of shape {sizes(x)} that lie apart",
            "put the features into the last axis by a reshape or permutation",
        )
    return found


def lower_norm(draft: Draft, module: Any, x: Array) -> Array:
    """A batch norm with running statistics: a factor and an offset per channel."""
    return lower_batch_norm(
        draft, x, module.running_mean, module.running_var, module.weight, module.bias, module.eps,
        dim=2 if hosts.over_time(module) else 1,
    )  # fmt: skip


def lower_batch_norm(
    draft: Draft, x: Array, mean: Any, var: Any, weight: Any, bias: Any, eps: float, dim: int = 1
) -> Array:
    """Batch norm by fixed statistics over the axis ``dim``."""
    if mean is None or var is None:
        raise draft.fail(
            "a batch norm without running statistics makes a sample depend on its batch",
            "build it with track_running_stats=True and train it",
        )
    for what, value in (
        ("running_mean", mean), ("running_var", var), ("weight", weight), ("bias", bias),
    ):  # fmt: skip
        if value is not None and not bool(torch.isfinite(value).all()):
            raise draft.fail(
                f"its {what} contains NaN or infinity",
                "train on or load a sound checkpoint; running statistics are also taken anew "
                "by reset_running_stats() and a pass over data in training mode",
            )
    if bool((var + eps <= 0).any()):
        raise draft.fail(
            "its running_var is not positive", "load a sound checkpoint or train it anew"
        )
    gamma = np.ones(var.numel()) if weight is None else real(weight)
    beta = np.zeros(var.numel()) if bias is None else real(bias)
    factor = gamma / np.sqrt(real(var) + eps)
    shift = beta - real(mean) * factor
    if dim >= len(x.axes) or size_of(x.axes[dim]) != factor.size:
        raise draft.fail(
            f"it normalises {factor.size} features of a tensor of shape {sizes(x)}",
            "give it as many features as its input has channels",
        )
    behind = (1,) * (len(x.axes) - dim - 1)
    return affine(draft, x, factor.reshape(-1, *behind), shift.reshape(-1, *behind))


def affine(draft: Draft, x: Array, factor: Real, shift: Real) -> Array:
    """``x * factor + shift``, both of a shape that broadcasts to that of ``x``.

    Behind a sum over time the shift is shared out among the steps.
    """
    channels = draft.shape(x)[0]
    f = along(draft, x, factor, "factors")
    b = along(draft, x, shift, "summands")
    if x.reduction == "sum":
        b = b / (x.factor * steps_summed(draft, x))
    gain = x.gain if x.gain is not None else np.full(channels, x.scale)
    bias = x.bias if x.bias is not None else np.zeros(channels)
    return replace(x, gain=gain * f, bias=bias * f + b, origin=draft.where)


def steps_summed(draft: Draft, x: Array) -> int:
    """How many time steps a sum over time is of."""
    return len(x.steps) if x.steps is not None else draft.steps


def real(t: torch.Tensor) -> Real:
    """A tensor as float64."""
    return np.asarray(t.detach().to(torch.float64).cpu().numpy())


def layer_weights(draft: Draft, module: Any) -> Weights:
    """Integer codes and per-output-channel scale, from the quantizer that trained them."""
    quantizer = getattr(module, "quantizer", None)
    if quantizer is None:
        left = draft.left.get(draft.where)
        raise draft.fail(
            "its weights are floating point" + (f": quantize_ left it, as {left}" if left else ""),
            "mend that and quantize the model anew" if left else
            f"quantize the {type(module).__name__} (for example quantize_(model, "
            '"1w-2u"), which keeps first and last layer at 8 bits)',
        )  # fmt: skip
    latent = module.weight
    if not bool(torch.isfinite(latent).all()):
        raise draft.fail(
            "its weights contain NaN or infinity", "train on or load a sound checkpoint"
        )
    rows = getattr(module, "rows", None)  # of a transposed convolution: outputs first
    codes, scale = quantizer.codes(latent if rows is None else rows(latent))
    alpha = real(scale).reshape(-1)
    folded = getattr(module, "output_scale", None)  # left by fold_batchnorm_
    if folded is not None:
        alpha = alpha * real(folded)
    codes = codes.detach().cpu().numpy()
    outputs = codes.shape[0]
    if alpha.size not in (1, outputs):
        raise draft.fail(
            f"its weights have {alpha.size} scales for {outputs} outputs",
            "quantize it with one scale, or one for each output channel",
        )
    bias = np.zeros(outputs) if module.bias is None else real(module.bias)
    alpha = np.broadcast_to(alpha, (outputs,)).astype(np.float64)
    return Weights(codes, alpha, bias, getattr(quantizer, "bits", 32) == 1)


def kernel_of(module: Any) -> Kernel:
    """How a layer of torch is laid over its input."""
    return Kernel(
        module.stride, module.padding, module.dilation, module.groups, module.padding_mode
    )


def convolve(draft: Draft, weights: Weights, x: Array, geometry: Geometry) -> Array:
    """A convolution with weight codes ``[C_out, C_in/groups, kh, kw]``."""
    codes = weights.codes
    draft.check_input(x)
    x = _convolvable(draft, x, codes)
    held = hashlib.sha256(codes.tobytes()).digest()
    key = ("layer", draft.where, held, codes.shape, geometry, x.index, x.scale)
    if key not in draft.convolutions:
        draft.convolutions[key] = _pending(draft, x.index, codes, weights.binary, geometry)
    bias = weights.bias
    if x.reduction == "sum":
        bias = bias / (x.factor * steps_summed(draft, x))
    return replace(
        x, base=draft.convolutions[key], gain=weights.alpha * x.scale, bias=bias,
        origin=draft.where,
    )  # fmt: skip


def _convolvable(draft: Draft, x: Array, codes: IntArray) -> Array:
    """A settled input; a current has so few bits that sums of it fit 32."""
    total = int(np.abs(codes.astype(np.int64)).sum(axis=(1, 2, 3)).max(initial=1))
    room = 30 - max(total, 1).bit_length()
    if x.gain is not None:
        return settle(draft, x, min(room, CURRENT_BITS))
    current = draft.values[x.index].planes == 0 and x.index != draft.input
    if current and total * draft.largest[x.index] >= 2**31:
        return rescaled(draft, x, room)
    return x


def _pending(
    draft: Draft, source: int, codes: IntArray, binary: bool, geometry: Geometry
) -> PendingConv:
    cout, cin, kh, kw = codes.shape
    groups = geometry.groups
    rows = codes.transpose(2, 3, 1, 0).reshape(kh * kw * cin, groups, cout // groups)
    rows = rows.transpose(1, 0, 2)
    weight: IntArray
    if binary and set(np.unique(codes).tolist()) <= {-1, 1}:
        bits = (rows > 0).astype(np.uint8)
        padded = np.zeros((*bits.shape[:2], words(bits.shape[2]) * 32), np.uint8)
        padded[:, :, : bits.shape[2]] = bits
        packed = np.packbits(padded, axis=-1, bitorder="little").view("<u4")
        weight = np.ascontiguousarray(packed.astype(np.uint32))
        total = rows.shape[1]
    else:
        weight = np.ascontiguousarray(rows.astype(np.int8))
        total = int(np.abs(rows.astype(np.int64)).sum(axis=1).max())
    _, h, w = draft.values[source].shape
    top, left, bottom, right = geometry.padding
    shape: Shape = (
        cout,
        output_size(h, top + bottom, kh, geometry.stride[0], geometry.dilation[0]),
        output_size(w, left + right, kw, geometry.stride[1], geometry.dilation[1]),
    )
    reach = _reach(draft, source, total)
    return PendingConv(draft.where, source, weight, (kh, kw), geometry, shape, reach)


def _reach(draft: Draft, source: int, total: int) -> int:
    """Largest absolute accumulator of weights whose absolute values sum to ``total``."""
    high = draft.largest[source]
    reach = total * high
    if reach < 2**31:
        return max(reach, 1)
    if source == draft.input:
        largest = (2**31 - 1) // total
        draft.room = (largest + 1).bit_length()  # codes reach 2**(bits - 1) - 1 <= largest
        raise draft.fail(
            f"its 32-bit accumulator may overflow, reaching {reach}, with input codes up to {high}",
            f"pass input_bits={max(draft.room, 2)} or less",
        )
    raise draft.fail(
        f"its accumulator may reach {reach}, which exceeds 32 bits",
        "split the layer, or give its input fewer levels (spikes, smaller pooling windows)",
    )
