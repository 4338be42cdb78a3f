"""Figures that belong to no window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

from qsnn_ext.errors import MissingDependencyError
from qsnn_ext.text import printable


def figure(
    what: str,
    draw: Callable[[Any], None],
    grid: tuple[int, int],
    size: tuple[float, float],
    path: str | PathLike[str] | None,
) -> Any:
    """A ``matplotlib.figure.Figure`` with axes side by side and below each other.

    Args:
        what: asked for it; named where it cannot be drawn.
        draw: fills the array of axes.
        grid: rows and columns of axes.
        size: width and height in inches.
        path: file to write (its suffix tells the format); nothing is written without it.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            f"{what} needs matplotlib, which could not be imported ({error}); "
            "install it with: pip install matplotlib."
        ) from error
    made = Figure(figsize=size, layout="constrained")
    draw(made.subplots(*grid))
    if path is not None:
        made.savefig(path, dpi=150)
    return made


def name_bars(axis: Any, names: Sequence[str]) -> None:
    """Names under bars at 0, 1, ...; of many only some, so that they stay legible."""
    every = -(-len(names) // 24) or 1
    shown = [printable(name) for name in names[::every]]
    # A name with dollars in it is no formula.
    axis.set_xticks(range(0, len(names), every), shown, rotation=90, fontsize=7, parse_math=False)
