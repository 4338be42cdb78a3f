"""``calibrate_scales``: 1-bit weights whose currents are as large as the float weights' were."""

from __future__ import annotations

import torch
from torch import nn

from qsnn_ext.errors import InputTypeError
from qsnn_ext.layers import QuantizedWeight
from qsnn_ext.wrapping import named_modules, unwrap


@torch.no_grad()
def calibrate_scales(model: nn.Module, only: list[str] | None = None) -> dict[str, float]:
    """Scale 1-bit layers such that their currents have the deviation of the latent weights'.

    Standardised weights have deviation 1 where trained float weights have 0.05 or so, and currents
    grow in proportion. A batch norm behind the layer takes that back; without one, thresholds that
    suited the float model are crossed in every step. Each layer gets a buffer ``output_scale``
    ``[C_out]`` that multiplies the scale of its codes, one number for all of its channels; codes,
    latent weights and gradients' directions stay. Call it once, after :func:`quantize_`.

    Args:
        model: a quantized model.
        only: names of layers; by default all 1-bit layers that have no output scale yet.

    Returns:
        The factor of each layer by its name.

    Raises:
        InputTypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"calibrate_scales needs a module, got {type(model).__name__}.")
    factors: dict[str, float] = {}
    for name, layer in named_modules(unwrap(model)):
        if not isinstance(layer, QuantizedWeight) or layer.bits != 1:
            continue
        if "output_scale" in layer._buffers or (only is not None and name not in only):
            continue
        if layer.weight_names() != ("weight",):
            continue
        latent, value = layer.latent().detach(), layer.quantized_weight
        now = value.double().square().mean().sqrt()
        if now == 0:
            continue
        factor = latent.double().square().mean().sqrt() / now
        scale = layer.rows(latent).new_full((layer.rows(latent).shape[0],), factor.item())
        layer.register_buffer("output_scale", scale)
        factors[name] = factor.item()
    return factors
