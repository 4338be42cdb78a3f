"""What a model is and what becomes of it: data flow, subclasses, packed weights, wrappers."""

import copy
import html
import pickle
import warnings

import pytest
import snntorch as snn
import torch
from spikingjelly.activation_based import encoding, functional, layer, neuron, rnn
from torch import nn
from torch.nn import functional as tf
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from qsnn_ext import (
    ConversionReport,
    QuantConfig,
    Rule,
    calibrate,
    calibrate_scales,
    conversion_report,
    layers,
    load_checkpoint,
    quantize_,
    save_checkpoint,
)
from qsnn_ext.errors import ConfigError, ConversionError, InputTypeError, StateError
from qsnn_ext.layers import QuantizedWeight
from qsnn_ext.quantizers import BinaryWeight, IntWeight

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def lif():
    return neuron.LIFNode(step_mode="m")


def bits(report, *names):
    return tuple(report[name].weight_bits for name in names)


# --------------------------------------------------------------------------- first and last


class Heads(nn.Module):
    """Two inputs, one of them late; three heads, one of them early; a constant behind one."""

    def __init__(self):
        super().__init__()
        self.box, self.cls, self.early = nn.Linear(8, 4), nn.Linear(8, 2), nn.Linear(8, 1)
        self.stem, self.side = nn.Linear(6, 8), nn.Linear(5, 8)
        self.mid, self.deep = nn.Linear(8, 8), nn.Linear(8, 8)
        self.a, self.b, self.c, self.d = lif(), lif(), lif(), lif()
        self.bins = nn.Linear(4, 1, bias=False).requires_grad_(False)

    def forward(self, x, z):
        a = self.a(self.stem(x))
        b = self.b(self.mid(a) + self.d(self.side(z)))
        c = self.c(self.deep(b))
        return {"early": self.early(a).sum(0), "box": self.bins(self.box(c)), "cls": self.cls(c)}


def test_every_layer_on_the_input_is_a_first_and_every_one_before_none_a_last():
    net = Heads()
    report = quantize_(net, "1w-2u", sample=(torch.rand(3, 2, 6) * 9, torch.rand(3, 2, 5) * 9))
    assert bits(report, "stem", "side", "early", "box", "cls") == (8,) * 5
    assert bits(report, "mid", "deep") == (1, 1)
    assert report.firsts == ("stem", "side")
    assert report.lasts == ("early", "box", "cls")
    assert report["bins"].action == "kept"
    assert "not trained" in report["bins"].reason
    assert type(net.bins) is nn.Linear
    again = quantize_(net, "1w-2u")  # what the first run found still holds
    assert not again.changed
    assert again.firsts == report.firsts


def test_constants_are_quantized_by_a_rule_and_where_nothing_is_trained():
    net = Heads()
    report = quantize_(net, QuantConfig(rules=(Rule(name="bins", weight=4),)))
    assert report["bins"].weight_bits == 4
    net = nn.Sequential(nn.Linear(4, 4), lif(), nn.Linear(4, 4)).requires_grad_(False)
    assert bits(quantize_(net, "1w-2u"), "0", "2") == (8, 8)


class Loop(nn.Module):
    """snnTorch's style: one call per time step, a list of outputs, weights used by hand."""

    def __init__(self):
        super().__init__()
        self.out, self.hidden, self.stem = nn.Linear(8, 3), nn.Linear(8, 8), nn.Linear(6, 8)
        self.n1, self.n2 = snn.Leaky(beta=0.9), snn.Leaky(beta=0.9)
        self.read_out = nn.Parameter(torch.randn(3, 3))

    def forward(self, x, mem=None):
        m1 = torch.zeros(x.shape[1], 8) if mem is None else mem
        m2 = torch.zeros_like(m1)
        result = torch.zeros(len(x), x.shape[1], 3)
        for t in range(len(x)):
            s1, m1 = self.n1(self.stem(x[t]), m1)
            s2, m2 = self.n2(self.hidden(s1), m2)
            result[t] = self.out(s2)
        return result @ self.read_out


def test_flow_goes_through_loops_buffers_and_weights_nobody_calls():
    report = quantize_(Loop(), "1w-2u", sample=(torch.rand(4, 2, 6), torch.zeros(2, 8)))
    # After "out" come the weights of the model itself, so it is none of the last.
    assert bits(report, "stem", "hidden", "out") == (8, 1, 1)
    assert report.firsts == ("stem",)
    assert report[""].action == "unsupported"


def test_tied_and_normed_weights_are_read_by_their_layers_alone():
    normed = nn.utils.spectral_norm(nn.Linear(6, 6))
    net = nn.Sequential(nn.Linear(6, 6), lif(), nn.Linear(6, 6), lif(), nn.Linear(6, 6), lif(),
                        normed, lif(), nn.Linear(6, 2))  # fmt: skip
    net[4].weight = net[2].weight
    report = quantize_(net, "1w-2u", sample=torch.rand(3, 2, 6) * 9)
    assert bits(report, "0", "2", "4", "8") == (8, 1, 1, 8)
    assert not any("also read" in warning for warning in report.warnings)

    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.n = (
                nn.Linear(6, 6),
                nn.Linear(6, 6),
                nn.Linear(6, 2),
                lif(),
            )

        def forward(self, x):
            return self.c(tf.linear(self.n(self.a(x)), self.b.weight, self.b.bias))

    report = quantize_(Reading(), "1w-2u", sample=torch.rand(3, 2, 6))
    assert bits(report, "a", "c") == (8, 8)
    assert any("weights of b are also read" in warning for warning in report.warnings)


def test_a_model_called_in_another_way():
    net = nn.Sequential(nn.Linear(6, 8), snn.Leaky(beta=0.9, init_hidden=True), nn.Linear(8, 8),
                        snn.Leaky(beta=0.9, init_hidden=True), nn.Linear(8, 2))  # fmt: skip

    def forward(model, x):
        return torch.stack([model(step) for step in x])

    report = quantize_(net, "1w-2u", sample=torch.rand(4, 2, 6), forward=forward)
    assert bits(report, "0", "2", "4") == (8, 1, 8)
    assert report.operations.by_bits == {1: 4 * 2 * 64, 8: 4 * 2 * (48 + 16)}
    assert report.states.by_bits == {2: 2 * 16}


# --------------------------------------------------------------------------- neurons by hand


class Surrogate(nn.Module):
    def forward(self, x):
        return (x > 0).to(x)


class ByLoop(nn.Module):
    def __init__(self):
        super().__init__()
        self.fire = Surrogate()

    def forward(self, x):
        v, out = 0.0, []
        for step in x:
            v = 0.5 * v + step
            out.append(self.fire(v - 1))
            v = v * (1 - out[-1])
        return torch.stack(out)


class ByState(nn.Module):
    def __init__(self):
        super().__init__()
        self.v = 0.0

    def forward(self, x):
        self.v = self.v / 2 + x
        spikes = (self.v > 1).to(x)
        self.v = self.v - spikes
        return spikes


@pytest.mark.parametrize("kind", [ByLoop, ByState])
def test_a_neuron_written_by_hand_is_found_and_can_be_replaced(kind):
    def build():
        return nn.Sequential(nn.Linear(6, 8), kind(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))

    x = torch.rand(4, 2, 6) * 9
    report = quantize_(build(), "1w-2u", sample=x)
    assert report["1"].action == "unsupported"
    assert "probably a neuron" in report["1"].reason
    assert report["3"].action == "nothing"
    assert any("no membrane potential" in warning for warning in report.warnings)
    with pytest.raises(ConversionError, match="probably a neuron"):
        quantize_(build(), "1w-2u", sample=x, strict=True)
    net = build()
    report = quantize_(net, "1w-2u", sample=x, strict=True, replace={kind: lambda old: lif()})
    assert report["1"].membrane_bits == 2
    assert net(x).shape == (4, 2, 2)


def test_replace_is_checked_and_undone():
    net = nn.Sequential(nn.Linear(4, 4), ByState(), nn.Linear(4, 4))
    old = net[1]
    with pytest.raises(ConfigError, match="matches no module"):
        quantize_(net, "1w-2u", replace={ByLoop: lambda old: lif()})
    with pytest.raises(InputTypeError, match="not a module"):
        quantize_(net, "1w-2u", replace={ByState: lambda old: 3})
    with pytest.raises(ConversionError):
        quantize_(net, "1w-2u", sample=torch.rand(2, 7), replace={ByState: lambda old: lif()})
    assert net[1] is old


# --------------------------------------------------------------------------- layers


class Trivial(layer.Conv2d):
    def __init__(self, i, o):
        super().__init__(i, o, kernel_size=1, bias=False, step_mode="m")


class Own(nn.Conv2d):
    """Weight-standardised, over time."""

    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return tf.conv2d(x.flatten(0, 1), w, self.bias).unflatten(0, x.shape[:2])


class Deaf(nn.Linear):
    def forward(self, x):
        return x


def test_subclasses_are_quantized_as_what_they_are():
    torch.manual_seed(0)
    net = nn.Sequential(Trivial(2, 4), lif(), Own(4, 4, 3), lif(), Trivial(4, 4), lif(),
                        nn.Flatten(2), nn.Linear(4 * 16, 3))  # fmt: skip
    keys, x = list(net.state_dict()), torch.rand(3, 2, 2, 6, 6) * 9
    report = quantize_(net, "1w-2u", sample=x)
    assert bits(report, "0", "2", "4", "7") == (8, 1, 1, 8)
    assert isinstance(net[2], Own)
    assert isinstance(net[4], Trivial)
    assert "BinaryOwn" in str(net)
    assert list(net.state_dict()) == keys
    assert net.state_dict()["2.weight"].unique().numel() > 100  # the latent weights

    functional.reset_net(net)
    s = net[:2](x)
    q = net[2].quantizer(net[2].weight)
    w = q - q.mean((1, 2, 3), keepdim=True)
    expected = tf.conv2d(s.flatten(0, 1), w, net[2].bias).unflatten(0, s.shape[:2])
    torch.testing.assert_close(net[2](s), expected)
    net(x).sum().backward()
    assert net[2].weight.grad.abs().sum() > 0
    for twin in (copy.deepcopy(net[2]), pickle.loads(pickle.dumps(net[2]))):
        assert type(twin) is type(net[2])
        torch.testing.assert_close(twin(s), expected)
    assert quantize_(net, "32w-32u").changed
    assert type(net[2]) is Own
    assert type(net[4]) is Trivial


def test_a_forward_that_reads_no_weight_is_refused_when_it_runs():
    net = nn.Sequential(nn.Linear(4, 4), Deaf(4, 4), nn.Linear(4, 4))
    quantize_(net, "1w-2u")
    with pytest.raises(StateError, match="never read its weight"):
        net(torch.rand(2, 4))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("host", ["torch", "spikingjelly"])
@pytest.mark.parametrize("quantizer", [BinaryWeight("channel"), IntWeight(4)], ids=["1", "4"])
def test_transposed_convolutions(dims, groups, host, quantizer):
    """Statistics and scales are those of the output channels, wherever the weight has them."""
    torch.manual_seed(0)
    module = nn if host == "torch" else layer
    stock = getattr(module, f"ConvTranspose{dims}d")(4, 6, 3, stride=2, groups=groups)
    reference, x = copy.deepcopy(stock), torch.randn(2, 4, *[5] * dims)
    quantized = layers.counterpart(type(stock), quantizer.bits).from_float(stock, quantizer)
    rows = torch.cat([w.transpose(0, 1) for w in reference.weight.chunk(groups)])
    value = torch.cat([r.transpose(0, 1) for r in quantizer(rows).chunk(groups)])
    with torch.no_grad():
        reference.weight.copy_(value)
    torch.testing.assert_close(quantized(x), reference(x))
    codes, scale = quantized.codes()
    assert codes.shape == quantized.weight.shape
    with torch.no_grad():
        assert torch.equal(codes * scale, quantized.quantized_weight)
    if host == "torch":
        assert quantized(torch.stack([x, x])).shape[:2] == (2, 2)


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_recurrent_layers(kind):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), getattr(nn, kind)(4, 5, num_layers=2))
    report = quantize_(net, QuantConfig(rules=(Rule(name="1", weight=1),)))
    assert report["1"].weight_bits == 1
    quantized, x = net[1], torch.randn(3, 2, 4)
    reference = getattr(nn, kind)(4, 5, num_layers=2)
    reference.load_state_dict(quantized.state_dict())
    with torch.no_grad():
        for name, p in reference.named_parameters():
            if name.startswith("weight"):
                p.copy_(quantized.quantizer(p))
    torch.testing.assert_close(quantized(x)[0], reference(x)[0])
    quantized(x)[0].sum().backward()
    assert quantized.weight_hh_l1.grad.abs().sum() > 0
    assert torch.equal(quantized._flat_weights[0], quantized.weight_ih_l0)
    copied = copy.deepcopy(quantized)
    torch.testing.assert_close(copied(x)[0], reference(x)[0])


@pytest.mark.parametrize("kdim", [None, 3])
def test_attention(kdim):
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 2)
            self.attention = nn.MultiheadAttention(8, 2, kdim=kdim)

        def forward(self, x, key):
            h = self.stem(x)
            return self.head(self.attention(h, h if kdim is None else key, h)[0])

    net, x, key = Net(), torch.randn(5, 2, 8), torch.randn(5, 2, 3)
    report = quantize_(net, "1w-2u", sample=(x, key))
    width = 1 if kdim is None else 8  # then the key is an input of the model
    assert bits(report, "stem", "head") == (8, 8)
    assert bits(report, "attention", "attention.out_proj") == (width, width)
    reference = nn.MultiheadAttention(8, 2, kdim=kdim)
    reference.load_state_dict(net.attention.state_dict())
    q, out = net.attention.quantizer, net.attention.out_proj.quantizer
    with torch.no_grad():
        for name in net.attention.weight_names():
            getattr(reference, name).copy_(q(getattr(reference, name)))
        reference.out_proj.weight.copy_(out(reference.out_proj.weight))
    h = net.stem(x)
    k = h if kdim is None else key
    torch.testing.assert_close(net.attention(h, k, h)[0], reference(h, k, h)[0])
    net.attention.eval()
    with torch.no_grad():  # torch's fused path
        torch.testing.assert_close(net.attention(h, k, h)[0], reference.eval()(h, k, h)[0])


# --------------------------------------------------------------------------- other weights


def test_pruned_weights():
    def build(amount=0.5):
        net = nn.Sequential(nn.Linear(8, 16), lif(), nn.Linear(16, 16), lif(), nn.Linear(16, 4))
        prune.l1_unstructured(net[2], "weight", amount)
        return net

    net = build()
    report = quantize_(net, "1w-2u")
    assert report["2"].action == "unsupported"
    assert "1 bit has no zero" in report["2"].reason
    net = build()
    report = quantize_(net, "4w-2u")
    assert report["2"].weight_bits == 4
    net(torch.rand(3, 2, 8))
    assert bool((net[2].quantized_weight[net[2].weight_mask == 0] == 0).all())
    net = build()
    prune.remove(net[2], "weight")
    report = quantize_(net, "1w-2u")
    assert "50% of its weights are exactly 0" in report["2"].reason


def test_recurrent_weights_go_with_their_cell():
    def build():
        return nn.Sequential(nn.Linear(4, 4), snn.SLSTM(4, 4), nn.Linear(4, 4))

    for config, bits in (
        ("1w-2u", 1),
        (QuantConfig(rules=(Rule(name="1", membrane="keep"),)), None),
        (QuantConfig(rules=(Rule(name="1", membrane="keep"), Rule(name="1.*", weight=4))), 4),
    ):
        report = quantize_(build(), config)
        cell = [row for row in report.modules if row.name.startswith("1.") and row.weights]
        assert cell
        assert {row.weight_bits for row in cell} == {bits}
        assert report.last == "2"


# --------------------------------------------------------------------------- wrapped models


def small():
    return nn.Sequential(nn.Linear(8, 16), lif(), nn.Linear(16, 16), lif(), nn.Linear(16, 4)).eval()


def compiled_inside(net):
    net[2] = torch.compile(net[2], backend="eager")
    return net


WRAPS = {
    "compile": lambda net: torch.compile(net, backend="eager"),
    "compile inside": compiled_inside,
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "both": lambda net: nn.DataParallel(torch.compile(net, backend="eager")),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=list(WRAPS))
def test_wrapped_models(wrap, tmp_path):
    torch.manual_seed(0)
    x = torch.rand(3, 2, 8) * 9
    model = wrap(small())
    config = QuantConfig(rules=(Rule(name="2", weight=4),))
    report = quantize_(model, config, sample=x)
    assert bits(report, "0", "2", "4") == (8, 4, 8)
    assert conversion_report(model) is report
    assert list(calibrate(model, [x])) == ["1", "3"]
    save_checkpoint(model, tmp_path / "w.safetensors")
    for build in (small, lambda: wrap(small())):
        loaded = load_checkpoint(tmp_path / "w.safetensors", build)
        for m in (model, loaded):
            functional.reset_net(m)
        torch.testing.assert_close(loaded(x), model(x))


# --------------------------------------------------------------------------- the report


def test_totals_and_what_stays_in_float():
    net = nn.Sequential(nn.Linear(4, 8), lif(), nn.Linear(8, 8), nn.LayerNorm(8), lif(),
                        nn.Sequential(nn.Embedding(9, 8)), nn.Linear(8, 2))  # fmt: skip
    report = quantize_(net, "1w-2u")
    assert report.parameters.by_bits == {1: 64, 8: 48, 32: 8 + 8 + 2 + 16 + 72}
    assert report.floating[0][:2] == ("5.0 (Embedding)", 72)
    text = str(report)
    assert "in floating point, largest first" in text
    assert "container" not in text
    assert "container" in report.table(everything=True)
    assert ConversionReport.from_dict(report.to_dict()) == report
    shown = report._repr_html_()
    assert html.escape(report["5.0"].reason) in shown


def test_rich_table():
    console = pytest.importorskip("rich.console")
    report = quantize_(small(), "1w-2u")
    out = console.Console(record=True, width=150)
    out.print(report)
    assert "BinaryLinear" in out.export_text()


@pytest.mark.parametrize(
    ("build", "config", "said"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4), lif(), nn.Linear(4, 2)), "1w-2u", "1-bit weights"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(),
                               nn.Linear(4, 2)), "1w-2u", "no membrane potential"),
    ],
)  # fmt: skip
def test_what_was_asked_for_and_happened_nowhere(build, config, said):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = quantize_(build(), config)
    assert any(said in str(w.message) for w in caught)
    assert said in str(report)
    with pytest.raises(ConversionError, match=said):
        quantize_(build(), config, sample=torch.rand(3, 2, 4), strict=True)
    assert not quantize_(build(), QuantConfig(weight=32, membrane=32)).warnings


def test_currents_keep_their_deviation(tmp_path):
    torch.manual_seed(0)
    net, x = small(), torch.rand(3, 2, 8) * 9
    before = net[2].weight.square().mean().sqrt()
    report = quantize_(net, "1w-2u", sample=x)
    assert any("calibrate_scales" in warning for warning in report.warnings)
    assert list(calibrate_scales(net)) == ["2"]
    torch.testing.assert_close(net[2].effective_weight.square().mean().sqrt(), before)
    assert calibrate_scales(net) == {}
    assert not any("calibrate_scales" in w for w in quantize_(net, "1w-2u", sample=x).warnings)
    save_checkpoint(net, tmp_path / "s.safetensors")
    loaded = load_checkpoint(tmp_path / "s.safetensors", small)
    assert torch.equal(loaded[2].effective_weight, net[2].effective_weight)
    normed = nn.Sequential(nn.Linear(8, 16), lif(), layer.Linear(16, 16), layer.BatchNorm1d(16),
                           lif(), nn.Linear(16, 4)).eval()  # fmt: skip
    functional.set_step_mode(normed, "s")
    report = quantize_(normed, "1w-2u", sample=torch.rand(2, 8))
    assert not any("calibrate_scales" in warning for warning in report.warnings)


def test_calibrate_says_what_quantize_has_left():
    net = nn.Sequential(nn.Linear(8, 8), neuron.LIFNode(), nn.Linear(8, 2))
    with pytest.raises(StateError, match="call quantize_ first"):
        calibrate(net, [torch.rand(4, 8)])
    quantize_(net, QuantConfig(rules=(Rule.keep(type=neuron.LIFNode),)))
    with pytest.raises(StateError, match=r"1 \(LIFNode\)"):
        calibrate(net, [torch.rand(4, 8)])


def test_one_registered_class_is_a_new_layer():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            return x @ self.weight.T

    @layers.counterpart_of(Scaled)
    class QuantScaled(layers.ShadowedLayer, Scaled):
        pass

    net = nn.Sequential(nn.Linear(4, 4), Scaled(), nn.Linear(3, 3))
    report = quantize_(net, "1w-2u", sample=torch.rand(2, 4))
    assert report["1"].became == "BinaryScaled"
    assert isinstance(net[1], QuantizedWeight)
    assert net(torch.rand(2, 4)).shape == (2, 3)


# --------------------------------------------------------------------------- untrained networks


class Silent(ByLoop):
    """A neuron that nothing in an untrained network drives to its threshold."""


class HandedOn(nn.Module):
    """Its caller keeps the potential."""

    def forward(self, x, v):
        v = v / 2 + x
        spikes = (v > 1).to(x)
        return spikes, v - spikes


class Caller(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.fc1, self.neuron, self.fc2 = nn.Linear(6, 8), kind(), nn.Linear(8, 2)

    def forward(self, x):
        v, out = torch.zeros(x.shape[1], 8), []
        for step in x:
            spikes, v = self.neuron(self.fc1(step), v)
            out.append(self.fc2(spikes))
        return torch.stack(out)


def test_neurons_that_are_silent_are_found_and_with_one_all_of_its_class():
    net = nn.Sequential(
        nn.Linear(6, 8), Silent(), nn.Linear(8, 8, bias=False), Silent(), nn.Linear(8, 2)
    )
    report = quantize_(net, "1w-2u", sample=torch.rand(4, 2, 6) / 100)
    assert report["1"].action == report["3"].action == "unsupported"
    assert "when it is driven" in report["1"].reason
    assert "it is what 1 is" in report["3"].reason  # gets zeros, so of itself it tells nothing
    assert [row.name for row in report.of("unsupported")] == ["1", "3"]
    assert sum("Silent" in line for line in report.summary()) == 2  # not once for each
    assert quantize_(net, "1w-4u")["3"].reason == report["3"].reason  # known without a sample


@pytest.mark.parametrize("drive", [1, 100])
def test_a_neuron_whose_caller_keeps_its_potential_is_found(drive):
    report = quantize_(Caller(HandedOn), "1w-2u", sample=torch.rand(4, 2, 6) * drive)
    assert "probably a neuron" in report["neuron"].reason
    assert "given back" in report["neuron"].reason


def by_step(function):
    """A module that goes through its input step by step."""

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = torch.zeros(())

        def forward(self, x):
            self.seen = self.seen + 1  # it even keeps a state
            return torch.stack([function(step) for step in x])

    return Module()


class NormPerStep(nn.Module):
    """Zero at first, as the last norm of a residual block often is."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(8) for _ in range(4))
        for norm in self.norms:
            nn.init.zeros_(norm.weight)

    def forward(self, x):
        return torch.stack([norm(step) for norm, step in zip(self.norms, x, strict=True)])


NO_NEURONS = {
    "ReLU": lambda: by_step(torch.relu),
    "ReLU of what is negative": lambda: by_step(lambda x: torch.relu(x - 1e3)),
    "dropout of all": lambda: by_step(lambda x: x * 0),
    "pooling": lambda: by_step(lambda x: nn.functional.avg_pool1d(x, 2).repeat(1, 2)),
    "sigmoid": lambda: by_step(lambda x: torch.sigmoid(x)),
    "hard sigmoid, saturated": lambda: by_step(lambda x: torch.clamp(x - 1e2, 0, 1)),
    "hard tanh": lambda: by_step(nn.functional.hardtanh),
    "rounding": lambda: by_step(torch.round),
    "sign": lambda: by_step(torch.sign),
    "shift": lambda: by_step(lambda x: x.roll(1, 0)),
    "norm per step": NormPerStep,
    "dropout": lambda: nn.Dropout(0.5),
    "threshold without time": lambda: nn.Threshold(0.5, 0.0),
    "encoder": lambda: nn.Sequential(nn.Sigmoid(), encoding.LatencyEncoder(4)),
    "identity": nn.Identity,
}


@pytest.mark.parametrize("kind", NO_NEURONS)
def test_what_is_no_neuron_is_not_taken_for_one(kind):
    x = torch.rand(4, 2, 6) - 0.5
    net = nn.Sequential(
        nn.Linear(6, 8), NO_NEURONS[kind](), nn.Linear(8, 8), lif(), nn.Linear(8, 2)
    )
    report = quantize_(net, "1w-2u", sample=x, strict=True)
    assert report["1"].action == "nothing", report["1"].reason


def test_the_innermost_is_the_neuron():
    inner = nn.Sequential(nn.Sequential(ByLoop()), nn.Identity())
    net = nn.Sequential(nn.Linear(6, 8), inner, nn.Linear(8, 8), lif(), nn.Linear(8, 2))
    report = quantize_(net, "1w-2u", sample=torch.rand(4, 2, 6) * 9)
    assert [row.name for row in report.of("unsupported")] == ["1.0.0"]


# --------------------------------------------------------------------------- vectors, norms


class PerStep(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.p = nn.Parameter(torch.ones(*shape))

    def forward(self, x):
        return x * self.p


@pytest.mark.parametrize(
    ("shape", "is_weight"), [((4, 1, 1), False), ((1, 1, 8), False), ((4, 1, 8), True)]
)
def test_a_factor_per_step_or_channel_is_a_vector(shape, is_weight):
    net = nn.Sequential(
        nn.Linear(6, 8), PerStep(*shape), lif(), nn.Linear(8, 8), lif(), nn.Linear(8, 2)
    )
    report = quantize_(net, "1w-2u", sample=torch.rand(4, 2, 6))
    assert report["1"].action == ("unsupported" if is_weight else "nothing")
    assert report["1"].weights == (32 if is_weight else 0)
    norm = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm((2, 8)), lif(), nn.Linear(8, 8))
    assert quantize_(norm, "8w-2u")["1"].action == "nothing"


class Wrapped(nn.Module):
    """A norm between reshapes, as networks over time have it."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.flatten(0, 1)).reshape(x.shape)


@pytest.mark.parametrize("norm", [True, False])
def test_a_wrapped_norm_is_behind_the_layer_all_the_same(norm):
    inner = nn.BatchNorm1d(64) if norm else nn.Identity()
    net = nn.Sequential(
        nn.Linear(6, 64), lif(), nn.Linear(64, 64, bias=False), Wrapped(inner), lif(),
        nn.Linear(64, 2),
    )  # fmt: skip
    report = quantize_(net, "1w-2u", sample=torch.rand(4, 2, 6) * 9)
    assert any("without a batch norm" in w for w in report.warnings) is not norm


class Standardized(nn.Linear):
    def forward(self, x):
        w = self.weight - self.weight.mean(1, keepdim=True)
        return nn.functional.linear(x, w / w.square().mean(1, keepdim=True).sqrt(), self.bias)


def test_a_layer_that_normalizes_its_weights_needs_no_norm():
    net = nn.Sequential(nn.Linear(6, 64), lif(), Standardized(64, 64), lif(), nn.Linear(64, 2))
    for _ in range(2):
        assert not quantize_(net, "1w-2u", sample=torch.rand(4, 2, 6) * 9).warnings
    net = nn.Sequential(nn.Linear(6, 64), lif(), nn.Linear(64, 64), lif(), nn.Linear(64, 2))
    for _ in range(2):  # a quantizer that normalizes is none of the layer's own doing
        assert quantize_(net, "1w-2u", sample=torch.rand(4, 2, 6) * 9).warnings


# --------------------------------------------------------------------------- cells, read-outs


class Potential(neuron.SimpleLIFNode):
    """Gives its potential, as critics do."""

    def single_step_forward(self, x):
        self.neuronal_charge(x)
        return self.v


def test_a_neuron_that_gives_its_potential_is_a_readout():
    def build():
        return nn.Sequential(
            nn.Linear(6, 8), lif(), nn.Linear(8, 8), lif(), nn.Linear(8, 2),
            Potential(2.0, True, step_mode="m"),
        )  # fmt: skip

    x = torch.rand(4, 2, 6) * 9
    report = quantize_(build(), "1w-2u", sample=x, strict=True)
    assert report["5"].action == "kept"
    assert "read-out" in report["5"].reason
    net = build()
    quantize_(net, "1w-2u", sample=x)
    assert not quantize_(net, "1w-2u").changed  # without a sample it is as it was
    asked = QuantConfig(rules=(Rule(name="5", membrane=4),))
    assert quantize_(build(), asked, sample=x)["5"].membrane_bits == 4


class Cells(nn.Module):
    def __init__(self, kind, layers):
        super().__init__()
        self.rnn, self.fc = kind(6, 8, layers), nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(self.rnn(x)[0][-1])


@pytest.mark.parametrize("kind", ["SpikingLSTM", "SpikingGRU", "SpikingVanillaRNN"])
def test_cells_of_spikingjelly(kind):
    net = Cells(getattr(rnn, kind), 2)
    report = quantize_(net, "1w-2u", sample=torch.rand(4, 3, 6), strict=kind != "SpikingVanillaRNN")
    # The image enters by the first cell; recurrent weights are never first or last.
    assert report.firsts == ("rnn.cells.0.linear_ih",)
    assert report.lasts == ("fc",)
    hidden = [f"rnn.cells.{at}" for at in ("0.linear_hh", "1.linear_ih", "1.linear_hh")]
    assert bits(report, *hidden) == (1, 1, 1)
    if kind == "SpikingVanillaRNN":
        assert report["rnn.cells.0"].action == "nothing"
        assert "only state is the spikes" in report["rnn.cells.0"].reason
    else:
        assert report["rnn.cells.1"].membrane_bits == 2
        assert report.states.by_bits == {2: 2 * 3 * 8}
    assert not quantize_(net, "1w-2u").changed
    config = QuantConfig(rules=(Rule(name="rnn.cells.*", membrane="keep"),))
    if kind != "SpikingVanillaRNN":
        report = quantize_(Cells(getattr(rnn, kind), 2), config)
        assert bits(report, *hidden) == (None, None, None)


def test_calibration_says_why_a_cell_of_bits_has_no_scale():
    net = Cells(rnn.SpikingVanillaRNN, 1)
    quantize_(net, "1w-2u")
    with pytest.raises(StateError, match="only state is the spikes of the step before"):
        calibrate(net, [torch.rand(4, 3, 6)])


def test_feedback_of_the_last_neuron_does_not_make_it_hidden():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.lif = nn.Linear(6, 8), snn.Leaky(0.9, init_hidden=True)
            self.fc2 = nn.Linear(8, 4)
            self.out = snn.RLeaky(0.9, linear_features=4, init_hidden=True)

        def forward(self, x):
            return torch.stack([self.out(self.fc2(self.lif(self.fc1(step)))) for step in x])

    report = quantize_(Net(), "1w-2u", sample=torch.rand(5, 2, 6) * 9)
    assert report.firsts == ("fc1",)
    assert report.lasts == ("fc2",)
    assert report["out.recurrent"].weight_bits == 1


class OwnMatrix(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return x @ self.w


@pytest.mark.parametrize(
    ("make", "operations"),
    [
        # Four projections of eight, and two layers of eight by sixteen, at six positions.
        (lambda: nn.TransformerEncoderLayer(8, 2, 16), 6 * (4 * 64 + 2 * 128)),
        (OwnMatrix, 6 * 64),
    ],
)
def test_operations_that_stay_in_float_are_counted(make, operations):
    net = nn.Sequential(nn.Linear(6, 8), lif(), make(), lif(), nn.Linear(8, 2))
    report = quantize_(net, "1w-2u", sample=torch.rand(3, 2, 6))
    assert report.operations.by_bits == {8: 6 * (48 + 16), 32: operations}
    assert "with a rule" in report["2"].reason or "one by one" in report["2"].reason
    sizes = [number for _, number, _ in report.floating]
    assert sizes == sorted(sizes, reverse=True)
