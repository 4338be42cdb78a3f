"""Held-out samples, the machine's setting, and the options that go beyond the paper."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from qsnn_ext.errors import CheckpointError, ConfigError
from recipes import data as datasets
from recipes.config import Config, differences
from recipes.engine import checkpoints, holdout, networks, setting
from recipes.engine.loading import Loading
from recipes.engine.module import Training
from recipes.engine.run import train
from recipes.engine.teacher import Teacher, start_from

SPEC = datasets.spec("digits", size=8)


def tiny(out, **changes):
    options = {
        "data": "digits",
        "size": 8,
        "width": 1 / 32,
        "batch": 16,
        "limit_batches": 2,
        "epochs": 2,
        "workers": 0,
        "accelerator": "cpu",
        "progress": False,
        "kernels": "function",
        "out": out,
    }
    return Config(**{**options, **changes})


@pytest.fixture(scope="module")
def float_run(tmp_path_factory):
    """A finished full-precision run judged by held-out samples: its folder and result."""
    folder = tmp_path_factory.mktemp("float")
    result = train(tiny(folder, bits="32w-32u", holdout=100, steps=1))
    return folder, result


# --- held-out samples ----------------------------------------------------------------------------


def test_held_out_samples_are_stratified_disjoint_and_the_same_for_every_seed():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 50)).tolist()
    rest, aside = holdout.split(labels, 103)
    assert sorted([*rest, *aside]) == list(range(500))
    counts = np.bincount([labels[i] for i in aside])
    assert counts.tolist() == [11, 11, 11, *[10] * 7]
    assert sorted(labels[i] for i in aside[:10]) == list(range(10))  # the classes take turns
    assert holdout.split(labels, 103) == (rest, aside)
    with pytest.raises(ConfigError, match="--holdout 500 would leave nothing of class 0"):
        holdout.split(labels, 500)


def test_the_test_set_waits_for_the_end(float_run):
    _, result = float_run
    assert all("test_accuracy" not in entry for entry in result["history"])
    assert result["held_out_accuracy"] == result["history"][-1]["held_out_accuracy"]
    assert result["best_accuracy"] == max(e["held_out_accuracy"] for e in result["history"])
    assert 0 <= result["last_accuracy"] <= 100
    assert result["test_loss"] > 0


def test_a_run_stopped_before_its_end_has_not_looked_at_the_test_set(tmp_path, monkeypatch):
    monkeypatch.setattr(Loading, "test_dataloader", lambda self: pytest.fail("looked"))
    result = train(tiny(tmp_path, holdout=100, stop_after=1))
    assert result["last_accuracy"] is None
    assert result["held_out_accuracy"] is not None


def test_held_out_samples_are_not_augmented_nor_trained_on(tmp_path, monkeypatch):
    seen = {}

    class Spy(Loading):
        def __init__(self, config, train, test, classes, collate=None, held_out=None):
            super().__init__(config, train, test, classes, collate, held_out)
            seen.update(train=train, held_out=held_out)

    monkeypatch.setattr("recipes.engine.run.Loading", Spy)
    train(tiny(tmp_path, holdout=100, stop_after=1))
    plain, _ = datasets.datasets("digits", size=8, augment=False)
    assert not set(seen["train"].indices) & set(seen["held_out"].indices)
    assert len(seen["train"]) + len(seen["held_out"]) == len(plain)
    for place in (0, 50, 99):
        image, label = seen["held_out"][place]
        expected, wanted = plain[seen["held_out"].indices[place]]
        assert torch.equal(image, expected)
        assert label == wanted


# --- what the machine decides --------------------------------------------------------------------


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_only_where_it_is_native(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for ask in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, ask, lambda: native, raising=False)
    found = setting.resolve(Config(), None)
    assert found.precision == ("bf16-mixed" if native else "32-true")
    assert found.memory_format == "channels_last"
    assert setting.resolve(Config(precision="64-true"), None).precision == "64-true"


def test_a_run_goes_on_with_what_it_began_with(tmp_path):
    wide = {"width": 1 / 16, "limit_batches": 1}  # channels in eights
    train(tiny(tmp_path, stop_after=1, **wide))
    note = json.loads((tmp_path / "config.json").read_text())
    assert note["precision"] != "auto"
    assert note["memory_format"] == "channels_last"
    note["memory_format"] = "contiguous"
    (tmp_path / "config.json").write_text(json.dumps(note))
    result = train(tiny(tmp_path, resume=True, **wide))
    assert result["config"]["memory_format"] == "contiguous"
    assert not differences(tiny(tmp_path, **wide).to_dict(), result["config"])
    with pytest.raises(ConfigError, match="memory_format was 'contiguous', is 'channels_last'"):
        train(tiny(tmp_path, resume=True, memory_format="channels_last", **wide))


@pytest.mark.parametrize("bits", ["1w-2u", "32w-32u"])
def test_channels_last_stays_so_from_layer_to_layer(bits):
    config = Config(width=1 / 16, bits=bits, memory_format="channels_last", kernels="function")
    model = setting.arrange(networks.build(config, datasets.spec("cifar10")), "channels_last")
    formats = {}

    def watch(name):
        def hook(module, args, output):
            if isinstance(output, torch.Tensor) and output.dim() == 5 and output.shape[2] > 1:
                flat = output.detach().flatten(0, 1)
                same = flat.data_ptr() == output.data_ptr()  # flattened without a copy
                last = flat.is_contiguous(memory_format=torch.channels_last)
                formats[name] = same and last

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(watch(name))
    x = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    logits = model(x)
    assert len(formats) > 30
    assert all(formats.values()), [n for n, good in formats.items() if not good]
    # The same answers as in the other format, to the rounding of the convolutions.
    gradients = torch.autograd.grad(logits.sum(), [p for p in model.parameters() if p.dim() == 4])
    assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize(("width", "found"), [(1 / 32, "contiguous"), (1 / 8, "channels_last")])
def test_narrow_networks_are_kept_from_a_fault_of_onednn(width, found):
    config = Config(width=width, accelerator="cpu")
    assert setting.resolve(config, None).memory_format == found
    if found == "contiguous":
        with pytest.raises(ConfigError, match="would corrupt memory"):
            setting.resolve(config.but(memory_format="channels_last"), None)


def test_frames_are_arranged_without_changing_a_value():
    x = torch.randn(3, 2, 4, 5, 6)
    arranged = setting.arranged(x, "channels_last")
    assert torch.equal(arranged, x)
    assert arranged[0].is_contiguous(memory_format=torch.channels_last)
    assert setting.arranged(arranged, "contiguous").is_contiguous()


# --- improvements --------------------------------------------------------------------------------


def training(teacher=None, **changes):
    config = tiny(None, **changes)
    torch.manual_seed(0)
    return Training(config, networks.build(config, SPEC), 10, teacher)


def test_an_annealed_sign_gradient_sharpens_over_the_epochs():
    run = training(sign_gradient="annealed", epochs=5)
    quantizers = [layer.quantizer for layer in networks.binary_layers(run.model)]
    assert {q.gradient for q in quantizers} == {"annealed"}
    assert {q.standardize for q in quantizers} == {"layer"}
    run.annealing.load_state_dict({"epoch": 4})
    assert quantizers[0].temperature.item() == pytest.approx(10)
    assert training().annealing is None


def test_latent_weights_have_a_rate_and_a_decay_of_their_own():
    run = training(lr=0.1, latent_lr=10.0, latent_weight_decay=0.0)
    *others, latent = run.configure_optimizers()["optimizer"].param_groups
    weights = {id(layer.weight) for layer in networks.binary_layers(run.model)}
    assert {id(p) for p in latent["params"]} == weights
    assert (latent["initial_lr"], latent["weight_decay"]) == (1.0, 0.0)
    assert [g["initial_lr"] for g in others] == [0.1, 0.1]
    every = [p for g in (*others, latent) for p in g["params"]]
    assert len(every) == len({id(p) for p in every}) == len(list(run.model.parameters()))


def test_the_mean_over_time_and_tet_are_what_they_say():
    logits, labels = torch.randn(3, 4, 10), torch.tensor([0, 3, 9, 3])
    cross = nn.functional.cross_entropy
    every = torch.stack([cross(step, labels) for step in logits]).mean()
    assert training().loss(logits, labels).item() == pytest.approx(every.item(), rel=1e-5)
    mean = training(loss="mean_logits").loss(logits, labels)
    assert mean.item() == pytest.approx(cross(logits.mean(0), labels).item(), rel=1e-5)
    expected = 0.95 * every + 0.05 * (logits - 1).square().mean()
    assert training(tet=0.05).loss(logits, labels).item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_a_run_may_start_from_float_weights(float_run, tmp_path):
    folder, _ = float_run
    config = tiny(tmp_path, start_from=folder, stop_after=1, lr=1e-6, weight_decay=0.0, steps=1)
    train(config)
    ours = checkpoints.read(tmp_path / "epoch-0001.ckpt")["state_dict"]
    theirs = checkpoints.read(folder / "epoch-0002.ckpt")["state_dict"]
    for name in theirs:
        if name.endswith("conv.weight"):
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=0)


def test_a_start_from_nothing_or_another_network_is_refused(float_run, tmp_path):
    folder, _ = float_run
    with pytest.raises(CheckpointError, match="holds no checkpoint of a run"):
        train(tiny(tmp_path / "a", start_from=tmp_path / "none"))
    with pytest.raises(ConfigError, match="has another network"):
        train(tiny(tmp_path / "b", start_from=folder, width=1 / 16))


def test_a_teacher_adds_the_divergence_of_the_answers(float_run):
    folder, _ = float_run
    teacher = Teacher(folder, SPEC, temperature=3.0)
    x, labels = torch.rand(6, 1, 8, 8), torch.arange(6)
    wanted = torch.softmax(teacher.model(x).mean(0) / 3, 1)
    logits = torch.randn(2, 6, 10, requires_grad=True)
    given = torch.softmax(logits.mean(0) / 3, 1)
    expected = 9 * (wanted * (wanted / given).log()).sum(1).mean()
    found = teacher.loss(x, logits)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    same = teacher.model(x)
    assert teacher.loss(x, same).item() == pytest.approx(0, abs=1e-5)
    assert not any(p.requires_grad for p in teacher.model.parameters())

    student = training(teacher, distillation=0.25, wsdr=False)
    torch.manual_seed(1)
    total = student.training_step((x, labels), 0)
    logits = student(x)
    parts = 0.75 * student.loss(logits, labels) + 0.25 * teacher.loss(x, logits)
    assert total.item() == pytest.approx(parts.item(), rel=1e-4)
    assert not any("teacher" in name for name in student.state_dict())


def test_a_taught_run_trains_and_a_wrong_teacher_is_refused(float_run, tmp_path):
    folder, _ = float_run
    result = train(tiny(tmp_path / "a", teacher=folder, epochs=1))
    assert result["config"]["teacher"] == str(folder)
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        Teacher(tmp_path, SPEC, 4.0)
    with pytest.raises(ConfigError, match="was trained on digits"):
        Teacher(folder, datasets.spec("cifar10"), 4.0)


def test_another_network_is_refused_as_a_start(float_run):
    folder, _ = float_run
    other = networks.build(tiny(None, width=1 / 16), SPEC)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ConfigError):
        start_from(other, folder)
    assert before.keys() == other.state_dict().keys()


def test_shares_are_checked():
    for name in ("distillation", "tet"):
        with pytest.raises(ConfigError, match=f"--{name} is a share"):
            Config(**{name: 1.5})
