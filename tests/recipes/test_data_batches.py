"""Augmentation of whole batches: per image, reproducible, and what torchvision does to one."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from recipes.data import policy
from recipes.data.batches import BatchTransform, Draws, crop_and_flip, cutout

rng = np.random.default_rng(0)
IMAGES = rng.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
SEEDS = rng.integers(0, 2**32, 40).tolist()
FULL = BatchTransform((0.5,) * 3, (0.25,) * 3, padding=4, flip=True, policy=True, hole=16)


def test_draws_are_uniform_and_independent():
    draws = Draws(np.arange(20_000))
    first, second = draws.uniform(), draws.uniform()
    for numbers in (first, second):
        assert abs(numbers.mean() - 0.5) < 0.01
        assert abs(numbers.var() - 1 / 12) < 0.003
        assert ((numbers >= 0) & (numbers < 1)).all()
        assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.03  # neighbouring seeds
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
    counts = np.bincount(Draws(np.arange(9000)).integers(9))
    assert len(counts) == 9
    assert counts.min() > 850


def test_an_images_augmentation_depends_on_its_seed_alone():
    together = FULL(IMAGES, SEEDS)
    for i in (0, 7, 39):
        assert torch.equal(FULL(IMAGES[i : i + 1], SEEDS[i : i + 1])[0], together[i])
    order = rng.permutation(40)
    shuffled = FULL(IMAGES[order], [SEEDS[i] for i in order])
    assert torch.equal(shuffled, together[torch.from_numpy(order)])


def test_every_crop_is_a_shifted_window_and_all_shifts_occur():
    image = np.arange(1, 65, dtype=np.uint8).reshape(1, 8, 8, 1)
    many = np.repeat(image, 3000, 0)
    cropped = crop_and_flip(many, Draws(np.arange(3000)), 2, flip=True)
    padded = np.pad(image[0], ((2, 2), (2, 2), (0, 0)))
    windows = {}
    for top in range(5):
        for left in range(5):
            window = padded[top : top + 8, left : left + 8]
            windows[window.tobytes()] = windows[window[:, ::-1].tobytes()] = 0
    for crop in cropped:
        windows[crop.tobytes()] += 1  # KeyError: no such window
    assert min(windows.values()) > 20
    assert max(windows.values()) < 120


def test_without_padding_and_flip_nothing_moves():
    plain = BatchTransform((0.5,) * 3, (0.25,) * 3)
    x = plain(IMAGES, SEEDS)
    expected = (IMAGES.astype(np.float64) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(x.permute(0, 2, 3, 1), expected, atol=1e-5)
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_holes_are_squares_clipped_at_the_border():
    holes = cutout(torch.ones(2000, 32, 32, 1), Draws(np.arange(2000)), 16)[..., 0] == 0
    for hole in holes:
        rows, columns = hole.any(1), hole.any(0)
        assert torch.equal(hole, rows[:, None] & columns)
        assert 8 <= rows.sum() <= 16
        assert 8 <= columns.sum() <= 16
    assert holes.any(0).all()


@pytest.mark.parametrize("index", range(25))
def test_every_sub_policy_is_torchvisions(index):
    theirs = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, fill=[128, 128, 128])
    images = torch.from_numpy(IMAGES[:3]).permute(0, 3, 1, 2)
    pairs = zip(policy._POLICY[index], theirs._policies[index], strict=True)
    for (operation, probability, level), (name, odds, bin_) in pairs:
        assert operation.replace("_", "") == name.lower()
        assert (probability, level) == (odds, bin_ or 0)
        strengths, signed = theirs._AUGMENTATION_SPACE[name]
        strengths = strengths(10, 32, 32)
        assert policy._OPERATIONS[operation][1] == signed
        for sign in (1, -1) if signed else (1,):
            strength = 0.0 if strengths is None else sign * float(strengths[level])
            expected = theirs._apply_image_or_video_transform(
                images, name, strength, theirs.interpolation, theirs._fill
            )
            # A strength in float32 may round a value the other way.
            difference = policy.apply(images, operation, level, sign).int() - expected.int()
            assert difference.abs().max() <= 1


def test_sub_policies_are_drawn_alike():
    """Counted by what half of a policy does: seeds give all 25, with their probabilities."""
    seen = []
    original, policy_apply = policy.apply, policy._POLICY

    def counting(images, operation, level, sign=1):
        seen.extend([(operation, level)] * len(images))
        return images

    policy.apply = counting
    try:
        policy.autoaugment(np.zeros((5000, 4, 4, 3), np.uint8), Draws(np.arange(5000)))
    finally:
        policy.apply = original
    for key in {half[::2] for pair in policy_apply for half in pair}:
        wanted = sum(p for pair in policy_apply for o, p, v in pair if (o, v) == key) / 25 * 5000
        assert abs(seen.count(key) - wanted) < 5 * max(wanted, 1) ** 0.5
