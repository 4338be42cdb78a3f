"""Why plain binary weights hardly train by SGD in a few hundred steps: their signs stand still.

    python -m recipes.sign_flips

Trains the narrow ResNet19 of the demo for 170 steps, with the latent weights in a parameter group
of their own, and counts the signs that change per step. Writes ``recipes/results/sign_flips.csv``.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import nn

from qsnn_ext import BinaryWeight, kernels
from recipes import cifar10_resnet19
from recipes import data as datasets
from recipes.config import Config
from recipes.engine import networks
from recipes.engine.cli import call

# Whether weights are standardised; learning rate of the latent weights, where all others have 0.1.
CASES = ((True, 0.1), (True, 0.3), (False, 0.01), (False, 0.1), (False, 1.0), (False, 5.0))
OUT = Path(__file__).parent / "results" / "sign_flips.csv"


def run(config: Config, rate: float, steps: int) -> dict[str, Any]:
    """Train for some steps and count.

    Args:
        config: The demo's configuration, with or without weight regulation.
        rate: Learning rate of the latent weights of binary layers.
        steps: Optimizer steps.

    Returns:
        Share of signs changed per step (first ten and last twenty steps), loss and training
        accuracy (%) over the last twenty.
    """
    torch.manual_seed(config.seed)
    options = networks.data_options(config)
    spec = datasets.spec(config.data, **options)
    train, _ = datasets.datasets(config.data, config.data_dir, augment=False, **options)
    images = torch.stack([torch.as_tensor(x) for x, _ in train])
    labels = torch.tensor([y for _, y in train])
    model = networks.build(config, spec)
    latent = [m.weight for m in model.modules() if _is_binary(m)]
    others = [p for p in model.parameters() if not any(p is w for w in latent)]
    groups = [{"params": latent, "lr": rate}, {"params": others}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=config.momentum)
    flips, losses, right = [], [], []
    for _ in range(steps):
        chosen = torch.randint(len(labels), (config.batch,))
        before = [w.detach() >= 0 for w in latent]
        logits = model(images[chosen]).mean(0)
        loss = nnf.cross_entropy(logits, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        changed = sum(((w >= 0) != b).sum().item() for w, b in zip(latent, before, strict=True))
        flips.append(changed / sum(w.numel() for w in latent))
        losses.append(loss.item())
        right.append((logits.argmax(1) == labels[chosen]).float().mean().item())
    return {
        "standardised": "layer" if config.standardized else "no",
        "latent rate": rate,
        "flips first": round(sum(flips[:10]) / 10, 5),
        "flips last": round(sum(flips[-20:]) / 20, 5),
        "loss last": round(sum(losses[-20:]) / 20, 3),
        "accuracy last": round(100 * sum(right[-20:]) / 20, 1),
    }


def _is_binary(module: nn.Module) -> bool:
    return isinstance(getattr(module, "quantizer", None), BinaryWeight)


def main(steps: int = 170, out: Path = OUT) -> None:
    """Print and write the table.

    Args:
        steps: Optimizer steps of each case.
        out: CSV file to write.
    """
    base = cifar10_resnet19.config(data="digits").but(spike_regulation=False)
    rows = []
    with kernels.use_backend("function"):
        for standardized, rate in CASES:
            rows.append(run(base.but(weight_regulation=standardized), rate, steps))
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    call(main)
