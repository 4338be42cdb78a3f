"""Two processes of one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

LIMIT = 1200  # seconds after which a process that waits for the other is ended


def two_processes(work: Callable[..., None], *args: Any) -> dict[Any, Any]:
    """Run ``work(rank, *args, results)`` in both.

    Returns:
        What they have put into ``results``.

    Raises:
        mp.ProcessRaisedException: One of them failed.
        TimeoutError: They did not come to an end.
    """
    with mp.Manager() as manager:
        results = manager.dict()
        started = time.monotonic()
        # Fresh ones: forked from a torch that has been used, they may wait for threads they lack.
        both = mp.spawn(work, (*args, results), nprocs=2, join=False)
        while not both.join(timeout=5):
            if time.monotonic() - started > LIMIT:
                for process in both.processes:
                    process.kill()
                raise TimeoutError(f"still running after {LIMIT} s")
        return dict(results)
