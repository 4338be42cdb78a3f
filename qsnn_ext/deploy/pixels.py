"""From 8-bit pixels to input codes by table, for devices without floating point."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from qsnn_ext.deploy import checks
from qsnn_ext.deploy.program import Program
from qsnn_ext.errors import InputError, InputTypeError


def pixel_table(
    program: Program, mean: float | Sequence[float], std: float | Sequence[float]
) -> npt.NDArray[np.int16]:
    """Input code of every 8-bit pixel: ``code[channel, pixel]``.

    The codes are those of ``(pixel / 255 - mean) / std`` in float32, which is what torchvision's
    ``ToTensor`` and ``Normalize`` compute, so a look-up replaces all arithmetic on the input.

    Args:
        program: A valid program.
        mean, std: Of the normalisation the model was trained with: one number, or one per channel.

    Returns:
        int16 ``[C, 256]``.

    Raises:
        InputError: If mean or std have as many entries as neither 1 nor C, or are not finite, or a
            std is not positive.
        InputTypeError: If ``program`` is none, or mean or std are no numbers.
    """
    channels = checks.program(program, "pixel_table").values[0].shape[0]
    constants = []
    for what, numbers in (("mean", mean), ("std", std)):
        given = checks.as_array(numbers, what)
        if given.dtype.kind not in "iuf":
            raise InputTypeError(f"{what}={numbers!r} must be a number, or one per channel")
        array = np.atleast_1d(given).astype(np.float32)
        if array.shape not in ((1,), (channels,)):
            raise InputError(
                f"{what} has shape {array.shape}; give one number or {channels}, one per channel"
            )
        if not np.isfinite(array).all() or (what == "std" and not (array > 0).all()):
            raise InputError(f"{what}={numbers} must be finite" + " and positive" * (what == "std"))
        constants.append(array.reshape(-1, 1))
    level = np.arange(256, dtype=np.float32) / np.float32(255)
    real = np.broadcast_to((level - constants[0]) / constants[1], (channels, 256))
    shown = real.astype(np.float64)
    if program.prologue is not None:
        gain, bias = program.prologue
        shown = shown * gain.reshape(-1, 1) + bias.reshape(-1, 1)
    codes = np.rint(shown / program.input_scale)
    return np.clip(codes, *program.input_range).astype(np.int16)
