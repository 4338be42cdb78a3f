"""The picture of a study on real data, after the paper's Figures 2, 4 and 5."""

from __future__ import annotations

import statistics
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from recipes.engine.digits_figure import bars
from recipes.engine.rates import entropy

#: Variants whose layers are compared: without and with weight-spike dual regulation.
LAYERS = {"plain": "without WS-DR", "ws-dr": "with WS-DR"}


def draw(content: dict[str, Any]) -> Any:
    """Curves over the epochs, layers after the last one, and accuracy of every variant.

    Args:
        content: What :func:`recipes.study.main` returns; of each variant the first seed is drawn.

    Returns:
        A figure of six panels.

    """
    figure, panels = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    accuracy, rate, information, spikes, signs, ends = panels.flat
    for row in (r for r in content["rows"] if r["history"]):
        epochs = [entry["epoch"] for entry in row["history"]]
        curves = {
            accuracy: [entry["held_out_accuracy"] for entry in row["history"]],
            rate: [entry["firing_rate"] for entry in row["history"]],
            information: [mean_entropy(entry["layer_rates"]) for entry in row["history"]],
        }
        for axes, values in curves.items():
            axes.plot(epochs, values, "o-", ms=3, label=row["variant"])
    accuracy.set(ylabel="accuracy on held-out samples (%)")
    rate.set(ylabel="mean firing rate", ylim=(0, None))
    information.set(ylabel="entropy of the spikes, mean of the layers (nats)")
    for axes in (accuracy, rate, information):
        axes.set(xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    accuracy.legend(fontsize=7)

    rows = {LAYERS[r["variant"]]: r for r in content["rows"] if r["variant"] in LAYERS}
    rates = {n: r["history"][-1]["layer_rates"] for n, r in rows.items() if r["history"]}
    if rates:
        bars(spikes, rates, "firing rate $p_s$", "spiking layer")
        shares = {n: rows[n]["sign_probabilities"] for n in rates}
        bars(signs, shares, "share of +1 weights $p_w$", "binary layer")

    for place, row in enumerate(content["rows"]):
        ends.plot(row["accuracies"], [place] * row["n"], "o", ms=4, color="C0", alpha=0.6)
        ends.errorbar(row["mean"], place, xerr=row["std"] or 0, fmt="|", color="C0", ms=12)
    ends.set_yticks(range(len(content["rows"])), [r["variant"] for r in content["rows"]])
    ends.set(xlabel="accuracy on the test set after the last epoch (%)")
    ends.invert_yaxis()
    ends.grid(axis="x", alpha=0.3)
    figure.suptitle(content["study"], fontsize=10)
    return figure


def mean_entropy(layer_rates: dict[str, float]) -> float:
    """Entropy of the spikes (Eq. 14), averaged over the layers, in nats."""
    return statistics.mean(entropy(rate) for rate in layer_rates.values())
