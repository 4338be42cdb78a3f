"""Progress on a terminal, by rich where it is installed; silence everywhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any


@contextmanager
def tracking(items: Iterable[Any], what: str) -> Iterator[Iterable[Any]]:
    """A bar that moves with every item; gone when the block is left, whatever happens in it.

    Nothing is shown unless standard error is a terminal, rich is installed and no other live
    display (a trainer's) is on. The items are the same either way, one at a time.

    Args:
        items: what is gone through.
        what: a word for it.

    Yields:
        The items.
    """
    bar = _bar()
    if bar is None:
        yield items
        return
    total = len(items) if isinstance(items, Sized) else None
    task = bar.add_task(what, total=total)

    def counted() -> Iterator[Any]:
        for item in items:
            yield item
            bar.advance(task)

    try:
        yield counted()
    finally:
        bar.stop()


@contextmanager
def working(what: str) -> Iterator[None]:
    """The same for something of which nobody knows how long it takes."""
    with tracking((), what):
        yield


def _bar() -> Any:
    """A started bar, or ``None`` where it has no place."""
    try:
        if not sys.stderr.isatty():
            return None
        from rich.console import Console
        from rich.errors import LiveError
        from rich.progress import Progress, TimeElapsedColumn
    except (ImportError, AttributeError, ValueError):  # no rich, or no standard error
        return None
    console = Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        return None
    bar = Progress(
        *Progress.get_default_columns(), TimeElapsedColumn(), console=console, transient=True,
        redirect_stdout=False, redirect_stderr=False,
    )  # fmt: skip
    try:
        bar.start()
    except LiveError:
        return None
    return bar
