"""Promise: no file that we read can run code, write outside its folder, or use up the memory. Not a
pickle in the place of a checkpoint, a cache or a data set, not a path inside an archive or a table,
not a YAML tag or an exploding alias, not the header of a safetensors or ``.qsnn`` file. Each ends
in an error of ours.
"""

import io
import json
import os
import pickle
import resource
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

import qsnn_ext
from qsnn_ext import QuantConfig
from qsnn_ext.errors import CheckpointError, ConfigError, DataError, FormatError
from recipes import data as datasets
from recipes.data.files import unpack
from recipes.data.frames import FrameFiles
from recipes.engine import checkpoints

from ..deploy.random_programs import random_program
from ..recipes.archives import make
from .runs import OWN_ERROR, Life


class Evil:
    """A pickle that makes a folder when it is read."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.fixture
def owned(tmp_path):
    """The folder that executed code would make; none must be there in the end."""
    path = tmp_path / "owned"
    pickle.loads(pickle.dumps(Evil(path)))
    assert path.exists(), "the attack itself must work"
    path.rmdir()
    yield path
    assert not path.exists(), "code from a file was executed"


def modest(work):
    """Run in a process that may use two gigabytes more than it has, for two minutes."""

    def limited():
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2**31, size + 2**31))
        work()

    life = Life(limited)
    assert life.wait(120) == OWN_ERROR, life.said()
    return life.said()


# --------------------------------------------------------------------------- pickles


def test_a_pickle_for_a_training_checkpoint(tmp_path, owned):
    whole = {"epoch": 1, "state_dict": {}, "evil": Evil(owned)}
    path = tmp_path / "epoch-0001.ckpt"
    for legacy in (False, True):
        torch.save(whole, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(CheckpointError, match=r"epoch-0001\.ckpt"):
            checkpoints.read(path)
    path.write_bytes(pickle.dumps(whole))
    with pytest.raises(CheckpointError):
        checkpoints.read(path)


def test_a_pickle_for_a_model_or_a_packed_model(tmp_path, owned):
    from qsnn_ext.deploy import load

    path = tmp_path / "net"
    for content in (pickle.dumps(Evil(owned)), _torch_bytes({"weight": Evil(owned)})):
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            qsnn_ext.load_checkpoint(path, nn.Linear(2, 2))
        with pytest.raises(FormatError):
            load(path)


def _torch_bytes(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def test_a_pickle_for_a_cache(tmp_path, owned):
    array = np.empty(1, object)
    array[0] = Evil(owned)
    np.savez(tmp_path / "a.npz", frames=array)
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Evil(owned)))
    for index in range(2):
        with pytest.raises(DataError, match=r"\.npz"):
            FrameFiles([tmp_path / "a.npz", tmp_path / "b.npz"], [0, 1])[index]


def test_a_pickle_for_a_batch_of_cifar(tmp_path, owned):
    """CIFAR's own files are pickles: only those with the published digest are opened."""
    facts = make("cifar10", tmp_path)
    datasets.datasets("cifar10", tmp_path, download=False, facts=facts)
    for name in facts.members:
        path = tmp_path / "cifar-10-batches-py" / name
        before = path.read_bytes()
        path.write_bytes(pickle.dumps(Evil(owned)))
        with pytest.raises(DataError, match=name):
            datasets.datasets("cifar10", tmp_path, download=False, facts=facts)
        path.write_bytes(before)


# --------------------------------------------------------------------------- paths

OUTSIDE = ["../escaped", "goal/../../escaped", "/tmp/escaped-{pid}", "..\\escaped", "C:\\escaped"]


def everything(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_cannot_write_outside(tmp_path, name, kind):
    name = name.format(pid=os.getpid())
    path = tmp_path / ("a.zip" if kind == "zip" else "a.tar.gz")
    write_archive(path, {"goal/fine": b"", name: b"escaped"})
    with pytest.raises(DataError, match="outside the data directory"):
        unpack(path, tmp_path / "data" / "goal")
    assert everything(tmp_path) in ([path.name], sorted([path.name, "data"]))
    assert not os.path.exists(name)


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_an_archive_cannot_hold_links_or_devices(tmp_path, kind):
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("goal/link")
        info.type, info.linkname = kind, "../../.."
        tar.addfile(info)
        info = tarfile.TarInfo("goal/link/escaped")
        tar.addfile(info, io.BytesIO(b""))
    with pytest.raises(DataError, match="neither a file nor a folder"):
        unpack(path, tmp_path / "data" / "goal")


def write_archive(path, files):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_a_table_cannot_name_files_elsewhere(tmp_path):
    facts = make("dvsgesture", tmp_path)
    datasets.datasets("dvsgesture", tmp_path, download=False, facts=facts)
    folder = tmp_path / "DvsGesture"
    (folder / "user01_led.aedat").rename(tmp_path / "user01_led.aedat")
    table = folder / "trials_to_train.txt"
    for name in ("../user01_led.aedat", str(tmp_path / "user01_led.aedat")):
        table.write_text(f"{name}\nuser02_lab.aedat\n")
        with pytest.raises(DataError, match="trials_to_train"):
            datasets.datasets("dvsgesture", tmp_path, download=False, facts=facts)

    facts = make("tinyimagenet", tmp_path)
    datasets.datasets("tinyimagenet", tmp_path, download=False, facts=facts)
    table = tmp_path / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    rows = table.read_text().splitlines()
    rows[0] = "../../../" + rows[0]
    table.write_text("\n".join(rows))
    with pytest.raises(DataError, match="val_0"):
        datasets.datasets("tinyimagenet", tmp_path, download=False, facts=facts)


# --------------------------------------------------------------------------- YAML and TOML

TAGS = [
    "!!python/object/apply:os.mkdir ['{owned}']",
    "!!python/object/new:os.mkdir ['{owned}']",
    "weight: !!python/object/apply:os.mkdir ['{owned}']",
    "!!python/name:os.system",
    "!!python/module:os",
    "!include /etc/passwd",
]


@pytest.mark.parametrize("text", TAGS)
def test_yaml_tags(tmp_path, owned, text):
    path = tmp_path / "config.yaml"
    path.write_text(text.format(owned=owned))
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        QuantConfig.from_file(path)


@pytest.mark.parametrize("text", TAGS)
def test_yaml_tags_in_the_options_of_a_recipe(tmp_path, owned, text):
    from recipes import cifar10_resnet19
    from recipes.engine.cli import main

    path = tmp_path / "options.yaml"
    path.write_text(text.format(owned=owned).replace("weight:", "data:"))
    with pytest.raises(SystemExit) as caught:
        main(cifar10_resnet19.config, ["--config", str(path)])
    assert caught.value.code == 2


def bomb(levels=9):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for k in range(1, levels):
        lines.append(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]")
    return "\n".join([*lines, f"weight: *a{levels - 1}"])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bomb.yaml", bomb()),
        ("loop.yaml", "weight: &a [*a]"),
        ("deep.yaml", "weight: " + "[" * 100_000),
        ("deep.toml", "weight = " + "[" * 100_000),
        ("deep.toml", ".".join(["a"] * 100_000) + " = 1"),
        ("long.toml", "weight = '" + "x" * 1_000_000),
        ("many.yaml", "\n".join(f"k{i}: {i}" for i in range(5_000))),
    ],
    ids=["alias bomb", "loop", "deep yaml", "deep toml", "dotted toml", "long", "many"],
)
def test_configurations_that_explode(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    said = modest(lambda: QuantConfig.from_file(path))
    assert "ConfigError" in said
    assert len(said) < 10_000, "a message must not repeat the file"


# --------------------------------------------------------------------------- tensors


def container(header, data=b""):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


HEADERS = {
    "claims a huge header": (2**63 - 1).to_bytes(8, "little") + b"{}",
    "claims a negative header": b"\xff" * 8 + b"{}",
    "huge tensor": container({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
    "huge shape": container({"w": {"dtype": "F32", "shape": [2**62] * 4, "data_offsets": [0, 0]}}),
    "negative offsets": container({"w": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}),
    "overlap": container(
        {n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}, b"x" * 8
    ),
    "deep": container(b"[" * 1_000_000),
    "deep object": container(b'{"a":' * 100_000),
    "no object": container([1]),
    "repeated key": container(b'{"a":{},"a":{}}'),
    "not UTF-8": container(b"\xff\xfe{}"),
    "metadata no text": container({"__metadata__": {"qsnn_ext": 3, "format": 3}}),
    "metadata alone": container({"__metadata__": {"qsnn_ext": "{}", "format": "qsnn"}}),
    "deep metadata": container({"__metadata__": {
        "qsnn_ext": "[" * 100_000, "format": "qsnn", "version": "1", "program": "[" * 100_000}}),
    "empty": b"",
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_headers(tmp_path, name):
    from qsnn_ext.deploy import load

    path = tmp_path / "net"
    path.write_bytes(HEADERS[name])
    for read, kind in (
        (lambda: qsnn_ext.load_checkpoint(path, nn.Linear(2, 2)), "CheckpointError"),
        (lambda: load(path), "FormatError"),
    ):
        said = modest(read)
        assert kind in said
        assert len(said) < 10_000


def test_a_checkpoint_chooses_no_classes(tmp_path):
    """The names of quantizers in a file are looked up among the quantizers, and nowhere else."""
    from .test_corrupt_files import header_of, network

    model = network()
    qsnn_ext.quantize_(model, "1w-2u")
    path = tmp_path / "net.safetensors"
    qsnn_ext.save_checkpoint(model, path)
    content = path.read_bytes()
    header, data = header_of(content)
    tensors = qsnn_ext.checkpoint._safetensors().torch.load(content)
    for name in ("Quantizer", "Any", "dataclass", "preset", "nn.Linear", "os.system", "__import__"):
        inner = json.loads(header["__metadata__"]["qsnn_ext"])
        inner["quantized"]["0"]["quantizer"] = name
        text = json.dumps(inner)
        digest = qsnn_ext.checkpoint._digest(text, tensors)
        header["__metadata__"] = {"qsnn_ext": text, "sha256": digest}
        path.write_bytes(container(header, data))
        with pytest.raises(CheckpointError, match="does not fit"):
            qsnn_ext.load_checkpoint(path, network())


def test_a_program_that_claims_to_be_huge(tmp_path):
    from qsnn_ext.deploy import load, save_program

    from .test_corrupt_files import fit_checksum, header_of

    path = tmp_path / "net.qsnn"
    save_program(random_program(0), path)
    content = path.read_bytes()
    for change in (
        lambda p: p["values"][0].__setitem__(1, [2**16, 2**16, 2**16]),
        lambda p: p.__setitem__("values", p["values"] * 100_000),
        lambda p: p.__setitem__("timesteps", 2**40),
        lambda p: p.__setitem__("ops", p["ops"] * 10_000),
    ):
        header, data = header_of(content)
        program = json.loads(header["__metadata__"]["program"])
        change(program)
        header["__metadata__"]["program"] = json.dumps(program)
        path.write_bytes(fit_checksum(header, data))
        assert "FormatError" in modest(lambda: load(path))


def test_a_sparse_giant(tmp_path):
    """A file larger than memory is not read to find out that it is none of ours."""
    from qsnn_ext.deploy import load

    path = tmp_path / "net"
    with open(path, "wb") as file:
        file.truncate(2**36)
    for read in (
        lambda: qsnn_ext.load_checkpoint(path, nn.Linear(2, 2)),
        lambda: load(path),
        lambda: QuantConfig.from_file(path.rename(tmp_path / "net.toml")),
    ):
        assert "Error" in modest(read)
