"""A folder to publish: what is in it, and that the same model comes out."""

import json

import pytest
import torch
from torch import nn

from qsnn_ext import calibrate, quantize_, summarize
from qsnn_ext.errors import CheckpointError, ConfigError
from qsnn_ext.pretrained import load_pretrained, save_pretrained

snn = pytest.importorskip("snntorch")
pytest.importorskip("safetensors")


class Net(nn.Module):
    def __init__(self, hidden=16):
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(8, hidden), snn.Leaky(beta=0.9)
        self.fc2, self.lif2 = nn.Linear(hidden, hidden), snn.Leaky(beta=0.9)
        self.fc3, self.lif3 = nn.Linear(hidden, 3), snn.Leaky(beta=0.9)

    def forward(self, x):
        a, b, c = self.lif1.init_leaky(), self.lif2.init_leaky(), self.lif3.init_leaky()
        for _ in range(4):
            spk, a = self.lif1(self.fc1(x), a)
            spk, b = self.lif2(self.fc2(spk), b)
            spk, c = self.lif3(self.fc3(spk), c)
        return c


@pytest.fixture
def saved(tmp_path):
    net, x = Net(hidden=12).eval(), 4 * torch.rand(6, 8)
    quantize_(net, "1w-2u", sample=x)
    calibrate(net, [x])
    folder = save_pretrained(
        net, tmp_path / "net", arguments={"hidden": 12}, license="mit", text="Made up.",
        summary=summarize(net, x), metrics={"accuracy": 0.5},
    )  # fmt: skip
    return net, x, folder


def test_the_same_model_comes_out(saved):
    net, x, folder = saved
    again = load_pretrained(folder, Net).eval()
    assert torch.equal(again(x), net(x))
    assert load_pretrained(folder, Net(hidden=12)).fc2.bits == 1


def test_what_is_in_the_folder(saved):
    _, _, folder = saved
    assert {p.name for p in folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    config = json.loads((folder / "config.json").read_text())
    assert config["arguments"] == {"hidden": 12}
    assert config["quantization"]["membrane"]["bits"] == 2
    card = (folder / "README.md").read_text()
    assert card.startswith('---\nlicense: "mit"\nlibrary_name: qsnn_ext\n')
    for said in ("# net", "Made up.", "| accuracy | 0.5 |", "BinaryLinear", "load_pretrained"):
        assert said in card


def test_what_cannot_be_saved_or_loaded(saved, tmp_path):
    net, _, folder = saved
    with pytest.raises(ConfigError, match="JSON"):
        save_pretrained(net, tmp_path / "other", arguments={"x": torch.ones(1)})
    assert not (tmp_path / "other").exists()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_pretrained(tmp_path, Net)
    (folder / "config.json").write_text('{"arguments": 3}')
    with pytest.raises(CheckpointError, match="damaged"):
        load_pretrained(folder, Net)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be made"):
        save_pretrained(net, tmp_path / "file" / "net")
