"""A curve that grows while a notebook trains, and the demo page inside one; silent elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def _display() -> Any:
    """IPython's display, in a notebook."""
    try:
        from IPython import display, get_ipython
    except ImportError:
        return None
    return display if get_ipython() is not None else None


class Curve:
    """Values over steps, drawn anew every ``every`` steps in a notebook.

    Args:
        label: of the values.
        every: steps from one drawing to the next.
    """

    def __init__(self, label: str, every: int = 25) -> None:
        self.label, self.every = label, every
        self.steps: list[int] = []
        self.values: list[float] = []
        self._shown: Any = None

    def add(self, step: int, value: float) -> None:
        """One more point."""
        self.steps.append(step)
        self.values.append(value)
        if step % self.every == 0:
            self.show()

    def figure(self) -> Figure:
        """What is there so far."""
        figure = Figure(figsize=(6, 2.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(self.steps, self.values)
        axes.set(xlabel="step", ylabel=self.label)
        return figure

    def show(self) -> None:
        """Draw, in the place of what was drawn before."""
        display = _display()
        if display is None:
            return
        if self._shown is None:
            self._shown = display.display(self.figure(), display_id=True)
        else:
            self._shown.update(self.figure())


def show_page(page: str, height: int = 700) -> None:
    """A page of ``docs`` inside a notebook; outside, its path.

    Args:
        page: path below ``docs``.
        height: in pixels.
    """
    path = Path(__file__).parents[1] / page
    display = _display()
    if display is None:
        print(path.relative_to(path.parents[2]))
    else:
        display.display(display.IFrame(str(path), "100%", height))
