"""Models of others: SpikingJelly's zoo, and the examination that the page is made of."""

import json
import re
import time

import pytest
import torch

from benchmarks import examine, zoo
from qsnn_ext import quantize_

ENTRIES = {f"{e.family}.{e.name}": e for e in zoo.spikingjelly_entries()}

#: One of each family, the quickest.
FAST = (
    "masnn.masnn_dvs128_gesture",
    "maxformer.maxformer_cifar",
    "ms_resnet.ms_resnet18",
    "parametric_lif_net.MNISTNet",
    "parametric_lif_net.DVSGestureNet",
    "qkformer.QKFormer",
    "sew_resnet.SEWResNet",
    "spike_driven_transformer.sdt_8_384",
    "spikformer.Spikformer",
    "spiking_resnet.SpikingResNet",
    "spiking_vggws_ottt.OTTTSpikingVGG",
)


def _id(name):
    return re.sub(r"\W+", "-", name)


def _check(name, steps=2):
    """Everything but deployment, which takes longest."""
    entry = ENTRIES[name]
    net, x, forward = entry.build()
    net, found = examine.convert(lambda: net, x, zoo.CONFIG, forward)
    assert all(found.checks.values()), found.checks
    checks = examine.train(net, x, forward, steps)
    assert all(checks.values()), checks


def test_there_are_65_constructors():
    assert len(ENTRIES) == 65


@pytest.mark.parametrize("name", FAST, ids=_id)
def test_one_model_of_each_family(name):
    _check(name, steps=1)


@pytest.mark.sweep
@pytest.mark.parametrize("name", [n for n in ENTRIES if n not in FAST], ids=_id)
def test_every_other_constructor(name):
    _check(name)


@pytest.mark.slow
def test_a_model_is_examined_in_a_process_of_its_own():
    found = zoo.in_a_process("tutorials.tutorial 5")
    assert found["error"] == ""
    assert found["deploys"] == ""
    assert found["weights"] == {"1": 0, "8": 74 * 1000, "float": 0}
    assert found["operations"]["8"] == 1.0
    assert (found["neurons"], found["quantized"]) == (2, 2)
    assert json.loads(json.dumps(found)) == found


@pytest.mark.slow
def test_a_model_that_takes_too_long_is_ended():
    start = time.monotonic()
    found = zoo.in_a_process("sew_resnet.sew_resnet152", limit=0.5)
    assert "no answer" in found["error"]
    assert time.monotonic() - start < 60


def test_the_examination_notices_what_does_not_hold():
    """A layer that never runs, and a weight that is not trained."""
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x) * float("nan")

    net = Net()
    quantize_(net, "1w-2u")
    checks = examine.train(net, torch.rand(2, 4))
    assert not checks["every quantized layer ran"]
    assert not checks["outputs finite"]
    assert not checks["gradients finite"]
