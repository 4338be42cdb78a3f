"""Figure 5 and the study around it: what each part of the method contributes, over several seeds.

    python -m recipes.ablation --seeds 5

Every variant gets its own optimizer and learning rate, the best of a grid on a seed that is not
counted, and the same number of epochs; its accuracy at the recipe's common setting is kept beside
it. Finished runs are not repeated, so an interrupted study goes on where it stopped.
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from qsnn_ext.errors import ConfigError
from recipes import cifar10_resnet19, dvscifar10_vggsnn
from recipes.config import Config
from recipes.engine.cli import call
from recipes.engine.many import run_all
from recipes.engine.results import git_commit, versions, write_json

RESULTS = Path(__file__).parent / "results"
TUNING_SEED = 1000

# What each variant changes in the recipe's configuration (1w-2u with WS-DR, paper preset).
VARIANTS: dict[str, dict[str, Any]] = {
    # Figure 5
    "full precision": {"bits": "32w-32u"},
    "plain": {"wsdr": False},
    "weight regulation": {"wsdr": False, "weight_regulation": True},
    "spike regulation": {"wsdr": False, "spike_regulation": True},
    "ws-dr": {},
    # membrane bits, with and without regulation
    "ws-dr, k=4": {"bits": "1w-4u"},
    "ws-dr, k=8": {"bits": "1w-8u"},
    "plain, k=4": {"bits": "1w-4u", "wsdr": False},
    "plain, k=8": {"bits": "1w-8u", "wsdr": False},
    # what the paper's text and its authors' code do differently
    "official preset": {"preset": "official"},
    "quantize first": {"order": "quantize_first"},
    "scale max|u|": {"membrane_scale": "absmax"},
    "frozen scale": {"membrane_mode": "frozen"},
}
FIGURE_5 = tuple(VARIANTS)[:5]

# Optimizer and learning rate, tried for every variant. Adam's step does not depend on the scale of
# the gradient, which is what differs most between standardised and small latent weights.
SETTINGS = ("sgd:0.02", "sgd:0.1", "sgd:0.5", "sgd:1", "adam:0.001", "adam:0.003", "adam:0.01")


def main(
    data: Literal["digits", "digits-events"] = "digits",
    variants: list[str] | None = None,
    seeds: int = 5,
    untuned_seeds: int = 5,
    settings: list[str] | None = None,
    epochs: int | None = None,
    width: float | None = None,
    size: int | None = None,
    steps: int | None = None,
    kernels: Literal["auto", "native", "compiled", "function", "eager"] = "auto",
    limit_batches: int | None = None,
    processes: int | None = None,
    runs: Path | None = None,
    results: Path = RESULTS,
) -> dict[str, Any]:
    """Train every variant over several seeds and write mean and standard deviation.

    Args:
        data: The images with ResNet19, or the event recordings with VGGSNN.
        variants: Names of the variants to run; none runs all.
        seeds: Repetitions of each variant that are counted.
        untuned_seeds: Repetitions at the common setting, which are only shown; 0 leaves it out.
        settings: Optimizers and learning rates tried for each variant on an uncounted seed, such
            as sgd:0.1; none tries the study's own.
        epochs: Passes over the training set, the same for every variant; none takes the recipe's.
        width: Multiplier of the network's channels; none takes the recipe's.
        size: Side of the input in pixels; none takes the recipe's.
        steps: Time steps T; none takes the recipe's.
        kernels: How the neurons run.
        limit_batches: Only this many batches per epoch, to try the study out.
        processes: Runs at a time; none takes one per CPU core.
        runs: Folder of the single runs; none takes runs/ablation-DATA.
        results: Folder the summary is written to, as JSON and CSV.

    """
    if variants and results == RESULTS:
        raise ConfigError(
            "Some variants alone would replace the results of the whole study; "
            "give them a folder with --results."
        )
    names = variants or list(VARIANTS)
    for name in names:
        if name not in VARIANTS:
            raise ConfigError(
                f"Unknown variant {name!r}; there are: {', '.join(map(repr, VARIANTS))}."
            )
    if seeds < 1:
        raise ConfigError(f"--seeds must be at least 1, got {seeds}.")
    recipe = cifar10_resnet19 if data == "digits" else dvscifar10_vggsnn
    common = recipe.config(data=data).but(limit_batches=limit_batches)
    base = common.but(
        epochs=epochs or common.epochs,
        width=width or common.width,
        size=size or common.size,
        steps=steps or common.steps,
        kernels=kernels,
    )
    runs = runs or Path("runs") / f"ablation-{data}"

    def configure(name: str, setting: str, seed: int) -> Config:
        folder = runs / f"{name.replace(', ', '-').replace(' ', '-').replace('|', '')}"
        out = folder / f"{setting.replace(':', '')}-seed{seed}"
        return base.but(**VARIANTS[name], **optimization(setting), seed=seed, out=out)

    grid = settings or list(SETTINGS)
    shared = f"{base.optimizer}:{base.lr:g}"
    tuning = {(n, s): configure(n, s, TUNING_SEED) for n in names for s in grid}
    tuned_accuracy = _accuracies(tuning, processes)
    best = {n: max(grid, key=lambda s, n=n: tuned_accuracy[n, s]) for n in names}

    counted = {
        (n, s, seed): configure(n, s, seed)
        for n in names
        for s in dict.fromkeys((best[n], shared))
        for seed in range(seeds if s == best[n] else untuned_seeds)
    }
    accuracy = _accuracies(counted, processes)
    rows = [
        {
            "variant": name,
            "tuned": setting == best[name],
            "setting": setting,
            **summary([accuracy[key] for key in counted if key[:2] == (name, setting)]),
        }
        for name, setting in dict.fromkeys(key[:2] for key in counted)
    ]
    content = {
        "study": f"{base.network} on {data}",
        "measure": "accuracy on the test set after the last epoch (%)",
        "tuning": {name: {s: tuned_accuracy[name, s] for s in grid} for name in names},
        "tuning_seed": TUNING_SEED,
        "rows": rows,
        "git": git_commit(),
        "versions": versions(),
        "config": base.to_dict(),
    }
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / f"ablation-{data}.json", content)
    with open(results / f"ablation-{data}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({**r, "accuracies": " ".join(map(str, r["accuracies"]))} for r in rows)
    for row in rows:
        note = "" if row["tuned"] else "  (common setting, not tuned)"
        print(
            f"{row['variant']:<20} {row['setting']:<10} {row['mean']:6.2f} ± {row['std'] or 0:.2f} "
            f"over {row['n']}{note}"
        )
    return content


def optimization(setting: str) -> dict[str, Any]:
    """``"sgd:0.1"`` as fields of the configuration."""
    name, _, rate = setting.partition(":")
    try:
        return {"optimizer": {"sgd": "sgd", "adam": "adam"}[name], "lr": float(rate)}
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"Setting {setting!r} is not of the form sgd:0.1 or adam:0.001."
        ) from error


def summary(accuracies: Sequence[float]) -> dict[str, Any]:
    """Mean, standard deviation over seeds (n - 1; none for one seed), and the values."""
    return {
        "mean": round(statistics.mean(accuracies), 4),
        "std": round(statistics.stdev(accuracies), 4) if len(accuracies) > 1 else None,
        "n": len(accuracies),
        "accuracies": [round(a, 4) for a in accuracies],
    }


def _accuracies(configs: dict[Any, Config], processes: int | None) -> dict[Any, float]:
    """Accuracy after the last epoch of every run (%); 0 for one that diverged."""
    keys = {config.folder: key for key, config in configs.items()}
    found = {}
    for config, result in run_all(list(configs.values()), processes):
        # A run that diverged has learned nothing it could answer with.
        accuracy = 0.0 if result is None else result["last_accuracy"]
        found[keys[config.folder]] = accuracy
        print(f"{config.folder}: {accuracy:.2f} %", file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    call(main)
