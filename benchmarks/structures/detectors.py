"""Object detectors: boxes from several scales, integer-valued neurons, a distribution head."""

from __future__ import annotations

from typing import Any

import torch
from spikingjelly.activation_based import neuron
from torch import Tensor, nn

from benchmarks.structures import Built, structure
from benchmarks.structures.resnets import (
    BatchNormOverTime,
    MemUpdate,
    SnnConv2d,
    host_neuron,
    time_window,
)

# --------------------------------------------------------------------------- EMS-YOLO


class EMSBlock(nn.Module):
    """Everything goes through neurons: the shortcut pools spikes before its convolution."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.residual_function = nn.Sequential(
            MemUpdate(),
            SnnConv2d(i, o, kernel_size=3, stride=2, padding=1, bias=False),
            BatchNormOverTime(o),
            MemUpdate(),
            SnnConv2d(o, o, kernel_size=3, padding=1, bias=False),
            BatchNormOverTime(o, 0.0),
        )
        self.pool = nn.MaxPool3d((1, 2, 2))
        self.shortcut = nn.Sequential(
            MemUpdate(), SnnConv2d(i, o, kernel_size=1, bias=False), BatchNormOverTime(o)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, C, H, W]`` to ``[T, N, o, H/2, W/2]``."""
        short = self.pool(x.flatten(0, 1)).reshape(
            x.shape[0], x.shape[1], x.shape[2], x.shape[3] // 2, x.shape[4] // 2
        )
        return self.residual_function(x) + self.shortcut(short)


class Detect(nn.Module):
    """Anchors at two scales, from the mean over time."""

    def __init__(self, channels: tuple[int, ...], classes: int, anchors: int = 3) -> None:
        super().__init__()
        self.na, self.no = anchors, classes + 5
        self.m = nn.ModuleList(SnnConv2d(c, self.na * self.no, 1) for c in channels)

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        """Per scale ``[T, N, C, H, W]`` to ``[N, na, H, W, no]``."""
        out = []
        for conv, y in zip(self.m, x, strict=True):
            y = conv(y)
            y = y.sum(dim=0) / y.size()[0]
            N, _, H, W = y.shape
            out.append(y.view(N, self.na, self.no, H, W).permute(0, 1, 3, 4, 2).contiguous())
        return out


class EMSYOLO(nn.Module):
    """Backbone of EMS blocks, two heads."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            SnnConv2d(3, width, 7, stride=2, padding=3, bias=False), BatchNormOverTime(width)
        )
        self.c2, self.c3 = EMSBlock(width, 2 * width), EMSBlock(2 * width, 4 * width)
        self.lateral = nn.Sequential(
            MemUpdate(),
            SnnConv2d(4 * width, 2 * width, 1, bias=False),
            BatchNormOverTime(2 * width),
        )
        self.act3, self.act2 = MemUpdate(), MemUpdate()
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.detect = Detect((2 * width, 4 * width), classes)

    def forward(self, x: Tensor) -> list[Tensor]:
        """``[N, 3, H, W]`` to boxes at two scales."""
        x = x.unsqueeze(0).repeat(time_window, 1, 1, 1, 1)
        p2 = self.c2(self.stem(x))
        p3 = self.c3(p2)
        low = self.lateral(p3)
        high = self.upsample(low.flatten(0, 1)).reshape(p2.shape) + p2
        return self.detect([self.act2(high), self.act3(p3)])


@structure(
    "EMS-YOLO",
    "EMS-YOLO: neurons from scratch everywhere, anchors at two scales",
    replace={MemUpdate: host_neuron},
)
def ems_yolo(small: bool = True) -> Built:
    return Built(EMSYOLO(8 if small else 64, 4), torch.rand(2, 3, 32, 32))


# --------------------------------------------------------------------------- SpikeYOLO


class Quant(torch.autograd.Function):
    """Round to 0 to 4; the gradient passes inside that range."""

    @staticmethod
    def forward(ctx: Any, i: Tensor, max_value: int) -> Tensor:  # noqa: D102
        ctx.max = max_value
        ctx.save_for_backward(i)
        return torch.round(torch.clamp(i, min=0, max=max_value))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        grad_input = grad_output.clone()
        (i,) = ctx.saved_tensors
        grad_input[i < 0] = 0
        grad_input[i > ctx.max] = 0
        return grad_input, None


class IntegerLIF(nn.Module):
    """Emits integers up to 4 in training, which are as many spikes at inference."""

    def __init__(self, max_value: int = 4) -> None:
        super().__init__()
        self.max_value = max_value

    def forward(self, x: Tensor) -> Tensor:
        """Currents ``[T, N, ...]`` to integers."""
        spike = torch.zeros_like(x[0])
        output = torch.zeros_like(x)
        mem: Tensor | int = 0
        for i in range(x.shape[0]):
            mem = (mem - spike) * 0.25 + x[i] if i >= 1 else x[i]
            spike = Quant.apply(mem, self.max_value)
            output[i] = spike
        return output


def integer_neuron(own: IntegerLIF) -> nn.Module:
    """One spike a step in place of up to four: what its user gives up by saying this."""
    return neuron.LIFNode(
        tau=4 / 3,
        decay_input=False,
        v_threshold=1.0,
        v_reset=None,
        detach_reset=True,
        step_mode="m",
    )


class ConvBN(nn.Module):
    """Neuron, convolution, batch norm, on ``[T, N, ...]``."""

    def __init__(self, i: int, o: int, k: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.lif = IntegerLIF()
        self.conv = nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(o)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, C, H, W]``."""
        T, N = x.shape[:2]
        y = self.bn(self.conv(self.lif(x).flatten(0, 1)))
        return y.reshape(T, N, *y.shape[1:])


class YOLOBlock(nn.Module):
    """Separable convolution, then two plain ones, as residuals between currents."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up, self.depth, self.down = (
            ConvBN(dim, 2 * dim), ConvBN(2 * dim, 2 * dim, 7, groups=2 * dim), ConvBN(2 * dim, dim),
        )  # fmt: skip
        self.conv1, self.conv2 = ConvBN(dim, 2 * dim, 3), ConvBN(2 * dim, dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, C, H, W]``."""
        x = x + self.down(self.depth(self.up(x)))
        return x + self.conv2(self.conv1(x))


class SpikeSPPF(nn.Module):
    """Three poolings of one another, side by side."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = ConvBN(dim, dim // 2), ConvBN(2 * dim, dim)
        self.m = nn.MaxPool2d(5, stride=1, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, C, H, W]``."""
        T, N = x.shape[:2]
        x = self.cv1(x)
        y = [x.flatten(0, 1)]
        for _ in range(3):
            y.append(self.m(y[-1]))
        z = torch.cat(y, dim=1)
        return self.cv2(z.reshape(T, N, *z.shape[1:]))


class DFL(nn.Module):
    """The mean of a distribution over bins, as a convolution whose weights are constants."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(bins, dtype=torch.float).view(1, bins, 1, 1)
        self.bins = bins

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 4 * bins, A]`` to ``[N, 4, A]``."""
        N, _, A = x.shape
        y = x.view(N, 4, self.bins, A).transpose(2, 1).softmax(1)
        return self.conv(y).view(N, 4, A)


class DistributionHead(nn.Module):
    """Per scale a branch for the boxes' distributions and one for the classes."""

    def __init__(self, channels: tuple[int, ...], classes: int, bins: int = 8) -> None:
        super().__init__()
        self.nc, self.bins = classes, bins
        self.cv2 = nn.ModuleList(
            nn.Sequential(ConvBN(c, c, 3), ConvBN(c, 4 * bins, 1)) for c in channels
        )
        self.cv3 = nn.ModuleList(
            nn.Sequential(ConvBN(c, c, 3), ConvBN(c, classes, 1)) for c in channels
        )
        self.dfl = DFL(bins)

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        """Per scale ``[T, N, C, H, W]`` to boxes ``[N, 4, A]`` and scores ``[N, classes, A]``."""
        feats = [
            torch.cat((b(y), c(y)), 2).mean(0)
            for b, c, y in zip(self.cv2, self.cv3, x, strict=True)
        ]
        flat = torch.cat([f.flatten(2) for f in feats], 2)
        box, cls = flat.split((self.bins * 4, self.nc), 1)
        return {"box": self.dfl(box), "cls": cls.sigmoid()}


class SpikeYOLO(nn.Module):
    """Down, down, pooled pyramid, and up with a concatenation."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 7, 4, 3, bias=False), nn.BatchNorm2d(width))
        self.b1 = YOLOBlock(width)
        self.down = ConvBN(width, 2 * width, 3, stride=2)
        self.b2 = YOLOBlock(2 * width)
        self.sppf = SpikeSPPF(2 * width)
        self.upsample = nn.Upsample(None, 2, "nearest")
        self.fuse = ConvBN(3 * width, width)
        self.detect = DistributionHead((width, 2 * width), classes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """``[N, 3, H, W]``; a single time step while training, as with integer neurons."""
        x = self.stem(x).unsqueeze(0).repeat(2, 1, 1, 1, 1)
        p1 = self.b1(x)
        p2 = self.sppf(self.b2(self.down(p1)))
        up = self.upsample(p2.flatten(0, 1))
        up = up.reshape(x.shape[0], x.shape[1], *up.shape[1:])
        return self.detect([self.fuse(torch.cat((up, p1), 2)), p2])


@structure(
    "SpikeYOLO",
    "SpikeYOLO: integer-valued neurons, distribution head with constants",
    replace={IntegerLIF: integer_neuron},
)
def spike_yolo(small: bool = True) -> Built:
    return Built(SpikeYOLO(8 if small else 64, 4), torch.rand(2, 3, 32, 32))
