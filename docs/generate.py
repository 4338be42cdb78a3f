"""Write what the documentation takes from the code and from committed data.

    python docs/generate.py

Tables stand between ``<!-- generated: NAME -->`` and ``<!-- end -->`` in the pages and are replaced;
``--figures`` also draws ``docs/img/overview.svg``. The tests compare the tables with the pages.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import torch

from qsnn_ext import PRESETS, errors

DOCS = Path(__file__).parent

#: Pages with generated tables, seen from here.
PAGES = ("explanation/index.md", "errors.md", "../README.md")

_REGION = re.compile(r"(<!-- generated: ([\w-]+)[^>]*-->\n).*?(<!-- end -->)", re.S)


def table(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is the head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(row)} |\n" for row in lines)


def presets() -> str:
    """How each option differs between the presets, from ``PRESETS``."""
    meaning = {
        "standardize": "mean and deviation of latent weights over",
        "scale": "scale",
        "gradient": "gradient of the sign",
        "squash": "function applied to the potential first",
    }
    rows = [["option of", "name", "what it is", *(f"`{name}`" for name in PRESETS)]]
    for part, owner in (("weight", "BinaryWeight"), ("membrane", "MembraneQuantizer")):
        names = dict.fromkeys(n for preset in PRESETS.values() for n in getattr(preset, part))
        for name in names:
            values = [f"`{getattr(preset, part)[name]!r}`" for preset in PRESETS.values()]
            what = meaning[name] + (" per output channel" if part == "weight" else " of a layer") * (
                name == "scale"
            )
            rows.append([f"`{owner}`", f"`{name}`", what, *values])
    values = [f"`{preset.reduction!r}`" for preset in PRESETS.values()]
    rows.append(["`WSDRRegularizer`", "`reduction`", "over layers", *values])
    return table(rows)


def error_classes() -> str:
    """All error classes with their built-in base and first sentence."""
    rows = [["error", "is also a", "meaning"]]
    for name, kind in vars(errors).items():
        if inspect.isclass(kind) and issubclass(kind, errors.QSNNError):
            also = [b.__name__ for b in kind.__bases__ if b is not errors.QSNNError]
            meaning = " ".join(inspect.getdoc(kind).split()).replace("``", "`")
            rows.append([f"`{name}`", ", ".join(f"`{b}`" for b in also), meaning])
    return table(rows)


TABLES = {"presets": presets, "errors": error_classes}


def fill(text: str) -> str:
    """The page with its generated tables as the code and the data have them now."""
    return _REGION.sub(lambda m: m[1] + TABLES[m[2]]() + m[3], text)


# --------------------------------------------------------------------------- the figure


def trace(bits: int | None, current: torch.Tensor) -> tuple[list[float], list[int]]:
    """Charge before firing, and times of spikes, of one neuron with that many membrane bits."""
    from qsnn_ext import functional as F

    v, charges, spikes = torch.zeros(1), [], []
    for time, x in enumerate(current):
        spike, carried = F.lif_step(x.view(1), v, decay=0.9, threshold=1.0)
        charges.append((0.9 * v + x).item())
        if spike.item():
            spikes.append(time)
        # One neuron alone would be its own scale; the grid of a layer spans the threshold.
        v = carried if bits is None else F.quantize_membrane(carried, bits, torch.tensor(1.0))
    return charges, spikes


def draw() -> None:
    """``img/overview.svg``: a neuron at three widths, and the size of the paper's networks."""
    import matplotlib
    from matplotlib.figure import Figure

    from qsnn_ext import footprint, models

    matplotlib.rcParams |= {"svg.hashsalt": "qsnn_ext", "font.size": 9}
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))

    current = 0.25 * torch.rand(60, generator=torch.Generator().manual_seed(4))
    styles: list[tuple[int | None, str, Any]] = [
        (None, "32 bits", "0.6"), (4, "4 bits", "C0"), (2, "2 bits", "C3"),
    ]  # fmt: skip
    for row, (bits, label, color) in enumerate(styles):
        charges, spikes = trace(bits, current)
        left.step(range(len(charges)), charges, where="post", color=color, label=label)
        left.plot(spikes, [1.25 + 0.09 * row] * len(spikes), "|", color=color, ms=7)
    left.axhline(1.0, color="k", lw=0.6, ls=":")
    left.set(xlabel="time step", ylabel="membrane potential", title="one neuron, the same input")
    left.legend(loc="lower right", ncols=3, frameon=False)

    names = ("resnet19", "vgg16", "vggsnn")
    for column, bits in enumerate(("32w-32u", "1w-8u", "1w-2u")):
        sizes = []
        for name in names:
            channels = 2 if name == "vggsnn" else 3
            model = getattr(models, name)(bits=bits)
            steps = 10 if name == "vggsnn" else None
            options = {"time_steps": steps} if steps else {}
            result = footprint(model, batch=1, input_shape=(channels, 32, 32), **options)
            sizes.append(result.megabytes)
        places = [i + 0.27 * (column - 1) for i in range(len(names))]
        bars = right.bar(places, sizes, 0.25, label=bits, color=["0.6", "C0", "C3"][column])
        right.bar_label(bars, fmt="%.1f", fontsize=7)
    right.set_xticks(range(len(names)), ["ResNet19", "VGG16", "VGGSNN"])
    right.set(yscale="log", ylabel="MB", title="size, weights and membranes, batch 1")
    right.set_ylim(top=150)
    right.legend(ncols=3, frameon=False, fontsize=7)
    (DOCS / "img").mkdir(exist_ok=True)
    figure.savefig(DOCS / "img" / "overview.svg", metadata={"Date": None})


def main() -> None:
    """Rewrite the tables; with ``--figures`` draw the figure too."""
    for page in PAGES:
        path = DOCS / page
        path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")
    if "--figures" in sys.argv[1:]:
        draw()


if __name__ == "__main__":
    main()
