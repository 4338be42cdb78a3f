"""Every recipe end to end on a tiny archive in its data set's real format."""

import json
import math

import pytest

from recipes import (
    cifar10_resnet19,
    cifar100_resnet19,
    dvscifar10_vggsnn,
    dvsgesture_vggsnn,
    tinyimagenet_vgg16,
)
from recipes import data as datasets
from recipes.engine import checkpoints
from recipes.engine.cli import parse
from recipes.engine.run import train
from tests.recipes import archives

RECIPES = {
    "cifar10": cifar10_resnet19,
    "cifar100": cifar100_resnet19,
    "tinyimagenet": tinyimagenet_vgg16,
    "dvsgesture": dvsgesture_vggsnn,
    "dvscifar10": dvscifar10_vggsnn,
}
TINY_LINE = (
    "--width 0.03125 --epochs 1 --limit-batches 2 --batch 4 --workers 0 --accelerator cpu "
    "--no-progress --kernels function"
)
TINY = TINY_LINE.split()


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = folder, archives.make(name, folder)
        return made[name]

    return make


@pytest.mark.parametrize(
    ("host", "bits"), [("spikingjelly", "1w-2u"), ("snntorch", "1w-8u")], ids=lambda v: v
)
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs(tmp_path, monkeypatch, archive, name, host, bits):
    folder, facts = archive(name)
    monkeypatch.setitem(datasets.OFFICIAL, name, facts)
    options = ["--host", host, "--bits", bits, "--data-dir", str(folder), "--out", str(tmp_path)]
    if name.startswith("dvs"):
        options += ["--steps", "3"]
    config = parse(RECIPES[name].config, [*TINY, *options])
    assert config.recipe == RECIPES[name].__name__.removeprefix("recipes.")
    train(config)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["config"]["host"], result["config"]["bits"]) == (host, bits)
    assert math.isfinite(result["history"][0]["train_loss"])
    assert all(0 <= rate <= 1 for rate in result["layer_rates"].values())
    state = checkpoints.read(tmp_path / "epoch-0001.ckpt")["state_dict"]
    assert state["model.head.weight"].shape[0] == datasets.spec(name).classes


@pytest.mark.parametrize("data", ["digits", "digits-events"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_knows_the_digits(name, data):
    config = RECIPES[name].config(data=data)
    paper = RECIPES[name].config()
    assert config.data == data
    assert config.width < paper.width
    assert config.epochs < paper.epochs
    assert (config.network, config.steps, config.bits) == (
        paper.network,
        paper.steps,
        paper.bits,
    )


def test_a_recipe_of_images_trains_on_events(tmp_path, few_digits):
    options = ["--data", "digits-events", "--data-dir", str(tmp_path), "--size", "16"]
    config = parse(dvscifar10_vggsnn.config, [*TINY[2:], *options, "--steps", "2"])
    result = train(config.but(width=1 / 32, out=tmp_path / "run"))
    assert len(result["layer_rates"]) == 8
