"""Lightning with both hosts: what is logged, annealed, calibrated, tested and loaded again."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from qsnn_ext import BinaryWeight, quantize_, summarize
from qsnn_ext.errors import CheckpointError, ConfigError

pl = pytest.importorskip("lightning.pytorch")
pytest.importorskip("snntorch")
pytest.importorskip("spikingjelly")
ours = pytest.importorskip("qsnn_ext.lightning")

import snntorch as snn  # noqa: E402
from spikingjelly.activation_based import functional, layer, neuron  # noqa: E402


class Stepped(nn.Module):
    """snnTorch: potentials handed from step to step."""

    def __init__(self):
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(8, 16), snn.Leaky(beta=0.9)
        self.fc2, self.lif2 = nn.Linear(16, 16), snn.Leaky(beta=0.9)
        self.fc3, self.lif3 = nn.Linear(16, 3), snn.Leaky(beta=0.9)

    def forward(self, x):
        a, b, c = self.lif1.init_leaky(), self.lif2.init_leaky(), self.lif3.init_leaky()
        answers = []
        for _ in range(4):
            spk, a = self.lif1(self.fc1(x), a)
            spk, b = self.lif2(self.fc2(spk), b)
            spk, c = self.lif3(self.fc3(spk), c)
            answers.append(c)
        return torch.stack(answers).mean(0)


class Sequence(nn.Module):
    """SpikingJelly: multi-step, reset by whoever calls it."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            layer.Linear(8, 16), neuron.LIFNode(), layer.Linear(16, 16), neuron.LIFNode(),
            layer.Linear(16, 3), neuron.LIFNode(),
        )  # fmt: skip
        functional.set_step_mode(self, "m")

    def forward(self, x):
        functional.reset_net(self)
        return self.net(x.repeat(4, 1, 1)).mean(0)


class Classifier(ours.QuantizedCheckpoints, pl.LightningModule):
    def __init__(self, host="snntorch"):
        super().__init__()
        self.save_hyperparameters()
        self.model = Stepped() if host == "snntorch" else Sequence()

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch, index):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader():
    generator = torch.Generator().manual_seed(0)
    x = 4 * torch.rand(24, 8, generator=generator)
    return DataLoader(TensorDataset(x, torch.arange(24) % 3), batch_size=8)


def trainer(folder, *callbacks, epochs=2):
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, callbacks=list(callbacks),
        default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


HOSTS = ["snntorch", "spikingjelly"]


@pytest.mark.parametrize("host", HOSTS)
def test_the_whole_way(host, tmp_path):
    module = Classifier(host)
    quantize_(module, "official", sample=torch.rand(2, 8))
    temperatures = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            found = [m for m in pl_module.modules() if isinstance(m, BinaryWeight)]
            temperatures.append({q.temperature.item() for q in found})

    callback = ours.SpikingCallback(calibration_batches=2)
    saving = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, save_last=True)
    run = trainer(tmp_path, callback, Watch(), saving)
    run.fit(module, loader(), loader())

    # From 0.1 in the first epoch to 10 in the last.
    assert [max(t) for t in temperatures] == pytest.approx([0.1] * 3 + [10.0] * 3)
    # Calibrated in the last epoch, before the checkpoint.
    quantizers = [m for m in module.modules() if type(m).__name__ == "MembraneQuantizer"]
    assert quantizers
    assert all(q.mode == "frozen" and q.calibrated for q in quantizers)

    tested = run.test(module, loader(), verbose=False)[0]
    answers = torch.cat(run.predict(module, loader()))  # in inference mode
    x = torch.cat([batch[0] for batch in loader()])
    with torch.no_grad():
        torch.testing.assert_close(answers, module.eval()(x))

    # Rates as the report measures them.
    report = {row.name: row for row in summarize(module, x).layers}
    logged = {key: value for key, value in tested.items() if key.startswith("p_s/")}
    assert len(logged) == 3
    for key, rate in logged.items():
        row = report[key.removeprefix("p_s/")]
        assert rate == pytest.approx(row.firing_rate, abs=1e-6)
        assert tested[key.replace("p_s", "H_s")] == pytest.approx(row.spike_entropy, abs=1e-6)
    (positive,) = [v for k, v in tested.items() if k.startswith("p_w/")]
    assert 0 < positive < 1

    # A float module becomes the quantized one again.
    again = Classifier.load_from_checkpoint(tmp_path / "last.ckpt")
    assert [type(m) for m in again.modules()] == [type(m) for m in module.modules()]
    with torch.no_grad():
        assert torch.equal(again.eval()(x), module(x))

    # Training goes on after inference mode.
    trainer(tmp_path, epochs=1).fit(module, loader())


@pytest.mark.parametrize("host", HOSTS)
def test_training_resumes_in_a_float_module(host, tmp_path):
    module = Classifier(host)
    quantize_(module, "1w-4u")
    saving = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, save_last=True)
    trainer(tmp_path, saving, epochs=1).fit(module, loader())
    again = Classifier(host)
    run = trainer(tmp_path, ours.SpikingCallback(log="total"), epochs=2)
    run.fit(again, loader(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert run.current_epoch == 2
    assert [type(m) for m in again.modules()] == [type(m) for m in module.modules()]
    assert math.isfinite(run.callback_metrics["p_s"])
    assert not any(key.startswith("p_s/") for key in run.callback_metrics)


def test_wrong_calls(tmp_path):
    with pytest.raises(ConfigError, match="log='all'"):
        ours.SpikingCallback(log="all")
    with pytest.raises(ConfigError, match="calibration_batches"):
        ours.SpikingCallback(calibration_batches=-1)
    run = pl.Trainer(max_epochs=-1, max_steps=1, accelerator="cpu", logger=False,
                     enable_progress_bar=False, enable_model_summary=False,
                     enable_checkpointing=False, callbacks=[ours.SpikingCallback()])  # fmt: skip
    with pytest.raises(ConfigError, match="max_epochs"):
        run.fit(Classifier(), loader())


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    module = Classifier("snntorch")
    quantize_(module, "1w-4u")
    saving = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, save_last=True)
    trainer(tmp_path, saving, epochs=1).fit(module, loader())
    with pytest.raises(CheckpointError, match="another architecture"):
        Classifier.load_from_checkpoint(tmp_path / "last.ckpt", host="spikingjelly")
