"""Layers with weights, and batch norms.

Convolutions and linear layers become convolutions with integer weight codes; their scales and
biases, and those of batch norms, stay real numbers until something reads the result
(:mod:`~qsnn_ext.deploy.lowering.settle`).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from qsnn_ext.deploy.lowering.axes import (
    lead_axes,
    per_sample_axes,
    rank_per_sample,
    spatial_axes,
)
from qsnn_ext.deploy.lowering.draft import Array, Draft, Geometry, PendingConv, Shape
from qsnn_ext.deploy.lowering.neurons import Real
from qsnn_ext.deploy.lowering.settle import settle
from qsnn_ext.deploy.program import IntArray, output_size, words


def lower_conv(draft: Draft, module: Any, x: Array) -> Array:
    """``nn.Conv1d`` and ``nn.Conv2d``; one dimension is a row of pixels."""
    if isinstance(module, nn.Conv3d):
        raise draft.fail(
            "three-dimensional convolutions are not part of the integer program",
            "use two-dimensional ones, with time as steps",
        )
    if module.padding_mode != "zeros":
        raise draft.fail(
            f"padding_mode={module.padding_mode!r} cannot be lowered", "pad with zeros"
        )
    codes, alpha = _weight_codes(draft, module)
    one = isinstance(module, nn.Conv1d)
    if one:
        codes = codes[:, :, None, :]
    kernel, stride, dilation = ((1, v[0]) if one else v for v in (
        module.kernel_size, module.stride, module.dilation))  # fmt: skip
    if module.padding == "valid":
        padding = (0, 0, 0, 0)
    elif module.padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        before = [t // 2 for t in total]
        padding = (before[0], before[1], total[0] - before[0], total[1] - before[1])
    else:
        p = (0, module.padding[0]) if one else module.padding
        padding = (int(p[0]), int(p[1]), int(p[0]), int(p[1]))
    spatial_axes(draft, x)
    rank = rank_per_sample(draft, x)
    if rank != (2 if one else 3):
        raise draft.fail(
            f"its input has {rank} axes besides batch and time",
            f"give it {'[C, L]' if one else '[C, H, W]'} per sample",
        )
    geometry = Geometry(tuple(stride), padding, tuple(dilation), module.groups)
    y = _convolve(draft, module, x, codes, alpha, geometry)
    return replace(y, axes=per_sample_axes(lead_axes(draft, x), draft.shape(y), rank))


def lower_linear(draft: Draft, module: Any, x: Array) -> Array:
    """``nn.Linear``: a flattened ``[C, H, W]`` is read by a kernel that covers it."""
    rest = spatial_axes(draft, x)
    c, h, w = draft.shape(x)
    if len(rest) != 1 and math.prod(n for axis in rest[:-1] for _, n in axis) != 1:
        raise draft.fail(
            "a linear layer must see all features of a sample in one axis",
            "put a Flatten before it",
        )
    codes, alpha = _weight_codes(draft, module)
    codes = codes.reshape(codes.shape[0], c, h, w)
    y = _convolve(draft, module, x, codes, alpha, Geometry())
    return replace(y, axes=per_sample_axes(lead_axes(draft, x), draft.shape(y), 1))


def lower_norm(draft: Draft, module: Any, x: Array) -> Array:
    """A batch norm with running statistics: a factor and an offset per channel."""
    if module.running_mean is None or module.running_var is None:
        raise draft.fail(
            "a batch norm without running statistics makes a sample depend on its batch",
            "build it with track_running_stats=True and train it",
        )
    for what in ("running_mean", "running_var", "weight", "bias"):
        value = getattr(module, what)
        if value is not None and not bool(torch.isfinite(value).all()):
            raise draft.fail(
                f"its {what} contains NaN or infinity",
                "train on or load a sound checkpoint; running statistics are also taken anew "
                "by reset_running_stats() and a pass over data in training mode",
            )
    if bool((module.running_var + module.eps <= 0).any()):
        raise draft.fail(
            "its running_var is not positive", "load a sound checkpoint or train it anew"
        )
    spatial_axes(draft, x)
    gamma = np.ones(module.num_features) if module.weight is None else _real(module.weight)
    beta = np.zeros(module.num_features) if module.bias is None else _real(module.bias)
    factor = gamma / np.sqrt(_real(module.running_var) + module.eps)
    shift = beta - _real(module.running_mean) * factor
    channels = draft.shape(x)[0]
    if factor.size != channels:
        raise draft.fail(
            f"it normalises {factor.size} features of a value of {channels} channels",
            "give it as many features as its input has channels",
        )
    gain = x.gain if x.gain is not None else np.full(channels, x.scale)
    bias = x.bias if x.bias is not None else np.zeros(channels)
    return replace(x, gain=gain * factor, bias=bias * factor + shift, origin=draft.where)


def _real(t: torch.Tensor) -> Real:
    return np.asarray(t.detach().to(torch.float64).cpu().numpy())


def _weight_codes(draft: Draft, module: Any) -> tuple[IntArray, Real]:
    """Integer codes and per-output-channel scale, from the quantizer that trained them."""
    quantizer = getattr(module, "quantizer", None)
    if quantizer is None:
        raise draft.fail(
            "its weights are floating point",
            f"quantize the {type(module).__name__} (for example quantize_(model, "
            '"1w-2u"), which keeps first and last layer at 8 bits)',
        )
    if not bool(torch.isfinite(module.weight).all()):
        raise draft.fail(
            "its weights contain NaN or infinity", "train on or load a sound checkpoint"
        )
    codes, scale = quantizer.codes(module.weight)
    alpha = _real(scale).reshape(-1)
    folded = getattr(module, "output_scale", None)  # left by fold_batchnorm_
    if folded is not None:
        alpha = alpha * _real(folded)
    codes = codes.detach().cpu().numpy()
    return codes, np.broadcast_to(alpha, (codes.shape[0],)).astype(np.float64)


def _convolve(
    draft: Draft, module: Any, x: Array, codes: IntArray, alpha: Real, geometry: Geometry
) -> Array:
    """A convolution with weight codes ``[C_out, C_in/groups, kh, kw]`` and scales ``[C_out]``."""
    x = settle(draft, x)
    if draft.values[x.index].planes == 0 and x.index != draft.input:
        raise draft.fail(
            "it follows another layer without a neuron in between, so its input is a "
            "current, not spikes",
            "merge the two layers or put a neuron between them",
        )
    key = ("layer", id(module), x.index, x.scale)
    if key not in draft.convolutions:
        binary = getattr(module.quantizer, "bits", 32) == 1
        draft.convolutions[key] = _pending(draft, x.index, codes, binary, geometry)
    bias = np.zeros(codes.shape[0]) if module.bias is None else _real(module.bias)
    return replace(
        x, base=draft.convolutions[key], gain=alpha * x.scale, bias=bias, origin=draft.where
    )


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
