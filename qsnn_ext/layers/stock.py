"""Torch's convolutions and linear layers with quantized weights."""

from __future__ import annotations

from torch import nn

from qsnn_ext.layers.computing import (
    MultiStep,
    QuantizedConv,
    QuantizedMatmul,
    QuantizedTransposedConv,
)
from qsnn_ext.layers.counterparts import binary, counterpart_of


@counterpart_of(nn.Conv1d)
class QuantConv1d(MultiStep, QuantizedConv, nn.Conv1d):
    """``nn.Conv1d`` with 8-bit weights; input ``[N, C, L]`` or ``[T, N, C, L]``."""

    spatial_dims = 1


@counterpart_of(nn.Conv2d)
class QuantConv2d(MultiStep, QuantizedConv, nn.Conv2d):
    """``nn.Conv2d`` with 8-bit weights; input ``[N, C, H, W]`` or ``[T, N, C, H, W]``."""

    spatial_dims = 2


@counterpart_of(nn.Conv3d)
class QuantConv3d(MultiStep, QuantizedConv, nn.Conv3d):
    """``nn.Conv3d`` with 8-bit weights; input ``[(T,) N, C, D, H, W]``."""

    spatial_dims = 3


@counterpart_of(nn.Linear)
class QuantLinear(QuantizedMatmul, nn.Linear):
    """``nn.Linear`` with 8-bit weights; input ``[..., in_features]``."""


@counterpart_of(nn.ConvTranspose1d)
class QuantConvTranspose1d(MultiStep, QuantizedTransposedConv, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with 8-bit weights; input ``[(T,) N, C, L]``."""

    spatial_dims = 1


@counterpart_of(nn.ConvTranspose2d)
class QuantConvTranspose2d(MultiStep, QuantizedTransposedConv, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with 8-bit weights; input ``[(T,) N, C, H, W]``."""

    spatial_dims = 2


@counterpart_of(nn.ConvTranspose3d)
class QuantConvTranspose3d(MultiStep, QuantizedTransposedConv, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with 8-bit weights; input ``[(T,) N, C, D, H, W]``."""

    spatial_dims = 3


#: The same layers with 1 bit, by names of their own.
BinaryConv1d = binary(QuantConv1d)
BinaryConv2d = binary(QuantConv2d)
BinaryConv3d = binary(QuantConv3d)
BinaryLinear = binary(QuantLinear)
BinaryConvTranspose1d = binary(QuantConvTranspose1d)
BinaryConvTranspose2d = binary(QuantConvTranspose2d)
BinaryConvTranspose3d = binary(QuantConvTranspose3d)
