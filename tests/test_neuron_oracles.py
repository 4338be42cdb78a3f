"""Every neuron that is quantized computes what its host's equations say, its states rounded."""

import equations as eq
import numpy as np
import pytest
import reference as ref
import snntorch as snn
import torch
from numpy.testing import assert_allclose, assert_array_equal
from spikingjelly.activation_based import layer, neuron, rnn, surrogate

from qsnn_ext import hosts
from qsnn_ext.quantizers import MembraneQuantizer

BITS = [2, 4, 8]


@pytest.fixture(autouse=True)
def _forget_instances():
    yield
    snn.SpikingNeuron.instances.clear()


def quantized(node, bits):
    return hosts.counterpart(node).from_float(node, MembraneQuantizer(bits)).double()


def compare(node, x, expected, names, exact=True, call=None):
    """Outputs of ``node`` over ``x``, and its states, against the oracle's."""
    outputs, states = expected
    found = call(node, torch.tensor(x)) if call else by_steps(node, torch.tensor(x))
    (assert_array_equal if exact else assert_allclose)(found.detach().numpy(), outputs)
    for name, value in zip(names, states, strict=True):
        assert_allclose(getattr(node, name).detach().numpy(), value, atol=1e-9, err_msg=name)
    assert 0.01 < (outputs != 0).mean() < 0.99


def by_steps(node, x):
    outputs = [node(step) for step in x]
    return torch.stack([o[0] if isinstance(o, (tuple, list)) else o for o in outputs])


def at_once(node, x):
    node.step_mode = "m"
    return node(x)


#: Node, step, reset values, names of the states.
NODES = {
    "SimpleLIFNode": (lambda: neuron.SimpleLIFNode(2.0, False), eq.simple_lif, (0.0,), "v"),
    "SimpleIFNode": (neuron.SimpleIFNode, eq.simple_if, (0.0,), "v"),
    "SLTTLIFNode": (neuron.SLTTLIFNode, eq.sltt, (0.0,), "v"),
    "ILIFNode": (neuron.ILIFNode, eq.integer_lif, (0.0,), "v"),
    "HalfThresholdIFNode": (neuron.HalfThresholdIFNode, eq.half_threshold, (0.5,), "v"),
    "TernaryLIFNode": (neuron.TernaryLIFNode, eq.ternary_lif, (0.0,), "v"),
    "TernaryIFNode": (neuron.TernaryIFNode, eq.ternary_if, (0.0,), "v"),
    "ComplementaryLIFNode": (neuron.ComplementaryLIFNode, eq.complementary, (0.0, 0.0), "vm"),
    "CUBALIFNode": (neuron.CUBALIFNode, eq.cuba, (0.0, 0.0), "vc"),
    "RAFNode": (neuron.RAFNode, eq.resonate, (0.0, 0.0), "vu"),
}
SINGLE_STEP_ONLY = ("SLTTLIFNode", "CUBALIFNode")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("name", "call"),
    [(n, c) for n in NODES for c in (by_steps, at_once)
     if c is by_steps or n not in SINGLE_STEP_ONLY],
)  # fmt: skip
def test_nodes(rng, name, call, bits):
    make, step, start, names = NODES[name]
    x = rng.normal(0.4, 1.0, size=(8, 3, 40))
    compare(quantized(make(), bits), x, eq.run(x, start, step, bits), names, call=call)


@pytest.mark.parametrize("bits", BITS)
def test_analog_output(rng, bits):
    x = rng.normal(0.8, 1.5, size=(8, 3, 40))
    node = quantized(neuron.LIAFNode(torch.relu, False), bits)
    compare(node, x, eq.run(x, (0.0,), eq.liaf, bits), "v", exact=False)


@pytest.mark.parametrize("bits", BITS)
def test_online_training(rng, bits):
    x = rng.normal(0.4, 1.0, size=(8, 3, 40))
    node = quantized(neuron.OTTTLIFNode(), bits)
    expected = eq.run(x, (0.0, 0.0), eq.ottt, bits, floating=(1,))
    compare(node, x, expected, ("v", "trace"))


@pytest.mark.parametrize("bits", BITS)
def test_gated(rng, bits):
    x = rng.normal(0.2, 0.6, size=(6, 3, 4, 5, 5))
    node = quantized(neuron.GatedLIFNode(T=6, inplane=4), bits)
    names = ("alpha", "beta", "gamma", "tau", "v_threshold", "linear_decay", "v_subreset")
    with torch.no_grad():
        for p in node.parameters():
            p.copy_(torch.tensor(rng.normal(0, 0.7, size=tuple(p.shape))))
    arrays = {n: getattr(node, n).detach().numpy()[:, None, None] for n in names}
    conduct = node.conduct.detach().numpy()[:, :, None, None]
    expected = eq.run(x, (0.0,), eq.gated(arrays, conduct), bits)
    compare(node, x, expected, "v", call=at_once)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("call", [by_steps, at_once])
def test_synapse_filter(rng, call, bits):
    x = (rng.random((8, 3, 40)) < 0.3).astype(float)
    node = quantized(layer.SynapseFilter(tau=4.0), bits)
    expected = eq.run(x, (0.0,), eq.synapse_filter, bits)
    compare(node, x, expected, ("out_i",), exact=False, call=call)


@pytest.mark.parametrize("bits", BITS)
def test_readout_that_is_asked_for(rng, bits):
    x = rng.normal(0.0, 1.0, size=(8, 3, 40))
    node = quantized(neuron.NonSpikingLIFNode(tau=2.0), bits)
    _, (v,) = eq.run(x, (0.0,), eq.leaky_readout, bits)
    assert_allclose(node(torch.tensor(x))[-1].numpy(), v, atol=1e-9)


def gate(x):
    return eq.sigmoid(4 * x)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", [rnn.SpikingLSTMCell, rnn.SpikingGRUCell])
def test_cells(rng, kind, bits):
    """With smooth gates, whose states are no bits."""
    x = rng.normal(0.0, 1.0, size=(6, 3, 5))
    cell = quantized(kind(5, 7, surrogate_function1=surrogate.Sigmoid(spiking=False)), bits)
    w = [cell.linear_ih.weight, cell.linear_hh.weight, cell.linear_ih.bias, cell.linear_hh.bias]
    w_x, w_h, b_x, b_h = (t.detach().numpy() for t in w)
    is_lstm = kind is rnn.SpikingLSTMCell
    step = (
        eq.lstm_cell(w_x, w_h, b_x + b_h, gate)
        if is_lstm
        else eq.gru_cell(w_x, w_h, b_x, b_h, gate)
    )
    q, state, carried = ref.Membrane(bits), None, np.zeros((3, 7))
    for x_t in x:
        out, (carried,) = step(x_t, (carried,))
        carried = q(carried)
        state = cell(torch.tensor(x_t), state)
        found = state if is_lstm else (state, state)
        assert_allclose(found[1].detach().numpy(), carried, atol=1e-9)
        assert_allclose(found[0].detach().numpy(), out if is_lstm else carried, atol=1e-9)
        assert len(np.unique(carried)) <= 2**bits - 1


@pytest.mark.parametrize("kind", [rnn.SpikingLSTMCell, rnn.SpikingGRUCell])
def test_cells_of_bits_and_cells_of_32_bits_are_the_hosts(kind):
    """Where the gates fire, a cell's state is of bits, which rounding keeps."""
    x = torch.randn(6, 3, 5)
    torch.manual_seed(1)
    theirs = kind(5, 7)
    for quantizer in (None, MembraneQuantizer(2)):
        torch.manual_seed(1)
        ours = hosts.counterpart(kind(5, 7)).from_float(kind(5, 7), quantizer)
        ours.load_state_dict(theirs.state_dict(), strict=False)
        a = b = None
        for step in x:
            a, b = ours(step, a), theirs(step, b)
            assert torch.equal(torch.stack([*a]), torch.stack([*b]))


# ------------------------------------------------------------------ snnTorch

SNNTORCH = {
    "Lapicque": (
        lambda: snn.Lapicque(beta=0.75, threshold=0.5, init_hidden=True),
        eq.lapicque(0.75, 0.5), 1, ("mem",),
    ),
    "Alpha": (
        lambda: snn.Alpha(
            0.875, 0.75, threshold=0.5, reset_mechanism="subtract", init_hidden=True
        ),
        eq.alpha(0.875, 0.75, 0.5), 3, ("syn_exc", "syn_inh", "mem"),
    ),
    "RSynaptic": (
        lambda: snn.RSynaptic(
            0.75, 0.5, all_to_all=False, V=0.5, threshold=0.875, init_hidden=True
        ),
        None, 2, ("syn", "mem"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", SNNTORCH)
def test_neurons_of_snntorch(rng, name, bits):
    make, step, states, names = SNNTORCH[name]
    step = step or eq.recurrent_synaptic(0.75, 0.5, 0.5, 0.875)
    node = quantized(make(), bits)
    x = rng.normal(0.3, 0.8, size=(12, 3, 40))
    theta = float(node.threshold)
    expected = eq.run(x, (0.0,) * states, step, bits, (theta, "subtract"))
    if name == "Lapicque":
        # The host computes its constants in float32.
        rate = float(node.time_step / (node.R * node.C))
        expected = eq.run(x, (0.0,), eq.lapicque(np.exp(-rate), theta), bits, (theta, "subtract"))
    compare(node, x, expected, names)


@pytest.mark.parametrize("bits", BITS)
def test_delta_leaky(rng, bits):
    x = rng.normal(0.0, 0.5, size=(12, 3, 40))
    node = quantized(snn.DeltaLeaky(0.25, 0.75, init_hidden=True), bits)
    expected = eq.run(x, (0.0,), eq.delta_leaky(0.75, 0.25), bits)
    compare(node, x, expected, ("mem",))


def gates(shape, rng):
    return torch.tensor(rng.normal(0.0, 1.0, size=shape))


@pytest.mark.parametrize("bits", BITS)
def test_spiking_lstm(rng, bits):
    node = quantized(snn.SLSTM(7, 7, threshold=0.25, reset_mechanism="subtract"), bits)
    cell = node.lstm_cell
    with torch.no_grad():
        for p in cell.parameters():
            p.copy_(gates(tuple(p.shape), rng))
    w = [cell.weight_ih, cell.weight_hh, cell.bias_ih + cell.bias_hh]
    step = eq.spiking_lstm(*(t.detach().numpy() for t in w), 0.25)
    x = rng.normal(0.5, 1.0, size=(8, 3, 7))
    expected = eq.run(x, (0.0, 0.0), step, bits, (0.25, "subtract"))

    def by_hand(node, x):
        spikes, states = [], torch.zeros(2, 3, 7).double()  # the host's own would be float32
        for step in x:
            spk, *states = node(step, *states)
            spikes.append(spk)
        return torch.stack(spikes)

    compare(node, x, expected, ("syn", "mem"), call=by_hand)


@pytest.mark.parametrize("bits", BITS)
def test_spiking_conv_lstm(rng, bits):
    node = quantized(
        snn.SConv2dLSTM(2, 2, 1, threshold=0.25, reset_mechanism="subtract", init_hidden=True), bits
    )
    with torch.no_grad():
        for p in node.conv.parameters():
            p.copy_(gates(tuple(p.shape), rng))
    w, b = node.conv.weight.detach().numpy()[:, :, 0, 0], node.conv.bias.detach().numpy()
    step = eq.spiking_conv_lstm(w, b, 0.25)
    x = rng.normal(0.5, 1.0, size=(8, 3, 2, 4, 4))
    compare(node, x, eq.run(x, (0.0, 0.0), step, bits, (0.25, "subtract")), ("syn", "mem"))


def test_a_live_state_is_copied_by_its_values():
    import copy

    for node in (
        quantized(neuron.LIFNode(), 2), quantized(neuron.IzhikevichNode(a=0.3, b=0.2), 2),
        quantized(snn.Synaptic(0.9, 0.8, init_hidden=True), 2),
    ):  # fmt: skip
        by_steps(node, (torch.randn(3, 2, 9).double() * 2).requires_grad_())
        copied, x = copy.deepcopy(node), torch.randn(2, 9).double()
        for state in hosts.describe(node).states:
            assert getattr(node, state.name).grad_fn is not None
            assert getattr(copied, state.name).grad_fn is None
        assert torch.equal(node(x), copied(x))


@pytest.mark.parametrize("bits", BITS)
def test_activation_aware(rng, bits):
    threshold, offset = np.linspace(0.5, 1.5, 40), np.linspace(-0.25, 0.25, 40)
    node = neuron.ActivationAwareIFNode(torch.tensor(threshold), torch.tensor(offset))
    x = rng.normal(0.2, 0.8, size=(8, 3, 40))
    expected = eq.run(x, (0.0,), eq.activation_aware(threshold, offset), bits)
    compare(quantized(node, bits), x, expected, "v")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("call", [by_steps, at_once])
def test_membrane_batch_norm(rng, call, bits):
    node = quantized(neuron.MPBNLIFNode(out_features=40), bits).eval()
    norm, values = node.vbn, [rng.normal(0.2, 0.1, size=40), rng.uniform(0.5, 2.0, size=40)]
    with torch.no_grad():
        norm.running_mean.copy_(torch.tensor(values[0]))
        norm.running_var.copy_(torch.tensor(values[1]))
        norm.weight.copy_(torch.tensor(rng.uniform(0.5, 2.0, size=40)))
        norm.bias.copy_(torch.tensor(rng.normal(0.0, 0.1, size=40)))
    step = eq.normalized_lif(*values, norm.weight.detach().numpy(), norm.bias.detach().numpy())
    x = rng.normal(0.4, 1.0, size=(8, 3, 40))
    compare(node, x, eq.run(x, (0.0,), step, bits), "v", call=call)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", [neuron.ILCIFNode, neuron.ILCLIFNode, neuron.ILCCUBALIFNode])
def test_connections_within_a_layer(rng, kind, bits):
    node = quantized(kind(4, 5), bits)
    w = node.conn.weight.detach().numpy()[:, 0]
    b = node.conn.bias.detach().numpy()
    current = kind is neuron.ILCCUBALIFNode
    v_decay = 1.0 if kind is neuron.ILCIFNode else 0.75
    step = eq.between_layers(w, b, 0.5 if current else None, v_decay, node.v_threshold)
    x = rng.normal(0.3, 0.6, size=(6, 3, 20))
    expected = eq.run(x.copy(), (0.0, 0.0) if current else (0.0,), step, bits)
    compare(node, x, expected, "vc" if current else "v", call=lambda node, x: node(x.clone()))
