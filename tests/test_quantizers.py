"""Quantizers: values and gradients by the oracle, and what they say of themselves."""

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import reference as ref
import snntorch as snn
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from qsnn_ext import calibrate, deploy, load_checkpoint, quantize_, save_checkpoint, summarize
from qsnn_ext.errors import QSNNError
from qsnn_ext.quantizers import (
    PRESETS,
    BinaryWeight,
    IntWeight,
    MembraneQuantizer,
    TernaryWeight,
)

weights = hnp.arrays(
    np.float64, st.tuples(st.integers(1, 4), st.integers(2, 6)),
    elements=st.floats(-3.0, 3.0, allow_subnormal=False),
)  # fmt: skip


def _check_codes(quantizer, x):
    """The integer codes and the scale rebuild the value to the last bit."""
    codes, scale = quantizer.codes(x)
    assert codes.dtype == torch.int8
    assert codes.shape == x.shape
    value = quantizer(x).detach()
    assert torch.equal(codes.to(value.dtype) * scale, value)
    return codes


# ------------------------------------------------------------------ weights


@pytest.mark.parametrize("over", ["layer", "channel", None])
@pytest.mark.parametrize("scale", ["mean", "power_of_two", None])
@pytest.mark.parametrize("gradient", ["clipped", "identity", "annealed"])
@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 3, 3)], ids=["linear", "conv"])
def test_binary_weight(rng, over, scale, gradient, shape):
    w, g = rng.normal(0.02, 0.3, size=shape), rng.normal(size=shape)
    keywords = {"temperature": 1.75} if gradient == "annealed" else {}
    quantizer = BinaryWeight(standardize=over, scale=scale, gradient=gradient, **keywords).double()
    wt = torch.tensor(w, requires_grad=True)
    y = quantizer(wt)
    value, signs, alpha = ref.binary_weight(w, over, scale)
    assert_allclose(y.detach().numpy(), value, rtol=1e-8)
    (gw,) = torch.autograd.grad(y, wt, torch.tensor(g))
    expected = ref.binary_weight_gradient(w, g, over, scale, gradient, 1.75)
    assert_allclose(gw.numpy(), expected, rtol=1e-6, atol=1e-8)
    codes = _check_codes(quantizer, wt.detach())
    assert_array_equal(codes.numpy(), signs)
    _, rebuilt = quantizer.codes(wt.detach())
    assert_allclose(
        np.broadcast_to(rebuilt.numpy(), shape), np.broadcast_to(alpha, shape), rtol=1e-8
    )
    assert quantizer.bits == 1


def test_a_zero_weight_is_positive():
    w = torch.tensor([[0.0, -2.0, 0.0, 1.0]])
    y = BinaryWeight(standardize=None, scale=None)(w)
    assert y.tolist() == [[1.0, -1.0, 1.0, 1.0]]


@pytest.mark.parametrize("scale", ["mean", "power_of_two", None])
@pytest.mark.parametrize("over", ["layer", "channel", None])
@pytest.mark.parametrize("w", [torch.zeros(2, 3), torch.full((2, 3), 0.25)], ids=["zeros", "equal"])
def test_degenerate_weights_stay_finite(over, scale, w):
    w = w.clone().requires_grad_()
    y = BinaryWeight(standardize=over, scale=scale)(w)
    (gw,) = torch.autograd.grad(y.sum(), w)
    assert torch.isfinite(y).all()
    assert torch.isfinite(gw).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_int_weight(rng, bits):
    w, g = rng.normal(size=(5, 4, 3)), rng.normal(size=(5, 4, 3))
    quantizer = IntWeight(bits=bits).double()
    wt = torch.tensor(w, requires_grad=True)
    y = quantizer(wt)
    value, codes, unit = ref.int_weight(w, bits)
    assert_allclose(y.detach().numpy(), value, rtol=1e-13)
    (gw,) = torch.autograd.grad(y, wt, torch.tensor(g))
    assert_array_equal(gw.numpy(), g)
    assert_array_equal(_check_codes(quantizer, wt.detach()).numpy(), codes)
    assert_allclose(float(quantizer.codes(wt.detach())[1]), unit, rtol=1e-13)
    assert quantizer.bits == bits


def _ternary(w, threshold):
    """Value, codes and scales of ternary weights, channel by channel."""
    codes, scales = np.zeros_like(w), np.zeros(len(w))
    for c, channel in enumerate(w):
        kept = np.abs(channel) > threshold * np.abs(channel).mean()
        codes[c][kept] = np.sign(channel[kept])
        scales[c] = np.abs(channel[kept]).mean() if kept.any() else 0.0
    return codes * scales.reshape(-1, *[1] * (w.ndim - 1)), codes, scales


@pytest.mark.parametrize("threshold", [0.7, 0.05, 1.5])
@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 3, 3)], ids=["linear", "conv"])
def test_ternary_weight(rng, threshold, shape):
    w, g = rng.normal(0.1, 0.3, size=shape), rng.normal(size=shape)
    quantizer = TernaryWeight(threshold).double()
    wt = torch.tensor(w, requires_grad=True)
    y = quantizer(wt)
    value, codes, scales = _ternary(w, threshold)
    assert_allclose(y.detach().numpy(), value, rtol=1e-12)
    (gw,) = torch.autograd.grad(y, wt, torch.tensor(g))
    assert_array_equal(gw.numpy(), g)  # the identity
    assert_array_equal(_check_codes(quantizer, wt.detach()).numpy(), codes)
    assert_allclose(quantizer.codes(wt.detach())[1].numpy().ravel(), scales, rtol=1e-12)
    assert (quantizer.bits, quantizer.levels, quantizer.scale_count(wt)) == (
        2,
        (-1, 0, 1),
        shape[0],
    )


def test_ternary_weights_of_equal_size_all_count_and_zeros_stay():
    w = torch.tensor([[0.5, -0.5], [0.0, 0.0]])
    assert torch.equal(TernaryWeight()(w), w)
    assert torch.equal(TernaryWeight(threshold=1.0)(w), torch.zeros(2, 2))  # none is above the mean


def test_a_ternary_network_from_configuration_to_integer_program(tmp_path):
    """Nobody else was told of it: conversion, report, checkpoint, deployment ask the quantizer."""
    config = {"weight": {"bits": 2, "quantizer": "ternary"}, "membrane": 4, "first": 8, "last": 8}

    def network():
        neuron = partial(snn.Leaky, 0.5, init_hidden=True)
        return nn.Sequential(
            nn.Linear(6, 16), neuron(), nn.Linear(16, 16), neuron(), nn.Linear(16, 4), neuron()
        )

    net, batches = network(), [torch.rand(8, 6) for _ in range(3)]
    report = quantize_(net, config)
    assert report["2"].weight_bits == 2
    assert isinstance(net[2].quantizer, TernaryWeight)
    calibrate(net, batches)
    assert next(x for x in summarize(net, batches[0]).layers if x.name == "2").weight_bits == 2
    save_checkpoint(net, tmp_path / "net.safetensors")
    again = load_checkpoint(tmp_path / "net.safetensors", network)
    assert torch.equal(again[2].quantized_weight, net[2].quantized_weight)
    program = deploy.lower(net.eval(), batches[0])
    assert deploy.compare(net, program, batches).predictions == 1.0


def test_int_weight_of_zeros_is_zero():
    y = IntWeight()(torch.zeros(3, 2, requires_grad=True))
    assert torch.equal(y, torch.zeros(3, 2))


@pytest.mark.parametrize("over", ["layer", "channel", None])
@given(w=weights)
def test_binary_weight_codes_anywhere(over, w):
    quantizer = BinaryWeight(standardize=over).double()
    codes = _check_codes(quantizer, torch.tensor(w))
    assert set(codes.unique().tolist()) <= {-1, 1}


@given(w=weights)
def test_int_weight_codes_anywhere(w):
    codes = _check_codes(IntWeight(), torch.tensor(w).float())
    assert codes.abs().max() <= 127


# ------------------------------------------------------------------ membrane


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("preset", ["paper", "official"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_membrane_quantizer(rng, bits, preset, dtype):
    options = ref.PRESET_MEMBRANE[preset]
    quantizer = MembraneQuantizer(bits, **options)
    model = ref.Membrane(bits, **options)
    u = rng.normal(0.2, 1.0, size=(6, 9))
    ut = torch.tensor(u, dtype=dtype)
    codes = _check_codes(quantizer, ut)
    ratio = model.ratio(ut.double().numpy())
    clear = np.abs(np.abs(ratio - np.floor(ratio)) - 0.5) > 1e-4
    assert clear.mean() > 0.8
    assert_array_equal(codes.numpy()[clear], model.codes(ut.double().numpy())[clear])
    assert quantizer(ut).dtype == dtype
    assert quantizer.bits == bits


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_levels(bits):
    n = 2 ** (bits - 1) - 1
    assert MembraneQuantizer(bits).levels == IntWeight(bits).levels == tuple(range(-n, n + 1))
    assert BinaryWeight().levels == (-1, 1)


@given(u=weights, bits=st.sampled_from([2, 4, 8]), scale=st.sampled_from(["max", "absmax"]))
def test_membrane_codes_anywhere(u, bits, scale):
    n = 2 ** (bits - 1) - 1
    codes = _check_codes(MembraneQuantizer(bits, scale=scale), torch.tensor(u).float())
    assert codes.abs().max() <= n


def test_dynamic_scale_ignores_eval():
    """`eval()` never changes which scale is used."""
    quantizer = MembraneQuantizer(2)
    u, other = torch.tensor([0.4, 1.0, -0.6]), torch.tensor([0.4, 0.5, -0.6])
    quantizer(u)
    before = quantizer(other)
    quantizer.eval()
    assert torch.equal(quantizer(other), before)
    assert before.tolist() == [0.5, 0.5, -0.5]


def test_frozen_scale_in_training_is_a_running_mean_by_hand():
    """A step is quantized with the mean so far; below zero counts as zero."""
    quantizer = MembraneQuantizer(2, mode="frozen", momentum=0.25)
    for top, used, left in [(1.0, 1.0, 1.0), (3.0, 1.0, 1.5), (-2.0, 1.5, 1.125)]:
        value = quantizer(torch.tensor([top, -4.0]))
        assert value.tolist() == [used if top > 0 else -used, -used]
        assert quantizer.alpha.item() == left
    quantizer.eval()(torch.tensor([9.0]))
    assert quantizer.alpha.item() == 1.125
    assert MembraneQuantizer(2).momentum == 0.1


def test_frozen_scale_makes_a_sample_independent_of_its_batch():
    quantizer = MembraneQuantizer(3, mode="frozen")
    torch.manual_seed(1)
    for _ in range(20):
        quantizer(torch.randn(64))
    quantizer.eval()
    one = torch.tensor([0.5, -0.25, 0.1])
    alone = quantizer(one)
    beside = quantizer(torch.cat([one, torch.tensor([50.0])]))
    assert torch.equal(alone, beside[:3])
    assert torch.equal(quantizer(one), alone)
    codes, scale = quantizer.codes(one)
    assert torch.equal(codes * scale, alone)


def test_frozen_scale_without_a_value_is_an_error():
    """Falling back on the batch would change silently what `eval()` computes."""
    with pytest.raises(QSNNError, match="calibrate"):
        MembraneQuantizer(2, mode="frozen").eval()(torch.ones(3))


@pytest.mark.parametrize("alpha", [-1.0, float("nan"), float("inf")])
def test_freezing_at_no_number_is_refused(alpha):
    with pytest.raises(QSNNError):
        MembraneQuantizer(2).freeze(alpha)


def test_frozen_scale_is_saved_and_restored():
    trained = MembraneQuantizer(3, mode="frozen")
    for _ in range(5):
        trained(torch.randn(64))
    trained.eval()
    state = trained.state_dict()
    assert state
    restored = MembraneQuantizer(3, mode="frozen")
    restored.load_state_dict(state, strict=True)
    restored.eval()
    u = torch.randn(50)
    assert torch.equal(restored(u), trained(u))


def test_dynamic_quantizers_add_nothing_to_a_checkpoint():
    quantizer = MembraneQuantizer(2)
    quantizer(torch.randn(5))
    assert quantizer.state_dict() == {}
    assert BinaryWeight().state_dict() == {}
    assert IntWeight().state_dict() == {}


def test_frozen_without_calibration_loads_a_float_checkpoint():
    MembraneQuantizer(2, mode="frozen").load_state_dict({}, strict=True)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))])
@pytest.mark.parametrize(
    "make",
    [
        BinaryWeight,
        IntWeight,
        TernaryWeight,
        MembraneQuantizer,
        partial(MembraneQuantizer, mode="frozen"),
    ],
    ids=["binary", "int", "ternary", "dynamic", "frozen"],
)
def test_copies_are_equal(make, copier):
    quantizer = make() if make in (BinaryWeight, TernaryWeight) else make(bits=4)
    x = torch.randn(4, 5)
    quantizer(x)
    assert torch.equal(copier(quantizer)(x), quantizer(x))


# ------------------------------------------------------------------ presets and bad input


def test_presets_are_the_two_of_the_paper():
    assert set(PRESETS) == {"paper", "official"}


@pytest.mark.parametrize("bits", [1, 0, -2, 9, 2.5, "two", None, True], ids=repr)
def test_membrane_bits_are_checked(bits):
    with pytest.raises(QSNNError):
        MembraneQuantizer(bits)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MembraneQuantizer(2, scale="median"),
        lambda: MembraneQuantizer(2, squash="relu"),
        lambda: MembraneQuantizer(2, mode="thawed"),
        lambda: BinaryWeight(standardize="row"),
        lambda: BinaryWeight(scale="max"),
        lambda: BinaryWeight(gradient="steep"),
        lambda: IntWeight(bits=1),
        lambda: IntWeight(bits=9),
        lambda: TernaryWeight(0.0),
        lambda: TernaryWeight.with_bits(3),
    ],
    ids=[
        "scale",
        "squash",
        "mode",
        "standardize",
        "weight-scale",
        "gradient",
        "int1",
        "int9",
        "threshold",
        "ternary3",
    ],
)
def test_unknown_options_are_refused(make):
    with pytest.raises(QSNNError):
        make()


def test_one_bit_is_refused_with_what_to_use_instead():
    with pytest.raises(QSNNError, match="For 1 bit use BinaryWeight"):
        IntWeight(1)
    with pytest.raises(QSNNError, match="A sign carries no membrane potential"):
        MembraneQuantizer(1)


def test_a_saved_frozen_scale_is_used_by_whoever_loads_it():
    saved = MembraneQuantizer(4)
    saved.freeze(0.5)
    loaded = MembraneQuantizer(4)
    loaded.load_state_dict(saved.state_dict())
    u = torch.linspace(-2, 2, 9)
    assert torch.equal(loaded(u), saved(u))
    assert loaded.mode == "frozen"


@pytest.mark.parametrize("temperature", [0.1, 1e-7, 1 / 3])
def test_options_give_the_temperature_back(temperature):
    quantizer = BinaryWeight(gradient="annealed", temperature=temperature)
    again = BinaryWeight(**quantizer.options())
    assert torch.equal(again.temperature, quantizer.temperature)
    assert BinaryWeight(gradient="annealed").options()["temperature"] == 0.1
