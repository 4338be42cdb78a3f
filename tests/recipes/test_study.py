"""The study, the model cards and the evaluation that finds their numbers again."""

import json
import math

import pytest

from qsnn_ext import deploy
from qsnn_ext.errors import CheckpointError, ConfigError
from qsnn_ext.kernels import _native
from recipes import cards, evaluate, study
from recipes.config import Config
from recipes.engine import study_figure
from recipes.engine.run import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on the digits: its folder and result."""
    folder = tmp_path_factory.mktemp("run")
    config = Config(
        data="digits", size=8, width=1 / 32, batch=64, epochs=2, lr=0.5, workers=0, steps=2,
        accelerator="cpu", progress=False, augment=False, out=folder,
        kernels="native" if _native.library() else "function",
    )  # fmt: skip
    return folder, train(config)


def test_a_stopped_run_has_a_card_that_says_so(tmp_path):
    folder = tmp_path / "stopped"
    config = Config(
        data="digits", size=8, width=1 / 32, batch=64, epochs=3, lr=0.5, workers=0, steps=2,
        accelerator="cpu", progress=False, augment=False, out=folder, limit_batches=2,
        kernels="native" if _native.library() else "function", stop_after=2,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="holds no run"):
        cards.main(folder, "small", folder=tmp_path)
    train(config)
    cards.main(folder, "small", folder=tmp_path)
    card = json.loads((tmp_path / "small.json").read_text())
    assert (card["epochs"], card["epochs_done"], card["accuracy_in_training"]) == (3, 2, None)
    text = (tmp_path / "small.md").read_text()
    assert "| training | stopped after epoch 2 of 3, " in text
    assert "as trained" not in text
    assert "| note |" not in text
    assert evaluate.main(folder, data="digits") == pytest.approx(
        evaluate.main(tmp_path / "small.safetensors", data="digits"), abs=5
    )
    for checkpoint in folder.glob("*.ckpt"):
        checkpoint.unlink()
    with pytest.raises(CheckpointError, match="first epoch"):
        cards.main(folder, "small", folder=tmp_path)


@pytest.mark.slow
def test_a_card_says_what_evaluation_finds(run, tmp_path, capsys):
    folder, result = run
    cards.main(folder, "small", folder=tmp_path, note="begun elsewhere")
    assert "| note | begun elsewhere |" in (tmp_path / "small.md").read_text()
    card = json.loads((tmp_path / "small.json").read_text())
    assert card["accuracy_in_training"] == result["last_accuracy"]
    assert card["file_bytes"] == (tmp_path / "small.qsnn").stat().st_size
    assert str(tmp_path) not in json.dumps(card["config"])
    text = (tmp_path / "small.md").read_text()
    assert f"| test accuracy, integer program | {card['accuracy_program']:.2f} % |" in text
    assert f"| test samples | {card['test_samples']} |" in text
    deploy.load(tmp_path / "small.qsnn")
    for name, key in (
        ("small.qsnn", "accuracy_program"),
        ("small.safetensors", "accuracy_simulation"),
    ):
        capsys.readouterr()
        found = evaluate.main(tmp_path / name, data="digits")
        assert found == pytest.approx(card[key])
        assert f"the card says {card[key]:.2f} %" in capsys.readouterr().out
    assert evaluate.main(folder) == pytest.approx(result["last_accuracy"], abs=0.5)


def test_a_card_names_no_path_of_the_machine():
    command = "python -m recipes.nmnist_vggsnn --data-dir /a/b --lr 0.1 --out='/c d' --teacher /e"
    assert cards.portable(command) == (
        "python -m recipes.nmnist_vggsnn --data-dir DIR --lr 0.1 --out=RUN --teacher RUN0"
    )


@pytest.mark.slow
def test_evaluation_refuses_other_data_and_models_without_a_card(run, tmp_path):
    folder, _ = run
    with pytest.raises(ConfigError, match="was trained on digits, not on cifar10"):
        evaluate.main(folder, data="cifar10")
    (tmp_path / "x.qsnn").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"needs its description in .*x\.json"):
        evaluate.main(tmp_path / "x.qsnn")
    with pytest.raises(ConfigError, match="holds no run"):
        cards.main(tmp_path, "x", folder=tmp_path)


@pytest.fixture
def quick(monkeypatch):
    """Runs that end at once; a list of what was trained."""
    asked = []

    def run_all(configs, lanes):
        for config in configs:
            asked.append(config)
            score = 50.0 + 10 * (config.lr == 0.3) + 5 * (config.tet > 0) - 5 * (not config.wsdr)
            yield (
                config,
                {
                    "held_out_accuracy": score,
                    "last_accuracy": score - 1 + config.seed,
                    "layer_entropies": {},
                    "sign_probabilities": {},
                    "history": [],
                },
            )

    monkeypatch.setattr(study, "run_all", run_all)
    monkeypatch.setattr(study, "run_here", lambda configs: run_all(configs, 1))
    return asked


def test_the_stages_choose_on_held_out_images(quick, tmp_path):
    content = study.main(results=tmp_path, runs=tmp_path / "runs")
    assert all(config.holdout == 5000 for config in quick)
    assert content["learning_rates"]["ws-dr"] == {"sgd:0.1": 50.0, "sgd:0.3": 60.0}
    rows = {row["variant"]: row for row in content["rows"]}
    assert rows["ws-dr"]["setting"] == "sgd:0.3"
    assert rows["ws-dr"]["accuracies"] == [59.0, 60.0]
    assert rows["improved"]["with"] == ["TET's second term"]
    assert set(rows) == {*study.MAIN, *study.PARTS, "improved"}
    # A variant is trained to its end once for each seed, whatever else is asked.
    folders = [config.folder for config in quick]
    assert len(folders) == len(set(folders))
    written = json.loads((tmp_path / "study-cifar10.json").read_text())
    assert written["rows"] == content["rows"]


@pytest.mark.slow
def test_a_whole_study_of_one_lane(tmp_path):
    """On the digits, in this process; asked for again it trains nothing."""
    options = {
        "data": "digits", "width": 1 / 32, "epochs": 1, "batch": 128, "holdout": 100, "seeds": 1,
        "stages": ["variants"], "kernels": "function", "workers": 0, "accelerator": "cpu",
        "results": tmp_path, "runs": tmp_path / "runs",
    }  # fmt: skip
    content = study.main(**options)
    assert [row["variant"] for row in content["rows"]] == list(study.MAIN)
    assert all(row["history"][0]["cpu_seconds"] > 0 for row in content["rows"])
    logs = [path.read_text() for path in (tmp_path / "runs").rglob("log.txt")]
    assert len(logs) == 3
    assert study.main(**options, finished=True)["rows"] == content["rows"]
    assert logs == [path.read_text() for path in (tmp_path / "runs").rglob("log.txt")]


def test_seeds_take_turns_and_stages_can_be_asked_for(quick, tmp_path):
    study.main(results=tmp_path, runs=tmp_path / "runs", stages=["variants"], seeds=2)
    assert [config.seed for config in quick] == [0, 0, 0, 1, 1, 1]
    with pytest.raises(ConfigError, match="unknown stages"):
        study.main(stages=["all"], results=tmp_path)


def write_result(config, **content):
    """A finished run as it lies on the disk."""
    score = 40.0 + config.seed
    entry = {
        "epoch": 1, "train_accuracy": score, "held_out_accuracy": score, "firing_rate": 0.2,
        "layer_rates": {"a": 0.2}, "cpu_seconds": 3.0,
    }  # fmt: skip
    result = {
        "held_out_accuracy": score, "last_accuracy": score - 1, "layer_entropies": {"a": 0.5},
        "sign_probabilities": {"b": 0.5}, "history": [entry], "config": config.to_dict(),
    }  # fmt: skip
    config.folder.mkdir(parents=True)
    (config.folder / "result.json").write_text(json.dumps({**result, **content}))


def test_a_study_is_written_from_what_is_finished(quick, tmp_path):
    """As it stands: nothing is trained, and what is missing has no row."""
    options = {"results": tmp_path, "runs": tmp_path / "runs", "network": "vggsnn", "steps": 3}
    study.main(**options, seeds=2)
    wanted = [
        c for c in quick if "full-precision" in str(c.folder) or "ws-dr-seed" in str(c.folder)
    ]
    quick.clear()
    for config in wanted:
        if "learning-rate" not in str(config.folder) and config.seed == 0:
            # No learning rate was tried: the first of the list is taken.
            write_result(config.but(lr=0.1))
    write_result(
        wanted[0].but(lr=0.1, out=tmp_path / "runs" / "full" / "ws-dr-seed1", bits="1w-2u")
    )
    content = study.main(**options, seeds=2, finished=True)
    assert not quick
    assert content["learning_rates"] == {}
    rows = {row["variant"]: row for row in content["rows"]}
    assert set(rows) == {"full precision", "ws-dr"}
    assert rows["ws-dr"]["accuracies"] == [39.0]
    assert rows["ws-dr"]["history"][0]["cpu_seconds"] == 3.0
    assert content["config"]["network"] == "vggsnn"
    assert content["config"]["steps"] == 3


def test_settings_may_be_given_and_untried_ones_are_taken_as_they_are(quick, tmp_path):
    options = {"results": tmp_path, "runs": tmp_path / "runs", "stages": ["variants"], "seeds": 1}
    study.main(**options, settings={"plain": ["adam:0.003", "adam:0.1"]})
    assert {c.variant: (c.optimizer, c.lr) for c in quick if c.quantized} == {
        "plain": ("adam", 0.003), "wsdr": ("sgd", 0.1)
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"unknown variants \['plane'\]"):
        study.main(**options, settings={"plane": ["adam:0.1"]})


def test_trials_are_those_asked_for(quick, tmp_path):
    options = {"results": tmp_path, "runs": tmp_path / "runs", "stages": ["improvements"]}
    content = study.main(**options, trials=["TET's second term"], trial_epochs=2)
    assert content["improvements"] == {"none": 0.0, "TET's second term": 5.0}
    assert {config.epochs for config in quick} == {2}
    with pytest.raises(ConfigError, match=r"unknown trials \['luck'\]: use 'none', "):
        study.main(**options, trials=["luck"])


def test_the_figure_draws_what_there_is(tmp_path):
    entry = {
        "epoch": 1, "train_accuracy": 50.0, "held_out_accuracy": 40.0, "firing_rate": 0.2,
        "layer_rates": {"a": 0.2, "b": 0.5}, "cpu_seconds": 3.0,
    }  # fmt: skip
    row = {
        "variant": "plain", "accuracies": [40.0], "n": 1, "mean": 40.0, "std": None,
        "sign_probabilities": {"x": 0.5}, "history": [entry, {**entry, "epoch": 2}],
    }  # fmt: skip
    content = {"study": "a study", "rows": [row, {**row, "variant": "ws-dr", "history": []}]}
    figure = study_figure.draw(content)
    accuracy, _, information, spikes, *_ = figure.axes
    assert len(accuracy.lines) == 1
    expected = (math.log(2) - 0.2 * math.log(0.2) - 0.8 * math.log(0.8)) / 2
    assert information.lines[0].get_ydata()[0] == pytest.approx(expected)
    assert len(spikes.patches) == 2


def test_distillation_and_warm_start_take_the_studys_own_float_run(quick, tmp_path):
    study.main(results=tmp_path, runs=tmp_path / "runs", stages=["variants", "improvements"])
    teachers = {c.teacher or c.start_from for c in quick} - {None}
    floats = {c.folder for c in quick if c.bits == "32w-32u" and c.seed == 0}
    assert teachers <= floats
    assert len(teachers) == 1
