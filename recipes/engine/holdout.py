"""Training images kept aside, so that choices need not be made on the test set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Subset

from qsnn_ext.errors import ConfigError

# Not the run's seed: all runs keep the same images aside, so that they can be compared.
_SEED = 20


def split(labels: Sequence[int], count: int) -> tuple[list[int], list[int]]:
    """Divide samples so that the part kept aside has as many of each class as can be.

    Args:
        labels: Class of every sample.
        count: How many to keep aside.

    Returns:
        Indices to train on, ascending, and indices kept aside, the classes taking turns.

    Raises:
        ConfigError: Nothing would be left of a class.

    """
    classes = sorted(set(labels))
    generator = torch.Generator().manual_seed(_SEED)
    aside: list[tuple[int, int]] = []
    targets = torch.tensor(labels)
    for rank, label in enumerate(classes):
        # 5,000 of 10 classes are 500 each; what does not divide goes to the first classes.
        wanted = count // len(classes) + (rank < count % len(classes))
        own = torch.nonzero(targets == label).flatten()
        if wanted >= len(own):
            raise ConfigError(
                f"--holdout {count} would leave nothing of class {label}, which has {len(own)} "
                "training samples; hold out fewer."
            )
        order = torch.randperm(len(own), generator=generator)[:wanted]
        aside += enumerate(own[order].tolist())
    kept = [index for _, index in sorted(aside, key=lambda pair: pair[0])]
    left_out = set(kept)
    return [i for i in range(len(labels)) if i not in left_out], kept


class BatchedPart(Subset[Any]):
    """Some samples of a data set that makes whole batches."""

    def batch(self, indices: Sequence[int], seeds: Sequence[int]) -> Any:
        """Several samples at once, as the data set gives them."""
        return self.dataset.batch([self.indices[i] for i in indices], seeds)  # type: ignore[attr-defined]


def part(samples: Any, indices: list[int]) -> Subset[Any]:
    """Some samples of a data set; whole batches of them if that makes such."""
    return (BatchedPart if hasattr(samples, "batch") else Subset)(samples, indices)
