"""Table 2 of the paper beside the memory that is counted here: ``python -m recipes.table_2``."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from qsnn_ext import footprint, models, text
from qsnn_ext.footprint import Accounting

#: Table 2 of the paper, MB: batch -> bits -> (ResNet19, VGG16, VGGSNN).
PAPER_TABLE_2: dict[int, dict[str, tuple[float, float, float]]] = {
    1: {
        "32w-32u": (50.80, 59.16, 37.44),
        "1w-8u": (1.75, 1.96, 1.31),
        "1w-4u": (1.68, 1.93, 1.25),
        "1w-2u": (1.65, 1.91, 1.21),
    },
    64: {
        "32w-32u": (83.83, 75.67, 70.47),
        "1w-8u": (10.0, 6.09, 9.57),
        "1w-4u": (5.81, 3.99, 5.38),
        "1w-2u": (3.72, 2.94, 3.28),
    },
    256: {
        "32w-32u": (184.49, 126.01, 171.13),
        "1w-8u": (35.17, 18.67, 34.74),
        "1w-4u": (18.40, 10.28, 17.96),
        "1w-2u": (10.01, 6.09, 9.57),
    },
}


def table_2(
    accounting: Accounting = "paper", host: Literal["spikingjelly", "snntorch"] = "spikingjelly"
) -> dict[int, dict[str, tuple[float, ...]]]:
    """Table 2 as counted here, in MB, laid out as :data:`PAPER_TABLE_2`.

    The paper counts every network at 32x32 pixels and 10 classes, and VGG16's read-out at 32 bits
    also where the network is quantized.

    Args:
        accounting: see :func:`qsnn_ext.footprint`.
        host: whose neurons the networks use.
    """
    networks = ((models.resnet19, 3), (models.vgg16, 3), (models.vggsnn, 2))
    result: dict[int, dict[str, tuple[float, ...]]] = {batch: {} for batch in PAPER_TABLE_2}
    for bits in PAPER_TABLE_2[1]:
        with torch.device("meta"):  # sizes only: no weight is drawn, nothing is computed
            built = [build(in_channels=c, bits=bits, host=host) for build, c in networks]
        counted = [
            footprint(
                model,
                input_shape=(channels, 32, 32),
                accounting=accounting,
                time_steps=1,  # the sizes do not depend on it
                weight_bits={"head": 32} if build is models.vgg16 else None,
            )
            for model, (build, channels) in zip(built, networks, strict=True)
        ]
        for batch in result:
            result[batch][bits] = tuple(replace(f, batch=batch).megabytes for f in counted)
    return result


def _main() -> None:
    ours, resident = table_2(), table_2("resident")
    names = ("ResNet19", "VGG16", "VGGSNN")
    head = ["batch", "bits"]
    for name in names:
        head += [name, "paper", "resident"]
    rows = []
    worst = 0.0
    for batch, by_bits in PAPER_TABLE_2.items():
        for bits, paper in by_bits.items():
            row = [str(batch), bits]
            for i in range(len(names)):
                worst = max(worst, abs(ours[batch][bits][i] - paper[i]))
                row += [
                    f"{ours[batch][bits][i]:.2f}",
                    f"{paper[i]:.2f}",
                    f"{resident[batch][bits][i]:.2f}",
                ]
            rows.append(row)
    print("Memory footprint in MB (10^6 bytes). Under the network's name: counted as the paper")
    print("does; paper: its Table 2; resident: what step-by-step inference holds.\n")
    print(text.columns(head, rows))
    print(f"\nLargest difference from the paper: {worst:.3f} MB")


if __name__ == "__main__":
    _main()
