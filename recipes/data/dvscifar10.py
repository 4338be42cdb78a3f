"""DVS-CIFAR10 (CIFAR10-DVS): 10,000 pictures of CIFAR-10 moved before a 128x128 event camera.

The data set has no split of its own. The default here is the one most later work uses: of each
class the samples 0-99 are for testing and 100-999 for training (first in TEBN, 2022; SpikingJelly's
``CIFAR10DVSTEBNSplit``). Accuracy on it is known to be higher than on a random split, so compare
only like with like; "last" and "random" are there for that.
"""

from functools import partial
from pathlib import Path

import numpy as np

from qsnn_ext.errors import ConfigError, DataError

from .aedat import read_aedat2
from .augment import NeuromorphicAugment, Resize
from .events import Events
from .files import Archive, Facts, find, obtain, unpack
from .frames import FrameFiles, Recording, cached_frames

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
SPLITS = ("tebn", "last", "random")
SENSOR = (128, 128)
_FOLDERS = ("CIFAR10DVS", "", "download", "CIFAR10DVS/download", "CIFAR10DVS/extract", "extract")

_FIGSHARE = {
    "airplane": ("0afd5c4bf9ae06af762a77b180354fdd", 7712788),
    "automobile": ("8438dfeba3bc970c94962d995b1b9bdd", 7712791),
    "bird": ("a9c207c91c55b9dc2002dc21c684d785", 7712794),
    "cat": ("52c63c677c2b15fa5146a8daf4d56687", 7712812),
    "deer": ("b6bf21f6c04d21ba4e23fc3e36c8a4a3", 7712815),
    "dog": ("f379ebdf6703d16e0a690782e62639c3", 7712818),
    "frog": ("cad6ed91214b1c7388a5f6ee56d08803", 7712842),
    "horse": ("e7cbbf77bec584ffbf913f00e682782a", 7712851),
    "ship": ("41c7bd7d6b251be82557c6cce9a7d5c9", 7712836),
    "truck": ("89f3922fd147d9aeff89e76a2b0b70a7", 7712839),
}
DVSCIFAR10 = Facts(
    "DVS-CIFAR10",
    "https://figshare.com/articles/dataset/CIFAR10-DVS_New/4724671",
    tuple(
        Archive(f"{name}.zip", md5, f"https://ndownloader.figshare.com/files/{number}")
        for name, (md5, number) in _FIGSHARE.items()
    ),
    9000,
    1000,
)


def load(
    root: Path,
    facts: Facts,
    *,
    steps: int,
    size: int,
    split: str,
    seed: int,
    augment: bool,
    download: bool,
    cache: Path,
) -> tuple[FrameFiles, FrameFiles]:
    """Return (train, test): event counts, float32 [steps, 2, size, size], and the label 0..9.

    Args:
        root: The data directory.
        facts: What is expected there.
        steps: Number of frames T, of equally many events.
        size: Height and width of the frames.
        split: "tebn" (the first tenth of each class is the test set), "last" (the last tenth) or
            "random" (a tenth of each class drawn with ``seed``).
        seed: Of the random split.
        augment: Whether training frames pass through :class:`NeuromorphicAugment`.
        download: Whether missing archives may be fetched.
        cache: Directory for the frames.

    Raises:
        ConfigError: Unknown split.
        DataError: The data is absent, incomplete or damaged.

    """
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r} of DVS-CIFAR10: use {', '.join(SPLITS)}.")
    total = (facts.train + facts.test) // len(CLASSES)
    tests = facts.test // len(CLASSES)
    rng = np.random.default_rng(seed)
    recordings: list[Recording] = []
    for label, (name, archive) in enumerate(zip(CLASSES, facts.archives, strict=True)):
        paths = _class_files(name, archive, facts, root, total, download)
        shuffled = rng.permutation(total)
        order = {"tebn": range(total), "last": range(total)[::-1], "random": shuffled.tolist()}
        test = set(order[split][:tests])
        for index, path in enumerate(paths):
            part = "test" if index in test else "train"
            recordings.append(Recording(path, part, (label,), partial(_read, path)))

    samples = cached_frames("dvscifar10", recordings, steps, SENSOR, cache)
    train = FrameFiles(*samples["train"], NeuromorphicAugment(size) if augment else Resize(size))
    return train, FrameFiles(*samples["test"], Resize(size))


def _class_files(
    name: str, archive: Archive, facts: Facts, root: Path, total: int, download: bool
) -> list[Path]:
    """Return the files of a class by their numbers, unpacking the archive if needed."""
    folder = find(root, name, _FOLDERS)
    if folder is None:
        folder = root / _FOLDERS[0] / name
        unpack(obtain(archive, facts, root, _FOLDERS, download), folder)
    paths = [folder / f"cifar10_{name}_{i}.aedat" for i in range(total)]
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        converted = any(folder.glob("*.aedat4"))
        hint = " (these are tonic's AEDAT 4 files; the original AEDAT 2 ones are needed)"
        raise DataError(
            f"{facts.title} is incomplete: {folder} lacks {len(missing):,} of {total:,} recordings"
            f", first {missing[0]}{hint if converted else ''}. Delete the folder and put "
            f"{archive.name} beside it (from {facts.page}); it is unpacked again."
        )
    return paths


def _read(path: Path) -> list[Events]:
    return [read_aedat2(path)]
