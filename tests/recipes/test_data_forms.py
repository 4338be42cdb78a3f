"""CIFAR as a folder per class, zip and Parquet; Fashion-MNIST; N-MNIST: whole, partial, hostile."""

import dataclasses
import gzip
import io
import shutil
import struct
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from qsnn_ext.errors import DataError, MissingDependencyError
from recipes.data import OFFICIAL, arrays, datasets, fashionmnist, folders, nmnist, parquet

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PER_CLASS = {"train": 3, "test": 2}


def pictures(split, seed=0):
    """uint8 [class, place, 32, 32, 3]; the red level tells the class."""
    rng = np.random.default_rng([seed, split == "test"])
    made = rng.integers(0, 256, (10, PER_CLASS[split], 32, 32, 3), dtype=np.uint8)
    made[..., 0] = 20 * np.arange(10)[:, None, None, None]
    return made


def encoded(picture, form="png"):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, form, lossless=True)
    return file.getvalue()


def facts(name="cifar10"):
    mean = tuple(arrays.channel_means(pictures("train").reshape(-1, 32, 32, 3)))
    counts = {split: 10 * n for split, n in PER_CLASS.items()}
    return dataclasses.replace(OFFICIAL[name], **counts, mean=mean)


def files(suffix="png"):
    form = {"jpg": "jpeg"}.get(suffix, suffix)
    return {
        f"{split}/{name}/{place:04d}.{suffix}": encoded(pictures(split)[rank, place], form)
        for split, n in PER_CLASS.items()
        for rank, name in enumerate(CLASSES)
        for place in range(n)
    }


def make_folder(root, suffix="png"):
    for name, data in files(suffix).items():
        path = root / "cifar10" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root / "cifar10"


def make_zip(root, content=None, top="cifar10/"):
    root.mkdir(exist_ok=True)
    with zipfile.ZipFile(root / "cifar10.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in (content or files()).items():
            archive.writestr(top + name, data)
    return root / "cifar10.zip"


def load(root, **options):
    return datasets("cifar10", root, facts=facts(), augment=False, **options)


def assert_right(train, test):
    mean, std = np.array((0.4914, 0.4822, 0.4465)), np.array((0.2023, 0.1994, 0.2010))
    for split, part in (("train", train), ("test", test)):
        assert len(part) == 10 * PER_CLASS[split]
        assert part.labels == list(range(10)) * PER_CLASS[split]  # the classes take turns
        for index in range(len(part)):
            image, label = part[index]
            expected = (pictures(split)[label, index // 10] / 255 - mean) / std
            np.testing.assert_allclose(image.numpy(), expected.transpose(2, 0, 1), atol=1e-5)


# --- folders and zips ----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "webp", "bmp"])
def test_a_folder_per_class_is_read(tmp_path, suffix):
    make_folder(tmp_path, suffix)
    assert_right(*load(tmp_path))


def test_the_data_directory_may_be_the_folder_itself(tmp_path):
    assert_right(*load(make_folder(tmp_path), cache=tmp_path / "cache"))


@pytest.mark.parametrize("top", ["cifar10/", ""])
def test_a_zip_is_read_as_it_lies(tmp_path, top):
    make_zip(tmp_path, top=top)
    assert_right(*load(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {"cifar10.zip", "cache"}


def test_superclasses_hidden_files_and_lists_are_passed_over(tmp_path):
    folder = make_folder(tmp_path)
    for split in PER_CLASS:
        (folder / split / "animals").mkdir()
        for name in ("bird", "cat"):
            shutil.move(folder / split / name, folder / split / "animals" / name)
    (folder / "labels.txt").write_text("airplane")
    (folder / "train" / "dog" / ".DS_Store").write_bytes(b"x")
    (folder / "train" / "dog" / "Thumbs.db").write_bytes(b"x")
    assert_right(*load(tmp_path))


def test_what_was_found_is_said(tmp_path):
    path = make_zip(tmp_path)
    train, test = load(tmp_path)
    assert train.found == test.found
    for part in (f"zip file per class {path}", "30 + 20 images of 32x32", "as published"):
        assert part in train.found


def test_decoding_happens_once(tmp_path, monkeypatch):
    make_zip(tmp_path)
    load(tmp_path)
    monkeypatch.setattr(folders, "decode", None)
    assert_right(*load(tmp_path))


def test_another_zip_is_decoded_anew_and_a_damaged_cache_too(tmp_path):
    make_zip(tmp_path)
    load(tmp_path)
    (cache,) = (tmp_path / "cache").iterdir()
    data = bytearray((cache / "train.npy").read_bytes())
    data[-5] ^= 1
    (cache / "train.npy").write_bytes(data)
    assert_right(*load(tmp_path))
    changed = files() | {"train/cat/0001.png": encoded(pictures("train", seed=9)[3, 1])}
    make_zip(tmp_path, changed)
    train, _ = load(tmp_path)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert not np.array_equal(train.images[13], pictures("train")[3, 1])


def test_partial_folders_are_refused_by_name(tmp_path):
    folder = make_folder(tmp_path)
    (folder / "train" / "deer" / "0001.png").unlink()
    with pytest.raises(DataError, match=r"2 train images of class 'deer', but CIFAR-10 has 3"):
        load(tmp_path)
    shutil.rmtree(folder / "test" / "ship")
    shutil.copytree(folder / "train" / "frog", folder / "train" / "deer", dirs_exist_ok=True)
    with pytest.raises(DataError, match="has 9 folders of test classes"):
        load(tmp_path)
    shutil.copytree(folder / "test" / "frog", folder / "test" / "boat")
    with pytest.raises(DataError, match=r"other classes in test than in train: .*boat.*ship"):
        load(tmp_path)


def test_foreign_files_are_refused_by_name(tmp_path):
    folder = make_folder(tmp_path)
    (folder / "train" / "dog" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"train/dog/notes\.txt is not a picture"):
        load(tmp_path)
    (folder / "train" / "dog" / "notes.txt").rename(folder / "train" / "0001.png")
    with pytest.raises(DataError, match=r"train/0001\.png lies beside the classes"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is damaged"),
        (encoded(pictures("train")[0, 0])[:-300], "is damaged"),
        (encoded(np.zeros((33, 32, 3), np.uint8)), "has 32x33 pixels, expected 32x32"),
        (b"\x89PNG" + bytes(2 << 20), "has more than 1,048,576 bytes"),
    ],
    ids=["empty", "cut", "size", "bomb"],
)
def test_damaged_pictures_are_refused_by_name(tmp_path, data, message):
    make_zip(tmp_path, files() | {"train/horse/0002.png": data})
    with pytest.raises(DataError, match=rf"cifar10\.zip: train/horse/0002\.png.*{message}"):
        load(tmp_path)
    assert not list((tmp_path / "cache").glob("cifar10*"))  # nothing that looks complete


def test_a_picture_that_declares_a_huge_size_is_not_decoded(tmp_path):
    bomb = bytearray(encoded(np.zeros((32, 32, 3), np.uint8), "bmp"))
    bomb[18:26] = struct.pack("<ii", 60_000, 60_000)
    make_zip(tmp_path, files() | {"train/horse/0002.bmp": bytes(bomb)} | {})
    with pytest.raises(DataError, match="4 train images of class 'horse'"):
        load(tmp_path)
    content = files()
    del content["train/horse/0002.png"]
    make_zip(tmp_path, content | {"train/horse/0002.bmp": bytes(bomb)})
    with pytest.raises(DataError, match=r"0002\.bmp.*(60000x60000|damaged)"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["../evil/train/cat/1.png", "/train/cat/1.png", "a\\..\\1.png"])
def test_names_that_lead_outside_are_refused(tmp_path, name):
    make_zip(tmp_path, files() | {name: b"x"}, top="")
    with pytest.raises(DataError, match="leads outside"):
        load(tmp_path)


def test_a_damaged_zip_is_refused(tmp_path):
    path = make_zip(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cifar10\.zip is damaged"):
        load(tmp_path)
    spoilt = bytearray(whole)
    spoilt[200:240] = bytes(40)
    path.write_bytes(spoilt)
    with pytest.raises(DataError, match=r"train/airplane/\d+\.png"):
        load(tmp_path)


def test_other_pictures_are_refused_by_their_mean(tmp_path):
    make_folder(tmp_path)
    swapped = dataclasses.replace(facts(), mean=facts().mean[::-1])
    with pytest.raises(DataError, match="colours are exchanged"):
        datasets("cifar10", tmp_path, facts=swapped)


# --- Parquet -------------------------------------------------------------------------------------


def make_parquet(root, name="cifar10", shards=2, label="label", column="img"):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    (root / name / "plain_text").mkdir(parents=True)
    for split, n in PER_CLASS.items():
        made = pictures(split).swapaxes(0, 1).reshape(-1, 32, 32, 3)
        rows = [
            {column: {"bytes": encoded(picture), "path": None}, label: i % 10}
            for i, picture in enumerate(made)
        ]
        assert len(rows) == 10 * n
        for k in range(shards):
            path = root / name / "plain_text" / f"{split}-{k:05d}-of-{shards:05d}.parquet"
            part = rows[k * len(rows) // shards : (k + 1) * len(rows) // shards]
            pq.write_table(pa.Table.from_pylist(part), path)
    return root / name / "plain_text"


@pytest.mark.parametrize("shards", [1, 3])
def test_parquet_is_read_and_kept(tmp_path, shards, monkeypatch):
    make_parquet(tmp_path, shards=shards)
    assert_right(*load(tmp_path))
    monkeypatch.setattr(parquet, "read", None)
    train, _ = load(tmp_path)
    assert "Parquet files in" in train.found


def test_cifar100_takes_fine_labels(tmp_path):
    make_parquet(tmp_path, "cifar100", label="fine_label")
    with pytest.raises(DataError, match=r"30 train images of class|of each"):
        datasets("cifar100", tmp_path, facts=facts("cifar100"), augment=False)
    shutil.rmtree(tmp_path / "cifar100")
    make_parquet(tmp_path, "cifar100")
    with pytest.raises(DataError, match=r"has the columns img, label; expected .* fine_label"):
        datasets("cifar100", tmp_path, facts=facts("cifar100"))


def hundred(split):
    """One picture of each of 100 classes, whose green level tells the class."""
    made = np.random.default_rng(split == "test").integers(0, 256, (100, 32, 32, 3), np.uint8)
    made[..., 1] = 2 * np.arange(100)[:, None, None]
    return made


def make_cifar100(root, form):
    """CIFAR-100 with one picture a class, in 20 superclasses of five; returns the facts."""
    if form == "parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq
    for split in PER_CLASS:
        if form == "parquet":
            rows = [
                {
                    "img": {"bytes": encoded(p), "path": None},
                    "fine_label": i,
                    "coarse_label": i // 5,
                }
                for i, p in enumerate(hundred(split))
            ]
            path = root / "cifar100" / "cifar100" / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), path)
            continue
        for i, picture in enumerate(hundred(split)):
            above = f"super{i // 5:02d}/" if form == "superclasses" else ""
            path = root / "cifar100" / split / f"{above}class{i:02d}" / "0.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(picture))
    mean = tuple(arrays.channel_means(hundred("train")))
    return dataclasses.replace(OFFICIAL["cifar100"], train=100, test=100, mean=mean)


@pytest.mark.parametrize("form", ["parquet", "folder", "superclasses"])
def test_cifar100_is_read_in_every_form(tmp_path, form):
    known = make_cifar100(tmp_path, form)
    train, test = datasets("cifar100", tmp_path, facts=known, augment=False)
    mean, std = np.array((0.5071, 0.4867, 0.4408)), np.array((0.2675, 0.2565, 0.2761))
    for split, part in (("train", train), ("test", test)):
        assert part.labels == list(range(100))
        image, label = part[57]
        assert label == 57
        expected = (hundred(split)[57] / 255 - mean) / std
        np.testing.assert_allclose(image.numpy(), expected.transpose(2, 0, 1), atol=1e-5)
    assert "CIFAR-100" in train.found
    assert "100 classes" in train.found


@pytest.mark.parametrize("form", ["folder", "superclasses"])
def test_a_partial_cifar100_is_refused_by_name(tmp_path, form):
    known = make_cifar100(tmp_path, form)
    (gone,) = (tmp_path / "cifar100" / "test").rglob("class41/0.png")
    gone.unlink()
    with pytest.raises(DataError, match=r"99 folders of test classes, but CIFAR-100 has 100"):
        datasets("cifar100", tmp_path, facts=known)


def test_partial_and_damaged_parquet_is_refused_by_name(tmp_path):
    folder = make_parquet(tmp_path)
    second = folder / "train-00001-of-00002.parquet"
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet is damaged"):
        load(tmp_path)
    second.unlink()
    with pytest.raises(DataError, match=r"lacks 1 of 2 .*first train-00001-of-00002\.parquet"):
        load(tmp_path)
    shutil.copy(folder / "train-00000-of-00002.parquet", folder / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match="not the only file of its kind"):
        load(tmp_path)


@pytest.mark.parametrize(
    "value", [None, {"bytes": None, "path": "a.png"}, {"bytes": b"", "path": ""}]
)
def test_a_row_without_a_picture_is_refused_by_its_number(tmp_path, value):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    folder = make_parquet(tmp_path, shards=1)
    path = folder / "test-00000-of-00001.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[7]["img"] = value
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(DataError, match=r"test-00000-of-00001\.parquet, row 7"):
        load(tmp_path)


def test_too_few_rows_and_no_pictures_are_refused(tmp_path):
    make_parquet(tmp_path)
    with pytest.raises(DataError, match=r"30 train rows in 2 Parquet files, expected 40"):
        datasets("cifar10", tmp_path, facts=dataclasses.replace(facts(), train=40))
    shutil.rmtree(tmp_path / "cifar10")
    make_parquet(tmp_path, column="image")
    assert_right(*load(tmp_path, cache=tmp_path / "other"))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    for split in PER_CLASS:
        path = tmp_path / "cifar10" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(MissingDependencyError, match="pip install pyarrow"):
        load(tmp_path)


# --- Fashion-MNIST -------------------------------------------------------------------------------


def make_idx(folder, packed=True):
    """Four IDX files of 20 and 10 images; returns the facts."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    means = {}
    for stem, n in (("train", 20), ("t10k", 10)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        means[stem] = images.mean()
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            data = head + array.tobytes()
            path = folder / f"{stem}-{name}-ubyte"
            if packed:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(data))
            else:
                path.write_bytes(data)
    return dataclasses.replace(OFFICIAL["fashionmnist"], train=20, test=10, mean=(means["train"],))


@pytest.mark.parametrize("place", ["FashionMNIST/raw", "fashion-mnist", "."])
@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_is_read_where_people_have_it(tmp_path, place, packed):
    known = make_idx(tmp_path / "data" / place, packed)
    train, test = datasets("fashionmnist", tmp_path / "data", facts=known, augment=False)
    rng = np.random.default_rng(0)
    image, label = train[13]
    expected = rng.integers(0, 256, (20, 28, 28), dtype=np.uint8)[13] / 255
    np.testing.assert_allclose(image[0].numpy(), (expected - 0.2860) / 0.3530, atol=1e-5)
    assert (image.shape, label, len(train), len(test)) == ((1, 28, 28), 3, 20, 10)


def test_debians_files_are_found_and_others_win(tmp_path, monkeypatch):
    known = make_idx(tmp_path / "debian")
    monkeypatch.setattr(fashionmnist, "DEBIAN", tmp_path / "debian")
    options = {"augment": True, "download": False}
    train, _ = fashionmnist.load(tmp_path / "data", known, **options, debian=tmp_path / "debian")
    assert str(tmp_path / "debian") in train.found
    with pytest.raises(DataError, match=r"was not found in .*train-images-idx3-ubyte\.gz"):
        fashionmnist.load(tmp_path / "data", known, **options, debian=tmp_path / "none")


def test_damaged_fashion_mnist_is_refused_by_name(tmp_path):
    known = make_idx(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()

    def refused(data, message):
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"train-images-idx3-ubyte\.gz.*{message}"):
            datasets("fashionmnist", tmp_path, facts=known)

    content = gzip.decompress(whole)
    refused(whole[:-100], "is damaged")
    refused(gzip.compress(content[:-1]), "has fewer bytes")
    refused(gzip.compress(content + bytes(1 << 20)), "has more bytes")
    refused(gzip.compress(b"\0\0\x0d" + content[3:]), "is not an IDX file")
    path.unlink()
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz is missing"):
        datasets("fashionmnist", tmp_path, facts=known)


def test_fashion_mnist_of_wrong_labels_or_of_digits_is_refused(tmp_path):
    known = make_idx(tmp_path, packed=False)
    path = tmp_path / "t10k-labels-idx1-ubyte"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\x0a")
    with pytest.raises(DataError, match=r"test labels outside 0\.\.9"):
        datasets("fashionmnist", tmp_path, facts=known)
    path.write_bytes(whole[:-1] + b"\x00")
    with pytest.raises(
        DataError, match=r"test images of class \d, but Fashion-MNIST has 1 of each"
    ):
        datasets("fashionmnist", tmp_path, facts=known)
    path.write_bytes(whole)
    # MNIST's files have the same names and shapes; its pixels are darker.
    digits = dataclasses.replace(known, mean=(33.3184,))
    with pytest.raises(DataError, match="these are other pictures"):
        datasets("fashionmnist", tmp_path, facts=digits)


# --- N-MNIST -------------------------------------------------------------------------------------


def event_bytes(x, y, t, p):
    return bytes([x, y, (p << 7) | (t >> 16 & 0x7F), t >> 8 & 0xFF, t & 0xFF])


def make_nmnist(root, events=60):
    rng = np.random.default_rng(0)
    for split, n in (("Train", 2), ("Test", 1)):
        for digit in range(10):
            folder = root / "NMNIST" / split / str(digit)
            folder.mkdir(parents=True)
            for k in range(n):
                times = np.sort(rng.integers(0, 300_000, events))
                data = b"".join(
                    event_bytes(int(rng.integers(34)), int(rng.integers(34)), int(t), digit % 2)
                    for t in times
                )
                (folder / f"{10 * k + digit:05d}.bin").write_bytes(data)
    return root / "NMNIST"


def test_nmnist_subset_is_framed_and_named(tmp_path):
    make_nmnist(tmp_path)
    train, test = datasets("nmnist", tmp_path, steps=4, augment=False)
    assert (len(train), len(test)) == (20, 10)
    assert "20 + 10 recordings, a subset of 60,000 + 10,000" in train.found
    frames, label = train[13]
    assert frames.shape == (4, 2, 34, 34)
    assert label == 3
    assert frames[:, 1].sum() == 60  # an odd digit has ON events only, and none is lost
    assert frames[:, 0].sum() == 0


def test_nmnist_events_are_tonics(tmp_path):
    tonic = pytest.importorskip("tonic")
    path = tmp_path / "x.bin"
    # The row 240 says that the clock has overflowed.
    path.write_bytes(
        event_bytes(1, 2, 8000, 1)
        + event_bytes(0, 240, 0, 0)
        + event_bytes(33, 0, 5, 0)
        + event_bytes(3, 33, (1 << 23) - 1, 1)
    )
    ours = nmnist.read(path)
    theirs = tonic.io.read_mnist_file(path, dtype=tonic.datasets.nmnist.NMNIST.dtype)
    assert len(ours) == 3
    for field in "xytp":
        np.testing.assert_array_equal(ours[field], theirs[field])


def test_damaged_nmnist_is_refused_by_name(tmp_path):
    folder = make_nmnist(tmp_path)
    path = folder / "Train" / "4" / "00004.bin"
    whole = path.read_bytes()

    def refused(data, message):
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"00004\.bin.*{message}"):
            datasets("nmnist", tmp_path)

    refused(whole[:-2], "is cut short")
    refused(b"", "is cut short")
    refused(event_bytes(34, 0, 0, 0) + whole, "outside the sensor")
    refused(whole[:5] * 3000, "events of one pixel in one frame")
    shutil.rmtree(path.parent)
    with pytest.raises(DataError, match=r"Train/4 has no recordings"):
        datasets("nmnist", tmp_path)
    with pytest.raises(DataError, match=r"N-MNIST was not found in"):
        datasets("nmnist", tmp_path / "empty")


@pytest.mark.parametrize("name", ["cifar10", "fashionmnist"])
def test_training_batches_of_every_form_are_augmented(tmp_path, name):
    known = facts() if name == "cifar10" else make_idx(tmp_path)
    if name == "cifar10":
        make_zip(tmp_path)
    train, _ = datasets(name, tmp_path, facts=known, strong=False)
    first, labels = train.batch([0, 1, 2], [5, 6, 7])
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert labels.tolist() == train.labels[:3]
    assert torch.equal(first, train.batch([0, 1, 2], [5, 6, 7])[0])
    assert not torch.equal(first, train.batch([0, 1, 2], [8, 9, 10])[0])
