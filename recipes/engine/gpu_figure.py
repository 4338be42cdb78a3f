"""The picture of the runs on a GPU: curves at two widths, and the layers of the full one."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from recipes.engine.digits_figure import bars

COLORS = {"full precision": "C0", "plain": "C1", "ws-dr": "C2"}
NAMES = {"32w-32u": "full precision", "1w-2u": "ws-dr"}


def draw(
    full: list[dict[str, Any]], stopped: list[dict[str, Any]], continued: dict[str, Any]
) -> Any:
    """Held-out accuracy over the epochs; firing rates and weight signs after the last one.

    Args:
        full: Results of the runs at full width, as :mod:`recipes.engine.run` writes them.
        stopped: Runs at a quarter of it: ``variant``, ``seed`` and ``history``.
        continued: Result of the one that went on elsewhere, and ``continued_from_epoch``.

    Returns:
        A figure of four panels.

    """
    figure, panels = plt.subplots(2, 2, figsize=(9.5, 7), layout="constrained")
    wide, narrow, spikes, signs = panels.flat
    runs = {NAMES[r["config"]["bits"]]: r for r in full}
    for name, run in runs.items():
        _curve(wide, run["history"], COLORS[name], f"{name}, test set {run['last_accuracy']:.2f}")
    for run in stopped:
        label = run["variant"] if run["seed"] == 0 else None
        _curve(narrow, run["history"], COLORS[run["variant"]], label)
    later = continued["history"][continued["continued_from_epoch"] - 1 :]
    label = f"ws-dr, on a CPU, test set {continued['last_accuracy']:.2f}"
    _curve(narrow, later, COLORS["ws-dr"], label, "o:")
    wide.set(title="full width, schedule of 6 epochs")
    narrow.set(title="width 1/4, schedule of 15 epochs, stopped")
    for axes in (wide, narrow):
        axes.set(xlabel="epoch", ylabel="accuracy on held-out samples (%)")
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize=8)
    bars(spikes, {n: r["layer_rates"] for n, r in runs.items()}, "firing rate $p_s$", "layer")
    shares = {n: r["sign_probabilities"] for n, r in runs.items()}
    bars(signs, shares, "share of +1 weights $p_w$", "hidden layer")
    return figure


def _curve(
    axes: Any, history: list[dict[str, Any]], color: str, label: str | None, style: str = "o-"
) -> None:
    epochs = [entry["epoch"] for entry in history]
    accuracies = [entry["held_out_accuracy"] for entry in history]
    axes.plot(epochs, accuracies, style, ms=3, color=color, label=label)
