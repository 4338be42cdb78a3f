"""Builds the network a configuration asks for, and answers questions about its layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from qsnn_ext import BinaryWeight, hosts, models
from recipes import data as datasets
from recipes.config import Config


def build(config: Config, spec: Any) -> nn.Module:
    """The network of a run, float32 or float64 as its precision says.

    Args:
        config: The run.
        spec: :class:`recipes.data.DataSpec` of the data set: classes, channels.

    """
    make = getattr(models, config.network)
    model: nn.Module = make(
        num_classes=spec.classes,
        in_channels=spec.channels,
        width=config.width,
        T=config.steps,
        bits=config.bits,
        preset=config.preset,
        host=config.host,
        neuron=neuron_options(config),
    )
    changes: dict[str, Any] = {}
    if not config.standardized:
        changes["standardize"] = None  # the sign of latent weights as they are: plain Q-SNN
    if config.sign_gradient is not None:
        changes["gradient"] = config.sign_gradient
    if changes:
        change_weights(model, **changes)
    return model


def neuron_options(config: Config) -> dict[str, Any]:
    """The options of a quantized neuron in which the run departs from its preset."""
    if not config.quantized:
        return {}
    options: dict[str, Any] = {"mode": config.membrane_mode}
    if config.order is not None:
        options["order"] = config.order
    if config.membrane_scale is not None:
        options["scale"] = config.membrane_scale
    return options


def change_weights(model: nn.Module, **options: Any) -> None:
    """Give the quantizer of every binary layer other options."""
    for module in binary_layers(model):
        module.quantizer = BinaryWeight(**{**module.quantizer.options(), **options})


def binary_layers(model: nn.Module) -> list[nn.Module]:
    """Every layer with 1-bit weights."""
    return [m for m in model.modules() if isinstance(getattr(m, "quantizer", None), BinaryWeight)]


def uses_annealing(model: nn.Module) -> bool:
    """Whether any binary layer's sign gradient is annealed over the epochs."""
    return any(isinstance(m, BinaryWeight) and m.gradient == "annealed" for m in model.modules())


def spiking_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All spiking neurons by name, in the order of their registration."""
    return {n: m for n, m in model.named_modules() if hosts.adapter_of(m) is not None}


def hidden_weights(model: nn.Module) -> dict[str, nn.Module]:
    """Convolutions and linear layers by name, without the first and the last."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    return {n: found[n] for n in list(found)[1:-1]}


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters at the bits their layer computes with; scales are not counted."""
    bits = 0
    for module in model.modules():
        quantizer = getattr(module, "quantizer", None)
        for name, parameter in module.named_parameters(recurse=False):
            quantized = name == "weight" and quantizer is not None
            bits += parameter.numel() * (quantizer.bits if quantized else 32)
    return -(-bits // 8)


def data_options(config: Config) -> dict[str, Any]:
    """What :func:`recipes.data.datasets` is asked for, without what only it needs.

    Returns:
        ``size``, and ``steps`` for event data; still images are repeated by the network.
    """
    events = datasets.spec(config.data).events
    return {"size": config.size, "steps": config.steps if events else None}
