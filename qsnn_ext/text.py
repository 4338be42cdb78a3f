"""Text made fit to be shown: what may come from a file, and the one table printer."""

from __future__ import annotations

import html
from collections.abc import Sequence


def printable(text: str, keep: str = "", most: int = 200) -> str:
    r"""``text`` with everything invisible spelled out and of bounded length.

    Names in files and metadata are chosen by whoever wrote the file. Shown as they are, escape
    sequences would command the terminal, line breaks forge lines of a log, marks of writing
    direction reorder what is read, and halves of surrogate pairs could not be printed at all.

    Args:
        text: Any string.
        keep: Characters that are left alone although they are invisible, such as a line break.
        most: Characters after which the text is cut off.

    Returns:
        The same text where all of it is printable; otherwise with ``\x1b``, ``\u202e`` and their
        like in the place of what is not.
    """
    if len(text) > most:
        text = text[: most - 3] + "..."
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def table(
    header: Sequence[str], rows: Sequence[Sequence[object]], right: Sequence[int] = ()
) -> list[str]:
    """Lines of a table: header, rule, rows.

    Args:
        header: titles of the columns.
        rows: a cell for each column.
        right: numbers of the columns that are aligned to the right.
    """
    cells = [[printable(str(cell), most=1000) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return [line(header), line(["-" * width for width in widths]), *map(line, cells)]


def columns(header: Sequence[str], rows: Sequence[Sequence[object]], left: int = 2) -> str:
    """A table whose first ``left`` columns are names and whose others are numbers."""
    return "\n".join(table(header, rows, right=range(left, len(header))))


def html_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The same as an HTML table; nothing in a cell is taken for markup."""

    def line(row: Sequence[object], tag: str) -> str:
        cells = "".join(
            f"<{tag}>{html.escape(printable(str(cell), most=1000))}</{tag}>" for cell in row
        )
        return f"<tr>{cells}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(header, 'th')}</thead><tbody>{body}</tbody></table>"


def count(number: float) -> str:
    """A number of things in three digits: 12.6 M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"
