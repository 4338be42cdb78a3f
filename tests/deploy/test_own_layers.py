"""Layers whose forward does something of its own: what it computes is what is lowered."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from qsnn_ext import calibrate, quantize_
from qsnn_ext.deploy import DeployedModel, compare, lower
from qsnn_ext.errors import LoweringError


class ScaledAfter(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2.0 + 0.25


class PadsBefore(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class Standardized(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-4)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class StepByStep(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, weight=self.weight, bias=self.bias, padding=1)


class Upwards(nn.ConvTranspose2d):
    def forward(self, x):
        return F.conv_transpose2d(x, self.weight, self.bias, self.stride) * 3.0


class HalfNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 0.8


class LouderPool(nn.MaxPool2d):
    def forward(self, x):
        return super().forward(x) * 3.0


class QuietLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 0.5, self.bias)


class Net(nn.Module):
    def __init__(self, mid=nn.Conv2d, norm=nn.BatchNorm2d, pool=nn.MaxPool2d, linear=nn.Linear):
        super().__init__()
        self.c1, self.b1, self.s1 = nn.Conv2d(2, 8, 3, padding=1), norm(8), neuron.LIFNode()
        self.c2, self.b2, self.s2 = mid(8, 8, 3), norm(8), neuron.LIFNode()
        self.pool, self.fc = pool(2), linear(8, 5)

    def forward(self, x):
        out = 0
        for _ in range(4):
            y = self.s1(self.b1(self.c1(x)))
            y = self.pool(self.s2(self.b2(self.c2(y))))
            out = out + self.fc(y.mean((2, 3)))
        return out / 4


def prepared(net, x):
    quantize_(net, "1w-2u", sample=x)
    g = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(1, 3, generator=g)
            module.bias.data.uniform_(0.5, 1, generator=g)
    net.train()
    with torch.no_grad():
        net(x)
    functional.reset_net(net)
    net.eval()
    calibrate(net, [torch.rand(x.shape, generator=g)])
    return net


KINDS = {
    "scaled after": {"mid": ScaledAfter},
    "pads before": {"mid": PadsBefore},
    "standardized": {"mid": Standardized},
    "standardized by the host": {"mid": layer.WSConv2d},
    "names its arguments": {"mid": StepByStep},
    "transposed": {"mid": Upwards},
    "norm": {"norm": HalfNorm},
    "pool": {"pool": LouderPool},
    "linear": {"linear": QuietLinear},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_of_its_own_is_lowered(kind):
    torch.manual_seed(0)
    x = torch.rand(4, 2, 8, 8)
    net = prepared(Net(**KINDS[kind]), x)
    program = lower(net, x)
    report = compare(net, program, [x], quantize_input=True)
    assert all(a.agreement == 1.0 for a in report.layers), str(report)
    assert report.output_error < 1e-5
    assert max(a.rate_model for a in report.layers) > 0.02
    engine, reference = DeployedModel(program), DeployedModel(program, "numpy")
    assert (engine.integers(x)[0] == reference.integers(x)[0]).all()


def test_arithmetic_behind_the_first_layer_is_no_preparation_of_the_input():
    """A factor on the current of the first layer must not end up before the layer."""

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fire = nn.Conv2d(2, 4, 3), neuron.LIFNode()
            self.pool, self.out = nn.MaxPool2d(2), nn.Conv2d(4, 3, 1)

        def forward(self, x):
            y = -self.pool(x)
            return self.out(self.fire(self.conv(y) * -4.0)).mean((2, 3))

    torch.manual_seed(0)
    x = torch.rand(4, 2, 12, 12)
    net = prepared(First(), x)
    report = compare(net, lower(net, x), [x], quantize_input=True)
    assert all(a.agreement == 1.0 for a in report.layers), str(report)
    assert report.output_error < 1e-5


def test_a_weight_that_is_no_scaled_one_is_refused_by_name():
    class Mixed(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight + self.weight.flip(3) * 0.3, self.bias)

    torch.manual_seed(0)
    x = torch.rand(4, 2, 8, 8)
    with pytest.raises(LoweringError, match=r"^c2: the weight it multiplies with.*per output"):
        lower(prepared(Net(mid=Mixed), x), x)
