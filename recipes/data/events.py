"""Events of a dynamic vision sensor: AEDAT files read, framed, cached, served as a data set.

An event array is a NumPy structured array with the fields x, y (pixels), t (microseconds) and p
(polarity), the layout that tonic's transforms take. The readers are vectorised and refuse a file
that is cut short; SpikingJelly's loop over single events in Python, and tonic's take what is there.
"""

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

from qsnn_ext.errors import ConfigError, DataError

from .files import write_atomically

EVENT = np.dtype([("x", np.int16), ("y", np.int16), ("t", np.int64), ("p", np.bool_)])

Events = NDArray[np.void]
FrameTransform = Callable[[Tensor, int], tuple[Tensor, int]]

# Part of every cache's key: raise it when a change to reading or framing changes the frames.
_VERSION = 1


def make_events(x: Any, y: Any, t: Any, p: Any) -> Events:
    """Return the event array of four equally long arrays."""
    events = np.empty(len(t), EVENT)
    events["x"], events["y"], events["t"], events["p"] = x, y, t, p
    return events


def _body(path: Path, version: bytes) -> bytes:
    """Return what follows the header, a run of lines that start with ``#``."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    if not data.startswith(b"#!AER-DAT" + version):
        raise DataError(
            f"{path} does not begin with '#!AER-DAT{version.decode()}': it is damaged or of "
            f"another format."
        )
    start = 0
    while data[start : start + 1] == b"#":
        line, start = start, data.find(b"\n", start) + 1
        if start == 0:
            raise DataError(f"{path} is cut short inside its header: unpack or fetch it again.")
        if data.startswith(b"#!END-HEADER", line):
            break
    return data[start:]


def read_aedat2(path: Path) -> Events:
    """Read an AEDAT 2.0 file of a DVS128, as CIFAR10-DVS has them.

    An event is two big-endian 32-bit words: an address (bit 0 polarity, bits 1-7 column, bits 8-14
    row, both counted from the far corner of a camera lying on its side) and a time in microseconds.
    The coordinates returned are turned so that the pictures stand upright, as in SpikingJelly.

    Raises:
        DataError: The file is unreadable, of another format, empty or cut short.

    """
    body = _body(path, b"2")
    if not body or len(body) % 8:
        raise DataError(
            f"{path} is cut short ({len(body):,} bytes of events, not a positive multiple of 8): "
            f"unpack or fetch it again."
        )
    words = np.frombuffer(body, ">u4").reshape(-1, 2)
    address = words[:, 0]
    return make_events(
        x=127 - (address >> 8 & 0x7F),
        y=127 - (address >> 1 & 0x7F),
        t=words[:, 1],
        p=(address & 1) == 0,
    )


def read_aedat3(path: Path) -> tuple[Events, bool]:
    """Read the polarity events of an AEDAT 3.1 file, as DVS-Gesture has them.

    The body is a run of packets: a header of 28 bytes, then ``eventCapacity`` events of
    ``eventSize`` bytes. A polarity event is two little-endian words: bit 1 polarity, bits 2-16 y,
    bits 17-31 x; then 31 bits of time in microseconds, to which the packet adds its overflow.

    Returns:
        The events, and whether the last packet is whole.

    Raises:
        DataError: The file is unreadable or of another format.

    """
    body = _body(path, b"3.1")
    header = np.dtype(
        [("type", "<u2"), ("source", "<u2")]
        + [(n, "<u4") for n in ("size", "offset", "overflow", "capacity", "number", "valid")]
    )
    packets: list[Events] = []
    start, whole = 0, True
    while start < len(body):
        first = start + header.itemsize
        if first > len(body):
            whole = False
            break
        head = np.frombuffer(body, header, 1, start)[0]
        size, start = int(head["size"]), first + int(head["size"]) * int(head["capacity"])
        if start > len(body):
            whole = False
        if head["type"] != 1:  # 1 is a polarity event; 0, 2, ... are the camera's own messages
            continue
        if size != 8:
            raise DataError(f"{path} is damaged: it has polarity events of {size} bytes, not 8.")
        count = (min(start, len(body)) - first) // size
        words = np.frombuffer(body, "<u4", 2 * count, first).reshape(-1, 2)
        data, time = words[:, 0], words[:, 1].astype(np.int64) | int(head["overflow"]) << 31
        packets.append(make_events(data >> 17, data >> 2 & 0x7FFF, time, data >> 1 & 1))
    return (np.concatenate(packets) if packets else np.empty(0, EVENT)), whole


def to_frames(
    events: Events, steps: int, size: tuple[int, int], by: str = "number"
) -> NDArray[Any]:
    """Count the events of each step, polarity and pixel.

    No event is lost: the last frame takes the remainder, as in SpikingJelly. (tonic's ``ToFrame``
    leaves out up to ``steps - 1`` events at the end when it is asked for a number of frames.)

    Args:
        events: Event array, in the order of recording.
        steps: Number of frames T.
        size: Height and width of the sensor.
        by: "number" for frames of equally many events, "time" for frames of equal duration.

    Returns:
        [T, 2, H, W] of the smallest unsigned integer type that holds the largest count.

    Raises:
        DataError: There is no event, or one lies outside the sensor.

    """
    height, width = size
    if len(events) == 0:
        raise DataError("a sample without events cannot be framed.")
    x, y = events["x"].astype(np.int64), events["y"].astype(np.int64)
    if x.min() < 0 or y.min() < 0 or x.max() >= width or y.max() >= height:
        raise DataError(
            f"an event at x={x.max()}, y={y.max()} or below 0 lies outside the sensor of "
            f"{width}x{height} pixels."
        )
    if by == "number":
        step = np.arange(len(events)) // max(len(events) // steps, 1)
    elif by == "time":
        t = events["t"] - events["t"].min()
        step = t // max(int(t.max()) // steps, 1)
    else:
        raise ConfigError(f"frames can be cut by 'number' or 'time', not {by!r}.")
    cell = ((np.minimum(step, steps - 1) * 2 + events["p"]) * height + y) * width + x
    counts = np.bincount(cell, minlength=steps * 2 * height * width)
    counts = counts.astype(np.min_scalar_type(int(counts.max())))
    return counts.reshape(steps, 2, height, width)


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
    ):
        self.frames, self.labels, self.transform = frames, list(labels), transform

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
