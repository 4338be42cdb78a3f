"""Promise: a conversion that fails or is interrupted at any point leaves the model as it was: the
same objects, classes, attributes, parameters, buffers, hooks and outputs. Only an interruption that
comes when all is done may find it converted, and then wholly. A copy (``inplace=False``) never
touches the original.

The points are lines of code: an exception is raised at one line after the other of everything that
``quantize_`` runs in this package.
"""

import gc
import itertools
import sys
from pathlib import Path

import pytest
import snntorch as snn
import torch
from spikingjelly.activation_based import layer, neuron
from torch import nn

import qsnn_ext
from qsnn_ext import hosts, quantize_
from qsnn_ext.errors import ConversionError
from tests.pairwise import THOROUGH

PACKAGE = str(Path(qsnn_ext.__file__).parent)
#: Spread over the first half; three times as many over the second.
POINTS = 100 if THOROUGH else 25
CONFIG = {"weight": 1, "membrane": 2, "rules": [{"type": "IFNode", "membrane": "keep"}]}


class Interruption(Exception):  # noqa: N818 (it is no error of anybody)
    pass


def spikingjelly_model():
    tied = layer.Conv2d(4, 4, 1)
    model = nn.Sequential(
        layer.Conv2d(1, 4, 3), layer.BatchNorm2d(4), neuron.LIFNode(), tied, neuron.IFNode(),
        layer.Conv2d(4, 4, 1), neuron.ParametricLIFNode(), nn.Flatten(), layer.Linear(144, 10),
    )  # fmt: skip
    model[5].weight = tied.weight
    model[2].register_forward_hook(lambda module, args, output: None)
    return model


def snntorch_model():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), snn.Leaky(0.9, init_hidden=True), nn.Conv2d(4, 4, 1),
        snn.Leaky(0.8, init_hidden=True, learn_beta=True), nn.Flatten(), nn.Linear(144, 10),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Lines are counted, and must be this conversion's: snnTorch lists all neurons alive, those of
    other tests too, and the collector would end them in the middle."""
    gc.collect()
    monkeypatch.setattr(snn.SpikingNeuron, "instances", [])


ERRORS = (Interruption("x"), KeyboardInterrupt())
MODELS = {"spikingjelly": spikingjelly_model, "snntorch": snntorch_model}
SAMPLE = torch.rand(2, 1, 8, 8)


def snapshot(model):
    """Everything of every module, and the values of all tensors."""
    parts = []
    for name, module in model.named_modules(remove_duplicate=False):
        tables = {
            key: value.copy() if isinstance(value, dict | set | list) else value
            for key, value in module.__dict__.items()
        }
        parts.append((name, id(module), type(module), tables))
    return parts, [(k, v, v.clone()) for k, v in model.state_dict(keep_vars=True).items()]


def same(a, b):
    """Whether two attributes are one object, or containers of the same objects."""
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return a is b
    return a is b or (type(a) is type(b) and a == b)


def untouched(before, after):
    (parts, state), (parts_now, state_now) = before, after
    return (
        len(parts) == len(parts_now)
        and all(a[:3] == b[:3] and same(a[3], b[3]) for a, b in zip(parts, parts_now, strict=True))
        and len(state) == len(state_now)
        and all(
            a[0] == b[0] and a[1] is b[1] and torch.equal(a[2], b[2])
            for a, b in zip(state, state_now, strict=True)
        )
    )


def run_with(at, error, call):
    """Run ``call``, raising ``error`` at the n-th line of this package; count the lines."""
    count = 0

    def tracer(frame, event, arg):
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            count += 1
            if count == at:
                sys.settrace(None)
                raise error
        return tracer

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("host", MODELS)
def test_interrupted_anywhere(host):
    """By an error and by ^C in turns."""
    reference = MODELS[host]()
    quantize_(reference, CONFIG if host == "spikingjelly" else "1w-2u", SAMPLE)
    goal = [type(m) for m in reference.modules()]
    config = CONFIG if host == "spikingjelly" else "1w-2u"

    reference_too = MODELS[host]()
    total = run_with(0, None, lambda: quantize_(reference_too, config, SAMPLE))
    assert total > 1000
    points = {1 + k * total // (2 * POINTS) for k in range(POINTS)}
    points |= {total - k * total // (6 * POINTS) for k in range(3 * POINTS)}
    model = MODELS[host]()
    before, left, complete = snapshot(model), 0, 0
    for at, error in zip(sorted(points), itertools.cycle(ERRORS), strict=False):
        with pytest.raises((Interruption, KeyboardInterrupt, ConversionError)):
            run_with(at, error, lambda m=model: quantize_(m, config, SAMPLE))
        if untouched(before, snapshot(model)):
            left += 1
            continue
        # Interrupted on the way out: then it must be whole.
        assert [type(m) for m in model.modules()] == goal, f"half converted at line {at}"
        assert qsnn_ext.conversion_report(model).changed
        complete += 1
        model = MODELS[host]()
        before = snapshot(model)
    assert left > 0.9 * len(points)
    assert complete <= 1
    quantize_(model, config, SAMPLE)  # and it can still be converted
    assert [type(m) for m in model.modules()] == goal


def test_a_library_that_fails_inside(monkeypatch):
    """The error then is ours, says what happened, and keeps the cause."""
    model = spikingjelly_model()
    before = snapshot(model)

    def fail(model, copied):
        raise RuntimeError("the host has changed")

    monkeypatch.setattr(hosts.adapters()[0], "adopt", fail)
    with pytest.raises(ConversionError, match=r"undone.*the host has changed") as caught:
        quantize_(model, "1w-2u")
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert untouched(before, snapshot(model))


@pytest.mark.parametrize("host", MODELS)
def test_a_copy_never_touches_the_original(host):
    model = MODELS[host]()
    before, listed = snapshot(model), len(snn.SpikingNeuron.instances)
    work = lambda: quantize_(model, "1w-2u", inplace=False)  # noqa: E731
    work()  # what runs the first time only is not counted
    total = run_with(0, None, work)
    for at in range(1, total * 9 // 10, total // 40):  # no two runs take quite as many steps
        with pytest.raises((Interruption, ConversionError)):
            run_with(at, Interruption(), work)
        assert untouched(before, snapshot(model))
    assert len(snn.SpikingNeuron.instances) <= listed + 3 * len(list(model.modules()))


def test_refused_for_good_reasons():
    """What is found wrong before the change is found before any change."""
    for spoil, config in (
        (lambda m: m[8].weight.data.fill_(float("nan")), "1w-2u"),
        (lambda m: None, {"weight": 1, "rules": [{"name": "9.*", "weight": 8}]}),
        (lambda m: None, {"weight": 1, "rules": [{"name": "5", "weight": 8}]}),  # tied to 3
    ):
        model = spikingjelly_model()
        spoil(model)
        before = [(type(m), set(m.__dict__)) for m in model.modules()]
        with pytest.raises(qsnn_ext.QSNNError):
            quantize_(model, config)
        assert [(type(m), set(m.__dict__)) for m in model.modules()] == before
