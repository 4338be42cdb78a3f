"""quantize_: what it changes, what it leaves, what it says, and that it never does half a job."""

import gc
import resource
import time
import warnings
from pathlib import Path

import pytest
import snntorch as snn
import torch
from hypothesis import given
from hypothesis import strategies as st
from snntorch import utils
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.nn.utils import prune

from qsnn_ext import (
    BinaryWeight,
    IntWeight,
    MembraneConfig,
    QLeaky,
    QuantConfig,
    QuantLIFNode,
    Rule,
    WeightConfig,
    conversion_report,
    convert,
    layers,
    load_checkpoint,
    quantize_,
    save_checkpoint,
)
from qsnn_ext import spikingjelly as sj
from qsnn_ext.errors import ConfigError, ConversionError, InputTypeError
from qsnn_ext.models import resnet19


def conv_net(node=neuron.LIFNode, **options):
    """Two convolutions, two linear layers, of torch and of SpikingJelly, multi-step."""
    net = nn.Sequential(
        layer.Conv2d(1, 4, 3, padding=1, bias=False),
        layer.BatchNorm2d(4),
        node(**options),
        layer.SeqToANNContainer(nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(2)),
        node(**options),
        layer.Flatten(),
        layer.Linear(64, 10),
        node(**options),
        nn.Linear(10, 3),
    )
    functional.set_step_mode(net, "m")
    return net


def frames():
    return torch.rand(3, 2, 1, 8, 8) * 2


def run(net, x):
    functional.reset_net(net)
    return net(x)


# --------------------------------------------------------------------------- what is swapped


def test_layers_and_neurons_become_their_counterparts():
    net = conv_net()
    report = quantize_(net, "1w-2u")
    kinds = [type(m) for m in (net[0], net[2], net[3][0], net[6], net[8])]
    assert kinds == [
        sj.QuantConv2d, QuantLIFNode, layers.BinaryConv2d, sj.BinaryLinear, layers.QuantLinear,
    ]  # fmt: skip
    assert net[2].bits == 2
    assert (report["0"].weight_bits, report["3.0"].weight_bits) == (8, 1)
    assert report["2"].membrane_bits == 2
    assert report["0"].type == "Conv2d"
    assert report["0"].became == "QuantConv2d"
    assert report.changed


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear])
@pytest.mark.parametrize("host", ["torch", "spikingjelly"])
@pytest.mark.parametrize("bits", [1, 4])
def test_every_layer_of_torch_and_spikingjelly_has_a_counterpart(kind, host, bits):
    kind = kind if host == "torch" else getattr(layer, kind.__name__)
    model = kind(4, 4) if "Linear" in kind.__name__ else kind(4, 4, 3)
    quantize_(model, QuantConfig(first=bits))
    assert isinstance(model.quantizer, BinaryWeight if bits == 1 else IntWeight)
    assert model.bits == bits
    assert isinstance(model, kind)


@pytest.mark.parametrize("node", [neuron.LIFNode, neuron.IFNode, neuron.ParametricLIFNode])
def test_spikingjelly_neurons_keep_their_parameters_and_flags(node):
    kwargs = {"v_threshold": 0.7, "v_reset": None, "detach_reset": True, "step_mode": "m"}
    float_node = node(store_v_seq=True, **kwargs).eval()
    parameters = dict(float_node.named_parameters())
    quantize_(float_node, "1w-4u")
    assert type(float_node).__name__ == "Quant" + node.__name__
    assert {k: id(v) for k, v in float_node.named_parameters()} == {
        k: id(v) for k, v in parameters.items()
    }
    for name, value in kwargs.items():
        assert getattr(float_node, name) == value
    assert float_node.store_v_seq
    assert not float_node.training
    assert not float_node.membrane.training


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_options_reach_the_quantizers(preset):
    net = conv_net()
    membrane = MembraneConfig(4, scale="absmax", squash="tanh", mode="frozen", momentum=0.3,
                              order="quantize_first")  # fmt: skip
    quantize_(net, QuantConfig(weight=WeightConfig(standardize="none"), membrane=membrane,
                               preset=preset))  # fmt: skip
    options = net[2].membrane.options()
    assert net[2].order == "quantize_first"
    assert (options["scale"], options["squash"], options["mode"]) == ("absmax", "tanh", "frozen")
    assert options["momentum"] == 0.3
    assert net[6].quantizer.standardize is None
    assert net[6].quantizer.gradient == ("clipped" if preset == "paper" else "annealed")


def test_identity_of_parameters_hooks_names_and_modes_stays():
    net = conv_net().double()
    net[2].eval()
    net[6].weight.requires_grad_(False)
    seen = []
    net[6].register_forward_hook(lambda *_: seen.append("hook"))
    before = {name: id(p) for name, p in net.named_parameters()}
    modules = [id(m) for m in net.modules()]
    keys = list(net.state_dict())
    modes = {id(m): m.training for m in net.modules()}
    quantize_(net, "1w-2u")
    assert {name: id(p) for name, p in net.named_parameters()} == before
    assert [i for i in map(id, net.modules()) if i in modules] == modules
    assert list(net.state_dict()) == keys
    assert all(m.training == modes.get(id(m), m.training) for m in net.modules())
    assert not net[2].membrane.training
    assert not net[6].weight.requires_grad
    assert run(net, frames().double()).dtype == torch.float64
    assert seen == ["hook"]


def test_an_optimizer_built_before_trains_the_quantized_model():
    net = conv_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    quantize_(net, "1w-2u")
    before = net[6].weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        (run(net, frames()) - 1).square().sum().backward()
        optimizer.step()
    assert not torch.equal(net[6].weight, before)


def test_float_checkpoints_load_strictly_after_conversion():
    source, net = conv_net(), conv_net()
    quantize_(net, "1w-2u")
    net.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(net[6].weight, source[6].weight)


@pytest.mark.parametrize("bits", [2, 4])
def test_built_and_converted_models_agree(bits):
    """A model given the neuron class and one converted from the float class are the same."""
    built = conv_net(QuantLIFNode, bits=bits, tau=2.0)
    converted = conv_net(neuron.LIFNode, tau=2.0)
    converted.load_state_dict(built.state_dict())
    quantize_(converted, f"32w-{bits}u")
    quantize_(built, f"32w-{bits}u")  # nothing left to do
    x = frames()
    assert torch.equal(run(built, x), run(converted, x))
    quantize_(built, f"1w-{bits}u")
    quantize_(converted, f"1w-{bits}u")
    assert torch.equal(run(built, x), run(converted, x))


def test_this_packages_networks_are_what_conversion_makes_of_them():
    built = resnet19(width=0.05, bits="1w-2u").eval()
    converted = resnet19(width=0.05, bits="32w-32u").eval()
    converted.load_state_dict(built.state_dict())
    assert not quantize_(built, "1w-2u").changed
    assert quantize_(converted, "1w-2u").changed
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(built(x), converted(x))


# --------------------------------------------------------------------------- first and last


class Backwards(nn.Module):
    """Layers defined in the reverse of the order in which they run."""

    def __init__(self):
        super().__init__()
        self.c = nn.Linear(4, 2)
        self.b = nn.Linear(4, 4)
        self.a = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        return self.c(self.b(self.a(x)))


def test_first_and_last_go_by_running_order_with_a_sample():
    net = Backwards()
    report = quantize_(net, "1w-2u", sample=torch.rand(1, 4))
    assert (report.first, report.last) == ("a", "c")
    assert (net.a.bits, net.b.bits, net.c.bits) == (8, 1, 8)
    assert "running order" in report.ends_by
    assert report.unseen == ("unused",)
    assert "unused" in str(report).splitlines()[-1]


def test_first_and_last_go_by_definition_order_without():
    report = quantize_(Backwards(), "1w-2u")
    assert (report.first, report.last, report.ends_by) == ("c", "unused", "definition order")


def test_samples_may_be_positional_or_named():
    for sample in ((torch.rand(1, 4),), {"x": torch.rand(1, 4)}):
        assert quantize_(Backwards(), "1w-2u", sample).first == "a"


def test_the_traced_run_leaves_no_trace():
    net = conv_net().train()
    run(net, frames())
    state = {k: v.clone() for k, v in net.state_dict().items()}
    potential = net[2].v
    sample = torch.rand(2, 1, 1, 8, 8)
    generator = torch.get_rng_state()
    report = quantize_(net, "32w-32u", sample)
    assert report.first == "0"
    assert net[2].v is potential
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(m.training for m in net.modules())


# --------------------------------------------------------------------------- rules


def test_the_first_matching_rule_wins_over_ends_and_defaults():
    net = conv_net()
    config = QuantConfig(rules=(
        Rule(name="0", weight=WeightConfig(4)),
        Rule(type=nn.Linear, weight="keep"),
        Rule(name="2", membrane=MembraneConfig(8)),
        Rule(name="4", membrane="keep"),
    ))  # fmt: skip
    report = quantize_(net, config)
    assert net[0].bits == 4
    assert type(net[6]) is layer.Linear
    assert type(net[8]) is nn.Linear
    assert report["6"].action == "kept"
    assert "Linear" in report["6"].reason
    assert net[2].bits == 8
    assert type(net[4]) is neuron.LIFNode
    assert net[7].bits == 2


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Rule(name="layr1.conv", weight=8)], "did you mean 'layer1.conv'"),
        ([Rule(type="Convv2d", weight=8)], "did you mean 'Conv2d'"),
        ([Rule.keep("layer1")], r"'layer1\.\*'"),
        ([Rule(name="layer1.conv", membrane=4)], "no membrane potential"),
        ([Rule(name="lif", weight=4)], "no weights"),
        ([Rule.keep("*"), Rule(name="lif", membrane=4)], "never reached"),
        ([Rule(type=nn.Conv2d, weight=4), Rule(name="layer1.conv", weight=8)], "never reached"),
    ],
)
def test_rules_that_cannot_do_anything_are_errors(rules, message):
    net = nn.ModuleDict({
        "layer1": nn.ModuleDict({"conv": nn.Conv2d(1, 2, 3)}),
        "lif": neuron.LIFNode(),
    })  # fmt: skip
    with pytest.raises(ConfigError, match=f"(?i){message}"):
        quantize_(net, QuantConfig(rules=tuple(rules)))
    assert type(net["lif"]) is neuron.LIFNode


def test_a_rule_for_one_module_that_cannot_be_quantized_is_an_error():
    net = nn.Sequential(nn.Linear(2, 2), neuron.DSRIFNode())
    with pytest.raises(ConversionError, match="asks to quantize DSRIFNode"):
        quantize_(net, QuantConfig(rules=(Rule(name="1", membrane=4),)))


# --------------------------------------------------------------------------- left alone, listed


class Odd(nn.Module):
    """Holds weights of its own."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(3, 3))


class MyConv(nn.Conv2d):
    """Has another weight than the parameter of that name."""

    @property
    def weight(self):
        return self.__getattr__("weight") * 2


def _renormed(function, module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and in use
        return function(module)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (neuron.DSRIFNode(), "has no step of its own"),
        (snn.Leaky(beta=0.9, state_quant=lambda x: x), "its own state_quant"),
        (nn.TransformerEncoderLayer(4, 2), "fused"),
        (nn.Embedding(3, 4), "Embedding is unknown"),
        (MyConv(2, 2, 3), "MyConv computes its weight in a way of its own"),
        (Odd(), "its matrix stay float"),
        (nn.LazyLinear(3), "LazyLinear changes what Linear does"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "parametrized"),
        (_renormed(nn.utils.weight_norm, nn.Linear(2, 2)), "remove_weight_norm"),
        (_renormed(nn.utils.spectral_norm, nn.Linear(2, 2)), "remove_spectral_norm"),
        (prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5), "1 bit has no zero"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_what_cannot_be_quantized_is_listed_and_strict_refuses_it(module, reason):
    net = nn.ModuleDict({"in": nn.Linear(2, 2), "odd": module, "out": nn.Linear(2, 2)})
    kind = type(module)
    with pytest.raises(ConversionError, match="odd"):
        quantize_(net, "1w-2u", strict=True)
    assert type(net["in"]) is nn.Linear
    report = quantize_(net, "1w-2u")
    assert type(module) is kind
    assert report["odd"].action == "unsupported"
    assert reason in report["odd"].reason
    assert f"unsupported: {report['odd'].reason}" in str(report)
    assert net["in"].bits == 8


def test_weights_a_fused_call_would_read_are_not_swapped():
    """In evaluation torch's encoder layer bypasses the forward of its linear layers."""
    net = nn.TransformerEncoderLayer(4, 2, dim_feedforward=8)
    report = quantize_(net, "1w-2u")
    assert type(net.linear1) is nn.Linear
    assert report["linear1"].action == "unsupported"
    assert report["self_attn.out_proj"].action == "unsupported"


def test_a_rule_keeps_attention_and_what_is_in_it():
    net = nn.ModuleDict({"in": nn.Linear(4, 4), "attention": nn.MultiheadAttention(4, 2)})
    report = quantize_(net, QuantConfig(rules=(Rule.keep("attention"),)), strict=True)
    assert report["attention"].action == report["attention.out_proj"].action == "kept"


def test_lazy_layers_are_converted_once_a_sample_has_shaped_them():
    net = nn.Sequential(nn.LazyLinear(4), neuron.LIFNode(), nn.LazyLinear(2))
    report = quantize_(net, "1w-2u", sample=torch.rand(2, 5))
    assert (report["0"].weight_bits, report["2"].weight_bits) == (8, 8)
    assert net(torch.rand(2, 5)).shape == (2, 2)


def test_weights_too_few_to_standardise_are_listed():
    net = nn.Sequential(nn.Linear(3, 3), nn.Conv1d(3, 3, 1, groups=3), nn.Linear(3, 3))
    report = quantize_(net, QuantConfig(preset="official"))
    assert report["1"].action == "unsupported"
    assert "standard deviation" in report["1"].reason


def test_every_module_is_in_the_report():
    net = conv_net()
    names = [name for name, _ in net.named_modules()]
    report = quantize_(net, "1w-2u")
    assert [row.name for row in report.modules] == names
    assert {row.action for row in report.modules} == {"converted", "nothing"}
    table = str(report)
    assert all(name in table for name in names)
    assert convert.ConversionReport.from_dict(report.to_dict()) == report
    with pytest.raises(KeyError):
        report["nowhere"]


@pytest.mark.parametrize(
    "readout",
    [
        snn.Leaky(beta=0.9, reset_mechanism="none"),
        neuron.LIFNode(v_threshold=float("inf"), v_reset=None),
    ],
    ids=["snntorch", "spikingjelly"],
)
def test_readouts_are_left_alone_unless_asked_for(readout):
    kind = type(readout)
    net = nn.Sequential(nn.Linear(3, 3), readout)
    report = quantize_(net, "1w-2u", strict=True)
    assert type(readout) is kind
    assert report["1"].action == "kept"
    assert "read-out" in report["1"].reason
    quantize_(net, QuantConfig(readouts="quantize"))
    assert readout.bits == 2
    quantize_(net, QuantConfig(rules=(Rule(name="1", membrane=4),)))
    assert readout.bits == 4


def test_32_bits_leave_and_restore_floats():
    net, x = conv_net(), frames()
    expected = run(net, x)
    kinds = [type(m) for m in net.modules()]
    assert not quantize_(net, "32w-32u").changed
    quantize_(net, "1w-2u")
    assert quantize_(net, "32w-32u").changed
    assert [type(m) for m in net.modules()] == kinds
    assert torch.equal(run(net, x), expected)


# --------------------------------------------------------------------------- again, copies, failure


def test_a_second_run_is_a_no_op_that_says_so():
    net = conv_net()
    quantize_(net, "1w-2u", sample=frames())
    quantizers = [net[0].quantizer, net[2].membrane]
    report = quantize_(net, "1w-2u")
    assert not report.changed
    assert "nothing was changed" in str(report)
    assert "running order" in report.ends_by  # what the first run found still holds
    assert quantizers == [net[0].quantizer, net[2].membrane]


def test_a_second_run_with_a_sample_runs_a_model_whose_scales_are_not_yet_set():
    net = conv_net()
    config = QuantConfig(membrane=MembraneConfig(2, mode="frozen"))
    quantize_(net, config)
    assert not quantize_(net, config, sample=frames()).changed
    assert net[2].membrane.mode == "frozen"


def test_a_second_run_keeps_calibration_and_temperature():
    net = conv_net()
    quantize_(net, "official")
    net[2].membrane.freeze(0.5)
    net[6].quantizer.temperature.fill_(3.0)
    assert not quantize_(net, "official").changed
    assert net[2].membrane.mode == "frozen"


def test_another_configuration_exchanges_quantizers_and_keeps_weights():
    net = conv_net()
    quantize_(net, "1w-2u")
    weight = net[6].weight
    quantize_(net, "4w-8u")
    assert net[6].weight is weight
    assert isinstance(net[6].quantizer, IntWeight)
    assert net[2].bits == 8
    assert type(net[6]) is sj.QuantLinear


def test_a_copy_leaves_the_original_alone_even_with_a_live_graph():
    net, x = conv_net(), frames()
    net(x)  # states now hang in a graph, which deepcopy alone refuses
    assert net[2].v.grad_fn is not None
    copied = quantize_(net, "1w-2u", inplace=False)
    assert type(net[2]) is neuron.LIFNode
    assert type(copied[2]) is QuantLIFNode
    assert copied[6].weight is not net[6].weight
    assert conversion_report(net) is None
    assert conversion_report(copied).changed
    assert run(copied, x).shape == run(net, x).shape


def test_a_failure_half_way_leaves_the_model_untouched(monkeypatch):
    net, x = conv_net(), frames()
    expected = run(net, x)
    kinds = [type(m) for m in net.modules()]
    attributes = [sorted(m.__dict__) for m in net.modules()]

    def fail(*_):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(layers.QuantLinear, "from_float", fail)  # the last layer
    with pytest.raises(ConversionError, match="undone: RuntimeError: out of luck"):
        quantize_(net, "1w-2u")
    assert [type(m) for m in net.modules()] == kinds
    assert [sorted(m.__dict__) for m in net.modules()] == attributes
    assert conversion_report(net) is None
    assert torch.equal(run(net, x), expected)


def test_reset_net_still_resets_after_conversion():
    net = conv_net()
    run(net, frames())  # the host has now cached what to reset
    quantize_(net, "1w-2u")
    net(frames())
    functional.reset_net(net)
    assert all(m.v == 0.0 for m in net.modules() if isinstance(m, neuron.BaseNode))


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("model", [None, 3, "net", nn.Linear, [nn.Linear(2, 2)]])
def test_only_modules_are_quantized(model):
    with pytest.raises(InputTypeError, match="needs a module"):
        quantize_(model, "1w-2u")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    net = conv_net()
    with torch.no_grad():
        net[6].weight[3, 4] = value
    with pytest.raises(ConversionError, match="weight of 6 holds NaN or infinity"):
        quantize_(net, "1w-2u")
    assert type(net[0]) is layer.Conv2d


def test_the_meta_device_is_refused():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(ConversionError, match="meta device"):
        quantize_(net, "1w-2u")


def test_scripted_models_are_refused():
    with pytest.raises(ConversionError, match="scripted"):
        quantize_(torch.jit.script(nn.Linear(2, 2)), "1w-2u")


def test_a_sample_the_model_does_not_take_is_an_error():
    net = conv_net()
    with pytest.raises(ConversionError, match="does not run on the sample"):
        quantize_(net, "1w-2u", sample=torch.rand(3))
    assert type(net[0]) is layer.Conv2d


def test_tied_weights_stay_tied_and_must_agree():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    net[2].weight = net[1].weight
    quantize_(net, "1w-2u")
    assert net[2].weight is net[1].weight
    assert torch.equal(net[1].quantized_weight, net[2].quantized_weight)
    other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    other[1].weight = other[0].weight  # 8 bits as the first layer, 1 bit as a hidden one
    with pytest.raises(ConversionError, match="1 and 0 share one weight"):
        quantize_(other, "1w-2u")


def test_a_module_registered_twice_is_converted_once():
    shared = nn.Linear(3, 3)
    net = nn.ModuleDict({"in": nn.Linear(3, 3), "a": shared, "b": shared, "out": nn.Linear(3, 3)})
    report = quantize_(net, QuantConfig(rules=(Rule(name="b", weight=4),)))
    assert net["a"] is net["b"]
    assert shared.bits == 4
    assert report["b"] is report["a"]
    assert report["a"].aliases == ("b",)


def test_frozen_parameters_stay_frozen_and_get_no_gradient():
    net = conv_net()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    net[8].weight.requires_grad_(True)
    quantize_(net, "1w-2u")
    run(net, frames()).sum().backward()
    assert net[6].weight.grad is None
    assert net[8].weight.grad is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_quantizers_follow_the_model_to_its_device():
    net = conv_net().cuda()
    quantize_(net, QuantConfig(membrane=MembraneConfig(2, mode="frozen")))
    assert net[2].membrane.alpha.device == net[0].weight.device
    assert run(net, frames().cuda()).is_cuda


# --------------------------------------------------------------------------- snnTorch


def leaky_net():
    return nn.Sequential(
        nn.Linear(4, 8),
        snn.Leaky(beta=0.9, init_hidden=True, learn_beta=True, threshold=0.5),
        nn.Linear(8, 8),
        snn.Leaky(beta=0.9, init_hidden=True),
        nn.Linear(8, 2),
        snn.Leaky(beta=0.9, init_hidden=True, output=True),
    )


def test_snntorch_models_keep_their_parameters_and_their_place_on_the_hosts_list():
    snn.SpikingNeuron.instances.clear()
    net = leaky_net()
    before = [id(n) for n in snn.SpikingNeuron.instances]
    beta, keys = net[1].beta, list(net.state_dict())
    quantize_(net, "1w-2u", sample=torch.rand(2, 4))
    assert type(net[1]) is QLeaky
    assert net[1].beta is beta
    assert list(net.state_dict()) == keys
    assert [id(n) for n in snn.SpikingNeuron.instances] == before


def test_utils_reset_finds_the_neurons_of_a_copy():
    copied = quantize_(leaky_net(), "1w-2u", inplace=False)
    for _ in range(3):
        copied(torch.rand(2, 4) * 5)
    assert copied[1].mem.abs().sum() > 0
    utils.reset(copied)
    assert all(copied[i].mem.abs().sum() == 0 for i in (1, 3, 5))


def test_a_hundred_copies_leave_nothing_on_the_hosts_list():
    snn.SpikingNeuron.instances.clear()
    net = leaky_net()
    held = len(snn.SpikingNeuron.instances)
    for _ in range(100):
        quantize_(net, "1w-2u", inplace=False)
    gc.collect()
    assert len(snn.SpikingNeuron.instances) == held


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_a_hundred_copies_leave_no_memory_behind():
    def resident():
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    net = nn.Sequential(nn.Linear(512, 512), snn.Leaky(beta=0.9, init_hidden=True))
    for _ in range(10):
        quantize_(net, "1w-2u", inplace=False)
    before = resident()
    for _ in range(100):
        quantize_(net, "1w-2u", inplace=False)
    assert resident() - before < 20 * 512 * 512 * 4  # a fifth of what keeping all would take


def test_a_hundred_conversions_in_place_add_nothing_either():
    snn.SpikingNeuron.instances.clear()
    net = leaky_net()
    held = list(snn.SpikingNeuron.instances)
    for turn in range(100):
        quantize_(net, "1w-2u" if turn % 2 else "1w-4u")
    assert all(a is b for a, b in zip(held, snn.SpikingNeuron.instances, strict=True))


# --------------------------------------------------------------------------- cost


def test_resnet19_converts_in_under_a_second():
    best = float("inf")
    for _ in range(3):
        net = resnet19()
        start = time.process_time()  # other processes' time is not counted
        quantize_(net, "1w-2u")
        best = min(best, time.process_time() - start)
    assert best < 1.0


def test_conversion_allocates_no_second_set_of_weights():
    """The weights are looked at one layer at a time, and none is copied."""
    net = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(8)))
    one_layer = 256 * 256 * 4
    with torch.profiler.profile(profile_memory=True) as profiler:
        quantize_(net, "1w-2u")
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak <= one_layer


# --------------------------------------------------------------------------- properties


@st.composite
def small_models(draw):
    """A random small multi-step network of SpikingJelly parts, its input and a configuration."""
    kinds = [neuron.LIFNode, neuron.IFNode, neuron.ParametricLIFNode]
    widths = draw(st.lists(st.integers(2, 6), min_size=1, max_size=3))
    convolutional = draw(st.booleans())
    seed = draw(st.integers(0, 2**16))
    nodes = [(draw(st.sampled_from(kinds)), draw(st.sampled_from([0.0, None]))) for _ in widths]
    norm = draw(st.booleans())
    config = QuantConfig(
        weight=draw(st.sampled_from([1, 2, 4, 8, 32])),
        membrane=draw(st.sampled_from([2, 4, 8, 32])),
        preset=draw(st.sampled_from(["paper", "official"])),
        first=draw(st.sampled_from([None, 1, 8, 32])),
        rules=draw(st.sampled_from([(), (Rule(type=nn.Linear, weight=4),), (Rule.keep("1"),)])),
    )

    def build():
        torch.manual_seed(seed)
        parts, width = [], 2
        for out, (node, v_reset) in zip(widths, nodes, strict=True):
            parts.append(
                layer.Conv2d(width, out, 3, padding=1)
                if convolutional
                else layer.Linear(width, out)
            )
            parts.append(node(v_reset=v_reset, v_threshold=0.5))
            if norm and convolutional:
                parts.append(layer.BatchNorm2d(out))
            width = out
        if convolutional:
            parts += [layer.AdaptiveAvgPool2d(1), layer.Flatten()]
        net = nn.Sequential(*parts, layer.Linear(width, 3))
        functional.set_step_mode(net, "m")
        return net

    x = torch.rand(2, 2, 2, *([4, 4] if convolutional else [])) * 3
    return build, x, config


@given(case=small_models())
def test_properties_of_conversion(case, tmp_path_factory):
    """Shapes and keys stay; idempotent; deterministic; a checkpoint gives the same outputs."""
    build, x, config = case
    net, twin = build().eval(), build().eval()
    shape, keys = run(net, x).shape, list(net.state_dict())
    report = quantize_(net, config)
    out = run(net, x)
    assert out.shape == shape
    assert list(net.state_dict()) == keys
    assert not quantize_(net, config).changed
    assert torch.equal(run(net, x), out)
    assert quantize_(twin, config) == report
    assert torch.equal(run(twin, x), out)
    path = tmp_path_factory.mktemp("round") / "net.safetensors"
    save_checkpoint(net, path)
    assert torch.equal(run(load_checkpoint(path, build).eval(), x), out)
