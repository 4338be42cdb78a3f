"""Images held as one array, and augmentation of whole batches of them.

Every random number of a sample is a function of that sample's own seed, computed for the whole
batch at once: neither the batch a sample lands in nor the number of loading processes changes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from recipes.data.policy import autoaugment

Pixels = NDArray[np.uint8]
Seeds = NDArray[np.uint64]


class Draws:
    """Random numbers of a batch, one stream per sample.

    A counter-based generator: number ``k`` of a sample is a hash of its seed and ``k``, so a batch
    is one vectorised expression and a sample's numbers do not depend on its neighbours.

    Args:
        seeds: One per sample.

    """

    def __init__(self, seeds: Sequence[int] | NDArray[Any]) -> None:
        self.seeds = np.asarray(seeds, np.uint64)
        self._count = 0

    def uniform(self) -> NDArray[np.float64]:
        """The next number of every sample, uniform in [0, 1)."""
        with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
            # The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), twice: seeds that
            # differ in one bit must not give numbers that resemble each other.
            mixed = _finalise(_finalise(self.seeds) + np.uint64(self._count))
        self._count += 1
        return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def integers(self, bound: int) -> NDArray[np.int64]:
        """The next number of every sample, one of ``0 .. bound - 1``."""
        return (self.uniform() * bound).astype(np.int64)


def _finalise(z: Seeds) -> Seeds:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True)
class BatchTransform:
    """From uint8 images to what a network gets, for a whole batch.

    Attributes:
        mean: Of each channel, of pixel values in [0, 1].
        std: Standard deviation of each channel.
        padding: Random crop after padding with black by this many pixels on each side.
        flip: Mirror every second image.
        policy: AutoAugment's policy for CIFAR-10, after crop and flip.
        hole: Side of the square that Cutout removes after normalisation, in pixels; 0 for none.

    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int = 0
    flip: bool = False
    policy: bool = False
    hole: int = 0

    def __call__(self, images: Pixels, seeds: Sequence[int] | Seeds) -> Tensor:
        """Transform a batch.

        Args:
            images: [N, H, W, C].
            seeds: One per image; only what is random depends on them.

        Returns:
            float32 [N, C, H, W] in channels-last memory.

        """
        draws = Draws(seeds)
        if self.padding or self.flip:
            images = crop_and_flip(images, draws, self.padding, self.flip)
        if self.policy:
            images = autoaugment(images, draws)
        x = torch.from_numpy(np.ascontiguousarray(images)).to(torch.float32)
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        x = x.div_(255).sub_(mean).div_(std)  # [N, H, W, C]
        if self.hole:
            x = cutout(x, draws, self.hole)
        return x.permute(0, 3, 1, 2)


def crop_and_flip(images: Pixels, draws: Draws, padding: int, flip: bool) -> Pixels:
    """Shift every image by up to ``padding`` pixels, black coming in, and mirror every second."""
    n, height, width = images.shape[:3]
    room = 2 * padding + 1
    top, left = draws.integers(room), draws.integers(room)
    mirrored = draws.uniform() < (0.5 if flip else 0.0)
    border = (padding, padding)
    padded = np.pad(images, ((0, 0), border, border, (0, 0)))
    columns = np.arange(width)
    columns = np.where(mirrored[:, None], columns[::-1], columns) + left[:, None]
    rows = np.arange(height) + top[:, None]
    cropped: Pixels = padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return cropped


def cutout(x: Tensor, draws: Draws, length: int) -> Tensor:
    """One square hole per image at a random place (DeVries and Taylor, 2017).

    The centre is uniform over the image, so a hole at the border is clipped. Filled with 0, which
    is the mean of the data set after the normalisation.

    Args:
        x: [N, H, W, C], changed in place.
        draws: Random numbers of the batch.
        length: Side of the hole in pixels.

    """

    def covered(size: int) -> NDArray[np.bool_]:
        first = draws.integers(size)[:, None] - length // 2
        place = np.arange(size)
        return (place >= first) & (place < first + length)

    rows, columns = covered(x.shape[1]), covered(x.shape[2])
    holes = torch.from_numpy(rows[:, :, None] & columns[:, None, :])
    return x.masked_fill_(holes[..., None], 0.0)


class ImageArray(Dataset[tuple[Tensor, int]]):
    """Images held in memory (or mapped from a file) as uint8 [N, H, W, C].

    Args:
        images: The pixels.
        labels: One per image.
        transform: Applied to every batch.
        found: In words, what was found where.
        classes: Names of the classes, if they are known.

    """

    def __init__(
        self,
        images: Pixels,
        labels: Sequence[int] | NDArray[Any],
        transform: BatchTransform,
        found: str = "",
        classes: Sequence[str] = (),
    ) -> None:
        self.images, self.transform, self.found = images, transform, found
        self.classes = tuple(classes)
        self.labels = [int(label) for label in labels]
        self._targets = torch.tensor(self.labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The transformed image [C, H, W], drawn by torch's generator, and its label."""
        x, _ = self.batch([index], [int(torch.randint(2**32, ()))])
        return x[0], self.labels[index]

    def batch(self, indices: Sequence[int], seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Several images at once.

        Args:
            indices: Which.
            seeds: Of their augmentation, one per image.

        Returns:
            float32 [N, C, H, W] in channels-last memory, and the labels int64 [N].

        """
        images = np.asarray(self.images[np.asarray(indices)])
        return self.transform(images, seeds), self._targets[list(indices)]
