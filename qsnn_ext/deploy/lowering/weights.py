"""Weights that a model hands to a function of torch itself.

A layer whose ``forward`` does something of its own with its weight (standardizes it, scales it,
adds to its answer) is recorded function by function. What reaches ``conv2d`` or ``linear`` there
must still be integers times a scale: per output channel ``weight = alpha * codes + offset``, which
holds for every weight that was standardized or scaled channel by channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qsnn_ext.deploy.lowering.arithmetic import lower_add
from qsnn_ext.deploy.lowering.draft import Array, Draft
from qsnn_ext.deploy.lowering.layers import (
    Kernel,
    Weights,
    lower_conv,
    lower_linear,
    lower_transposed_conv,
    real,
)
from qsnn_ext.deploy.lowering.neurons import Real
from qsnn_ext.deploy.program import IntArray
from qsnn_ext.layers import QuantizedWeight
from qsnn_ext.layers.computing import swap_channels

#: How far a weight may lie from integers times a scale, relative to the largest of its channel.
ROUNDING = 1e-5


def lower_product(
    draft: Draft,
    x: Array,
    weight: Any,
    bias: Any,
    kernel: Kernel | None,
    target: tuple[int, ...] | None = None,
) -> Array:
    """A convolution or linear layer as a function.

    Args:
        draft: The program so far.
        x: What it is applied to.
        weight, bias: As torch takes them.
        kernel: How the convolution is laid out; None for a linear layer.
        target: Shape of the result of a transposed convolution; None for others.
    """
    if not isinstance(weight, Tensor) or not (bias is None or isinstance(bias, Tensor)):
        raise draft.fail(
            "its weight or bias depends on the input of the model",
            "use a product of spikes (a matmul), or weights that are trained",
        )
    rows = weight
    if target is not None:
        assert kernel is not None
        rows = swap_channels(weight, kernel.groups)
    codes, alpha, offset, binary = _codes(draft, rows)
    shift = np.zeros(len(codes)) if bias is None else real(bias)

    def product(weights: Weights) -> Array:
        if kernel is None:
            return lower_linear(draft, weights, x)
        if target is not None:
            return lower_transposed_conv(draft, weights, kernel, x, target)
        return lower_conv(draft, weights, kernel, x)

    y = product(Weights(codes, alpha, shift, binary))
    if not offset.any():
        return y
    ones = Weights(np.ones_like(codes), offset, np.zeros(len(codes)), True)
    total = lower_add(draft, y, product(ones))
    assert isinstance(total, Array)
    return replace(total, axes=y.axes)


def _codes(draft: Draft, rows: Tensor) -> tuple[IntArray, Real, Real, bool]:
    """Codes ``[C_out, ...]``, scale and offset per output channel, whether the codes are bits."""
    if not bool(torch.isfinite(rows).all()):
        raise draft.fail(
            "its weights contain NaN or infinity", "train on or load a sound checkpoint"
        )
    wanted = real(rows).reshape(rows.shape[0], -1)
    for layer in _layers(draft):
        own: Any = layer
        latent = own.rows(own.latent())
        if latent.shape != rows.shape:
            continue
        codes = own.quantizer.codes(latent)[0].detach().cpu().numpy()
        found = _fit(wanted, codes.reshape(wanted.shape).astype(np.float64))
        if found is not None:
            return codes, *found, own.quantizer.bits == 1
    left = draft.left.get(draft.where)
    raise draft.fail(
        "the weight it multiplies with is no quantized weight, nor one scaled or shifted per output"
        " channel" + (f" (quantize_ left it, as {left})" if left else ""),
        "take it from a layer that quantize_ quantizes, and change it per output channel only",
    )


def _layers(draft: Draft) -> Iterator[QuantizedWeight]:
    """Quantized layers, the one whose forward is running first."""
    here = draft.modules.get(draft.where)
    if isinstance(here, QuantizedWeight):
        yield here
    for module in draft.modules.values():
        if isinstance(module, QuantizedWeight) and module is not here:
            yield module


def _fit(wanted: Real, codes: Real) -> tuple[Real, Real] | None:
    """``wanted = alpha * codes + offset`` row by row; None if that is not so."""
    error = ROUNDING * np.abs(wanted).max(axis=1, keepdims=True)
    power = (codes**2).sum(axis=1, keepdims=True)
    alpha = (wanted * codes).sum(axis=1, keepdims=True) / np.maximum(power, 1)
    if (np.abs(wanted - alpha * codes) <= error).all():
        return alpha[:, 0], np.zeros(len(wanted))
    mean = codes.mean(axis=1, keepdims=True)
    spread = ((codes - mean) ** 2).sum(axis=1, keepdims=True)
    alpha = (wanted * (codes - mean)).sum(axis=1, keepdims=True) / np.where(spread > 0, spread, 1)
    offset = wanted.mean(axis=1, keepdims=True) - alpha * mean
    if (np.abs(wanted - alpha * codes - offset) <= error).all():
        return alpha[:, 0], offset[:, 0]
    return None
