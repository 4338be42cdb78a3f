"""CIFAR and TinyImageNet from tiny archives: present, absent, partial and corrupt."""

import dataclasses
import pickle
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from qsnn_ext.errors import DataError
from recipes.data import OFFICIAL, datasets
from recipes.data.files import md5_of
from recipes.data.images import Cutout
from tests.recipes import archives

FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
FILES = {"cifar10": "data_batch_3", "cifar100": "train"}
CIFAR = pytest.mark.parametrize("name", ["cifar10", "cifar100"])


@CIFAR
def test_cifar_gives_normalised_images_with_their_labels(tmp_path, name):
    facts = archives.make(name, tmp_path)
    train, test = datasets(name, tmp_path, facts=facts, augment=False)
    batch = {"cifar10": "test_batch", "cifar100": "test"}[name]
    raw = pickle.loads((tmp_path / FOLDERS[name] / batch).read_bytes())
    mean, std = {
        "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    }[name]
    assert (len(train), len(test)) == (facts.train, facts.test)
    for index in range(len(test)):
        image, label = test[index]
        pixels = raw["data"][index].reshape(3, 32, 32) / 255
        expected = (pixels - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
        np.testing.assert_allclose(image.numpy(), expected, atol=1e-5)
        assert image.dtype == torch.float32
        assert label == raw.get("labels", raw.get("fine_labels"))[index]


def test_published_facts_are_checked_unless_others_are_given(tmp_path):
    archives.make("cifar10", tmp_path)
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz is incomplete or damaged"):
        datasets("cifar10", tmp_path)
    assert OFFICIAL["cifar10"].train == 50_000
    assert OFFICIAL["cifar100"].test == 10_000


@CIFAR
def test_cifar_training_images_are_augmented_and_cut_out(tmp_path, name):
    facts = archives.make(name, tmp_path)
    torch.manual_seed(0)
    train, test = datasets(name, tmp_path, facts=facts)
    plain, _ = datasets(name, tmp_path, facts=facts, augment=False)
    images = torch.stack([train[i % len(train)][0] for i in range(40)])
    assert images.shape == (40, 3, 32, 32)
    assert not torch.equal(train[0][0], plain[0][0])
    # Every hole covers at least a quarter of 16x16, and is 0 in all channels at once.
    holes = (images == 0).all(1).flatten(1).sum(1)
    assert (holes >= 64).all()
    assert (holes <= 256).all()
    assert torch.equal(test[0][0], test[0][0])


@CIFAR
def test_absent_cifar_without_network(tmp_path, name):
    facts = archives.make(name, tmp_path / "made")
    with pytest.raises(
        DataError, match=r"was not found in .* could not be downloaded .* put it into"
    ):
        datasets(name, tmp_path / "empty", facts=facts)


@CIFAR
def test_absent_cifar_is_downloaded(tmp_path, name, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    facts = archives.make(name, tmp_path / "made")
    with archives.served(tmp_path / "made") as address:
        facts = archives.facts_at(facts, address)
        train, _ = datasets(name, tmp_path / "empty", facts=facts)
    assert len(train) == facts.train


@CIFAR
def test_half_unpacked_and_damaged_cifar_is_named(tmp_path, name):
    facts = archives.make(name, tmp_path)
    datasets(name, tmp_path, facts=facts)
    file = tmp_path / FOLDERS[name] / FILES[name]
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    with pytest.raises(DataError, match=rf"{FILES[name]} is damaged .*Delete .*{FOLDERS[name]}"):
        datasets(name, tmp_path, facts=facts)
    file.unlink()
    with pytest.raises(DataError, match=rf"{FILES[name]} is missing"):
        datasets(name, tmp_path, facts=facts)
    # The remedy in the message works.
    shutil.rmtree(tmp_path / FOLDERS[name])
    datasets(name, tmp_path, facts=facts)
    assert file.read_bytes() == whole


def test_wrong_counts_and_labels_are_noticed(tmp_path):
    facts = archives.make("cifar10", tmp_path)
    with pytest.raises(DataError, match=r"has 20 training images .* expected 25"):
        datasets("cifar10", tmp_path, facts=dataclasses.replace(facts, train=25))
    facts = archives.make_cifar("cifar10", tmp_path / "b", per_batch=20, classes=40)
    with pytest.raises(DataError, match=r"labels outside 0\.\.9"):
        datasets("cifar10", tmp_path / "b", facts=facts)


def test_tinyimagenet_takes_validation_classes_from_its_table(tmp_path):
    facts = archives.make("tinyimagenet", tmp_path)
    train, test = datasets("tinyimagenet", tmp_path, facts=facts, augment=False)
    assert (len(train), len(test)) == (12, 6)
    # The red level tells the class: classes are sorted by WordNet id, not as wnids.txt lists them.
    for image, label in [*(test[i] for i in range(6)), *(train[i] for i in (0, 4, 8))]:
        assert image.shape == (3, 64, 64)
        red = image[0].mean().item() * 0.2770 + 0.4802
        assert red * 255 == pytest.approx((40, 120, 200)[label], abs=8)
    grey = train[3][0]
    assert grey.shape == (3, 64, 64)
    augmented, _ = datasets("tinyimagenet", tmp_path, facts=facts)
    torch.manual_seed(1)
    assert not torch.equal(augmented[0][0], augmented[0][0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "wnids.txt").unlink(), r"wnids\.txt is missing"),
        (lambda f: (f / "wnids.txt").write_text(""), r"wnids\.txt is empty"),
        (lambda f: shutil.rmtree(f / "train/n02"), "class n02 has 0 training images, expected 4"),
        (
            lambda f: (f / "train/n01/images/n01_2.JPEG").write_bytes(b""),
            "class n01 has 3 training images, expected 4",
        ),
        (lambda f: (f / "val/images/val_3.JPEG").unlink(), r"val_3\.JPEG is missing or empty"),
        (lambda f: (f / "val/val_annotations.txt").unlink(), r"val_annotations\.txt is missing"),
        (
            lambda f: (f / "val/val_annotations.txt").write_text("val_0.JPEG\tn01\n"),
            "lists 1 images, expected 6",
        ),
        (
            lambda f: (f / "val/val_annotations.txt").write_text("val_0.JPEG\tn99\n" * 6),
            "without a known class",
        ),
    ],
)
def test_half_unpacked_tinyimagenet_is_named(tmp_path, damage, message):
    facts = archives.make("tinyimagenet", tmp_path)
    datasets("tinyimagenet", tmp_path, facts=facts)
    damage(tmp_path / "tiny-imagenet-200")
    with pytest.raises(DataError, match=message):
        datasets("tinyimagenet", tmp_path, facts=facts)


def test_a_truncated_image_is_named_and_not_trained_on(tmp_path):
    facts = archives.make("tinyimagenet", tmp_path)
    train, _ = datasets("tinyimagenet", tmp_path, facts=facts)
    path = train.paths[5]
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match=path.name):
        train[5]
    path.write_bytes(b"no image at all")
    with pytest.raises(DataError, match=path.name):
        train[5]


def test_absent_tinyimagenet_and_an_archive_cut_short(tmp_path):
    with pytest.raises(DataError, match=r"get tiny-imagenet-200\.zip from http"):
        datasets("tinyimagenet", tmp_path, download=False)
    facts = archives.make("tinyimagenet", tmp_path)
    archive = tmp_path / "tiny-imagenet-200.zip"
    archive.write_bytes(archive.read_bytes()[:-100])
    assert md5_of(archive) != facts.archives[0].md5
    with pytest.raises(DataError, match="interrupted download"):
        datasets("tinyimagenet", tmp_path, facts=facts)
    assert not (tmp_path / "tiny-imagenet-200").exists()


def test_cutout_is_one_square_clipped_at_the_border():
    torch.manual_seed(0)
    sizes = set()
    for _ in range(300):
        image = torch.ones(3, 32, 32)
        hole = Cutout(16)(image)
        assert image.all()
        assert torch.equal(hole[0], hole[1])
        rows, columns = torch.nonzero(hole[0] == 0).unbind(1)
        height = int(rows.max() - rows.min()) + 1
        width = int(columns.max() - columns.min()) + 1
        assert len(rows) == height * width
        assert 8 <= height <= 16
        assert 8 <= width <= 16
        sizes.add((height, width))
    assert (16, 16) in sizes
    assert len(sizes) > 20


def test_workers_repeat_with_the_same_seed(tmp_path):
    facts = archives.make("cifar10", tmp_path)
    train, _ = datasets("cifar10", tmp_path, facts=facts)

    def epoch(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        loader = DataLoader(train, 5, shuffle=True, num_workers=2, generator=generator)
        return torch.cat([images for images, _ in loader])

    first = epoch(3)
    assert torch.equal(first, epoch(3))
    assert not torch.equal(first, epoch(4))
