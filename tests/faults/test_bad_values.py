"""Promise: NaN, infinity and labels out of range are noticed where they enter and named. They do
not train, are not converted, calibrated into a scale, lowered or answered; what they must not do is
pass through a rounding step and look like an ordinary number afterwards.
"""

import math

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import layer, neuron
from torch import nn

import qsnn_ext
from qsnn_ext import deploy, quantize_
from qsnn_ext.errors import ConversionError, InputError, LoweringError, QSNNError
from qsnn_ext.quantizers import BinaryWeight, IntWeight, MembraneQuantizer
from recipes.data import digits

from .runs import OWN_ERROR, live, tiny
from .test_corrupt_files import network

BAD = [math.nan, math.inf, -math.inf]


def with_one(value, *shape):
    x = torch.rand(*shape)
    x.view(-1)[x.numel() // 2] = value
    return x


# --------------------------------------------------------------------------- training


def spoil_samples(change):
    def install():
        fetch = digits.DigitImages.__getitem__
        digits.DigitImages.__getitem__ = lambda self, index: change(index, *fetch(self, index))

    return install


@pytest.mark.parametrize("value", BAD)
def test_a_bad_pixel_stops_training(tmp_path, value):
    def change(index, x, label):
        return x * value if index % 7 == 0 else x, label

    life = live(tiny(tmp_path / "run"), spoil_samples(change))
    assert life.wait() == OWN_ERROR, life.said()
    assert "TrainingError" in life.said()
    assert "input batch" in life.said()
    assert not list((tmp_path / "run").glob("*.ckpt")), "nothing was learnt from it"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("label", [-1, 10, 2**40])
def test_a_label_out_of_range_stops_training(tmp_path, label, workers):
    life = live(
        tiny(tmp_path / "run", workers=workers),
        spoil_samples(lambda i, x, y: (x, label if i % 7 == 0 else y)),
    )
    assert life.wait() == OWN_ERROR, life.said()
    assert f"has label {label}, but there are only 10 classes" in life.said()
    assert "Sample " in life.said()


# --------------------------------------------------------------------------- conversion


@pytest.mark.parametrize("value", BAD)
def test_bad_weights_are_not_converted(value):
    model = network()
    with torch.no_grad():
        model[4].weight[0, 0] = value
    with pytest.raises(ConversionError, match=r"weight of 4 .*NaN or infinity"):
        quantize_(model, "1w-2u")


@pytest.mark.parametrize("value", BAD)
def test_a_bad_batch_is_not_calibrated_into_a_scale(value):
    model = network().eval()
    quantize_(model, "1w-2u")
    with pytest.raises(QSNNError, match=r"NaN|infinit|finite"):
        qsnn_ext.calibrate(model, [torch.rand(2, 1, 8, 8), with_one(value, 2, 1, 8, 8)])


# --------------------------------------------------------------------------- quantizers


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(
    "quantizer", [BinaryWeight(), IntWeight(), MembraneQuantizer(2)], ids=lambda q: type(q).__name__
)
def test_codes_of_bad_values_do_not_exist(quantizer, value):
    """Integer codes are what leaves floating point: a NaN must not become some integer."""
    with pytest.raises(InputError, match=r"NaN|infinit|finite"):
        quantizer.codes(with_one(value, 4, 9))


@pytest.mark.parametrize("node", [neuron.LIFNode, neuron.IFNode])
@pytest.mark.parametrize("mode", ["dynamic", "frozen"])
def test_nan_in_a_neuron_is_not_hidden(node, mode):
    """A NaN current leaves a NaN membrane potential, so that whoever looks for one finds it."""
    model = nn.Sequential(node())
    quantize_(model, {"bits": "1w-2u"} if mode == "dynamic" else {
        "weight": 1, "membrane": {"bits": 2, "mode": "frozen"}})  # fmt: skip
    if mode == "frozen":
        model[0].membrane.freeze(1.0)
    model(with_one(math.nan, 2, 8))
    assert torch.isnan(model[0].v).any()


# --------------------------------------------------------------------------- deployment


@pytest.mark.parametrize("value", BAD)
def test_a_deployed_model_refuses_bad_input(deployed, value):
    model = deploy.load(deployed)
    for kind in (torch.Tensor, lambda t: t.numpy(), lambda t: t.double().numpy()):
        with pytest.raises(InputError, match="NaN or infinity"):
            model(kind(with_one(value, 2, 1, 8, 8)))


@pytest.mark.parametrize("what", ["weight", "bias", "running_mean", "running_var"])
def test_bad_constants_are_not_lowered(what):
    model = network().eval()
    quantize_(model, "1w-2u", torch.rand(1, 1, 8, 8))
    qsnn_ext.calibrate(model, [torch.rand(4, 1, 8, 8)])
    with torch.no_grad():
        getattr(model[1], what)[0] = math.nan
    with pytest.raises(LoweringError, match=r"^1: .*NaN or infinity"):
        deploy.lower(model, torch.rand(4, 1, 8, 8))


def test_weights_that_became_nan_make_no_checkpoint(tmp_path):
    """A dead layer spikes no more and the loss stays finite: only the weights show it."""

    def poison():
        from recipes.engine.module import Training

        step = Training.on_validation_epoch_start

        def after_one_epoch(self):
            step(self)
            if self.current_epoch == 1:
                with torch.no_grad():
                    self.model.features[3].conv1.bn.running_mean[0] = math.nan

        Training.on_validation_epoch_start = after_one_epoch

    life = live(tiny(tmp_path / "run", epochs=4), poison)
    assert life.wait() == OWN_ERROR, life.said()
    assert "After epoch 2 'features.3.conv1.bn.running_mean' holds NaN" in life.said()
    assert [p.name for p in (tmp_path / "run").glob("epoch-*")] == ["epoch-0001.ckpt"]


def test_complex_and_text_inputs(deployed):
    model = deploy.load(deployed)
    for x in (np.full((1, 1, 8, 8), 1j), np.full((1, 1, 8, 8), "a"), np.full((1, 1, 8, 8), None)):
        with pytest.raises(QSNNError):
            model(x)


def test_layer_of_a_wrong_kind():
    model = nn.Sequential(layer.Linear(4, 4), neuron.LIFNode())
    quantize_(model, "1w-2u")
    with pytest.raises(QSNNError, match="floating"):
        model(torch.zeros(2, 4, dtype=torch.int64))
