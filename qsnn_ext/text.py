"""Text that may come from a file, made fit to be shown."""

from __future__ import annotations


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
