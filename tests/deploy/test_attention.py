"""Spiking transformers: products of spike matrices, heads, sums over tokens and channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import functional, layer
from spikingjelly.activation_based.model import maxformer, qkformer, spikformer
from spikingjelly.activation_based.model import spike_driven_transformer as sdt
from torch import nn

from qsnn_ext import calibrate, quantize_
from qsnn_ext import layers as own
from qsnn_ext.deploy import DeployedModel, ReferenceSession, compare, lower
from qsnn_ext.deploy.program import Matmul
from qsnn_ext.errors import LoweringError
from qsnn_ext.spikingjelly import QuantLIFNode
from tests.deploy.networks import make_dyadic
from tests.deploy.test_forwards import Net, answers_alike, body, grid

MODELS = {
    "spikformer": (
        lambda: spikformer.Spikformer(
            T=2, in_channels=3, img_size_h=16, img_size_w=16, patch_size=4, num_classes=5,
            embed_dims=32, num_heads=4, mlp_ratio=2.0, depths=2,
        ),
        16,
    ),
    "spike-driven transformer": (
        lambda: sdt.SpikeDrivenTransformer(
            T=2, in_channels=3, num_classes=5, embed_dims=32, num_heads=4, depths=2
        ),
        32,
    ),
    "qkformer": (
        lambda: qkformer.QKFormer(
            T=2, in_channels=3, num_classes=5, embed_dims=32, num_heads=(2, 2, 2), depths=(1, 1, 1)
        ),
        32,
    ),
    "maxformer": (
        lambda: maxformer.MaxFormer(
            T=2, in_channels=3, num_classes=5, embed_dims=48, depths=(1, 1, 1), cifar=True
        ),
        16,
    ),
}  # fmt: skip


def lively(net: nn.Module, x: torch.Tensor) -> nn.Module:
    """A quantized, calibrated network whose every layer fires."""
    functional.set_step_mode(net, "m")
    report = quantize_(net, "1w-2u", sample=x)
    assert not report.of("unsupported")
    g = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.weight.data.uniform_(1.0, 3.0, generator=g)
            module.bias.data.uniform_(-0.5, 1.0, generator=g)
    net.train()
    for _ in range(4):
        with torch.no_grad():
            net(torch.rand(x.shape, generator=g))
        functional.reset_net(net)
    net.eval()
    calibrate(net, [x])
    return net


@pytest.mark.parametrize("name", MODELS)
def test_published_models_are_lowered_whole(name):
    torch.manual_seed(0)
    build, side = MODELS[name]
    x = torch.rand(3, 3, side, side)
    net = lively(build(), x)
    program = lower(net, x)
    report = compare(net, program, [x])
    assert len(report.layers) == len(program.neurons)
    assert min(a.agreement for a in report.layers) >= 0.99, str(report)
    assert np.mean([a.rate_model for a in report.layers]) > 0.1
    assert report.predictions == 1.0
    engine, reference = DeployedModel(program), ReferenceSession(program, 3)
    codes = engine.codes(x)
    steps = [reference.step(codes)[0] for _ in range(program.timesteps)]
    np.testing.assert_array_equal(engine.integers(x)[0], np.stack(steps))


def heads(x: torch.Tensor, count: int = 2) -> torch.Tensor:
    """``[T, N, C, H, W]`` as ``[T, N, heads, tokens, C / heads]``."""
    t, n, c, h, w = x.shape
    return x.flatten(3).transpose(-1, -2).reshape(t, n, h * w, count, c // count).transpose(2, 3)


def back(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return x.transpose(3, 4).reshape(like.shape)


def attention(order):
    def forward(net, x):
        s = net.stem(x)
        q, k, v = (heads(part(s)) for part in (net.q, net.k, net.v))
        return net.head(net.spike(back(order(q, k, v) * 0.125, s))).mean(0)

    return forward


PRODUCTS = {
    "scores first": attention(lambda q, k, v: (q @ k.transpose(-2, -1)) @ v),
    "keys and values first": attention(lambda q, k, v: q @ (k.transpose(-2, -1) @ v)),
    "turned": attention(
        lambda q, k, v: ((v.transpose(-2, -1) @ k) @ q.transpose(-2, -1)).transpose(-2, -1)
    ),
    "matmul": attention(lambda q, k, v: torch.matmul(torch.matmul(q, k.mT), v)),
    "einsum": attention(
        lambda q, k, v: torch.einsum(
            "tbhij,tbhjd->tbhid", torch.einsum("tbhid,tbhjd->tbhij", q, k), v
        )
    ),
    "shared keys": attention(lambda q, k, v: (q @ q.transpose(-2, -1)) @ v),
    "masked": attention(lambda q, k, v: (q * k) @ (k.transpose(-2, -1) @ v)),
}


@pytest.mark.parametrize("how", PRODUCTS)
def test_products_of_spike_matrices(how):
    torch.manual_seed(0)
    parts = {
        name: nn.Sequential(own_binary(), QuantLIFNode(step_mode="m")) for name in ("q", "k", "v")
    }
    net = Net(PRODUCTS[how], spike=QuantLIFNode(step_mode="m"), **parts)
    program = answers_alike(net, grid(3, 2, 2, 6, 6))
    assert sum(isinstance(op, Matmul) for op in program.ops) == 2


def own_binary():
    kept = nn.Sequential(layer.Conv2d(8, 8, 1, step_mode="m"))
    quantize_(kept, {"weight": 1, "first": 1, "last": 1})
    return kept[0]


def test_gates_over_tokens_and_channels():
    """QKFormer's attentions: a sum, a neuron, and its spikes for all tokens or channels."""

    def forward(net, x):
        s = net.stem(x)
        q, k = net.q(s).flatten(3), net.k(s).flatten(3)
        token = net.token(q.unflatten(2, (2, 4)).sum(3, keepdim=True)) * k.unflatten(2, (2, 4))
        channel = net.channel(q.sum(3, keepdim=True)) * k
        return net.head((token.flatten(2, 3) + channel).view(s.shape)).mean(0)

    torch.manual_seed(0)
    parts = {name: nn.Sequential(own_binary(), QuantLIFNode(step_mode="m")) for name in ("q", "k")}
    gates = {name: QuantLIFNode(v_threshold=2.0, step_mode="m") for name in ("token", "channel")}
    answers_alike(Net(forward, **parts, **gates), grid(3, 2, 2, 6, 6))


def test_tokens_as_rows_of_a_linear_layer():
    def forward(net, x):
        tokens = body(net, x).flatten(3).transpose(2, 3)  # [T, N, tokens, C]
        tokens = net.spike(net.fc(tokens)) + tokens
        return net.out(tokens.mean(2)).mean(0)

    torch.manual_seed(0)
    net = Net(
        forward, spike=QuantLIFNode(step_mode="m"), fc=own.BinaryLinear(8, 8),
        out=own.QuantLinear(8, 5),
    )  # fmt: skip
    answers_alike(net, grid(3, 2, 2, 6, 6))


def test_what_cannot_be_a_product():
    constant = Net(lambda net, x: body(net, x).flatten(3) @ torch.ones(36, 36))
    with pytest.raises(LoweringError, match=r"constant matrix.*weight of a layer.*test_attention"):
        lower(make_dyadic(constant), grid(3, 2, 2, 6, 6))
