"""``fold_batchnorm_``: batch norm of a trained model into the layers before it.

A quantized layer cannot take batch norm into its latent weights, for they would be quantized
differently. It takes it as a scale per output channel (``output_scale``), which multiplies the
scale of the codes, and a bias; latent weights and integer codes stay what they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qsnn_ext import hosts, trace
from qsnn_ext.conversion.change import replace_module
from qsnn_ext.errors import ConversionError, InputTypeError, StateError
from qsnn_ext.layers import (
    QuantizedWeight,
    fold_,
    is_stock,
    is_synaptic,
    normalization_affine,
)
from qsnn_ext.models import ConvBN
from qsnn_ext.text import printable
from qsnn_ext.wrapping import named_modules, unwrap


class FoldedNorm(nn.Identity):
    """Stands where a folded batch norm was."""


@dataclass(frozen=True)
class FoldReport:
    """What :func:`fold_batchnorm_` did.

    Attributes:
        folded: pairs of layer name and batch norm name.
        left: batch norms that stay, with the reason.
    """

    folded: tuple[tuple[str, str], ...]
    left: dict[str, str]

    def __str__(self) -> str:
        """One line for each batch norm."""
        lines = [f"{norm}: folded into {layer}" for layer, norm in self.folded]
        lines += [f"{norm}: left, {reason}" for norm, reason in self.left.items()]
        return "\n".join(printable(line, most=1000) for line in lines) or "no batch norm found"


def fold_batchnorm_(model: nn.Module, sample: Any = None) -> FoldReport:
    """Fold batch norms into the convolutions and linear layers that feed them, in place.

    Quantized layers get an ``output_scale`` and a bias, float layers scaled weights and a bias;
    the outputs stay the same up to rounding. Fold a trained model last: a folded layer cannot be
    quantized anew, and its batch norm no longer trains.

    Args:
        model: in evaluation mode.
        sample: an input, see :func:`qsnn_ext.quantize_`. With it the model runs once, undisturbed,
            and every batch norm whose input is the output of one layer, used nowhere else, is
            folded; a batch norm that is one of several by number (``norms.0``, ``norms.1``), as for
            time steps, only if all of them ran. Without it only neighbours in an
            ``nn.Sequential`` (and in this package's networks) are, as there nothing else can be in
            between.

    Returns:
        Which were folded and which not.

    Raises:
        InputTypeError: ``model`` is not a module.
        StateError: the model, or a batch norm in it, is in training mode.
        ConversionError: the model does not run on the sample.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"fold_batchnorm_ needs a module, got {type(model).__name__}.")
    model = unwrap(model)
    names = {id(m): n for n, m in reversed(list(named_modules(model, remove_duplicate=False)))}
    norms: dict[int, Any] = {
        id(m): m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    }
    training = [names[key] for key, norm in norms.items() if norm.training]
    if training:
        raise StateError(
            f"batch norm {training[0]!r} is in training mode and its statistics still move; "
            "call model.eval() before folding."
        )
    if sample is None:
        pairs, reasons = _neighbours(model)
    else:
        pairs, reasons = _traced(model, norms, names, sample)
    weights = [id(m.weight) for m in model.modules() if is_synaptic(m)]
    chosen: list[tuple[Any, nn.Module, tuple[Tensor, Tensor]]] = []
    left: dict[str, str] = {}
    for key, norm in norms.items():
        layer = pairs.get(key)
        why = reasons.get(key, "not seen behind a layer; pass a sample to look at a real run")
        if layer is not None:
            why = _unfit(layer, norm, weights) or ""
        if layer is None or why:
            left[names[key]] = why
        else:
            chosen.append((layer, norm, normalization_affine(norm)))
    for layer, norm, (scale, shift) in chosen:
        fold_(layer, scale, shift)
        replace_module(model, norm, FoldedNorm())
    folded = tuple((names[id(layer)], names[id(norm)]) for layer, norm, _ in chosen)
    return FoldReport(folded, left)


def _unfit(layer: Any, norm: nn.Module, weights: list[int]) -> str | None:
    if not isinstance(layer, QuantizedWeight) and not is_stock(layer):
        return f"{type(layer).__name__} computes its weights in its own way"
    if type(norm).__name__ not in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"):
        return f"{type(norm).__name__} is more than a batch norm"
    if norm.running_mean is None or norm.running_var is None:
        return "it keeps no running statistics"
    if not isinstance(layer, QuantizedWeight) and weights.count(id(layer.weight)) > 1:
        return "the layer's float weight is shared with another layer"
    return None


_Found = tuple[dict[int, nn.Module], dict[int, str]]


def _neighbours(model: nn.Module) -> _Found:
    """Pairs that are certain from the structure alone, by id of the batch norm."""
    pairs: dict[int, nn.Module] = {}
    reasons: dict[int, str] = {}
    uses: dict[int, int] = {}
    for parent in model.modules():
        for child in parent._modules.values():  # children() would name a repeated one once
            uses[id(child)] = uses.get(id(child), 0) + 1
    for layer, norm in _adjacent(model):
        if uses[id(layer)] > 1 or uses[id(norm)] > 1:
            reasons[id(norm)] = "it or its layer is used in several places"
        elif isinstance(layer, nn.Linear):
            reasons[id(norm)] = (
                "behind a linear layer the shapes tell which dimension it normalises; pass a sample"
            )
        else:
            pairs[id(norm)] = layer
    return pairs, reasons


def _adjacent(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    for parent in model.modules():
        if isinstance(parent, ConvBN):
            yield parent.conv, parent.bn
        elif isinstance(parent, nn.Sequential) and type(parent).forward is nn.Sequential.forward:
            children = [child for child in parent._modules.values() if child is not None]
            for layer, norm in pairwise(children):
                if is_synaptic(layer) and isinstance(norm, nn.modules.batchnorm._BatchNorm):
                    yield layer, norm


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which layers' outputs are read by anything but the batch norm being run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.outputs: dict[int, nn.Module] = {}  # storage -> layer
        self.alive: list[Tensor] = []  # keeps storages, and so their addresses, apart
        self.elsewhere: set[int] = set()  # ids of layers
        self.in_norm = False

    def owner(self, tensor: Tensor) -> nn.Module | None:
        return self.outputs.get(_storage(tensor))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # saves seconds of import: nothing is compiled while this watches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.in_norm:
            # A view shares the storage and is no use yet: what is done with it comes later.
            is_view = isinstance(out, Tensor) and not func._schema.is_mutable
            for value in _tensors(args):
                layer = self.owner(value)
                if layer is not None and not (is_view and _storage(out) == _storage(value)):
                    self.elsewhere.add(id(layer))
        return out


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def _tensors(args: Any) -> Iterator[Tensor]:
    for value in args:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _family(name: str, norm: Any) -> tuple[str, int]:
    """What batch norms of several time steps have in common: a name but for the number, a size."""
    return re.sub(r"\d+", "#", name), norm.num_features


def _traced(model: nn.Module, norms: dict[int, Any], names: dict[int, str], sample: Any) -> _Found:
    """Pairs seen in a real run, by id of the batch norm."""
    watch = _Watch()
    fed: dict[int, set[int]] = {key: set() for key in norms}
    layers: dict[int, nn.Module] = {}
    calls: dict[int, int] = {}
    odd: set[int] = set()

    def made(layer: nn.Module, _: Any, output: Any) -> None:
        calls[id(layer)] = calls.get(id(layer), 0) + 1
        if isinstance(output, Tensor):
            watch.alive.append(output)
            watch.outputs[_storage(output)] = layer

    def enter(norm: nn.Module, args: Any) -> None:
        x = args[0]
        layer = watch.owner(x)
        if layer is None:
            fed[id(norm)].add(0)
        else:
            layers[id(layer)] = layer
            fed[id(norm)].add(id(layer))
            multi_step = hosts.over_time(norm)
            if isinstance(layer, nn.Linear) and x.dim() != (3 if multi_step else 2):
                odd.add(id(norm))
        watch.in_norm = True

    def leave(norm: nn.Module, _: Any, __: Any) -> None:
        watch.in_norm = False

    handles = [m.register_forward_hook(made) for m in model.modules() if is_synaptic(m)]
    for norm in norms.values():
        handles.append(norm.register_forward_pre_hook(enter))
        handles.append(norm.register_forward_hook(leave))
    try:
        with trace.undisturbed(model), watch:
            result = trace.call(model, sample)
    except Exception as error:
        raise ConversionError(
            f"the model does not run on the sample ({type(error).__name__}: {error}); "
            "pass an input its forward takes."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    results = result.values() if isinstance(result, dict) else [result]
    for value in _tensors(list(results)):
        layer = watch.owner(value)
        if layer is not None:
            watch.elsewhere.add(id(layer))

    feeders = {key: next(iter(ids)) for key, ids in fed.items() if len(ids) == 1 and 0 not in ids}
    # A batch norm per time step: a longer sample would feed the next one from the same layer.
    idle: dict[tuple[str, int], str] = {}
    for key, norm in norms.items():
        if not fed[key]:
            idle.setdefault(_family(names[key], norm), names[key])
    pairs: dict[int, nn.Module] = {}
    reasons: dict[int, str] = {}
    for key, ids in fed.items():
        layer_id = feeders.get(key, 0)
        sibling = idle.get(_family(names[key], norms[key]))
        if not ids:
            reasons[key] = "it did not run on the sample"
        elif key not in feeders:
            reasons[key] = "its input is not the output of one layer"
        elif list(feeders.values()).count(layer_id) > 1 or layer_id in watch.elsewhere:
            reasons[key] = "the layer's output is used elsewhere too"
        elif key in odd:
            reasons[key] = "it normalises another dimension than the layer's features"
        elif sibling is not None:
            reasons[key] = (
                f"{sibling} did not run on the sample and may follow the same layer at another "
                "time step; pass a sample of all time steps"
            )
        else:
            pairs[key] = layers[layer_id]
    return pairs, reasons
