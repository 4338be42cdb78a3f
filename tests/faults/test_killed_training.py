"""Promise: a training run killed with SIGKILL at any moment loses nothing but the steps since its
last checkpoint. What carries a checkpoint's name is whole, ``--resume`` goes on from the newest,
and the run ends with the very bits (weights, optimizer, history) of a run that nobody interrupted.

Twenty kills, or one of each kind in the quick suite: at random moments, at random file operations,
and in the middle of writing.
"""

import json
import os
import random
import signal
import sys
import time

import pytest
import torch

from recipes.engine import checkpoints

from .runs import assert_same, assert_same_end, live, tiny

FEW = {"moment": 1, "file operation": 1, "middle of writing": 1}
TWENTY = {"moment": 9, "file operation": 8, "middle of writing": 3}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_file_operation(folder, count):
    """Die just before the n-th time that this process opens, renames, links or deletes a file."""
    left = count

    def hook(event, args):
        nonlocal left
        if event in ("open", "os.rename", "os.link", "os.remove") and any(
            isinstance(a, str | os.PathLike) and os.fspath(a).startswith(str(folder)) for a in args
        ):
            left -= 1
            if left == 0:
                die()

    sys.addaudithook(hook)


def die_in_the_middle_of_writing(share):
    """Die when this share of the next checkpoint is on the disk."""
    import io

    write = torch.save

    def half(content, file):
        whole = io.BytesIO()
        write(content, whole)
        file.write(whole.getvalue()[: int(share * len(whole.getvalue()))])
        file.flush()
        die()

    torch.save = half


def progress(folder):
    """Epoch of the newest checkpoint, having read all of them."""
    for path in folder.glob("*.ckpt"):
        checkpoints.read(path)
    found = checkpoints.saved(folder)
    return int(checkpoints.NAME.search(found[0].name)[1]) if found else 0


@pytest.mark.parametrize(
    "kills", [FEW, pytest.param(TWENTY, marks=pytest.mark.slow)], ids=["few", "twenty"]
)
def test_kills(kills, tmp_path, timed):
    rng = random.Random(0)
    unbroken, seconds = timed
    reach = seconds / 3  # of which a picture takes half: a life dies before it has done its epochs

    kinds = [kind for kind, count in kills.items() for _ in range(count)]
    rng.shuffle(kinds)
    landed = dict.fromkeys(kills, 0)
    finished, folder = 0, tmp_path / "run-0"
    while kinds or not (folder / "result.json").exists():
        done = progress(folder)
        before, kind = None, kinds[-1] if kinds else None
        if kind == "file operation":
            count = rng.randint(1, 40)
            before = lambda f=folder, n=count: die_at_file_operation(f, n)  # noqa: E731
        elif kind == "middle of writing":
            share = rng.random()
            before = lambda s=share: die_in_the_middle_of_writing(s)  # noqa: E731
        life = live(tiny(folder, resume=True), before)
        if kind == "moment":
            end = life.started + rng.uniform(0, reach)
            while life.poll() is None and time.monotonic() < end:
                time.sleep(0.002)
            life.kill()
        status, said = life.wait(), life.said()
        assert status in (0, -signal.SIGKILL), said
        if "epochs from" in said:
            start = f"epoch-{done:04d}.ckpt" if done else "the beginning"
            assert start in said.split("epochs from")[1].splitlines()[0], said
        assert progress(folder) >= done, "a checkpoint that was there is gone"
        if status:
            landed[kind] += 1
            kinds.pop()
        elif kinds:  # this run came to its end alive; the next kills need another
            check_end(folder, unbroken)
            finished += 1
            folder = tmp_path / f"run-{finished}"
    check_end(folder, unbroken)
    assert landed == kills


def check_end(folder, unbroken):
    assert_same_end(folder, unbroken)
    assert_same(checkpoints.read(folder / "best.ckpt")["state_dict"],
                checkpoints.read(unbroken / "best.ckpt")["state_dict"])  # fmt: skip
    ours, theirs = (json.loads((f / "result.json").read_text()) for f in (folder, unbroken))
    for key in ("last_accuracy", "best_accuracy", "best_epoch", "layer_rates", "history"):
        assert_same(ours[key], theirs[key], key)
    assert not list(folder.glob("*.partial")), "half a file was left behind"


def test_killed_between_the_best_and_the_newest(tmp_path, unbroken):
    """The first epoch is the best so far: its file gets two names, and the run dies in between."""
    folder = tmp_path / "run"
    life = live(tiny(folder), lambda: setattr(checkpoints, "link_atomically", lambda *_: die()))
    assert life.wait() == -signal.SIGKILL, life.said()
    resumed = live(tiny(folder, resume=True))
    assert resumed.wait() == 0, resumed.said()
    check_end(folder, unbroken)
