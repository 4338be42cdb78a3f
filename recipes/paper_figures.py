"""The paper's Figures 2 to 5 from whatever results exist, as PNG and SVG.

python -m recipes.paper_figures
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from qsnn_ext.errors import StateError
from recipes.ablation import FIGURE_5
from recipes.engine.cli import call
from recipes.engine.digits_figure import AFTER, BEFORE, bars
from recipes.gather import FOLDERS, follows_protocol, run_results, studies

FIRST = 8  # layers shown in Figures 2 and 4

#: Points of Figure 3 the paper states in numbers: model size (MB) and CIFAR-10 accuracy (%).
PAPER_SIZES = {
    "Q-SNN 1w-2u (paper)": (1.62, 95.20),
    "MINT 2w-2u (paper)": (1.62 / (1 - 0.5622), 90.79),
}

#: Figure 5 of the paper, CIFAR-10 accuracy (%).
PAPER_FIGURE_5 = {"full precision": 96.36, "plain": 93.42, "ws-dr": 95.20}


def best_run(results: Sequence[dict[str, Any]], bits: str, variant: str) -> dict[str, Any] | None:
    """The most accurate run of ResNet19, of those by the paper's protocol if there are any."""
    fitting = [
        r
        for r in results
        if r["config"]["network"] == "resnet19"
        and (r["config"]["bits"], r["variant"]) == (bits, variant)
    ]
    fitting.sort(key=lambda r: (not follows_protocol(r), -r["last_accuracy"]))
    return fitting[0] if fitting else None


def described(result: dict[str, Any]) -> str:
    """What a panel shows, in one line."""
    config = result["config"]
    return (
        f"ResNet19 (width {config['width']:g}) on {config['data']}, {config['bits']}, "
        f"{result['last_accuracy']:.2f} %"
    )


def first_layers(values: dict[str, float]) -> dict[str, float]:
    """The first eight layers' values."""
    return dict(list(values.items())[:FIRST])


def figure_2(plain: dict[str, Any]) -> Any:
    """Firing rates of the first eight layers without WS-DR."""
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    bars(axes, {"without WS-DR": first_layers(plain["layer_rates"])}, "$p_s$", "spiking layer")
    axes.set_title(described(plain), fontsize=9, parse_math=False)
    return figure


def figure_3(results: Sequence[dict[str, Any]]) -> Any:
    """Weight bytes against CIFAR-10 accuracy: the paper's points, and ours where run."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for (label, (size, accuracy)), marker in zip(PAPER_SIZES.items(), "s^", strict=True):
        axes.plot(size, accuracy, marker, markersize=9, color=BEFORE, linestyle="none", label=label)
    ours = [r for r in results if follows_protocol(r) and r["config"]["data"] == "cifar10"]
    for result in ours:
        size = result["weight_bytes"] / 1e6
        label = f"{result['config']['bits']} (ours, best epoch)"
        axes.plot(size, result["best_accuracy"], "o", color=AFTER, linestyle="none", label=label)
    axes.set(xlabel="model size (MB)", ylabel="CIFAR-10 accuracy (%)")
    axes.set_title("" if ours else "no CIFAR-10 run of ours yet", fontsize=9)
    axes.margins(0.25)
    axes.legend(frameon=False, fontsize=8)
    return figure


def figure_4(regulated: dict[str, Any]) -> Any:
    """Sign probabilities and firing rates of the first eight layers with WS-DR."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    signs = {"with WS-DR": first_layers(regulated["sign_probabilities"])}
    bars(axes[0], signs, "$p_w$", "binary layer")
    rates = {"with WS-DR": first_layers(regulated["layer_rates"])}
    bars(axes[1], rates, "$p_s$", "spiking layer")
    figure.suptitle(described(regulated), fontsize=9, parse_math=False)
    return figure


def figure_5(study: dict[str, Any] | None) -> Any:
    """The ablation: the paper's accuracies, and ours with their spread over seeds."""
    found = [] if study is None else study["rows"]
    rows = [r for name in FIGURE_5 for r in found if r["variant"] == name and r["tuned"]]
    panels = 2 if study is not None and rows else 1
    figure, axes = plt.subplots(
        1, panels, figsize=(4.5 * panels, 3.8), layout="constrained", squeeze=False
    )
    left = axes[0, 0]
    left.bar(PAPER_FIGURE_5.keys(), PAPER_FIGURE_5.values(), color=BEFORE)
    left.set(title="CIFAR-10 (the paper's numbers)", ylabel="accuracy (%)", ylim=(90, 98))
    if study is not None and rows:
        right = axes[0, 1]
        spread = [r["std"] or 0 for r in rows]
        means = [r["mean"] for r in rows]
        right.bar([r["variant"] for r in rows], means, yerr=spread, capsize=4, color=AFTER)
        floor = min(m - s for m, s in zip(means, spread, strict=True))
        right.set(title=f"{study['study']} (ours, n = {rows[0]['n']})", ylim=(floor - 5, 100))
    for panel in axes[0]:
        panel.tick_params(axis="x", rotation=25)
        for label in panel.containers:
            if hasattr(label, "patches"):
                panel.bar_label(label, fmt="%.2f", fontsize=8, padding=2)
    return figure


def main(folders: list[Path] = list(FOLDERS), out: Path = Path("runs") / "figures") -> list[Path]:  # noqa: B006
    """Draw every figure for which there are results; say which have none.

    Args:
        folders: Where to look for the results of runs and studies.
        out: Folder the images are written to.

    Returns:
        The files written.

    """
    results = list(run_results(folders))
    plain, regulated = best_run(results, "1w-2u", "plain"), best_run(results, "1w-2u", "wsdr")
    study = next((s for s in studies(folders) if "resnet19" in s["study"]), None)
    drawn = {
        "figure2": figure_2(plain) if plain else None,
        "figure3": figure_3(results),
        "figure4": figure_4(regulated) if regulated else None,
        "figure5": figure_5(study),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StateError(
            f"The folder {out} cannot be made: {error}; give another --out."
        ) from error
    written = []
    for name, figure in drawn.items():
        if figure is None:
            print(f"{name}: no 1w-2u run of ResNet19 yet (python -m recipes.demo makes some)")
            continue
        for suffix in ("png", "svg"):
            path = out / f"{name}.{suffix}"
            figure.savefig(path, dpi=140)
            written.append(path)
            print(path)
        plt.close(figure)
    return written


if __name__ == "__main__":
    call(main)
