"""Every recognized surrogate has the gradient that its own library computes."""

import pytest
import torch

from qsnn_ext import functional as F
from qsnn_ext.hosts import adapter
from qsnn_ext.kernels.surrogates import DERIVATIVES, recognize


def check(function):
    x = torch.linspace(-3, 3, 241)
    x = x[(x.abs() - 1 / 3).abs() > 1e-4].requires_grad_()
    spikes = function(x)
    spikes.sum().backward()
    known = recognize(function)
    assert known is not None
    expected = (x > 0 if known.strict else x >= 0).float()
    assert torch.equal(spikes, expected)
    derivative = DERIVATIVES[known.kind](x.detach(), known.a, known.b)
    torch.testing.assert_close(derivative, x.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.7, 2.0, 4.0])
@pytest.mark.parametrize("name", [
    "PiecewiseQuadratic", "PiecewiseExp", "Sigmoid", "SoftSign", "SuperSpike", "ATan", "Erf",
    "Rect",
])  # fmt: skip
def test_spikingjelly(name, alpha):
    surrogate = pytest.importorskip("spikingjelly.activation_based.surrogate")
    adapter("spikingjelly")  # knows them
    check(getattr(surrogate, name)(alpha=alpha))
    assert recognize(getattr(surrogate, name)(alpha=alpha, spiking=False)) is None


def test_spikingjelly_slopes():
    surrogate = pytest.importorskip("spikingjelly.activation_based.surrogate")
    adapter("spikingjelly")  # knows them
    check(surrogate.LeakyKReLU(leak=0.2, k=1.5))
    assert recognize(surrogate.NonzeroSignLogAbs()) is None


@pytest.mark.parametrize("make", [
    lambda s: s.atan(), lambda s: s.atan(alpha=3.0), lambda s: s.fast_sigmoid(slope=10),
    lambda s: s.straight_through_estimator(), lambda s: s.heaviside(), lambda s: s.sigmoid(slope=5),
    lambda s: s.spike_rate_escape(beta=2, slope=3),
])  # fmt: skip
def test_snntorch(make):
    surrogate = pytest.importorskip("snntorch.surrogate")
    adapter("snntorch")
    check(make(surrogate))


def test_snntorch_unknown():
    surrogate = pytest.importorskip("snntorch.surrogate")
    adapter("snntorch")
    assert recognize(surrogate.triangular()) is None
    assert recognize(surrogate.custom_surrogate(lambda x, g, s: g)) is None
    assert recognize(lambda x: x) is None


def test_snntorch_sigmoid_far_below_the_threshold_is_zero():
    surrogate = pytest.importorskip("snntorch.surrogate")
    adapter("snntorch")
    known = recognize(surrogate.sigmoid())
    assert DERIVATIVES[known.kind](torch.tensor(-9.0), known.a, known.b) == 0


def test_triangles():
    check(F.triangle)
    spikingjelly = pytest.importorskip("qsnn_ext.spikingjelly")
    check(spikingjelly.Triangle(0.7))
    snntorch = pytest.importorskip("qsnn_ext.snntorch")
    check(snntorch.Triangle(0.7))
