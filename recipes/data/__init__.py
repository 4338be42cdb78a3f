"""The data sets of the recipes, all through two functions: :func:`spec` and :func:`datasets`."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from qsnn_ext.errors import ConfigError, DataError

from . import cifar, digits, dvscifar10, dvsgesture, fashionmnist, nmnist, tinyimagenet
from .files import Facts

__all__ = [
    "NAMES",
    "OFFICIAL",
    "DataSpec",
    "collate_frames",
    "datasets",
    "seed_worker",
    "spec",
]


@dataclass(frozen=True)
class DataSpec:
    """What a network has to know about its data.

    Attributes:
        name: The data set.
        classes: Number of classes.
        channels: Channels of an image or frame.
        size: Height and width.
        events: Whether a sample is a run of frames [T, C, H, W] and not an image [C, H, W].
        steps: T of event data, None for images.

    """

    name: str
    classes: int
    channels: int
    size: tuple[int, int]
    events: bool
    steps: int | None


_SPECS = {
    s.name: s
    for s in (
        DataSpec("cifar10", 10, 3, (32, 32), False, None),
        DataSpec("cifar100", 100, 3, (32, 32), False, None),
        DataSpec("tinyimagenet", 200, 3, (64, 64), False, None),
        DataSpec("fashionmnist", 10, 1, (28, 28), False, None),
        DataSpec("dvsgesture", 11, 2, (48, 48), True, 16),
        DataSpec("dvscifar10", 10, 2, (48, 48), True, 10),
        DataSpec("nmnist", 10, 2, (34, 34), True, 10),
        DataSpec("digits", 10, 1, (16, 16), False, None),
        DataSpec("digits-events", 10, 2, (32, 32), True, 10),
    )
}
_FIXED_SIZE = ("cifar10", "cifar100", "tinyimagenet", "fashionmnist")

NAMES = tuple(_SPECS)

OFFICIAL: dict[str, Facts] = {
    "cifar10": cifar.CIFAR10,
    "cifar100": cifar.CIFAR100,
    "tinyimagenet": tinyimagenet.TINYIMAGENET,
    "fashionmnist": fashionmnist.FASHIONMNIST,
    "dvsgesture": dvsgesture.DVSGESTURE,
    "dvscifar10": dvscifar10.DVSCIFAR10,
    "nmnist": nmnist.NMNIST,
}
"""What is published about each data set, and what the files found are checked against."""


def spec(name: str, *, size: int | None = None, steps: int | None = None) -> DataSpec:
    """Return what a network has to know about a data set.

    Args:
        name: One of ``NAMES``.
        size: Height and width; None for the data set's own. CIFAR and TinyImageNet have only that.
        steps: Number of frames T; None for the paper's. Only for event data.

    Raises:
        ConfigError: Unknown name, or an option this data set does not have.

    """
    if name not in _SPECS:
        raise ConfigError(f"unknown data set {name!r}: use one of {', '.join(NAMES)}.")
    found = _SPECS[name]
    if size is not None:
        if name in _FIXED_SIZE and size != found.size[0]:
            raise ConfigError(f"{name} has images of {found.size[0]} pixels: leave size away.")
        if size < 8:
            raise ConfigError(f"size must be at least 8 pixels, not {size}.")
        found = replace(found, size=(size, size))
    if steps is not None:
        if not found.events:
            raise ConfigError(f"{name} has images, no frames: leave steps away.")
        if steps < 1:
            raise ConfigError(f"steps must be at least 1, not {steps}.")
        found = replace(found, steps=steps)
    return found


def datasets(
    name: str,
    root: str | Path = "data",
    *,
    size: int | None = None,
    steps: int | None = None,
    augment: bool = True,
    strong: bool = True,
    split: str = "tebn",
    data_seed: int = 0,
    cache: str | Path | None = None,
    download: bool = True,
    facts: Facts | None = None,
) -> tuple[Dataset[tuple[Tensor, int]], Dataset[tuple[Tensor, int]]]:
    """Return the training and the test set.

    An item is ``(x, label)``: an image float32 [C, H, W], normalised, or event counts float32
    [T, 2, H, W]; the label is an int.

    Args:
        name: One of ``NAMES``.
        root: The data directory; what is missing is downloaded into it where that is possible.
        size: As for :func:`spec`.
        steps: As for :func:`spec`.
        augment: Whether the training set is augmented (never the test set).
        strong: Whether CIFAR's augmentation has AutoAugment and Cutout, or crop and flip alone.
        split: How DVS-CIFAR10 is divided: "tebn", "last" or "random".
        data_seed: Seed of the random split and of the simulated event camera. It is part of the
            data, so keep it when the seed of the training changes.
        cache: Directory of prepared frames and events; None for ``root/cache``.
        download: Whether a download may be tried.
        facts: What to check the files against; None for the published data set.

    Raises:
        ConfigError: Unknown name or option.
        DataError: The data is absent, incomplete or damaged; the message says what to put where.

    """
    wanted = spec(name, size=size, steps=steps)
    side, root = wanted.size[0], Path(root).expanduser()
    cache = Path(cache).expanduser() if cache is not None else root / "cache"
    if root.exists() and not root.is_dir():
        raise DataError(f"the data directory {root} is a file: name a directory.")
    if name == "digits":
        return digits.load_images(side, augment=augment)
    if name == "digits-events":
        return digits.load_frames(
            side, wanted.steps or 1, seed=data_seed, augment=augment, cache=cache
        )
    facts = facts or OFFICIAL[name]
    common: dict[str, Any] = {"augment": augment, "download": download}
    if name == "tinyimagenet":
        return tinyimagenet.load(root, facts, **common)
    if name == "fashionmnist":
        return fashionmnist.load(root, facts, **common)
    if name == "nmnist":
        return nmnist.load(
            root, facts, steps=wanted.steps or 1, size=side, augment=augment, cache=cache
        )
    if not wanted.events:
        return cifar.load(name, root, facts, strong=strong, cache=cache, **common)
    common |= {"steps": wanted.steps, "size": side, "cache": cache}
    if name == "dvsgesture":
        return dvsgesture.load(root, facts, **common)
    return dvscifar10.load(root, facts, split=split, seed=data_seed, **common)


def collate_frames(batch: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Join event samples [T, C, H, W] to a batch [T, N, C, H, W], with labels int64 [N]."""
    frames, labels = zip(*batch, strict=True)
    return torch.stack(frames, dim=1), torch.tensor(labels, dtype=torch.int64)


def seed_worker(worker: int) -> None:
    """Seed NumPy and ``random`` in a ``DataLoader`` worker from torch's seed of that worker.

    The transforms here draw from torch only; this is for what a user adds.

    Args:
        worker: The worker's number, already part of torch's seed.

    """
    seed = torch.initial_seed() % 2**32
    np.random.seed(seed)
    random.seed(seed)
