"""Accuracy of a saved model on a test set.

    python -m recipes.evaluate --model recipes/results/models/NAME.qsnn --data cifar10

A ``.qsnn`` file runs as the integer program it is. A ``.safetensors`` file is simulated by the
network its card (``NAME.json`` beside it) describes; the folder of a run is its newest checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from qsnn_ext import deploy, load_checkpoint
from qsnn_ext.errors import ConfigError
from qsnn_ext.kernels import use_backend
from recipes import data as datasets
from recipes.config import Config
from recipes.data import DataSpec
from recipes.engine import networks, teacher
from recipes.engine.cli import call

_BATCH = 100


def main(
    model: Path, data: str | None = None, data_dir: Path = Path("data"), threads: int = 1
) -> float:
    """Print the accuracy of a model on the whole test set, and the card's beside it.

    Args:
        model: A .qsnn or .safetensors file with its card (NAME.json) beside it, or a run's folder.
        data: Data set to test on; none takes the one of the card. It must be the same.
        data_dir: Where it lies.
        threads: Threads of the integer program.

    Returns:
        Percent.

    """
    note = model / "config.json" if model.is_dir() else model.with_suffix(".json")
    try:
        card = json.loads(note.read_text())
        config = configuration(card.get("config", card))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{model} needs its description in {note}: {error}.") from error
    if data is not None and data != config.data:
        raise ConfigError(f"{model} was trained on {config.data}, not on {data}.")
    config = config.but(data_dir=data_dir)
    if model.suffix == ".qsnn":
        kind, found = "integer program", accuracy_of_program(model, config, threads)
        said = card.get("accuracy_program")
    else:
        network = networks.build(config, spec_of(config))
        if model.is_dir():
            teacher.start_from(network, model)
        else:
            network = load_checkpoint(model, network)
        kind, found = "simulation", accuracy_of_simulation(network, config)
        said = card.get("accuracy_simulation")
    count = len(test_set(config))  # type: ignore[arg-type]
    beside = "" if said is None else f"; the card says {said:.2f} %"
    print(f"{model}: {found:.2f} % of {count:,} test samples of {config.data} ({kind}){beside}")
    return found


def configuration(noted: dict[str, Any]) -> Config:
    """The configuration of a card or a run, as far as it describes network and data."""
    kept = {f.name for f in fields(Config)} - {"out", "data_dir", "start_from", "teacher"}
    return Config(**{k: v for k, v in noted.items() if k in kept})


def spec_of(config: Config) -> DataSpec:
    """What the network has to know about its data."""
    return datasets.spec(config.data, **networks.data_options(config))


def _sets(config: Config) -> tuple[Dataset[Any], Dataset[Any]]:
    options = networks.data_options(config)
    return datasets.datasets(
        config.data, config.data_dir, augment=False, split=config.split, **options
    )


def test_set(config: Config) -> Dataset[Any]:
    """The test set of a run."""
    return _sets(config)[1]


test_set.__test__ = False  # type: ignore[attr-defined]  # pytest would take it for a test


def first_samples(config: Config, count: int) -> Tensor:
    """The first training samples, as the network takes them: [N, C, H, W] or [T, N, C, H, W]."""
    samples = _sets(config)[0]
    count = min(count, len(samples))  # type: ignore[arg-type]
    collate = datasets.collate_frames if spec_of(config).events else None
    ((x, _),) = DataLoader(Subset(samples, range(count)), batch_size=count, collate_fn=collate)
    return x  # type: ignore[no-any-return]


def _batches(config: Config) -> DataLoader[Any]:
    collate = datasets.collate_frames if spec_of(config).events else None
    return DataLoader(test_set(config), batch_size=_BATCH, collate_fn=collate)


def accuracy_of_simulation(model: nn.Module, config: Config) -> float:
    """Percent of right answers of the network on the whole test set."""
    model.eval()
    right = total = 0
    with torch.no_grad(), use_backend(config.kernels):
        for x, labels in _batches(config):
            right += int((model(x).mean(0).argmax(1) == labels).sum())
            total += len(labels)
    return 100 * right / total


def accuracy_of_program(path: Path, config: Config, threads: int = 1) -> float:
    """Percent of right answers of a `.qsnn` file on the whole test set, in integers throughout."""
    program = deploy.load(path, threads=threads)
    right = total = 0
    for x, labels in _batches(config):
        answers = program.integers(x.numpy())[0].sum(0).reshape(len(labels), -1)
        right += int((answers.argmax(-1) == labels.numpy()).sum())
        total += len(labels)
    return 100 * right / total


if __name__ == "__main__":
    call(main)
