"""Spiking transformers: attention on spikes, residuals before or after the neuron."""

from __future__ import annotations

import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

from benchmarks.structures import Built, structure


def lif(threshold: float = 1.0) -> neuron.LIFNode:
    """The neuron all of these use."""
    return neuron.LIFNode(tau=2.0, v_threshold=threshold, detach_reset=True, step_mode="m")


def per_step(module: nn.Module, x: Tensor) -> Tensor:
    """A layer of torch on ``[T, N, ...]``: time and batch are one axis for it."""
    y = module(x.flatten(0, 1))
    return y.reshape(x.shape[0], x.shape[1], *y.shape[1:])


# --------------------------------------------------------------------------- Spikformer


class PatchSplitting(nn.Module):
    """Convolutions that halve the image twice, then a relative position embedding."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.proj_conv = nn.Conv2d(channels, dim // 2, 3, padding=1, bias=False)
        self.proj_bn = nn.BatchNorm2d(dim // 2)
        self.proj_lif = lif()
        self.proj_conv1 = nn.Conv2d(dim // 2, dim, 3, padding=1, bias=False)
        self.proj_bn1 = nn.BatchNorm2d(dim)
        self.proj_lif1 = lif()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.rpe_conv = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.rpe_bn = nn.BatchNorm2d(dim)
        self.rpe_lif = lif()

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, C, H, W]`` to tokens ``[T, N, H/4 * W/4, D]``."""
        T, N = x.shape[:2]
        x = self.proj_bn(self.proj_conv(x.flatten(0, 1)))
        x = self.proj_lif(x.reshape(T, N, *x.shape[1:])).flatten(0, 1)
        x = self.maxpool(x)
        x = self.proj_bn1(self.proj_conv1(x))
        x = self.proj_lif1(x.reshape(T, N, *x.shape[1:])).flatten(0, 1)
        x = self.maxpool(x)
        rpe = self.rpe_bn(self.rpe_conv(x))
        rpe = self.rpe_lif(rpe.reshape(T, N, *rpe.shape[1:]))
        x = x.reshape(rpe.shape) + rpe
        return x.flatten(-2).transpose(-1, -2)


class SSA(nn.Module):
    """Softmax-free attention: ``q k^T v`` on spikes, scaled by a constant."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.scale = 0.125
        self.q_linear, self.q_bn, self.q_lif = nn.Linear(dim, dim), nn.BatchNorm1d(dim), lif()
        self.k_linear, self.k_bn, self.k_lif = nn.Linear(dim, dim), nn.BatchNorm1d(dim), lif()
        self.v_linear, self.v_bn, self.v_lif = nn.Linear(dim, dim), nn.BatchNorm1d(dim), lif()
        self.attn_lif = lif(threshold=0.5)
        self.proj_linear, self.proj_bn = nn.Linear(dim, dim), nn.BatchNorm1d(dim)
        self.proj_lif = lif()

    def _project(self, x: Tensor, linear: nn.Module, norm: nn.Module, fire: nn.Module) -> Tensor:
        y = norm(linear(x.flatten(0, 1)).transpose(-1, -2)).transpose(-1, -2)
        return fire(y.reshape(x.shape).contiguous())

    def _heads(self, x: Tensor) -> Tensor:
        T, N, L, D = x.shape
        return x.reshape(T, N, L, self.num_heads, D // self.num_heads).permute(0, 1, 3, 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, L, D]`` to the same."""
        q = self._heads(self._project(x, self.q_linear, self.q_bn, self.q_lif))
        k = self._heads(self._project(x, self.k_linear, self.k_bn, self.k_lif))
        v = self._heads(self._project(x, self.v_linear, self.v_bn, self.v_lif))
        attn = (q @ k.transpose(-2, -1)) * self.scale
        y = (attn @ v).transpose(2, 3).reshape(x.shape).contiguous()
        return self._project(self.attn_lif(y), self.proj_linear, self.proj_bn, self.proj_lif)


class TokenMLP(nn.Module):
    """Two linear layers over the channels of each token."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1_linear, self.fc1_bn, self.fc1_lif = (
            nn.Linear(dim, hidden), nn.BatchNorm1d(hidden), lif(),
        )  # fmt: skip
        self.fc2_linear, self.fc2_bn, self.fc2_lif = (
            nn.Linear(hidden, dim), nn.BatchNorm1d(dim), lif(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, L, D]`` to the same."""
        T, N, L, D = x.shape
        x = self.fc1_bn(self.fc1_linear(x.flatten(0, 1)).transpose(-1, -2)).transpose(-1, -2)
        x = self.fc1_lif(x.reshape(T, N, L, -1).contiguous())
        x = self.fc2_bn(self.fc2_linear(x.flatten(0, 1)).transpose(-1, -2)).transpose(-1, -2)
        return self.fc2_lif(x.reshape(T, N, L, D).contiguous())


class Spikformer(nn.Module):
    """Residuals add spikes; the head sees the mean over time of the mean over tokens."""

    def __init__(self, T: int, dim: int, heads: int, depth: int, classes: int) -> None:
        super().__init__()
        self.T = T
        self.patch_embed = PatchSplitting(3, dim)
        self.block = nn.ModuleList(
            nn.ModuleDict({"attn": SSA(dim, heads), "mlp": TokenMLP(dim, 4 * dim)})
            for _ in range(depth)
        )
        self.head = nn.Linear(dim, classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """``[T, N, C, H, W]`` to ``[T, N, D]``."""
        x = self.patch_embed(x)
        for blk in self.block:
            x = x + blk["attn"](x)
            x = x + blk["mlp"](x)
        return x.mean(2)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, classes]``."""
        x = x.unsqueeze(0).repeat(self.T, 1, 1, 1, 1)
        x = self.forward_features(x)
        return self.head(x.mean(0))


@structure("Spikformer", "Spikformer: softmax-free attention, residuals that add spikes")
def spikformer(small: bool = True) -> Built:
    dim, depth = (32, 1) if small else (384, 2)
    return Built(Spikformer(2, dim, dim // 16, depth, 10), torch.rand(2, 3, 16, 16))


# --------------------------------------------------------------------------- QKFormer


class TokenQK(nn.Module):
    """Which tokens matter is one spike per token and head, from the sum of its query."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.q_conv = nn.Conv1d(dim, dim, 1, bias=False)
        self.q_bn, self.q_lif = nn.BatchNorm1d(dim), lif()
        self.k_conv = nn.Conv1d(dim, dim, 1, bias=False)
        self.k_bn, self.k_lif = nn.BatchNorm1d(dim), lif()
        self.attn_lif = lif(threshold=0.5)
        self.proj_conv = nn.Conv1d(dim, dim, 1)
        self.proj_bn, self.proj_lif = nn.BatchNorm1d(dim), lif()

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, C, H, W]`` to the same."""
        T, N, C, H, W = x.shape
        x_for_qk = x.flatten(3).flatten(0, 1)
        q = self.q_bn(self.q_conv(x_for_qk)).reshape(T, N, C, H * W)
        q = self.q_lif(q).unsqueeze(2).reshape(T, N, self.num_heads, C // self.num_heads, H * W)
        k = self.k_bn(self.k_conv(x_for_qk)).reshape(T, N, C, H * W)
        k = self.k_lif(k).unsqueeze(2).reshape(T, N, self.num_heads, C // self.num_heads, H * W)
        mask = self.attn_lif(torch.sum(q, dim=3, keepdim=True))
        y = torch.mul(mask, k).flatten(2, 3).flatten(0, 1)
        y = self.proj_bn(self.proj_conv(y)).reshape(T, N, C, H, W)
        return self.proj_lif(y)


class ConvMLP(nn.Module):
    """The MLP as 1x1 convolutions."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.BatchNorm2d(hidden))
        self.fc1_lif = lif()
        self.fc2 = nn.Sequential(nn.Conv2d(hidden, dim, 1), nn.BatchNorm2d(dim))
        self.fc2_lif = lif()

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, C, H, W]`` to the same."""
        return self.fc2_lif(per_step(self.fc2, self.fc1_lif(per_step(self.fc1, x))))


class PatchStage(nn.Module):
    """Halve the image, double the channels; a 1x1 convolution is the shortcut."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.MaxPool2d(2))
        self.proj_lif = lif()
        self.proj2 = nn.Sequential(nn.Conv2d(o, o, 3, padding=1), nn.BatchNorm2d(o))
        self.proj2_lif = lif()
        self.proj_res = nn.Sequential(nn.Conv2d(i, o, 1, stride=2), nn.BatchNorm2d(o))
        self.res_lif = lif()

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, C, H, W]`` to ``[T, N, 2C, H/2, W/2]``."""
        main = self.proj2_lif(per_step(self.proj2, self.proj_lif(per_step(self.proj, x))))
        return main + self.res_lif(per_step(self.proj_res, x))


class QKFormer(nn.Module):
    """Token attention at high resolution, full attention at low."""

    def __init__(self, T: int, dim: int, classes: int) -> None:
        super().__init__()
        self.T = T
        self.patch_embed1 = PatchStage(3, dim // 2)
        self.attn1 = TokenQK(dim // 2, 4)
        self.mlp1 = ConvMLP(dim // 2, 2 * dim)
        self.patch_embed2 = PatchStage(dim // 2, dim)
        self.attn2 = SSA(dim, 4)
        self.mlp2 = ConvMLP(dim, 4 * dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, classes]``."""
        if x.dim() == 4:
            x = (x.unsqueeze(0)).repeat(self.T, 1, 1, 1, 1)
        x = self.patch_embed1(x)
        x = x + self.attn1(x)
        x = x + self.mlp1(x)
        x = self.patch_embed2(x)
        T, N, C, H, W = x.shape
        y = self.attn2(x.flatten(3).transpose(-1, -2))
        x = x + y.transpose(-1, -2).reshape(T, N, C, H, W)
        x = x + self.mlp2(x)
        x = x.flatten(3).mean(3)
        return self.head(x.mean(0))


@structure("QKFormer", "QKFormer: query-key attention over tokens, hierarchical stages")
def qkformer(small: bool = True) -> Built:
    dim = 32 if small else 384
    return Built(QKFormer(2, dim, 10), torch.rand(2, 3, 16, 16))


# --------------------------------------------------------------------------- Spike-driven V1


class SDSA(nn.Module):
    """Attention without products of matrices: a column mask from ``k * v``, applied to ``q``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.shortcut_lif = lif()
        self.q_conv, self.q_bn = nn.Conv2d(dim, dim, 1, bias=False), nn.BatchNorm2d(dim)
        self.k_conv, self.k_bn = nn.Conv2d(dim, dim, 1, bias=False), nn.BatchNorm2d(dim)
        self.v_conv, self.v_bn = nn.Conv2d(dim, dim, 1, bias=False), nn.BatchNorm2d(dim)
        self.q_lif, self.k_lif, self.v_lif = lif(), lif(), lif()
        self.talking_heads_lif = lif(threshold=0.5)
        self.proj_conv, self.proj_bn = nn.Conv2d(dim, dim, 1), nn.BatchNorm2d(dim)

    def forward(self, x: Tensor, hook: dict[str, Tensor] | None = None) -> Tensor:
        """Currents ``[T, N, C, H, W]`` to currents."""
        T, N, C, H, W = x.shape
        identity = x
        x = self.shortcut_lif(x)
        flat = x.flatten(0, 1)
        q = self.q_lif(self.q_bn(self.q_conv(flat)).reshape(T, N, C, H, W)).flatten(3)
        k = self.k_lif(self.k_bn(self.k_conv(flat)).reshape(T, N, C, H, W)).flatten(3)
        v = self.v_lif(self.v_bn(self.v_conv(flat)).reshape(T, N, C, H, W)).flatten(3)
        kv = k.mul(v)
        if hook is not None:
            hook["kv"] = kv.detach()
        kv = self.talking_heads_lif(kv.sum(dim=-1, keepdim=True))
        x = q.mul(kv).reshape(T, N, C, H, W)
        x = self.proj_bn(self.proj_conv(x.flatten(0, 1))).reshape(T, N, C, H, W)
        return x + identity


class PreMLP(nn.Module):
    """The neuron comes before each convolution, so that residuals add currents."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1_lif, self.fc2_lif = lif(), lif()
        self.fc1_conv, self.fc1_bn = nn.Conv2d(dim, hidden, 1), nn.BatchNorm2d(hidden)
        self.fc2_conv, self.fc2_bn = nn.Conv2d(hidden, dim, 1), nn.BatchNorm2d(dim)

    def forward(self, x: Tensor, hook: dict[str, Tensor] | None = None) -> Tensor:
        """Currents ``[T, N, C, H, W]`` to currents."""
        T, N, C, H, W = x.shape
        y = self.fc1_lif(x)
        if hook is not None:
            hook["fc1"] = y.detach()
        y = self.fc1_bn(self.fc1_conv(y.flatten(0, 1))).reshape(T, N, -1, H, W)
        y = self.fc2_lif(y)
        y = self.fc2_bn(self.fc2_conv(y.flatten(0, 1))).reshape(T, N, C, H, W)
        return x + y


class SpikeDrivenTransformer(nn.Module):
    """Residuals between currents; returns the answer and what the hooks saw."""

    def __init__(self, T: int, dim: int, depth: int, classes: int, tet: bool = False) -> None:
        super().__init__()
        self.T, self.TET = T, tet
        self.stem = nn.Sequential(
            nn.Conv2d(3, dim // 2, 3, padding=1, bias=False), nn.BatchNorm2d(dim // 2)
        )
        self.stem_lif = lif()
        self.down = nn.Sequential(
            nn.Conv2d(dim // 2, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim), nn.MaxPool2d(2)
        )
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            self.blocks.append(SDSA(dim))
            self.blocks.append(PreMLP(dim, 4 * dim))
        self.head_lif = lif()
        self.head = nn.Linear(dim, classes)

    def forward(
        self, x: Tensor, hook: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """``[N, C, H, W]`` to ``[N, classes]`` and the hook."""
        if len(x.shape) < 5:
            x = (x.unsqueeze(0)).repeat(self.T, 1, 1, 1, 1)
        else:
            x = x.transpose(0, 1).contiguous()
        x = self.stem_lif(per_step(self.stem, x))
        x = per_step(self.down, x)
        for block in self.blocks:
            x = block(x, hook=hook)
        x = x.flatten(3).mean(3)
        x = self.head(self.head_lif(x))
        if not self.TET:
            x = x.mean(0)
        return x, hook


@structure("Spike-driven Transformer V1", "Spike-driven Transformer: mask attention, membrane")
def spike_driven_v1(small: bool = True) -> Built:
    dim, depth = (32, 1) if small else (512, 2)
    return Built(SpikeDrivenTransformer(2, dim, depth, 10), torch.rand(2, 3, 16, 16))


# --------------------------------------------------------------------------- Spike-driven V2


class NormThenPad(nn.Module):
    """Batch norm, then a border that holds what the norm makes of zero."""

    def __init__(self, pad: int, channels: int) -> None:
        super().__init__()
        self.pad = pad
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, C, H + 2 pad, W + 2 pad]``."""
        y = self.bn(x)
        std = torch.sqrt(self.bn.running_var + self.bn.eps)
        border = self.bn.bias.detach() - self.bn.running_mean * self.bn.weight.detach() / std
        p = self.pad
        y = nn.functional.pad(y, [p] * 4)
        border = border.view(1, -1, 1, 1)
        y[:, :, :p, :] = border
        y[:, :, -p:, :] = border
        y[:, :, :, :p] = border
        y[:, :, :, -p:] = border
        return y


class RepConv(nn.Module):
    """1x1, depthwise 3x3, 1x1: one 3x3 convolution once it is merged."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(i, i, 1, bias=False),
            NormThenPad(1, i),
            nn.Sequential(
                nn.Conv2d(i, i, 3, groups=i, bias=False),
                nn.Conv2d(i, o, 1, bias=False),
                nn.BatchNorm2d(o),
            ),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]``."""
        return self.body(x)


class SepConv(nn.Module):
    """Inverted separable convolution: widen, depthwise 7x7, narrow."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        mid = 2 * dim
        self.lif1, self.lif2 = lif(), lif()
        self.pwconv1, self.bn1 = nn.Conv2d(dim, mid, 1, bias=False), nn.BatchNorm2d(mid)
        self.dwconv = nn.Conv2d(mid, mid, 7, padding=3, groups=mid, bias=False)
        self.pwconv2, self.bn2 = nn.Conv2d(mid, dim, 1, bias=False), nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Currents ``[T, N, C, H, W]`` to currents."""
        T, N, C, H, W = x.shape
        x = self.lif1(x)
        x = self.bn1(self.pwconv1(x.flatten(0, 1))).reshape(T, N, -1, H, W)
        x = self.lif2(x)
        x = self.bn2(self.pwconv2(self.dwconv(x.flatten(0, 1))))
        return x.reshape(T, N, C, H, W)


class MSConvBlock(nn.Module):
    """Separable convolution and a plain bottleneck, both as residuals between currents."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.Conv = SepConv(dim)
        self.lif1, self.lif2 = lif(), lif()
        self.conv1, self.bn1 = (
            nn.Conv2d(dim, 4 * dim, 3, padding=1, bias=False),
            nn.BatchNorm2d(4 * dim),
        )
        self.conv2, self.bn2 = (
            nn.Conv2d(4 * dim, dim, 3, padding=1, bias=False),
            nn.BatchNorm2d(dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Currents ``[T, N, C, H, W]`` to currents."""
        T, N, C, H, W = x.shape
        x = self.Conv(x) + x
        y = self.bn1(self.conv1(self.lif1(x).flatten(0, 1))).reshape(T, N, 4 * C, H, W)
        y = self.bn2(self.conv2(self.lif2(y).flatten(0, 1))).reshape(T, N, C, H, W)
        return x + y


class RepAttention(nn.Module):
    """``q (k^T v)`` with re-parametrizable convolutions as projections."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, 0.125
        self.head_lif = lif()
        self.q_conv = nn.Sequential(RepConv(dim, dim), nn.BatchNorm2d(dim))
        self.k_conv = nn.Sequential(RepConv(dim, dim), nn.BatchNorm2d(dim))
        self.v_conv = nn.Sequential(RepConv(dim, dim), nn.BatchNorm2d(dim))
        self.q_lif, self.k_lif, self.v_lif = lif(), lif(), lif()
        self.attn_lif = lif(threshold=0.5)
        self.proj_conv = nn.Sequential(RepConv(dim, dim), nn.BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Currents ``[T, N, C, H, W]`` to currents."""
        T, N, C, H, W = x.shape
        x = self.head_lif(x)

        def heads(y: Tensor) -> Tensor:
            y = y.flatten(3).transpose(-1, -2)
            return y.reshape(T, N, H * W, self.num_heads, C // self.num_heads).transpose(2, 3)

        q = heads(self.q_lif(per_step(self.q_conv, x)))
        k = heads(self.k_lif(per_step(self.k_conv, x)))
        v = heads(self.v_lif(per_step(self.v_conv, x)))
        y = (q @ (k.transpose(-2, -1) @ v)) * self.scale
        y = y.transpose(3, 4).reshape(T, N, C, H * W).contiguous()
        y = self.attn_lif(y).reshape(T, N, C, H, W)
        return per_step(self.proj_conv, y)


class MetaSpikeFormer(nn.Module):
    """Convolution blocks at high resolution, attention blocks at low."""

    def __init__(self, T: int, dim: int, heads: int, classes: int) -> None:
        super().__init__()
        self.T = T
        self.downsample1 = nn.Sequential(
            nn.Conv2d(3, dim // 2, 7, stride=2, padding=3), nn.BatchNorm2d(dim // 2)
        )
        self.conv_block = MSConvBlock(dim // 2)
        self.down_lif = lif()
        self.downsample2 = nn.Sequential(
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1), nn.BatchNorm2d(dim)
        )
        self.attn = RepAttention(dim, heads)
        self.mlp = PreMLP(dim, 4 * dim)
        self.lif = lif()
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, classes]``."""
        x = (x.unsqueeze(0)).repeat(self.T, 1, 1, 1, 1)
        x = per_step(self.downsample1, x)
        x = self.conv_block(x)
        x = per_step(self.downsample2, self.down_lif(x))
        x = x + self.attn(x)
        x = self.mlp(x)
        x = x.flatten(3).mean(3)
        x_lif = self.lif(x)
        return self.head(x_lif).mean(0)


@structure("Spike-driven Transformer V2", "Meta-SpikeFormer: separable and re-parametrized parts")
def spike_driven_v2(small: bool = True) -> Built:
    dim = 32 if small else 256
    return Built(MetaSpikeFormer(2, dim, 4, 10), torch.rand(2, 3, 16, 16))


# --------------------------------------------------------------------------- SpikingResformer


class LIF(neuron.LIFNode):
    """Nothing but arguments."""

    def __init__(self) -> None:
        super().__init__(
            tau=2.0,
            detach_reset=True,
            surrogate_function=surrogate.ATan(),
            step_mode="m",
        )


class BN(layer.BatchNorm2d):
    """Batch norm of all steps together."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, step_mode="m")


class Conv3x3(layer.Conv2d):
    """Nothing but arguments."""

    def __init__(self, i: int, o: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            i, o, 3, stride=stride, padding=1, groups=groups, bias=False, step_mode="m"
        )


class Conv1x1(layer.Conv2d):
    """Nothing but arguments."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o, kernel_size=1, bias=False, step_mode="m")


class Linear(layer.Linear):
    """Nothing but arguments."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o, bias=True, step_mode="m")


class DSSA(nn.Module):
    """Attention between an image and its patches, scaled by running firing rates."""

    def __init__(self, dim: int, heads: int, tokens: int, patch: int) -> None:
        super().__init__()
        self.dim, self.num_heads = dim, heads
        self.lenth = tokens // patch**2
        self.register_buffer("firing_rate_x", torch.zeros(1, 1, heads, 1, 1))
        self.register_buffer("firing_rate_attn", torch.zeros(1, 1, heads, 1, 1))
        self.init_firing_rate_x = False
        self.init_firing_rate_attn = False
        self.momentum = 0.999
        self.activation_in = LIF()
        self.W = layer.Conv2d(dim, dim * 2, patch, patch, bias=False, step_mode="m")
        self.norm = BN(dim * 2)
        self.matmul1, self.matmul2 = MatMul(), MatMul()
        self.activation_attn = LIF()
        self.activation_out = LIF()
        self.Wproj = Conv1x1(dim, dim)
        self.norm_proj = BN(dim)

    @torch.no_grad()
    def _track(self, name: str, x: Tensor) -> None:
        rate = x.detach().mean((0, 1, 3, 4), keepdim=True)
        started = getattr(self, f"init_{name}")
        old = getattr(self, name)
        setattr(self, name, old * self.momentum + rate * (1 - self.momentum) if started else rate)
        setattr(self, f"init_{name}", True)

    def forward(self, x: Tensor) -> Tensor:
        """Currents ``[T, N, C, H, W]`` to currents."""
        T, N, C, H, W = x.shape
        identity = x
        x = self.activation_in(x)
        y = self.norm(self.W(x))
        y = y.reshape(T, N, self.num_heads, 2 * C // self.num_heads, -1)
        y1, y2 = y.split(C // self.num_heads, dim=3)
        x = x.reshape(T, N, self.num_heads, C // self.num_heads, H * W)
        if self.training:
            self._track("firing_rate_x", x)
        scale1 = 1.0 / torch.sqrt(self.firing_rate_x * (self.dim // self.num_heads) + 1e-6)
        attn = self.matmul1(y1.transpose(-1, -2), x) * scale1
        attn = self.activation_attn(attn)
        if self.training:
            self._track("firing_rate_attn", attn)
        scale2 = 1.0 / torch.sqrt(self.firing_rate_attn * self.lenth + 1e-6)
        out = self.matmul2(y2, attn) * scale2
        out = self.activation_out(out.reshape(T, N, C, H, W))
        return self.norm_proj(self.Wproj(out)) + identity


class MatMul(nn.Module):
    """A product as a module, so that a counter of operations can hook it."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """``a @ b``."""
        return a @ b


class GWFFN(nn.Module):
    """Pointwise, grouped 3x3, pointwise."""

    def __init__(self, dim: int, group: int) -> None:
        super().__init__()
        self.up = nn.Sequential(LIF(), Conv1x1(dim, 2 * dim), BN(2 * dim))
        self.conv = nn.Sequential(
            LIF(), Conv3x3(2 * dim, 2 * dim, groups=2 * dim // group), BN(2 * dim)
        )
        self.down = nn.Sequential(LIF(), Conv1x1(2 * dim, dim), BN(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Currents ``[T, N, C, H, W]`` to currents."""
        feat = self.up(x)
        feat = self.conv(feat) + feat
        return self.down(feat) + x


class SpikingResformer(nn.Module):
    """Every layer is the project's own subclass that fixes arguments."""

    def __init__(self, T: int, dim: int, heads: int, classes: int) -> None:
        super().__init__()
        self.T = T
        self.prologue = nn.Sequential(
            layer.Conv2d(3, dim, 7, 2, 3, bias=False, step_mode="m"),
            BN(dim),
            layer.MaxPool2d(3, 2, 1, step_mode="m"),
        )
        self.layers = nn.Sequential(
            DSSA(dim, heads, 16, 2),
            GWFFN(dim, min(dim, 64)),
            nn.Sequential(LIF(), Conv3x3(dim, 2 * dim, stride=2), BN(2 * dim)),
            GWFFN(2 * dim, min(dim, 64)),
        )
        self.avgpool = layer.AdaptiveAvgPool2d((1, 1), step_mode="m")
        self.classifier = Linear(2 * dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[T, N, classes]``."""
        if x.dim() != 5:
            x = x.unsqueeze(0)
            x = x.repeat(self.T, 1, 1, 1, 1)
        x = self.layers(self.prologue(x))
        x = self.avgpool(x)
        x = torch.flatten(x, 2)
        return self.classifier(x)


@structure("SpikingResformer", "SpikingResformer: subclasses that only fix arguments")
def spiking_resformer(small: bool = True) -> Built:
    dim = 16 if small else 192
    model = SpikingResformer(2, dim, 2, 10)
    functional.set_step_mode(model, "m")
    return Built(model, torch.rand(2, 3, 16, 16))
