"""Data sets as arrays: decoded once, kept in a cache, checked against what is published."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsnn_ext.errors import DataError
from recipes.data.files import hidden_folder, write_atomically

_VERSION = 2
# A published mean is met to this much (of 255): lossy pictures come near, other pictures do not.
_TOLERANCE = 1.0
_EXACT = 1e-3
_SPLIT = {"train": "training", "test": "test"}


@dataclass(frozen=True)
class Arrays:
    """A data set, decoded.

    Attributes:
        images: By split, uint8 [N, H, W, C].
        labels: By split, int64 [N].
        classes: Names of the classes, if the source tells them.

    """

    images: Mapping[str, NDArray[np.uint8]]
    labels: Mapping[str, NDArray[np.int64]]
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Expected:
    """What is published about a data set of images.

    Attributes:
        title: Its name in messages.
        counts: Number of images by split.
        classes: Number of classes.
        mean: Mean of the training pixels by channel, 0 to 255; none is not checked.
        balanced: Whether every class has equally many images.

    """

    title: str
    counts: Mapping[str, int]
    classes: int
    mean: tuple[float, ...] | None = None
    balanced: bool = True


def check(arrays: Arrays, expected: Expected, source: str) -> str:
    """Compare what was found with what is published.

    Args:
        arrays: What was found.
        expected: What is published.
        source: Where it was found, for messages.

    Returns:
        What was found, in one line.

    Raises:
        DataError: Counts, balance or the mean of the pixels are others.

    """
    title = expected.title
    for split, count in expected.counts.items():
        labels = arrays.labels[split]
        if len(labels) != count:
            raise DataError(
                f"{source} has {len(labels):,} {_SPLIT[split]} images instead of the expected "
                f"{count:,}: it is incomplete or another data set than {title}."
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < expected.classes:
            raise DataError(
                f"{source} has {_SPLIT[split]} labels outside 0..{expected.classes - 1}, "
                f"but {title} has {expected.classes} classes."
            )
        per_class = np.bincount(labels, minlength=expected.classes)
        wanted = count // expected.classes
        if expected.balanced and not (per_class == wanted).all():
            worst = int(np.abs(per_class - wanted).argmax())
            name = f" ({arrays.classes[worst]})" if worst < len(arrays.classes) else ""
            raise DataError(
                f"{source} has {per_class[worst]:,} {_SPLIT[split]} images of class "
                f"{worst}{name}, but {title} has {wanted:,} of each."
            )
    train = arrays.images["train"]
    mean = channel_means(train)
    told = ", ".join(f"{m:.4f}" for m in mean)
    note = ""
    if expected.mean is not None:
        distance = float(np.abs(mean - np.array(expected.mean)).max())
        if distance > _TOLERANCE:
            published = ", ".join(f"{m:.4f}" for m in expected.mean)
            raise DataError(
                f"{source}: the mean of the training pixels is ({told}), that of {title} is "
                f"({published}): these are other pictures, or their colours are exchanged."
            )
        exact = distance < _EXACT
        note = " as published" if exact else f", up to {distance:.2f} from the published"
    counts = " + ".join(f"{len(arrays.labels[split]):,}" for split in expected.counts)
    height, width = train.shape[1:3]
    return (
        f"{title}: {source}; {counts} images of {width}x{height}, {expected.classes} classes, "
        f"mean of the training pixels ({told}){note}"
    )


def channel_means(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean of each channel over all images [N, H, W, C], summed in integers block by block."""
    total = np.zeros(images.shape[-1], np.int64)
    for start in range(0, len(images), 4096):
        total += images[start : start + 4096].sum((0, 1, 2), dtype=np.int64)
    return total / (images[..., 0].size or 1)


def cached(folder: Path, make: Callable[[], Arrays]) -> Arrays:
    """Arrays from a cache folder, made and kept there on the first call.

    Args:
        folder: Its name tells what the content depends on.
        make: Decodes the data set.

    Raises:
        DataError: The data set cannot be read, or the cache cannot be written.

    """
    found = _read(folder)
    if found is None:
        if folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
        _write(folder, make())
        found = _read(folder)
        if found is None:
            raise DataError(f"{folder} cannot be read back: delete it, or name another cache.")
    return found


def _write(folder: Path, arrays: Arrays) -> None:
    about: dict[str, Any] = {"version": _VERSION, "classes": list(arrays.classes), "splits": {}}
    try:
        with hidden_folder(folder) as hidden:
            for split, images in arrays.images.items():
                write_atomically(hidden / f"{split}.npy", partial(_save, array=images))
                labels = arrays.labels[split]
                write_atomically(hidden / f"{split}-labels.npy", partial(_save, array=labels))
                about["splits"][split] = {
                    "images": list(images.shape),
                    "checksums": [_checksum(images), _checksum(labels)],
                }
            text = json.dumps(about, indent=1)
            write_atomically(hidden / "about.json", lambda file: file.write(text.encode()))
            try:
                hidden.rename(folder)
            except OSError:
                # Another process was faster? Then its folder is as whole as this one.
                if not folder.is_dir():
                    raise
    except OSError as error:
        raise DataError(f"{folder} could not be written: {error}. Name another cache.") from error


def _save(file: Any, array: NDArray[Any]) -> None:
    np.save(file, array, allow_pickle=False)


def _read(folder: Path) -> Arrays | None:
    """What the cache holds; none where it is absent or damaged: then it is made again."""
    try:
        about = json.loads((folder / "about.json").read_text())
        if about["version"] != _VERSION:
            return None
        images, labels = {}, {}
        for split, entry in about["splits"].items():
            images[split] = np.load(folder / f"{split}.npy", mmap_mode="r", allow_pickle=False)
            labels[split] = np.load(folder / f"{split}-labels.npy", allow_pickle=False)
            whole = list(images[split].shape) == entry["images"]
            sums = [_checksum(images[split]), _checksum(labels[split])]
            if not whole or sums != entry["checksums"]:
                return None
        return Arrays(images, labels, tuple(about["classes"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _checksum(array: NDArray[Any]) -> int:
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).reshape(-1))  # type: ignore[arg-type]
