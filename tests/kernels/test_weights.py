"""The fused binary-weight operation against the quantizer in plain autograd, and its cache."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from qsnn_ext import kernels
from qsnn_ext.errors import StateError
from qsnn_ext.kernels.weights import PreparedWeight, binary_weight, covers
from qsnn_ext.layers import BinaryConv2d, BinaryLinear, QuantLinear
from qsnn_ext.quantizers import BinaryWeight

OPTIONS = list(
    itertools.product(
        ("layer", "channel", None),
        ("mean", "power_of_two", None),
        ("clipped", "identity", "annealed"),
    )
)


def value_and_gradient(function, weight, g):
    w = weight.clone().requires_grad_()
    value = function(w)
    value.backward(g)
    return value.detach(), w.grad


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o)))
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (4, 7), (2, 1, 1, 3)], ids=str)
def test_equals_the_quantizer(options, shape):
    torch.manual_seed(0)
    quantizer = BinaryWeight(*options, temperature=0.7)
    weight, g = torch.randn(shape) + 0.1, torch.randn(shape)
    with kernels.use_backend("function"):
        value, grad = value_and_gradient(lambda w: binary_weight(w, quantizer), weight, g)
    expected, expected_grad = value_and_gradient(quantizer, weight, g)
    torch.testing.assert_close(value, expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)


def test_a_zero_weight_is_positive():
    quantizer = BinaryWeight(standardize=None, scale=None)
    with kernels.use_backend("function"):
        value = binary_weight(torch.tensor([[0.0, -2.0], [-0.0, 1.0]]), quantizer)
    assert value.tolist() == [[1.0, -1.0], [1.0, 1.0]]


@pytest.mark.parametrize("value", [0.0, -0.5, 3.0])
def test_constant_weights_are_finite(value):
    quantizer = BinaryWeight()
    weight = torch.full((3, 4), value)
    with kernels.use_backend("function"):
        fused, grad = value_and_gradient(
            lambda w: binary_weight(w, quantizer), weight, torch.ones(3, 4)
        )
    expected, expected_grad = value_and_gradient(quantizer, weight, torch.ones(3, 4))
    assert torch.equal(fused, expected)
    assert torch.equal(grad, expected_grad)


def test_covers_only_what_it_computes():
    weight = torch.randn(3, 4)

    class Other(BinaryWeight):
        pass

    assert covers(BinaryWeight(), weight)
    assert not covers(Other(), weight)
    assert not covers(BinaryWeight(), torch.randn(3))
    assert not covers(BinaryWeight("channel"), torch.randn(3, 1))
    watched = BinaryWeight()
    watched.register_forward_hook(lambda *a: None)
    assert not covers(watched, weight)


def test_opcheck():
    w = torch.randn(3, 4, requires_grad=True)
    args = (w, torch.tensor(0.5), "channel", "mean", "annealed")
    with kernels.use_backend("function"):
        torch.library.opcheck(torch.ops.qsnn_ext.binary_weight.default, args)
        _value, *statistics = torch.ops.qsnn_ext.binary_weight(*args)
        statistics = [s.detach() for s in statistics]
        args = (torch.randn(3, 4), w.detach(), *statistics, torch.tensor(0.5), "channel", "clipped")
        torch.library.opcheck(torch.ops.qsnn_ext.binary_weight_backward.default, args)


def test_time_steps_and_micro_batches_share_one_preparation():
    torch.manual_seed(0)
    layer = BinaryLinear(6, 5, bias=False)
    first = layer.quantized_weight
    assert layer.quantized_weight is first
    # Two micro-batches, each with its own backward, accumulate as plain autograd does.
    xs = torch.randn(2, 3, 6)
    for x in xs:
        layer(x).square().sum().backward()
    assert layer.quantized_weight is first
    accumulated, layer.weight.grad = layer.weight.grad.clone(), None
    with kernels.use_backend("eager"):
        layer(xs.flatten(0, 1)).square().sum().backward()
    torch.testing.assert_close(accumulated, layer.weight.grad, rtol=1e-5, atol=1e-6)


def test_an_optimizer_step_is_noticed():
    layer = BinaryLinear(6, 5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    first = layer.quantized_weight
    layer(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    assert layer.quantized_weight is not first


@pytest.mark.parametrize("layer_type", [BinaryLinear, QuantLinear])
def test_evaluation_caches_and_notices_changes(layer_type):
    layer = layer_type(6, 5).eval()
    with torch.no_grad():
        first = layer.quantized_weight
        assert layer.quantized_weight is first
        assert not first.requires_grad
        layer.weight.mul_(-1)
        assert torch.equal(layer.quantized_weight, layer.quantizer(layer.weight))
        layer.weight.data[0, 0] += 9.0  # passes the version counter by
        assert torch.equal(layer.quantized_weight, layer.quantizer(layer.weight))
        layer.load_state_dict({k: torch.randn_like(v) for k, v in layer.state_dict().items()})
        assert torch.equal(layer.quantized_weight, layer.quantizer(layer.weight))
        codes, scale = layer.quantizer.codes(layer.weight)
        assert torch.equal(codes * scale, layer.quantized_weight)


def test_evaluation_notices_other_options():
    layer = QuantLinear(6, 5).eval()
    with torch.no_grad():
        first = layer.quantized_weight
        layer.quantizer = type(layer.quantizer)(2)
        assert not torch.equal(layer.quantized_weight, first)


def test_changing_weights_before_backward_is_an_error():
    layer = BinaryLinear(6, 5)
    out = layer(torch.randn(2, 6)).sum()
    with torch.no_grad():
        layer.weight.add_(1.0)
    with pytest.raises((StateError, RuntimeError), match=r"chang|modified"):
        out.backward()


def test_prepared_weights_do_not_hinder_copies():
    layer = BinaryConv2d(2, 3, 3)
    layer(torch.randn(1, 2, 5, 5)).sum()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin.quantized_weight, layer.quantized_weight)
        assert twin.quantized_weight is not layer.quantized_weight


def test_checkpointing_recomputes_with_prepared_weights():
    layer = nn.Sequential(BinaryLinear(6, 5), BinaryLinear(5, 4))
    x = torch.randn(3, 6, requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    out.sum().backward()
    got = layer[0].weight.grad.clone()
    layer.zero_grad()
    layer(x).sum().backward()
    assert torch.equal(got, layer[0].weight.grad)


@pytest.mark.slow
def test_compiled_equals_function():
    torch.manual_seed(0)
    quantizer = BinaryWeight("channel", "power_of_two", "annealed", temperature=0.7)
    for shape in [(5, 3, 3, 3), (4, 7), (16, 8, 3, 3)]:
        weight, g = torch.randn(shape), torch.randn(shape)
        with kernels.use_backend("compiled"):
            value, grad = value_and_gradient(lambda w: binary_weight(w, quantizer), weight, g)
        expected, expected_grad = value_and_gradient(quantizer, weight, g)
        torch.testing.assert_close(value, expected, rtol=2e-6, atol=0)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)


def test_a_prepared_weight_belongs_to_one_parameter():
    prepared, quantizer = PreparedWeight(), BinaryWeight()
    a, b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 4))
    prepared.get(a, quantizer)
    assert torch.allclose(prepared.get(b, quantizer), quantizer(b))
