"""What 1-bit weights and 2-bit membranes cost on real data, and what gives it back.

    python -m recipes.study --data cifar10 --data-dir DIR

Five stages, in the order in which time buys the most:

1. ``learning-rates``: each variant's own, in runs of three epochs;
2. ``variants``: full precision, plain and WS-DR, trained to the end;
3. ``improvements``: options that go beyond the paper, one at a time, in runs of five epochs;
4. ``best``: those that gain, together, trained to the end;
5. ``parts``: each half of WS-DR, the other preset, more membrane bits.

Everything is chosen on held-out training images; the test set is looked at once, at the end of a
run. Runs that are done are not repeated and an interrupted one goes on, so the same command
continues a study that was stopped. What is finished so far is written to ``recipes/results``; with
``--finished true`` nothing is trained for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from qsnn_ext.errors import ConfigError
from recipes.ablation import VARIANTS, optimization, summary
from recipes.config import Config
from recipes.engine.cli import call
from recipes.engine.many import finished as finished_result
from recipes.engine.many import run_all, run_here
from recipes.engine.results import git_commit, versions, write_json

RESULTS = Path(__file__).parent / "results"
Stage = Literal["learning-rates", "variants", "improvements", "best", "parts"]
STAGES: tuple[Stage, ...] = ("learning-rates", "variants", "improvements", "best", "parts")

RECIPES = {
    "cifar10": "cifar10_resnet19",
    "cifar100": "cifar100_resnet19",
    "fashionmnist": "fashionmnist_resnet19",
    "nmnist": "nmnist_vggsnn",
    "digits": "cifar10_resnet19",
}
MAIN = ("full precision", "plain", "ws-dr")
PARTS = (*("weight regulation", "spike regulation", "official preset", "ws-dr, k=4", "ws-dr, k=8"),)
SETTINGS = {
    "full precision": ("sgd:0.1", "sgd:0.3"),
    "plain": ("adam:0.01", "adam:0.003"),
    "ws-dr": ("sgd:0.1", "sgd:0.3"),
}
# Variants that have no rates of their own take those of the one they are closest to.
LIKE = {"spike regulation": "plain"}


def improvements(teacher: Path) -> dict[str, dict[str, Any]]:
    """What each improvement changes; two of them need the full-precision run in ``teacher``."""
    return {
        "none": {},
        "annealed sign gradient": {"sign_gradient": "annealed"},
        "frozen membrane scales": {"membrane_mode": "frozen"},
        "learnt membrane scales": {"membrane_mode": "learned"},
        "latent weights 3x faster, no decay": {"latent_lr": 3.0, "latent_weight_decay": 0.0},
        "distillation": {"teacher": teacher},
        "warm start": {"start_from": teacher},
        "loss of the mean logits": {"loss": "mean_logits"},
        "TET's second term": {"tet": 0.05},
    }


def main(
    data: Literal["cifar10", "cifar100", "fashionmnist", "nmnist", "digits"] = "cifar10",
    data_dir: Path = Path("data"),
    width: float = 0.25,
    epochs: int = 15,
    batch: int = 128,
    holdout: int = 5000,
    seeds: int = 2,
    stages: Sequence[Stage] = STAGES,
    network: Literal["resnet19", "vgg16", "vggsnn"] | None = None,
    steps: int | None = None,
    settings: dict[str, list[str]] | None = None,
    tuning_epochs: int = 3,
    tuning_batches: int | None = None,
    trials: list[str] | None = None,
    trial_epochs: int = 5,
    finished: bool = False,
    lanes: int = 1,
    workers: int | None = None,
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    kernels: Literal["auto", "native", "triton", "compiled", "function", "eager"] = "auto",
    runs: Path | None = None,
    results: Path = RESULTS,
) -> dict[str, Any]:
    """Run the stages asked for and write what is known.

    Args:
        data: Data set.
        data_dir: Where it lies.
        width: Multiplier of the network's channels.
        epochs: Of the runs to the end.
        batch: Samples per step.
        holdout: Training samples kept aside.
        seeds: Runs of each main variant.
        stages: Which, in any order; they run in their own.
        network: Of the paper; none takes the recipe's.
        steps: Time steps T; none takes the recipe's.
        settings: Optimizers and learning rates that are tried, by variant, in place of the study's
            own; the first is taken where none was tried.
        tuning_epochs: Of the learning-rate runs.
        tuning_batches: Batches per epoch of the learning-rate runs, where whole epochs take too
            long; none takes whole epochs.
        trials: Improvements to try, by name; none tries all.
        trial_epochs: Of the runs that try them, no more than ``epochs``.
        finished: Write what is known from runs that are finished, and train nothing.
        lanes: Runs at a time, which share the cores; one alone runs in this process.
        workers: Data loading processes of each run; none leaves them to the recipe.
        accelerator: Where to train.
        kernels: How the neurons run.
        runs: Folder of the single runs; none takes runs/DATA-wWIDTH.
        results: Folder the summary is written to.

    """
    unknown = set(stages) - set(STAGES)
    if unknown:
        raise ConfigError(f"unknown stages {sorted(unknown)}: use {', '.join(STAGES)}.")
    unknown = set(trials or ()) - set(improvements(Path()))
    if unknown:
        known = ", ".join(map(repr, improvements(Path())))
        raise ConfigError(f"unknown trials {sorted(unknown)}: use {known}.")
    choices = {**SETTINGS, **(settings or {})}
    if set(choices) != set(SETTINGS):
        raise ConfigError(
            f"unknown variants {sorted(set(choices) - set(SETTINGS))}: use {', '.join(MAIN)}."
        )
    recipe = importlib.import_module(f"recipes.{RECIPES[data]}")
    runs = runs or Path("runs") / f"{data}-w{width:g}"
    recipes_own: Config = recipe.config(data=data)
    base = recipes_own.but(
        data_dir=data_dir,
        network=network or recipes_own.network,
        steps=steps or recipes_own.steps,
        width=width,
        batch=batch,
        holdout=holdout,
        strong_augment=False,
        accelerator=accelerator,
        workers=workers,
        kernels=kernels,
        epochs=epochs,
        warmup=min(1.0, epochs / 4),
    )

    def full(name: str, setting: str, seed: int, **changes: Any) -> Config:
        out = runs / "full" / f"{slug(name)}-seed{seed}"
        changes = {**VARIANTS.get(name, {}), **changes}
        return base.but(**changes, **optimization(setting), seed=seed, out=out)

    def results_of(configs: dict[Any, Config]) -> dict[Any, dict[str, Any] | None]:
        return done(configs) if finished else trained(configs, lanes)

    rates: dict[str, dict[str, float]] = {}
    if "learning-rates" in stages:
        short = min(0.5, tuning_epochs / 4)
        tuned = base.but(epochs=tuning_epochs, warmup=short, limit_batches=tuning_batches)
        grid = {
            (name, setting): tuned.but(
                **VARIANTS[name],
                **optimization(setting),
                out=runs / "learning-rate" / f"{slug(name)}-{setting.replace(':', '')}",
            )
            for name in MAIN
            for setting in choices[name]
        }
        for (name, setting), result in results_of(grid).items():
            rates.setdefault(name, {})[setting] = held_out(result)
    best = {
        name: max(rates[name], key=lambda s, n=name: rates[n][s])  # type: ignore[misc]
        if name in rates
        else choices[name][0]
        for name in MAIN
    }

    rows: list[dict[str, Any]] = []

    if "variants" in stages:
        # The first seed of every variant before the second of any.
        wanted = {(n, s): full(n, best[n], s) for s in range(seeds) for n in MAIN}
        ends = results_of(wanted)
        for n in MAIN:
            if seeds_done := [ends[n, s] for s in range(seeds) if (n, s) in ends]:
                rows.append(_row(n, best[n], seeds_done))

    gains: dict[str, float] = {}
    accuracies: dict[str, float] = {}
    ends: dict[Any, dict[str, Any] | None]
    changes = improvements(full("full precision", best["full precision"], 0).folder)
    if "improvements" in stages or "best" in stages:
        epochs_tried = min(trial_epochs, epochs)
        brief = base.but(
            epochs=epochs_tried,
            warmup=min(0.5, epochs_tried / 4),
            **optimization(best["ws-dr"]),
        )
        tried = results_of(
            {
                n: brief.but(**c, out=runs / "improvement" / slug(n))
                for n, c in changes.items()
                if n == "none" or trials is None or n in trials
            }
        )
        accuracies = {n: held_out(r) for n, r in tried.items()}
        if "none" in accuracies:
            gains = {n: a - accuracies["none"] for n, a in accuracies.items()}
    if "best" in stages:
        helpful = [n for n, gain in gains.items() if gain > 0]
        together = {k: v for n in helpful for k, v in changes[n].items()}
        config = full("improved", best["ws-dr"], 0, **together)
        if ends := results_of({0: config}):
            rows.append({**_row("improved", best["ws-dr"], [ends[0]]), "with": helpful})
    if "parts" in stages:
        rate = {n: best[LIKE.get(n, "ws-dr")] for n in PARTS}
        ends = results_of({n: full(n, rate[n], 0) for n in PARTS})
        rows += [_row(n, rate[n], [ends[n]]) for n in PARTS if n in ends]

    content = {
        "study": f"{base.network} of width {width:g} on {data}, {epochs} epochs",
        "holdout": holdout,
        "learning_rates": rates,
        "learning_rate_runs": {"epochs": tuning_epochs, "batches_per_epoch": tuning_batches},
        "improvements": gains,
        "improvement_runs": {"epochs": min(trial_epochs, epochs), "accuracies": accuracies},
        "rows": rows,
        "git": git_commit(),
        "versions": versions(),
        "config": base.but(data_dir=Path("data")).to_dict(),
    }
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / f"study-{data}.json", content)
    for row in rows:
        print(f"{row['variant']:<20} {row['setting']:<10} {row['mean']:6.2f} % over {row['n']}")
    return content


def trained(configs: dict[Any, Config], lanes: int) -> dict[Any, dict[str, Any] | None]:
    """The result of every configuration by its key; none of one that diverged."""
    keys = {config.folder: key for key, config in configs.items()}
    found = {}
    runs = list(configs.values())
    for config, result in run_here(runs) if lanes == 1 else run_all(runs, lanes):
        found[keys[config.folder]] = result
        said = "diverged" if result is None else f"held out {held_out(result):.2f} %"
        print(f"{config.folder}: {said}", flush=True)
    return found


def done(configs: dict[Any, Config]) -> dict[Any, dict[str, Any] | None]:
    """Results of the configurations whose runs are finished, by their keys."""
    found = {key: finished_result(config) for key, config in configs.items()}
    return {key: result for key, result in found.items() if result is not None}


def slug(name: str) -> str:
    """A variant's name as part of a folder's."""
    return name.replace(", ", "-").replace(" ", "-").replace("|", "").replace("'", "")


def held_out(result: dict[str, Any] | None) -> float:
    """Accuracy on the held-out samples after the last epoch (%); 0 of a run that diverged."""
    return 0.0 if result is None else float(result["held_out_accuracy"])


def _row(name: str, setting: str, found: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """A line of the table: accuracy on the test set, and the first seed's curves."""
    accuracies = [0.0 if r is None else float(r["last_accuracy"]) for r in found]
    first = found[0]
    keys = (
        *("epoch", "train_accuracy", "held_out_accuracy"),
        *("firing_rate", "layer_rates", "cpu_seconds"),
    )
    return {
        "variant": name,
        "setting": setting,
        **summary(accuracies),
        "held_out": [round(held_out(r), 4) for r in found],
        "layer_entropies": {} if first is None else first["layer_entropies"],
        "sign_probabilities": {} if first is None else first["sign_probabilities"],
        "history": [] if first is None else [{k: e.get(k) for k in keys} for e in first["history"]],
    }


if __name__ == "__main__":
    call(main)
