"""The paper's networks: sizes, bits per layer, forms of input, both hosts."""

import copy
import inspect

import pytest
import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn

import qsnn_ext.models as models
from qsnn_ext.errors import QSNNError
from qsnn_ext.layers import BinaryConv2d, BinaryLinear
from qsnn_ext.models import resnet19, vgg16, vggsnn
from qsnn_ext.regularizers import WSDRRegularizer
from qsnn_ext.spikingjelly import QuantLIFNode

BUILDERS = {"resnet19": resnet19, "vgg16": vgg16, "vggsnn": vggsnn}
ALL_BITS = ["32w-32u", "1w-32u", "1w-8u", "1w-4u", "1w-2u"]
CHANNELS = {"resnet19": 3, "vgg16": 3, "vggsnn": 2}
STEPS = {"resnet19": 2, "vgg16": 4, "vggsnn": 10}
WEIGHTED = (nn.Conv2d, nn.Linear)

builders = pytest.mark.parametrize("name", BUILDERS)
hosts = pytest.mark.parametrize("host", ["spikingjelly", "snntorch"])


@pytest.fixture(autouse=True)
def _no_instances():
    yield
    import snntorch

    snntorch.SpikingNeuron.instances.clear()


def _narrow(name, **keywords):
    keywords = {"width": 0.0625, "T": 2, **keywords}
    return BUILDERS[name](**keywords)


def _parameters(net):
    return sum(p.numel() for p in net.parameters())


def _vgg_parameters(channels, plan, classes):
    """Convolutions without bias, a scale and a shift of each batch norm, one linear head."""
    total = 0
    for out in plan:
        total += 9 * channels * out + 2 * out
        channels = out
    return total + channels * classes + classes


def test_parameter_counts():
    assert _parameters(resnet19()) == 12_569_226
    assert _parameters(resnet19(num_classes=100)) == 12_569_226 + 90 * 513
    vgg = [64, 64, 128, 128] + [256] * 3 + [512] * 6
    assert _parameters(vgg16()) == _vgg_parameters(3, vgg, 10)
    dvs = [64, 128, 256, 256, 512, 512, 512, 512]
    assert _parameters(vggsnn()) == _vgg_parameters(2, dvs, 10)


@builders
def test_quantization_adds_no_parameter_and_loads_float_weights(name):
    plain = _narrow(name)
    for bits in ALL_BITS[1:]:
        net = _narrow(name, bits=bits)
        net.load_state_dict(plain.state_dict(), strict=True)
        plain.load_state_dict(net.state_dict(), strict=True)
        assert _parameters(net) == _parameters(plain)


@builders
@hosts
@pytest.mark.parametrize("bits", ALL_BITS)
def test_bits_of_every_layer(name, host, bits):
    """First and last layer 8 bit, hidden layers 1 bit, every neuron k bits."""
    net = _narrow(name, bits=bits, host=host)
    layers = [m for m in net.modules() if isinstance(m, WEIGHTED)]
    w, u = bits.split("-")
    found = [m.quantizer.bits if hasattr(m, "quantizer") else 32 for m in layers]
    expected = [32] * len(layers) if w == "32w" else [8] + [1] * (len(layers) - 2) + [8]
    assert found == expected
    neurons = [m for m in net.modules() if hasattr(m, "membrane") and hasattr(m, "order")]
    if u != "32u":
        assert {n.bits for n in neurons} == {int(u[:-1])}
        assert len(neurons) == {"resnet19": 17, "vgg16": 13, "vggsnn": 8}[name]


@builders
@hosts
@pytest.mark.parametrize("bits", ["32w-32u", "1w-2u"])
def test_forms_of_input(name, host, bits):
    """[N, C, H, W] is repeated T times; [T, N, C, H, W] is taken as it comes."""
    net = _narrow(name, host=host, bits=bits, num_classes=5).eval()
    x = torch.randn(2, CHANNELS[name], 32, 32)

    def run(x):
        if host == "spikingjelly":
            functional.reset_net(net)
        with torch.no_grad():
            return net(x)

    images = run(x)
    assert images.shape == (2, 2, 5)
    assert torch.isfinite(images).all()
    assert torch.equal(run(x.expand(2, *x.shape)), images)
    assert run(x.expand(3, *x.shape)).shape == (3, 2, 5)


@builders
def test_built_with_the_papers_time_steps_and_in_floating_point_by_default(name):
    net = BUILDERS[name](width=0.0625)
    with torch.no_grad():
        y = net(torch.randn(1, CHANNELS[name], 32, 32))
    assert y.shape == (STEPS[name], 1, 10)
    assert not any(hasattr(m, "quantizer") for m in net.modules())
    assert any(isinstance(m, neuron.LIFNode) for m in net.modules())


@builders
def test_channels_width_and_classes(name):
    net = BUILDERS[name](num_classes=7, in_channels=1, width=0.125, T=1)
    assert net(torch.randn(2, 1, 32, 32)).shape == (1, 2, 7)
    assert _parameters(net) < _parameters(_narrow(name, width=0.25))


@builders
@hosts
@pytest.mark.parametrize("preset", ["paper", "official"])
def test_training_step(name, host, preset):
    net = _narrow(name, host=host, bits="1w-2u", preset=preset)
    with WSDRRegularizer(net) as wsdr:
        y = net(torch.randn(3, CHANNELS[name], 32, 32))
        (y.mean(0).square().sum() + wsdr()).backward()
    for key, p in net.named_parameters():
        assert p.grad is not None, key
        assert torch.isfinite(p.grad).all(), key
    first = next(m for m in net.modules() if isinstance(m, nn.Conv2d))
    assert first.weight.grad.abs().sum() > 0


@builders
def test_both_hosts_compute_the_same(name):
    """With Leaky's reset at once and to zero, the two hosts are one neuron."""
    one = _narrow(name, bits="1w-4u").eval()
    two = _narrow(name, bits="1w-4u", host="snntorch").eval()
    for module in one.modules():  # no charge may meet the threshold, where the hosts' rules differ
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, 0.2, 0.1)
    weights = one.state_dict()
    assert set(weights) <= set(two.state_dict())
    two.load_state_dict({**two.state_dict(), **weights}, strict=True)
    x = torch.randn(2, CHANNELS[name], 32, 32)
    with torch.no_grad():
        a, b = one(x), two(x)
    assert a.abs().sum() > 0
    assert torch.allclose(a, b, atol=1e-5)


def test_neuron_options_reach_the_neurons():
    net = _narrow("resnet19", bits="1w-2u", neuron={"order": "quantize_first", "v_reset": None})
    nodes = [m for m in net.modules() if isinstance(m, QuantLIFNode)]
    assert {(n.order, n.v_reset) for n in nodes} == {("quantize_first", None)}


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_preset_reaches_weights_and_membranes(preset):
    net = _narrow("vggsnn", bits="1w-2u", preset=preset)
    node = next(m for m in net.modules() if isinstance(m, QuantLIFNode))
    conv = next(m for m in net.modules() if isinstance(m, BinaryConv2d))
    assert node.membrane.squash == (None if preset == "paper" else "tanh")
    assert node.membrane.scale == ("max" if preset == "paper" else "absmax")
    assert conv.quantizer.standardize == ("layer" if preset == "paper" else "channel")
    assert not any(isinstance(m, BinaryLinear) for m in net.modules())


def test_regularizer_leaves_out_the_ends_of_resnet19():
    """15 of the 17 spiking layers are hidden."""
    net = _narrow("resnet19", bits="1w-2u")
    rates = []

    def _rate(module, args, out):
        rates.append(float(out.detach().double().mean()))

    for module in net.modules():
        if isinstance(module, neuron.BaseNode):
            module.register_forward_hook(_rate)
    wsdr = WSDRRegularizer(net, strength=1.0)
    net(torch.randn(4, 3, 32, 32))
    assert len(rates) == 17
    expected = sum((f - 0.5) ** 2 for f in rates[1:-1])
    assert wsdr().item() == pytest.approx(expected, rel=1e-5)


@builders
@pytest.mark.parametrize(
    "options",
    [
        {"bits": "9w-2u"}, {"bits": "1w-1u"}, {"bits": "1w-9u"}, {"bits": "one"},
        {"preset": "poster"}, {"host": "norse"}, {"T": 0}, {"width": 0.0}, {"width": -1.0},
    ],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()),
)  # fmt: skip
def test_bad_options_are_refused(name, options):
    with pytest.raises(QSNNError):
        _narrow(name, **options)


@builders
@hosts
def test_bad_input_is_refused(name, host):
    net = _narrow(name, host=host)
    channels = CHANNELS[name]
    for x in (
        torch.randn(channels, 32, 32),
        torch.randn(1, 1, 1, channels, 32, 32),
        torch.randn(1, channels + 1, 32, 32),
        torch.ones(1, channels, 32, 32, dtype=torch.int64),
        torch.ones(1, channels, 32, 32, dtype=torch.complex64),
    ):
        with pytest.raises(QSNNError):
            net(x)


def test_model_copies_and_saves(tmp_path):
    net = _narrow("resnet19", bits="1w-2u").eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        y = net(x)
        functional.reset_net(net)
        twin = copy.deepcopy(net)
        assert torch.equal(twin(x), y)
        torch.save(net.state_dict(), tmp_path / "net.pt")
        fresh = _narrow("resnet19", bits="1w-2u").eval()
        fresh.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True), strict=True)
        assert torch.equal(fresh(x), y)


def test_double_precision_and_autocast():
    net = _narrow("resnet19", bits="1w-2u").double()
    y = net(torch.randn(1, 3, 32, 32, dtype=torch.float64))
    assert y.dtype == torch.float64
    net = _narrow("resnet19", bits="1w-2u")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(torch.randn(2, 3, 32, 32))
    y.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


def test_every_public_builder_is_tested():
    public = {
        name
        for name, found in vars(models).items()
        if inspect.isfunction(found) and found.__module__ == models.__name__ and name[0] != "_"
    }
    assert public == set(BUILDERS)
