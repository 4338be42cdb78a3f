"""A trained model as a folder to publish: weights, configuration, and a card for people.

The layout is that of the Hugging Face hub, which is not needed: upload the folder with whatever
tool, or none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qsnn_ext
from qsnn_ext.checkpoint import load_checkpoint, save_checkpoint
from qsnn_ext.conversion.report import conversion_report
from qsnn_ext.errors import CheckpointError, ConfigError
from qsnn_ext.files import write_atomically
from qsnn_ext.report import Summary

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    arguments: Mapping[str, Any] | None = None,
    name: str | None = None,
    license: str | None = None,
    text: str = "",
    summary: Summary | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Write ``model.safetensors``, ``config.json`` and ``README.md`` into a folder.

    Args:
        model: quantized or not; see :func:`~qsnn_ext.save_checkpoint`.
        folder: made if it is not there; files of these names in it are replaced.
        arguments: what the float model's constructor takes, ready for JSON;
            :func:`load_pretrained` calls it with them.
        name: of the model, for the card; the folder's name without it.
        license: of the weights, as the hub spells it, for instance ``"mit"``.
        text: what the card says besides, in Markdown.
        summary: of :func:`~qsnn_ext.summarize`; its table goes into the card.
        metrics: results to state, by name.

    Returns:
        The folder.

    Raises:
        ConfigError: ``arguments`` hold what JSON has no word for.
        CheckpointError: a file cannot be written, or the model not be stored.
        MissingDependencyError: safetensors is not installed.
    """
    folder = Path(folder)
    config: dict[str, Any] = {
        "architecture": f"{type(model).__module__}.{type(model).__qualname__}",
        "arguments": dict(arguments or {}),
        "qsnn_ext": qsnn_ext.__version__,
        "torch": torch.__version__.split("+")[0],
        "metrics": dict(metrics or {}),
    }
    report = conversion_report(model)
    if report is not None:
        config["quantization"] = report.config.to_dict()
    try:
        told = json.dumps(config, indent=2, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"arguments and metrics must be plain data ready for JSON: {error}."
        ) from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"the folder {str(folder)!r} cannot be made: {error}.") from error
    save_checkpoint(model, folder / WEIGHTS)
    card = _card(name or folder.name, config, license, text, summary)
    for file, content in ((CONFIG, told + "\n"), (CARD, card)):
        data = content.encode()
        write_atomically(folder / file, lambda f, data=data: f.write(data), CheckpointError)  # type: ignore[misc]
    return folder


def load_pretrained(folder: str | Path, model: nn.Module | Callable[..., nn.Module]) -> nn.Module:
    """The model in a folder of :func:`save_pretrained`.

    Nothing in the folder chooses what is called: the architecture's name in it is for people.

    Args:
        folder: with ``config.json`` and ``model.safetensors``.
        model: the float model, or a function (or class) that builds it, which is called with the
            arguments that were saved.

    Returns:
        The model, quantized as it was saved.

    Raises:
        CheckpointError: a file is missing or damaged, or of another architecture.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no {CONFIG} in {str(folder)!r}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(folder, f"{error!s:.200}") from error
    arguments = config.get("arguments") if isinstance(config, dict) else None
    if not isinstance(arguments, dict):
        raise _damaged(folder, "it has no arguments.")
    built = model if isinstance(model, nn.Module) else lambda: model(**arguments)
    return load_checkpoint(folder / WEIGHTS, built)


def _damaged(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{str(folder / CONFIG)!r} is damaged or not of save_pretrained: {why}")


def _card(
    name: str,
    config: Mapping[str, Any],
    license: str | None,
    text: str,
    summary: Summary | None,
) -> str:
    front = ["library_name: qsnn_ext", "tags:", "- spiking-neural-network", "- quantized"]
    if license is not None:
        front.insert(0, f"license: {json.dumps(license)}")
    parts = ["---", *front, "---", "", f"# {name}", ""]
    if text:
        parts += [text.rstrip(), ""]
    if config["metrics"]:
        parts += ["| metric | value |", "| --- | --- |"]
        parts += [f"| {key} | {value} |" for key, value in config["metrics"].items()] + [""]
    parts += [
        "```python",
        "from qsnn_ext.pretrained import load_pretrained",
        "",
        f"model = load_pretrained(folder, {config['architecture'].rsplit('.', 1)[-1]})",
        "```",
        "",
    ]
    if summary is not None:
        parts += ["```text", str(summary), "```", ""]
    parts.append(f"Written by qsnn_ext {config['qsnn_ext']} with torch {config['torch']}.")
    return "\n".join(parts) + "\n"
