"""Every neuron of both hosts, and of nobody's: what it carries is rounded, nothing else changes."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import reference as ref
import snntorch as snn
import torch
from numpy.testing import assert_allclose, assert_array_equal
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from qsnn_ext import calibrate, deploy, hosts, quantize_, register_neuron
from qsnn_ext.errors import ConfigError, InputTypeError
from qsnn_ext.quantizers import MembraneQuantizer
from qsnn_ext.snntorch import QAlpha, QLapicque, QRLeaky, QSynaptic
from qsnn_ext.spikingjelly import QuantizedNode, QuantLIFNode

SPIKINGJELLY = {
    "KLIF": (lambda **k: neuron.KLIFNode(**k)),
    "QIF": (lambda **k: neuron.QIFNode(**k)),
    "EIF": (lambda **k: neuron.EIFNode(**k)),
    "Izhikevich": (lambda **k: neuron.IzhikevichNode(a=0.3, b=0.2, **k)),
    "LIAF": (lambda **k: neuron.LIAFNode(torch.relu, False, **k)),
    "SimpleLIF": (lambda **k: neuron.SimpleLIFNode(2.0, False, **k)),
    "SimpleIF": (lambda **k: neuron.SimpleIFNode(**k)),
    "Complementary": (lambda **k: neuron.ComplementaryLIFNode(**k)),
    "integer": (lambda **k: neuron.ILIFNode(**k)),
    "half threshold": (lambda **k: neuron.HalfThresholdIFNode(**k)),
    "activation aware": (lambda **k: neuron.ActivationAwareIFNode(**k)),
    "ternary": (lambda **k: neuron.TernaryLIFNode(**k)),
    "resonate": (lambda **k: neuron.RAFNode(**k)),
}
SINGLE = {
    "OTTT": (lambda **k: neuron.OTTTLIFNode(**k)),
    "SLTT": (lambda **k: neuron.SLTTLIFNode(**k)),
    "CUBA": (lambda **k: neuron.CUBALIFNode()),
    "filter": (lambda **k: layer.SynapseFilter()),
}
SNNTORCH = {
    "Synaptic": (lambda **k: snn.Synaptic(0.9, 0.8, **k)),
    "Alpha": (lambda **k: snn.Alpha(0.9, 0.8, **k)),
    "Lapicque": (lambda **k: snn.Lapicque(beta=0.5, **k)),
    "RLeaky": (lambda **k: snn.RLeaky(0.9, linear_features=6, **k)),
    "RSynaptic": (lambda **k: snn.RSynaptic(0.9, 0.8, linear_features=6, **k)),
    "SLSTM": (lambda **k: snn.SLSTM(6, 6, **k)),
    "DeltaLeaky": (lambda **k: snn.DeltaLeaky(0.3, 0.9, **k)),
}


@pytest.fixture(autouse=True)
def _forget_instances():
    yield
    snn.SpikingNeuron.instances.clear()


def quantized(node, bits):
    kind = hosts.counterpart(node)
    return kind.from_float(node, None if bits is None else MembraneQuantizer(bits))


def states(node):
    return {s.name: getattr(node, s.name) for s in hosts.describe(node).states}


def run(node, x):
    """Outputs and states, step by step or at once as the step mode says."""
    if getattr(node, "step_mode", "s") == "m":
        return node(x), states(node)
    outputs = [node(step) for step in x]
    outputs = [o[0] if isinstance(o, (tuple, list)) else o for o in outputs]
    return torch.stack(outputs), states(node)


@pytest.mark.parametrize(
    ("name", "mode"),
    [*itertools.product(SPIKINGJELLY, "sm"), *itertools.product(SINGLE, "s")],
)
def test_32_bits_are_the_hosts_own(name, mode):
    make = {**SPIKINGJELLY, **SINGLE}[name]
    x = torch.randn(4, 3, 6) * 2
    torch.manual_seed(1)
    theirs = make(step_mode=mode)
    ours = quantized(copy.deepcopy(theirs), None)
    (a, states_a), (b, states_b) = run(ours, x), run(theirs, x)
    assert torch.equal(a, b)
    for name in states_a:
        assert torch.equal(states_a[name], states_b[name])


@pytest.mark.parametrize("name", SPIKINGJELLY)
@pytest.mark.parametrize("bits", [2, 4])
def test_step_modes_agree_and_states_are_on_their_grids(name, bits):
    x = torch.randn(5, 3, 60) * 2
    node = quantized(SPIKINGJELLY[name](step_mode="m"), bits)
    whole, last = run(node, x)
    node.reset()
    node.step_mode = "s"
    steps, after = run(node, x)
    assert torch.equal(whole, steps)
    for name, value in last.items():
        assert torch.equal(value, after[name])
        assert len(value.unique()) <= 2**bits - 1
    assert all(isinstance(m, MembraneQuantizer) for m in getattr(node, "carried", {}).values())


@pytest.mark.parametrize("name", SINGLE)
def test_single_step_nodes_carry_rounded_states(name):
    node = quantized(SINGLE[name](step_mode="s"), 2)
    leaf = (torch.randn(4, 3, 60) * 2).requires_grad_()
    spikes, carried = run(node, leaf)
    assert all(len(value.unique()) <= 3 for value in carried.values())
    if name != "OTTT":  # its trace has no graph
        spikes.sum().backward()
        assert torch.isfinite(leaf.grad).all()


def test_gated_node():
    x = torch.randn(3, 2, 4, 5, 5) * 2
    theirs = neuron.GatedLIFNode(T=3, inplane=4)
    assert torch.equal(quantized(copy.deepcopy(theirs), None)(x), theirs(x))
    functional.reset_net(theirs)
    node = quantized(copy.deepcopy(theirs), 2)
    node(x).sum().backward()
    assert len(node.v.unique()) <= 3
    theirs(x)
    assert len(theirs.v.unique()) > 3


@pytest.mark.parametrize("make", [neuron.NonSpikingIFNode, neuron.NonSpikingLIFNode])
def test_readouts_are_kept_unless_asked_for(make):
    net = nn.Sequential(make())
    assert quantize_(net, "32w-2u")["0"].action == "kept"
    node = quantized(make(), 2)
    assert all(len(v.unique()) <= 3 for v in node(torch.randn(4, 2, 50)))


def test_layers_inside_a_sequence_loop():
    node = neuron.ILCCUBALIFNode(2, 3)
    node = quantized(node, 2)
    node(torch.rand(4, 5, 6))
    assert len(node.v.unique()) <= 3
    assert len(node.c.unique()) <= 3


@pytest.mark.parametrize("name", SNNTORCH)
@pytest.mark.parametrize("order", ["fire_first", "quantize_first"])
def test_snntorchs_states_are_rounded_each_by_itself(name, order):
    node = SNNTORCH[name](init_hidden=True)
    kind = hosts.counterpart(node)
    node = kind.from_float(node, MembraneQuantizer(4), order)
    x = (torch.randn(4, 30, 6) * 2).requires_grad_()
    if name == "DeltaLeaky" and order == "quantize_first":
        with pytest.raises(ConfigError, match="fire_first"):
            node(x[0])
        return
    spikes, carried = run(node, x)
    spikes.sum().backward()
    assert torch.isfinite(x.grad).all()
    for value in carried.values():
        assert (
            len(value.unique()) <= 2 * 15 + 2
        )  # levels, levels of what fired, beside the threshold
    assert hosts.describe(node).readout is False


@pytest.mark.parametrize("name", SNNTORCH)
@pytest.mark.parametrize("delay", [True, False])
def test_32_bits_are_snntorchs_own(name, delay):
    options = {"init_hidden": True}
    if name in ("Synaptic", "RLeaky"):
        options["reset_delay"] = delay
    torch.manual_seed(1)
    theirs = SNNTORCH[name](**options)
    ours = quantized(copy.deepcopy(theirs), None)
    x = torch.randn(4, 3, 6) * 2
    (a, states_a), (b, states_b) = run(ours, x), run(theirs, x)
    assert torch.equal(a, b)
    for key in states_a:
        assert torch.equal(states_a[key], states_b[key])


def test_spiking_lstm_is_a_cell_and_no_readout():
    cell = snn.SConv2dLSTM(2, 4, 3)
    assert not hosts.describe(cell).readout
    node = quantized(cell, 2)
    spikes, syn, mem = node(torch.randn(2, 2, 8, 8))
    assert spikes.shape == mem.shape
    assert len(syn.unique()) <= 3
    assert len(mem.unique()) <= 3


# ------------------------------------------------------------------ the oracle


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_synaptic_is_the_oracles(rng, bits):
    x = rng.normal(0.2, 0.6, size=(12, 3, 40))
    expected = ref.synaptic(x, 0.75, 0.5, 0.875, bits)
    node = QSynaptic(0.75, 0.5, threshold=0.875, bits=bits).double()
    syn = mem = torch.zeros(3, 40, dtype=torch.float64)
    spikes = []
    for step in torch.tensor(x):
        spk, syn, mem = node(step, syn, mem)
        spikes.append(spk)
    assert_array_equal(torch.stack(spikes).detach().numpy(), expected["s"])
    assert_allclose(syn.detach().numpy(), expected["syn"], atol=1e-9)
    assert_allclose(mem.detach().numpy(), expected["mem"], atol=1e-9)
    assert 0.02 < expected["s"].mean() < 0.98


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_recurrent_leaky_is_the_oracles(rng, bits):
    x = rng.normal(0.2, 0.6, size=(12, 3, 40))
    expected = ref.recurrent_leaky(x, 0.75, 0.5, 0.875, bits)
    node = QRLeaky(0.75, V=0.5, all_to_all=False, threshold=0.875, bits=bits).double()
    spk = mem = torch.zeros(3, 40, dtype=torch.float64)
    spikes = []
    for step in torch.tensor(x):
        spk, mem = node(step, spk, mem)
        spikes.append(spk)
    assert_array_equal(torch.stack(spikes).detach().numpy(), expected["s"])
    assert_allclose(mem.detach().numpy(), expected["mem"], atol=1e-9)


class OwnLapicque(snn.Lapicque):
    """The same step, in words of its own: nothing is known of it."""

    def _base_sub(self, x):
        return super()._base_sub(x)


LAPICQUE = {"beta": {"beta": 0.5}, "R and C": {"R": 2.0, "C": 1.5, "time_step": 0.75}}


@pytest.mark.parametrize("order", ["fire_first", "quantize_first"])
@pytest.mark.parametrize("constants", LAPICQUE)
def test_lapicque_runs_fused_and_as_the_hosts_step_does(constants, order):
    x = torch.randn(8, 3, 40) + 0.5
    fused, stepped = (
        hosts.counterpart(made).from_float(made, MembraneQuantizer(3), order)
        for made in (
            kind(**LAPICQUE[constants], init_hidden=True) for kind in (snn.Lapicque, OwnLapicque)
        )
    )
    assert hosts.describe(fused).charge is not None
    assert hosts.describe(stepped).charge is None
    (a, states_a), (b, states_b) = run(fused, x), run(stepped, x)
    assert torch.equal(a, b)
    assert 0.02 < a.mean() < 0.98
    torch.testing.assert_close(states_a["mem"], states_b["mem"])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lapicque_is_the_oracles(rng, bits):
    x = rng.normal(0.4, 0.8, size=(12, 3, 40))
    R, C, step = 2.0, 1.5, 0.75
    leak = step / (R * C)
    expected = ref.recurrent_leaky(leak * R * x, 1 - leak, 0.0, 0.875, bits)
    node = QLapicque(R=R, C=C, time_step=step, threshold=0.875, bits=bits).double()
    mem = torch.zeros(3, 40, dtype=torch.float64)
    spikes = []
    for current in torch.tensor(x):
        spk, mem = node(current, mem)
        spikes.append(spk)
    assert_array_equal(torch.stack(spikes).detach().numpy(), expected["s"])
    assert_allclose(mem.detach().numpy(), expected["mem"], atol=1e-9)
    assert 0.02 < expected["s"].mean() < 0.98


def test_lapicque_that_drops_its_current_is_the_hosts_step():
    assert hosts.describe(snn.Lapicque(beta=0.5, reset_mechanism="zero")).charge is None
    assert hosts.describe(snn.Lapicque(beta=0.5, inhibition=True)).charge is None


def test_lapicque_becomes_an_integer_program():
    net = nn.Sequential(
        nn.Linear(6, 8), snn.Lapicque(beta=0.5, init_hidden=True), nn.Linear(8, 4),
        snn.Lapicque(R=1.0, C=2.0, init_hidden=True, output=True),
    )  # fmt: skip
    quantize_(net, "1w-4u")
    batches = [torch.rand(16, 6) for _ in range(4)]
    calibrate(net, batches)

    def steps(model, x):
        return torch.stack([model(x)[0] for _ in range(4)])

    program = deploy.lower(net.eval(), batches[0], forward=steps)
    assert deploy.compare(net, program, batches, forward=steps).predictions > 0.95


NODES = {
    "QIF": (
        lambda: neuron.QIFNode(tau=2.0, v_c=0.8, a0=1.0, v_rest=0.0, v_reset=-0.125),
        lambda x, v, w: (v + (x + (v - 0.0) * (v - 0.8)) / 2.0, w), -0.125, (-0.125, 0.0),
    ),
    "EIF": (
        lambda: neuron.EIFNode(tau=2.0, delta_T=1.0, theta_rh=0.8, v_rest=0.0, v_reset=-0.125),
        lambda x, v, w: (v + (x + 0.0 - v + np.exp(v - 0.8)) / 2.0, w), -0.125, (-0.125, 0.0),
    ),
    "Izhikevich": (
        lambda: neuron.IzhikevichNode(
            tau=2.0, v_c=0.8, a0=1.0, v_rest=-0.125, w_rest=0.0, tau_w=2.0, a=0.25, b=0.0,
            v_reset=0.0,
        ),
        lambda x, v, w: (
            (h := v + (x + (v + 0.125) * (v - 0.8) - w) / 2.0),
            w + (0.25 * (h + 0.125) - w) / 2.0,
        ),
        0.0, (0.0, 0.0),
    ),
    "KLIF": (
        lambda: neuron.KLIFNode(tau=2.0, decay_input=True, v_reset=0.0),
        lambda x, v, w: (np.maximum(v + (x - v) / 2.0, 0.0), w), 0.0, (0.0, 0.0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NODES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_nonlinear_nodes_are_the_oracles(rng, name, bits):
    make, charge, v_reset, start = NODES[name]
    x = rng.normal(0.8, 1.0, size=(8, 3, 40))
    expected = ref.spikingjelly_node(x, charge, 1.0, v_reset, bits, start)
    node = quantized(make(), bits).double()
    node.step_mode = "m"
    spikes = node(torch.tensor(x))
    assert_array_equal(spikes.detach().numpy(), expected["s"])
    assert_allclose(node.v.detach().numpy(), expected["v"], atol=1e-9)
    if name == "Izhikevich":
        assert_allclose(node.w.detach().numpy(), expected["w"], atol=1e-9)
    assert 0.02 < expected["s"].mean() < 0.98


# ------------------------------------------------------------------ subclasses, copies, order


class Trivial(neuron.LIFNode):
    def __init__(self):
        super().__init__(tau=2.0, decay_input=False, step_mode="m")

    @property
    def nice(self):
        return 1


class OwnCharge(neuron.LIFNode):
    def single_step_functional_forward(self, inputs, states, **kwargs):
        h = 0.7 * states[0] + 0.5 * inputs[0]
        spikes = self.surrogate_function(h - self.v_threshold)
        return (spikes,), (h * (1 - spikes), *states[1:])


def test_a_trivial_subclass_is_what_it_extends():
    x = torch.rand(4, 3, 5) * 3
    node = quantized(Trivial(), 2)
    assert isinstance(node, Trivial)
    assert hosts.describe(node).charge is not None
    plain = QuantLIFNode(tau=2.0, decay_input=False, step_mode="m", bits=2)
    assert torch.equal(node(x), plain(x))
    for copied in (copy.deepcopy(node), pickle.loads(pickle.dumps(node))):
        assert type(copied) is type(node)
        copied.reset()
        plain.reset()
        assert torch.equal(copied(x), plain(x))
    assert type(node.to_float()) is Trivial
    assert not hasattr(node, "membrane")


def test_a_subclass_with_its_own_charge_runs_that_charge():
    x = torch.rand(4, 3, 50) * 3
    node = quantized(OwnCharge(step_mode="m"), 2)
    assert hosts.describe(node).charge is None
    spikes = node(x)
    v, q = torch.zeros(3, 50), MembraneQuantizer(2)
    for t, step in enumerate(x):
        h = 0.7 * v + 0.5 * step
        s = (h >= 1).float()
        assert torch.equal(spikes[t], s)
        v = q(h * (1 - s))
    assert torch.equal(node.v, v)


def test_algorithm_1_needs_a_charge_to_round():
    with pytest.raises(ConfigError, match="fire_first"):
        hosts.counterpart(neuron.KLIFNode()).from_float(
            neuron.KLIFNode(), MembraneQuantizer(2), "quantize_first"
        )
    node = neuron.KLIFNode()
    with pytest.raises(ConfigError):
        QuantizedNode.over(neuron.KLIFNode).from_float(node, MembraneQuantizer(2), "quantize_first")
    assert type(node) is neuron.KLIFNode
    assert not hasattr(node, "order")


def test_classes_to_build_with():
    node = QAlpha(0.9, 0.8, bits=3, init_hidden=True)
    assert node.bits == 3
    assert isinstance(node, snn.Alpha)
    assert sorted(node.carried) == ["syn_exc", "syn_inh"]
    before = len(snn.SpikingNeuron.instances)
    with pytest.raises(ConfigError):
        QSynaptic(0.9, 0.8, bits=1)
    assert len(snn.SpikingNeuron.instances) == before


def test_stateless_neurons_hold_nothing_to_quantize():
    net = nn.Sequential(neuron.PSN(T=2), snn.StateLeaky(0.9, 4))
    report = quantize_(net, "32w-2u", strict=True)
    assert [report[name].action for name in "01"] == ["nothing", "nothing"]


# ------------------------------------------------------------------ neurons of nobody's


class MemUpdate(nn.Module):
    """A neuron written from scratch: one step a call, its potential an attribute."""

    def __init__(self):
        super().__init__()
        self.mem = 0.0

    def forward(self, x):
        h = 0.5 * self.mem + x
        spikes = (h > 1).float()
        self.mem = h * (1 - spikes)
        return spikes


def test_a_registered_neuron_is_quantized():
    net = nn.Sequential(MemUpdate())
    register_neuron(MemUpdate, states=("mem",))
    try:
        assert quantize_(net, "32w-2u")["0"].membrane_bits == 2
        for step in torch.rand(4, 2, 50) * 2:
            net(step)
        assert len(net[0].mem.unique()) <= 3
        assert isinstance(net[0], MemUpdate)
        assert pickle.loads(pickle.dumps(net))[0].bits == 2
        assert quantize_(net, "32w-32u").changed
        assert type(net[0]) is MemUpdate
    finally:
        from qsnn_ext import registered

        registered._registered.clear()


def test_wrong_registrations_are_refused():
    with pytest.raises(InputTypeError, match="class of modules"):
        register_neuron(MemUpdate(), states=("mem",))
    with pytest.raises(ConfigError, match="states"):
        register_neuron(MemUpdate, states=())
