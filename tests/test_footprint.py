"""footprint: the paper's Table 2, what inference really holds, and wrong use."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qsnn_ext import footprint, models
from qsnn_ext.errors import ConfigError, InputError, InputTypeError
from qsnn_ext.layers import BinaryConv2d, BinaryLinear, QuantLinear
from qsnn_ext.quantizers import BinaryWeight
from recipes import table_2 as recipe
from recipes.table_2 import PAPER_TABLE_2, table_2

sj = pytest.importorskip("qsnn_ext.spikingjelly")
CELLS = [(batch, bits, i) for batch in PAPER_TABLE_2 for bits in PAPER_TABLE_2[1] for i in range(3)]


@pytest.fixture(scope="module")
def counted():
    return table_2()


@pytest.mark.parametrize(
    ("batch", "bits", "network"),
    CELLS,
    ids=[f"{('resnet19', 'vgg16', 'vggsnn')[n]}-{bits}-{batch}" for batch, bits, n in CELLS],
)
def test_table_2(counted, batch, bits, network):
    # The paper prints two decimals.
    assert abs(counted[batch][bits][network] - PAPER_TABLE_2[batch][bits][network]) < 0.01


def test_table_2_is_the_papers():
    assert len(CELLS) == 36
    # From the paper: 30.8 times smaller at batch 1.
    assert PAPER_TABLE_2[1]["32w-32u"][0] / PAPER_TABLE_2[1]["1w-2u"][0] == pytest.approx(
        30.79, abs=0.01
    )


def test_vgg16_head_is_a_choice():
    model = models.vgg16(width=0.125, bits="1w-2u")
    own, papers = footprint(model), footprint(model, weight_bits={"head": 32})
    assert papers.bytes - own.bytes == model.head.weight.numel() * 3
    assert own.parts["membrane"] == papers.parts["membrane"]


def two_layers():
    """A 2x4x4 image to 40 channels, then a read-out of 3 with its neuron."""
    return nn.Sequential(
        BinaryConv2d(2, 40, 3, padding=1, bias=False),
        nn.BatchNorm2d(40),
        sj.QuantLIFNode(bits=4),
        nn.Flatten(),
        QuantLinear(640, 3),
        sj.QuantLIFNode(bits=2),
    )


def test_hand_computed_paper_accounting():
    result = footprint(two_layers(), batch=5, input_shape=(2, 4, 4))
    assert result.parts == {
        "weights": 40 * 2 * 9 / 8 + 640 * 3,
        "scales": 0,
        "others": 2 * 40 * 4 + 3 * 4,  # batch norm and bias
        "membrane": 5 * 640 * 4 / 8,  # the larger of the two layers
    }
    assert result.megabytes == sum(result.parts.values()) / 1e6
    assert result.execution == "layer"
    assert [row.membrane_elements for row in result.layers] == [0, 0, 640, 0, 3]


def test_hand_computed_resident_accounting():
    result = footprint(two_layers(), batch=5, input_shape=(2, 4, 4), accounting="resident")
    rows = {row.name: row for row in result.layers}
    # 18 inputs of a kernel, each with 40 output bits in two words; one scale per output channel.
    assert (rows["0"].weights, rows["0"].scales) == (18 * 2 * 4, 40 * 4)
    assert rows["1"].others == 2 * 40 * 4  # statistics are folded away
    # 16 pixels, 4 planes, 40 channels in two words; one scale of the layer.
    assert (rows["2"].membrane, rows["2"].scales) == (16 * 4 * 2 * 4, 4)
    # 640 rows of 3 codes in a word; scale and bias.
    assert (rows["4"].weights, rows["4"].scales, rows["4"].others) == (640 * 4, 4, 12)
    assert rows["5"].membrane == 2 * 4
    assert result.parts["membrane"] == 5 * (512 + 8)
    layer_by_layer = footprint(
        two_layers(), batch=5, input_shape=(2, 4, 4), accounting="resident", execution="layer"
    )
    assert layer_by_layer.parts["membrane"] == 5 * 512
    assert layer_by_layer.parts["weights"] == result.parts["weights"]


def test_scales_that_do_not_exist_are_not_counted():
    layer = BinaryLinear(4, 4, bias=False, quantizer=BinaryWeight(scale=None))
    assert footprint(layer, input_shape=(4,), accounting="resident").parts["scales"] == 0
    layer = BinaryLinear(4, 4, bias=False, quantizer=BinaryWeight(scale="power_of_two"))
    assert footprint(layer, input_shape=(4,), accounting="resident").parts["scales"] == 16


def test_groups_are_packed_apart():
    conv = BinaryConv2d(4, 8, 1, groups=4, bias=False)
    # 4 groups of one input each; its two output bits take a word.
    row = footprint(conv, input_shape=(4, 2, 2), accounting="resident").layers[0]
    assert row.weights == 4 * 4


@given(
    width=st.integers(1, 40),
    bits=st.sampled_from(["32w-32u", "1w-2u", "1w-8u", "8w-3u"]),
    batch=st.integers(1, 300),
    host=st.sampled_from(["spikingjelly", "snntorch"]),
)
def test_relations_that_always_hold(width, bits, batch, host):
    model = models.vggsnn(width=width / 512, bits=bits, host=host)
    paper, layered, stepped = (
        footprint(model, batch, (2, 16, 16), accounting, execution=execution, time_steps=1)
        for accounting, execution in (
            ("paper", "layer"),
            ("resident", "layer"),
            ("resident", "step"),
        )
    )
    assert paper.bytes <= layered.bytes <= stepped.bytes
    assert layered.parts["membrane"] == batch * max(row.membrane for row in stepped.layers)
    one = dataclasses.replace(stepped, batch=1)
    assert stepped.parts["membrane"] == batch * one.parts["membrane"]
    assert stepped.parts["weights"] == one.parts["weights"]
    if bits == "32w-32u":
        assert paper.bytes - paper.parts["membrane"] == 4 * sum(
            p.numel() for p in model.parameters()
        )
        elements = [row.membrane_elements for row in paper.layers]
        assert paper.parts["membrane"] == 4 * batch * max(elements)


def test_both_hosts_agree_and_time_does_not_matter():
    totals = {
        footprint(models.resnet19(width=0.0625, bits="1w-2u", host=host), 3, time_steps=steps).bytes
        for host in ("spikingjelly", "snntorch")
        for steps in (None, 1, 3)
    }
    assert len(totals) == 1


def test_leaves_the_model_alone():
    model = models.vggsnn(width=0.03, T=2, bits="1w-2u", neuron={"mode": "frozen"})
    model(torch.rand(2, 2, 16, 16))
    model.features[0].bn.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    state = model.features[1].v
    footprint(model, input_shape=(2, 16, 16))
    assert model.features[1].v is state
    assert [m.training for m in model.modules()] == modes
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_scale_that_is_not_calibrated_does_not_matter():
    model = models.vggsnn(width=0.03, T=2, bits="1w-2u", neuron={"mode": "frozen"}).eval()
    assert footprint(model, input_shape=(2, 16, 16)).megabytes > 0
    assert not model.features[1].membrane.calibrated


def test_model_called_in_another_way():
    model = nn.Sequential(nn.Linear(4, 4), sj.QuantLIFNode(bits=2))
    result = footprint(
        model, input_shape=(4,), time_steps=3, forward=lambda m, x: [m(x_t) for x_t in x]
    )
    assert result.layers[1].membrane_elements == 4


def test_a_sample_says_what_zeros_cannot():
    """As summarize takes it: arguments, keywords, any leading axes."""
    model = nn.Sequential(nn.Linear(4, 4), sj.QuantLIFNode(bits=2, step_mode="m"))
    shape = footprint(model, input_shape=(4,), time_steps=3)
    x = torch.ones(3, 1, 4)
    for sample in (x, (x,), {"input": x}):
        assert footprint(model, sample=sample).to_dict() == shape.to_dict()
    with pytest.raises(InputError, match="a list as its sample"):
        footprint(model, sample=[x, x])


def test_half_precision_and_tied_weights():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()
    model[1].weight = model[0].weight
    result = footprint(model, input_shape=(4,))
    assert result.bytes == 2 * (16 + 4 + 4)
    assert result.layers[0].weight_bits == 16


def test_text_and_dictionary_say_the_same():
    result = footprint(two_layers(), batch=2, input_shape=(2, 4, 4), accounting="resident")
    data = json.loads(json.dumps(result.to_dict()))
    assert data["megabytes"] == result.megabytes
    assert [row["name"] for row in data["layers"]] == ["0", "1", "2", "4", "5"]
    assert f"total {result.megabytes:.3f} MB" in str(result)
    assert str(result).count("QuantLIFNode") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "at least 1"),
        ({"batch": 1.5}, "at least 1"),
        ({"input_shape": (2, 0, 4)}, "at least 1"),
        ({"time_steps": 0}, "at least 1"),
        ({"accounting": "real"}, "accounting='real' is unknown"),
        ({"execution": "both"}, "execution='both' is unknown"),
        ({"weight_bits": {"nothing": 8}}, "no layer with weights"),
        ({"weight_bits": {"2": 8}}, "no layer with weights"),
        ({"weight_bits": {"0": 0}}, "choose 1 to 64"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        footprint(two_layers(), **{"input_shape": (2, 4, 4), **options})


def test_wrong_shape_and_wrong_model():
    with pytest.raises(InputError, match=r"zeros of shape \(1, 5\).*give input_shape"):
        footprint(nn.Linear(4, 4), input_shape=(5,))
    with pytest.raises(InputTypeError, match="needs a module"):
        footprint({"weight": 1})


def test_command_prints_the_table(capsys, counted, monkeypatch):
    monkeypatch.setattr(recipe, "table_2", lambda accounting="paper": counted)
    recipe._main()
    out = capsys.readouterr().out
    assert out.count("1w-2u") == 3
    assert "Largest difference from the paper: 0.008 MB" in out


def test_documented_table_is_the_counted_one(counted):
    text = Path(__file__).parents[1].joinpath("docs", "footprint.md").read_text(encoding="utf-8")
    for batch, by_bits in PAPER_TABLE_2.items():
        for bits in by_bits:
            (line,) = re.findall(rf"^\| {batch} \| {bits} \| (.*) \|$", text, re.M)
            cells = [float(cell) for cell in line.split(" | ")]
            assert cells[0::3] == [round(value, 2) for value in counted[batch][bits]]
            assert cells[1::3] == list(by_bits[bits])
