"""Files that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from qsnn_ext.errors import QSNNError


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], error: type[QSNNError]
) -> None:
    """Write a file so that ``path`` is, at every instant, the old file or the whole new one.

    Args:
        path: of the file; its folder must exist.
        write: called with a binary file to write to.
        error: what to raise when the disk is full or the folder cannot be written.

    Raises:
        QSNNError: of the type given; ``path`` is then as it was.
    """
    # Threads and processes that write the same file each need a name of their own.
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with open(scratch, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError as cause:
        raise error(
            f"cannot write {str(path)!r}: {cause}. Make room or name another folder; "
            "a file that was there before is untouched."
        ) from cause
    finally:
        scratch.unlink(missing_ok=True)
