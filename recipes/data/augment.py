"""Augmentation of event frames.

Every transform takes frames float32 [T, 2, H, W] and a label, and gives both back. All T frames are
moved alike, and all randomness comes from torch's generator, so a seeded loader repeats itself.
"""

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

# Mirroring turns a gesture of one arm into that of the other, and clockwise into counter-clockwise:
# wave right/left are 1/2; right arm cw, ccw and left arm cw, ccw are 3, 4, 5, 6 (counted from 0).
GESTURE_MIRROR = (0, 2, 1, 6, 5, 4, 3, 7, 8, 9, 10)


class Resize:
    """Resize frames to ``size`` x ``size``, averaging over all pixels (so no event is lost)."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, frames: Tensor, label: int) -> tuple[Tensor, int]:
        """Return the resized frames and the label."""
        return F.resize(frames, [self.size, self.size], antialias=True), label


class NeuromorphicAugment:
    """Neuromorphic data augmentation (Li et al., ECCV 2022) as the paper sets it.

    Resizes, mirrors every second sample, then does one of: roll by up to ``roll`` pixels along each
    axis, rotate by up to ``rotate`` degrees, shear horizontally by up to ``shear`` degrees.
    """

    def __init__(
        self,
        size: int,
        *,
        flip: bool = True,
        roll: int = 5,
        rotate: float = 30.0,
        shear: float = 30.0,
    ):
        self.resize = Resize(size)
        self.flip, self.roll, self.rotate, self.shear = flip, roll, rotate, shear

    def __call__(self, frames: Tensor, label: int) -> tuple[Tensor, int]:
        """Return the augmented frames and the label."""
        frames, label = self.resize(frames, label)
        if self.flip and bool(torch.rand(()) < 0.5):
            frames = F.horizontal_flip(frames)
        choice = int(torch.randint(3, ()))
        if choice == 0:
            shift = torch.randint(-self.roll, self.roll + 1, (2,)).tolist()
            frames = torch.roll(frames, shift, dims=(-2, -1))
        elif choice == 1:
            frames = F.rotate(frames, _uniform(self.rotate))
        else:
            frames = F.affine(frames, 0.0, [0, 0], 1.0, [_uniform(self.shear), 0.0])
        return frames, label


class GestureAugment:
    """Augmentation of DVS-Gesture: crop 60-100 % of the area, mirror, rotate by up to 30 degrees.

    Mirroring exchanges the labels of left and right; without that, six of the eleven classes could
    not be told apart in training.
    """

    def __init__(self, size: int, *, rotate: float = 30.0):
        self.crop = v2.RandomResizedCrop(size, scale=(0.6, 1.0), antialias=True)
        self.rotate = rotate

    def __call__(self, frames: Tensor, label: int) -> tuple[Tensor, int]:
        """Return the augmented frames and the label of what they show now."""
        frames = self.crop(frames)
        if bool(torch.rand(()) < 0.5):
            frames, label = F.horizontal_flip(frames), GESTURE_MIRROR[label]
        return F.rotate(frames, _uniform(self.rotate)), label


class DigitAugment:
    """Small rotation (up to 10 degrees) and shift (up to an eighth) of images [C, H, W]."""

    def __init__(self) -> None:
        self.affine = v2.RandomAffine(
            10.0, translate=(0.125, 0.125), interpolation=InterpolationMode.BILINEAR
        )

    def __call__(self, image: Tensor) -> Tensor:
        """Return the moved image; what is uncovered is 0, the digits' background."""
        moved: Tensor = self.affine(image)
        return moved


def _uniform(bound: float) -> float:
    return float(torch.empty(()).uniform_(-bound, bound))
