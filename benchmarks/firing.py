"""Networks with a chosen firing rate, for benchmarks whose cost depends on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qsnn_ext.quantizers import MembraneQuantizer


def freeze_scales(model: nn.Module, x: Tensor) -> None:
    """Freeze every membrane scale at what ``x`` shows, and switch to evaluation mode."""
    model.train()
    for q in model.modules():
        if isinstance(q, MembraneQuantizer):
            q.mode = "frozen"
    frozen = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in frozen:
        m.eval()
    with torch.no_grad():
        for _ in range(3):
            model(x)
    model.eval()


def set_firing_rate(model: nn.Module, x: Tensor, rate: float) -> list[float]:
    """Shift the batch norms of a spiking network so that every neuron layer fires at ``rate``.

    Batch norms get the statistics of ``x`` first. Layer by layer, a scalar is found by bisection
    and added to the bias of the batch norm that ran last before the neuron.

    Args:
        model: A network of :mod:`qsnn_ext.models` with SpikingJelly neurons and dynamic scales.
        x: Images ``[N, C, H, W]``.
        rate: The wanted firing rate.

    Returns:
        The firing rate of every layer, in order.
    """
    norms: list[nn.BatchNorm2d] = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    neurons: list[Any] = [m for m in model.modules() if hasattr(m, "v_threshold")]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    with torch.no_grad():
        model(x)
    model.eval()
    last: list[nn.BatchNorm2d] = []
    handles = [n.register_forward_hook(lambda m, i, o: last.append(m)) for n in norms]
    rates: list[float] = []

    def tune(neuron: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        current = inputs[0]
        low, high = -20.0, 20.0
        for _ in range(25):
            middle = (low + high) / 2
            neuron.reset()
            measured = float(neuron.forward(current + middle).mean())
            low, high = (middle, high) if measured < rate else (low, middle)
        neuron.reset()
        rates.append(measured)
        last[-1].bias.data += middle
        return (current + middle,)

    handles += [n.register_forward_pre_hook(tune) for n in neurons]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return rates
