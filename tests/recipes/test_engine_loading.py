"""Every random draw of the loaders depends on seed, epoch and sample alone."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from qsnn_ext.errors import TrainingError
from recipes.config import Config
from recipes.engine.loading import EpochSampler, Loading, SeededDataset, mix, seeded


class Noisy(Dataset):
    """Samples made of every generator an augmentation might use."""

    def __init__(self, size=23, label=1):
        self.size, self.label = size, label

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        noise = [float(index), random.random(), np.random.rand(), torch.rand(()).item()]
        return torch.tensor(noise), self.label


def epoch_of(config, epoch):
    loader = Loading(config, Noisy(), Noisy(), 2).train_dataloader()
    loader.batch_sampler.sampler.set_epoch(epoch)
    return [x for x, _ in loader]


def test_workers_change_nothing():
    config = Config(batch=4, seed=3)
    alone = epoch_of(config.but(workers=0), 1)
    helped = epoch_of(config.but(workers=2), 1)
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))
    assert len(alone) == 5  # the incomplete sixth batch is left out


def test_epochs_and_seeds_differ():
    config = Config(batch=4, workers=0)
    first = torch.cat(epoch_of(config, 0))
    assert torch.equal(first, torch.cat(epoch_of(config, 0)))
    for other in (epoch_of(config, 1), epoch_of(config.but(seed=1), 0)):
        assert not torch.equal(first, torch.cat(other))


def test_a_batch_larger_than_the_set_is_not_left_out():
    assert [len(x) for x in epoch_of(Config(batch=64, workers=0), 0)] == [23]


def test_fetching_a_sample_leaves_the_generators_alone():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = draw()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    with seeded(5):
        inside = draw()
    assert draw() == expected
    assert inside != expected


@pytest.mark.parametrize("size", [8, 9, 11])
def test_shares_of_four_processes(size):
    train = [list(EpochSampler(size, 0, True, rank, 4)) for rank in range(4)]
    assert {len(share) for share in train} == {size // 4}
    indices = [draw.index for share in train for draw in share]
    assert len(set(indices)) == len(indices)
    test = [EpochSampler(size, 0, False, rank, 4) for rank in range(4)]
    assert sorted(d.index for share in test for d in share) == list(range(size))
    assert sum(len(share) for share in test) == size


@pytest.mark.parametrize(("size", "batch"), [(51, 25), (52, 13), (7, 100)])
def test_processes_test_in_step(size, batch):
    loaders = []
    for rank in (0, 1):
        loading = Loading(Config(batch=batch, workers=0), Noisy(), Noisy(size), 2)
        loading.trainer = type("Pair", (), {"global_rank": rank, "world_size": 2})
        loaders.append(list(loading.val_dataloader()))
    assert len(loaders[0]) == len(loaders[1])
    assert all(1 <= len(labels) <= batch for share in loaders for _, labels in share)
    assert sorted(i for share in loaders for x, _ in share for i in x[:, 0]) == list(range(size))


def test_a_share_of_one_process_is_the_union_of_two():
    whole = list(EpochSampler(8, 0, True))
    halves = [list(EpochSampler(8, 0, True, rank, 2)) for rank in (0, 1)]
    assert [d for pair in zip(*halves, strict=True) for d in pair] == whole


@pytest.mark.parametrize("label", [-1, 2])
def test_labels_out_of_range(label):
    samples = SeededDataset(Noisy(label=label), 2, "the toy training set")
    sampler = iter(EpochSampler(23, 0, False))
    with pytest.raises(TrainingError, match=rf"toy training set has label {label}.*0 to 1"):
        samples[next(sampler)]


def test_mix_tells_its_parts_apart():
    assert len({mix(a, b) for a in range(30) for b in range(30)}) == 900
    assert mix(1, 2) != mix(2, 1)
