"""Promise: whatever file of ours is damaged, by accident or by hand, reading it ends in an error of
our own type that names the file, or in a result as good as from an undamaged one. It never ends in
another exception or a crash, and a model that was to be filled is as it was.

A hundred mutations of each kind of file here; ``QSNN_MUTATIONS=5000`` before the command tries
that many. Where a digest would catch everything, it is made to fit again, so that what lies behind
it is tried as well.
"""

import hashlib
import io
import json
import random
import shutil
import zipfile
import zlib

import numpy as np
import pytest
import torch
import yaml
from spikingjelly.activation_based import layer, neuron
from torch import nn

import qsnn_ext
from qsnn_ext import QSNNError, QuantConfig
from qsnn_ext.checkpoint import _digest
from qsnn_ext.errors import CheckpointError, DataError, FormatError
from recipes import data as datasets
from recipes.data import digits
from recipes.engine import checkpoints
from recipes.engine.run import prepare

from ..deploy.random_programs import random_program
from ..recipes.archives import make
from .mutate import COUNT, corrupt, spoil
from .runs import Life, tiny
from .test_interrupted_conversion import snapshot, untouched

#: What a reader may say of a damaged file; anything else, a crash included, fails the test.
OURS = QSNNError


def try_all(path, content, read, seed=0, count=COUNT, mutate=spoil):
    """Write one mutation after the other to ``path`` and read it; how many were refused."""
    rng, refused, longest = random.Random(seed), 0, 0
    for k in range(count):
        path.write_bytes(mutate(content, rng))
        try:
            read()
        except OURS as error:
            refused += 1
            longest = max(longest, len(str(error)))
        except Exception as error:
            keep = path.with_name(f"mutation-{k}{path.suffix}")
            shutil.copy(path, keep)
            raise AssertionError(f"mutation {k} of {path.name}, kept as {keep}") from error
    path.write_bytes(content)
    read()  # and the whole file still reads
    assert longest < 10_000, "a message must not repeat the file"
    return refused


# --------------------------------------------------------------------------- configurations


@pytest.fixture
def config():
    return QuantConfig.from_dict({
        "bits": "1w-2u", "preset": "official", "first": {"bits": 8}, "readouts": "quantize",
        "rules": [{"name": "stem.*", "weight": {"bits": 1, "scale": "mean"}, "membrane": 4},
                  {"type": "LIFNode", "membrane": {"bits": 8, "mode": "frozen"}}],
    })  # fmt: skip


@pytest.mark.parametrize("suffix", [".toml", ".yaml"])
def test_configurations(tmp_path, config, suffix):
    path = tmp_path / f"config{suffix}"
    config.to_file(path)
    refused = try_all(path, path.read_bytes(), lambda: QuantConfig.from_file(path))
    assert refused > COUNT / 2


def test_configurations_with_wrong_values(tmp_path, config):
    path = tmp_path / "config.yaml"

    def rewrite(content, rng):
        document = yaml.safe_load(content)
        for _ in range(rng.randint(1, 2)):
            corrupt(document, rng)
        return yaml.safe_dump(document).encode()

    def read():
        found = QuantConfig.from_file(path)
        assert QuantConfig.from_dict(found.to_dict()) == found  # what is accepted is whole

    config.to_file(path)
    refused = try_all(path, path.read_bytes(), read, mutate=rewrite)
    assert refused > COUNT / 2


def test_the_configuration_of_a_run(tmp_path):
    prepare(tiny(tmp_path), tmp_path)
    path = tmp_path / "config.json"
    refused = try_all(
        path, path.read_bytes(), lambda: prepare(tiny(tmp_path, resume=True), tmp_path)
    )
    assert refused > COUNT / 4


# --------------------------------------------------------------------------- checkpoints


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        layer.Conv2d(1, 4, 3, bias=False), layer.BatchNorm2d(4), neuron.LIFNode(),
        nn.Flatten(), layer.Linear(144, 10),
    )  # fmt: skip


@pytest.fixture
def model_file(tmp_path):
    model = network().eval()
    qsnn_ext.quantize_(model, "1w-2u", torch.rand(1, 1, 8, 8))
    qsnn_ext.calibrate(model, [torch.rand(4, 1, 8, 8)])
    qsnn_ext.fold_batchnorm_(model)
    path = tmp_path / "net.safetensors"
    qsnn_ext.save_checkpoint(model, path)
    return path


def header_of(content):
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def reads_or_leaves_alone(path):
    """The model is filled whole, or it is what it was before."""
    model = network()
    before = snapshot(model)
    try:
        qsnn_ext.load_checkpoint(path, model)
    except CheckpointError as error:
        if path.name not in str(error) or not untouched(before, snapshot(model)):
            raise AssertionError("not named, or the model was changed") from error
        raise


def test_model_checkpoints(model_file):
    content = model_file.read_bytes()
    refused = try_all(model_file, content, lambda: reads_or_leaves_alone(model_file))
    assert refused > 0.9 * COUNT


def test_model_checkpoints_with_a_digest_that_fits(model_file):
    def rewrite(content, rng):
        container, data = header_of(content)
        inner = json.loads(container["__metadata__"]["qsnn_ext"])
        for _ in range(rng.randint(1, 2)):
            corrupt(inner, rng)
        tensors = qsnn_ext.checkpoint._safetensors().torch.load(content)
        text = json.dumps(inner, sort_keys=True)
        container["__metadata__"] = {"qsnn_ext": text, "sha256": _digest(text, tensors)}
        encoded = json.dumps(container).encode()
        encoded += b" " * (-len(encoded) % 8)
        return len(encoded).to_bytes(8, "little") + encoded + data

    content = model_file.read_bytes()
    refused = try_all(
        model_file, content, lambda: reads_or_leaves_alone(model_file), mutate=rewrite
    )
    assert refused > COUNT / 4


def test_training_checkpoints(tmp_path, unbroken):
    path = tmp_path / "epoch-0001.ckpt"
    content = (unbroken / "best.ckpt").read_bytes()
    whole = checkpoints.read(unbroken / "best.ckpt")["state_dict"]

    def read():
        found = checkpoints.read(path)["state_dict"]
        assert all(torch.equal(found[k], whole[k]) for k in whole)

    refused = try_all(path, content, read, count=COUNT // 2)
    assert refused > 0.3 * COUNT


def test_training_checkpoints_with_checksums_that_fit(tmp_path, unbroken):
    """The pickled part is spoilt and the zip around it made anew."""
    path = tmp_path / "epoch-0001.ckpt"
    source = (unbroken / "best.ckpt").read_bytes()

    def rewrite(content, rng):
        made = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
            for name in old.namelist():
                part = old.read(name)
                new.writestr(name, spoil(part, rng) if name.endswith("data.pkl") else part)
        return made.getvalue()

    refused = try_all(
        path, source, lambda: checkpoints.read(path), count=COUNT // 4, mutate=rewrite
    )
    assert refused > COUNT / 16


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {}, "epoch": 0},
        {"state_dict": {"model.x": torch.ones(3)}, "epoch": 1, "loops": {}, "callbacks": 3},
        {"state_dict": [], "epoch": "two"},
        [1, 2],
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, content):
    folder = tmp_path / "run"
    folder.mkdir()
    prepare(tiny(folder), folder)
    torch.save(content, folder / "epoch-0001.ckpt")

    def resume():
        from recipes.engine.run import train

        with pytest.raises(CheckpointError, match=r"epoch-0001\.ckpt|Every checkpoint"):
            train(tiny(folder, resume=True))

    life = Life(resume)
    assert life.wait() == 0, life.said()


# --------------------------------------------------------------------------- packed models


def test_packed_models(tmp_path):
    from qsnn_ext.deploy import load_program, save_program
    from qsnn_ext.deploy.fileformat import dump_program

    path = tmp_path / "net.qsnn"
    for seed in range(4):
        program = random_program(seed)
        save_program(program, path)
        content = path.read_bytes()

        def read(content=content):
            try:
                assert dump_program(load_program(path)) == content
            except FormatError as error:
                if "net.qsnn" not in str(error):
                    raise AssertionError("the file is not named") from error
                raise

        refused = try_all(path, content, read, seed, COUNT // 4)
        assert refused > 0.2 * COUNT


def fit_checksum(container, data):
    from qsnn_ext.deploy.fileformat import _checksum

    metadata = container.pop("__metadata__")
    metadata["sha256"] = _checksum(metadata["program"], container, data)
    encoded = json.dumps({"__metadata__": metadata, **container}).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def test_packed_models_with_a_checksum_that_fits(tmp_path):
    """Hostile programs are refused, or run; in a process of their own, as engines may crash."""

    def rewrite(content, rng):
        container, data = header_of(content)
        program = json.loads(container["__metadata__"]["program"])
        if rng.random() < 0.7:
            corrupt(program, rng)
            container["__metadata__"]["program"] = json.dumps(program)
        if rng.random() < 0.3:
            tensors = {k: v for k, v in container.items() if k != "__metadata__"}
            if tensors:
                corrupt(tensors, rng)
                container = {"__metadata__": container["__metadata__"], **tensors}
        if rng.random() < 0.3:
            data = spoil(data, rng)
        return fit_checksum(container, data)

    def attack():
        from qsnn_ext.deploy import DeployedModel, load_program, save_program

        path = tmp_path / "net.qsnn"
        refused = 0
        for seed in range(4):
            program = random_program(seed)
            save_program(program, path)

            def read():
                loaded = load_program(path)
                if sum(v.elements for v in loaded.values) < 1e5 and loaded.timesteps < 100:
                    x = np.zeros((1, *loaded.values[0].shape), np.int32)
                    DeployedModel(loaded).integers(x)

            refused += try_all(path, path.read_bytes(), read, seed, COUNT // 4, rewrite)
        assert refused > COUNT / 2

    life = Life(attack)
    assert life.wait() == 0, life.said()


# --------------------------------------------------------------------------- data sets

PARTS = {
    "cifar10": ["cifar-10-batches-py/data_batch_1", "cifar-10-batches-py/batches.meta"],
    "tinyimagenet": [
        "tiny-imagenet-200/wnids.txt",
        "tiny-imagenet-200/val/val_annotations.txt",
        "tiny-imagenet-200/train/n01/images/n01_0.JPEG",
        "tiny-imagenet-200/val/images/val_0.JPEG",
    ],
    "dvsgesture": [
        "DvsGesture/trials_to_train.txt",
        "DvsGesture/user01_led_labels.csv",
        "DvsGesture/user01_led.aedat",
        "cache",
    ],
    "dvscifar10": ["CIFAR10DVS/dog/cifar10_dog_0.aedat", "cache"],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "part"), [(n, p) for n, parts in PARTS.items() for p in parts])
def test_unpacked_data_sets(tmp_path, name, part):
    facts = make(name, tmp_path)
    options = {"download": False, "facts": facts}

    def read():
        train, test = datasets.datasets(name, tmp_path, **options)
        for split in (train, test):
            for index in (0, len(split) - 1):
                x, label = split[index]
                assert torch.isfinite(x).all()
                assert 0 <= label < datasets.spec(name).classes

    read()
    if part == "cache":
        path = min((tmp_path / "cache").rglob("*.npz"))
    else:
        path = tmp_path / part
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)

    def fresh():
        if part != "cache":
            shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        read()

    heavy = name == "dvscifar10" and part != "cache"  # frames a hundred recordings every time
    count = COUNT // 40 if heavy else COUNT // 8
    refused = try_all(path, path.read_bytes(), fresh, count=count)
    assert refused


@pytest.mark.parametrize("name", PARTS)
def test_archives(tmp_path, name):
    facts = make(name, tmp_path)
    path = tmp_path / facts.archives[0].name

    def read():
        for folder in [p for p in tmp_path.iterdir() if p.is_dir()]:
            shutil.rmtree(folder)
        with pytest.raises(DataError, match=facts.archives[0].name):
            datasets.datasets(name, tmp_path, download=False, facts=facts)

    content, rng = path.read_bytes(), random.Random(0)
    for _ in range(COUNT // 10):
        spoilt = spoil(content, rng)
        if spoilt != content:
            path.write_bytes(spoilt)
            read()


def test_cached_events_are_made_again(tmp_path, monkeypatch):
    """The simulated events of the digits: a damaged cache is replaced, the frames stay the same."""
    monkeypatch.setattr(digits, "load_digits", few_digits)
    monkeypatch.setattr(digits, "split", lambda: (np.arange(8), np.arange(8, 12)))
    digits.pictures.cache_clear()

    def read():
        digits.recordings.cache_clear()
        train, _ = digits.load_frames(8, 2, seed=0, augment=False, cache=tmp_path)
        return train.frames.copy()

    whole = read()
    path = next(tmp_path.glob("*.npz"))
    content = path.read_bytes()

    def again():
        assert np.array_equal(read(), whole)

    try:
        try_all(path, content, again, count=COUNT // 4)
    finally:
        digits.pictures.cache_clear()
        digits.recordings.cache_clear()


def few_digits():
    from sklearn.datasets import load_digits

    found = load_digits()
    found.images, found.target = found.images[:12], found.target[:12]
    return found


def test_the_mutations_differ():
    rng = random.Random(0)
    content = zlib.compress(b"x" * 1000) + hashlib.sha256(b"y").digest()
    made = {spoil(content, rng) for _ in range(300)}
    assert len(made) > 200
    assert sum(m == content for m in made) <= 1
