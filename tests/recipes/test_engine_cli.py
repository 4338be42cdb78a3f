"""The command line: every option explained, and the choices that change a recipe's defaults."""

from dataclasses import fields
from pathlib import Path

import pytest

from qsnn_ext.errors import ConfigError
from recipes import cifar10_resnet19, dvsgesture_vggsnn, tinyimagenet_vgg16
from recipes.config import Config, differences, flag
from recipes.engine.cli import build_parser, call, field_help, main, parse


def test_every_option_is_explained():
    texts = field_help()
    text = " ".join(build_parser(Config(), None).format_help().split())
    for field in fields(Config):
        assert len(texts[field.name]) > 15, f"{field.name} has no description"
        if field.name != "recipe":
            assert flag(field.name) in text
    assert "--no-wsdr" in text
    assert "Eq. 12" in text


def test_paper_defaults():
    config = parse(cifar10_resnet19.config, [])
    assert config == cifar10_resnet19.config()
    assert (config.steps, config.optimizer, config.lr, config.batch) == (2, "sgd", 0.1, 256)
    assert (config.strength, config.weight_decay, config.width) == (1e-3, 1e-4, 1.0)
    assert (config.bits, config.preset, config.host) == ("1w-2u", "paper", "spikingjelly")
    gesture = parse(dvsgesture_vggsnn.config, [])
    assert (gesture.steps, gesture.batch, gesture.network) == (16, 64, "vggsnn")


def test_options_common_to_all():
    line = (
        "--bits 1w-8u --preset official --no-wsdr --strength 0.01 --host snntorch --seed 3 "
        "--epochs 5 --data-dir elsewhere --resume --precision bf16-mixed --devices 2"
    )
    config = parse(cifar10_resnet19.config, line.split())
    assert (config.bits, config.preset, config.host) == ("1w-8u", "official", "snntorch")
    assert (config.strength, config.seed, config.epochs) == (0.01, 3, 5)
    assert (config.data_dir, config.resume) == (Path("elsewhere"), True)
    assert (config.precision, config.devices) == ("bf16-mixed", 2)
    assert config.variant == "plain"


def test_the_data_set_chooses_the_defaults():
    small = parse(cifar10_resnet19.config, ["--data", "digits"])
    assert small == cifar10_resnet19.config(data="digits")
    assert small.width < 1 < small.epochs < 300
    assert parse(cifar10_resnet19.config, ["--data=digits", "--epochs=2"]).epochs == 2


def test_as_published():
    assert parse(tinyimagenet_vgg16.config, []).lr == 1e-3
    published = parse(tinyimagenet_vgg16.config, ["--as-published"])
    assert (published.optimizer, published.lr, published.as_published) == ("adam", 0.1, True)


def test_a_config_file(tmp_path):
    (tmp_path / "run.yaml").write_text("bits: 1w-4u\nlr: 0.5\n")
    config = parse(cifar10_resnet19.config, ["--config", str(tmp_path / "run.yaml"), "--lr=0.2"])
    assert (config.bits, config.lr) == ("1w-4u", 0.2)


def test_a_config_file_chooses_the_data_set_too(tmp_path):
    (tmp_path / "run.yaml").write_text("data: digits\nas_published: true\n")
    config = parse(tinyimagenet_vgg16.config, ["--config", str(tmp_path / "run.yaml")])
    assert config == tinyimagenet_vgg16.config(data="digits", as_published=True)


def test_help_shows_the_defaults_of_the_data_set(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(cifar10_resnet19.config, ["--data", "digits", "--help"])
    assert stop.value.code == 0
    assert "default: 0.125" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--data-dir", "--data_dir"])
def test_studies_spell_their_options_as_recipes_do(option, monkeypatch):
    seen = {}

    def study(data: str = "a", data_dir: Path = Path("data"), rate: float = 0.0) -> None:
        seen.update(data=data, data_dir=data_dir, rate=rate)

    monkeypatch.setattr("sys.argv", ["study", option, "a-b/c", "--data=x-y", "--rate", "-1"])
    call(study)
    assert seen == {"data": "x-y", "data_dir": Path("a-b/c"), "rate": -1.0}


@pytest.mark.parametrize(
    "argv", [["--bits", "1w-3u"], ["--data", "mnist"], ["--leaning-rate", "3"]]
)
def test_what_argparse_refuses(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(cifar10_resnet19.config, argv)
    assert stop.value.code == 2
    assert argv[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"lr": 0.0}, "--lr"),
        ({"lr": float("nan")}, "--lr"),
        ({"limit_batches": 0}, "--limit-batches"),
        ({"strength": -1.0}, "--strength"),
        ({"warmup": 300.0}, "--warmup"),
    ],
)
def test_values_that_cannot_be(change, name):
    with pytest.raises(ConfigError, match=name):
        Config(**change)


def test_deliberate_errors_end_in_one_line(tmp_path, capsys):
    argv = ["--data-dir", str(tmp_path), "--out", str(tmp_path / "run"), "--epochs", "0"]
    with pytest.raises(SystemExit) as stop:
        main(cifar10_resnet19.config, argv)
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("usage: --epochs must be greater")


@pytest.mark.parametrize(
    ("change", "variant"),
    [
        ({}, "wsdr"),
        ({"wsdr": False}, "plain"),
        ({"wsdr": False, "weight_regulation": True}, "weight"),
        ({"spike_regulation": True, "weight_regulation": False}, "spike"),
        ({"bits": "32w-32u"}, "plain"),
        ({"bits": "32w-32u", "spike_regulation": True}, "spike"),
    ],
)
def test_variants(change, variant):
    assert Config(**change).variant == variant


def test_what_makes_another_experiment():
    ours = Config(lr=0.2, workers=1, out=Path("here")).to_dict()
    assert differences(ours, Config().to_dict()) == {"lr": (0.1, 0.2)}
