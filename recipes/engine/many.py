"""Several runs side by side, one process each, which share the CPU's threads."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from qsnn_ext.errors import DivergenceError, QSNNError, TrainingError
from recipes.config import Config, differences


def run_all(
    configs: Sequence[Config], processes: int | None = None
) -> Iterator[tuple[Config, dict[str, Any] | None]]:
    """Train every configuration, several at a time.

    A run that has its result already is not trained again; an interrupted one is resumed. What
    the runs print goes to ``log.txt`` in their folders.

    Args:
        configs: The runs, each with a folder of its own; start long ones first.
        processes: How many at a time; none takes one per CPU core.

    Yields:
        Each configuration with its result, as they finish; with none where training diverged,
        which ``log.txt`` then tells.

    Raises:
        QSNNError: A run could not be trained for any other reason; it says nothing of the method.

    """
    todo = []
    for config in configs:
        done = finished(config)
        if done is None:
            todo.append(config)
        else:
            yield config, done
    if not todo:
        return
    workers = min(processes or os.cpu_count() or 1, len(todo))
    # Fresh processes: a forked one would inherit the threads of an already used torch.
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(threads,)
    ) as pool:
        futures = {pool.submit(_run, config): config for config in todo}
        try:
            for future in as_completed(futures):
                try:
                    result = future.result()
                except DivergenceError:
                    result = None
                except BrokenProcessPool as error:
                    raise TrainingError(
                        "A training process was killed, most often because memory ran out. Run "
                        "fewer at a time and start again; finished runs are not repeated."
                    ) from error
                yield futures[future], result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def run_here(
    configs: Sequence[Config],
) -> Iterator[tuple[Config, dict[str, Any] | None]]:
    """:func:`run_all` in this process, one after the other: importing torch is paid for once."""
    for config in configs:
        try:
            yield config, finished(config) or _run(config)
        except DivergenceError:
            yield config, None


def finished(config: Config) -> dict[str, Any] | None:
    """The result of a run that is complete and was made with this configuration, or none."""
    path = config.folder / "result.json"
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    return None if differences(config.to_dict(), result["config"]) else result


def _start_worker(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without this, workers of a killed parent train on and keep their folders locked."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(config: Config) -> dict[str, Any]:
    from recipes.engine.run import train

    config.folder.mkdir(parents=True, exist_ok=True)
    with (
        open(config.folder / "log.txt", "a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
        warnings.catch_warnings(),
    ):
        try:
            return train(config.but(resume=True, progress=False))
        except QSNNError as error:
            print(error)
            raise
