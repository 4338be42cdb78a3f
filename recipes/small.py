"""What every recipe becomes on the handwritten digits: the same code, narrow and short."""

from __future__ import annotations

from recipes.config import Config

# The smallest image each network does not halve to nothing.
SIZES = {"resnet19": 16, "vgg16": 32, "vggsnn": 16}


def on_digits(full: Config, data: str) -> Config:
    """A recipe's configuration for ``digits`` or ``digits-events`` on two CPU cores.

    A few hundred small steps ask for small batches and no augmentation; with the recipes' batch
    sizes there would be too few steps to leave the first plateau of the loss.

    Args:
        full: Configuration for the recipe's own data set.
        data: ``"digits"`` or ``"digits-events"``.

    Returns:
        The same method with a narrower network, fewer epochs and smaller batches.

    """
    return full.but(
        data=data,
        size=32 if data == "digits-events" else SIZES[full.network],
        width=0.125,
        epochs=10,
        batch=16,
        lr=0.5 if full.optimizer == "sgd" else full.lr,
        augment=False,
        workers=0,
        precision="32-true",
        memory_format="contiguous",
    )
