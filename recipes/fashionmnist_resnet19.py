"""Fashion-MNIST with ResNet19 under the protocol of CIFAR-10.

python -m recipes.fashionmnist_resnet19 --bits 1w-2u
"""

from __future__ import annotations

from recipes.config import Config
from recipes.engine.cli import main
from recipes.small import on_digits


def config(data: str = "fashionmnist", as_published: bool = False) -> Config:
    """As for CIFAR-10; the paper has no Fashion-MNIST."""
    full = Config(
        recipe="fashionmnist_resnet19",
        data="fashionmnist",
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
