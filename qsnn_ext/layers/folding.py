"""A batch norm's scale and shift inside the layer before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from qsnn_ext.layers.base import QuantizedWeight
from qsnn_ext.layers.computing import swap_channels


def normalization_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift, both ``[C]`` float64, that a batch norm in evaluation mode amounts to."""
    n: Any = norm
    scale = (n.running_var.double() + n.eps).rsqrt()
    if n.weight is not None:
        scale = scale * n.weight.detach().double()
    shift = -n.running_mean.double() * scale
    if n.bias is not None:
        shift = shift + n.bias.detach().double()
    return scale, shift


@torch.no_grad()
def fold_(layer: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """Make a layer compute ``scale * layer(x) + shift``, per output channel, in place.

    A quantized layer gets an ``output_scale``, its latent weights and codes stay; a stock layer's
    weights are scaled. Both get a bias if they had none, and the attribute ``folded``.

    Args:
        layer: a stock layer or its quantized counterpart.
        scale: ``[C_out]``.
        shift: ``[C_out]``.
    """
    target: Any = layer
    weight = target.weight
    if target.bias is None:
        target.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)
    else:
        target.bias.copy_(target.bias.double() * scale + shift)
    if isinstance(layer, QuantizedWeight):
        before = layer._buffers.get("output_scale")
        scale = scale if before is None else scale * before.double()
        target.register_buffer("output_scale", scale.to(weight.dtype))
    else:
        transposed = isinstance(layer, _ConvTransposeNd)
        rows = swap_channels(weight, target.groups) if transposed else weight
        rows = rows.double() * scale.view(-1, *[1] * (weight.dim() - 1))
        weight.copy_(swap_channels(rows, target.groups) if transposed else rows)
    target.folded = True
