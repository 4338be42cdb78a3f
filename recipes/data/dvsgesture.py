"""DVS-Gesture: 11 gestures before a 128x128 event camera, 1,176 training and 288 test samples.

The archive holds one recording per person and light, a table of the gestures in it, and two lists
that divide the recordings. The samples are cut as SpikingJelly cuts them, which gives the 1176/288
of the paper; tonic ships another cut of the recordings with 1077/264 samples.
"""

from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qsnn_ext.errors import DataError

from .aedat import read_aedat3
from .augment import GestureAugment, Resize
from .events import Events
from .files import Archive, Facts, find, obtain, unpack
from .frames import FrameFiles, Recording, cached_frames

_FOLDERS = ("", "download", "DVS128Gesture", "DVS128Gesture/download")
_CLASSES = 11
SENSOR = (128, 128)

DVSGESTURE = Facts(
    "DVS-Gesture",
    "https://ibm.ent.box.com/s/3hiq58ww1pbbjrinh367ykfdf60xsfm8/folder/50167556794",
    (Archive("DvsGesture.tar.gz", "8a5c71fb11e24e5ca5b11866ca6c00a1"),),
    1176,
    288,
)


def load(
    root: Path,
    facts: Facts,
    *,
    steps: int,
    size: int,
    augment: bool,
    download: bool,
    cache: Path,
) -> tuple[FrameFiles, FrameFiles]:
    """Return (train, test): event counts, float32 [steps, 2, size, size], and the label 0..10.

    Raises:
        DataError: The data is absent, incomplete or damaged.

    """
    folder = find(root, "DvsGesture", _FOLDERS)
    if folder is None:
        folder = root / "DvsGesture"
        unpack(obtain(facts.archives[0], facts, root, _FOLDERS, download), folder)
    recordings = [r for s in ("train", "test") for r in _recordings(folder, s, facts)]
    for split, expected in (("train", facts.train), ("test", facts.test)):
        found = sum(len(r.labels) for r in recordings if r.split == split)
        if found != expected:
            problem = f"its tables list {found:,} {split} samples, expected {expected:,}"
            raise _incomplete(folder, facts, problem)

    samples = cached_frames("dvsgesture", recordings, steps, SENSOR, cache)
    train = FrameFiles(*samples["train"], GestureAugment(size) if augment else Resize(size))
    return train, FrameFiles(*samples["test"], Resize(size))


def _incomplete(folder: Path, facts: Facts, problem: str) -> DataError:
    return DataError(
        f"{facts.title} is incomplete: {problem}. Delete {folder} and put "
        f"{facts.archives[0].name} beside it (from {facts.page}); it is unpacked again."
    )


def _recordings(folder: Path, split: str, facts: Facts) -> list[Recording]:
    """Return the recordings of a split, having checked that all files are there."""
    trials = folder / f"trials_to_{split}.txt"
    if not trials.is_file():
        raise _incomplete(folder, facts, f"{trials} is missing")
    recordings = []
    for name in trials.read_text(errors="replace").split():
        path = folder / name
        table = path.with_name(f"{path.stem}_labels.csv")
        if path.parent != folder or not path.is_file():
            raise _incomplete(folder, facts, f"{trials.name} lists {name}, which is missing")
        if not table.is_file():
            raise _incomplete(folder, facts, f"{table} is missing")
        rows = _gestures(table)
        labels = tuple(int(row[0]) - 1 for row in rows)
        cut = tuple(map(tuple, rows.tolist()))
        recordings.append(Recording(path, split, labels, partial(_cut, path, rows), cut))
    return recordings


def _gestures(table: Path) -> NDArray[np.int64]:
    """Read rows of class (1..11), start and end in microseconds."""
    try:
        rows = np.loadtxt(table, np.int64, delimiter=",", skiprows=1, ndmin=2)
    except ValueError as error:
        raise DataError(f"{table} is damaged: {error}.") from error
    good = rows.size > 0 and rows.shape[1] == 3
    if not good or not ((rows[:, 0] >= 1) & (rows[:, 0] <= _CLASSES)).all():
        raise DataError(f"{table} is damaged: expected rows of class 1..{_CLASSES}, start, end.")
    return rows


def _cut(path: Path, rows: NDArray[np.int64]) -> list[Events]:
    """Cut the gestures out of a recording; some intervals of the data set overlap a little."""
    events, whole = read_aedat3(path)
    last = int(events["t"].max()) if len(events) else 0
    if not whole and last < rows[:, 2].max():
        raise DataError(
            f"{path} is cut short at {last / 1e6:.1f} s, before its last gesture ends at "
            f"{rows[:, 2].max() / 1e6:.1f} s: unpack or fetch it again."
        )
    samples = [events[(events["t"] >= start) & (events["t"] < end)] for _, start, end in rows]
    for sample, (label, start, end) in zip(samples, rows, strict=True):
        if len(sample) == 0:
            raise DataError(
                f"{path} has no events of gesture {label} between {start} and {end} us: it is cut "
                f"short, unpack or fetch it again."
            )
    return samples
