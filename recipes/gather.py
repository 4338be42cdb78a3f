"""Finds the results of runs that are on the disk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = (Path("runs"), Path(__file__).parent / "results")


def run_results(folders: Sequence[Path] = HERE) -> Iterator[dict[str, Any]]:
    """Every finished run below the folders, in the order of their paths.

    Yields:
        What the run wrote to ``result.json``, with its path as ``"path"``.

    """
    for folder in folders:
        for path in sorted(folder.rglob("*result.json")):
            content = json.loads(path.read_text())
            if {"config", "last_accuracy", "history"} <= content.keys():
                yield {**content, "path": str(path)}


def studies(folders: Sequence[Path] = HERE) -> Iterator[dict[str, Any]]:
    """Every study of :mod:`recipes.ablation` below the folders."""
    for folder in folders:
        for path in sorted(folder.rglob("ablation-*.json")):
            content = json.loads(path.read_text())
            if {"study", "rows"} <= content.keys():
                yield {**content, "path": str(path)}


def follows_protocol(result: dict[str, Any]) -> bool:
    """Whether a run trained the paper's network on the paper's data set, whole."""
    config = result["config"]
    return (
        result["recipe"] == f"{config['data']}_{config['network']}"
        and config["width"] == 1.0
        and config["limit_batches"] is None
    )
