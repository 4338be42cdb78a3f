"""See a quantized spiking network train on real images, beside the full-precision one.

    python -m recipes.demo

The CIFAR-10 recipe, narrowed, on scikit-learn's handwritten digits: full precision, 1-bit weights
and 2-bit membrane potentials without and with weight-spike dual regulation (WS-DR). Takes under
five minutes on two CPU cores and downloads nothing.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from qsnn_ext.errors import TrainingError
from recipes import cifar10_resnet19
from recipes.config import Config
from recipes.engine.cli import call
from recipes.engine.many import run_all

FULL, PLAIN, UNTUNED, WSDR = (
    "full precision",
    "1w-2u, plain",
    "1w-2u, plain, untuned",
    "1w-2u, WS-DR",
)

# Without standardisation the latent weights are small, and no rate of plain SGD we tried suits
# both their signs and the rest of the network. Adam's steps do not depend on the gradient's scale.
PLAIN_SETTING: dict[str, Any] = {"optimizer": "adam", "lr": 0.003}


def variants(base: Config) -> dict[str, Config]:
    """The networks that are compared, by the name the table gives them."""
    return {
        WSDR: base,
        PLAIN: base.but(wsdr=False, **PLAIN_SETTING),
        FULL: base.but(bits="32w-32u"),
        UNTUNED: base.but(wsdr=False),
    }


def main(
    seconds: float = 240.0,
    seeds: int = 3,
    epochs: int | None = None,
    width: float | None = None,
    limit_batches: int | None = None,
    out: Path | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Train on the digits with and without quantization, print a table and draw a figure.

    Args:
        seconds: No further seed is begun when it would probably end later than this.
        seeds: Most repetitions, each from another initialisation and data order.
        epochs: Passes over the training set; none takes the recipe's.
        width: Multiplier of the network's channels; none takes the recipe's.
        limit_batches: Only this many batches per epoch, to try the demo out.
        out: Folder for runs and figure; none makes one under runs/demo.

    """
    from recipes.engine.digits_figure import draw  # matplotlib takes a while to import

    start = time.monotonic()
    out = out or Path("runs") / "demo" / time.strftime("%Y%m%d-%H%M%S")
    base = cifar10_resnet19.config(data="digits").but(limit_batches=limit_batches)
    base = base.but(epochs=epochs or base.epochs, width=width or base.width)
    print(
        f"{base.network}, width {base.width:g}, on {base.data} {base.size}x{base.size}: "
        f"{base.epochs} epochs of 1,347 images, tested on 450 others.",
        flush=True,
    )
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in range(seeds):
        spent = time.monotonic() - start
        if seed and spent * (seed + 1) / seed > seconds:
            break
        chosen = variants(base.but(seed=seed))
        if seed:
            del chosen[UNTUNED]  # once is enough to see why its rate was tuned
        names = {}
        for name, config in chosen.items():
            folder = out / f"{name.replace(', ', '-').replace(' ', '-')}-seed{seed}"
            names[folder] = name
            chosen[name] = config.but(out=folder)
        for config, result in run_all(list(chosen.values())):
            name = names[config.folder]
            if result is None:
                raise TrainingError(f"{name} could not be trained; see {config.folder}/log.txt.")
            results.setdefault(name, []).append(result)
            clock = f"[{time.monotonic() - start:4.0f} s]"
            print(
                f"{clock} {name}, seed {seed}: {result['last_accuracy']:.2f} %",
                flush=True,
            )
    print("\n" + table(results) + "\n")
    print(verdict(results))
    figure = out / "firing_rates_and_signs.png"
    draw(results[PLAIN][0], results[WSDR][0], figure)
    print(f"Firing rates and sign probabilities per layer: {figure}")
    print(f"Runs, with their results, checkpoints and logs: {out}")
    return results


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """The comparison as text; accuracy is that after the last epoch, meaned over the seeds."""
    head = (
        "network",
        "optimizer",
        "seeds",
        "accuracy (%)",
        "weight bytes",
        "membrane bits",
        "firing rate",
        "entropy (nats)",
    )
    rows = [head]
    for name in (FULL, UNTUNED, PLAIN, WSDR):
        runs = results[name]
        accuracies = [run["last_accuracy"] for run in runs]
        spread = f" ± {statistics.stdev(accuracies):.2f}" if len(runs) > 1 else ""
        entropies = [statistics.mean(run["layer_entropies"].values()) for run in runs]
        rows.append(
            (
                name,
                f"{runs[0]['config']['optimizer']} {runs[0]['config']['lr']:g}",
                str(len(runs)),
                f"{statistics.mean(accuracies):.2f}{spread}",
                f"{runs[0]['weight_bytes']:,}",
                runs[0]["config"]["bits"].split("-")[1].rstrip("u"),
                f"{statistics.mean(run['firing_rate'] for run in runs):.3f}",
                f"{statistics.mean(entropies):.3f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = []
    for row in rows:
        cells = (
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def verdict(results: dict[str, list[dict[str, Any]]]) -> str:
    """What the table means, as measured."""
    full, plain, wsdr = (
        statistics.mean(run["last_accuracy"] for run in results[name])
        for name in (FULL, PLAIN, WSDR)
    )
    smaller = results[FULL][0]["weight_bytes"] / results[WSDR][0]["weight_bytes"]
    return (
        f"With WS-DR the quantized network is {full - wsdr:.2f} points below full precision "
        f"(without: {full - plain:.2f}), in {smaller:.1f} times fewer weight bytes."
    )


if __name__ == "__main__":
    call(main)
