"""NIR export: true binary weights, quantization metadata, a round trip with equal bits."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from qsnn_ext import calibrate as calibrate_scales
from qsnn_ext import models, quantize_
from qsnn_ext.deploy import DeployedModel, from_nir, lower, to_nir
from qsnn_ext.deploy.fileformat import dump_program, parse_program
from qsnn_ext.deploy.program import Conv
from qsnn_ext.errors import FormatError, LoweringError
from tests.deploy.networks import calibrate
from tests.deploy.random_programs import random_program

nir = pytest.importorskip("nir")


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    x = torch.rand(4, 2, 16, 16)
    return lower(calibrate(models.resnet19(width=0.1, in_channels=2, bits="1w-2u"), x), x)


def test_binary_weights_and_metadata(program):
    graph = to_nir(program)
    hidden = graph.nodes["features_2_conv1_conv_weight"].weight
    assert set(np.unique(hidden)) == {-1.0, 1.0}
    assert hidden.shape == (13, 13, 3, 3)
    said = json.loads(graph.metadata["qsnn_quantization"])
    assert said["features.2.conv1.conv"] == {"weight_bits": 1}
    assert said["features.0.conv"] == {"weight_bits": 8}
    assert said["features.1"]["bits"] == 2


def test_round_trip_through_a_file(program, tmp_path):
    nir.write(tmp_path / "net.nir", to_nir(program))
    again = from_nir(nir.read(tmp_path / "net.nir", type_check=False))
    x = torch.rand(3, 2, 16, 16)
    np.testing.assert_array_equal(DeployedModel(again)(x), DeployedModel(program)(x))


def test_edited_weights_are_noticed(program):
    graph = to_nir(program)
    graph.nodes["features_2_conv1_conv_weight"].weight[0, 0, 0, 0] *= -1
    with pytest.raises(FormatError, match=r"features\.2\.conv1\.conv were changed"):
        from_nir(graph)


def test_what_nir_cannot_say_is_named():
    refused = 0
    for seed in range(30):
        try:
            from_nir(to_nir(random_program(seed)))
        except LoweringError as error:
            assert str(error).startswith("op")  # noqa: PT017
            refused += 1
    assert 0 < refused < 30


def test_foreign_graphs():
    with pytest.raises(FormatError, match="no qsnn program"):
        from_nir(nir.NIRGraph(nodes={}, edges=[], type_check=False))


@pytest.mark.parametrize(
    "names",
    [("a.b", "a_b"), ("a", "a_weight"), ("input", "output"), ("/x", "../x"), ("\x1b", "\n")],
)
def test_names_of_nodes_are_plain_and_differ(program, names, tmp_path):
    """``a.b`` and ``a_b`` were one node, and a slash a folder of the file."""
    copied = parse_program(dump_program(program))
    convs = [op for op in copied.ops if isinstance(op, Conv)]
    for op, name in zip(convs[1:], names, strict=False):
        op.name = name
    graph = to_nir(copied)
    assert all(re.fullmatch(r"[A-Za-z0-9_]+", name) for name in graph.nodes)
    whole = to_nir(program)
    assert len(graph.nodes) == len(whole.nodes)
    assert len(graph.edges) == len(whole.edges)
    nir.write(tmp_path / "net.nir", graph)
    again = from_nir(nir.read(tmp_path / "net.nir", type_check=False))
    assert dump_program(again) == dump_program(copied)


def test_models_that_return_spikes_and_potentials(tmp_path):
    """``(spk, mem)`` of the last neuron: spikes are a node, potentials are named; bits survive."""
    snn = pytest.importorskip("snntorch")

    class Net(torch.nn.Module):
        def __init__(self, **last):
            super().__init__()
            self.fc1, self.lif1 = torch.nn.Linear(16, 32), snn.Leaky(beta=0.9)
            self.fc2, self.lif2 = torch.nn.Linear(32, 4), snn.Leaky(beta=0.9, **last)

        def forward(self, x):
            a, b = self.lif1.init_leaky(), self.lif2.init_leaky()
            spikes, potentials = [], []
            for _ in range(6):
                spk, a = self.lif1(self.fc1(x), a)
                spk, b = self.lif2(self.fc2(spk), b)
                spikes.append(spk)
                potentials.append(b)
            if self.lif2.reset_mechanism == "none":
                return torch.stack(potentials)
            return torch.stack(spikes), torch.stack(potentials)

    x = 3 * torch.rand(5, 16)
    for last, kind in (({}, nir.LIF), ({"reset_mechanism": "none"}, nir.LI)):
        torch.manual_seed(0)
        net = Net(**last)
        quantize_(net, "1w-4u", sample=x)
        calibrate_scales(net, [x])
        program = lower(net, x)
        graph = to_nir(program)
        assert isinstance(graph.nodes["lif2"], kind)
        assert ("lif2", "output") in graph.edges
        assert "output1" not in graph.nodes
        said = json.loads(graph.metadata["qsnn_potentials"])
        assert said == ({} if last else {"output1": "lif2"})
        nir.write(tmp_path / "net.nir", graph)
        again = from_nir(nir.read(tmp_path / "net.nir", type_check=False))
        assert dump_program(again) == dump_program(program)
