"""The demo's figure, after the paper's Figures 2 and 4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BEFORE, AFTER = "#7f8c9b", "#d1495b"


def draw(plain: dict[str, Any], regulated: dict[str, Any], path: Path) -> None:
    """Draw firing rate and sign probability of every layer, without and with WS-DR.

    Args:
        plain: Result of the run without regulation.
        regulated: Result of the run with it.
        path: Image to write; the suffix chooses the format.

    """
    figure, axes = plt.subplots(2, 1, figsize=(10, 6.5), layout="constrained")
    bars(
        axes[0],
        {"without WS-DR": plain["layer_rates"], "with WS-DR": regulated["layer_rates"]},
        "firing rate $p_s$",
        "spiking layer",
    )
    bars(
        axes[1],
        {
            "without WS-DR": plain["sign_probabilities"],
            "with WS-DR": regulated["sign_probabilities"],
        },
        "share of +1 weights $p_w$",
        "binary layer",
    )
    config = regulated["config"]
    figure.suptitle(
        f"{config['network']} on {config['data']}, {config['bits']}, seed {config['seed']}: "
        f"{plain['last_accuracy']:.2f} % without, {regulated['last_accuracy']:.2f} % with WS-DR",
        parse_math=False,
    )
    figure.savefig(path, dpi=140)
    plt.close(figure)


def bars(axes: Any, series: dict[str, dict[str, float]], quantity: str, unit: str) -> None:
    """Grouped bars of a share per layer, with the line of greatest entropy at one half."""
    width = 0.8 / len(series)
    for i, (label, values) in enumerate(series.items()):
        positions = [layer + (i - (len(series) - 1) / 2) * width for layer in range(len(values))]
        axes.bar(positions, values.values(), width, label=label, color=(BEFORE, AFTER)[i % 2])
    count = max(len(values) for values in series.values())
    axes.axhline(0.5, color="black", linestyle=":", linewidth=1)
    axes.set_xticks(range(count), [str(i + 1) for i in range(count)])
    axes.set(xlabel=unit, ylabel=quantity, ylim=(0, 1))
    axes.legend(loc="upper right", ncols=len(series), frameon=False)
