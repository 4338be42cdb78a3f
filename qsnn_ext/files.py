"""Files that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from qsnn_ext.errors import InputTypeError, QSNNError

#: How a zip archive begins, and so what ``torch.save`` writes.
ZIP = b"PK\x03\x04"


def check_path(given: object, what: str, remedy: str = "") -> None:
    """Refuse what names no file.

    Args:
        given: What somebody passed.
        what: Who needs a path, for the message.
        remedy: What to do instead, behind a semicolon.

    Raises:
        InputTypeError: It is no path.
    """
    if not isinstance(given, str | os.PathLike):
        raise InputTypeError(f"{what} needs a path, got {type(given).__name__}{remedy}.")


def write_atomically(
    path: Path,
    write: Callable[[BinaryIO], object],
    error: type[QSNNError],
    remedy: str = "Make room or name another folder; a file that was there before is untouched.",
) -> None:
    """Write a file so that ``path`` is, at every instant, the old file or the whole new one.

    Args:
        path: of the file; its folder must exist.
        write: called with a binary file to write to.
        error: what to raise when the disk is full or the folder cannot be written.
        remedy: the last sentence of that error.

    Raises:
        QSNNError: of the type given; ``path`` is then as it was.
    """
    scratch = beside(path)
    try:
        with open(scratch, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
        sync_folder(path.parent)
    except OSError as cause:
        raise error(f"{path} could not be written: {cause}. {remedy}") from cause
    finally:
        discard(scratch)


def beside(path: Path) -> Path:
    """A hidden name in the same folder that no other thread, process or machine uses."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")


def discard(path: Path) -> None:
    """Remove a file if it is there; a failure must not hide the error that led here."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable, which it is only once the folder itself is on disk."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
