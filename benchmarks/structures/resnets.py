"""Residual networks: a neuron and convolution from scratch, and the element-wise one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

from benchmarks.structures import Built, structure

thresh = 0.5
decay = 0.25
time_window = 2


class ActFun(torch.autograd.Function):
    """Step forward, rectangle of width one backward."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:  # noqa: D102
        ctx.save_for_backward(input)
        return input.gt(thresh).float()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:  # noqa: D102
        (input,) = ctx.saved_tensors
        return grad_output * (abs(input - thresh) < 0.5).float()


class MemUpdate(nn.Module):
    """A neuron over ``[T, N, ...]`` that belongs to no library."""

    def __init__(self, act: bool = False) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Currents to spikes."""
        mem = torch.zeros_like(x[0])
        spike = torch.zeros_like(x[0])
        output = torch.zeros_like(x)
        mem_old: Tensor | int = 0
        for i in range(time_window):
            mem = mem_old * decay * (1 - spike.detach()) + x[i] if i >= 1 else x[i]
            spike = ActFun.apply(mem)
            mem_old = mem.clone()
            output[i] = spike
        return output


def host_neuron(own: MemUpdate) -> nn.Module:
    """What a user of ``MemUpdate`` says that it is."""
    return neuron.LIFNode(
        tau=1 / (1 - decay), decay_input=False, v_threshold=thresh, v_reset=0.0,
        surrogate_function=surrogate.PiecewiseQuadratic(), detach_reset=True, step_mode="m",
    )  # fmt: skip


class SnnConv2d(nn.Conv2d):
    """Its own loop over time, with the weight of the class it extends."""

    def forward(self, input: Tensor) -> Tensor:
        """``[T, N, C, H, W]``."""
        steps = [
            nn.functional.conv2d(
                input[i], self.weight, self.bias, self.stride, self.padding,
                self.dilation, self.groups,
            )
            for i in range(time_window)
        ]  # fmt: skip
        return torch.stack(steps)


class BatchNormOverTime(nn.Module):
    """Batch norm over time, batch and image together; its weight starts at the threshold."""

    def __init__(self, channels: int, start: float = thresh) -> None:
        super().__init__()
        self.bn = nn.BatchNorm3d(channels)
        nn.init.constant_(self.bn.weight, start)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, C, H, W]``."""
        y = x.transpose(0, 2).contiguous().transpose(0, 1).contiguous()
        y = self.bn(y)
        return y.contiguous().transpose(0, 1).contiguous().transpose(0, 2)


class MSBlock(nn.Module):
    """Neuron, convolution, norm, twice; the residual adds currents."""

    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.residual_function = nn.Sequential(
            MemUpdate(),
            SnnConv2d(i, o, kernel_size=3, stride=stride, padding=1, bias=False),
            BatchNormOverTime(o),
            MemUpdate(),
            SnnConv2d(o, o, kernel_size=3, padding=1, bias=False),
            BatchNormOverTime(o, 0.0),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or i != o:
            self.shortcut = nn.Sequential(
                SnnConv2d(i, o, kernel_size=1, stride=stride, bias=False), BatchNormOverTime(o)
            )

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, C, H, W]``."""
        return self.residual_function(x) + self.shortcut(x)


class MSResNet(nn.Module):
    """The image is written into every step of an empty tensor; the head follows the mean."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            SnnConv2d(3, width, kernel_size=3, padding=1, bias=False), BatchNormOverTime(width)
        )
        self.mem_update = MemUpdate()
        self.conv2_x = nn.Sequential(MSBlock(width, width), MSBlock(width, width))
        self.conv3_x = nn.Sequential(MSBlock(width, 2 * width, 2), MSBlock(2 * width, 2 * width))
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, classes]``."""
        input = torch.zeros(time_window, *x.size(), device=x.device)
        for i in range(time_window):
            input[i] = x
        output = self.conv1(input)
        output = self.conv2_x(output)
        output = self.conv3_x(output)
        output = self.mem_update(output)
        output = nn.functional.adaptive_avg_pool3d(output, (None, 1, 1))
        output = output.view(output.size()[0], output.size()[1], -1)
        output = output.sum(dim=0) / output.size()[0]
        return self.fc(output)


@structure(
    "MS-ResNet",
    "MS-ResNet: convolution, norm and neuron (mem_update) from scratch",
    replace={MemUpdate: host_neuron},
)
def ms_resnet(small: bool = True) -> Built:
    return Built(MSResNet(8 if small else 128, 10), torch.rand(2, 3, 16, 16))


# --------------------------------------------------------------------------- SEW


class SEWBlock(nn.Module):
    """The residual adds spikes."""

    def __init__(self, i: int, o: int, stride: int, cnf: str, spiking: Any, **kwargs: Any) -> None:
        super().__init__()
        self.conv1 = layer.Conv2d(i, o, 3, stride, padding=1, bias=False)
        self.bn1 = layer.BatchNorm2d(o)
        self.sn1 = spiking(**copy.deepcopy(kwargs))
        self.conv2 = layer.Conv2d(o, o, 3, padding=1, bias=False)
        self.bn2 = layer.BatchNorm2d(o)
        self.sn2 = spiking(**copy.deepcopy(kwargs))
        self.cnf = cnf
        self.downsample = None
        if stride != 1 or i != o:
            self.downsample = nn.Sequential(
                layer.Conv2d(i, o, 1, stride, bias=False),
                layer.BatchNorm2d(o),
                spiking(**copy.deepcopy(kwargs)),
            )

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, C, H, W]``."""
        identity = x if self.downsample is None else self.downsample(x)
        out = self.sn1(self.bn1(self.conv1(x)))
        out = self.sn2(self.bn2(self.conv2(out)))
        if self.cnf == "ADD":
            return out + identity
        if self.cnf == "AND":
            return out * identity
        return identity * (1.0 - out)


class SEWResNet(nn.Module):
    """The stem runs once, its current is repeated over time; the head follows the mean."""

    def __init__(self, T: int, width: int, classes: int, cnf: str) -> None:
        super().__init__()
        kwargs = {"surrogate_function": surrogate.ATan(), "detach_reset": True}
        self.T = T
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.sn1 = neuron.IFNode(**kwargs)
        self.layer1 = SEWBlock(width, width, 1, cnf, neuron.IFNode, **kwargs)
        self.layer2 = SEWBlock(width, 2 * width, 2, cnf, neuron.IFNode, **kwargs)
        self.layer3 = SEWBlock(2 * width, 2 * width, 1, cnf, neuron.IFNode, **kwargs)
        self.avgpool = layer.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(2 * width, classes)
        functional.set_step_mode(self, "m")

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, classes]``."""
        x = self.conv1(x)
        x = self.bn1(x)
        x.unsqueeze_(0)
        x = x.repeat(self.T, 1, 1, 1, 1)
        x = self.sn1(x)
        x = self.layer3(self.layer2(self.layer1(x)))
        x = self.avgpool(x)
        x = torch.flatten(x, 2)
        return self.fc(x.mean(dim=0))


@structure("SEW-ResNet", "SEW-ResNet: residuals of spikes, stem repeated over time")
def sew_resnet(small: bool = True) -> Built:
    return Built(SEWResNet(2, 8 if small else 128, 10, "ADD"), torch.rand(2, 3, 16, 16))
