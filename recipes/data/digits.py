"""scikit-learn's 1,797 handwritten digits, as images and before a simulated event camera.

They come with scikit-learn, so every recipe runs on real data with nothing to download.
"""

from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from .augment import DigitAugment, NeuromorphicAugment
from .camera import Camera
from .events import EVENT, Events, to_frames
from .files import write_atomically
from .frames import FrameArray, cache_folder

TRAIN, TEST = 1347, 450
_DIGIT = 0.75  # side of the 8x8 digit, as a part of the sensor's


def split() -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the indices of the 1,347 training and 450 test digits: fixed and stratified."""
    labels = load_digits().target
    train, test = train_test_split(
        np.arange(len(labels)), test_size=TEST, random_state=0, stratify=labels
    )
    return train, test


@lru_cache(maxsize=4)
def pictures(size: int, border: int = 0) -> Tensor:
    """Return all digits enlarged bilinearly, float32 [1797, 1, size, size] in [0, 1].

    Args:
        size: Height and width of the result.
        border: Empty pixels put around the 8x8 digit first, so that strokes that touch its edge
            end softly.

    """
    images = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 16.0
    images = F.pad(images, (border,) * 4)
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)


class DigitImages(Dataset[tuple[Tensor, int]]):
    """Digits as normalised images, float32 [1, size, size]."""

    def __init__(
        self,
        images: Tensor,
        labels: list[int],
        mean: float,
        std: float,
        transform: DigitAugment | None = None,
    ):
        self.images, self.labels, self.transform = images, labels, transform
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return the image, augmented then normalised, and its label."""
        image = self.images[index]
        if self.transform is not None:
            image = self.transform(image)
        return (image - self.mean) / self.std, self.labels[index]


def load_images(size: int, *, augment: bool) -> tuple[DigitImages, DigitImages]:
    """Return (train, test) digits as images, float32 [1, size, size], and the label 0..9.

    Pixels have 8 bits, as those of any camera and image file, which an integer program can take
    as they are; then they are normalised by mean and standard deviation of the training pixels.
    """
    train, test = split()
    images, labels = torch.round(pictures(size) * 255) / 255, load_digits().target
    mean, std = images[train].mean().item(), images[train].std().item()
    return (
        DigitImages(
            images[train], labels[train].tolist(), mean, std, DigitAugment() if augment else None
        ),
        DigitImages(images[test], labels[test].tolist(), mean, std),
    )


def load_frames(
    size: int, steps: int, *, seed: int, augment: bool, cache: Path | None
) -> tuple[FrameArray, FrameArray]:
    """Return (train, test) digits as event counts, float32 [steps, 2, size, size], and the label.

    Args:
        size: Height and width of the camera's sensor.
        steps: Number of frames T, of equally many events.
        seed: Of the camera (path of the gaze, noise).
        augment: Whether training frames pass through the augmentation of DVS-CIFAR10. Mirroring is
            left out, since digits are not mirrored in reality, and the roll is scaled to the size.
        cache: Directory where the events are kept; None keeps them in memory only.

    """
    frames = np.stack([to_frames(e, steps, (size, size)) for e in recordings(size, seed, cache)])
    train, test = split()
    labels = load_digits().target
    roll = max(round(5 * size / 48), 1)
    transform = NeuromorphicAugment(size, flip=False, roll=roll) if augment else None
    return (
        FrameArray(frames[train], labels[train].tolist(), transform),
        FrameArray(frames[test], labels[test].tolist()),
    )


@lru_cache(maxsize=2)
def recordings(size: int, seed: int = 0, cache: Path | None = None) -> tuple[Events, ...]:
    """Return the events of all 1,797 digits, from the cache or by simulation (some seconds)."""
    camera = Camera(size=size, amplitude=size / 8)
    side = round(_DIGIT * size * 10 / 8)  # 8 pixels and a border of one on each side
    if cache is None:
        return _simulate(camera, side, seed)
    parameters = {**asdict(camera), "picture": side, "seed": seed}
    path = cache_folder(cache, "digits-events", parameters).with_suffix(".npz")
    if not path.exists() or (events := _read(path)) is None:
        events = _simulate(camera, side, seed)
        _write(path, events)
    return events


def _simulate(camera: Camera, side: int, seed: int) -> tuple[Events, ...]:
    return tuple(camera.record(pictures(side, border=1)[:, 0].numpy(), seed))


def _write(path: Path, events: tuple[Events, ...]) -> None:
    whole = np.concatenate(events)
    arrays: dict[str, Any] = {"ends": np.cumsum([len(e) for e in events])}
    for name in EVENT.names or ():
        # The smallest type that holds a column; compressing would take as long as simulating.
        arrays[name] = whole[name].astype(np.min_scalar_type(int(whole[name].max())))
    write_atomically(path, lambda file: np.savez(file, **arrays))


def _read(path: Path) -> tuple[Events, ...] | None:
    """Return the cached events, or None if the file is damaged: then they are simulated again."""
    try:
        with np.load(path, allow_pickle=False) as file:
            ends = file["ends"]
            whole = np.empty(int(ends[-1]), EVENT)
            for name in EVENT.names or ():
                whole[name] = file[name]
    except Exception:  # zip, zlib and NumPy each have their own
        return None
    return tuple(np.split(whole, ends[:-1]))
