"""Promise: a full disk costs nothing that was written before. Whatever we write (training
checkpoints, model checkpoints, packed models, configurations, data caches) is either whole or not
there, the file it was to replace stays as it was, and the error is ours and says what to do. A disk
that is full already is reported before training starts.

Run on a small file system in memory where one may be mounted (as root). Elsewhere a limit on the
size of files stands in for it, which fails the same system calls in the same places.
"""

import os
import resource
import signal
import subprocess
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
from torch import nn

import qsnn_ext
from qsnn_ext.errors import CheckpointError, DataError, QSNNError, TrainingError
from recipes.data.files import write_atomically
from recipes.engine import checkpoints, files
from recipes.engine.run import train

from .runs import OWN_ERROR, Life, assert_same_end, live, tiny


@pytest.fixture
def disk(tmp_path):
    """A file system of two megabytes, or a skip that says why."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(options, capture_output=True, text=True, check=False)
        reason = done.stderr.strip()
    except OSError as error:
        done, reason = None, str(error)
    if done is None or done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {reason}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder, leave):
    """Take up all but ``leave`` bytes of a file system."""
    file = folder / "filler"
    with open(file, "wb") as f:
        f.write(bytes(os.statvfs(folder).f_bavail * os.statvfs(folder).f_bsize))
    with open(file, "r+b") as f:
        f.truncate(file.stat().st_size - leave)
    return file


@contextmanager
def small_files(limit):
    """No file of this process may grow beyond a number of bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error, not the end of the process
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


# --------------------------------------------------------------------------- training


def test_the_disk_fills_up_during_training(disk, unbroken):
    folder = disk / "run"
    first = live(tiny(folder, stop_after=2))
    assert first.wait() == 0, first.said()
    before = {p.name: p.read_bytes() for p in folder.glob("*.ckpt")}

    def room_until_training_starts():
        check = files.require_space

        def then_fill(*args):
            check(*args)
            fill(disk, leave=20_000)  # a tenth of a checkpoint

        files.require_space = then_fill

    second = live(tiny(folder, resume=True), room_until_training_starts)
    assert second.wait() == OWN_ERROR, second.said()
    assert "TrainingError" in second.said()
    assert str(folder) in second.said()
    assert "Make room" in second.said()
    assert "--resume" in second.said()
    assert {p.name: p.read_bytes() for p in folder.glob("*.ckpt*")} == before

    (disk / "filler").unlink()
    third = live(tiny(folder, resume=True))
    assert third.wait() == 0, third.said()
    assert_same_end(folder, unbroken)


def test_a_full_disk_is_noticed_before_training(disk):
    folder = disk / "run"
    assert live(tiny(folder, stop_after=1)).wait() == 0
    fill(disk, leave=20_000)
    with pytest.raises(TrainingError, match=r"only .* MB free.*--out"):
        train(tiny(folder, resume=True))
    (disk / "filler").unlink()
    fill(disk, leave=0)
    with pytest.raises(TrainingError, match=r"cannot be written.*--out"):
        train(tiny(folder, resume=True))
    checkpoints.read(folder / "epoch-0001.ckpt")


def test_a_checkpoint_that_grows_too_large(tmp_path):
    """The same without a file system of its own, for those who may not mount one."""
    folder = tmp_path / "run"
    assert live(tiny(folder, stop_after=1)).wait() == 0
    before = (folder / "epoch-0001.ckpt").read_bytes()

    def limited():
        with small_files(len(before) // 2):
            train(tiny(folder, resume=True, stop_after=2))

    life = Life(limited)
    assert life.wait() == OWN_ERROR, life.said()
    assert "TrainingError" in life.said()
    assert str(folder) in life.said()
    assert [p.name for p in folder.glob("*.ckpt*")].count("epoch-0001.ckpt") == 1
    assert (folder / "epoch-0001.ckpt").read_bytes() == before
    assert not (folder / "epoch-0002.ckpt").exists()


# --------------------------------------------------------------------------- everything else


def write_model(path):
    qsnn_ext.save_checkpoint(nn.Linear(300, 300), path)


def write_program(path):
    from qsnn_ext.deploy import save_program

    from ..deploy.random_programs import random_program

    program = random_program(0)
    program.metadata["padding"] = "x" * 100_000
    save_program(program, path)


def write_config(path):
    rules = [qsnn_ext.Rule.keep(name=f"layer{i}.*") for i in range(2000)]
    qsnn_ext.QuantConfig(rules=tuple(rules)).to_file(path)


def write_cache(path):
    array = np.random.default_rng(0).integers(256, size=200_000, dtype=np.uint8)
    write_atomically(path, partial(np.savez, frames=array))


WRITERS = {
    "net.safetensors": (write_model, CheckpointError),
    "net.qsnn": (write_program, QSNNError),
    "config.toml": (write_config, QSNNError),
    "config.yaml": (write_config, QSNNError),
    "cache.npz": (write_cache, DataError),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("kind", ["full disk", "file size limit"])
def test_a_file_that_cannot_be_written_stays_as_it_was(name, kind, request, tmp_path):
    write, error = WRITERS[name]
    folder = request.getfixturevalue("disk") if kind == "full disk" else tmp_path / "folder"
    folder.mkdir(exist_ok=True)
    path = folder / name
    write(path)
    before = path.read_bytes()
    assert len(before) > 60_000, "the test needs a file larger than what is left of the disk"
    if kind == "full disk":
        filler = fill(folder, leave=40_000)
        with pytest.raises(error, match=name):
            write(path)
        filler.unlink()
    else:
        with small_files(40_000), pytest.raises(error, match=name):
            write(path)
    assert path.read_bytes() == before
    assert os.listdir(folder) == [name], "half a file was left behind"
