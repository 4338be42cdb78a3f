"""Data sets of images, and the transforms that CIFAR and TinyImageNet share."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from qsnn_ext.errors import DataError

Transform = Callable[[Image.Image], Tensor]


class Cutout(nn.Module):
    """One square hole at a random place, clipped at the border (DeVries and Taylor, 2017).

    The centre is uniform over the image, so a hole at the border is smaller than ``length``. Filled
    with 0, which is the mean of the data set when it stands after the normalisation.
    """

    def __init__(self, length: int = 16):
        super().__init__()
        self.length = length

    def forward(self, image: Tensor) -> Tensor:
        """Return a copy of ``image`` ([..., H, W]) with a hole."""
        height, width = image.shape[-2:]
        top = int(torch.randint(height, ())) - self.length // 2
        left = int(torch.randint(width, ())) - self.length // 2
        image = image.clone()
        image[..., max(top, 0) : top + self.length, max(left, 0) : left + self.length] = 0
        return image


def image_transform(
    mean: Sequence[float],
    std: Sequence[float],
    augmentation: Sequence[nn.Module] = (),
    hole: int = 0,
) -> v2.Compose:
    """Return PIL image -> normalised float32 [3, H, W].

    Args:
        mean: Mean of each channel, of pixel values in [0, 1].
        std: Standard deviation of each channel.
        augmentation: Applied to the PIL image first.
        hole: Side of the square that Cutout removes after normalisation, in pixels; 0 for none.

    """
    steps = [*augmentation, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    steps += [v2.Normalize(list(mean), list(std))]
    return v2.Compose([*steps, Cutout(hole)] if hole else steps)


class ImageArray(Dataset[tuple[Tensor, int]]):
    """Images held in memory as uint8 [N, H, W, 3]."""

    def __init__(self, images: NDArray[np.uint8], labels: Sequence[int], transform: Transform):
        self.images, self.labels, self.transform = images, list(labels), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return the transformed image and its label."""
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Images decoded from their files as they are asked for."""

    def __init__(self, paths: Sequence[Path], labels: Sequence[int], transform: Transform):
        self.paths, self.labels, self.transform = list(paths), list(labels), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return the transformed image and its label; a damaged file raises ``DataError``."""
        path = self.paths[index]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")  # some images of TinyImageNet are grey
        except Exception as error:  # every decoder has its own
            raise DataError(
                f"{path} is missing or damaged ({error}): delete its data set's folder, the "
                f"archive is unpacked again."
            ) from error
        return self.transform(image), self.labels[index]
