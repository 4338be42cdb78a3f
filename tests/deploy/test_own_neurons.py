"""Neurons of a user's own, and read-outs: what their step computes decides what they become."""

from __future__ import annotations

import numpy as np
import pytest
import snntorch as snn
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from qsnn_ext import calibrate, hosts, quantize_
from qsnn_ext.deploy import DeployedModel, compare, lower
from qsnn_ext.deploy.lowering.probing import probe
from qsnn_ext.errors import LoweringError


class Reader(neuron.SimpleLIFNode):
    """Charges, and answers with its potential."""

    def single_step_forward(self, x):
        self.neuronal_charge(x)
        return self.v


class Slower(neuron.SimpleLIFNode):
    """Leaks in a way of its own."""

    def neuronal_charge(self, x):
        self.v = self.v * 0.75 + x * 0.5 + 0.125


class Squared(neuron.SimpleLIFNode):
    def neuronal_charge(self, x):
        self.v = self.v * 0.5 + x * x


class Bounded(neuron.SimpleLIFNode):
    """Looks like an ordinary one until its potential is large."""

    def neuronal_charge(self, x):
        self.v = (self.v * 0.5 + x).clamp(min=-8.0)


class Tiring(neuron.SimpleLIFNode):
    """Another neuron after its first step."""

    steps = 0

    def neuronal_charge(self, x):
        self.v = self.v * 0.5**self.steps + x
        self.steps += 1


class Net(nn.Module):
    def __init__(self, lif, out=None, read=False):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.lif1, self.lif2, self.out = neuron.LIFNode(), lif, out
        self.read = read

    def forward(self, x):
        answers = []
        for step in x:
            y = self.fc3(self.lif2(self.fc2(self.lif1(self.fc1(step)))))
            answers.append(y if self.out is None else self.out(y))
        return self.out.v if self.read else torch.stack(answers)


def prepared(net, x):
    quantize_(net, "1w-2u", sample=x)
    net.fc1.weight.data.mul_(4)
    net.eval()
    functional.reset_net(net)
    calibrate(net, [torch.rand(x.shape)])
    return net


def agrees(net, x):
    program = lower(net, x)
    report = compare(net, program, [x], quantize_input=True)
    assert all(a.agreement == 1.0 for a in report.layers), str(report)
    assert max(a.rate_model for a in report.layers) > 0.02
    assert report.output_error < 1e-4
    engine, reference = DeployedModel(program), DeployedModel(program, "numpy")
    np.testing.assert_array_equal(engine.integers(x)[0], reference.integers(x)[0])
    return report


@pytest.mark.parametrize("kind", [Slower, neuron.SimpleLIFNode, neuron.SimpleIFNode])
def test_a_neuron_with_a_charge_of_its_own(kind):
    torch.manual_seed(1)
    x = torch.rand(6, 3, 6)
    lif = kind() if kind is neuron.SimpleIFNode else kind(tau=2.0, decay_input=True)
    report = agrees(prepared(Net(lif), x), x)
    assert [a.name for a in report.layers] == ["lif1", "lif2"]


@pytest.mark.parametrize("read", [True, False], ids=["kept", "answer"])
def test_a_neuron_that_answers_with_its_potential(read):
    torch.manual_seed(1)
    x = torch.rand(6, 3, 6)
    net = Net(neuron.LIFNode(), Reader(tau=2.0, decay_input=True), read)
    agrees(prepared(net, x), x)


def test_what_a_step_shows():
    kinds = (Reader, Slower, Squared, Bounded, Tiring, neuron.SimpleLIFNode)
    made = {kind: kind(tau=4.0, decay_input=True) for kind in kinds}
    found = {kind: probe(hosts.describe(one)) for kind, one in made.items()}
    for kind in (Squared, Bounded, Tiring):
        assert found[kind] is None, kind
    assert found[Reader].readout
    assert not found[Slower].readout
    charge = found[Slower].charge
    assert (charge.decay, charge.gain, charge.offset) == (0.75, 0.5, 0.125)
    charge = found[neuron.SimpleLIFNode].charge
    assert (charge.decay, charge.gain, charge.offset) == (0.75, 0.25, 0.0)


def test_a_charge_that_is_no_line_is_refused_by_name():
    torch.manual_seed(1)
    x = torch.rand(6, 3, 6)
    with pytest.raises(LoweringError, match=r"^lif2: a QuantSquared has no integer form.*charges"):
        lower(prepared(Net(Squared(tau=2.0, decay_input=True)), x), x)


class Halved(neuron.LIFNode):
    def forward(self, x):
        return super().forward(x) * 0.5


class Louder(neuron.LIFNode):
    def forward(self, x):
        return super().forward(x * 2 + 0.25)


@pytest.mark.parametrize("kind", [Halved, Louder])
def test_a_forward_around_the_neurons(kind):
    torch.manual_seed(1)
    x = torch.rand(6, 3, 6)
    agrees(prepared(Net(kind()), x), x)
    assert "forward" in vars(kind)
    assert neuron.LIFNode.forward.__qualname__.startswith("MemoryModule")


class Edited(nn.Module):
    """What it does to the potential of its neuron, beside calling it."""

    def __init__(self, when):
        super().__init__()
        self.fc1, self.lif, self.fc2 = nn.Linear(6, 16), neuron.LIFNode(), nn.Linear(16, 4)
        self.when = when

    def forward(self, x):
        answers = []
        if self.when == "start":
            self.lif.reset()
            self.lif.v = torch.full((x.shape[1], 16), 0.9)
        for t, step in enumerate(x):
            if self.when == "reset" and t == 2:
                functional.reset_net(self)
            answers.append(self.fc2(self.lif(self.fc1(step))))
            if self.when == "leak":
                self.lif.v = self.lif.v * 0.5
            if self.when == "in place":
                self.lif.v.mul_(0.5)
        return torch.stack(answers)


@pytest.mark.parametrize("when", ["start", "reset", "leak", "in place", "never"])
def test_a_potential_that_the_model_changes_is_refused(when):
    torch.manual_seed(1)
    net, x = Edited(when), torch.rand(5, 3, 6)
    quantize_(net, "1w-2u", sample=x)
    net.eval()
    functional.reset_net(net)
    calibrate(net, [x])
    functional.reset_net(net)
    if when == "never":
        lower(net, x)
        return
    match = "before its first step" if when == "start" else "between two of its steps"
    with pytest.raises(LoweringError, match=rf"^lif: its membrane potential.*{match}.*from rest"):
        lower(net, x)


class MultiStep(nn.Module):
    def __init__(self, out):
        super().__init__()
        self.body = nn.Sequential(
            layer.Linear(6, 16), neuron.LIFNode(), layer.Linear(16, 16), neuron.LIFNode(),
            layer.Linear(16, 4),
        )  # fmt: skip
        self.out = out
        functional.set_step_mode(self, "m")

    def forward(self, x):
        return self.out(self.body(x))


class Doubled(neuron.NonSpikingLIFNode):
    def forward(self, x_seq):
        return super().forward(x_seq * 2)


class Thrice(neuron.NonSpikingLIFNode):
    def neuronal_charge(self, x):
        self.v = self.v * 0.5 + 3 * x


@pytest.mark.parametrize("decode", ["max-mem", "mean-mem", "last_mem", None])
@pytest.mark.parametrize("kind", [neuron.NonSpikingLIFNode, neuron.NonSpikingIFNode, Doubled])
def test_read_outs_of_the_host(kind, decode):
    torch.manual_seed(1)
    x = torch.rand(6, 3, 6)
    net = MultiStep(kind(decode=decode))
    quantize_(net, "1w-2u", sample=x)
    net.body[0].weight.data.mul_(4)
    net.eval()
    functional.reset_net(net)
    calibrate(net, [torch.rand(x.shape)])
    program = lower(net, x)
    with torch.no_grad():
        expected = net(x)
    functional.reset_net(net)
    got = DeployedModel(program)(x)
    if decode is None:
        expected, got = torch.stack(expected), np.stack(got)
    np.testing.assert_allclose(got, expected.numpy(), atol=2e-3)


def calibrated(net):
    """Quantize a network and fix its scales; the input it was shown."""
    torch.manual_seed(1)
    x = torch.rand(6, 3, 6)
    quantize_(net, "1w-2u", sample=x)
    net.eval()
    functional.reset_net(net)
    calibrate(net, [x])
    return x


def test_a_read_out_that_charges_in_its_own_way_is_refused_by_name():
    net = MultiStep(Thrice(decode="last_mem"))
    x = calibrated(net)
    with pytest.raises(LoweringError, match=r"^out: a Thrice has no integer form"):
        lower(net, x)


def test_a_filter_that_spikes_switch_off_is_refused_by_name():
    net = MultiStep(nn.Identity())
    net.body.insert(4, layer.SynapseFilter(tau=4.0, step_mode="m"))
    x = calibrated(net)
    with pytest.raises(LoweringError, match=r"^body\.4: a SynapseFilter leaks only.*use a"):
        lower(net, x)


def test_thresholds_below_a_level():
    """Regression networks draw a threshold for every neuron, some below the largest level."""

    class Drawn(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2, self.fc3 = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 1)
            self.lif1, self.lif2 = (
                snn.Leaky(beta=torch.rand(16), threshold=torch.rand(16) + 0.05, learn_beta=True)
                for _ in range(2)
            )

        def forward(self, x):
            mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
            out = []
            for step in x:
                spk, mem1 = self.lif1(self.fc1(step), mem1)
                spk, mem2 = self.lif2(self.fc2(spk), mem2)
                out.append(self.fc3(spk))
            return torch.stack(out)

    torch.manual_seed(1)
    x = torch.rand(12, 8, 6) * 4
    net = Drawn()
    quantize_(net, "1w-4u", sample=x)
    net.eval()
    calibrate(net, [torch.rand(x.shape) * 4])
    assert float(net.lif1.membrane.alpha) > float(net.lif1.threshold.min())
    agrees(net, x)
