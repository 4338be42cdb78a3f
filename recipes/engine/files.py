"""Files a run can rely on: written whole or not at all, checked before training, one owner."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, BinaryIO

from qsnn_ext import files
from qsnn_ext.errors import TrainingError


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """:func:`qsnn_ext.files.write_atomically` for the files of a run.

    Args:
        path: File to make or replace.
        write: Called with the open temporary file.

    Raises:
        TrainingError: The disk is full or the folder cannot be written.

    """

    def told_in_errno(file: BinaryIO) -> None:
        try:
            write(file)
        except RuntimeError as error:
            # torch's zip writer reports a failed write as a RuntimeError of its own.
            if "PytorchStreamWriter" not in str(error):
                raise
            raise OSError(errno.ENOSPC, "the disk is full") from error

    remedy = (
        "Make room or fix the folder, then continue with --resume; the checkpoint before is "
        "untouched."
    )
    files.write_atomically(path, told_in_errno, TrainingError, remedy)


def link_atomically(source: Path, target: Path) -> None:
    """Make ``target`` another name of ``source``, or a copy where links are not possible."""
    temporary = files.beside(target)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
        files.sync_folder(target.parent)
    finally:
        files.discard(temporary)  # a rename onto another link of the same file leaves both


def require_writable(folder: Path) -> None:
    """Make the folder and prove that a file can be written into it.

    Raises:
        TrainingError: It cannot.

    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-") as probe:
            probe.write(b"writable")
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise TrainingError(
            f"The run's folder {folder} cannot be written: {error}. Give another one with --out."
        ) from error


def require_space(folder: Path, needed: int) -> None:
    """Prove that the file system has room for the run's checkpoints.

    Args:
        folder: An existing folder.
        needed: Bytes.

    Raises:
        TrainingError: There is less room than that.

    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise TrainingError(
            f"The checkpoints need about {needed / 1e6:.0f} MB, but {folder} has only "
            f"{free / 1e6:.0f} MB free. Make room or give another folder with --out."
        )


def lock(folder: Path) -> IO[str]:
    """Own the run's folder until the returned file is closed or the process ends in any way.

    What a killed owner left half-written is removed.

    Raises:
        TrainingError: Another run is using it.

    """
    file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (open is the point)
    try:
        # The kernel drops this lock with the process, so a killed run leaves none behind.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise TrainingError(
            f"Another run is using {folder}. Wait for it, or give another folder with --out."
        ) from error
    for half in folder.glob(".*.partial"):
        files.discard(half)
    return file
