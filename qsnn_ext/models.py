"""The paper's three networks, written once and usable with either host.

Images ``[N, C, H, W]`` are shown ``T`` times; frames ``[T, N, C, H, W]`` are taken as they come.
Logits are ``[T, N, classes]``. Every call starts from reset membrane potentials. First and last
weighted layer have 8-bit weights, hidden layers the bits asked for (32 leaves all in float).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from qsnn_ext import hosts
from qsnn_ext.errors import ConfigError, InputError
from qsnn_ext.functional import check_floating
from qsnn_ext.layers import build_layer
from qsnn_ext.quantizers import parse_bits, preset


class _Parts:
    """Builds the parts of one network: knows bits, preset and host, so that the plans need not."""

    def __init__(
        self, bits: str, preset_name: str, host: str, neuron: dict[str, Any] | None, width: float
    ) -> None:
        self.weight_bits, self.membrane_bits = parse_bits(bits)
        preset(preset_name)  # an unknown name is an error before anything is built
        if not width > 0:
            raise ConfigError(f"width={width!r} must be positive.")
        self.preset = preset_name
        self.adapter = hosts.adapter(host)
        self.options = neuron or {}
        self.width = width

    def channels(self, n: int) -> int:
        """``n`` times the width multiplier, at least 1."""
        return max(1, round(n * self.width))

    def conv_bn(
        self, inp: int, out: int, kernel: int = 3, stride: int = 1, first: bool = False
    ) -> ConvBN:
        bits = self._end_bits if first else self.weight_bits
        conv = build_layer(
            "conv2d",
            inp,
            out,
            kernel,
            stride=stride,
            padding=kernel // 2,
            bias=False,
            bits=bits,
            preset=self.preset,
        )
        return ConvBN(conv, nn.BatchNorm2d(out))

    def lif(self) -> nn.Module:
        return self.adapter.paper_neuron(self.membrane_bits, self.preset, **self.options)

    def network(
        self,
        features: nn.Module,
        channels: int,
        num_classes: int,
        T: int,
        in_channels: int,
        reduces: int,
    ) -> SpikingNet:
        head = build_layer("linear", channels, num_classes, bits=self._end_bits)
        return SpikingNet(features, head, T, in_channels, reduces, self.adapter.restart)

    @property
    def _end_bits(self) -> int | None:
        return None if self.weight_bits is None else 8


class ConvBN(nn.Module):
    """Convolution and batch norm over time and batch together: ``[T, N, C, H, W]`` in and out."""

    def __init__(self, conv: nn.Module, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv = conv
        self.bn = bn

    def forward(self, x: Tensor) -> Tensor:
        """Normalised currents ``[T, N, C', H', W']``."""
        current: Tensor = self.bn(self.conv(x.flatten(0, 1)))
        return current.view(*x.shape[:2], *current.shape[1:])


class Pool(nn.Module):
    """2x2 pooling of every step; ``"max"`` keeps spikes binary, ``"avg"`` is the paper's AP2."""

    def __init__(self, kind: Literal["avg", "max"]) -> None:
        super().__init__()
        if kind not in ("avg", "max"):
            raise ConfigError(f"pool={kind!r} is unknown; choose 'avg' or 'max'.")
        self.pool = nn.AvgPool2d(2) if kind == "avg" else nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, C, H, W]`` to ``[T, N, C, H//2, W//2]``."""
        pooled: Tensor = self.pool(x.flatten(0, 1))
        return pooled.view(*x.shape[:2], *pooled.shape[1:])


class BasicBlock(nn.Module):
    """Residual block of the spiking ResNet: the sum of currents is fed to the last neuron."""

    def __init__(self, parts: _Parts, inp: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = parts.conv_bn(inp, out, stride=stride)
        self.lif1 = parts.lif()
        self.conv2 = parts.conv_bn(out, out)
        same = inp == out and stride == 1
        self.shortcut = nn.Identity() if same else parts.conv_bn(inp, out, kernel=1, stride=stride)
        self.lif2 = parts.lif()

    def forward(self, x: Tensor) -> Tensor:
        """Spikes ``[T, N, C, H, W]`` to spikes ``[T, N, C', H', W']``."""
        current = self.conv2(self.lif1(self.conv1(x)))
        spikes: Tensor = self.lif2(current + self.shortcut(x))
        return spikes


class SpikingNet(nn.Module):
    """Features, global average pool, linear read-out of every time step.

    Args:
        features: multi-step module from ``[T, N, C, H, W]`` to spikes ``[T, N, K, H', W']``.
        head: linear layer from ``K`` to the classes.
        T: how often a still image is shown.
        in_channels: channels of the input.
        reduces: the factor by which the features shrink height and width.
        restart: puts the membrane potentials of a module back to their reset value.
    """

    def __init__(
        self,
        features: nn.Module,
        head: nn.Module,
        T: int,
        in_channels: int,
        reduces: int,
        restart: Callable[[nn.Module], None],
    ) -> None:
        if not (isinstance(T, int) and T >= 1):
            raise ConfigError(f"T={T!r} must be a whole number of time steps, at least 1.")
        super().__init__()
        self.features = features
        self.head = head
        self.T = T
        self.in_channels = in_channels
        self.reduces = reduces
        self._restart = restart
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2 / fan_out))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of every time step.

        Args:
            x: images ``[N, C, H, W]`` or frames ``[T, N, C, H, W]``, floating point.

        Returns:
            ``[T, N, classes]``.

        Raises:
            InputTypeError: not floating point.
            InputError: wrong rank, channels, or an image smaller than the network halves it.
        """
        check_floating(x, "SpikingNet")
        if x.dim() not in (4, 5) or x.shape[-3] != self.in_channels:
            raise InputError(
                f"expected images [N, {self.in_channels}, H, W] or frames "
                f"[T, N, {self.in_channels}, H, W], got {tuple(x.shape)}."
            )
        if x.dim() == 5 and x.shape[0] == 0:
            raise InputError("the sequence has no time steps; give frames [T, N, C, H, W], T > 0.")
        if min(x.shape[-2:]) < self.reduces:
            raise InputError(
                f"images of {x.shape[-2]}x{x.shape[-1]} are too small: the network halves them to "
                f"nothing; scale them up to at least {self.reduces}x{self.reduces}."
            )
        if x.dim() == 4:
            x = x.expand(self.T, *x.shape)
        self._restart(self.features)
        logits: Tensor = self.head(self.features(x).mean((-2, -1)))
        return logits


def resnet19(
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    T: int = 2,
    bits: str = "32w-32u",
    preset: str = "paper",
    host: str = "spikingjelly",
    neuron: dict[str, Any] | None = None,
) -> SpikingNet:
    """ResNet19: stem, blocks [3, 3, 2] of width 128/256/512, linear read-out.

    12,569,226 parameters with 10 classes, 3 channels and width 1.

    Args:
        num_classes: number of logits.
        in_channels: channels of the input.
        width: factor of all channel counts.
        T: how often a still image is shown.
        bits: ``"32w-32u"``, ``"1w-8u"``, ``"1w-4u"``, ``"1w-2u"``, ...
        preset: ``"paper"`` or ``"official"``.
        host: ``"spikingjelly"`` or ``"snntorch"``.
        neuron: further arguments of the host's quantized neuron.

    Raises:
        ConfigError: unknown bits, preset or host.
        MissingDependencyError: the host is not installed.
    """
    parts = _Parts(bits, preset, host, neuron, width)
    channels = parts.channels(128)
    layers: list[nn.Module] = [parts.conv_bn(in_channels, channels, first=True), parts.lif()]
    for out, blocks, stride in ((128, 3, 1), (256, 3, 2), (512, 2, 2)):
        for block in range(blocks):
            layers.append(
                BasicBlock(parts, channels, parts.channels(out), stride if block == 0 else 1)
            )
            channels = parts.channels(out)
    return parts.network(nn.Sequential(*layers), channels, num_classes, T, in_channels, reduces=4)


def _plain(parts: _Parts, plan: Sequence[int | str], in_channels: int) -> tuple[nn.Sequential, int]:
    """Convolutions (numbers: width) and poolings (``"avg"``, ``"max"``) in a row."""
    layers: list[nn.Module] = []
    channels = in_channels
    for item in plan:
        if isinstance(item, str):
            layers.append(Pool(item))  # type: ignore[arg-type]
        else:
            out = parts.channels(item)
            layers += [parts.conv_bn(channels, out, first=not layers), parts.lif()]
            channels = out
    return nn.Sequential(*layers), channels


def vgg16(
    num_classes: int = 10,
    in_channels: int = 3,
    width: float = 1.0,
    T: int = 4,
    bits: str = "32w-32u",
    preset: str = "paper",
    host: str = "spikingjelly",
    neuron: dict[str, Any] | None = None,
    pool: Literal["avg", "max"] = "max",
) -> SpikingNet:
    """VGG16: thirteen convolutions with batch norm, five poolings, average, one linear layer.

    Arguments and errors as for :func:`resnet19`, and

    Args:
        pool: ``"max"`` keeps the spikes binary; the paper does not say which it uses.
    """
    parts = _Parts(bits, preset, host, neuron, width)
    plan: list[int | str] = []
    for out, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        plan += [out] * convolutions + [pool]
    features, channels = _plain(parts, plan, in_channels)
    return parts.network(features, channels, num_classes, T, in_channels, reduces=32)


def vggsnn(
    num_classes: int = 10,
    in_channels: int = 2,
    width: float = 1.0,
    T: int = 10,
    bits: str = "32w-32u",
    preset: str = "paper",
    host: str = "spikingjelly",
    neuron: dict[str, Any] | None = None,
    pool: Literal["avg", "max"] = "avg",
) -> SpikingNet:
    """VGGSNN: 64C3-128C3-AP2-256C3-256C3-AP2-512C3-512C3-AP2-512C3-512C3-AP2-FC.

    Arguments and errors as for :func:`resnet19`, and

    Args:
        pool: ``"avg"`` as in the paper.
    """
    parts = _Parts(bits, preset, host, neuron, width)
    plan: list[int | str] = [
        64, 128, pool, 256, 256, pool, 512, 512, pool, 512, 512, pool,
    ]  # fmt: skip
    features, channels = _plain(parts, plan, in_channels)
    return parts.network(features, channels, num_classes, T, in_channels, reduces=16)
