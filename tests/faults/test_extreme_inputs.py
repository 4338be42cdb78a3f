"""Promise: the largest and the smallest inputs either work as the mathematics says or are refused
in words of ours. Nothing in between: no crash, no NaN out of finite numbers, no silent wrap-around.
"""

import numpy as np
import pytest
import torch
from torch import nn

import qsnn_ext
from qsnn_ext import deploy, models, quantize_
from qsnn_ext.errors import ConfigError, InputError, QSNNError
from qsnn_ext.quantizers import BinaryWeight, IntWeight, MembraneQuantizer
from recipes.engine.loading import Loading

from .runs import tiny
from .test_corrupt_files import network

# A little below the end of float32: codes times scale may round up, and over the end.
MAX = 0.999 * torch.finfo(torch.float32).max


# --------------------------------------------------------------------------- empty


@pytest.mark.parametrize("host", ["spikingjelly", "snntorch"])
def test_an_empty_batch(host):
    """No samples in, no samples out (in evaluation: batch norm cannot train on nothing)."""
    net = models.vgg16(width=1 / 32, T=2, host=host).eval()
    with torch.no_grad():
        assert net(torch.zeros(0, 3, 32, 32)).shape == (2, 0, 10)


@pytest.mark.parametrize("host", ["spikingjelly", "snntorch"])
def test_no_time_steps(host):
    net = models.vgg16(width=1 / 32, T=2, host=host).eval()
    with pytest.raises(QSNNError):
        net(torch.zeros(0, 1, 3, 32, 32))


def test_a_model_with_nothing_to_quantize():
    for model in (nn.Sequential(), nn.Identity(), nn.Flatten()):
        assert not quantize_(model, "1w-2u").changed


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_empty_tensors(shape):
    for quantizer in (IntWeight(), MembraneQuantizer(4)):
        assert quantizer(torch.zeros(shape)).shape == shape
    with pytest.raises(QSNNError, match=r"binary weights|standard deviation"):
        BinaryWeight()(torch.zeros(shape))


def test_empty_data_sets():
    with pytest.raises(ConfigError, match=r"training set is empty"):
        Loading(tiny("unused"), [], [(torch.zeros(1), 0)], 10)
    with pytest.raises(ConfigError, match=r"test set is empty"):
        Loading(tiny("unused"), [(torch.zeros(1), 0)], [], 10)


def test_no_batches_to_calibrate_on():
    model = network().eval()
    quantize_(model, "1w-2u")
    with pytest.raises(QSNNError):
        qsnn_ext.calibrate(model, [])


@pytest.mark.parametrize("name", ["config.toml", "config.yaml", "net.safetensors", "net.qsnn"])
def test_empty_files(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"")
    read = {
        ".yaml": qsnn_ext.QuantConfig.from_file, ".toml": qsnn_ext.QuantConfig.from_file,
        ".safetensors": lambda p: qsnn_ext.load_checkpoint(p, network()), ".qsnn": deploy.load,
    }[path.suffix]  # fmt: skip
    if name == "config.toml":  # an empty table: everything as by default
        assert read(path) == qsnn_ext.QuantConfig()
        return
    with pytest.raises(QSNNError, match=name):
        read(path)


# --------------------------------------------------------------------------- large


@pytest.mark.parametrize("scale", [1e-40, 1e-20, 1e20, 1e37])
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("how", ["max", "absmax"])
def test_membranes_near_the_ends_of_float32(scale, bits, how):
    """Quantization is scale invariant: the codes of c*u are the codes of u."""
    u = torch.linspace(-1, 1, 41)
    quantizer = MembraneQuantizer(bits, scale=how)
    value = quantizer(u * scale)
    assert torch.isfinite(value).all()
    if scale >= 1e-20:  # below, u itself is no longer exact
        ours, theirs = quantizer.codes(u * scale)[0], quantizer.codes(u)[0]
        assert (ours - theirs).abs().max() <= 1  # u*scale may round across a tie
        assert (ours != theirs).float().mean() < 0.1


def test_membranes_of_the_largest_number():
    for quantizer in (MembraneQuantizer(2), MembraneQuantizer(8, scale="absmax")):
        value = quantizer(torch.tensor([MAX, -MAX, 0.0, MAX / 2]))
        assert torch.isfinite(value).all()
        assert value[2] == 0
        assert value[0] == pytest.approx(MAX, rel=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_of_the_largest_number(bits):
    value = IntWeight(bits)(torch.tensor([[MAX, -MAX, 0.0]]))
    assert torch.isfinite(value).all()


def test_large_currents_through_a_network():
    net = network().eval()
    quantize_(net, "1w-2u")
    with torch.no_grad():
        for scale in (1e10, 1e30):
            qsnn_ext.hosts.reset(net)
            assert torch.isfinite(net(torch.rand(2, 1, 8, 8) * scale)).all()


@pytest.mark.parametrize("backend", deploy.backends())
def test_deployed_inputs_saturate(deployed, backend):
    """Beyond the range of its codes an input counts as the end of the range, on both sides."""
    model = deploy.load(deployed, backend=backend)
    low, high = model.program.input_range
    for value, code in ((1e30, high), (-1e30, low), (MAX, high)):
        codes = model.codes(np.full((1, 1, 8, 8), value, np.float32))
        assert (codes == code).all()
    for dtype in (np.int64, np.uint64):
        codes = model.codes(np.full((1, 1, 8, 8), np.iinfo(dtype).max, dtype))
        assert (codes == high).all()
    assert np.isfinite(model(np.full((1, 1, 8, 8), MAX, np.float32))).all()


@pytest.mark.parametrize("backend", deploy.backends())
def test_deployed_batches(deployed, backend):
    model = deploy.load(deployed, backend=backend)
    x = np.random.default_rng(0).random((3, 1, 8, 8), np.float32)
    many = model(np.concatenate([x] * 300))
    np.testing.assert_array_equal(many[:3], model(x))
    np.testing.assert_array_equal(many[-3:], model(x))
    for empty in (np.zeros((0, 1, 8, 8)), np.zeros((0, 2, 1, 8, 8)), np.zeros((2, 0, 1, 8, 8))):
        with pytest.raises(InputError, match="empty"):
            model(empty)
    for shape in ((1, 1, 8, 9), (1, 1, 800, 8), (8, 8), (), (1,) * 30, (1, 1, 1, 1, 1, 8, 8)):
        with pytest.raises(InputError):
            model(np.zeros(shape))


@pytest.mark.parametrize("backend", deploy.backends())
def test_many_time_steps(deployed, backend):
    """A thousand steps: nothing is counted in a type too small for it."""
    model, reference = deploy.load(deployed, backend=backend), deploy.load(deployed, "numpy")
    x = np.random.default_rng(0).random((1000, 1, 1, 8, 8), np.float32)
    np.testing.assert_array_equal(model(x), reference(x))
