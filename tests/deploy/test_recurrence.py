"""Spikes that come back a step later, and neurons with a second state."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import snntorch as snn
import torch
from spikingjelly.activation_based import layer, neuron
from torch import nn

import qsnn_ext
from qsnn_ext import hosts
from qsnn_ext import layers as own
from qsnn_ext.deploy import DeployedModel, compare, lower
from qsnn_ext.deploy.program import Delay
from qsnn_ext.errors import FormatError, InputError, LoweringError
from qsnn_ext.spikingjelly import QuantLIFNode
from tests.deploy.networks import make_dyadic, reset
from tests.deploy.test_forwards import answers_alike, grid

HIDDEN = 12


class Explicit(nn.Module):
    """A loop over time that hands on all states of one neuron."""

    def __init__(self, lif, features=HIDDEN):
        super().__init__()
        self.fc, self.lif, self.out = (
            own.QuantLinear(6, features),
            lif,
            own.QuantLinear(features, 4),
        )

    def forward(self, x):
        states, spikes = None, []
        for step in x:
            spk, *states = self.lif(self.fc(step), *(states or ()))
            states = [spk, *states] if isinstance(self.lif, (snn.RLeaky, snn.RSynaptic)) else states
            spikes.append(self.out(spk))
        return torch.stack(spikes).mean(0)


class Hidden(nn.Module):
    def __init__(self, lif, features=HIDDEN):
        super().__init__()
        self.fc, self.lif, self.out = (
            own.QuantLinear(6, features),
            lif,
            own.QuantLinear(features, 4),
        )

    def forward(self, x):
        return torch.stack([self.out(self.lif(self.fc(step))) for step in x]).mean(0)


def recurrent(kind, layer_=None, **options):
    lif = kind(beta=0.5, all_to_all=True, linear_features=HIDDEN, **options)
    lif.recurrent = own.QuantLinear(HIDDEN, HIDDEN) if layer_ is None else layer_
    return lif


NEURONS = {
    "RLeaky": lambda **o: recurrent(snn.RLeaky, **o),
    "RLeaky binary": lambda **o: recurrent(snn.RLeaky, own.BinaryLinear(HIDDEN, HIDDEN), **o),
    "RLeaky one to one": lambda **o: snn.RLeaky(
        beta=0.5, V=torch.arange(HIDDEN) / 8 - 0.5, all_to_all=False, **o
    ),
    "RLeaky zero": lambda **o: recurrent(
        snn.RLeaky, reset_mechanism="zero", reset_delay=False, **o
    ),
    "Synaptic": lambda **o: snn.Synaptic(alpha=0.5, beta=0.5, **o),
    "Synaptic zero": lambda **o: snn.Synaptic(
        alpha=0.75, beta=0.5, reset_mechanism="zero", reset_delay=False, **o
    ),
    "RSynaptic": lambda **o: recurrent(snn.RSynaptic, alpha=0.5, **o),
}  # fmt: skip


@pytest.mark.parametrize("style", ["explicit", "hidden"])
@pytest.mark.parametrize("name", NEURONS)
def test_neurons_of_snntorch(name, style):
    torch.manual_seed(0)
    if style == "explicit":
        net = Explicit(NEURONS[name]())
    else:
        net = Hidden(NEURONS[name](init_hidden=True))
    program = answers_alike(net, grid(6, 3, 6))
    assert len(program.delays) == ("R" in name)


@pytest.mark.parametrize("style", ["explicit", "hidden"])
def test_a_forward_around_the_hosts(style):
    class Louder(snn.RLeaky):
        def forward(self, x, *states):
            return super().forward(x * 2, *states)

    torch.manual_seed(0)
    net = (Explicit if style == "explicit" else Hidden)(
        recurrent(Louder, init_hidden=style == "hidden")
    )
    answers_alike(net, grid(6, 3, 6))


def test_convolutional_feedback():
    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = own.QuantConv2d(2, 4, 3)
            self.lif = snn.RLeaky(beta=0.5, conv2d_channels=4, kernel_size=3, init_hidden=True)
            self.lif.recurrent = own.BinaryConv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return sum(self.lif(self.conv(step)) for step in x)

    torch.manual_seed(0)
    answers_alike(Conv(), grid(5, 3, 2, 8, 8))


def linear_container(step_mode, bits):
    node = QuantLIFNode(bits=bits, step_mode="s")
    container = layer.LinearRecurrentContainer(node, 8, HIDDEN, step_mode=step_mode)
    container.rc = own.QuantLinear(8 + HIDDEN, HIDDEN)
    return container


@pytest.mark.parametrize("bits", [2, 4, None])
@pytest.mark.parametrize("first", [True, False], ids=["first", "hidden"])
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_linear_recurrent_containers(step_mode, first, bits):
    class Rnn(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = own.QuantLinear(8, 8)
            self.lif = QuantLIFNode(step_mode=step_mode)
            self.rnn, self.out = linear_container(step_mode, bits), own.QuantLinear(HIDDEN, 4)

        def step(self, x):
            return self.out(self.rnn(x if first else self.lif(self.fc(x))))

        def forward(self, x):
            y = self.step(x) if step_mode == "m" else torch.stack([self.step(s) for s in x])
            return y.mean(0)

    torch.manual_seed(0)
    program = answers_alike(Rnn(), grid(6, 3, 8))
    assert len(program.delays) == 1


def test_element_wise_recurrent_containers():
    class Rnn(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.fc = own.QuantLinear(6, HIDDEN)
            self.rnn = layer.ElementWiseRecurrentContainer(
                QuantLIFNode(step_mode="s"), function, step_mode="m"
            )

        def forward(self, x):
            return self.rnn(self.fc(x))

    torch.manual_seed(0)
    answers_alike(Rnn(lambda y, x: x + y), grid(6, 3, 6))
    with pytest.raises(LoweringError, match=r"^rnn: its element-wise function is not the sum"):
        lower(make_dyadic(Rnn(lambda y, x: x - y)), grid(6, 3, 6))


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_delays_of_spikes(step_mode):
    class Delayed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = own.QuantLinear(6, 8)
            self.lif, self.delay = QuantLIFNode(step_mode=step_mode), layer.Delay(2, step_mode)

        def forward(self, x):
            if step_mode == "m":
                s = self.lif(self.fc(x))
                return self.delay(s) + s
            spikes = [self.lif(self.fc(step)) for step in x]
            return torch.stack([self.delay(s) + s for s in spikes])

    torch.manual_seed(0)
    program = answers_alike(Delayed(), grid(6, 3, 6))
    assert sum(isinstance(op, Delay) for op in program.ops) == 2


def test_streaming_goes_on_from_a_saved_state():
    torch.manual_seed(0)
    x = grid(6, 3, 6)
    program = lower(make_dyadic(Hidden(NEURONS["RSynaptic"](init_hidden=True))), x)
    for backend in ("auto", "numpy"):
        net = DeployedModel(program, backend)
        codes = net.codes(x)
        session = net.session(3)
        whole = [session.step(c)[0] for c in codes]
        session.reset()
        for c in codes[:3]:
            session.step(c)
        saved = session.state()
        assert "lif.last" in saved
        other = net.session(3)
        other.restore(saved)
        for c, expected in zip(codes[3:], whole[3:], strict=True):
            np.testing.assert_array_equal(other.step(c)[0], expected)
        with pytest.raises(InputError, match=r"lif\.last"):
            other.restore({**saved, "lif.last": saved["lif.last"] + 2})


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("style", ["explicit", "hidden", "by name", "rates of their own"])
def test_alpha_read_outs(style, bits):
    """Two filtered currents; the potential is their difference and may be the answer."""
    names = ("syn_exc", "syn_inh", "mem")
    rates = torch.tensor([0.9, 0.8, 0.95, 0.85]) if style == "rates of their own" else 0.9

    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            hidden = style == "hidden"
            self.fc1, self.fc2, self.fc3 = (
                nn.Linear(6, HIDDEN),
                nn.Linear(HIDDEN, 4),
                nn.Linear(4, 2),
            )
            self.lif = snn.Leaky(beta=0.7, init_hidden=True)
            self.out = snn.Alpha(
                alpha=rates,
                beta=rates - 0.2,
                reset_mechanism="none",
                init_hidden=hidden,
                output=hidden,
            )

        def forward(self, x):
            states, potentials, answers = (), [], []
            for step in x:
                current = self.fc2(self.lif(self.fc1(step)))
                if style == "by name":
                    spk, *states = self.out(current, **dict(zip(names, states, strict=False)))
                else:
                    spk, *states = self.out(current, *(() if style == "hidden" else states))
                potentials.append(states[-1])
                answers.append(self.fc3(spk))
            return torch.stack(potentials), torch.stack(answers)

    torch.manual_seed(0)
    net, x = Read(), torch.rand(10, 3, 6) * 3
    rule = [] if bits else [qsnn_ext.Rule.keep(name="out")]
    config = qsnn_ext.QuantConfig(weight=8, first=8, last=8, membrane=4, rules=tuple(rule))
    qsnn_ext.quantize_(net, config, sample=x)
    net.eval()
    qsnn_ext.calibrate(net, [torch.rand(10, 3, 6) * 3])
    program = lower(net, x)
    report = compare(net, program, [x], quantize_input=True)
    assert min(a.agreement for a in report.layers) >= 0.999, str(report)
    assert report.layers[0].rate_model > 0.02
    engine, reference = DeployedModel(program), DeployedModel(program, "numpy")
    for a, b in zip(engine.integers(x), reference.integers(x), strict=True):
        np.testing.assert_array_equal(a, b)
    shown = torch.from_numpy(engine.inputs(engine.codes(x))).float()
    reset(net)
    with torch.no_grad():
        expected = net(shown)
    for got, wanted in zip(engine(x), expected, strict=True):
        np.testing.assert_allclose(got, wanted.numpy(), atol=1e-3)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", ["Synaptic", "RSynaptic"])
def test_quantized_synaptic_currents(kind, bits):
    """Both states of a neuron are carried with k bits; the current is used before it is rounded."""
    torch.manual_seed(0)
    net = Hidden(NEURONS[kind](init_hidden=True))
    x = torch.rand(12, 4, 6)
    qsnn_ext.quantize_(net, {"weight": 1, "membrane": bits}, sample=x)
    net.fc.weight.data.mul_(8)
    net.eval()
    qsnn_ext.calibrate(net, [torch.rand(12, 8, 6)])
    assert {s.quantizer.bits for s in hosts.describe(net.lif).rounded if s.name != "spk"} == {bits}
    program = lower(net, x)
    assert len(program.delays) == 1 + (kind == "RSynaptic")
    report = compare(net, program, [x], quantize_input=True)
    assert report.layers[-1].rate_model > 0.02
    assert min(a.agreement for a in report.layers) >= 0.999, str(report)
    engine, reference = DeployedModel(program), DeployedModel(program, "numpy")
    np.testing.assert_array_equal(engine.integers(x)[0], reference.integers(x)[0])
    codes = engine.codes(x)
    session, other = engine.session(4), reference.session(4)
    for c in codes[:5]:
        session.step(c)
        other.step(c)
    saved = session.state()
    for name, state in other.state().items():
        np.testing.assert_array_equal(saved[name], state)
    resumed = engine.session(4)
    resumed.restore(saved)
    for c in codes[5:]:
        np.testing.assert_array_equal(resumed.step(c)[0], session.step(c)[0])


def test_a_delayed_current_must_have_a_range():
    torch.manual_seed(0)
    net = make_dyadic(Hidden(NEURONS["Synaptic"](init_hidden=True)))
    program = lower(net, grid(4, 3, 6))
    current = next(i for i, v in enumerate(program.values) if i and v.planes == 0)
    v = program.values[current]
    program.values.append(dataclasses.replace(v, name="late"))
    program.ops.append(Delay("late", current, len(program.values) - 1))
    with pytest.raises(FormatError, match=r"late: it delays counts, spikes, or membrane outputs"):
        program.validate()


class TestRefusals:
    @pytest.mark.parametrize(
        ("lif", "match"),
        [
            (snn.Alpha(alpha=0.75, beta=0.5, init_hidden=True),
             r"^lif: a spike of an Alpha resets two currents.*reset_mechanism='none'"),
            (snn.RLeaky(beta=0.5, linear_features=HIDDEN, init_hidden=True),
             r"^lif\.recurrent: its weights are floating point"),
            (snn.Synaptic(alpha=0.5, beta=0.5, reset_mechanism="zero", init_hidden=True),
             r"^lif: its delayed reset to zero drops the current"),
        ],
    )  # fmt: skip
    def test_by_name(self, lif, match):
        with pytest.raises(LoweringError, match=match):
            lower(make_dyadic(Hidden(lif)), grid(4, 3, 6))

    def test_a_step_of_its_own(self):
        """What a subclass overrides is not what the host's class computes."""

        class Thrice(snn.Synaptic):
            def _base_state_function(self, x):
                syn = self.alpha * self.syn + 3 * x
                return syn, self.beta * self.mem + syn

        lif = Thrice(alpha=0.5, beta=0.5, init_hidden=True)
        with pytest.raises(LoweringError, match=r"^lif: a Thrice has no integer form"):
            lower(make_dyadic(Hidden(lif)), grid(4, 3, 6))

    def test_spikes_of_another_neuron(self):
        class Crossed(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc, self.lif = own.QuantLinear(6, HIDDEN), NEURONS["RLeaky"]()
                self.other = QuantLIFNode()

            def forward(self, x):
                mem = None
                for step in x:
                    current = self.fc(step)
                    spk, mem = self.lif(current, self.other(current), mem)
                return spk

        with pytest.raises(LoweringError, match=r"^lif: the spikes it is given are not its own"):
            lower(make_dyadic(Crossed()), grid(4, 3, 6))


def test_real_scales():
    """With a synaptic current and feedback of trained scales spikes agree too."""
    torch.manual_seed(0)
    net = Hidden(NEURONS["RSynaptic"](init_hidden=True)).eval()
    net.lif.alpha.fill_(0.83)
    net.lif.beta.fill_(0.71)
    net.fc.weight.data.mul_(3)
    x = torch.rand(20, 16, 6) * 3
    reset(net)
    report = compare(net, lower(net, x), [x])
    assert report.layers[-1].rate_model > 0.05
    assert min(a.agreement for a in report.layers) > 0.99
    assert neuron is not None
