"""Torch's convolutions and linear layers with quantized weights."""

from __future__ import annotations

from torch import nn

from qsnn_ext.layers.base import BinaryLayer
from qsnn_ext.layers.computing import (
    MultiStep,
    QuantizedConv,
    QuantizedMatmul,
    QuantizedTransposedConv,
)
from qsnn_ext.layers.counterparts import counterpart_of


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


@counterpart_of(nn.Conv1d)
class BinaryConv1d(BinaryLayer, QuantConv1d):
    """``nn.Conv1d`` with 1-bit weights (Eq. 6, 16); input ``[N, C, L]`` or ``[T, N, C, L]``."""


@counterpart_of(nn.Conv2d)
class BinaryConv2d(BinaryLayer, QuantConv2d):
    """``nn.Conv2d`` with 1-bit weights (Eq. 6, 16); input ``[(T,) N, C, H, W]``."""


@counterpart_of(nn.Conv3d)
class BinaryConv3d(BinaryLayer, QuantConv3d):
    """``nn.Conv3d`` with 1-bit weights (Eq. 6, 16); input ``[(T,) N, C, D, H, W]``."""


@counterpart_of(nn.Linear)
class BinaryLinear(BinaryLayer, QuantLinear):
    """``nn.Linear`` with 1-bit weights (Eq. 6, 16); input ``[..., in_features]``."""


@counterpart_of(nn.ConvTranspose1d)
class BinaryConvTranspose1d(BinaryLayer, QuantConvTranspose1d):
    """``nn.ConvTranspose1d`` with 1-bit weights; input ``[(T,) N, C, L]``."""


@counterpart_of(nn.ConvTranspose2d)
class BinaryConvTranspose2d(BinaryLayer, QuantConvTranspose2d):
    """``nn.ConvTranspose2d`` with 1-bit weights; input ``[(T,) N, C, H, W]``."""


@counterpart_of(nn.ConvTranspose3d)
class BinaryConvTranspose3d(BinaryLayer, QuantConvTranspose3d):
    """``nn.ConvTranspose3d`` with 1-bit weights; input ``[(T,) N, C, D, H, W]``."""
