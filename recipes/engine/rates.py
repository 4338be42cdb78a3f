"""Firing rates and sign probabilities, layer by layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qsnn_ext import functional
from recipes.engine.networks import hidden_weights, spiking_layers


class RateMeter:
    """Counts the spikes of every spiking layer between :meth:`start` and :meth:`stop`.

    Args:
        model: Network whose spiking layers are watched, in the order of their registration.

    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = spiking_layers(model)
        self.counts: dict[str, Tensor] = {}
        self.trials: dict[str, int] = {}
        self._counting = False
        # Hooked once and for all: a compiled network is compiled anew when its hooks change.
        for name, module in self.layers.items():
            module.register_forward_hook(self._hook(name))

    def start(self) -> None:
        """Forget earlier counts and begin."""
        self.counts, self.trials = {}, {}
        self._counting = True

    def stop(self) -> None:
        """Cease counting; the counts stay."""
        self._counting = False

    def _hook(self, name: str) -> Any:
        def count(module: nn.Module, args: Any, output: Any) -> None:
            if not self._counting:
                return
            spikes = (output[0] if isinstance(output, tuple) else output).detach()
            # [T, N, ...] in SpikingJelly's multi-step mode, [N, ...] in a single step.
            leading = 2 if getattr(module, "step_mode", "s") == "m" else 1
            flat = spikes.flatten(0, leading - 1)
            fired = flat.sum(0, dtype=torch.float32)
            self.counts[name] = self.counts[name] + fired if name in self.counts else fired
            self.trials[name] = self.trials.get(name, 0) + flat.shape[0]

        return count

    def neuron_rates(self, everyone: Any) -> dict[str, Tensor]:
        """Spikes per time step of each neuron [C, H, W], by layer, over all processes.

        Args:
            everyone: Function that sums a tensor over the processes.

        """
        rates = {}
        for name, counts in self.counts.items():
            trials = torch.tensor(float(self.trials[name]), device=counts.device)
            total = everyone(torch.cat([counts.flatten(), trials[None]]))
            rates[name] = (total[:-1] / total[-1]).reshape(counts.shape).cpu()
        return rates


def entropy(rate: float) -> float:
    """Entropy of a layer's spikes in nats (Eq. 14)."""
    return functional.entropy(torch.tensor(rate, dtype=torch.float64)).item() + 0.0


def sign_probabilities(model: nn.Module) -> dict[str, float]:
    """Share of +1 among each hidden layer's weight signs (p_w of the paper's Figure 4).

    Float layers count by the sign of their weights, so that networks can be compared.
    """
    shares = {}
    for name, layer in hidden_weights(model).items():
        weight, quantizer = layer.weight.detach(), getattr(layer, "quantizer", None)
        codes = weight if quantizer is None else quantizer.codes(weight)[0]
        shares[name] = (codes >= 0).double().mean().item()
    return shares
