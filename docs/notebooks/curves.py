"""A curve that grows while a notebook trains, and the demo page inside one; silent elsewhere."""

from __future__ import annotations

import html
import io
import re
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
        content = io.BytesIO()
        self.figure().savefig(content, format="png")
        picture = display.Image(data=content.getvalue())
        if self._shown is None:
            self._shown = display.display(picture, display_id=True)
        else:
            self._shown.update(picture)


def show_page(page: str, height: int = 900) -> None:
    """A page of ``docs`` inside a notebook; outside, or where the page is not built, its path.

    Args:
        page: path below ``docs``.
        height: in pixels.
    """
    path = Path(__file__).parents[1] / page
    display = _display()
    if display is None:
        print(path.relative_to(path.parents[2]))
        return
    try:
        text = html.escape(in_one_file(path))
    except FileNotFoundError as error:
        print(f"{path}: {Path(error.filename).name} is not there; run python docs/demo/build.py")
        return
    # A notebook's server gives no files by their paths, so the frame holds the page itself. The
    # div keeps IPython from advising its IFrame, which takes addresses only.
    style = f"width: 100%; height: {height}px; border: 0"
    display.display(display.HTML(f'<div><iframe srcdoc="{text}" style="{style}"></iframe></div>'))


def in_one_file(page: Path) -> str:
    """The page with the scripts and style sheets beside it written into it."""

    def style(match: re.Match[str]) -> str:
        return f"<style>{(page.parent / match[1]).read_text(encoding='utf-8')}</style>"

    def script(match: re.Match[str]) -> str:
        code = (page.parent / match[1]).read_text(encoding="utf-8")
        return "<script>" + code.replace("</script", r"<\/script") + "</script>"

    text = page.read_text(encoding="utf-8")
    text = re.sub(r'<link rel="stylesheet" href="([\w.-]+)">', style, text)
    return re.sub(r'<script src="([\w.-]+)"></script>', script, text)
