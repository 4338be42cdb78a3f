"""N-MNIST with VGGSNN.

python -m recipes.nmnist_vggsnn --bits 1w-2u
"""

from __future__ import annotations

from recipes.config import Config
from recipes.engine.cli import main
from recipes.small import on_digits


def config(data: str = "nmnist", as_published: bool = False) -> Config:
    """SGD at 0.1 with cosine decay, batch 256, T = 10; the paper has no N-MNIST."""
    full = Config(
        recipe="nmnist_vggsnn",
        data="nmnist",
        network="vggsnn",
        steps=10,
        optimizer="sgd",
        lr=0.1,
        batch=256,
        epochs=300,
        as_published=as_published,
    )
    return on_digits(full, data) if data.startswith("digits") else full.but(data=data)


if __name__ == "__main__":
    main(config, text=__doc__)
