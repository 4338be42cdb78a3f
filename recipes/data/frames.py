"""Samples of event frames: made from recordings once, kept in a cache, served as a data set."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from qsnn_ext.errors import DataError

from .events import Events, to_frames
from .files import write_atomically

FrameTransform = Callable[[Tensor, int], tuple[Tensor, int]]

# Part of every cache's key: raise it when a change to reading or framing changes the frames.
_VERSION = 1


@dataclass(frozen=True)
class Recording:
    """One file of events and the samples that are cut from it.

    Attributes:
        path: The file.
        split: "train" or "test".
        labels: The label of each sample.
        read: Returns the events of each sample, in the same order.
        cut: What else decides which events those are (the table's rows).

    """

    path: Path
    split: str
    labels: tuple[int, ...]
    read: Callable[[], Sequence[Events]]
    cut: tuple[tuple[int, ...], ...] = ()


class FrameFiles(Dataset[tuple[Tensor, int]]):
    """Frames in cache files, one per sample."""

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Sequence[int],
        transform: FrameTransform | None = None,
    ):
        self.paths, self.labels, self.transform = list(paths), list(labels), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return event counts (after the transform), float32 [T, 2, H, W], and the label."""
        path = self.paths[index]
        try:
            with np.load(path, allow_pickle=False) as file:
                frames = torch.from_numpy(file["frames"].astype(np.float32))
        except Exception as error:  # zip, zlib and NumPy each have their own
            raise DataError(
                f"{path} is missing or damaged ({error}): delete {path.parent}, it is made again."
            ) from error
        label = self.labels[index]
        return self.transform(frames, label) if self.transform else (frames, label)


class FrameArray(Dataset[tuple[Tensor, int]]):
    """Frames held in memory as unsigned integers [N, T, 2, H, W]."""

    def __init__(
        self,
        frames: NDArray[Any],
        labels: Sequence[int],
        transform: FrameTransform | None = None,
        found: str = "",
    ):
        self.frames, self.labels, self.transform = frames, list(labels), transform
        self.found = found

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return event counts (after the transform), float32 [T, 2, H, W], and the label."""
        frames = torch.from_numpy(self.frames[index].astype(np.float32))
        label = self.labels[index]
        return self.transform(frames, label) if self.transform else (frames, label)


def cache_folder(cache: Path, name: str, parameters: dict[str, Any]) -> Path:
    """Return the folder of a cache, whose name tells what it was made with.

    Args:
        cache: The cache directory.
        name: A readable beginning.
        parameters: Everything the content depends on; JSON can hold it.

    """
    text = json.dumps([_VERSION, parameters], sort_keys=True)
    return cache / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def cached_frames(
    name: str, recordings: Iterable[Recording], steps: int, size: tuple[int, int], cache: Path
) -> dict[str, tuple[list[Path], list[int]]]:
    """Frame every sample that is not in the cache yet, and return where all samples are.

    A sample's file is moved into place when it is whole, so the work may be killed and goes on
    where it stopped. The folder's name depends on T, and on the name, size and cut of every source.

    Returns:
        For "train" and "test" the files and the labels.

    Raises:
        DataError: A source file is damaged, or the cache cannot be written.

    """
    recordings = list(recordings)
    sources = [(r.path.name, r.path.stat().st_size, r.cut) for r in recordings]
    sources.sort()  # the split does not change the frames
    parameters = {"steps": steps, "size": size, "sources": sources}
    folder = cache_folder(cache, f"{name}-T{steps}", parameters)

    samples: dict[str, tuple[list[Path], list[int]]] = {"train": ([], []), "test": ([], [])}
    missing: list[tuple[Recording, list[Path]]] = []
    for recording in recordings:
        stem, count = recording.path.stem, len(recording.labels)
        goals = [folder / f"{stem}_{i}.npz" for i in range(count)]
        paths, labels = samples[recording.split]
        paths += goals
        labels += recording.labels
        if not all(goal.exists() for goal in goals):
            missing.append((recording, goals))

    for recording, goals in track(missing, f"Framing {name}", disable=not missing, transient=True):
        for goal, events in zip(goals, recording.read(), strict=True):
            try:
                frames = to_frames(events, steps, size)
            except DataError as error:
                raise DataError(f"{recording.path}, sample {goal.stem}: {error}") from error
            write_atomically(goal, partial(np.savez_compressed, frames=frames))
    return samples
