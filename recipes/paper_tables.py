"""The paper's two tables: its numbers, labelled as such, and ours where there are any.

python -m recipes.paper_tables
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qsnn_ext.text import columns
from recipes.engine.cli import call
from recipes.gather import FOLDERS, follows_protocol, run_results
from recipes.table_2 import PAPER_TABLE_2, table_2

BITS = ("32w-32u", "1w-8u", "1w-4u", "1w-2u")

#: Table 1 of the paper, its own rows: accuracy in %, in the order of ``BITS``.
PAPER_TABLE_1 = {
    "cifar10": (96.36, 95.54, 95.31, 95.20),
    "cifar100": (79.52, 78.77, 78.82, 78.70),
    "tinyimagenet": (56.77, 55.70, 55.20, 55.04),
    "dvsgesture": (97.83, 97.92, 97.57, 96.53),
    "dvscifar10": (82.10, 81.60, 81.50, 80.00),
}


def table_1(results: Sequence[dict[str, Any]]) -> str:
    """Table 1 as text: the paper's accuracy, our best and last one, and how many runs they mean.

    Only runs by the protocol count: the paper's data set whole, the network at its full width, and
    WS-DR where quantized. Cells without a run stay blank.

    Args:
        results: What the runs wrote.

    """
    rows = []
    for data, accuracies in PAPER_TABLE_1.items():
        for bits, paper in zip(BITS, accuracies, strict=True):
            variant = "plain" if bits == "32w-32u" else "wsdr"
            runs = [
                r
                for r in results
                if follows_protocol(r)
                and (r["config"]["data"], r["config"]["bits"]) == (data, bits)
                and r["variant"] == variant
            ]
            best, last, epochs = "", "", ""
            if runs:
                best = f"{statistics.mean(r['best_accuracy'] for r in runs):.2f}"
                last = f"{statistics.mean(r['last_accuracy'] for r in runs):.2f}"
                epochs = "/".join(sorted({str(r["config"]["epochs"]) for r in runs}))
            rows.append([data, bits, f"{paper:.2f}", best, last, str(len(runs) or ""), epochs])
    head = ["data set", "bits", "paper", "ours, best", "ours, last", "runs", "epochs"]
    return columns(head, rows)


def table_2_text() -> str:
    """Table 2 as text: MB (10^6 bytes) as counted here, beside the paper's."""
    ours = table_2()
    head = ["batch", "bits"]
    for name in ("ResNet19", "VGG16", "VGGSNN"):
        head += [name, "paper"]
    rows = []
    for batch, by_bits in PAPER_TABLE_2.items():
        for bits, paper in by_bits.items():
            cells = zip(ours[batch][bits], paper, strict=True)
            rows.append([str(batch), bits, *(f"{v:.2f}" for pair in cells for v in pair)])
    return columns(head, rows)


def main(folders: list[Path] = list(FOLDERS)) -> None:  # noqa: B006 (never changed)
    """Print Tables 1 and 2.

    Args:
        folders: Where to look for the results of runs.

    """
    results = list(run_results(folders))
    print("Table 1: accuracy (%). 'paper' is quoted; 'best' is the best test epoch, as the paper")
    print("reports it, 'last' the one after the last epoch. Blank: not run.\n")
    print(table_1(results))
    print("\nTable 2: memory footprint (MB = 10^6 bytes), counted here beside the paper's.\n")
    print(table_2_text())


if __name__ == "__main__":
    call(main)
