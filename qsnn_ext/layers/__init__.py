"""Layers with quantized weights: the stock layer, a quantizer, and one property.

The latent float weight stays the parameter, with the stock layer's name and shape, so a checkpoint
of the float model loads strictly and an optimizer notices nothing. ``quantized_weight`` is what the
layer computes with.

There is one class for each stock layer (:func:`counterpart_of` registers it); how many bits its
weights have is the quantizer's affair. ``Binary...`` and ``Quant...`` are two names for it: the
first is built with 1 bit, the second with 8, and which of them a layer is shows its width in
``print(model)``. A subclass of a stock layer, written by whoever, gets a class of its own that
extends it (:func:`counterpart`).

Inputs are single-step ``[N, C, ...]`` or multi-step ``[T, N, C, ...]``; the rank tells which. For
layers whose step mode is set by SpikingJelly see :mod:`qsnn_ext.spikingjelly`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from qsnn_ext.errors import ConfigError
from qsnn_ext.layers.base import BinaryLayer, QuantizedWeight
from qsnn_ext.layers.computing import (
    QuantizedConv,
    QuantizedMatmul,
    QuantizedTransposedConv,
    ShadowedLayer,
)
from qsnn_ext.layers.counterparts import (
    binary,
    counterpart,
    counterpart_of,
    is_stock,
    is_synaptic,
    is_weighted,
    no_counterpart,
)
from qsnn_ext.layers.folding import fold_, normalization_affine
from qsnn_ext.layers.packed import (
    QuantGRU,
    QuantGRUCell,
    QuantLSTM,
    QuantLSTMCell,
    QuantMultiheadAttention,
    QuantRNN,
    QuantRNNCell,
)
from qsnn_ext.layers.stock import (
    BinaryConv1d,
    BinaryConv2d,
    BinaryConv3d,
    BinaryConvTranspose1d,
    BinaryConvTranspose2d,
    BinaryConvTranspose3d,
    BinaryLinear,
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
    QuantLinear,
)
from qsnn_ext.quantizers import weight_quantizer

_BUILDERS: dict[str, type[nn.Module]] = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "linear": nn.Linear,
}


def build_layer(
    kind: str, *args: Any, bits: int | None, preset: str = "paper", **kwargs: Any
) -> nn.Module:
    """A ``"conv2d"``, ``"linear"``, ... of the given weight bits: stock, binary or integer.

    Args:
        kind: ``"conv1d"``, ``"conv2d"``, ``"conv3d"`` or ``"linear"``.
        args: the stock layer's positional arguments.
        bits: 1, 2 to 8, or ``None``/32 for the stock layer.
        preset: options of the binary quantizer.
        kwargs: the stock layer's keyword arguments.

    Raises:
        ConfigError: unknown kind, bits or preset.
    """
    if kind not in _BUILDERS:
        raise ConfigError(f"layer {kind!r} is unknown; choose one of {', '.join(_BUILDERS)}.")
    stock = _BUILDERS[kind]
    quantizer = weight_quantizer(bits, preset)
    if quantizer is None:
        return stock(*args, **kwargs)
    layer: Any = counterpart(stock, quantizer.bits)
    built: nn.Module = layer(*args, quantizer=quantizer, **kwargs)
    return built


__all__ = [
    "BinaryConv1d",
    "BinaryConv2d",
    "BinaryConv3d",
    "BinaryConvTranspose1d",
    "BinaryConvTranspose2d",
    "BinaryConvTranspose3d",
    "BinaryLayer",
    "BinaryLinear",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "QuantGRU",
    "QuantGRUCell",
    "QuantLSTM",
    "QuantLSTMCell",
    "QuantLinear",
    "QuantMultiheadAttention",
    "QuantRNN",
    "QuantRNNCell",
    "QuantizedConv",
    "QuantizedMatmul",
    "QuantizedTransposedConv",
    "QuantizedWeight",
    "ShadowedLayer",
    "binary",
    "build_layer",
    "counterpart",
    "counterpart_of",
    "fold_",
    "is_stock",
    "is_synaptic",
    "is_weighted",
    "no_counterpart",
    "normalization_affine",
]
