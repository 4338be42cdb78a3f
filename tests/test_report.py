"""summarize: what it counts, on both hosts, and that it leaves no trace."""

import csv
import html
import io
import json
import math
import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qsnn_ext import EnergyTable, WSDRRegularizer, models, summarize
from qsnn_ext.energy import OPERATIONS
from qsnn_ext.errors import ConfigError, InputError, InputTypeError, StateError
from qsnn_ext.layers import BinaryConv2d, BinaryLinear, QuantConv2d, QuantLinear
from qsnn_ext.quantizers import BinaryWeight, IntWeight, MembraneQuantizer

sj = pytest.importorskip("qsnn_ext.spikingjelly")
st_host = pytest.importorskip("qsnn_ext.snntorch")
import snntorch as snn  # noqa: E402
from spikingjelly.activation_based import functional, layer, neuron  # noqa: E402


def by_name(summary):
    return {row.name: row for row in summary.layers}


def by_hand():
    """Two inputs, five neurons; every number below can be worked out on paper."""
    linear = BinaryLinear(2, 5, bias=False, quantizer=BinaryWeight(standardize=None))
    rows = [[0.4, 0.4], [0.4, -0.4], [-0.4, -0.4], [0.6, 0.6], [-0.9, -0.9]]
    linear.weight.data = torch.tensor(rows)
    return nn.Sequential(linear, sj.QuantIFNode(bits=2, v_threshold=1.0, v_reset=0.0))


def test_hand_computed_example():
    # Currents of two spikes: 0.8, 0, -0.8, 1.2, -1.8. The fourth fires and is reset; the others
    # stay. alpha = 0.8, so the codes are 1, 0, -1, 0 and, clipped, -1.
    summary = summarize(by_hand(), torch.ones(1, 2))
    weights, neurons = summary.layers
    assert (weights.name, weights.kind, weights.weight_bits) == ("0", "BinaryLinear", 1)
    assert (weights.membrane_bits, weights.parameters, weights.calls) == (None, 10, 1)
    assert weights.sign_probability == 0.5
    assert weights.weight_entropy == pytest.approx(math.log(2))
    assert (weights.input_rate, weights.input_spikes) == (1.0, True)
    assert weights.operations == {"and_ac": 10}
    assert weights.picojoules == pytest.approx(10 * 0.00375)
    assert weights.bytes_now == 40 + 4  # the quantizer's temperature is a tensor too
    assert weights.bytes_logical == 10 / 8
    assert weights.bytes_packed == 2 * 4 + 5 * 4  # a word per input, a scale per output
    assert weights.firing_rate is None

    assert (neurons.kind, neurons.membrane_bits) == ("QuantIFNode", 2)
    assert neurons.firing_rate == 0.2
    assert neurons.spike_entropy == pytest.approx(-(0.2 * math.log(0.2) + 0.8 * math.log(0.8)))
    assert neurons.rounded_to_zero == 0.4
    assert neurons.clipped == 0.2
    assert neurons.bytes_now == 5 * 4 + 4  # potentials as float32, and the frozen scale's buffer
    assert neurons.bytes_logical == 5 * 2 / 8
    assert neurons.bytes_packed == 2 * 4 + 4  # a word per bit plane, the scale
    assert neurons.operations == {}

    assert summary.total.parameters == 10
    assert summary.total.firing_rate == 0.2
    assert summary.total.operations == {"and_ac": 10}
    assert summary.total.bytes_packed == 28 + 12


SPIKES = torch.tensor([[[[0.0, 1.0], [1.0, 0.0]]]])  # half of the inputs are active
ANALOG = torch.tensor([[[[0.0, 0.3], [0.7, 0.1]]]])


@pytest.mark.parametrize(
    ("bits", "x", "kind", "share"),
    [
        (None, ANALOG, "mac", 1.0),
        (None, SPIKES, "ac", 0.5),
        (8, ANALOG, "mac8", 1.0),
        (4, ANALOG, "mac8", 1.0),
        (8, SPIKES, "ac8", 0.5),
        (1, ANALOG, "ac", 1.0),
        (1, SPIKES, "and_ac", 0.5),
        (1, 0.25 * SPIKES, "and_ac", 0.5),  # spikes of another height
        (1, 0 * SPIKES, "and_ac", 0.0),
        (1, -ANALOG, "ac", 1.0),
        (None, -SPIKES, "ac", 0.5),
    ],
)
def test_kind_of_operation(bits, x, kind, share):
    if bits is None:
        conv = nn.Conv2d(1, 3, 2, padding=1)
    elif bits == 1:
        conv = BinaryConv2d(1, 3, 2, padding=1)
    else:
        conv = QuantConv2d(1, 3, 2, padding=1, quantizer=IntWeight(bits))
    row = summarize(conv, x).layers[0]
    dense = 3 * 3 * 3 * 4  # outputs times kernel
    assert row.operations == {kind: dense * share}
    assert row.picojoules == pytest.approx(dense * share * getattr(EnergyTable(), kind))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False), (3, 4, 9, 9)),
        (nn.Conv1d(4, 2, 3, dilation=2, bias=False), (3, 4, 9)),
        (nn.Conv3d(1, 2, 2, bias=False), (2, 1, 3, 4, 5)),
        (nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2, bias=False), (3, 6, 5, 5)),
        (nn.Linear(5, 7, bias=False), (2, 3, 5)),
    ],
    ids=["conv2d", "conv1d", "conv3d", "transposed", "linear"],
)
def test_dense_counts_are_the_products_computed(module, shape):
    # Every product of a 1 and a weight of 1 adds 1 to the output.
    nn.init.ones_(module.weight)
    products = int(module(torch.ones(shape)).sum())
    assert summarize(module, torch.rand(shape)).total.operations == {"mac": products}


@given(
    widths=st.lists(st.integers(1, 7), min_size=2, max_size=4),
    kinds=st.lists(st.sampled_from([None, 1, 8]), min_size=3, max_size=3),
    bits=st.sampled_from([None, 2, 5, 8]),
    batch=st.integers(1, 4),
    steps=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_operations_are_pairs_of_active_input_and_weight(widths, kinds, bits, batch, steps, seed):
    torch.manual_seed(seed)
    layers = []
    for inp, out, kind in zip(widths, widths[1:], kinds, strict=False):
        weight = {None: layer.Linear, 1: sj.BinaryLinear, 8: sj.QuantLinear}[kind]
        options = {"quantizer": BinaryWeight(standardize=None)} if kind == 1 else {}
        layers += [weight(inp, out, step_mode="m", **options)]
        layers += [sj.paper_neuron(bits)]
    model = nn.Sequential(*layers)
    x = (torch.rand(steps, batch, widths[0]) < 0.5).float()
    rows = summarize(model, x).layers
    with torch.no_grad():
        for module, row in zip(model, rows, strict=True):
            if isinstance(module, nn.Linear):
                assert sum(row.operations.values()) == int(x.sum()) * module.out_features
                assert row.input_spikes
            x = module(x)
            if row.firing_rate is not None:
                assert row.firing_rate == pytest.approx(x.mean().item())
                assert (row.rounded_to_zero is None) == (bits is None)


def tiny(host, bits="1w-2u"):
    return models.vggsnn(width=0.03, T=3, bits=bits, host=host)


@pytest.mark.parametrize("host", ["spikingjelly", "snntorch"])
@pytest.mark.parametrize("bits", ["32w-32u", "1w-2u", "8w-4u"])
def test_both_hosts_and_all_bits(host, bits):
    model = tiny(host, bits)
    summary = summarize(model, torch.rand(2, 2, 16, 16))
    neurons = [row for row in summary.layers if row.firing_rate is not None]
    assert len(neurons) == 8
    assert summary.total.parameters == sum(p.numel() for p in model.parameters())
    for row in summary.layers:
        assert row.calls == (3 if row.kind == "QLeaky" else 1)
    for row in neurons:
        assert (row.rounded_to_zero is None) == (bits == "32w-32u")
        assert row.membrane_bits == {"32w-32u": 32, "1w-2u": 2, "8w-4u": 4}[bits]
    convs = [row.weight_bits for row in summary.layers if "Conv" in row.kind]
    assert (
        convs
        == {
            "32w-32u": [32] * 8,
            "1w-2u": [8] + [1] * 7,
            "8w-4u": [8] * 8,
        }[bits]
    )
    for part in ("parameters", "bytes_now", "bytes_logical", "bytes_packed", "picojoules"):
        total = sum(getattr(row, part) for row in summary.layers)
        assert getattr(summary.total, part) == pytest.approx(total)
    if bits != "32w-32u":
        assert summary.total.bytes_logical < summary.total.bytes_packed
        assert summary.total.bytes_packed < summary.total.bytes_now


def test_shares_of_membrane_states_match_the_quantizer():
    node = sj.QuantLIFNode(bits=3, step_mode="m", decay_input=False)
    x = torch.randn(4, 50, 20)
    seen = []
    quantize = node.membrane.quantize

    class Spy(MembraneQuantizer):
        def quantize(self, u):
            seen.append(u)
            return quantize(u)

    row = summarize(node, x).layers[0]
    node.membrane = Spy(3)
    node(x)
    codes = torch.stack([node.membrane.codes(u)[0] for u in seen])
    alphas = torch.stack([u.amax() for u in seen]).view(-1, 1, 1)
    assert row.rounded_to_zero == (codes == 0).double().mean().item()
    assert row.clipped == pytest.approx((torch.stack(seen).abs() > alphas).float().mean().item())
    assert 0 < row.clipped < row.rounded_to_zero < 1


def test_nothing_is_clipped_by_a_scale_that_is_too_large_or_zero():
    node = sj.QuantIFNode(bits=2)
    node.membrane.freeze(10.0)
    row = summarize(node, torch.rand(5, 5)).layers[0]
    assert (row.rounded_to_zero, row.clipped) == (1.0, 0.0)
    row = summarize(sj.QuantIFNode(bits=2), -torch.rand(5, 5)).layers[0]
    assert (row.rounded_to_zero, row.clipped) == (1.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype):
    model = nn.Sequential(BinaryLinear(8, 8), sj.QuantLIFNode(bits=8), nn.Linear(8, 2)).to(dtype)
    rows = summarize(model, torch.rand(4, 8, dtype=dtype)).layers
    size = dtype.itemsize
    assert rows[0].bytes_now == 64 * size + 8 * size + size  # weights, bias, temperature
    assert rows[2].weight_bits == 8 * size
    assert rows[1].clipped < 1


# --------------------------------------------------------------------------- calling styles


def test_single_step_loop_equals_multi_step_call():
    multi = nn.Sequential(sj.BinaryLinear(6, 5, step_mode="m"), sj.paper_neuron(2))
    single = nn.Sequential(sj.BinaryLinear(6, 5), sj.paper_neuron(2, step_mode="s"))
    single.load_state_dict(multi.state_dict())
    x = (torch.rand(7, 3, 6) < 0.4).float()
    first = summarize(multi, x)
    second = summarize(single, x, forward=lambda model, x: [model(x_t) for x_t in x])
    assert [row.calls for row in first.layers] == [1, 1]
    assert [row.calls for row in second.layers] == [7, 7]
    for one, other in zip(first.layers, second.layers, strict=True):
        for key, value in vars(one).items():
            if key != "calls":
                assert getattr(other, key) == pytest.approx(value), key


class Explicit(nn.Module):
    """snnTorch with membranes passed by hand, and one neuron that serves two layers."""

    def __init__(self, neuron_class, twice):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)
        self.lif = neuron_class(beta=0.9)
        self.other = self.lif if twice else neuron_class(beta=0.9)

    def forward(self, x):
        mem1, mem2 = torch.zeros(x.shape[1:]), torch.zeros(x.shape[1:])
        out = []
        for x_t in x:
            spikes, mem1 = self.lif(self.fc1(x_t), mem1)
            spikes, mem2 = self.other(self.fc2(spikes), mem2)
            out.append(spikes)
        return torch.stack(out)


@pytest.mark.parametrize("neuron_class", [snn.Leaky, st_host.QLeaky])
def test_one_neuron_with_two_membranes(neuron_class):
    apart, shared = Explicit(neuron_class, False), Explicit(neuron_class, True)
    shared.load_state_dict(apart.state_dict(), strict=False)
    x = 3 * torch.rand(5, 2, 4)
    two, one = summarize(apart, x), summarize(shared, x)
    assert by_name(one)["lif"].calls == 10
    assert one.total.firing_rate == two.total.firing_rate
    assert one.total.rounded_to_zero == two.total.rounded_to_zero
    # Both potentials are counted, whichever module owns them.
    assert by_name(two)["other"].bytes_logical == by_name(two)["lif"].bytes_logical
    assert one.total.bytes_logical == two.total.bytes_logical


def sequential_style():
    return nn.Sequential(
        nn.Linear(4, 6),
        st_host.QLeaky(beta=0.9, init_hidden=True),
        nn.Sequential(nn.Linear(6, 3), snn.Leaky(beta=0.9, init_hidden=True, output=True)),
    )


def test_snntorch_hidden_states_and_loop_outside():
    model = sequential_style()
    summary = summarize(model, torch.rand(5, 2, 4), forward=lambda m, x: [m(x_t) for x_t in x])
    rows = by_name(summary)
    assert [row.calls for row in summary.layers] == [5] * 4
    assert rows["1"].membrane_bits == 2
    assert rows["2.1"].membrane_bits == 32
    assert rows["2.1"].bytes_logical == 2 * 3 * 4


class Rested(nn.Module):
    """The tutorial style: ``reset_mem`` in forward, then calls without a membrane."""

    def __init__(self):
        super().__init__()
        self.fc, self.lif = nn.Linear(4, 4), st_host.QLeaky(beta=0.8)

    def forward(self, x):
        self.lif.reset_mem()
        return torch.stack([self.lif(self.fc(x_t))[0] for x_t in x])


def test_snntorch_reset_in_forward():
    summary = summarize(Rested(), 4 * torch.rand(5, 2, 4))
    assert by_name(summary)["lif"].bytes_logical == 2 * 4 * 2 / 8
    assert summary.total.firing_rate > 0


def test_spikingjelly_zoo_model():
    from spikingjelly.activation_based.model import sew_resnet

    model = sew_resnet.sew_resnet18(spiking_neuron=neuron.LIFNode, cnf="ADD", num_classes=4).eval()
    functional.set_step_mode(model, "m")
    summary = summarize(model, torch.rand(2, 1, 3, 32, 32))
    assert summary.total.parameters == sum(p.numel() for p in model.parameters())
    assert summary.uncounted == ()
    assert all(row.calls for row in summary.layers if row.parameters)


def test_sample_may_be_tuple_or_dict():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, a, b):
            return self.fc(input=a + b)

    a = torch.rand(3, 2)
    first, second = summarize(Two(), (a, a)), summarize(Two(), {"a": a, "b": a})
    assert first.total.operations == second.total.operations == {"mac": 12}


# --------------------------------------------------------------------------- no trace left


def generators():
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        [str(part) for part in np.random.get_state()],
    )


def condition(model):
    """Everything about a model that a pass could change; tensors by identity and value."""
    state = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            entries = value if isinstance(value, dict) else {"": value}
            for sub, item in entries.items():
                tensor = isinstance(item, torch.Tensor)
                copy = item.detach().clone() if tensor else None
                state[name, key, sub] = (id(item), copy)
        state[name, "attributes"] = (list(vars(module)), None)
    return state


def assert_same(before, after):
    assert before.keys() == after.keys()
    for key, (identity, value) in before.items():
        assert after[key][0] == identity, key
        if value is not None:
            assert torch.equal(after[key][1], value), key


class Noisy(nn.Module):
    """Uses every random generator there is, and keeps a list."""

    def __init__(self):
        super().__init__()
        self.history = [torch.zeros(1)]
        self.seen = 0

    def forward(self, x):
        self.seen += 1
        self.history.append(x)
        self.history[0].add_(1)
        return x + torch.rand(()) * random.random() * np.random.rand()


def spiky_model(host):
    if host == "spikingjelly":
        neurons = [sj.paper_neuron(2), sj.QuantLIFNode(bits=4, mode="frozen", step_mode="m")]
    else:
        frozen = st_host.QLeaky(beta=0.5, mode="frozen", init_hidden=True)
        neurons = [
            st_host.OverTime(st_host.QLeaky(beta=0.5)),
            frozen,
        ]
    return nn.Sequential(
        BinaryLinear(4, 4), neurons[0], nn.Flatten(0, 1), nn.BatchNorm1d(4), nn.Dropout(0.5),
        nn.Unflatten(0, (3, -1)), Noisy(), neurons[1],
    )  # fmt: skip


@pytest.mark.parametrize("host", ["spikingjelly", "snntorch"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dirty", [True, False])
def test_leaves_no_trace(host, training, dirty):
    model = spiky_model(host)
    x = 2 * torch.rand(3, 2, 4)
    model(x)  # calibrates the frozen scale
    model.train(training)
    if dirty:
        model(x)
    else:
        functional.reset_net(model)
    model[4].train(not training)
    before, random_before = condition(model), generators()
    summary = summarize(model, x)
    assert summary.training == training
    assert_same(before, condition(model))
    assert generators() == random_before
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())

    # What was kept from the step before is neither seen nor lost.
    assert summarize(model, x).to_dict() == summary.to_dict()


def test_live_graph_survives():
    model = nn.Sequential(sj.BinaryLinear(4, 4), sj.QuantLIFNode(bits=2))
    x = torch.rand(2, 4)
    model(x)
    state = model[1].v
    summarize(model, torch.rand(6, 4))
    assert model[1].v is state
    model(x).sum().backward()
    assert model[0].weight.grad is not None


def test_leaves_no_trace_when_the_pass_fails():
    model = spiky_model("spikingjelly")
    model(torch.rand(3, 2, 4))
    wrong = torch.rand(3, 2, 5)
    before, random_before = condition(model), generators()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        summarize(model, wrong)
    assert_same(before, condition(model))
    assert generators() == random_before


def test_regularizer_does_not_see_the_pass():
    model = tiny("spikingjelly")
    wsdr = WSDRRegularizer(model)
    x = torch.rand(2, 2, 16, 16)
    model(x)
    expected = wsdr.firing_rates()
    summarize(model, torch.rand(4, 2, 16, 16))
    assert wsdr.firing_rates() == expected
    term = wsdr()
    term.backward()
    model(x)
    assert wsdr.firing_rates() != {}
    # The regularizer and the report agree on what a firing rate is.
    rows = by_name(summarize(model, x))
    for name, rate in wsdr.firing_rates().items():
        assert rows[name].firing_rate == pytest.approx(rate)


def test_own_hooks_and_observers_still_run():
    model = by_hand()
    calls, observed = [], []
    model[0].register_forward_hook(lambda *args: calls.append(1))
    model[1].membrane.observer = lambda *args: observed.append(1)
    summarize(model, torch.ones(1, 2))
    assert (len(calls), len(observed)) == (1, 1)
    assert len(model[0]._forward_hooks) == 1
    model(torch.ones(1, 2))
    assert (len(calls), len(observed)) == (2, 2)


def test_uncalibrated_frozen_scale_says_so_in_evaluation_mode():
    node = sj.QuantLIFNode(bits=2, mode="frozen").eval()
    with pytest.raises(StateError, match="calibrate"):
        summarize(node, torch.rand(2, 3))
    summarize(node.train(), torch.rand(2, 3))
    assert not node.membrane.calibrated


# --------------------------------------------------------------------------- odd models


def test_tied_weights_are_counted_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    summary = summarize(model, torch.rand(1, 4))
    assert summary.total.parameters == sum(p.numel() for p in model.parameters()) == 24
    assert [row.parameters for row in summary.layers] == [20, 4]
    assert summary.total.operations == {"mac": 32}


def test_layer_that_never_runs_comes_last_and_costs_memory_only():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.used = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    used, unused = summarize(Partly(), torch.rand(1, 4)).layers
    assert (used.name, unused.name) == ("used", "unused")
    assert (unused.calls, unused.operations, unused.bytes_now) == (0, {}, 80)


def test_running_order_is_not_definition_order():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.b, self.a = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.b(self.a(x))

    assert [row.name for row in summarize(Backwards(), torch.rand(1, 2)).layers] == ["a", "b"]


def test_what_is_not_counted_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Bilinear(4, 4, 2))
    summary = summarize(model, torch.rand(1, 4), forward=lambda m, x: m[1](m[0](x), x))
    assert summary.uncounted == ("1",)
    assert "not counted in: 1" in str(summary)


def test_nan_weights_are_shown_not_refused():
    linear = BinaryLinear(3, 3)
    linear.weight.data[0, 0] = math.nan
    row = summarize(linear, torch.rand(1, 3)).layers[0]
    assert row.sign_probability is None


def test_model_without_layers():
    summary = summarize(nn.Identity(), torch.rand(2))
    assert summary.layers == ()
    assert summary.total.bytes_now == 0
    assert "no synaptic operation" in str(summary)


def test_lone_module_and_empty_batch():
    (row,) = summarize(QuantLinear(3, 2), torch.rand(0, 3)).layers
    assert row.name == "(model)"
    assert row.operations == {}


def test_sign_probability_uses_the_signs_computed_with():
    linear = BinaryLinear(2, 2)  # standardised: the mean of the layer goes
    linear.weight.data = torch.tensor([[1.0, 2.0], [3.0, 7.0]])
    assert summarize(linear, torch.rand(1, 2)).layers[0].sign_probability == 0.25
    stock = nn.Linear(2, 2)
    stock.weight.data = torch.tensor([[0.0, -2.0], [3.0, 6.0]])
    assert summarize(stock, torch.rand(1, 2)).layers[0].sign_probability == 0.75


# --------------------------------------------------------------------------- forms and costs


def test_default_costs_are_the_cited_ones():
    """Horowitz, ISSCC 2014, picojoule: multiply 3.7 and 0.2, add 0.9 and 0.03 (32 and 8 bits)."""
    assert {kind: getattr(EnergyTable(), kind) for kind in OPERATIONS} == pytest.approx({
        "mac": 3.7 + 0.9, "mac8": 0.2 + 0.03, "ac": 0.9, "ac8": 0.03, "and_ac": 0.03 / 8,
    })  # fmt: skip


def test_costs_can_be_replaced():
    table = EnergyTable(and_ac=2.0, source="our chip")
    summary = summarize(by_hand(), torch.ones(1, 2), energy=table)
    assert summary.total.picojoules == 20
    assert "our chip" in str(summary)
    assert table.picojoules({"and_ac": 3, "mac": 1}) == 6 + 4.6


def test_text_csv_and_dictionary_say_the_same(tmp_path):
    summary = summarize(tiny("spikingjelly"), torch.rand(2, 2, 16, 16))
    data = json.loads(json.dumps(summary.to_dict()))
    assert len(data["layers"]) == len(summary.layers)
    assert data["layers"][0]["operations"] == {"mac8": summary.layers[0].operations["mac8"]}

    text = summary.to_csv(tmp_path / "summary.csv")
    assert (tmp_path / "summary.csv").read_text(encoding="utf-8") == text
    lines = list(csv.DictReader(io.StringIO(text)))
    assert [line["name"] for line in lines] == [*by_name(summary), "total"]
    for line, row in zip(lines, (*summary.layers, summary.total), strict=True):
        assert [int(line[kind]) for kind in OPERATIONS] == [
            row.operations.get(kind, 0) for kind in OPERATIONS
        ]

    printed = str(summary).splitlines()
    assert printed[0].split()[:4] == ["layer", "kind", "w", "u"]
    assert len([line for line in printed if "QuantLIFNode" in line]) == 8
    assert "Horowitz" in printed[-1]


@pytest.mark.parametrize("bits", ["1w-2u", "32w-32u"])
def test_plot(tmp_path, bits):
    pytest.importorskip("matplotlib")
    summary = summarize(tiny("snntorch", bits), torch.rand(2, 2, 16, 16))
    figure = summary.plot(tmp_path / "s.png")
    assert len(figure.axes) == 4
    assert (tmp_path / "s.png").stat().st_size > 10_000
    if bits == "1w-2u":  # as notebooks show it
        assert figure._repr_png_()[:4] == b"\x89PNG"
    bars = sum(bar.get_height() for group in figure.axes[3].containers for bar in group)
    assert bars == pytest.approx(summary.total.picojoules / 1e3)


def test_a_notebook_shows_what_is_printed():
    net = nn.Sequential(OrderedDict({"<b>": nn.Linear(3, 2)}))
    summary = summarize(net, torch.rand(4, 3))
    shown = summary._repr_html_()
    assert "<td>&lt;b&gt;</td>" in shown
    for line in str(summary).splitlines()[-4:]:
        assert line in html.unescape(shown)


def test_plot_of_nothing():
    pytest.importorskip("matplotlib")
    assert len(summarize(nn.Identity(), torch.rand(2)).plot().axes) == 4


def test_silent_layer():
    model = nn.Sequential(sj.QuantIFNode(bits=2), nn.Linear(3, 2))
    neurons, weights = summarize(model, torch.zeros(4, 3)).layers
    assert (neurons.firing_rate, str(neurons.spike_entropy)) == (0.0, "0.0")
    assert weights.operations == {"ac": 0}


def test_wrong_use():
    with pytest.raises(InputTypeError, match="needs a module, got str"):
        summarize("model", torch.rand(1))
    with pytest.raises(InputTypeError, match="EnergyTable"):
        summarize(nn.Linear(1, 1), torch.rand(1, 1), energy={"mac": 1})
    with pytest.raises(InputError, match="has no weights yet"):
        summarize(nn.LazyLinear(2), torch.rand(1, 1))
    with pytest.raises(ConfigError, match="mac8=-1"):
        EnergyTable(mac8=-1)
    with pytest.raises(ConfigError, match="'flop' is unknown"):
        EnergyTable().picojoules({"flop": 1})


def test_public_names_survive_importing_the_files():
    import qsnn_ext.footprint
    import qsnn_ext.report

    assert callable(qsnn_ext.footprint)
    assert qsnn_ext.summarize is summarize
