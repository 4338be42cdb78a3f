"""The result of a run as data: everything needed to believe it and to repeat it."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from recipes.config import Config
from recipes.engine.files import write_atomically
from recipes.engine.networks import weight_bytes
from recipes.engine.rates import entropy, sign_probabilities

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("qsnn_ext", "torch", "torchvision", "spikingjelly", "snntorch", "lightning", "numpy")


def versions() -> dict[str, str | None]:
    """Versions of Python and of the libraries a result depends on; none where not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_commit() -> dict[str, Any]:
    """Commit of the working tree and whether it has changes; none outside a repository."""

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(
                ("git", *args), cwd=ROOT, capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    status = git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": git("rev-parse", "HEAD"),
        "changed": bool(status) if status is not None else None,
    }


def device_name(device: torch.device) -> str:
    """What the run was computed on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def collect(
    config: Config,
    model: torch.nn.Module,
    history: list[dict[str, Any]],
    best: dict[str, Any],
    device: torch.device,
    test: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The result of a finished run.

    Args:
        config: The run.
        model: The trained network.
        history: One entry per epoch.
        best: The entry of the best epoch.
        device: Where it was trained.
        test: Accuracy and loss on the test set, of a run judged by held-out samples that is done.

    Returns:
        Plain values, ready for JSON. ``last_accuracy`` is that of the last epoch and
        ``best_accuracy`` the highest of all epochs, in percent, on the test set (the latter chosen
        on it and therefore optimistic). With ``--holdout`` epochs are judged by the held-out
        samples: ``best_accuracy`` and ``held_out_accuracy`` (of the last epoch) are theirs, and
        ``last_accuracy`` is that of the one look at the test set, none before it was taken.

    """
    last = history[-1]
    return {
        "recipe": config.recipe,
        "variant": config.variant,
        "last_accuracy": (test or last).get("test_accuracy"),
        "test_loss": (test or last).get("test_loss"),
        "held_out_accuracy": last.get("held_out_accuracy"),
        "best_accuracy": best.get("held_out_accuracy", best.get("test_accuracy")),
        "best_epoch": best["epoch"],
        "seed": config.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weight_bytes": weight_bytes(model),
        "firing_rate": last["firing_rate"],
        "layer_rates": last["layer_rates"],
        "layer_entropies": {name: entropy(r) for name, r in last["layer_rates"].items()},
        "sign_probabilities": sign_probabilities(model),
        "throughput": sum(e["throughput"] for e in history) / len(history),
        "device": device_name(device),
        "git": git_commit(),
        "versions": versions(),
        "command": command(),
        "config": config.to_dict(),
        "history": history,
    }


def command() -> str:
    """The command line of this process, without the paths of this machine's Python and scripts."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    script = ["-m", spec.name] if spec is not None else [Path(sys.argv[0]).name]
    return shlex.join(["python", *script, *sys.argv[1:]])


def write_json(path: Path, content: Any) -> None:
    """Write readable JSON, whole or not at all."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
