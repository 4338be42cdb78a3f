"""How real inputs become integer codes: the unit and range that suit a sample.

:func:`~qsnn_ext.deploy.lower` fixes both once; from then on the input of the program is
``code = clip(round(x / scale), lo, hi)``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

HEADROOM = 2.0  # 16-bit codes reach this much further than the sample


def input_code(
    sample: npt.NDArray[Any], bits: int | None = None, widest: int = 16
) -> tuple[float, tuple[int, int]]:
    """Scale and range of the input codes.

    Counts of events stay what they are, and images of 256 grey levels in [0, 1] become the levels
    0 to 255: both are exact in 8 bits. Anything else takes 16 bits, which reach to twice the
    sample's largest value. Where the sample lies on a grid of evenly spaced values (grey levels
    after normalisation), the unit is chosen so that these fall on codes, or nearly.

    Args:
        sample: Representative inputs.
        bits: Width of a code; by default it is chosen.
        widest: Width to take instead of 16 bits.

    Returns:
        ``scale`` and ``(lo, hi)``: ``code = clip(round(x / scale), lo, hi)``.
    """
    top = float(np.abs(sample).max(initial=0.0))
    signed = bool((sample < 0).any())
    small = min(bits or 8, widest)
    signed = signed or small == 16  # codes fit 16 bits with their sign
    most = 2 ** (small - 1) - 1 if signed else 2**small - 1
    narrow = (-most if signed else 0, most)
    if top == 0:
        return 1.0, narrow
    flat = np.asarray(sample, np.float64).reshape(-1)
    for unit in (1.0, 1 / 255):
        if top / unit <= most + 0.5 and _on_grid(flat, unit):
            return unit, narrow
    flat = flat[:200_000]
    if bits is not None:
        grid = _grid(flat, top, most)
        return grid if grid is not None and top / grid <= most + 0.5 else top / most, narrow
    most = 2 ** (widest - 1) - 1
    finest = HEADROOM * top / most
    grid = _grid(flat, top, 255)
    if grid is not None and top / grid <= most:
        return grid / 2.0 ** max(math.floor(math.log2(grid / finest)), 0), (-most, most)
    return _offset_grid(flat, finest) or finest, (-most, most)


def requested_code(
    sample: npt.NDArray[Any], scale: float | None, bits: int | None, widest: int
) -> tuple[float, tuple[int, int]]:
    """As :func:`input_code`, with the unit ``scale`` unless that is None."""
    if scale is None:
        return input_code(sample, bits, widest)
    _, limits = input_code(np.rint(sample / scale), bits, widest)
    return float(scale), limits


def _on_grid(flat: npt.NDArray[np.float64], unit: float) -> bool:
    codes = flat / unit
    if np.abs(codes).max() < 0.5:  # all would become code 0
        return False
    return bool(np.abs(codes - np.rint(codes)).max() < 1e-4)


def _grid(flat: npt.NDArray[np.float64], top: float, steps: int) -> float | None:
    """A grid that all values lie on: whole numbers, or the coarsest of up to ``steps`` steps."""
    if _on_grid(flat, 1.0):
        return 1.0
    for count in range(1, steps + 1):
        if _on_grid(flat, top / count):
            return top / count
    return None


def _offset_grid(flat: npt.NDArray[np.float64], finest: float) -> float | None:
    """A unit that divides a grid which does not pass through 0, so that it hardly needs rounding.

    With values ``start + i * gap`` and the unit ``gap / m`` all of them miss the codes by as much
    as ``start`` does, and for a good m that is far less than half a code.
    """
    values = np.unique(flat)
    gaps = np.diff(values)
    gaps = gaps[gaps > finest / 100]  # closer ones are one value and its float rounding
    if gaps.size == 0 or gaps.size > 4096:
        return None
    start, span = values[0], values[-1] - values[0]
    gap = span / max(round(span / gaps.min()), 1)
    places = (values - start) / gap
    if np.abs(places - np.rint(places)).max() > 1e-2:
        return None
    m = np.arange(1, int(gap / finest) + 1)
    if m.size == 0:
        return None
    miss = np.abs(start / gap * m - np.rint(start / gap * m)) / m
    return float(gap / m[miss.argmin()])
