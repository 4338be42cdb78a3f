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

from qsnn_ext.errors import TrainingError


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that ``path`` is, at every instant, the old file or the whole new one.

    Args:
        path: File to make or replace.
        write: Called with the open temporary file.

    Raises:
        TrainingError: The disk is full or the folder cannot be written.

    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        # torch's zip writer reports a failed write as a RuntimeError of its own.
        full = getattr(error, "errno", None) == errno.ENOSPC or "PytorchStreamWriter" in str(error)
        if isinstance(error, OSError) or full:
            reason = "the disk is full" if full else str(error)
            raise TrainingError(
                f"Could not write {path}: {reason}. Make room or fix the folder, then continue "
                "with --resume; the checkpoint before is untouched."
            ) from error
        raise


def link_atomically(source: Path, target: Path) -> None:
    """Make ``target`` another name of ``source``, or a copy where links are not possible."""
    temporary = target.with_name(f".{target.name}.partial")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
    _sync_folder(target.parent)


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
    return file


def _sync_folder(folder: Path) -> None:
    # A rename is only durable once the folder that holds the name is.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
