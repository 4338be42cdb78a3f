"""Files of a data set: found, fetched, verified and unpacked, or a clear ``DataError``.

Three rules keep a damaged data set from being trained on. An archive is used only when its MD5 is
the published one. Unpacking happens in a hidden folder beside the goal, which is renamed into place
at the end, so a folder that exists was unpacked whole. A file is written under another name and
moved into place, so a file that exists was written whole.
"""

import hashlib
import shutil
import socket
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.error import URLError

from torchvision.datasets.utils import download_url

from qsnn_ext import files
from qsnn_ext.errors import DataError
from qsnn_ext.files import beside, discard

_REMEDY = "Free some space or name another cache."
_A_DAY = 24 * 3600
_DAMAGED = (tarfile.ReadError, zipfile.BadZipFile, zlib.error, EOFError)


@dataclass(frozen=True)
class Archive:
    """One file to fetch: its name, MD5, and a direct link (None: only a person can fetch it)."""

    name: str
    md5: str
    url: str | None = None


@dataclass(frozen=True)
class Facts:
    """What is published about a data set, against which the files found are checked.

    Attributes:
        title: The name in messages.
        page: Where a person finds the archives.
        archives: The archives.
        train: Number of training samples.
        test: Number of test samples.
        members: MD5 of the unpacked files, where the format needs it (CIFAR's pickles).
        mean: Mean of the training pixels by channel, 0 to 255; none is not checked.

    """

    title: str
    page: str
    archives: tuple[Archive, ...]
    train: int
    test: int
    members: Mapping[str, str] = field(default_factory=dict)
    mean: tuple[float, ...] | None = None


def md5_of(path: Path) -> str:
    """Return the MD5 of a file as 32 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def find(root: Path, name: str, folders: Iterable[str]) -> Path | None:
    """Return the first of ``root/folder/name`` that exists, or None."""
    return next((p for f in folders if (p := root / f / name).exists()), None)


def obtain(archive: Archive, facts: Facts, root: Path, folders: Iterable[str], fetch: bool) -> Path:
    """Return the path of a verified archive, downloading it when that is possible and allowed.

    Args:
        archive: The archive wanted.
        facts: The data set it belongs to.
        root: The data directory.
        folders: Folders below ``root`` where it may lie; a download goes into the first.
        fetch: Whether a download may be tried.

    Raises:
        DataError: It is damaged, or absent and cannot be downloaded.

    """
    folders = tuple(folders)
    path = find(root, archive.name, folders)
    if path is None:
        path = root / folders[0] / archive.name
        if not fetch or archive.url is None:
            why = "downloading is off" if archive.url else "it has no direct download link"
            raise _absent(archive, facts, root, why)
        _download(archive, facts, path, root)
    elif (found := md5_of(path)) != archive.md5:
        raise DataError(
            f"{path} is incomplete or damaged ({path.stat().st_size:,} bytes, MD5 {found}, "
            f"expected {archive.md5}), perhaps by an interrupted download: delete it and fetch it "
            f"again from {facts.page}."
        )
    return path


def _absent(archive: Archive, facts: Facts, root: Path, why: str) -> DataError:
    return DataError(
        f"{facts.title} was not found in {root} and {why}: get {archive.name} from {facts.page} "
        f"and put it into {root}."
    )


def _download(archive: Archive, facts: Facts, path: Path, root: Path) -> None:
    # A download cut short must not leave a file under the archive's own name.
    partial = beside(path)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # a firewall that drops packets would otherwise hang for minutes
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        download_url(str(archive.url), str(partial.parent), partial.name, archive.md5)
        partial.replace(path)
    except (URLError, HTTPException, OSError, RuntimeError) as error:
        raise _absent(archive, facts, root, f"could not be downloaded ({error})") from error
    finally:
        socket.setdefaulttimeout(timeout)
        discard(partial)


@contextmanager
def hidden_folder(goal: Path) -> Iterator[Path]:
    """A folder beside ``goal``, removed in the end; one that a killed process left goes as well."""
    for old in goal.parent.glob(f".{goal.name}.*.partial"):
        with suppress(OSError):  # another process may have cleared it
            if time.time() - old.stat().st_mtime > _A_DAY:
                shutil.rmtree(old, ignore_errors=True)
    folder = beside(goal)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_member(name: str, archive: Path) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or any(":" in part for part in path.parts[:1]):
        raise DataError(
            f"{archive} holds {name!r}, which would be written outside the data directory: this is "
            f"not the official archive, delete it."
        )


def _unpack_tar(path: Path, folder: Path) -> None:
    with tarfile.open(path, "r:gz") as tar:
        members = tar.getmembers()
        for member in members:
            _check_member(member.name, path)
            if not (member.isfile() or member.isdir()):
                raise DataError(
                    f"{path} holds {member.name!r}, which is neither a file nor a folder: this is "
                    f"not the official archive, delete it."
                )
        # Python 3.11.0 to 3.11.3 have no filters; the checks above stand alone there.
        if hasattr(tarfile, "data_filter"):
            tar.extraction_filter = tarfile.data_filter
        tar.extractall(folder, members=members)


def _unpack_zip(path: Path, folder: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            _check_member(member, path)
        archive.extractall(folder)


def unpack(path: Path, goal: Path, top: str | None = None) -> None:
    """Unpack a ``.zip`` or ``.tar.gz`` so that its folder ``top`` becomes ``goal``, whole or not.

    Args:
        path: The archive.
        goal: The folder to make; it must not exist.
        top: The folder inside the archive that becomes ``goal`` (default: the name of ``goal``).

    Raises:
        DataError: The archive is damaged, holds no such folder or an unsafe name, or the disk
            cannot take it.

    """
    unpacker = _unpack_zip if path.suffix == ".zip" else _unpack_tar
    try:
        with hidden_folder(goal) as folder:
            unpacker(path, folder)
            inside = folder / (top or goal.name)
            if not inside.is_dir():
                raise DataError(
                    f"{path} holds no folder {inside.name!r}: this is not the official archive."
                )
            try:
                inside.rename(goal)
            except OSError:
                # Another process was faster? Then its folder is as whole as this one.
                if not goal.is_dir():
                    raise
    except _DAMAGED as error:
        raise DataError(f"{path} is damaged ({error}): delete it and fetch it again.") from error
    except OSError as error:
        raise DataError(f"{path} could not be unpacked to {goal}: {error}.") from error


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that it is there whole or not at all, even if the process is killed.

    Args:
        path: The file.
        write: Given a binary file to write to.

    Raises:
        DataError: It could not be written (disk full, no permission).

    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path} could not be written: {error}. {_REMEDY}") from error
    files.write_atomically(path, write, DataError, _REMEDY)
