"""CIFAR-10 and CIFAR-100, read by torchvision.

CIFAR's batches are pickles, and reading a pickle can run code. torchvision checks the MD5 of every
batch before it opens the first, and this module checks them before that to say which one is wrong.
"""

from dataclasses import dataclass
from pathlib import Path

from torchvision import datasets
from torchvision.transforms import v2

from qsnn_ext.errors import DataError

from .files import Archive, Facts, find, md5_of, obtain, unpack
from .images import ImageArray, image_transform

_FOLDERS = ("",)


@dataclass(frozen=True)
class _Format:
    """What the format fixes: torchvision's class and the statistics of pixels in [0, 1]."""

    loader: type[datasets.CIFAR10]
    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_FORMATS = {
    "cifar10": _Format(datasets.CIFAR10, 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": _Format(datasets.CIFAR100, 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}


def _facts(title: str, loader: type[datasets.CIFAR10]) -> Facts:
    """Take file names and MD5s from torchvision, which keeps them up to date."""
    members = dict([*loader.train_list, *loader.test_list])
    members[loader.meta["filename"]] = loader.meta["md5"]
    archive = Archive(loader.filename, loader.tgz_md5, loader.url)
    page = "https://www.cs.toronto.edu/~kriz/cifar.html"
    return Facts(title, page, (archive,), 50_000, 10_000, members)


CIFAR10 = _facts("CIFAR-10", datasets.CIFAR10)
CIFAR100 = _facts("CIFAR-100", datasets.CIFAR100)


def load(
    name: str, root: Path, facts: Facts, *, augment: bool, download: bool
) -> tuple[ImageArray, ImageArray]:
    """Return (train, test) of "cifar10" or "cifar100": float32 [3, 32, 32] and the label.

    Training images pass through crop(32, padding 4), horizontal flip, AutoAugment's CIFAR-10
    policy, normalisation and Cutout (one hole of 16 pixels).

    Raises:
        DataError: The data is absent and cannot be downloaded, incomplete or damaged.

    """
    form = _FORMATS[name]
    folder = root / form.loader.base_folder
    if not folder.exists():
        unpack(obtain(facts.archives[0], facts, root, _FOLDERS, download), folder)
    _check_members(folder, root, facts)

    # The pipeline of AutoAugment's authors fills with grey what rotation and shear uncover.
    policy = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, fill=[128, 128, 128])
    augmentation = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), policy]
    plain = image_transform(form.mean, form.std)
    transform = image_transform(form.mean, form.std, augmentation, hole=16) if augment else plain
    return (
        _read(form, root, facts, True, facts.train, transform),
        _read(form, root, facts, False, facts.test, plain),
    )


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


def _read(
    form: _Format, root: Path, facts: Facts, train: bool, count: int, transform: v2.Compose
) -> ImageArray:
    # torchvision checks the MD5s of `facts`, so that tests can make tiny archives.
    checked = {
        "train_list": [[n, facts.members[n]] for n, _ in form.loader.train_list],
        "test_list": [[n, facts.members[n]] for n, _ in form.loader.test_list],
        "meta": {**form.loader.meta, "md5": facts.members[form.loader.meta["filename"]]},
    }
    data = type(form.loader.__name__, (form.loader,), checked)(root, train=train)
    split = "training" if train else "test"
    if len(data.data) != count or len(data.targets) != count:
        raise DataError(
            f"{facts.title} in {root} has {len(data.data):,} {split} images and "
            f"{len(data.targets):,} labels, expected {count:,}: delete {form.loader.base_folder}."
        )
    if not all(0 <= label < form.classes for label in data.targets):
        raise DataError(
            f"{facts.title} in {root} has {split} labels outside 0..{form.classes - 1}."
        )
    return ImageArray(data.data, data.targets, transform)
