"""ONNX files answer as the simulation does, in ONNX Runtime, from plain operators."""

import numpy as np
import pytest
import torch
from torch import nn

from qsnn_ext import calibrate, quantize_
from qsnn_ext.errors import LoweringError, StateError
from qsnn_ext.export import stock_copy, to_onnx
from qsnn_ext.layers import BinaryConv2d, QuantLinear

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")


def spikingjelly_net():
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import functional, layer, neuron

    net = nn.Sequential(
        layer.Conv2d(1, 8, 3, padding=1, bias=False),
        layer.BatchNorm2d(8),
        neuron.LIFNode(),
        layer.MaxPool2d(2),
        layer.Conv2d(8, 8, 3, padding=1, bias=False),
        layer.BatchNorm2d(8),
        neuron.ParametricLIFNode(v_reset=None),
        layer.Flatten(),
        layer.Linear(8 * 16, 10),
    )
    functional.set_step_mode(net, "m")
    for norm in (net[1], net[5]):
        nn.init.normal_(norm.bias, 0.5)
    return net, 4 * torch.rand(3, 5, 1, 8, 8), None


def snntorch_net():
    snn = pytest.importorskip("snntorch")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.lif1 = nn.Linear(16, 32), snn.Leaky(beta=0.9)
            self.fc2, self.lif2 = nn.Linear(32, 32), snn.Leaky(beta=0.9, reset_mechanism="zero")
            self.fc3, self.lif3 = nn.Linear(32, 4), snn.Leaky(beta=0.9, reset_delay=False)

        def forward(self, x):
            a, b, c = self.lif1.init_leaky(), self.lif2.init_leaky(), self.lif3.init_leaky()
            spikes, potentials = [], []
            for _ in range(6):
                spk, a = self.lif1(self.fc1(x), a)
                spk, b = self.lif2(self.fc2(spk), b)
                spk, c = self.lif3(self.fc3(spk), c)
                spikes.append(spk)
                potentials.append(c)
            return torch.stack(spikes), torch.stack(potentials)

    return Net(), 3 * torch.rand(5, 16), None


def stepped_net():
    snn = pytest.importorskip("snntorch")
    net = nn.Sequential(
        nn.Linear(16, 32),
        snn.Leaky(beta=0.9, init_hidden=True),
        nn.Linear(32, 4),
        snn.Leaky(beta=0.9, init_hidden=True, output=True),
    )

    def forward(model, x):
        return [model(x_t)[1] for x_t in x]

    return net, 3 * torch.rand(4, 5, 16), forward


@pytest.mark.parametrize("network", [spikingjelly_net, snntorch_net, stepped_net])
def test_runtime_answers_as_the_simulation(network, tmp_path):
    net, x, forward = network()
    quantize_(net, "1w-4u", sample=x, forward=forward)
    calibrate(net, [x], forward=forward)
    net.eval()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    difference = to_onnx(net, x, tmp_path / "net.onnx", forward=forward)
    assert difference < 1e-5
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key]), key
    # The file without this package, on other data than were shown.
    other = x.flip(-1)
    session = runtime.InferenceSession(tmp_path / "net.onnx")
    found = session.run(None, {"input": other.numpy()})
    from qsnn_ext import hosts

    hosts.reset(net)
    with torch.no_grad():
        wanted = net(other) if forward is None else torch.stack(forward(net, other))
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    for a, b in zip(found, wanted, strict=True):
        assert np.abs(a - b.numpy()).max() < 1e-5
        assert np.abs(a).max() > 0
    graph = onnx.load(tmp_path / "net.onnx").graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    assert "Round" in {node.op_type for node in graph.node}


def test_dynamic_scales_are_refused(tmp_path):
    net, x, _ = snntorch_net()
    quantize_(net, "1w-4u")
    with pytest.raises(StateError, match="calibrate"):
        to_onnx(net, x, tmp_path / "net.onnx")
    assert not (tmp_path / "net.onnx").exists()


def test_a_wrong_file_is_not_left(tmp_path, monkeypatch):
    """Verification compares with the simulation: spoilt, it must say so."""
    net, x, _ = snntorch_net()
    quantize_(net, "1w-4u")
    calibrate(net, [x])
    answer = runtime.InferenceSession.run

    def spoilt(self, *args):
        return [a + 1 for a in answer(self, *args)]

    monkeypatch.setattr(runtime.InferenceSession, "run", spoilt)
    with pytest.raises(LoweringError, match="off by 1"):
        to_onnx(net, x, tmp_path / "net.onnx")
    assert not (tmp_path / "net.onnx").exists()


@pytest.mark.parametrize("layer", [BinaryConv2d(2, 4, 3, groups=2), QuantLinear(5, 3)])
def test_a_stock_copy_is_the_stock_class_with_what_the_layer_computes_with(layer):
    layer.register_buffer("output_scale", torch.linspace(1, 2, layer.weight.shape[0]))
    layer.register_forward_hook(lambda *_: pytest.fail("a hook came along"))
    copy = stock_copy(layer)
    assert type(copy) in (nn.Conv2d, nn.Linear)
    layer._forward_hooks.clear()
    x = torch.rand(2, 2, 5, 5)
    torch.testing.assert_close(copy(x), layer(x))
    assert copy.weight.data_ptr() != layer.weight.data_ptr()
    assert copy.state_dict().keys() == {"weight", "bias"}


def test_the_next_float_in_plain_operators(rng):
    """The formula that stands for ``nextafter`` in the file, against NumPy's own."""
    x = rng.uniform(0.1, 8, 10000).astype(np.float32)
    x = np.concatenate([x, -x, np.float32(2.0) ** np.arange(-20, 20, dtype=np.float32)])
    half = np.abs(x) * np.float32(2.0**-24 * (1 + 2.0**-20))
    assert np.array_equal(x + half, np.nextafter(x, np.float32(np.inf)))
    assert np.array_equal(x - half, np.nextafter(x, np.float32(-np.inf)))
