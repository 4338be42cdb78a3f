"""One module changes its class in place, and every change can be undone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qsnn_ext import hosts, trace
from qsnn_ext.errors import ConversionError, QSNNError
from qsnn_ext.layers import QuantizedWeight, counterpart, is_weighted
from qsnn_ext.quantizers import Quantizer


@dataclass(frozen=True)
class Target:
    """What a module is to become.

    Attributes:
        quantizer: of weights or membrane potential; ``None`` for floating point.
        order: step order, for neurons.
        preset: whose defaults a neuron follows besides its quantizer's, such as a strict threshold.
        device: where the quantizer goes, for neurons (layers know theirs).
    """

    quantizer: Quantizer | None
    order: Any = None
    device: torch.device | None = None
    preset: str = "paper"


def quantized_layer(module: nn.Module, quantizer: Quantizer) -> type[QuantizedWeight] | None:
    """The class with quantized weights that can take a layer's place."""
    kind = module.float_type() if isinstance(module, QuantizedWeight) else type(module)
    return counterpart(kind, quantizer.bits)


def quantized_neuron(module: nn.Module) -> Any:
    """The quantized class that can take a neuron's place, or is its class already."""
    return hosts.counterpart(module)


def change_class(module: Any, target: Target) -> None:
    """Change the class of one module to its target, inside :func:`all_or_nothing`."""
    if isinstance(module, QuantizedWeight) or is_weighted(module):
        if isinstance(module, QuantizedWeight):
            _restore_float(module)
        if target.quantizer is not None:
            kind = quantized_layer(module, target.quantizer)
            assert kind is not None  # planned with it
            kind.from_float(module, target.quantizer)
        return
    quantized = quantized_neuron(module)
    if type(module) is quantized:
        module.to_float()
    if target.quantizer is not None:
        quantizer = target.quantizer.to(target.device)
        quantized.from_float(module, quantizer, target.order, target.preset)


def _restore_float(layer: Any) -> None:
    float_type = layer.float_type()
    del layer.quantizer
    layer.__class__ = float_type


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Undo, when its body fails or is interrupted, every change of class, attribute or child.

    Values of tensors are not kept: a body must not write to those that were there before.

    Raises:
        ConversionError: the body failed; the model is as it was.
    """
    before = [
        (
            module,
            type(module),
            module.__dict__.copy(),
            # Parameters, buffers, children, hooks: put back into the same containers.
            [(t, t.copy()) for t in module.__dict__.values() if isinstance(t, (dict, set))],
        )
        for module in model.modules()
    ]
    try:
        yield
    except BaseException as error:
        for module, kind, attributes, tables in before:
            module.__class__ = kind
            trace.put_back(module.__dict__, attributes)
            for table, content in tables:
                table.clear()
                table.update(content)
        if isinstance(error, QSNNError) or not isinstance(error, Exception):
            raise
        raise ConversionError(
            f"conversion failed and was undone: {type(error).__name__}: {error}"
        ) from error


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``model`` has ``old``."""
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
