"""Data loading whose every random draw depends on seed, epoch and sample alone.

Order and augmentation are functions of those three, so neither the number of worker processes nor
an interruption changes what the network sees.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, default_collate

from qsnn_ext.errors import ConfigError, TrainingError
from recipes.config import Config
from recipes.engine import setting


def mix(*parts: int) -> int:
    """One 32-bit seed from several numbers, such as seed, epoch and sample."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's CPU generators, and put them back afterwards."""
    python, numpy, state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    # Not torch.manual_seed, which would also reseed the accelerators.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(state)


class Draw(NamedTuple):
    """A sample to fetch and the seed of its augmentation."""

    index: int
    seed: int


class EpochSampler(Sampler[Draw]):
    """One process's share of an epoch.

    Args:
        size: Samples in the data set.
        seed: Seed of the run.
        shuffle: Another order each epoch (training), or the data set's own (testing).
        rank: This process's number.
        world: Number of processes. In training all shares are equally long; in testing each
            sample is in exactly one.

    """

    def __init__(self, size: int, seed: int, shuffle: bool, rank: int = 0, world: int = 1) -> None:
        self.size, self.seed, self.shuffle, self.rank, self.world = size, seed, shuffle, rank, world
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        share = self.size // self.world
        return share if self.shuffle else share + (self.rank < self.size % self.world)

    def __iter__(self) -> Iterator[Draw]:
        epoch = self.epoch if self.shuffle else 0
        order = torch.arange(self.size)
        if self.shuffle:
            generator = torch.Generator().manual_seed(mix(self.seed, epoch))
            order = torch.randperm(self.size, generator=generator)
        for index in order[self.rank :: self.world][: len(self)].tolist():
            yield Draw(index, mix(self.seed, epoch, index))


class EvenBatches(Sampler[list[Draw]]):
    """A sampler's draws in a given number of batches, whose sizes differ by one at most.

    Args:
        sampler: Where the draws come from.
        count: Number of batches.

    """

    def __init__(self, sampler: EpochSampler, count: int) -> None:
        self.sampler, self.count = sampler, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[Draw]]:
        draws = list(self.sampler)
        for batch in range(self.count):
            start, end = (len(draws) * k // self.count for k in (batch, batch + 1))
            yield draws[start:end]


class SeededDataset(Dataset[tuple[torch.Tensor, int]]):
    """A data set whose samples are fetched under their own seed and whose labels are checked.

    Args:
        samples: The data set.
        classes: Labels must lie in ``0 .. classes - 1``.
        name: What to call it in an error.

    """

    def __init__(self, samples: Any, classes: int, name: str) -> None:
        self.samples, self.classes, self.name = samples, classes, name

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, draws: list[Draw]) -> Any:
        """A batch: made at once where the data set can, else sample by sample."""
        if not self.batched:
            return [self[draw] for draw in draws]
        x, labels = self.samples.batch([d.index for d in draws], [d.seed for d in draws])
        wrong = ((labels < 0) | (labels >= self.classes)).nonzero()
        if len(wrong):
            self._refuse(draws[int(wrong[0])].index, int(labels[wrong[0]]))
        return x, labels

    @property
    def batched(self) -> bool:
        """Whether whole batches come from the data set, as two tensors."""
        return hasattr(self.samples, "batch")

    def _refuse(self, index: int, label: int) -> None:
        raise TrainingError(
            f"Sample {index} of {self.name} has label {label}, but there are only "
            f"{self.classes} classes (0 to {self.classes - 1}). Check the data set."
        )

    def __getitem__(self, draw: Draw) -> tuple[torch.Tensor, int]:
        with seeded(draw.seed):
            x, label = self.samples[draw.index]
        if not 0 <= int(label) < self.classes:
            self._refuse(draw.index, int(label))
        return x, int(label)


def _as_it_is(batch: Any) -> Any:
    return batch


class Loading(LightningDataModule):
    """The train and test loaders of a run.

    Args:
        config: The run.
        train: Training set of (x, label).
        test: Test set of (x, label).
        classes: Number of classes.
        held_out: Samples that epochs are judged by, if not by the test set.
        collate: How samples become a batch; none stacks them along a new first dimension.

    """

    def __init__(
        self,
        config: Config,
        train: Any,
        test: Any,
        classes: int,
        collate: Any = None,
        held_out: Any = None,
    ) -> None:
        super().__init__()
        self.config, self.collate = config, collate or default_collate
        self.train = SeededDataset(train, classes, f"the {config.data} training set")
        self.test = SeededDataset(test, classes, f"the {config.data} test set")
        self.found = ""  # in words, what was found where
        self.held_out = None
        if held_out is not None:
            name = f"the held-out part of the {config.data} training set"
            self.held_out = SeededDataset(held_out, classes, name)
        for part in (self.train, self.test, self.held_out):
            if part is None:
                continue
            if len(part) == 0:
                raise ConfigError(f"{part.name} is empty: check the data set.")

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled; the incomplete last batch is left out, as batch norm suffers from it."""
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """What epochs are judged by, in its own order: held-out samples, or the test set."""
        return self._loader(self.held_out or self.test, shuffle=False)

    def test_dataloader(self) -> DataLoader[Any]:
        """The whole test set in its own order."""
        return self._loader(self.test, shuffle=False)

    def _loader(self, samples: SeededDataset, shuffle: bool) -> DataLoader[Any]:
        rank = self.trainer.global_rank if self.trainer else 0
        world = self.trainer.world_size if self.trainer else 1
        config = self.config
        sampler = EpochSampler(len(samples), config.seed, shuffle, rank, world)
        # A resumed run's workers begin to fetch before the Trainer tells the sampler its epoch.
        if shuffle and self.trainer:
            sampler.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)
        batches: Sampler[list[Draw]]
        if shuffle:
            batches = BatchSampler(sampler, config.batch, drop_last=len(sampler) >= config.batch)
        else:
            # As many batches in every process, because they may wait for each other in each.
            count = math.ceil(math.ceil(len(samples) / world) / config.batch)
            batches = EvenBatches(sampler, count)
        if len(batches) == 0 or len(sampler) < len(batches):  # type: ignore[arg-type]
            raise ConfigError(
                f"{samples.name} has too few samples ({len(samples)}) for {world} processes."
            )
        processes = setting.workers(config, samples.batched)
        return DataLoader(
            samples,
            batch_sampler=batches,
            num_workers=processes,
            persistent_workers=processes > 0,
            collate_fn=_as_it_is if samples.batched else self.collate,
            pin_memory=torch.cuda.is_available(),
        )
