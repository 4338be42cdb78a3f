"""Events of a dynamic vision sensor, and frames that count them.

An event array is a NumPy structured array with the fields x, y (pixels), t (microseconds) and p
(polarity), the layout that tonic's transforms take.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsnn_ext.errors import ConfigError, DataError

EVENT = np.dtype([("x", np.int16), ("y", np.int16), ("t", np.int64), ("p", np.bool_)])

Events = NDArray[np.void]


def make_events(x: Any, y: Any, t: Any, p: Any) -> Events:
    """Return the event array of four equally long arrays."""
    events = np.empty(len(t), EVENT)
    events["x"], events["y"], events["t"], events["p"] = x, y, t, p
    return events


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
