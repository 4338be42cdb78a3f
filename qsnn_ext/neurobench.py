"""NeuroBench's metrics of quantized models, from what the quantizers know.

NeuroBench (Yik et al., Nature Communications 16, 2025) reads layers as torch leaves them: it counts
bytes of float parameters, and it counts operations with a copy of a layer whose weights it has
overwritten with ones. Once this module is imported, which happens by itself as soon as NeuroBench
looks at a quantized model, such a copy is of the stock layer, holding the weights that the
quantized one computes with; NeuroBench's own metrics of operations are then right. What takes more
to know is here, under NeuroBench's names; ``STATIC`` and ``WORKLOAD`` are lists for its
``Benchmark``.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from qsnn_ext import hosts
from qsnn_ext.energy import EnergyTable, operation
from qsnn_ext.errors import MissingDependencyError
from qsnn_ext.export import stock_copy
from qsnn_ext.layers import QuantizedWeight
from qsnn_ext.quantizers import Quantizer

try:
    from neurobench.blocks.layer import RECURRENT_CELLS, RECURRENT_LAYERS, STATELESS_LAYERS
    from neurobench.metrics import static, workload
    from neurobench.metrics.utils.layers import macs, single_layer_MACs
except ImportError as error:
    raise MissingDependencyError(
        f"qsnn_ext.neurobench needs NeuroBench 2.3, which could not be imported ({error}); "
        "install it with: pip install 'qsnn_ext[neurobench]'."
    ) from error

_COUNTED = (*STATELESS_LAYERS, *RECURRENT_LAYERS, *RECURRENT_CELLS)


def _teach() -> None:
    """NeuroBench's copies of quantized layers are of the stock layer, with quantized weights."""
    original = macs.make_binary_copy
    if getattr(original, "knows_quantized", False):
        return

    def make_binary_copy(layer: nn.Module, all_ones: bool = False) -> Any:
        plain = stock_copy(layer) if isinstance(layer, QuantizedWeight) else layer
        return original(plain, all_ones)

    make_binary_copy.knows_quantized = True  # type: ignore[attr-defined]
    macs.make_binary_copy = make_binary_copy


_teach()


class ConnectionSparsity(static.ConnectionSparsity):  # type: ignore[misc]
    """Share of weights whose quantized value is zero; of float layers as NeuroBench counts.

    1-bit weights are never zero; of 2 to 8 bits those are that round to the code 0.
    """

    def __call__(self, model: Any) -> float:
        """The share, rounded to 4 decimals."""
        zeros = weights = 0
        for module in model.__net__().modules():
            if not isinstance(module, _COUNTED):
                continue
            tensors: list[torch.Tensor]
            if isinstance(module, QuantizedWeight):
                tensors = [module.codes(name)[0] for name in module.weight_names()]
            elif isinstance(module, STATELESS_LAYERS):
                tensors = [module.weight]
            else:
                tensors = [p for p in module._parameters.values() if p is not None]
            zeros += sum(int((t == 0).sum()) for t in tensors)
            weights += sum(t.numel() for t in tensors)
        return round(zeros / weights, 4) if weights else 0.0


class Footprint(static.Footprint):  # type: ignore[misc]
    """Bytes of parameters, buffers and kept states, each at the bits of its quantizer.

    Of a model without quantizers it is NeuroBench's own number. Scales of weights, one for each
    output channel, count as they are held (float); membrane scales likewise.
    """

    def __call__(self, model: Any) -> float:
        """The bytes, a fraction where bits fill no byte."""
        total = 0.0
        counted: set[int] = set()
        for module in model.__net__().modules():
            if isinstance(module, Quantizer):
                continue  # counted with the layer or neuron that it belongs to
            widths = _widths(module)
            held = [*module._parameters.items(), *module._buffers.items()]
            for name, tensor in held:
                if tensor is None or id(tensor) in counted:
                    continue
                counted.add(id(tensor))
                total += tensor.numel() * widths.get(name, 8 * tensor.element_size()) / 8
            if isinstance(module, QuantizedWeight):
                for name in module.weight_names():
                    weight = module.latent(name)
                    scales = module.quantizer.scale_count(module.rows(weight))
                    total += scales * weight.element_size()
            elif widths:
                total += 4 * len(widths)  # a membrane scale each
        return total


def _widths(module: nn.Module) -> dict[str, int]:
    """Bits of those tensors of a module that a quantizer rounds."""
    if isinstance(module, QuantizedWeight):
        return dict.fromkeys(module.weight_names(), module.bits)
    described = hosts.describe(module)
    if described is None:
        return {}
    return {s.name: s.quantizer.bits for s in described.states if s.quantizer is not None}


class OperationsByKind(workload.SynapticOperations):  # type: ignore[misc]
    """NeuroBench's effective operations per sample, by what the arithmetic is, and their energy.

    Kinds and costs are those of :mod:`qsnn_ext.energy`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kinds: Counter[str] = Counter()

    def reset(self) -> None:
        """Begin another evaluation."""
        super().reset()
        self._kinds = Counter()

    def __call__(self, model: Any, preds: Any, data: Any) -> dict[str, float]:
        """Add the operations of one batch."""
        for hook in model.connection_hooks:
            layer = hook.layer
            bits = layer.bits if isinstance(layer, QuantizedWeight) else None
            hook.hook.remove()
            for inputs in hook.inputs:
                x = inputs[0] if len(inputs) == 1 else inputs
                count, spiking = single_layer_MACs(x, layer)
                self._kinds[operation(bits, spiking)] += count
            hook.register_hook()
        self.total_samples += data[0].size(0)
        return self.compute()

    def compute(self) -> dict[str, float]:
        """Operations of each kind per sample, and ``picojoules``."""
        if not self.total_samples:
            return {}
        energy = EnergyTable().picojoules(self._kinds)
        kinds = {kind: count / self.total_samples for kind, count in self._kinds.items()}
        return {**kinds, "picojoules": energy / self.total_samples}


#: Metrics for NeuroBench's ``Benchmark``: static ones, and those of a workload.
STATIC = [static.ParameterCount, Footprint, ConnectionSparsity]
WORKLOAD = [workload.ActivationSparsity, workload.SynapticOperations, OperationsByKind]
