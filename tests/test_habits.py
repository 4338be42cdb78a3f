"""How people build their networks: each habit converts, trains and is told of in the report."""

import copy

import pytest
import snntorch as snn
import torch
from snntorch import utils
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.nn import functional as tf
from torch.nn.utils import parametrizations

from qsnn_ext import QuantConfig, Rule, quantize_
from qsnn_ext.errors import ConversionError, InputTypeError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def _forget_instances():
    yield
    snn.SpikingNeuron.instances.clear()


def lif(**options):
    return neuron.LIFNode(step_mode="m", **options)


def bits(report, *names):
    return tuple(report[name].weight_bits for name in names)


def trains(net, *inputs, forward=None):
    """A backward pass reaches every weight that is trained."""
    net.train()
    out = forward(net, *inputs) if forward else net(*inputs)
    outputs = [out] if isinstance(out, torch.Tensor) else list(out)
    sum(y.float().square().sum() for y in outputs if y.requires_grad).backward()
    missing = [n for n, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing, missing
    functional.reset_net(net)


def levels(value):
    return len(value.unique())


# ------------------------------------------------------------------ snnTorch's styles


def over_time(net, x):
    utils.reset(net)
    return torch.stack([y[0] if isinstance(y := net(step), tuple) else y for step in x])


def test_a_convolutional_sequential_called_once_per_step():
    net = nn.Sequential(
        nn.Conv2d(2, 6, 5), snn.Leaky(0.5, init_hidden=True), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3), snn.Leaky(0.5, init_hidden=True), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(8 * 9, 16), snn.Lapicque(beta=0.5, init_hidden=True), nn.Linear(16, 10),
        snn.Leaky(0.5, init_hidden=True, output=True),
    )  # fmt: skip
    x = (torch.rand(3, 2, 2, 20, 20) < 0.5).float()
    report = quantize_(net, "1w-2u", sample=x, forward=over_time, strict=True)
    assert bits(report, "0", "3", "7", "9") == (8, 1, 1, 8)
    assert not report.unseen
    assert report.states.by_bits.keys() == {2}
    trains(net, x, forward=over_time)


@pytest.mark.parametrize(
    "feedback",
    [
        {"conv2d_channels": 4, "kernel_size": 3},
        {"all_to_all": False, "V": 0.5},
        {"all_to_all": False, "V": torch.rand(4, 1, 1), "learn_recurrent": True},
    ],
)
def test_feedback_through_a_convolution_or_one_to_one(feedback):
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), snn.RLeaky(0.9, init_hidden=True, **feedback),
        nn.Conv2d(4, 4, 3, padding=1), snn.RSynaptic(0.9, 0.8, init_hidden=True, **feedback),
        nn.Flatten(), nn.Linear(4 * 36, 3),
    )  # fmt: skip
    x = torch.rand(3, 2, 2, 6, 6) * 4
    report = quantize_(net, "1w-2u", sample=x, forward=over_time, strict=True)
    assert bits(report, "0", "2", "5") == (8, 1, 8)
    if "kernel_size" in feedback:
        assert bits(report, "1.recurrent", "3.recurrent") == (1, 1)
    assert report["1"].membrane_bits == report["3"].membrane_bits == 2
    trains(net, x, forward=over_time)
    assert levels(net[3].syn) <= 3


class TwoMembranes(nn.Module):
    """States in the hands of the model, weights used at several places."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.lif = snn.Synaptic(0.9, 0.8)
        self.out = snn.Alpha(0.9, 0.8, reset_mechanism="none")

    def forward(self, x):
        states = [self.lif.init_synaptic() for _ in range(2)]
        excite, inhibit, mem = self.out.init_alpha()
        for step in x:
            s, *states[0] = self.lif(self.fc1(step), *states[0])
            s, *states[1] = self.lif(self.fc2(s), *states[1])
            _, excite, inhibit, mem = self.out(self.fc3(s), excite, inhibit, mem)
        return mem


def test_one_neuron_with_states_of_two_layers():
    net = TwoMembranes()
    report = quantize_(net, "1w-2u", sample=torch.rand(4, 2, 6) * 3)
    assert bits(report, "fc1", "fc2", "fc3") == (8, 1, 8)
    assert report["lif"].membrane_bits == 2
    trains(net, torch.rand(4, 2, 6) * 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: snn.StateLeaky(0.9, 8),
        lambda: snn.LeakyParallel(8, 8),
        lambda: snn.LinearLeaky(0.9, 8, 8),
    ],
)
def test_neurons_without_a_step_are_named_with_the_reason(make):
    net = nn.Sequential(nn.Linear(6, 8), make())
    with pytest.warns(UserWarning, match="no membrane potential was quantized: 1: it computes all"):
        report = quantize_(net, "8w-2u")
    assert "all time steps at once" in report["1"].reason


class Noisy(snn.Leaky):
    """A forward of its own around the host's."""

    def forward(self, input_, mem=None):
        if mem is None:
            return super().forward(input_ + 0.1)
        return super().forward(input_ + 0.1, mem)


class OwnCharge(snn.Leaky):
    def _base_state_function(self, input_):
        return self.beta.clamp(0, 1) * self.mem + 0.5 * input_


@pytest.mark.parametrize("kind", [Noisy, OwnCharge])
def test_subclasses_of_snntorchs_neurons_keep_what_they_compute(kind):
    theirs, x = kind(0.9, init_hidden=True), torch.rand(4, 3, 50) * 2
    ours = copy.deepcopy(theirs)
    net = nn.Sequential(ours)
    assert quantize_(net, "32w-8u")["0"].membrane_bits == 8
    a, b = over_time(net, x), torch.stack([theirs(step) for step in x])
    assert (a == b).float().mean() > 0.9
    plain = snn.Leaky(0.9, init_hidden=True)
    assert (a == torch.stack([plain(step) for step in x])).float().mean() < 0.99


# ------------------------------------------------------------------ SpikingJelly's styles


def test_containers_of_spikingjelly():
    def activation(x, y):
        return x + y

    net = nn.Sequential(
        layer.SeqToANNContainer(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)), lif(),
        layer.SeqToANNContainer(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)),
        layer.MultiStepContainer(neuron.IFNode()),
        layer.Flatten(step_mode="m"),
        layer.ElementWiseRecurrentContainer(
            neuron.ParametricLIFNode(), activation, step_mode="m"
        ),
        layer.Linear(4 * 36, 8, step_mode="m"),
        layer.LinearRecurrentContainer(neuron.LIFNode(), 8, 8, step_mode="m"),
        layer.Linear(8, 2, step_mode="m"),
    )  # fmt: skip
    x = torch.rand(3, 2, 2, 6, 6) * 3
    report = quantize_(net, "1w-2u", sample=x, strict=True)
    assert bits(report, "0.0", "2.0", "6", "7.rc", "8") == (8, 1, 1, 1, 8)
    assert all(row.membrane_bits == 2 for row in report.modules if row.neuron)
    trains(net, x)


def test_a_recurrent_container_at_the_end_is_no_last_layer():
    net = nn.Sequential(
        layer.Linear(6, 8), neuron.LIFNode(), layer.Linear(8, 4),
        layer.LinearRecurrentContainer(neuron.LIFNode(), 4, 4),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    report = quantize_(net, "1w-2u", sample=torch.rand(4, 2, 6) * 5)
    assert (report.firsts, report.lasts) == (("0",), ("2",))
    assert report["3.rc"].weight_bits == 1


def test_an_encoding_neuron_before_all_weights():
    net = nn.Sequential(
        neuron.IFNode(step_mode="m"), nn.Linear(6, 8), lif(), nn.Linear(8, 8), lif(),
        nn.Linear(8, 2),
    )  # fmt: skip
    report = quantize_(net, "1w-2u", sample=torch.rand(4, 2, 6))
    assert bits(report, "1", "3", "5") == (8, 1, 8)
    assert report["0"].membrane_bits == 2


def test_online_training_layers():
    net = layer.OTTTSequential(
        layer.WSConv2d(2, 8, 3, padding=1), neuron.OTTTLIFNode(),
        layer.WSConv2d(8, 8, 3, padding=1), neuron.OTTTLIFNode(),
        layer.Flatten(1), layer.Linear(8 * 36, 3),
    )  # fmt: skip
    x = torch.randn(2, 2, 6, 6)
    report = quantize_(net, "1w-2u", sample=x, strict=True)
    assert bits(report, "0", "2", "5") == (8, 1, 8)
    assert not any("batch norm" in warning for warning in report.warnings)  # it normalizes itself
    trains(net, x)


def test_a_list_given_to_a_layer_is_refused_with_our_own_error():
    net = nn.Sequential(nn.Linear(6, 8), neuron.OTTTLIFNode(), nn.Linear(8, 2))
    quantize_(net, "1w-2u")
    net.train()
    with pytest.raises(InputTypeError, match="needs a tensor, got a list"):
        net(torch.rand(3, 6))  # the neuron gives [spikes, trace] in training


# ------------------------------------------------------------------ neurons by hand


class Fire(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).float()

    @staticmethod
    def backward(ctx, grad):
        return grad * (ctx.saved_tensors[0].abs() < 0.5).float()


class Adaptive(nn.Module):
    """A threshold that adapts; hands on potential, spikes and threshold, in that order."""

    def __init__(self, size):
        super().__init__()
        self.tau_m, self.tau_adp = nn.Parameter(torch.ones(size)), nn.Parameter(torch.ones(size))

    def forward(self, x, mem, spike, b):
        b = torch.sigmoid(self.tau_adp) * b + (1 - torch.sigmoid(self.tau_adp)) * spike
        threshold = 0.1 + 1.8 * b
        mem = mem * torch.sigmoid(self.tau_m) + x - threshold * spike
        return mem, Fire.apply(mem - threshold), b


class AdaptiveNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.alif, self.fc2 = nn.Linear(6, 8), Adaptive(8), nn.Linear(8, 2)

    def forward(self, x):
        mem = spike = b = torch.zeros(x.shape[1], 8)
        out = []
        for step in x:
            mem, spike, b = self.alif(self.fc1(step), mem, spike, b)
            out.append(self.fc2(spike))
        return torch.stack(out)


def test_an_adaptive_neuron_that_gives_its_potential_first():
    report = quantize_(AdaptiveNet(), "1w-2u", sample=torch.rand(5, 2, 6) * 3)
    assert "probably a neuron" in report["alif"].reason
    with pytest.raises(ConversionError, match="Adaptive"):
        quantize_(AdaptiveNet(), "1w-2u", sample=torch.rand(5, 2, 6) * 3, strict=True)


class NoModules(nn.Module):
    """Neurons are lines of the model's forward."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4 * 36, 3)

    def update(self, op, x, mem, spike):
        mem = mem * 0.2 * (1 - spike) + op(x)
        return mem, Fire.apply(mem - 0.5)

    def forward(self, x):
        mem1 = spike1 = mem2 = spike2 = torch.zeros(x.shape[0], 4, 6, 6)
        total = 0
        for _ in range(3):
            mem1, spike1 = self.update(self.conv1, x > torch.rand_like(x), mem1, spike1)
            mem2, spike2 = self.update(self.conv2, spike1, mem2, spike2)
            total = total + self.fc(spike2.flatten(1))
        return total / 3


class FloatInput(NoModules):
    def update(self, op, x, mem, spike):
        return super().update(op, x.float(), mem, spike)


def test_neurons_in_the_models_own_forward_are_said_to_be_nowhere():
    x = torch.rand(2, 1, 6, 6)
    with pytest.warns(UserWarning, match="no membrane potential was quantized"):
        report = quantize_(FloatInput(), "1w-2u", sample=x)
    assert bits(report, "conv1", "conv2", "fc") == (8, 1, 8)
    with pytest.raises(ConversionError, match="no membrane potential"):
        quantize_(FloatInput(), "1w-2u", sample=x, strict=True)


class Stateful(nn.Module):
    """Keeps its potential in a buffer, and is made once for all steps."""

    def __init__(self):
        super().__init__()
        self.register_buffer("v", torch.zeros(1), persistent=False)

    def reset(self):
        self.v = torch.zeros(1)

    def forward(self, x_seq):
        out = []
        for x in x_seq.split(1):
            self.v = self.v * 0.5 + x[0]
            out.append(Fire.apply(self.v - 1.0))
            self.v = self.v - out[-1]
        return torch.stack(out)


class Block(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.fc, self.bn, self.sn = nn.Linear(i, o), nn.BatchNorm1d(o), Stateful()

    def forward(self, x):
        y = self.bn(self.fc(x).flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.sn(y)


def test_neurons_deep_in_blocks_of_an_untrained_network():
    net = nn.Sequential(Block(6, 8), Block(8, 8), Block(8, 8), nn.Linear(8, 2))
    x = torch.rand(4, 2, 6) / 10
    report = quantize_(net, "1w-2u", sample=x)
    assert {row.name for row in report.of("unsupported")} == {"0.sn", "1.sn", "2.sn"}
    assert not any("batch norm" in warning for warning in report.warnings)
    report = quantize_(
        net, "1w-2u", sample=x, strict=True,
        replace={Stateful: lambda old: lif(tau=2.0, decay_input=False, v_reset=None)},
    )  # fmt: skip
    assert all(report[f"{at}.sn"].membrane_bits == 2 for at in range(3))


# ------------------------------------------------------------------ layers


class SelfScaled(nn.Linear):
    """An argument more, and the weight read twice."""

    def forward(self, x, gain=1.0):
        return gain * tf.linear(x, self.weight, self.bias) + 0.0 * self.weight.sum()


class Decoder(nn.Module):
    """Transposed convolutions with groups, output padding and a size asked for in the call."""

    def __init__(self):
        super().__init__()
        self.stem, self.sn1 = layer.Conv2d(2, 4, 3, stride=2, padding=1), neuron.LIFNode()
        self.up = layer.ConvTranspose2d(
            4, 8, 3, stride=2, padding=1, output_padding=1, groups=2, bias=False
        )
        self.sn2 = neuron.LIFNode()
        self.circular = layer.Conv2d(8, 8, 3, padding=1, padding_mode="circular", groups=8)
        self.sn3, self.point = neuron.LIFNode(), layer.Conv2d(8, 1, 1)
        functional.set_step_mode(self, "m")

    def forward(self, x):
        y = self.sn2(self.up(self.sn1(self.stem(x))))
        return self.point(self.sn3(self.circular(y)))


def test_decoders():
    net, x = Decoder(), torch.rand(3, 2, 2, 8, 8) * 3
    report = quantize_(net, "1w-2u", sample=x, strict=True)
    assert bits(report, "stem", "up", "circular", "point") == (8, 1, 1, 8)
    assert net(x).shape == (3, 2, 1, 8, 8)
    trains(net, x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(8, 8, num_layers=2, bidirectional=True, proj_size=4),
        lambda: nn.GRU(8, 8, bias=False, dropout=0.1, num_layers=2),
        lambda: nn.RNN(8, 8, nonlinearity="relu"),
    ],
)
def test_recurrent_layers_between_neurons(make):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.sn1, self.rnn = nn.Linear(6, 8), lif(), make()
            self.sn2, self.fc2 = lif(), nn.Linear(8, 2)

        def forward(self, x):
            return self.fc2(self.sn2(self.rnn(self.sn1(self.fc1(x)))[0]))

    net, x = Net(), torch.rand(4, 2, 6) * 5
    report = quantize_(net, "1w-2u", sample=x, strict=True)
    assert bits(report, "fc1", "rnn", "fc2") == (8, 1, 8)
    assert report.parameters.share(1) > 0.4
    trains(net, x)


def test_a_layer_with_further_arguments():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.sa, self.b, self.sb = nn.Linear(6, 8), lif(), SelfScaled(8, 8), lif()
            self.c = nn.Linear(8, 2)

        def forward(self, x):
            return self.c(self.sb(self.b(self.sa(self.a(x)), gain=2.0)))

    net, x = Net(), torch.rand(3, 2, 6) * 5
    assert bits(quantize_(net, "1w-2u", sample=x, strict=True), "a", "b", "c") == (8, 1, 8)
    trains(net, x)


class EarlyExits(nn.Module):
    """An answer after every block, and one embedding for all words that the head shares."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), lif()) for _ in range(3))
        self.stem, self.exits = nn.Linear(6, 8), nn.ModuleList(nn.Linear(8, 2) for _ in range(3))
        self.sn = lif()

    def forward(self, x):
        h, answers = self.sn(self.stem(x)), []
        for block, leave in zip(self.blocks, self.exits, strict=True):
            h = block(h)
            answers.append(leave(h).mean(0))
        return answers


def test_early_exits_are_lasts_and_blocks_between_them_are_not():
    report = quantize_(EarlyExits(), "1w-2u", sample=torch.rand(4, 2, 6) * 5)
    assert bits(report, "stem", "exits.0", "exits.1", "exits.2") == (8, 8, 8, 8)
    assert bits(report, "blocks.0.0", "blocks.1.0", "blocks.2.0") == (1, 1, 1)


def test_reparametrized_pruned_frozen_and_tied_weights_are_told_of():
    net = nn.Sequential(
        nn.Linear(6, 8), lif(), parametrizations.weight_norm(nn.Linear(8, 8)), lif(),
        nn.Linear(8, 8), lif(), nn.Linear(8, 8), lif(), nn.Linear(8, 2),
    )  # fmt: skip
    net[4].requires_grad_(False)
    net[6].weight = net[8].weight = nn.Parameter(torch.randn(8, 8))
    net[8].bias = None
    x = torch.rand(3, 2, 6)
    with pytest.raises(ConversionError, match="share one weight"):
        quantize_(net, "1w-2u", sample=x)
    config = QuantConfig(rules=(Rule(name="6", weight=8),))
    report = quantize_(net, config, sample=x)
    assert report["2"].action == "unsupported"
    assert "parametrized; remove" in report["2"].reason
    assert report["4"].action == "kept"
    assert "not trained" in report["4"].reason
    assert bits(report, "6", "8") == (8, 8)
    asked = QuantConfig(rules=(Rule(name="6", weight=8), Rule(name="4", weight=1)))
    assert quantize_(net, asked, sample=x)["4"].weight_bits == 1


def test_a_surrogate_that_is_a_module_is_no_neuron():
    fire = surrogate.ATan()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fire, self.fc2, self.sn = nn.Linear(6, 8), fire, nn.Linear(8, 8), lif()

        def forward(self, x):
            return self.sn(self.fc2(self.fire(self.fc1(x))))

    report = quantize_(Net(), "1w-2u", sample=torch.randn(3, 2, 6))
    assert report["fire"].action == "nothing"


def test_fused_layers_of_torch_are_refused_by_strict_and_said_with_their_share():
    net = nn.Sequential(
        nn.Linear(6, 8), lif(), nn.TransformerEncoderLayer(8, 2, 16), lif(), nn.Linear(8, 2)
    )
    report = quantize_(net, "1w-2u", sample=torch.rand(3, 2, 6))
    assert "2.linear1" in {row.name for row in report.of("unsupported")}
    assert any("fused call" in why for _, _, why in report.floating)
    with pytest.raises(ConversionError, match="fused call"):
        quantize_(net, "1w-2u", sample=torch.rand(3, 2, 6), strict=True)
