"""The picture of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot_run(result: dict[str, Any], path: Path) -> None:
    """Draw loss, accuracy and firing rate over the epochs, and the layers after the last one.

    Args:
        result: What :func:`recipes.engine.results.collect` returns.
        path: Image to write.

    """
    history = result["history"]
    epochs = [entry["epoch"] for entry in history]
    figure, ((loss, accuracy), (rate, layers)) = plt.subplots(
        2, 2, figsize=(11, 7), layout="constrained"
    )
    judged = "held_out" if "held_out_accuracy" in history[-1] else "test"
    for part, style in (("train", "C0"), (judged, "C1")):
        label = part.replace("_", "-")
        loss.plot(epochs, [e[f"{part}_loss"] for e in history], style, label=label)
        accuracy.plot(epochs, [e[f"{part}_accuracy"] for e in history], style, label=label)
    loss.set(xlabel="epoch", ylabel="cross entropy")
    accuracy.plot(result["best_epoch"], result["best_accuracy"], "k*", label="best epoch")
    accuracy.set(xlabel="epoch", ylabel="accuracy (%)")
    rate.plot(epochs, [e["firing_rate"] for e in history], "C2")
    rate.set(xlabel="epoch", ylabel="mean firing rate", ylim=(0, None))
    names, values = list(result["layer_rates"]), list(result["layer_rates"].values())
    layers.bar(range(len(values)), values, color="C2")
    layers.axhline(0.5, color="grey", linestyle=":", linewidth=1)
    layers.set_xticks(
        range(len(names)), names, rotation=60, ha="right", fontsize=7, parse_math=False
    )
    layers.set(ylabel="firing rate per layer", ylim=(0, 1))
    for axes in (loss, accuracy):
        axes.legend()
    config = result["config"]
    figure.suptitle(
        f"{result['recipe']} on {config['data']}, {config['bits']}, {result['variant']}, "
        f"seed {result['seed']}: last {result['last_accuracy']:.2f} %, "
        f"best {result['best_accuracy']:.2f} %",
        parse_math=False,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
