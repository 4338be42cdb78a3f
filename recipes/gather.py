"""Finds the results of runs that are on the disk."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

#: Where runs and studies are looked for.
FOLDERS = (Path("runs"), Path(__file__).parent / "results")

#: What makes a run another experiment than the paper's.
_PROTOCOL = (
    "width", "steps", "size", "augment", "split", "limit_batches",
    "preset", "order", "membrane_scale", "membrane_mode", "strong_augment", "holdout",
    "sign_gradient", "latent_lr", "latent_weight_decay", "start_from", "teacher", "loss", "tet",
)  # fmt: skip


def run_results(folders: Sequence[Path] = FOLDERS) -> Iterator[dict[str, Any]]:
    """Every finished run below the folders, in the order of their paths.

    Yields:
        What the run wrote to ``result.json``, with its path as ``"path"``.

    """
    for folder in folders:
        for path in sorted(folder.rglob("*result.json")):
            content = json.loads(path.read_text())
            if {"config", "last_accuracy", "history"} <= content.keys():
                yield {**content, "path": str(path)}


def studies(folders: Sequence[Path] = FOLDERS) -> Iterator[dict[str, Any]]:
    """Every study of :mod:`recipes.ablation` below the folders."""
    for folder in folders:
        for path in sorted(folder.rglob("ablation-*.json")):
            content = json.loads(path.read_text())
            if {"study", "rows"} <= content.keys():
                yield {**content, "path": str(path)}


def follows_protocol(result: dict[str, Any]) -> bool:
    """Whether a run trained the paper's network on the paper's data set, as its recipe says.

    Bits and the parts of WS-DR are the rows and variants of the paper; how long and how fast is
    trained is shown beside the result.
    """
    config = result["config"]
    if result["recipe"] != f"{config['data']}_{config['network']}":
        return False
    recipe = importlib.import_module(f"recipes.{result['recipe']}").config().to_dict()
    # A run from before an option existed ran as the recipe has it.
    return all(config.get(name, recipe[name]) == recipe[name] for name in _PROTOCOL)
