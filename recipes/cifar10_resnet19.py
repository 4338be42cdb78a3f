"""CIFAR-10 with ResNet19: the paper's protocol, one line per row of its Table 1.

python -m recipes.cifar10_resnet19 --bits 1w-2u
"""

from __future__ import annotations

from recipes.config import Config
from recipes.engine.cli import main
from recipes.small import on_digits


def config(data: str = "cifar10", as_published: bool = False) -> Config:
    """SGD at 0.1 with cosine decay, batch 256, T = 2 (paper); 300 epochs (authors' code)."""
    full = Config(
        recipe="cifar10_resnet19",
        data="cifar10",
        network="resnet19",
        steps=2,
        optimizer="sgd",
        lr=0.1,
        batch=256,
        epochs=300,
        as_published=as_published,
    )
    return on_digits(full, data) if data.startswith("digits") else full.but(data=data)


if __name__ == "__main__":
    main(config, text=__doc__)
