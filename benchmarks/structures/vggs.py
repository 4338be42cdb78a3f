"""VGGs with a neuron from scratch, batch-first: those of temporal efficient training."""

from __future__ import annotations

from typing import Any

import torch
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor, nn

from benchmarks.structures import Built, structure


class ZIF(torch.autograd.Function):
    """Step forward, triangle backward."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, gama: float) -> Tensor:  # noqa: D102
        ctx.save_for_backward(input)
        ctx.gama = gama
        return (input >= 0).float()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        (input,) = ctx.saved_tensors
        gama = ctx.gama
        triangle = (1 / gama) * (1 / gama) * (gama - input.abs()).clamp(min=0)
        return grad_output * triangle, None


class LIFSpike(nn.Module):
    """A neuron over ``[N, T, ...]`` that belongs to no library."""

    def __init__(self, thresh: float = 1.0, tau: float = 0.5, gama: float = 1.0) -> None:
        super().__init__()
        self.thresh, self.tau, self.gama = thresh, tau, gama

    def forward(self, x: Tensor) -> Tensor:
        """Currents to spikes."""
        mem: Tensor | int = 0
        spike_pot = []
        for t in range(x.shape[1]):
            mem = mem * self.tau + x[:, t, ...]
            spike = ZIF.apply(mem - self.thresh, self.gama)
            mem = (1 - spike) * mem
            spike_pot.append(spike)
        return torch.stack(spike_pot, dim=1)


class BatchFirst(nn.Module):
    """A neuron of the host, which wants time in front."""

    def __init__(self, neuron: nn.Module) -> None:
        super().__init__()
        self.neuron = neuron

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, ...]``."""
        return self.neuron(x.transpose(0, 1)).transpose(0, 1)


def host_neuron(own: LIFSpike) -> nn.Module:
    """What a user of ``LIFSpike`` says that it is."""
    lif = neuron.LIFNode(
        tau=1 / (1 - own.tau), decay_input=False, v_threshold=own.thresh, v_reset=0.0,
        surrogate_function=surrogate.PiecewiseQuadratic(), step_mode="m",
    )  # fmt: skip
    return BatchFirst(lif)


class SeqToANN(nn.Module):
    """Layers of torch on ``[N, T, ...]``: batch and time are one axis for them."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.module = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, ...]``."""
        y_shape = [x.shape[0], x.shape[1]]
        y = self.module(x.flatten(0, 1).contiguous())
        y_shape.extend(y.shape[1:])
        return y.view(y_shape)


class ConvLayer(nn.Module):
    """Convolution, batch norm, neuron."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.fwd = SeqToANN(nn.Conv2d(i, o, 3, 1, 1), nn.BatchNorm2d(o))
        self.act = LIFSpike()

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, C, H, W]``."""
        return self.act(self.fwd(x))


class TETVGG(nn.Module):
    """Frames ``[N, T, C, H, W]`` in, one answer per step out, as the loss of TET needs it."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        pool = SeqToANN(nn.AvgPool2d(2))
        self.features = nn.Sequential(
            ConvLayer(2, width),
            ConvLayer(width, 2 * width),
            pool,
            ConvLayer(2 * width, 4 * width),
            ConvLayer(4 * width, 4 * width),
            pool,
        )
        self.classifier = SeqToANN(nn.Dropout(0.25), nn.Linear(4 * width * 16, classes))

    def forward(self, input: Tensor) -> Tensor:
        """``[N, T, C, H, W]`` to ``[N, T, classes]``."""
        x = self.features(input)
        x = torch.flatten(x, 2)
        return self.classifier(x)


@structure(
    "TET VGG", "VGGSNN of TET: LIFSpike from scratch, batch-first", replace={LIFSpike: host_neuron}
)
def tet_vgg(small: bool = True) -> Built:
    return Built(TETVGG(8 if small else 64, 10), (torch.rand(2, 4, 2, 16, 16) < 0.3).float())


# --------------------------------------------------------------------------- TEBN


class TEBN(nn.Module):
    """Batch norm over all steps, then a trained factor per step."""

    def __init__(self, channels: int, T: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.p = nn.Parameter(torch.ones(T, 1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, C, H, W]``."""
        y = self.bn(x.flatten(0, 1)).reshape(x.shape)
        y = y.transpose(0, 1).contiguous() * self.p
        return y.contiguous().transpose(0, 1)


class TEBNLayer(nn.Module):
    """Convolution, per-step norm, neuron."""

    def __init__(self, i: int, o: int, T: int) -> None:
        super().__init__()
        self.fwd = SeqToANN(nn.Conv2d(i, o, 3, 1, 1))
        self.bn = TEBN(o, T)
        self.act = LIFSpike(tau=0.25)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, C, H, W]``."""
        return self.act(self.bn(self.fwd(x)))


class TEBNVGG(nn.Module):
    """A static image is repeated along the second axis."""

    def __init__(self, T: int, width: int, classes: int) -> None:
        super().__init__()
        self.T = T
        self.conv1 = TEBNLayer(3, width, T)
        self.conv2 = TEBNLayer(width, 2 * width, T)
        self.pool = SeqToANN(nn.AvgPool2d(2))
        self.pool_act = LIFSpike(tau=0.25)
        self.conv3 = TEBNLayer(2 * width, 4 * width, T)
        self.fc1 = SeqToANN(nn.Linear(4 * width * 16, 4 * width))
        self.fc1_act = LIFSpike(tau=0.25)
        self.fc2 = SeqToANN(nn.Linear(4 * width, classes))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, T, classes]``."""
        x = x.unsqueeze(1).repeat(1, self.T, 1, 1, 1)
        x = self.conv2(self.conv1(x))
        x = self.pool_act(self.pool(x))
        x = self.pool(self.conv3(x))
        x = self.fc1_act(self.fc1(x.flatten(2)))
        return self.fc2(x)


@structure(
    "TEBN VGG", "VGG of TEBN: a factor per step after batch norm", replace={LIFSpike: host_neuron}
)
def tebn_vgg(small: bool = True) -> Built:
    return Built(TEBNVGG(4, 8 if small else 64, 10), torch.rand(2, 3, 16, 16))
