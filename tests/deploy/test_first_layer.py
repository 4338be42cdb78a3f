"""The first layer, which reads codes of 8 or 16 bits, in the C engine and in the reference."""

from __future__ import annotations

import numpy as np
import pytest

from qsnn_ext.deploy.engine import EngineSession, backends
from qsnn_ext.deploy.program import Conv, Program, Value
from qsnn_ext.deploy.reference import ReferenceSession
from tests.deploy.random_programs import INPUT_RANGES

COMPILED = [b for b in backends() if b != "numpy"]


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("binary", [True, False], ids=["1-bit", "8-bit"])
@pytest.mark.parametrize("limits", INPUT_RANGES, ids=str)
def test_first_layer_at_the_ends_of_every_input_range(limits, binary, backend, rng):
    """Codes and weights at their extremes: accumulators reach as far as they are proven to."""
    channels, cout, kernel = 3, 40, 5
    rows = channels * kernel * kernel
    if binary:
        weight = rng.integers(0, 2**32, (1, rows, 2), dtype=np.uint32)
        weight[:, :, 1] &= 2 ** (cout % 32) - 1
        weight[:, :, 0] |= 1
    else:
        weight = rng.integers(-127, 128, (1, rows, cout)).astype(np.int8)
        weight[:, :, 0], weight[:, :, 1] = 127, -127
    conv = Conv(
        "conv", 0, 1, weight, (kernel, kernel), (1, 1), (2, 2, 2, 2), (1, 1), 1,
        np.full(cout, 2**20, np.int32), np.full(cout, 20, np.uint8),
        rng.integers(-99, 100, cout).astype(np.int32),
    )  # fmt: skip
    values = [Value("input", (channels, 6, 7), 0), Value("out", (cout, 6, 7), 0)]
    program = Program(values, [conv], (1,), input_range=limits)
    lo, hi = limits
    x = rng.integers(lo, hi + 1, (4, 1, channels, 6, 7)).astype(np.int32)
    x[0], x[1] = lo, hi
    x[2] = np.where(rng.random(x[2].shape) < 0.5, lo, hi)
    expected = ReferenceSession(program, 4).step(x[:, 0])[0]
    answer = EngineSession(program, 4, backend).run(x, 1, static=False)
    np.testing.assert_array_equal(answer[0][:, 0], expected)
    assert np.abs(expected).max() >= rows * hi * (1 if binary else 127) - 99
