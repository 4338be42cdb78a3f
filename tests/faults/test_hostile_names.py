"""Promise: no name of a module, a run or a file commands a terminal, a plot or a page."""

from __future__ import annotations

import importlib
from collections import OrderedDict

import pytest
import torch
from torch import nn

import qsnn_ext
from qsnn_ext import deploy
from qsnn_ext.errors import QSNNError

spikingjelly = pytest.importorskip("spikingjelly.activation_based")
from spikingjelly.activation_based import functional, layer, neuron  # noqa: E402

# Clears the screen; reorders what is read; opens mathematics that never end; is markup.
EVIL = ("\x1b[2J", "\u202eevil", r"$\frac{1$", "<script>x</script>", "two\nlines", "bell\x07")


def network() -> nn.Module:
    """Two layers of neurons whose names are all of those."""
    a, b, c, d, e, f = EVIL
    parts = OrderedDict(
        {
            a: layer.Linear(6, 8, bias=False),
            b: layer.BatchNorm1d(8),
            c: neuron.LIFNode(),
            d: layer.Linear(8, 8, bias=False),
            e: layer.BatchNorm1d(8),
            f: neuron.LIFNode(),
            a + b: layer.Linear(8, 4),
        }
    )
    model = nn.Sequential(parts)
    functional.set_step_mode(model, "m")
    return model.eval()


def harmless(said: str) -> None:
    assert said
    assert said.replace("\n", "").isprintable()
    for line in said.splitlines():
        assert not line.startswith("lines")


def test_tables_and_messages():
    model, x = network(), torch.rand(2, 3, 6)
    report = qsnn_ext.quantize_(model, sample=x)
    assert "<script>" not in report._repr_html_()
    qsnn_ext.calibrate(model, [x])
    summary = qsnn_ext.summarize(model, x)
    net = deploy.lower(model, x)
    footprint = qsnn_ext.footprint(model, input_shape=(3, 6))
    shown = (report, summary, footprint, deploy.compare(model, net, [x]))
    for result in (*shown, qsnn_ext.fold_batchnorm_(model, x)):
        harmless(str(result))
    with pytest.raises(QSNNError) as refused:
        deploy.lower(model, torch.rand(2, 3, 6, 2, 2, 2))
    harmless(str(refused.value))


def test_pictures_of_a_model(tmp_path):
    model, x = network(), torch.rand(2, 3, 6)
    qsnn_ext.quantize_(model, sample=x)
    qsnn_ext.calibrate(model, [x])
    qsnn_ext.summarize(model, x).plot(tmp_path / "summary.svg")
    deploy.compare(model, deploy.lower(model, x), [x]).plot(tmp_path / "compared.svg")
    for drawn in tmp_path.iterdir():
        assert "<script>" not in drawn.read_text()


def test_pictures_of_a_run(tmp_path):
    plots = importlib.import_module("recipes.engine.plots")
    parts = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "firing_rate")
    rates = dict.fromkeys(EVIL, 0.5)
    for text in EVIL:
        result = {
            "history": [{"epoch": 1, **dict.fromkeys(parts, 1.0)}],
            "config": {"data": text, "bits": text},
            "layer_rates": rates,
            "sign_probabilities": rates,
            "recipe": text,
            "variant": text,
            "seed": 0,
            "best_epoch": 1,
            "best_accuracy": 1.0,
            "last_accuracy": 1.0,
        }
        plots.plot_run(result, tmp_path / "run.svg")
        assert "<script>" not in (tmp_path / "run.svg").read_text()
