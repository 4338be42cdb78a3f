"""Files that are whole or absent, folders checked before training, one owner at a time."""

import errno
import os
import signal

import pytest

from qsnn_ext.errors import TrainingError
from recipes.engine import files
from tests.faults.runs import Life


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    files.write_atomically(path, lambda f: f.write(b"old"))

    def fail(file):
        file.write(b"half of the new")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(TrainingError, match=r"No space left.*--resume"):
        files.write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_bug_in_the_writer_is_not_dressed_up(tmp_path):
    def fail(file):
        raise RuntimeError("not the disk's fault")

    with pytest.raises(RuntimeError, match="not the disk"):
        files.write_atomically(tmp_path / "file", fail)
    assert os.listdir(tmp_path) == []


def test_a_link_replaces_an_older_one(tmp_path):
    for text in ("one", "two"):
        (tmp_path / "source").write_text(text)
        files.link_atomically(tmp_path / "source", tmp_path / "target")
        assert (tmp_path / "target").read_text() == text


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="--out"):
        files.require_writable(tmp_path / "file" / "run")
    files.require_writable(tmp_path / "new" / "run")
    assert os.listdir(tmp_path / "new" / "run") == []


def test_too_little_space(tmp_path):
    files.require_space(tmp_path, 1)
    with pytest.raises(TrainingError, match=r"need about .* MB"):
        files.require_space(tmp_path, 1 << 62)


def test_a_folder_has_one_owner(tmp_path):
    owner = files.lock(tmp_path)
    with pytest.raises(TrainingError, match="Another run is using"):
        files.lock(tmp_path)
    owner.close()
    files.lock(tmp_path).close()


def test_a_killed_owner_leaves_no_lock(tmp_path):
    def lock_and_die():
        lock = files.lock(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)
        lock.close()

    assert Life(lock_and_die).wait() == -signal.SIGKILL
    files.lock(tmp_path).close()
