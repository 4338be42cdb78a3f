"""CIFAR-10 and CIFAR-100 in the forms in which people have them.

The official archive, the Parquet files of the Hugging Face hub (:mod:`recipes.data.parquet`), or a
folder per class (folder or zip, :mod:`recipes.data.folders`); the first of these that is there.

The official batches are pickles, and reading a pickle can run code: torchvision checks the MD5 of
every batch before it opens the first, and this module checks them before that to say which one is
wrong. The other forms are checked by counts, balance and the mean of the pixels, and decoded once
into a cache of arrays.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchvision import datasets

from qsnn_ext.errors import DataError
from recipes.data import arrays, folders, parquet
from recipes.data.arrays import Arrays, Expected
from recipes.data.batches import BatchTransform, ImageArray

from .files import Archive, Facts, find, md5_of, obtain, unpack

_FOLDERS = ("",)
_SIZE = (32, 32)


@dataclass(frozen=True)
class _Format:
    """What the format fixes: torchvision's class, statistics of pixels in [0, 1], class names."""

    loader: type[datasets.CIFAR10]
    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    names: tuple[str, ...] = ()


_TEN = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
_FORMATS = {
    "cifar10": _Format(
        datasets.CIFAR10, 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), _TEN
    ),
    "cifar100": _Format(datasets.CIFAR100, 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}


def _facts(title: str, loader: type[datasets.CIFAR10], mean: tuple[float, ...]) -> Facts:
    """Take file names and MD5s from torchvision, which keeps them up to date."""
    members = dict([*loader.train_list, *loader.test_list])
    members[loader.meta["filename"]] = loader.meta["md5"]
    archive = Archive(loader.filename, loader.tgz_md5, loader.url)
    page = "https://www.cs.toronto.edu/~kriz/cifar.html"
    return Facts(title, page, (archive,), 50_000, 10_000, members, mean)


CIFAR10 = _facts("CIFAR-10", datasets.CIFAR10, (125.3069, 122.9501, 113.8660))
CIFAR100 = _facts("CIFAR-100", datasets.CIFAR100, (129.3042, 124.0700, 112.4341))


def load(
    name: str, root: Path, facts: Facts, *, augment: bool, strong: bool, cache: Path, download: bool
) -> tuple[ImageArray, ImageArray]:
    """Return (train, test) of "cifar10" or "cifar100": float32 [3, 32, 32] and the label.

    Training images pass through crop(32, padding 4), horizontal flip, AutoAugment's CIFAR-10
    policy, normalisation and Cutout (one hole of 16 pixels).

    Args:
        name: Which.
        root: Where it lies, in whatever form.
        facts: What is published about it.
        augment: Whether training images are augmented at all.
        strong: Whether AutoAugment and Cutout are part of it.
        cache: Where decoded arrays are kept.
        download: Whether the official archive may be fetched where nothing is found.

    Raises:
        DataError: The data is absent and cannot be downloaded, incomplete or damaged.

    """
    form = _FORMATS[name]
    counts = {"train": facts.train, "test": facts.test}
    found, source, verified = _find(name, form, root, facts, cache, download)
    # Files with the right MD5 are what they should be.
    mean = None if verified else facts.mean
    expected = Expected(facts.title, counts, form.classes, mean, balanced=not verified)
    told = arrays.check(found, expected, source)
    plain = BatchTransform(form.mean, form.std)
    augmented, names = plain, found.classes or form.names
    if augment:
        hole = 16 if strong else 0
        augmented = BatchTransform(form.mean, form.std, 4, flip=True, policy=strong, hole=hole)
    return (
        ImageArray(found.images["train"], found.labels["train"], augmented, told, names),
        ImageArray(found.images["test"], found.labels["test"], plain, told, names),
    )


def _find(
    name: str, form: _Format, root: Path, facts: Facts, cache: Path, download: bool
) -> tuple[Arrays, str, bool]:
    """The data set in the first form that is there, where that is, and whether MD5s prove it."""
    official = root / form.loader.base_folder
    there = official.exists() or find(root, facts.archives[0].name, _FOLDERS)
    if not there and (files := parquet.find(root / name)) is not None:
        return _parquet(name, files, facts, cache), f"Parquet files in {root / name}", False
    if not there:
        for place in (root / f"{name}.zip", root / name, root):
            if folders.looks_like(place):
                kind = "zip file" if place.is_file() else "folder"
                found = _per_class(name, place, facts, form, cache)
                return found, f"{kind} per class {place}", False
    return _official(form, root, facts, download), f"official archive in {official}", True


def _per_class(name: str, place: Path, facts: Facts, form: _Format, cache: Path) -> Arrays:
    """A folder per class: counted, then decoded or taken from the cache."""
    with folders.opened(place) as source:
        found = {split: folders.listing(source, split) for split in folders.SPLITS}
        for split, count in (("train", facts.train), ("test", facts.test)):
            part = found[split]
            if len(part.classes) != form.classes:
                raise DataError(
                    f"{place} has {len(part.classes)} folders of {split} classes, but "
                    f"{facts.title} has {form.classes}."
                )
            if part.classes != found["train"].classes:
                odd = sorted(set(part.classes) ^ set(found["train"].classes))
                raise DataError(f"{place} has other classes in test than in train: {odd[:5]}.")
            for rank, of_class in enumerate(part.classes):
                n, wanted = part.labels.count(rank), count // form.classes
                if n != wanted:
                    raise DataError(
                        f"{place} has {n:,} {split} images of class {of_class!r}, but "
                        f"{facts.title} has {wanted:,} of each: it is incomplete or another data "
                        "set."
                    )
        # Any change of any file makes another cache.
        text = json.dumps(sorted(source.names()))
        key = hashlib.sha256(text.encode()).hexdigest()[:12]

        def decode() -> Arrays:
            parts = {s: folders.read_split(source, found[s], s, _SIZE) for s in folders.SPLITS}
            labels = {s: np.array(found[s].labels, np.int64) for s in folders.SPLITS}
            return Arrays(parts, labels, tuple(found["train"].classes))

        return arrays.cached(cache / f"{name}-{key}", decode)


def _parquet(name: str, files: parquet.Files, facts: Facts, cache: Path) -> Arrays:
    """Parquet files, decoded or taken from the cache."""
    stamps = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for split in files
        for path in files[split]
    ]
    key = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:12]
    column = "label" if name == "cifar10" else "fine_label"
    counts = {"train": facts.train, "test": facts.test}
    return arrays.cached(
        cache / f"{name}-{key}", lambda: parquet.read(files, column, _SIZE, counts)
    )


def _official(form: _Format, root: Path, facts: Facts, download: bool) -> Arrays:
    """The official archive, every file checked by its MD5."""
    folder = root / form.loader.base_folder
    if not folder.exists():
        unpack(obtain(facts.archives[0], facts, root, _FOLDERS, download), folder)
    _check_members(folder, root, facts)
    # torchvision checks the MD5s of `facts`, so that tests can make tiny archives.
    checked = {
        "train_list": [[n, facts.members[n]] for n, _ in form.loader.train_list],
        "test_list": [[n, facts.members[n]] for n, _ in form.loader.test_list],
        "meta": {**form.loader.meta, "md5": facts.members[form.loader.meta["filename"]]},
    }
    images, labels = {}, {}
    for split in ("train", "test"):
        loader = type(form.loader.__name__, (form.loader,), checked)
        data = loader(root, train=split == "train")
        images[split], labels[split] = data.data, np.array(data.targets, np.int64)
    return Arrays(images, labels, tuple(data.classes))


def _check_members(folder: Path, root: Path, facts: Facts) -> None:
    for name, md5 in facts.members.items():
        path = folder / name
        if not path.is_file():
            problem = f"{path} is missing"
        elif md5_of(path) != md5:
            problem = f"{path} is damaged ({path.stat().st_size:,} bytes, expected MD5 {md5})"
        else:
            continue
        archive = facts.archives[0].name
        source = f"{archive} is" if find(root, archive, _FOLDERS) else f"{archive} is fetched and"
        raise DataError(
            f"{facts.title} is incomplete: {problem}. Delete {folder}; {source} unpacked again."
        )
