"""N-MNIST: handwritten digits before an event camera that moves in three saccades (Orchard, 2015).

``NMNIST/{Train,Test}/<digit>/<index>.bin``, the official layout, as tonic unpacks it, complete or a
subset. An event has five bytes: column, row, and 24 bits of polarity and time in microseconds, high
bytes first.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from qsnn_ext.errors import DataError
from recipes.data import arrays
from recipes.data.arrays import Arrays

from .augment import NeuromorphicAugment, Resize
from .events import Events, make_events, to_frames
from .files import Archive, Facts
from .frames import FrameArray

SENSOR = (34, 34)
_CLASSES = 10
_FOLDERS = {"train": "Train", "test": "Test"}
# A row of 240 is no event: the clock of 13 bits has overflowed.
_OVERFLOW, _OVERFLOW_ROW = 1 << 13, 240

NMNIST = Facts(
    "N-MNIST",
    "https://www.garrickorchard.com/datasets/n-mnist",
    (Archive("Train.zip", "20959b8e626244a1b502305a9e6e2031"),
     Archive("Test.zip", "69ca8762b2fe404d9b9bad1103e97832")),
    60_000,
    10_000,
)  # fmt: skip


def load(
    root: Path, facts: Facts, *, steps: int, size: int, augment: bool, cache: Path
) -> tuple[FrameArray, FrameArray]:
    """Return (train, test): event counts, float32 [steps, 2, size, size], and the label 0..9.

    Training frames pass through the augmentation of DVS-CIFAR10 without its mirror, since digits
    are not mirrored in reality, and with the roll scaled to the sensor.

    Raises:
        DataError: The recordings are absent or damaged, or a class is missing.

    """
    folder = next((p for p in (root / "NMNIST", root) if (p / "Train").is_dir()), None)
    if folder is None:
        raise DataError(
            f"{facts.title} was not found in {root}: put the folders Train and Test (from "
            f"{facts.page}) into {root / 'NMNIST'}."
        )
    paths: dict[str, list[tuple[Path, int]]] = {}
    for split, name in _FOLDERS.items():
        paths[split] = _recordings(folder / name, facts)
    stamps = [
        (p.parent.parent.name, p.parent.name, p.name, p.stat().st_size, p.stat().st_mtime_ns)
        for split in _FOLDERS
        for p, _ in paths[split]
    ]
    key = hashlib.sha256(json.dumps([steps, stamps]).encode()).hexdigest()[:12]

    def make() -> Arrays:
        frames, labels = {}, {}
        for split, found in paths.items():
            frames[split] = np.empty((len(found), steps, 2, *SENSOR), np.uint8)
            labels[split] = np.array([label for _, label in found], np.int64)
            told = f"Framing {folder.name} ({split})"
            for i, (path, _) in enumerate(track(found, told, transient=True)):
                frames[split][i] = _frames(path, steps)
        return Arrays(frames, labels)

    made = arrays.cached(cache / f"nmnist-T{steps}-{key}", make)
    counts = {split: len(made.labels[split]) for split in _FOLDERS}
    whole = counts == {"train": facts.train, "test": facts.test}
    told = (
        f"{facts.title}: {folder}; {counts['train']:,} + {counts['test']:,} recordings"
        f"{'' if whole else f', a subset of {facts.train:,} + {facts.test:,}'}"
    )
    roll = max(round(5 * size / 48), 1)
    transform = NeuromorphicAugment(size, flip=False, roll=roll) if augment else Resize(size)
    train = FrameArray(made.images["train"], made.labels["train"].tolist(), transform, told)
    return train, FrameArray(made.images["test"], made.labels["test"].tolist(), Resize(size), told)


def _recordings(folder: Path, facts: Facts) -> list[tuple[Path, int]]:
    """Files and labels of a split, the classes taking turns; every class must be there."""
    found = []
    for label in range(_CLASSES):
        files = sorted((folder / str(label)).glob("*.bin"))
        if not files:
            raise DataError(
                f"{facts.title} is incomplete: {folder / str(label)} has no recordings. Unpack "
                f"{folder.name}.zip (from {facts.page}) into {folder.parent} again."
            )
        found += [(place, label, path) for place, path in enumerate(files)]
    found.sort()
    return [(path, label) for _, label, path in found]


def read(path: Path) -> Events:
    """The events of one recording.

    Raises:
        DataError: The file cannot be read, is empty or cut short.

    """
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    if not len(data) or len(data) % 5:
        raise DataError(
            f"{path} is cut short ({len(data):,} bytes, not a positive multiple of 5): unpack or "
            "fetch it again."
        )
    x, y, high, middle, low = data.reshape(-1, 5).astype(np.int64).T
    overflows = y == _OVERFLOW_ROW
    time = ((high & 0x7F) << 16 | middle << 8 | low) + np.cumsum(overflows) * _OVERFLOW
    kept = ~overflows
    return make_events(x[kept], y[kept], time[kept], (high >> 7)[kept])


def _frames(path: Path, steps: int) -> NDArray[np.uint8]:
    try:
        frames = to_frames(read(path), steps, SENSOR)
    except DataError as error:
        if str(path) in str(error):
            raise
        raise DataError(f"{path}: {error}") from error
    if frames.max() > 255:
        raise DataError(f"{path} has {frames.max():,} events of one pixel in one frame: damaged.")
    return frames.astype(np.uint8)
