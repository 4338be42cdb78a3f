"""Promise: two runs never write to one folder. Of two that start at the same moment one trains, as
if it were alone, and the other stops with an error of ours that names the folder and the remedy.
Single files of one name written by many threads and processes at once end as one of them, whole.
"""

import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

import qsnn_ext
from recipes.data import files as data_files
from recipes.engine import checkpoints, run

from .runs import OWN_ERROR, Life, assert_same_end, live, tiny


def test_two_runs_at_once(tmp_path, unbroken):
    folder, refused = tmp_path / "run", tmp_path / "refused"

    def owner_waits_for_the_others():
        """However slowly these are started, they find it at work."""
        prepare = run.prepare

        def then_wait(*args):
            prepare(*args)
            while not refused.exists():
                time.sleep(0.01)

        run.prepare = then_wait

    lives = [live(tiny(folder, resume=True), owner_waits_for_the_others) for _ in range(3)]
    end = time.monotonic() + 240
    try:
        while sum(life.poll() is not None for life in lives) < 2:
            assert time.monotonic() < end, [life.said() for life in lives]
            time.sleep(0.01)
    finally:
        refused.touch()
    ends = sorted(life.wait() for life in lives)
    assert ends == [0, OWN_ERROR, OWN_ERROR], [life.said() for life in lives]
    for life in lives:
        if life.status:
            assert "TrainingError: Another run is using" in life.said()
            assert str(folder) in life.said()
            assert "--out" in life.said()
    assert_same_end(folder, unbroken)


def test_another_experiment_is_refused(tmp_path):
    folder = tmp_path / "run"
    assert live(tiny(folder, stop_after=1)).wait() == 0
    before = {p.name: p.read_bytes() for p in folder.glob("*.ckpt")}
    for changes, remedy in (({}, "--resume"), ({"resume": True, "seed": 1}, "seed was 0, is 1")):
        life = live(tiny(folder, **changes))
        assert life.wait() == OWN_ERROR, life.said()
        assert remedy in life.said()
    assert {p.name: p.read_bytes() for p in folder.glob("*.ckpt")} == before


def constant_model(value):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    for parameter in model.parameters():
        nn.init.constant_(parameter, value)
    return model


def write_checkpoint(path, value):
    qsnn_ext.save_checkpoint(constant_model(value), path)


def read_checkpoint(path):
    return torch.cat([p.reshape(-1) for p in qsnn_ext.load_checkpoint(
        path, constant_model(-1.0)).parameters()]).detach().numpy()  # fmt: skip


def write_cache(path, value):
    data_files.write_atomically(path, lambda f: np.savez(f, frames=np.full(5000, value)))


def read_cache(path):
    return np.load(path)["frames"]


def write_program(path, value):
    from qsnn_ext.deploy import save_program

    from ..deploy.random_programs import random_program

    program = random_program(0)
    program.metadata = {"value": ",".join([str(value)] * 20_000)}
    save_program(program, path)


def read_program(path):
    from qsnn_ext.deploy import load_program

    return np.array(load_program(path).metadata["value"].split(","), float)


WRITERS = {
    "checkpoint": (write_checkpoint, read_checkpoint),
    "cache": (write_cache, read_cache),
    "program": (write_program, read_program),
}


@pytest.mark.parametrize("name", WRITERS)
def test_many_writers_of_one_file(tmp_path, name):
    write, read = WRITERS[name]
    (tmp_path / "folder").mkdir()
    path, seen, failures = tmp_path / "folder" / "file", tmp_path / "seen", []

    def work(value):
        try:
            turns = 0
            while turns < 8 or not seen.exists():  # until it has been read in the meantime
                write(path, value)
                turns += 1
        except Exception as error:
            failures.append(error)

    def process(base):
        threads = [threading.Thread(target=work, args=(base + k,)) for k in range(3)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        if failures:
            raise failures[0]

    lives = [Life(lambda b=base: process(b)) for base in (0.0, 10.0)]
    try:
        while any(life.poll() is None for life in lives):
            if path.exists():
                content = read(path)  # raises when it is not whole
                assert (content == content[0]).all()
                seen.touch()
    finally:
        seen.touch()  # so that nobody waits for a reader that failed
    for life in lives:
        assert life.wait() == 0, life.said()
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_reader_never_sees_half_a_checkpoint(tmp_path):
    """Evaluating a run while it trains reads ``best.ckpt`` over and over."""
    folder = tmp_path / "run"
    life, looks = live(tiny(folder, epochs=4)), 0
    while life.poll() is None:
        if (folder / "best.ckpt").exists():
            assert checkpoints.read(folder / "best.ckpt")["epoch"] < 4
            looks += 1
    assert life.wait() == 0, life.said()
    assert looks
