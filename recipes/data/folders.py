"""Images in a folder per class, as fast.ai and Kaggle hand them out; a folder or a zip file.

``train/<class>/*`` and ``test/<class>/*``, in any picture format that Pillow reads. The label is
the rank of the class's name. Folders between split and class (CIFAR-100's superclasses) are passed
over. A zip is read as it lies: nothing is unpacked, so no name in it can lead anywhere.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track

from qsnn_ext.errors import DataError

SPLITS = ("train", "test")
# A picture of some thousand pixels does not need more, whatever its format.
LARGEST = 1 << 20
_IGNORED = {"thumbs.db", "desktop.ini"}


class Source(Protocol):
    """Where files lie: a folder or a zip file."""

    path: Path

    def names(self) -> list[tuple[str, int, float]]:
        """Name below the top, bytes and time of every file; names have forward slashes."""

    def read(self, name: str) -> bytes:
        """The content of a file; never more than is needed to see that it is too large."""

    def close(self) -> None:
        """Let go of it."""


class FolderSource:
    """Files below a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[tuple[str, int, float]]:
        """See :class:`Source`."""
        found = []
        for split in SPLITS:
            for file in (self.path / split).rglob("*"):
                if file.is_file():
                    status = file.stat()
                    name = file.relative_to(self.path).as_posix()
                    found.append((name, status.st_size, status.st_mtime))
        return found

    def read(self, name: str) -> bytes:
        """See :class:`Source`."""
        with open(self.path / name, "rb") as file:
            return file.read(LARGEST + 1)

    def close(self) -> None:
        """Nothing is held."""


class ZipSource:
    """Files in a zip file, below the folder that holds ``train`` and ``test``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive = zipfile.ZipFile(path)
        self._members: dict[str, zipfile.ZipInfo] = {}
        for info in self._archive.infolist():
            where = PurePosixPath(info.filename.replace("\\", "/"))
            if where.is_absolute() or ".." in where.parts:
                raise DataError(
                    f"{path} holds {info.filename!r}, a name that leads outside of it: this is no "
                    "data set, delete it."
                )
            if info.is_dir():
                continue
            split = next((i for i, part in enumerate(where.parts[:2]) if part in SPLITS), None)
            if split is None:
                continue
            name = "/".join(where.parts[split:])
            if name in self._members:
                raise DataError(f"{path} holds {name!r} twice: fetch it again.")
            self._members[name] = info

    def names(self) -> list[tuple[str, int, float]]:
        """See :class:`Source`; the checksum stands for the time."""
        return [(name, info.file_size, info.CRC) for name, info in self._members.items()]

    def read(self, name: str) -> bytes:
        """See :class:`Source`."""
        # The size in the header may lie; reading stops where it is too much.
        with self._archive.open(self._members[name]) as file:
            return file.read(LARGEST + 1)

    def close(self) -> None:
        """Close the file."""
        self._archive.close()


@contextmanager
def opened(path: Path) -> Iterator[Source]:
    """The files of a folder or zip file.

    Raises:
        DataError: It cannot be read or is no sound zip file.

    """
    try:
        source: Source = ZipSource(path) if path.is_file() else FolderSource(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"{path} is damaged ({error}): delete it and fetch it again.") from error
    try:
        yield source
    finally:
        source.close()


@dataclass(frozen=True)
class Listing:
    """The pictures of one split.

    Attributes:
        names: Of the files, the classes taking turns.
        labels: Rank of each picture's class.
        classes: Names of the classes, sorted.

    """

    names: list[str]
    labels: list[int]
    classes: list[str]


def looks_like(path: Path) -> bool:
    """Whether a path is a folder or zip file with ``train`` and ``test`` in it."""
    if path.is_dir():
        return all((path / split).is_dir() for split in SPLITS)
    return path.suffix == ".zip" and path.is_file()


def listing(source: Source, split: str) -> Listing:
    """Sort the pictures of a split into classes.

    Raises:
        DataError: A file that is no picture, or one without a class.

    """
    formats = set(Image.registered_extensions())
    found: dict[str, list[str]] = {}
    for name, _, _ in source.names():
        where = PurePosixPath(name)
        hidden = any(part.startswith((".", "__MACOSX")) for part in where.parts)
        if where.parts[0] != split or hidden or where.name.lower() in _IGNORED:
            continue
        if len(where.parts) < 3:
            raise DataError(
                f"{source.path}: {name} lies beside the classes' folders; it must be in one, or "
                "not there."
            )
        if where.suffix.lower() not in formats:
            raise DataError(f"{source.path}: {name} is not a picture: take it away.")
        found.setdefault(where.parts[-2], []).append(name)
    classes = sorted(found)
    # Class by class in turn, so that any beginning of the list has all of them alike.
    places = [
        (place, rank, name)
        for rank, c in enumerate(classes)
        for place, name in enumerate(sorted(found[c]))
    ]
    places.sort()
    names, labels = [name for _, _, name in places], [rank for _, rank, _ in places]
    return Listing(names, labels, classes)


def decode(
    source: Source, name: str, size: tuple[int, int], mode: str = "RGB"
) -> NDArray[np.uint8]:
    """One picture as uint8 [H, W, 3] (``RGB``) or [H, W] (``L``).

    Args:
        source: Where it lies.
        name: Which.
        size: Height and width it must have; a larger one is refused before it is decoded.
        mode: Pillow's name of the pixel format.

    Raises:
        DataError: It is damaged, or of another size.

    """
    try:
        data = source.read(name)
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise DataError(
            f"{source.path}: {name} cannot be read ({error}): fetch the data set again."
        ) from error
    return decode_bytes(data, f"{source.path}: {name}", size, mode)


def decode_bytes(
    data: bytes, what: str, size: tuple[int, int], mode: str = "RGB"
) -> NDArray[np.uint8]:
    """:func:`decode` for the bytes of a picture file.

    Args:
        data: The file's content.
        what: How to name it in an error.
        size: Height and width it must have.
        mode: Pillow's name of the pixel format.

    """
    if len(data) > LARGEST:
        raise DataError(f"{what} has more than {LARGEST:,} bytes: not a picture of this data set.")
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if (picture.height, picture.width) != size:
                raise DataError(
                    f"{what} has {picture.width}x{picture.height} pixels, expected "
                    f"{size[1]}x{size[0]}."
                )
            return np.asarray(picture.convert(mode))
    except DataError:
        raise
    except Exception as error:  # every decoder has its own
        raise DataError(f"{what} is damaged ({error}): fetch the data set again.") from error


def read_split(
    source: Source, found: Listing, split: str, size: tuple[int, int]
) -> NDArray[np.uint8]:
    """All pictures of a split, decoded: uint8 [N, H, W, 3]."""
    images = np.empty((len(found.names), *size, 3), np.uint8)
    told = f"Decoding {source.path.name} ({split})"
    for i, name in enumerate(track(found.names, told, transient=True)):
        images[i] = decode(source, name, size)
    return images
