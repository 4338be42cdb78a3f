"""Binary and 8-bit layers: the stock layer given the oracle's weight, latent weights untouched."""

import copy
import pickle

import numpy as np
import pytest
import reference as ref
import torch
from numpy.testing import assert_allclose
from torch import nn
from torch.nn import functional as tf

from qsnn_ext import layers
from qsnn_ext.errors import QSNNError
from qsnn_ext.quantizers import BinaryWeight, IntWeight

CASES = {
    "linear": ("Linear", (6, 4), {}, (3, 6)),
    "conv1d": ("Conv1d", (4, 6, 3), {"padding": 1, "groups": 2}, (3, 4, 9)),
    "conv2d": ("Conv2d", (3, 5, 3), {"stride": 2, "padding": 1}, (2, 3, 7, 7)),
    "circular": ("Conv2d", (3, 5, 3), {"padding": 1, "padding_mode": "circular"}, (2, 3, 6, 6)),
    "same": ("Conv2d", (3, 5, 3), {"padding": "same", "dilation": 2}, (2, 3, 6, 6)),
    "conv3d": ("Conv3d", (2, 3, 2), {"bias": False}, (2, 2, 4, 4, 4)),
}
PRESET_WEIGHT = {
    "paper": ("layer", "mean", "clipped"),
    "official": ("channel", "power_of_two", "annealed"),
}


def _pair(family, case, **keywords):
    """A quantized layer and the stock layer that holds the same parameters, in float64."""
    kind, args, options, shape = CASES[case]
    quantized = getattr(layers, family + kind)(*args, **options, **keywords).double()
    stock = getattr(nn, kind)(*args, **options).double()
    stock.load_state_dict(quantized.state_dict(), strict=True)
    return quantized, stock, shape


def _check_layer(quantized, stock, shape, value):
    """Output = stock layer with the quantized weight; input and bias gradients likewise."""
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    reference = copy.deepcopy(stock)
    with torch.no_grad():
        reference.weight.copy_(torch.tensor(value))
    y, expected = quantized(x), reference(x)
    assert_allclose(y.detach().numpy(), expected.detach().numpy(), rtol=1e-7, atol=1e-9)
    g = torch.randn_like(y)
    quantized.zero_grad()
    (gx, gw) = torch.autograd.grad(y, (x, quantized.weight), g, retain_graph=True)
    (ex, ew) = torch.autograd.grad(expected, (x, reference.weight), g, retain_graph=True)
    assert_allclose(gx.numpy(), ex.numpy(), rtol=1e-7, atol=1e-9)
    if quantized.bias is not None:
        (gb,) = torch.autograd.grad(y, quantized.bias, g)
        (eb,) = torch.autograd.grad(expected, reference.bias, g)
        assert_allclose(gb.numpy(), eb.numpy(), rtol=1e-9)
    return gw.numpy(), ew.numpy()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("preset", PRESET_WEIGHT)
def test_binary_layer(case, preset):
    over, scale, kind = PRESET_WEIGHT[preset]
    quantized, stock, shape = _pair("Binary", case, preset=preset)
    w = stock.weight.detach().numpy()
    value, _, _ = ref.binary_weight(w, over, scale)
    assert_allclose(quantized.quantized_weight.detach().numpy(), value, rtol=1e-8)
    gw, upstream = _check_layer(quantized, stock, shape, value)
    temperature = float(quantized.quantizer.temperature)
    expected = ref.binary_weight_gradient(w, upstream, over, scale, kind, temperature)
    assert_allclose(gw, expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(quantized.weight, stock.weight)  # the latent weight stays float


@pytest.mark.parametrize("case", CASES)
def test_int_layer(case):
    quantized, stock, shape = _pair("Quant", case)
    value, _, _ = ref.int_weight(stock.weight.detach().numpy())
    assert_allclose(quantized.quantized_weight.detach().numpy(), value, rtol=1e-12)
    gw, upstream = _check_layer(quantized, stock, shape, value)
    assert_allclose(gw, upstream, rtol=1e-9, atol=1e-12)
    assert not np.array_equal(value, stock.weight.detach().numpy())


@pytest.mark.parametrize("family", ["Binary", "Quant"])
@pytest.mark.parametrize("case", CASES)
def test_layer_is_its_stock_layer(family, case):
    quantized, stock, _ = _pair(family, case)
    assert isinstance(quantized, type(stock))
    assert list(quantized.state_dict()) == list(stock.state_dict())
    quantized.load_state_dict(stock.state_dict(), strict=True)
    stock.load_state_dict(quantized.state_dict(), strict=True)
    for copied in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert torch.equal(copied.quantized_weight, quantized.quantized_weight)


def _check_multi_step(layer, x, multi):
    """Time and batch in one call equal one call for each time step."""
    single = torch.stack([layer(step) for step in x])
    multi(layer)
    together = layer(x)
    assert together.shape == single.shape
    assert_allclose(together.detach().numpy(), single.detach().numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["Binary", "Quant"])
@pytest.mark.parametrize("case", CASES)
def test_multi_step_equals_single_step(family, case):
    """The stock torch layers tell the two by the rank of the input."""
    quantized, _, shape = _pair(family, case)
    _check_multi_step(quantized, torch.randn((4, *shape), dtype=torch.float64), lambda layer: None)


@pytest.mark.parametrize("family", ["Binary", "Quant"])
@pytest.mark.parametrize("case", CASES)
def test_spikingjelly_layers_follow_their_step_mode(family, case):
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import layer as theirs

    import qsnn_ext.spikingjelly as host

    kind, args, options, shape = CASES[case]
    stock = getattr(theirs, kind)(*args, **options).double()
    quantized = getattr(host, family + kind)(*args, **options).double()
    assert isinstance(quantized, getattr(theirs, kind))
    quantized.load_state_dict(stock.state_dict(), strict=True)
    assert quantized.step_mode == "s"
    plain = getattr(layers, family + kind)(*args, **options).double()
    plain.load_state_dict(stock.state_dict(), strict=True)
    x = torch.randn((4, *shape), dtype=torch.float64)
    assert torch.equal(plain(x[0]), quantized(x[0]))
    _check_multi_step(quantized, x, lambda layer: setattr(layer, "step_mode", "m"))
    with pytest.raises(ValueError, match="step_mode"):
        quantized.step_mode = "x"


@pytest.mark.parametrize("family", ["Binary", "Quant"])
@pytest.mark.parametrize("case", ["conv1d", "conv2d", "conv3d"])
def test_wrong_rank_is_refused(family, case):
    quantized, _, shape = _pair(family, case)
    for wrong in (shape[2:], (2, 2, *shape)):
        with pytest.raises(QSNNError, match="expects"):
            quantized(torch.randn(wrong, dtype=torch.float64))


@pytest.mark.parametrize("make", ["BinaryLinear", "QuantLinear"])
def test_unknown_preset_is_refused(make):
    with pytest.raises(QSNNError, match="poster"):
        getattr(layers, make)(3, 2, preset="poster")


def test_unknown_kind_is_refused():
    with pytest.raises(QSNNError, match=r"'conv4d' is unknown.*conv1d"):
        layers.build_layer("conv4d", 3, 2, bits=1)


@pytest.mark.parametrize("family", ["Binary", "Quant"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool], ids=str)
def test_input_must_be_floating(family, dtype):
    with pytest.raises(QSNNError):
        getattr(layers, family + "Linear")(3, 2)(torch.ones(2, 3, dtype=dtype))


def test_quantizer_argument_is_used():
    layer = layers.BinaryLinear(5, 3, quantizer=BinaryWeight(standardize=None, scale=None))
    assert torch.equal(layer.quantized_weight, torch.where(layer.weight >= 0, 1.0, -1.0))
    layer = layers.QuantLinear(5, 3, quantizer=IntWeight(bits=4))
    assert layer.quantizer.bits == 4
    value, _, _ = ref.int_weight(layer.weight.detach().double().numpy(), 4)
    assert_allclose(layer.quantized_weight.detach().numpy(), value, rtol=1e-6)


@pytest.mark.parametrize("family", ["Binary", "Quant"])
def test_bfloat16_autocast(family):
    layer = getattr(layers, family + "Conv2d")(3, 4, 3)
    x = torch.randn(2, 3, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert torch.isfinite(layer.weight.grad).all()
    full = tf.conv2d(x, layer.quantized_weight, layer.bias)
    assert_allclose(y.detach().float().numpy(), full.detach().numpy(), atol=0.15)
