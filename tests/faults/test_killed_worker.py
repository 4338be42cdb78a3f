"""Promise: when a data loading process is killed in the middle of an epoch (by the kernel when
memory is short, most often), the run stops at once with an error of ours that says so and what to
do, never hangs, and resumes to the result it would have had. A worker that fails for a reason of
its own, such as a damaged file, reports that reason.
"""

import os
import signal
from multiprocessing import resource_sharer

import pytest

from recipes.engine import loading

from .runs import OWN_ERROR, assert_same_end, live, tiny


def in_worker(at, action):
    """Make the workers do something when they come to fetch their n-th sample."""

    def install():
        fetch, left = loading.SeededDataset.__getitem__, [at]

        def counted(self, draw):
            left[0] -= 1
            if left[0] == 0:
                action()
            return fetch(self, draw)

        loading.SeededDataset.__getitem__ = counted

    return install


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def unfinished():
    """In the training process: the third batch breaks off while it is handed over.

    That is what a worker leaves behind when it is killed at just that moment, which a test that
    really kills it meets once in a hundred runs.
    """
    receive, left = resource_sharer.DupFd.detach, [3]

    def broken(self):
        left[0] -= 1
        if left[0] == 0:
            raise EOFError
        return receive(self)

    resource_sharer.DupFd.detach = broken


def confused():
    raise RuntimeError("the file ends early")


def damaged():
    from qsnn_ext.errors import DataError

    raise DataError("cache/17.npz is missing or damaged: delete cache, it is made again.")


@pytest.mark.parametrize("at", [1, 60])
def test_a_killed_worker_ends_the_run(tmp_path, unbroken, at):
    """The 60th sample of a worker comes after the first checkpoint: it fetches 16 an epoch to
    train, as many to test, and reads ahead."""
    folder = tmp_path / "run"
    life = live(tiny(folder, workers=2), in_worker(at, killed))
    assert life.wait() == OWN_ERROR, life.said()
    assert "TrainingError: A data loading process was killed" in life.said()
    assert "--workers" in life.said()
    assert "--resume" in life.said()
    assert (at == 1) != any(folder.glob("epoch-*.ckpt"))

    if at == 1:
        return  # there is nothing to go on from
    resumed = live(tiny(folder, workers=2, resume=True))
    assert resumed.wait() == 0, resumed.said()
    assert_same_end(folder, unbroken)


def test_a_worker_killed_while_it_hands_over_a_batch_ends_the_run(tmp_path):
    life = live(tiny(tmp_path / "run", workers=2), unfinished)
    assert life.wait() == OWN_ERROR, life.said()
    assert "TrainingError: A data loading process was killed (it went silent)" in life.said()


def test_a_fault_inside_a_worker_is_not_taken_for_its_death(tmp_path):
    life = live(tiny(tmp_path / "run", workers=2), in_worker(3, confused))
    assert life.wait() != 0
    assert "the file ends early" in life.said()
    assert "was killed" not in life.said()


def test_a_worker_reports_a_damaged_file(tmp_path):
    life = live(tiny(tmp_path / "run", workers=2), in_worker(3, damaged))
    assert life.wait() == OWN_ERROR, life.said()
    assert "DataError" in life.said()
    assert "cache/17.npz is missing or damaged" in life.said()
