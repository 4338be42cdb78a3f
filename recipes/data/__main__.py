"""Look at a data set before training on it: ``python -m recipes.data digits-events --png x.png``.

Fetches, checks and prepares the data (so that a compute node without network finds all it needs),
says what a network has to know about it and draws the first training samples.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from qsnn_ext.errors import QSNNError

from . import NAMES, datasets, spec

_ZOOM = 3
_BRIGHT = 4.0  # this many events in a pixel give the full colour


def picture(sample: Tensor) -> NDArray[np.uint8]:
    """Draw a sample: an image as it is; frames side by side, ON events red and OFF events blue.

    Args:
        sample: [C, H, W], stretched to its own range, or event counts [T, 2, H, W].

    Returns:
        uint8 [H, W, 3] or [H, T * W, 3].

    """
    if sample.ndim == 4:
        off, on = (part.numpy() for part in (sample / _BRIGHT).clamp(0, 1).unbind(1))
        colours = 1 - np.stack([off, np.maximum(off, on), on], axis=-1)  # [T, H, W, 3]
        shown = np.concatenate(list(colours), axis=1)
    else:
        low, high = sample.min(), sample.max()
        shown = ((sample - low) / (high - low).clamp(min=1e-6)).numpy().transpose(1, 2, 0)
        shown = np.broadcast_to(shown, (*shown.shape[:2], 3))
    return (shown * 255).round().astype(np.uint8)


def contact_sheet(samples: list[Tensor]) -> Image.Image:
    """Draw samples: frames below each other, images ten in a row."""
    drawn = [np.pad(picture(s), ((1, 1), (1, 1), (0, 0)), constant_values=128) for s in samples]
    per_row = 1 if samples[0].ndim == 4 else 10
    drawn += [np.full_like(drawn[0], 128)] * (-len(drawn) % per_row)
    rows = [np.concatenate(drawn[i : i + per_row], 1) for i in range(0, len(drawn), per_row)]
    image = Image.fromarray(np.concatenate(rows))
    size = (image.width * _ZOOM, image.height * _ZOOM)
    return image.resize(size, Image.Resampling.NEAREST)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m recipes.data", description=__doc__)
    parser.add_argument("name", choices=NAMES, help="data set")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="default: data")
    parser.add_argument("--png", type=Path, help="file to draw the first training samples to")
    parser.add_argument("--samples", type=int, default=10, help="how many to draw")
    parser.add_argument("--no-augment", action="store_true", help="draw them without augmentation")
    options = parser.parse_args(arguments)
    try:
        train, test = datasets(options.name, options.data_dir, augment=not options.no_augment)
        samples = [train[i][0] for i in range(min(options.samples, len(train)))]  # type: ignore[arg-type]
    except QSNNError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(spec(options.name))
    print(f"{len(train):,} training and {len(test):,} test samples")  # type: ignore[arg-type]
    if options.png is not None:
        options.png.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(samples).save(options.png)
        print(f"wrote {options.png}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
