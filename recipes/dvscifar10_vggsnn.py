"""DVS-CIFAR10 with VGGSNN: the paper's protocol, one line per row of its Table 1.

python -m recipes.dvscifar10_vggsnn --bits 1w-2u
"""

from __future__ import annotations

from recipes.config import Config
from recipes.engine.cli import main
from recipes.small import on_digits


def config(data: str = "dvscifar10", as_published: bool = False) -> Config:
    """SGD at 0.1 with cosine decay, batch 64, T = 10 (paper); 300 epochs (authors' code)."""
    full = Config(
        recipe="dvscifar10_vggsnn",
        data="dvscifar10",
        network="vggsnn",
        steps=10,
        optimizer="sgd",
        lr=0.1,
        batch=64,
        epochs=300,
        as_published=as_published,
    )
    return on_digits(full, data) if data.startswith("digits") else full.but(data=data)


if __name__ == "__main__":
    main(config, text=__doc__)
