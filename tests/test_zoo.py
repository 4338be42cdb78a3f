"""Models of others: SpikingJelly's zoo and the ways in which snnTorch models are written."""

import re

import pytest

from benchmarks import zoo

ENTRIES = {
    f"{e.family}.{e.name}": e for e in (*zoo.spikingjelly_entries(), *zoo.snntorch_entries())
}

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


def _check(name):
    outcome = zoo.try_out(ENTRIES[name])
    assert outcome.error == ""
    assert all(outcome.checks.values()), outcome.checks
    return outcome


@pytest.mark.parametrize("name", FAST, ids=_id)
def test_one_model_of_each_family(name):
    _check(name)


@pytest.mark.parametrize("name", [n for n in ENTRIES if n.startswith("snntorch")], ids=_id)
def test_the_five_styles_of_snntorch(name):
    outcome = _check(name)
    assert not outcome.report.of("unsupported")


@pytest.mark.sweep
@pytest.mark.parametrize("name", [n for n in ENTRIES if n not in FAST], ids=_id)
def test_every_other_constructor(name):
    _check(name)


def test_the_page_lists_every_model():
    rows = zoo.rows_of(zoo.PAGE.read_text(encoding="utf-8"))
    assert list(rows) == [(e.family, e.name) for e in ENTRIES.values()]
    assert sum(" | yes | " in row for row in rows.values()) == len(rows)
