"""Training runs from start to result, interrupted, damaged and refused."""

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qsnn_ext.errors import CheckpointError, ConfigError, TrainingError
from recipes import data as datasets
from recipes.config import Config
from recipes.engine import checkpoints, networks, setting
from recipes.engine.graphs import StepGraph
from recipes.engine.module import Training, decay_groups, first_nonfinite
from recipes.engine.record import Record
from recipes.engine.run import train
from tests.faults.runs import Life

# Numbers of an epoch that no two runs share.
MEASURED = ("throughput", "cpu_seconds")


def tiny(out: Path, **changes) -> Config:
    """A run of a few steps on the digits."""
    return Config(
        **{
            "data": "digits",
            "size": 8,
            "width": 1 / 32,
            "batch": 16,
            "limit_batches": 2,
            "epochs": 3,
            "workers": 0,
            "accelerator": "cpu",
            "progress": False,
            "kernels": "function",
            "precision": "32-true",
            "memory_format": "contiguous",
            "out": out,
            **changes,
        }
    )


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoints.read(path)["state_dict"]


def assert_equal_runs(ours: Path, theirs: Path, epoch: int) -> None:
    name = f"epoch-{epoch:04d}.ckpt"
    a, b = weights(ours / name), weights(theirs / name)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A whole run: its folder, its result, and what it printed is not kept."""
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, train(tiny(folder))


def test_what_a_run_leaves(unbroken):
    folder, result = unbroken
    written = json.loads((folder / "result.json").read_text())
    assert written == json.loads(json.dumps(result))
    assert len(written["history"]) == 3
    last, best = written["history"][-1], written["history"][written["best_epoch"] - 1]
    assert written["last_accuracy"] == last["test_accuracy"]
    assert written["best_accuracy"] == best["test_accuracy"]
    assert written["best_accuracy"] == max(e["test_accuracy"] for e in written["history"])
    assert written["config"]["width"] == 1 / 32
    assert written["command"].startswith("python ")
    assert "/" not in written["command"].split()[1]  # no path of this machine's interpreter
    assert written["seed"] == 0
    assert written["versions"]["torch"] == torch.__version__.split("+")[0]
    assert len(written["git"]["commit"] or "0" * 40) == 40
    assert len(written["layer_rates"]) == 17
    assert len(written["sign_probabilities"]) == 18
    for name, rate in written["layer_rates"].items():
        p = min(max(rate, 1e-12), 1 - 1e-12)
        h = -p * math.log(p) - (1 - p) * math.log(1 - p)
        assert written["layer_entropies"][name] == pytest.approx(h, abs=1e-6)
    assert last["firing_rate"] > 0 < last["throughput"]
    assert last["cpu_seconds"] > 0
    assert (folder / "run.png").read_bytes()[:4] == b"\x89PNG"
    kept = sorted(p.name for p in folder.glob("*.ckpt"))
    assert kept == ["best.ckpt", "epoch-0002.ckpt", "epoch-0003.ckpt"]


def test_tensorboard_has_scalars_and_histograms(unbroken):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(unbroken[0] / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"accuracy/test", "accuracy/train", "loss/train", "firing_rate", "throughput", "lr"} <= {
        *tags["scalars"]
    }
    assert len([t for t in tags["histograms"] if t.startswith("neuron firing rates/")]) == 17
    accuracy = [e.value for e in events.Scalars("accuracy/test")]
    history = [entry["test_accuracy"] for entry in unbroken[1]["history"]]
    assert accuracy == pytest.approx(history, abs=1e-3)


def test_the_best_checkpoint_is_of_the_best_epoch(unbroken):
    folder, result = unbroken
    assert checkpoints.read(folder / "best.ckpt")["epoch"] + 1 == result["best_epoch"]


def test_of_equal_epochs_the_earliest_is_the_best():
    record = Record()
    for accuracy, is_best in ((50.0, True), (60.0, True), (60.0, False)):
        record.history.append({"test_accuracy": accuracy})
        assert record.is_best == is_best
    assert record.best is record.history[1]


def test_rates_are_the_spikes_of_the_test_set(unbroken):
    folder, result = unbroken
    config = tiny(folder)
    spec = datasets.spec("digits", size=8)
    model = networks.build(config, spec)
    state = weights(folder / "epoch-0003.ckpt")
    model.load_state_dict({k.removeprefix("model."): v for k, v in state.items()})
    model.eval()
    test = datasets.datasets("digits", size=8)[1]
    spikes = {}
    for name, module in networks.spiking_layers(model).items():
        module.register_forward_hook(lambda m, a, out, n=name: spikes.setdefault(n, []).append(out))
    with torch.no_grad():
        for batch in (range(15), range(15, 31)):  # 450 samples in 29 even batches
            model(torch.stack([test[i][0] for i in batch]))
    for name, rate in result["layer_rates"].items():
        assert rate == pytest.approx(torch.cat(spikes[name], 1).mean().item(), abs=1e-6)


def test_random_numbers_inside_the_network_outlive_an_interruption(tmp_path):
    """They depend on seed, epoch, batch and process, not on what was drawn before."""
    config = tiny(tmp_path)
    model = networks.build(config, datasets.spec("digits", size=8))

    def draw(seed=0, epoch=1, batch=2, rank=0):
        training = Training(config.but(seed=seed), model, 1)
        training.trainer = trainer = SimpleNamespace(current_epoch=epoch, global_rank=rank)
        assert training.current_epoch == trainer.current_epoch
        training.on_train_batch_start(None, batch)
        return torch.rand(()).item()

    assert draw() == draw()
    assert len({draw(), draw(seed=1), draw(epoch=2), draw(batch=3), draw(rank=1)}) == 5


@pytest.mark.parametrize("change", [{}, {"preset": "official", "membrane_mode": "frozen"}])
def test_a_resumed_run_equals_the_unbroken_one(tmp_path, unbroken, change):
    whole, result = unbroken
    if change:
        whole = tmp_path / "whole"
        result = train(tiny(whole, **change))
    broken = tmp_path / "broken"
    train(tiny(broken, stop_after=1, workers=2, **change))
    assert not (broken / "result.json").exists()
    resumed = train(tiny(broken, resume=True, **change))
    assert_equal_runs(whole, broken, 3)
    timeless = [
        [{k: v for k, v in e.items() if k not in MEASURED} for e in r["history"]]
        for r in (result, resumed)
    ]
    assert timeless[0] == timeless[1]


def test_a_damaged_checkpoint_falls_back(tmp_path, unbroken, recwarn):
    folder = tmp_path / "run"
    train(tiny(folder, stop_after=2))
    newest = folder / "epoch-0002.ckpt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1  # one bit, which unpickling alone may well not notice
    newest.write_bytes(content)
    train(tiny(folder, resume=True))
    assert any("epoch-0002.ckpt" in str(w.message) for w in recwarn)
    assert_equal_runs(unbroken[0], folder, 3)


def test_nothing_sound_to_resume_from(tmp_path):
    for epoch in (1, 2):
        (tmp_path / f"epoch-000{epoch}.ckpt").write_bytes(b"cut sho")
    with (
        pytest.warns(UserWarning, match=r"epoch-0002\.ckpt"),
        pytest.raises(CheckpointError, match="Every checkpoint"),
    ):
        checkpoints.newest_sound(tmp_path)
    assert checkpoints.newest_sound(tmp_path / "empty") is None


def test_a_folder_holds_one_experiment(unbroken):
    folder, _ = unbroken
    with pytest.raises(TrainingError, match="--resume"):
        train(tiny(folder))
    with pytest.raises(ConfigError, match=r"lr was 0\.1, is 0\.2"):
        train(tiny(folder, resume=True, lr=0.2))


def test_a_finished_run_resumes_to_its_result(unbroken):
    folder, result = unbroken
    again = train(tiny(folder, resume=True))
    assert again["last_accuracy"] == result["last_accuracy"]
    assert again["layer_rates"] == result["layer_rates"]


def test_a_killed_run_resumes(tmp_path, unbroken):
    folder = tmp_path / "run"
    life = Life(lambda: train(tiny(folder)))
    deadline = time.monotonic() + 240
    while not (folder / "epoch-0001.ckpt").exists():
        assert life.poll() is None, life.said()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    life.kill()
    train(tiny(folder, resume=True))
    assert_equal_runs(unbroken[0], folder, 3)


def test_the_layer_that_first_went_non_finite_is_named(tmp_path):
    config = tiny(tmp_path)
    model = networks.build(config, datasets.spec("digits", size=8))
    training = Training(config, model, 1)
    x = torch.randn(4, 1, 8, 8)
    assert "every layer's output is finite" in first_nonfinite(training, x)
    with torch.no_grad():
        model.features[3].conv1.bn.bias[0] = float("inf")
        model.features[5].conv2.conv.weight[0] = float("nan")
    assert "'features.3.conv1.bn' (BatchNorm2d), whose bias" in first_nonfinite(training, x)


def test_a_diverging_run_stops(tmp_path):
    with pytest.raises(TrainingError, match=r"loss became (nan|inf) in epoch 1.*layer '.*--lr"):
        train(tiny(tmp_path / "run", bits="32w-32u", lr=1e38, limit_batches=4))


def test_what_decays():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
    decaying, others = decay_groups(model, 1e-4)
    assert {id(p) for p in decaying["params"]} == {id(model[0].weight), id(model[3].weight)}
    assert len(others["params"]) == 4
    assert (decaying["weight_decay"], others["weight_decay"]) == (1e-4, 0.0)


def test_the_loss_is_the_papers(tmp_path):
    config = tiny(tmp_path)
    training = Training(config, networks.build(config, datasets.spec("digits", size=8)), 1)
    logits, labels = torch.randn(3, 4, 5), torch.tensor([0, 4, 2, 2])
    loss = training.loss(logits, labels)
    by_hand = 0.0
    for t in range(3):
        for n in range(4):
            p = torch.softmax(logits[t, n], 0)[labels[n]].item()
            by_hand -= math.log(p) / 12
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)


def test_the_learning_rate_rises_then_falls_to_zero(tmp_path):
    config = tiny(tmp_path, lr=0.5, warmup=1.0, epochs=4)
    training = Training(config, networks.build(config, datasets.spec("digits", size=8)), 10)
    made = training.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.5 / 11)  # not 0: the first step is to train as well
    assert max(rates) == 0.5
    assert rates.index(0.5) == 10
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[25] == pytest.approx(0.25)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_gradients_are_accumulated(tmp_path, monkeypatch):
    """Two batches of 8 a step train what one of 16 does, where nothing depends on the batch."""
    build = networks.build

    def with_still_batch_norm(config, spec):
        model = build(config, spec)
        train_set, _ = datasets.datasets("digits", size=8, augment=False)
        images = torch.stack([train_set[i][0] for i in range(32)])
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        model.double()(images.double())
        for norm in norms:
            norm.eval()
            norm.train = lambda mode=True, norm=norm: norm
        return model

    monkeypatch.setattr(networks, "build", with_still_batch_norm)
    common = {"bits": "32w-32u", "precision": "64-true", "epochs": 1}
    train(tiny(tmp_path / "one", **common, batch=16, limit_batches=3))
    train(tiny(tmp_path / "two", **common, batch=8, limit_batches=6, accumulate=2))
    one, two = (checkpoints.read(tmp_path / n / "epoch-0001.ckpt") for n in ("one", "two"))
    assert one["global_step"] == two["global_step"] == 3
    moved = False
    start = with_still_batch_norm(tiny(tmp_path), datasets.spec("digits", size=8)).state_dict()
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=1e-9, atol=1e-12)
        moved |= not torch.equal(value, start[name.removeprefix("model.")])
    assert moved


@pytest.mark.slow
def test_compiling_the_network_changes_nothing(tmp_path, monkeypatch):
    """Captured as for ``--compile``; inductor's own code generation would take minutes here.

    The 450 test samples are in batches of 15 too: another size is another compilation.
    """
    compiled, plain = nn.Module.compile, {"epochs": 1, "batch": 15, "limit_batches": 1, "steps": 1}
    seen = []

    def without_inductor(module, **options):
        seen.append(module)
        compiled(module, backend="aot_eager", **options)

    monkeypatch.setattr(nn.Module, "compile", without_inductor)
    ours = train(tiny(tmp_path / "compiled", compile=True, **plain))["history"][0]
    assert len(seen) == 1
    theirs = train(tiny(tmp_path / "plain", **plain))["history"][0]
    assert len(seen) == 1
    assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)
    assert ours["layer_rates"] == pytest.approx(theirs["layer_rates"], abs=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
        {"clip": 0.1},
        {"order": "quantize_first"},
    ],
    ids=lambda c: "-".join(map(str, c.values())),
)
def test_options_that_change_the_arithmetic_run(tmp_path, unbroken, change):
    result = train(tiny(tmp_path, epochs=1, **change))
    ours, plain = result["history"][0], unbroken[1]["history"][0]
    assert math.isfinite(ours["train_loss"])
    if change.get("precision") == "64-true":  # its loss may round to the same number
        kept = weights(tmp_path / "epoch-0001.ckpt")
        assert {v.dtype for v in kept.values() if v.is_floating_point()} == {torch.float64}
    else:
        assert ours["train_loss"] != plain["train_loss"]


def stand_in(model):
    """A recorder for machines without a GPU: like a graph, it writes to the tensors it began with.

    What was recorded is a call that changes nothing, and its results are gradients in places that
    stay.
    """

    def record(run):
        before = [(b, b.clone()) for b in model.buffers()]
        run()
        for buffer, value in before:
            buffer.copy_(value)
        places = [(p, p.grad) for p in model.parameters() if p.grad is not None]

        def replay():
            run()
            for parameter, place in places:
                place.copy_(parameter.grad)

        return replay

    return record


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"membrane_mode": "frozen", "optimizer": "adam", "lr": 0.01},
        {"sign_gradient": "annealed", "precision": "bf16-mixed"},
    ],
    ids=["paper", "frozen scales", "annealed, bf16"],
)
def test_a_recorded_step_trains_as_its_parts_do(tmp_path, monkeypatch, changes):
    train(tiny(tmp_path / "parts", **changes))
    monkeypatch.setattr("recipes.engine.setting.on_gpu", lambda config: True)
    made = []

    def graph(step, model):
        made.append(StepGraph(step, model, stand_in(model)))
        return made[-1]

    monkeypatch.setattr("recipes.engine.module.StepGraph", graph)
    train(tiny(tmp_path / "whole", **changes, stop_after=2))
    train(tiny(tmp_path / "whole", **changes, resume=True))
    assert len(made) == 2  # and the run that goes on records anew
    assert_equal_runs(tmp_path / "parts", tmp_path / "whole", 3)
    ours, theirs = (
        json.loads((tmp_path / which / "result.json").read_text())["history"]
        for which in ("parts", "whole")
    )
    for a, b in zip(ours, theirs, strict=True):
        assert {k: v for k, v in a.items() if k not in MEASURED} == {
            k: v for k, v in b.items() if k not in MEASURED
        }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"accelerator": "cpu"}, "needs a GPU"),
        ({"accumulate": 2}, "goes without --accumulate"),
        ({"clip": 1.0}, "goes without --clip"),
        ({"devices": 2}, "goes with one process"),
    ],
)
def test_a_step_that_cannot_be_recorded_is_refused_when_asked_for(
    tmp_path, monkeypatch, changes, reason
):
    if "accelerator" not in changes:
        monkeypatch.setattr("recipes.engine.setting.on_gpu", lambda config: True)
    config = tiny(tmp_path, **changes)
    assert not setting.records(config)
    with pytest.raises(ConfigError, match=reason):
        setting.records(config.but(cuda_graph="on"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_recorded_step_on_a_gpu(tmp_path, precision):
    losses = {}
    for how in ("on", "off"):
        changes = {"accelerator": "gpu", "precision": precision, "cuda_graph": how}
        changes |= {"kernels": "auto", "size": 16, "width": 1 / 8, "limit_batches": 8}
        result = train(tiny(tmp_path / how, **changes))
        losses[how] = [entry["train_loss"] for entry in result["history"]]
    # Convolutions add up in an order of their own each time.
    assert losses["on"] == pytest.approx(losses["off"], rel=2e-2)


def test_a_step_is_not_recorded_on_all_gpus_of_a_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.engine.setting.on_gpu", lambda config: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = tiny(tmp_path, devices=None)
    assert not setting.records(config)
    assert setting.records(config.but(devices=1))
    with pytest.raises(ConfigError, match="goes with one process"):
        setting.records(config.but(cuda_graph="on"))
