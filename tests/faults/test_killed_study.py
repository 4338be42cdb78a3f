"""Promise: a study that is killed takes its training processes with it, so that it can be started
anew at once. Only a run that diverged counts as one that learned nothing; any other that could not
be trained ends the study and says why.
"""

import multiprocessing
import threading
import time

import pytest

from qsnn_ext.errors import TrainingError
from recipes.engine import checkpoints, files
from recipes.engine.many import run_all

from .runs import Life, tiny


def wait_until(true, seconds):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not so after {seconds} s"
        time.sleep(0.05)


def is_free(folder):
    try:
        files.lock(folder).close()
    except TrainingError:
        return False
    return True


def test_a_killed_study_leaves_no_training_process(tmp_path):
    folder = tmp_path / "run"
    config = tiny(folder, epochs=5000)  # minutes, if nobody ends it
    study = Life(lambda: list(run_all([config], processes=1)))
    try:
        wait_until(lambda: checkpoints.saved(folder) or study.poll() is not None, 120)
        assert study.poll() is None, study.said()
        assert not is_free(folder)
    finally:
        study.kill()
    wait_until(lambda: is_free(folder), 20)


def test_a_killed_training_process_is_told(tmp_path):
    config = tiny(tmp_path / "run", epochs=5000)

    def kill():
        wait_until(lambda: checkpoints.saved(config.folder), 120)
        for worker in multiprocessing.active_children():
            worker.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(TrainingError, match=r"training process was killed.*fewer at a time"):
        list(run_all([config], processes=1))
    killer.join()


def test_a_run_that_diverged_has_no_result_and_one_that_could_not_be_trained_ends_the_study(
    tmp_path,
):
    diverging = tiny(tmp_path / "diverging", bits="32w-32u", lr=1e38, limit_batches=4)
    taken = tiny(tmp_path / "taken")
    taken.folder.mkdir()
    with files.lock(taken.folder):
        study = run_all([diverging, taken], processes=1)
        assert next(study) == (diverging, None)
        with pytest.raises(TrainingError, match="Another run is using"):
            next(study)
    assert "loss became" in (diverging.folder / "log.txt").read_text()
