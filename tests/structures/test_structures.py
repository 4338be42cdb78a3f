"""Networks shaped like published ones: nothing of them stays in floating point unsaid."""

import functools
import re

import pytest
import torch
from torch import nn

from benchmarks import examine
from benchmarks.structures import structures

#: What quantize_ warns of is in its report, and looked at in its own tests.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CONFIG = "1w-2u"
STRUCTURES = structures()

#: Neurons that stay in floating point for good: they only integrate, and their potential is the
#: answer.
READOUTS = {
    "StereoSpike": {"Ineurons"},
    "optical flow": {"read_low", "read_high"},
    "SHD, Synaptic": {"lif3"},
    "SHD, RLeaky": {"lif2"},
    "recurrent containers": {"readout"},
    "actor-critic": {"actor.1", "critic.1"},
    "DQN": {"network.8"},
    "explicit mem, read-out": {"readout"},
    "regression": {"li_out"},
    "regression, recurrent": {"out"},
}

#: Cells whose only state is the spikes of the step before.
STATELESS = {"SpikingVanillaRNN": {"rnn.cells.0"}}

#: Networks of a first and a last layer: strict says that no weight has the one bit asked for.
NO_HIDDEN_LAYER = {
    "Sequential with init_hidden",
    "reset_mem, calls without mem",
    "tutorial 3",
    "tutorial 5",
    "population coding",
}

#: Layers that see the real-valued input, and those after which no weights come. Where nothing is
#: said there is one of each, and they are first and last in the order of definition.
ENDS = {
    "StereoSpike": (
        {"bottom.0"},
        {"predict_depth1.0.up.1", "predict_depth2.0.up.1", "predict_depth3.0.up.1"},
    ),
    "optical flow": ({"enc1.0"}, {"flow_low", "flow_high"}),
    "EMS-YOLO": ({"stem.0"}, {"detect.m.0", "detect.m.1"}),
    "SpikeYOLO": (
        {"stem.0"},
        {f"detect.{branch}.{i}.1.conv" for branch in ("cv2", "cv3") for i in (0, 1)},
    ),
    "actor-critic": ({"body.0"}, {"actor.0", "critic.0"}),
    "policy with two inputs": ({"vision.0", "state.0"}, {"pi", "value"}),
}

#: What cannot be done yet, by test and structure. Strict: what becomes possible turns red here,
#: and its line is taken out.
PENDING: dict[str, dict[str, str]] = {
    "weights": {},
    "neurons": {},
    "strict": {},
    "ends": {},
    "deploys": {},
    "replaced": {},
}

#: What has no integer program, and what is said of it.
NO_PROGRAM = {
    "MS-ResNet": "no quantized membrane potential.*replace=",
    "TET VGG": "no quantized membrane potential.*replace=",
    "TEBN VGG": "no quantized membrane potential.*replace=",
    "EMS-YOLO": "no quantized membrane potential.*replace=",
    "SpikeYOLO": "no quantized membrane potential.*replace=",
    "U-Net, bilinear": r"^up1\.up: interpolation of mode 'bilinear'.*mode='nearest'",
    "StereoSpike": "^Ineurons: it is used in two places.*a neuron of its own",
    "speech, Conv1d": "^lif1: it runs over an axis of the sample along which layers.*in front",
    "conv and SConv2dLSTM": "^sclstm1: a QSConv2dLSTM has no integer form; neurons that can be",
    "conv and SLSTM": "^slstm: a QSLSTM has no integer form; neurons that can be",
    "SpikingLSTM": "a QuantSpikingLSTMCell has no integer form",
    "SpikingVanillaRNN": "no quantized membrane potential",
    "SpikingGRU": "a QuantSpikingGRUCell has no integer form",
    "recurrent containers": "^filter: a SynapseFilter leaks only where.*use a",
    "policy with two inputs": "several inputs cannot be lowered: join",
    "packed attention": r"^attn: torch's attention divides.*\(softmax\).*products",
}


def cases(test, names=STRUCTURES):
    """The structures as parameters, those of ``PENDING`` expected to fail."""
    for name in names:
        reason = PENDING[test].get(name)
        marks = [pytest.mark.xfail(strict=True, reason=reason)] if reason else []
        yield pytest.param(name, id=re.sub(r"\W+", "-", name), marks=marks)


def converted(name):
    """A structure after conversion: model, findings, input, forward, and what builds it."""
    entry = STRUCTURES[name]

    def fresh():
        torch.manual_seed(0)
        return entry.build(small=True).model

    torch.manual_seed(0)
    _, x, forward = entry.build(small=True)
    net, found = examine.convert(fresh, x, CONFIG, forward, tuple(entry.replace))
    return net, found, x, forward, fresh


@functools.cache
def examined(name):
    """Of a structure after conversion the findings, and the bits of its synapses by name."""
    net, found, *_ = converted(name)
    bits = {path.removesuffix(".weight"): bits for path, _, bits in examine.synapses(net)}
    return found, bits


@pytest.mark.parametrize("name", STRUCTURES)
def test_float_structures_run_and_train(name):
    net, x, forward = STRUCTURES[name].build(small=True)
    outputs = examine.tensors(examine.run(net, x, forward))
    assert outputs
    assert all(y.isfinite().all() for y in outputs)
    sum(y.square().sum() for y in outputs if y.requires_grad).backward()
    trained = [p for p in net.parameters() if p.requires_grad and p.grad is not None]
    assert len(trained) > len(list(net.parameters())) // 2


@pytest.mark.parametrize("name", cases("weights"))
def test_at_most_three_percent_of_the_weights_stay_float(name):
    found, _ = examined(name)
    assert found.float_share <= 0.03, found.float_weights


@pytest.mark.parametrize("name", cases("neurons"))
def test_every_neuron_is_quantized_or_has_its_reason(name):
    found, _ = examined(name)
    assert found.neurons > 0
    left = dict(found.float_neurons)
    for neuron in READOUTS.get(name, ()):
        assert "read-out" in left.pop(neuron)
    for neuron in STATELESS.get(name, ()):
        assert re.search("no (membrane )?(potential|state)|only .*spikes", left.pop(neuron))
    if STRUCTURES[name].replace:
        assert all(reason.startswith("unsupported") for reason in left.values()), left
    else:
        assert left == {}


@pytest.mark.parametrize("name", cases("strict"))
def test_strict_refuses_what_is_written_from_scratch_or_has_no_hidden_layer(name):
    entry = STRUCTURES[name]
    _, x, forward = entry.build(small=True)
    said = examine.strict(lambda: entry.build(small=True).model, x, CONFIG, forward)
    if name in NO_HIDDEN_LAYER:
        assert re.search("no layer has 1-bit weights", said)
    elif name in STATELESS:
        assert re.search("no membrane potential was quantized", said)
    elif entry.replace:
        assert all(kind.__name__ in said for kind in entry.replace)
    else:
        assert said == ""


@pytest.mark.parametrize("name", cases("replaced", [n for n, s in STRUCTURES.items() if s.replace]))
def test_a_neuron_from_scratch_is_quantized_once_its_user_says_what_it_is(name):
    entry = STRUCTURES[name]
    model, x, forward = entry.build(small=True)
    _, found = examine.convert(lambda: model, x, CONFIG, forward, replace=entry.replace)
    assert found.neurons > 0
    assert found.float_neurons == {}
    said = examine.strict(
        lambda: entry.build(small=True).model, x, CONFIG, forward, replace=entry.replace
    )
    assert said == ""


@pytest.mark.parametrize("name", cases("ends", ENDS))
def test_every_stem_and_every_head_has_eight_bits(name):
    _, bits = examined(name)
    stems, heads = ENDS[name]
    assert {path for path, n in bits.items() if n == 8} == stems | heads


@pytest.mark.parametrize("name", STRUCTURES)
def test_quantized_structures_train_and_come_back_from_their_state_dict(name):
    net, found, x, forward, fresh = converted(name)
    checks = {**found.checks, **examine.train(net, x, forward, steps=1)}
    checks["state_dict round trip"] = examine.round_trip(net, fresh, x, CONFIG, forward)
    assert all(checks.values()), checks


@pytest.mark.parametrize("name", cases("deploys"))
def test_structures_deploy(name):
    net, _, x, forward, _ = converted(name)
    if name in NO_PROGRAM:
        with pytest.raises(Exception, match=NO_PROGRAM[name]):
            examine.agreement(net, [x], forward)
        return
    torch.manual_seed(1)
    samples = [x, STRUCTURES[name].build(small=True).sample]
    agreement = examine.agreement(net, samples, forward)
    assert agreement["predictions"] >= 0.75
    assert agreement["spikes"] is None or agreement["spikes"] >= 0.97


def test_the_shares_notice_a_layer_that_stays_float():
    from qsnn_ext import QuantConfig, Rule

    def build():
        return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))

    config = QuantConfig(rules=(Rule.keep(name="1"),))
    _, found = examine.convert(build, torch.rand(2, 4), config)
    assert found.weights == {"1": 0, "8": 48, "float": 64}
    assert found.vectors == 18
    assert found.float_weights == ["1.weight"]
