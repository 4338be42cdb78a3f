"""A simulated event camera that looks at a picture while its gaze jumps (saccades).

Like the recording of N-MNIST (Orchard et al., 2015) the gaze runs along the three sides of a
triangle, 100 ms each. A pixel remembers the log intensity at its last event and sends an ON (OFF)
event whenever the present one is a threshold above (below) it (Lichtsteiner et al., 2008). Pixels
differ a little in their threshold and send a few events for no reason, as real ones do.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from .events import Events, make_events

Floats = NDArray[np.float64]
_BATCH = 64  # samples simulated together: bounds the memory


@dataclass(frozen=True)
class Camera:
    """What the simulated events depend on; together with the picture, its index and the seed.

    Attributes:
        size: Height and width of the sensor in pixels.
        amplitude: Length of a saccade in pixels.
        saccade: Duration of a saccade in microseconds.
        substeps: Steps of the simulation per saccade.
        threshold: Change of log intensity that makes an event.
        mismatch: Relative standard deviation of the threshold over the pixels.
        noise: Events without a cause, per pixel and second.
        dark: Intensity added to the picture's [0, 1] before the logarithm.

    """

    size: int = 32
    amplitude: float = 4.0
    saccade: int = 100_000
    substeps: int = 20
    threshold: float = 0.4
    mismatch: float = 0.03
    noise: float = 0.5
    dark: float = 0.1

    @property
    def duration(self) -> int:
        """Length of a recording in microseconds."""
        return 3 * self.saccade

    def record(self, pictures: NDArray[np.floating], seed: int = 0) -> list[Events]:
        """Return the events of each picture, in order of time.

        The same picture at the same index with the same seed always gives the same events,
        however many pictures there are.

        Args:
            pictures: [N, H, W] in [0, 1], no larger than the sensor; shown in its centre.
            seed: Of the gaze's path, the pixels' thresholds and the noise.

        """
        events: list[Events] = []
        for start in range(0, len(pictures), _BATCH):
            batch = pictures[start : start + _BATCH]
            rngs = [np.random.default_rng([seed, start + i]) for i in range(len(batch))]
            events += self._record(batch.astype(np.float64), rngs)
        return events

    def _record(self, pictures: Floats, rngs: list[np.random.Generator]) -> list[Events]:
        gaze = np.stack([self._gaze(rng) for rng in rngs])
        light = np.log(self._see(pictures, gaze) + self.dark)
        spread = [rng.normal(1.0, self.mismatch, (self.size, self.size)) for rng in rngs]
        threshold = self.threshold * np.clip(np.stack(spread), 0.5, None)
        sample, x, y, t, p = self._crossings(light, threshold)

        noise = [self._noise(rng) for rng in rngs]
        count = len(rngs)
        order = np.lexsort((t, sample))
        parts = np.split(order, np.searchsorted(sample[order], np.arange(1, count)))
        events = []
        for part, extra in zip(parts, noise, strict=True):
            both = np.concatenate([make_events(x[part], y[part], t[part], p[part]), extra])
            events.append(both[np.argsort(both["t"], kind="stable")])
        return events

    def _gaze(self, rng: np.random.Generator) -> Floats:
        """Return the path of the gaze, [steps + 1, 2] in pixels (y, x), centred on the picture."""
        angle = rng.normal(0.0, np.radians(10.0))
        amplitude = self.amplitude * rng.uniform(0.85, 1.15)
        corners = amplitude * np.array([[-0.5, -0.5], [0.5, 0.0], [-0.5, 0.5], [-0.5, -0.5]])
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        corners = corners @ turn.T + rng.uniform(-1.0, 1.0, 2)
        # A saccade speeds up and slows down again.
        phase = (1.0 - np.cos(np.pi * np.arange(1, self.substeps + 1) / self.substeps)) / 2.0
        sides = [a + (b - a) * phase[:, None] for a, b in pairwise(corners)]
        return np.concatenate([corners[:1], *sides])

    def _see(self, pictures: Floats, gaze: Floats) -> Floats:
        """Return what the sensor sees at each step, [N, steps + 1, size, size]."""
        count, height, width = pictures.shape
        margin = int(np.ceil(self.amplitude)) + 3  # room for the gaze and for interpolation
        side = self.size + 2 * margin
        world = np.zeros((count, side, side))
        top, left = (side - height) // 2, (side - width) // 2
        world[:, top : top + height, left : left + width] = pictures

        # The window that the sensor looks through, a pixel larger than the sensor to interpolate.
        windows = sliding_window_view(world, (self.size + 1, self.size + 1), axis=(1, 2))
        base = np.floor(gaze).astype(int)
        part = gaze - base
        n = np.arange(count)[:, None]
        seen: Floats = windows[n, base[..., 0] + margin, base[..., 1] + margin]
        fy, fx = part[..., 0, None, None], part[..., 1, None, None]
        seen = seen[..., :-1, :] * (1 - fy) + seen[..., 1:, :] * fy
        seen = seen[..., :-1] * (1 - fx) + seen[..., 1:] * fx
        return seen

    def _crossings(self, light: Floats, threshold: Floats) -> tuple[NDArray[np.int64], ...]:
        """Return sample, x, y, t, p of all events, unordered.

        Between two steps the log intensity is taken to change linearly, which dates each crossing.
        """
        reference = light[:, 0].copy()
        step = self.saccade / self.substeps
        found: list[NDArray[np.int64]] = []
        for index in range(1, light.shape[1]):
            before, now = light[:, index - 1], light[:, index]
            crossed = np.trunc((now - reference) / threshold).astype(np.int64)
            where = np.nonzero(crossed)
            times = np.abs(crossed[where])
            # One row per event: k-th crossing of its pixel within this step.
            row = np.repeat(np.arange(len(times)), times)
            k = np.arange(len(row)) - np.repeat(np.cumsum(times) - times, times) + 1
            sample, y, x = (axis[row] for axis in where)
            sign = np.sign(crossed[where])[row]
            level = reference[where][row] + k * sign * threshold[where][row]
            fraction = (level - before[where][row]) / (now - before)[where][row]
            t = (index - 1 + np.clip(fraction, 0.0, 1.0)) * step
            found.append(np.stack([sample, x, y, t.astype(np.int64), sign > 0]))
            reference += crossed * threshold
        return tuple(np.concatenate(found, axis=1))

    def _noise(self, rng: np.random.Generator) -> Events:
        count = rng.poisson(self.noise * self.size**2 * self.duration / 1e6)
        x, y = rng.integers(self.size, size=(2, count))
        return make_events(
            x, y, rng.integers(self.duration, size=count), rng.integers(2, size=count)
        )
