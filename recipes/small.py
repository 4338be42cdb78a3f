"""What every recipe becomes on the handwritten digits: the same code, narrow and short."""

from __future__ import annotations

from recipes.config import Config

# The smallest image each network does not halve to nothing.
SIZES = {"resnet19": 16, "vgg16": 32, "vggsnn": 16}


def on_digits(full: Config, data: str) -> Config:
    """A recipe's configuration for ``digits`` or ``digits-events`` on two CPU cores.

    Args:
        full: Configuration for the recipe's own data set.
        data: ``"digits"`` or ``"digits-events"``.

    Returns:
        The same method with a narrower network, fewer epochs and smaller batches.

    """
    size = 32 if data == "digits-events" else SIZES[full.network]
    return full.but(data=data, size=size, width=0.125, epochs=12, batch=32, workers=0)
