"""TinyImageNet: 200 classes of 64x64 images, from the archive of Stanford's CS231n.

The archive keeps training images in one folder per class and all validation images in one folder
with a table of their classes; the validation images are the test set here, as everywhere in the
field (the archive's own test images have no labels).
"""

from pathlib import Path

from torchvision.transforms import v2

from qsnn_ext.errors import DataError

from .files import Archive, Facts, obtain, unpack
from .images import ImageFiles, image_transform

_FOLDER = "tiny-imagenet-200"
# Statistics of all training pixels as they are commonly quoted.
_MEAN, _STD = (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)

_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINYIMAGENET = Facts(
    "TinyImageNet",
    _URL,
    (Archive("tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de", _URL),),
    100_000,
    10_000,
)


def load(
    root: Path, facts: Facts, *, augment: bool, download: bool
) -> tuple[ImageFiles, ImageFiles]:
    """Return (train, test): float32 [3, 64, 64] and the label, 0..199 by WordNet id.

    Training images pass through crop(64, padding 8) and horizontal flip.

    Raises:
        DataError: The data is absent and cannot be downloaded, incomplete or damaged.

    """
    folder = root / _FOLDER
    if not folder.exists():
        unpack(obtain(facts.archives[0], facts, root, ("",), download), folder)
    classes = _classes(folder, facts)
    train = _training_images(folder, classes, facts)
    test = _validation_images(folder, classes, facts)

    plain = image_transform(_MEAN, _STD)
    augmentation = [v2.RandomCrop(64, padding=8), v2.RandomHorizontalFlip()]
    transform = image_transform(_MEAN, _STD, augmentation) if augment else plain
    return ImageFiles(*train, transform), ImageFiles(*test, plain)


def _incomplete(folder: Path, facts: Facts, problem: str) -> DataError:
    return DataError(
        f"{facts.title} is incomplete: {problem}. Delete {folder}; {facts.archives[0].name} is "
        f"unpacked again (from {folder.parent}, or fetched)."
    )


def _classes(folder: Path, facts: Facts) -> dict[str, int]:
    path = folder / "wnids.txt"
    if not path.is_file():
        raise _incomplete(folder, facts, f"{path} is missing")
    names = sorted(path.read_text(errors="replace").split())
    if not names:
        raise _incomplete(folder, facts, f"{path} is empty")
    return {name: label for label, name in enumerate(names)}


def _images(folder: Path) -> dict[str, Path]:
    """Return the images of a folder by name, leaving out empty files."""
    if not folder.is_dir():
        return {}
    files = (p for p in sorted(folder.iterdir()) if p.suffix == ".JPEG")
    return {p.name: p for p in files if p.stat().st_size > 0}


def _training_images(
    folder: Path, classes: dict[str, int], facts: Facts
) -> tuple[list[Path], list[int]]:
    expected = facts.train // len(classes)
    paths: list[Path] = []
    labels: list[int] = []
    for name, label in classes.items():
        images = _images(folder / "train" / name / "images")
        if len(images) != expected:
            problem = f"class {name} has {len(images)} training images, expected {expected}"
            raise _incomplete(folder, facts, problem)
        paths += images.values()
        labels += [label] * expected
    return paths, labels


def _validation_images(
    folder: Path, classes: dict[str, int], facts: Facts
) -> tuple[list[Path], list[int]]:
    table = folder / "val" / "val_annotations.txt"
    if not table.is_file():
        raise _incomplete(folder, facts, f"{table} is missing")
    images = _images(table.parent / "images")
    # A row: file name, WordNet id, bounding box.
    rows = [line.split("\t") for line in table.read_text(errors="replace").splitlines() if line]
    if len(rows) != facts.test:
        problem = f"{table} lists {len(rows):,} images, expected {facts.test:,}"
        raise _incomplete(folder, facts, problem)
    for row in rows:
        if len(row) < 2 or row[1] not in classes:
            raise _incomplete(folder, facts, f"{table} has a row without a known class: {row}")
        if row[0] not in images:
            raise _incomplete(folder, facts, f"validation image {row[0]} is missing or empty")
    return [images[row[0]] for row in rows], [classes[row[1]] for row in rows]
