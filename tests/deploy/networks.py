"""Small quantized networks of both hosts, calibrated, for the deployment tests."""

from __future__ import annotations

import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from qsnn_ext import hosts
from qsnn_ext import layers as own_layers
from qsnn_ext import snntorch as qsnn
from qsnn_ext import spikingjelly as qsj
from qsnn_ext.quantizers import (
    BinaryWeight,
    IntWeight,
    MembraneQuantizer,
    membrane_quantizer,
)


def quantize(model: nn.Module, bits: int | None = 2, preset="paper", order="fire_first"):
    """Every hidden layer binary, first and last 8 bit, every neuron k bit: in place."""
    import snntorch as snn

    weighted = [m for m in model.modules() if own_layers.is_stock(m)]
    for k, m in enumerate(weighted):
        quantizer = IntWeight() if k in (0, len(weighted) - 1) else BinaryWeight()
        own_layers.counterpart(type(m), quantizer.bits).from_float(m, quantizer)
    for m in model.modules():
        if type(m) in qsj.NEURONS:
            qsj.NEURONS[type(m)].from_float(m, membrane_quantizer(bits, preset), order)
        elif type(m) is snn.Leaky and m.reset_mechanism != "none":
            qsnn.QLeaky.from_float(m, membrane_quantizer(bits, preset), order)
    return model


def reset(model: nn.Module) -> None:
    hosts.reset(model)


def calibrate(model: nn.Module, x: torch.Tensor, passes: int = 3) -> nn.Module:
    """Freeze batch norm and membrane scales at what ``x`` shows."""
    model.train()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = None
    with torch.no_grad():
        for _ in range(passes):
            reset(model)
            model(x)
    for m in model.modules():
        if isinstance(m, MembraneQuantizer):
            m.mode = "frozen"
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    with torch.no_grad():
        for _ in range(passes):
            reset(model)
            model(x)
    reset(model)
    return model.eval()


class PLIFNet(nn.Module):
    """The style of SpikingJelly's tutorials: multi-step layers, voting, mean over time."""

    def __init__(self, T=4, channels=16, node=neuron.ParametricLIFNode):
        super().__init__()
        self.T = T
        self.features = nn.Sequential(
            layer.Conv2d(2, channels, 3, padding=1, bias=False),
            layer.BatchNorm2d(channels),
            node(),
            layer.MaxPool2d(2, 2),
            layer.Conv2d(channels, channels, 3, padding=1, bias=False),
            layer.BatchNorm2d(channels),
            node(),
            layer.AvgPool2d(2, 2),
            layer.Flatten(),
            layer.Dropout(0.5),
            layer.Linear(channels * 4, 50),
            node(),
            layer.Linear(50, 30),
            node(),
            layer.VotingLayer(10) if hasattr(layer, "VotingLayer") else nn.Identity(),
        )
        functional.set_step_mode(self, "m")

    def forward(self, x):
        seq = x.unsqueeze(0).repeat(self.T, 1, 1, 1, 1)
        return self.features(seq).mean(0)


class SingleStepNet(nn.Module):
    """A loop over time in ``forward`` around single-step modules, spikes summed up."""

    def __init__(self, T=5):
        super().__init__()
        self.T = T
        self.net = nn.Sequential(
            layer.Flatten(),
            layer.Linear(64, 40, bias=False),
            neuron.LIFNode(tau=2.0),
            layer.Linear(40, 20, bias=False),
            neuron.LIFNode(tau=2.0),
            layer.Linear(20, 10),
            neuron.LIFNode(tau=2.0),
        )

    def forward(self, x):
        out = 0
        for _ in range(self.T):
            out = out + self.net(x)
        return out / self.T


class ExplicitMembranes(nn.Module):
    """snnTorch's first tutorial style: membranes handed from step to step."""

    def __init__(self, T=6, mechanism="subtract", delay=True):
        import snntorch as snn

        super().__init__()
        self.T = T
        self.fc1 = nn.Linear(64, 100)
        self.lif1 = snn.Leaky(beta=0.9, reset_mechanism=mechanism, reset_delay=delay)
        self.fc2 = nn.Linear(100, 50)
        self.lif2 = snn.Leaky(beta=0.8, threshold=0.7, reset_mechanism=mechanism)
        self.fc3 = nn.Linear(50, 10)
        self.lif3 = snn.Leaky(beta=0.95, reset_mechanism="none")

    def forward(self, x):
        mem1, mem2, mem3 = self.lif1.reset_mem(), self.lif2.reset_mem(), self.lif3.reset_mem()
        spikes, membranes = [], []
        for _ in range(self.T):
            cur1 = self.fc1(x.flatten(1))
            spk1, mem1 = self.lif1(cur1, mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spk3, mem3 = self.lif3(self.fc3(spk2), mem3)
            spikes.append(spk3)
            membranes.append(mem3)
        return torch.stack(spikes, dim=0), torch.stack(membranes, dim=0)


class FramesLoop(nn.Module):
    """snnTorch on frames ``[T, N, C, H, W]``: a Sequential called per step."""

    def __init__(self):
        import snntorch as snn

        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(2, 12, 5),
            nn.MaxPool2d(2),
            snn.Leaky(beta=0.5, init_hidden=True),
            nn.Sequential(
                nn.Conv2d(12, 32, 3, padding=1),
                nn.AvgPool2d(2),
                snn.Leaky(beta=0.5, init_hidden=True, reset_mechanism="zero"),
            ),
            nn.Flatten(),
            nn.Linear(32 * 9, 10),
            snn.Leaky(beta=0.5, init_hidden=True, output=True),
        )

    def forward(self, data):
        reset(self.net)
        recorded = []
        for step in range(data.size(0)):
            spk, _ = self.net(data[step])
            recorded.append(spk)
        return torch.stack(recorded)


def make_dyadic(model: nn.Module, seed: int = 0, low: int = -2, high: int = 0) -> nn.Module:
    """Give a quantized model parameters whose float32 arithmetic is exact.

    All scales are powers of two and all constants multiples of 1/64, so the simulation rounds
    nowhere and the integer program must agree with it spike by spike, ties included. Membrane
    levels are ``2**low`` to ``2**high`` apart.
    """
    g = torch.Generator().manual_seed(seed)

    def draw(shape, low, high, unit):
        return torch.randint(low, high + 1, tuple(shape), generator=g) * unit

    for m in model.modules():
        quantizer = getattr(m, "quantizer", None)
        if isinstance(quantizer, BinaryWeight):
            quantizer.scale = None
        elif isinstance(quantizer, IntWeight):
            weight = draw(m.weight.shape, -127, 127, 1 / 64)
            weight.view(-1)[0] = 127 / 64
            m.weight.data.copy_(weight)
        if getattr(m, "bias", None) is not None and isinstance(m, nn.Linear | nn.Conv2d):
            m.bias.data.copy_(draw(m.bias.shape, -8, 24, 1 / 16))
        if isinstance(m, nn.BatchNorm2d):
            m.eps = 0.25
            m.running_var.fill_(0.75)
            m.weight.data.copy_(draw(m.weight.shape, 1, 4, 1 / 32))
            m.running_mean.copy_(draw(m.weight.shape, -8, 8, 1 / 4))
            m.bias.data.copy_(draw(m.weight.shape, -4, 16, 1 / 16))
        if isinstance(m, MembraneQuantizer):
            step = 2.0 ** int(torch.randint(low, high + 1, (1,), generator=g))
            m.freeze(step * (2 ** (m.bits - 1) - 1))
        if isinstance(m, qsj.QuantParametricLIFNode | neuron.ParametricLIFNode):
            m.w.data.zero_()  # sigmoid(0) = 1/2
        if hasattr(m, "beta") and isinstance(m.beta, torch.Tensor):
            m.beta.fill_(0.5)
        if isinstance(getattr(m, "threshold", None), torch.Tensor):
            m.threshold.fill_(1.0)
    return model.eval()
