"""Tiny training runs in processes of their own, which tests may kill."""

import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qsnn_ext.errors import QSNNError
from recipes.config import Config
from recipes.engine import checkpoints
from recipes.engine.run import train

EPOCHS = 5
OWN_ERROR = 3  # exit status of a life that ended with an error of our own


def tiny(out: Path, **changes: Any) -> Config:
    """The narrowest network, one batch of digits per epoch."""
    return Config(
        **{
            "data": "digits",
            "size": 8,
            "width": 1 / 32,
            "batch": 16,
            "limit_batches": 1,
            "epochs": EPOCHS,
            "workers": 0,
            "accelerator": "cpu",
            "progress": False,
            "precision": "32-true",
            "memory_format": "contiguous",
            "out": out,
            **changes,
        }
    )


class Life:
    """A forked process: it shares the imports of this one, which take longer than a run."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.log, self.status = tempfile.TemporaryFile(), None  # noqa: SIM115 (it outlives this)
        self.started = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            _work(work, self.log.fileno())

    def kill(self) -> None:
        """SIGKILL, unless it is over already."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def poll(self) -> int | None:
        """Exit status (minus the signal's number if one ended it), None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def wait(self, seconds: float = 240) -> int:
        """Its exit status; it is killed, and the test fails, when it takes longer than this."""
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"still running after {seconds} s:\n{self.said()}")
            time.sleep(0.005)
        return self.status

    def said(self) -> str:
        """What it has printed so far."""
        # Not by reading the file, which would move the position the child writes at.
        size = os.fstat(self.log.fileno()).st_size
        return os.pread(self.log.fileno(), size, 0).decode()


def _work(work: Callable[[], object], log: int) -> None:
    """The life of the child, which must never return into pytest."""
    code = 1
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        import sys

        sys.stdout = sys.stderr = open(log, "w", buffering=1, closefd=False)  # noqa: SIM115
        work()
        code = 0
    except QSNNError as error:
        print(f"{type(error).__name__}: {error}")
        code = OWN_ERROR
    except BaseException:
        traceback.print_exc(file=sys.stdout)
    finally:
        os._exit(code)


def live(config: Config, before: Callable[[], object] | None = None) -> Life:
    """Train in a process of its own; ``before`` runs first in it."""

    def work() -> None:
        if before is not None:
            before()
        train(config)

    return Life(work)


def assert_same(ours: Any, theirs: Any, where: str = "checkpoint") -> None:
    """Equality to the bit of whatever a checkpoint holds, measured speeds aside."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            if key not in ("throughput", "cpu_seconds"):
                assert_same(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{where}/{k}")
    else:
        assert ours == theirs, where


def assert_same_end(ours: Path, theirs: Path, epochs: int = EPOCHS) -> None:
    """Two runs ended with the same weights, optimizer state, schedule and history."""
    name = f"epoch-{epochs:04d}.ckpt"
    a, b = checkpoints.read(ours / name), checkpoints.read(theirs / name)
    for part in ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(a[part], b[part], part)
    histories = [
        next(s["history"] for s in c["callbacks"].values() if "history" in s) for c in (a, b)
    ]
    assert len(histories[0]) == epochs
    assert_same(*histories, "history")
