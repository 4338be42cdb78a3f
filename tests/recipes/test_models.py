"""The trained models of the repository: they load, run, and their cards say what is there."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from qsnn_ext import deploy, load_checkpoint
from recipes import cards, evaluate
from recipes.data import cifar
from recipes.engine import networks

CARDS = sorted(cards.FOLDER.glob("*.json"))


@pytest.mark.parametrize("path", CARDS, ids=lambda p: p.stem)
def test_a_model_loads_runs_and_is_what_its_card_says(path):
    card = json.loads(path.read_text())
    file = path.with_suffix(".qsnn")
    assert file.stat().st_size == card["file_bytes"] < 1_000_000
    assert path.with_suffix(".md").read_text() == cards.page(path.stem, card)
    config = evaluate.configuration(card["config"])
    spec = evaluate.spec_of(config)
    program = deploy.load(file)
    assert program.input_shape == (spec.channels, *spec.size)
    shape = (config.steps, 2) if spec.events else (2,)
    x = np.random.default_rng(0).random((*shape, *program.input_shape), dtype=np.float32)
    logits = program(x)
    assert logits.shape[-2:] == (2, spec.classes)
    assert np.isfinite(logits).all()
    assert (card["bits"], card["variant"]) == (config.bits, config.variant)
    kinds = ["accuracy_simulation", "accuracy_program"]
    if card.get("epochs_done", card["epochs"]) == card["epochs"]:
        kinds.append("accuracy_in_training")
    for kind in kinds:
        assert 0 < card[kind] <= 100
    form = cifar._FORMATS.get(card["data"])
    if form is not None:
        assert (tuple(card["mean"]), tuple(card["std"])) == (form.mean, form.std)
        assert json.loads(program.program.metadata["classes"]) == list(form.names)
    model = networks.build(config, spec)
    assert card["parameters"] == sum(p.numel() for p in model.parameters())
    checkpoint = path.with_suffix(".safetensors")
    if checkpoint.exists():
        assert checkpoint.stat().st_size <= cards.LARGEST_CHECKPOINT
        load_checkpoint(checkpoint, model)


@pytest.mark.slow
@pytest.mark.parametrize("path", CARDS, ids=lambda p: p.stem)
def test_a_cards_number_is_found_again(path):
    """Where the data sets are: ``QSNN_DATA`` names their directory."""
    card = json.loads(path.read_text())
    folder = os.environ.get("QSNN_DATA")
    if folder is None and card["data"] != "digits":
        pytest.skip("QSNN_DATA=DIR tests it: the directory that holds the data sets")
    found = evaluate.main(path.with_suffix(".qsnn"), card["data"], Path(folder or "data"))
    assert found == pytest.approx(card["accuracy_program"], abs=1e-9)
