"""AutoAugment's policy for CIFAR-10 (Cubuk et al., CVPR 2019), for whole batches of uint8 images.

Every image draws its own sub-policy. Images that drew the same operation, strength and sign are
transformed together by torchvision's kernels: some fifty calls for a batch, whatever its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as F

if TYPE_CHECKING:
    from recipes.data.batches import Draws

# The pipeline of AutoAugment's authors fills with grey what rotation and shear uncover.
_GREY = [128, 128, 128]
_LEVELS = 10

# (operation, probability, level) twice per sub-policy: Table 7 of the paper.
_POLICY: tuple[tuple[tuple[str, float, int], tuple[str, float, int]], ...] = (
    (("invert", 0.1, 0), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, 0), ("equalize", 0.9, 0)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 0), ("autocontrast", 0.4, 0)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 0)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
    (("color", 0.9, 9), ("equalize", 0.6, 0)),
    (("autocontrast", 0.8, 0), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 0)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, 0), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 0), ("invert", 0.1, 0)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, 0)),
)


def _affine(images: Tensor, **given: Any) -> Tensor:
    options = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0], **given}
    moved: Tensor = F.affine(images, **options, fill=_GREY)
    return moved


def _shear_y(images: Tensor, slope: float) -> Tensor:
    degrees = math.degrees(math.atan(slope))
    return _affine(images, shear=[0.0, degrees], center=[0, 0])


# By operation: the strength at the highest level, whether its sign is drawn, and what is done to
# images [N, 3, H, W] at a strength.
_OPERATIONS: dict[str, tuple[float, bool, Callable[[Tensor, float], Tensor]]] = {
    "shear_y": (0.3, True, _shear_y),
    "translate_x": (
        150 / 331, True, lambda x, s: _affine(x, translate=[int(s * x.shape[-1]), 0])
    ),
    "translate_y": (
        150 / 331, True, lambda x, s: _affine(x, translate=[0, int(s * x.shape[-2])])
    ),
    "rotate": (30.0, True, lambda x, s: F.rotate(x, s, fill=_GREY)),
    "brightness": (0.9, True, lambda x, s: F.adjust_brightness(x, 1 + s)),
    "color": (0.9, True, lambda x, s: F.adjust_saturation(x, 1 + s)),
    "contrast": (0.9, True, lambda x, s: F.adjust_contrast(x, 1 + s)),
    "sharpness": (0.9, True, lambda x, s: F.adjust_sharpness(x, 1 + s)),
    "posterize": (4.0, False, lambda x, s: F.posterize(x, round(8 - s))),
    "solarize": (1.0, False, lambda x, s: F.solarize(x, 255 * (1 - s))),
    "autocontrast": (0.0, False, lambda x, s: F.autocontrast(x)),
    "equalize": (0.0, False, lambda x, s: F.equalize(x)),
    "invert": (0.0, False, lambda x, s: F.invert(x)),
}  # fmt: skip


def apply(images: Tensor, operation: str, level: int, sign: int = 1) -> Tensor:
    """One operation of the policy on uint8 images [N, 3, H, W].

    Args:
        images: All are transformed alike.
        operation: Its name in the policy.
        level: 0 to 9.
        sign: 1 or -1; only for operations that have a direction.

    """
    highest, _, function = _OPERATIONS[operation]
    return function(images, sign * highest * level / (_LEVELS - 1))


def autoaugment(images: NDArray[np.uint8], draws: Draws) -> NDArray[np.uint8]:
    """Apply one sub-policy to each image, drawn for it alone.

    Args:
        images: [N, H, W, 3].
        draws: Random numbers of the batch.

    """
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    chosen = draws.integers(len(_POLICY))
    for half in range(2):
        happens, negative = draws.uniform(), draws.uniform() < 0.5
        groups: dict[tuple[str, int, int], list[int]] = {}
        for sample, policy in enumerate(chosen):
            operation, probability, level = _POLICY[policy][half]
            if happens[sample] < probability:
                sign = -1 if negative[sample] and _OPERATIONS[operation][1] else 1
                groups.setdefault((operation, level, sign), []).append(sample)
        pixels = pixels.clone()
        for (operation, level, sign), samples in groups.items():
            pixels[samples] = apply(pixels[samples], operation, level, sign)
    result: NDArray[np.uint8] = pixels.permute(0, 2, 3, 1).numpy()
    return result
