"""Fashion-MNIST from its IDX files, as torchvision and Debian have them.

``train-images-idx3-ubyte`` and the other three, plain or as ``.gz``, in the data directory, in
``FashionMNIST/raw`` below it (torchvision) or in ``fashion-mnist``; the files of Debian's package
``dataset-fashion-mnist`` are found where it installs them.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torchvision import datasets

from qsnn_ext.errors import DataError
from recipes.data import arrays
from recipes.data.arrays import Arrays, Expected
from recipes.data.batches import BatchTransform, ImageArray

from .files import Archive, Facts, obtain

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_SIZE = (28, 28)
_CLASSES = 10
_MEAN, _STD = (0.2860,), (0.3530,)
_PARTS = {"train": "train", "test": "t10k"}

FASHIONMNIST = Facts(
    "Fashion-MNIST",
    "https://github.com/zalandoresearch/fashion-mnist",
    tuple(
        Archive(name, md5, f"{datasets.FashionMNIST.mirrors[0]}{name}")
        for name, md5 in datasets.FashionMNIST.resources
    ),
    60_000,
    10_000,
    mean=(72.9404,),
)


def load(
    root: Path, facts: Facts, *, augment: bool, download: bool, debian: Path = DEBIAN
) -> tuple[ImageArray, ImageArray]:
    """Return (train, test): float32 [1, 28, 28] and the label.

    Training images pass through crop(28, padding 2), horizontal flip and normalisation.

    Raises:
        DataError: The files are absent and cannot be downloaded, incomplete or damaged.

    """
    places = (root / "FashionMNIST" / "raw", root / "fashion-mnist", root, debian)
    place = next((p for p in places if _present(p, facts)), None)
    if place is None:
        for archive in facts.archives:
            obtain(archive, facts, root, ("FashionMNIST/raw",), download)
        place = places[0]
    images, labels = {}, {}
    for split, count in (("train", facts.train), ("test", facts.test)):
        stem = _PARTS[split]
        images[split] = _read(place, f"{stem}-images-idx3-ubyte", (count, *_SIZE))[..., None]
        labels[split] = _read(place, f"{stem}-labels-idx1-ubyte", (count,)).astype(np.int64)
    counts = {"train": facts.train, "test": facts.test}
    expected = Expected(facts.title, counts, _CLASSES, facts.mean)
    told = arrays.check(Arrays(images, labels), expected, f"IDX files in {place}")
    plain = BatchTransform(_MEAN, _STD)
    augmented = BatchTransform(_MEAN, _STD, padding=2, flip=True) if augment else plain
    return (
        ImageArray(images["train"], labels["train"], augmented, told),
        ImageArray(images["test"], labels["test"], plain, told),
    )


def _present(place: Path, facts: Facts) -> bool:
    """Whether any of the files is there: then all must be."""
    names = [archive.name for archive in facts.archives]
    return any((place / n).is_file() or (place / n[:-3]).is_file() for n in names)


def _read(place: Path, name: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """An IDX file of unsigned bytes: two zeros, type 8, number of dimensions, sizes, values."""
    size = 4 + 4 * len(shape) + math.prod(shape)
    plain, packed = place / name, place / f"{name}.gz"
    path = plain if plain.is_file() else packed
    if not path.is_file():
        raise DataError(
            f"Fashion-MNIST in {place} is incomplete: {packed.name} is missing. Put it there."
        )
    try:
        with open(path, "rb") if path == plain else gzip.open(path, "rb") as file:
            data = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}): fetch it again.") from error
    header = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)
    if not data.startswith(header):
        raise DataError(
            f"{path} is not an IDX file of {' x '.join(map(str, shape))} bytes: it is damaged or "
            "of another data set."
        )
    if len(data) != size:
        much = "more" if len(data) > size else "fewer"
        raise DataError(f"{path} has {much} bytes than its header says: fetch it again.")
    return np.frombuffer(data, np.uint8, offset=len(header)).reshape(shape)
