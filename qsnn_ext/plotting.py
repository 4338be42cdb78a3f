"""Figures that belong to no window."""

from __future__ import annotations

import functools
import io
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
        made = _kind()(figsize=size, layout="constrained")
    except ImportError as error:
        raise MissingDependencyError(
            f"{what} needs matplotlib, which could not be imported ({error}); "
            "install it with: pip install matplotlib."
        ) from error
    draw(made.subplots(*grid))
    if path is not None:
        made.savefig(path, dpi=150)
    return made


@functools.cache
def _kind() -> Any:
    """The class of figures, once matplotlib is needed."""
    from matplotlib.figure import Figure

    class Picture(Figure):
        """Shown by notebooks, which else show figures of pyplot only."""

        def _repr_png_(self) -> bytes:
            content = io.BytesIO()
            self.savefig(content, format="png")
            return content.getvalue()

    return Picture


def name_bars(axis: Any, names: Sequence[str]) -> None:
    """Names under bars at 0, 1, ...; of many only some, so that they stay legible."""
    every = -(-len(names) // 24) or 1
    shown = [printable(name) for name in names[::every]]
    # A name with dollars in it is no formula.
    axis.set_xticks(range(0, len(names), every), shown, rotation=90, fontsize=7, parse_math=False)
