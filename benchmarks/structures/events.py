"""Event cameras and layers of one's own: batch-first frames, separable and standardized."""

from __future__ import annotations

import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

from benchmarks.structures import Built, structure


class DVSGesture(nn.Module):
    """``[N, T, C, H, W]``, as a DataLoader gives it; votes of ten neurons each."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        conv = []
        for i in range(3):
            conv += [
                layer.Conv2d(2 if i == 0 else width, width, 3, padding=1, bias=False),
                layer.BatchNorm2d(width),
                neuron.LIFNode(surrogate_function=surrogate.ATan(), detach_reset=True),
                layer.MaxPool2d(2),
            ]
        self.conv_fc = nn.Sequential(
            *conv,
            layer.Flatten(),
            layer.Dropout(0.5),
            layer.Linear(width * 4, 4 * width),
            neuron.LIFNode(surrogate_function=surrogate.ATan(), detach_reset=True),
            layer.Dropout(0.5),
            layer.Linear(4 * width, classes * 10),
            neuron.LIFNode(surrogate_function=surrogate.ATan(), detach_reset=True),
            layer.VotingLayer(10),
        )
        functional.set_step_mode(self, "m")

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, 2, 16, 16]`` to ``[N, classes]``."""
        x = x.transpose(0, 1)
        return self.conv_fc(x).mean(0)


@structure("DVS gesture, batch-first", "gesture networks on frames as the DataLoader gives them")
def dvs_gesture(small: bool = True) -> Built:
    model = DVSGesture(8 if small else 128, 11)
    return Built(model, (torch.rand(2, 4, 2, 16, 16) < 0.3).float())


class SeparableBlock(nn.Module):
    """Depthwise then pointwise, each with norm and neuron."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.depthwise = layer.Conv2d(i, i, 3, stride, 1, groups=i, bias=False)
        self.bn1, self.sn1 = layer.BatchNorm2d(i), neuron.ParametricLIFNode(detach_reset=True)
        self.pointwise = layer.Conv2d(i, o, 1, bias=False)
        self.bn2, self.sn2 = layer.BatchNorm2d(o), neuron.ParametricLIFNode(detach_reset=True)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, C, H, W]``."""
        return self.sn2(self.bn2(self.pointwise(self.sn1(self.bn1(self.depthwise(x))))))


class SpikingMobileNet(nn.Module):
    """Depthwise separable convolutions; the answer of every step comes out."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            layer.Conv2d(2, width, 3, 2, 1, bias=False),
            layer.BatchNorm2d(width),
            neuron.ParametricLIFNode(detach_reset=True),
        )
        self.blocks = nn.Sequential(
            SeparableBlock(width, 2 * width, 1),
            SeparableBlock(2 * width, 2 * width, 2),
            SeparableBlock(2 * width, 4 * width, 1),
        )
        self.pool = layer.AdaptiveAvgPool2d(1)
        self.classifier = layer.Linear(4 * width, classes)
        functional.set_step_mode(self, "m")

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, 2, H, W]`` to ``[T, N, classes]``."""
        return self.classifier(self.pool(self.blocks(self.stem(x))).flatten(2))


@structure("depthwise separable", "DSNN-like MobileNets with trained decays")
def depthwise_separable(small: bool = True) -> Built:
    model = SpikingMobileNet(8 if small else 64, 10)
    return Built(model, (torch.rand(3, 2, 2, 16, 16) < 0.3).float())


class ScaledWSConv2d(nn.Conv2d):
    """Its forward standardizes ``self.weight`` and scales it by a trained gain."""

    def __init__(self, i: int, o: int, k: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__(i, o, k, stride, padding)
        self.gain = nn.Parameter(torch.ones(o, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]``."""
        w = self.weight
        mean = w.mean(dim=(1, 2, 3), keepdim=True)
        var = w.var(dim=(1, 2, 3), keepdim=True)
        w = (w - mean) / torch.sqrt(var * w[0].numel() + 1e-4) * self.gain
        return nn.functional.conv2d(x, w, self.bias, self.stride, self.padding)


class NormFreeNet(nn.Module):
    """No batch norm: standardized weights keep currents in range; one call per time step."""

    def __init__(self, width: int, classes: int, T: int = 3) -> None:
        super().__init__()
        self.T = T
        self.features = nn.Sequential(
            ScaledWSConv2d(3, width, 3, padding=1),
            neuron.LIFNode(tau=2.0, detach_reset=True),
            ScaledWSConv2d(width, 2 * width, 3, stride=2, padding=1),
            neuron.LIFNode(tau=2.0, detach_reset=True),
            ScaledWSConv2d(2 * width, 2 * width, 3, padding=1),
            neuron.LIFNode(tau=2.0, detach_reset=True),
            nn.AdaptiveAvgPool2d((1, 1)),
        )
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 3, H, W]`` to ``[N, classes]``."""
        out = self.fc(torch.flatten(self.features(x), 1))
        for _ in range(self.T - 1):
            out += self.fc(torch.flatten(self.features(x), 1))
        return out / self.T


@structure("weight-standardized", "online training: convolutions that standardize their weight")
def weight_standardized(small: bool = True) -> Built:
    return Built(NormFreeNet(8 if small else 64, 10), torch.randn(2, 3, 16, 16))


class AttentionNet(nn.Module):
    """Torch's packed attention between spiking layers."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.embed = layer.Linear(16, dim)
        self.sn1 = neuron.LIFNode(detach_reset=True)
        self.attn = nn.MultiheadAttention(dim, 4, batch_first=True)
        self.sn2 = neuron.LIFNode(detach_reset=True)
        self.fc1 = layer.Linear(dim, 2 * dim)
        self.sn3 = neuron.LIFNode(detach_reset=True)
        self.head = layer.Linear(2 * dim, classes)
        functional.set_step_mode(self, "m")

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, L, 16]`` to ``[N, classes]``."""
        x = self.sn1(self.embed(x))
        T, N, L, D = x.shape
        y = x.reshape(T * N, L, D)
        y, _ = self.attn(y, y, y, need_weights=False)
        x = self.sn2(y.reshape(T, N, L, D))
        x = self.sn3(self.fc1(x))
        return self.head(x.mean(2)).mean(0)


@structure("packed attention", "torch's MultiheadAttention between spiking layers")
def packed_attention(small: bool = True) -> Built:
    return Built(AttentionNet(32 if small else 256, 10), torch.rand(3, 2, 5, 16))
