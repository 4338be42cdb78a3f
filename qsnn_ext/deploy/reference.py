"""The NumPy reference: what every operation of an integer program means, executed plainly.

Slow and obvious on purpose. The C engine is tested to give the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qsnn_ext.deploy.program import (
    WIDE_LIMIT,
    Add,
    Affine,
    Conv,
    IntArray,
    Logic,
    Neuron,
    Pool,
    Program,
    targets_of,
)
from qsnn_ext.errors import InputError


def unpack_weight(op: Conv) -> IntArray:
    """Weights of a convolution as int8 ``[groups, rows, cout]`` (binary: -1 and +1)."""
    if not op.binary:
        return op.weight
    cout = op.multiplier.size // op.groups
    bits = np.unpackbits(op.weight.astype("<u4").view(np.uint8), axis=-1, bitorder="little")
    return (bits[:, :, :cout].astype(np.int8) * 2 - 1).astype(np.int8)


def windows(
    x: IntArray,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int] = (1, 1),
    fill: int = 0,
) -> npt.NDArray[Any]:
    """Sliding windows ``[N, C, H_out, W_out, kh, kw]`` of ``x [N, C, H, W]``."""
    top, left, bottom, right = padding
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=fill)
    span = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    view = np.lib.stride_tricks.sliding_window_view(x, span, axis=(2, 3))
    return np.asarray(
        view[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]], dtype=x.dtype
    )


def fixed_point(x: IntArray, op: Conv | Affine) -> IntArray:
    """``((x * multiplier + half) >> shift) + bias`` per channel of ``x [N, C, H, W]`` (int64)."""
    m, s, b = (a.astype(np.int64)[:, None, None] for a in (op.multiplier, op.shift, op.bias))
    result: IntArray = ((x * m + (np.int64(1) << (s - 1))) >> s) + b
    return result


def convolve(op: Conv, x: IntArray, weight: IntArray) -> IntArray:
    """Integer dot products ``[N, C_out, H_out, W_out]`` (int64), before scale and bias.

    The product is taken in float64, which is exact: accumulators are proven to fit int32.
    """
    w = windows(x, op.kernel, op.stride, op.padding, op.dilation)
    n, _, h, width = w.shape[:4]
    cin = x.shape[1] // op.groups
    parts = []
    for g in range(op.groups):
        columns = w[:, g * cin : (g + 1) * cin].transpose(0, 2, 3, 4, 5, 1)
        columns = columns.reshape(n * h * width, -1).astype(np.float64)
        parts.append((columns @ weight[g].astype(np.float64)).reshape(n, h, width, -1))
    return np.concatenate(parts, axis=3).transpose(0, 3, 1, 2).astype(np.int64)


def pool(op: Pool, x: IntArray) -> IntArray:
    """Maximum, sum or repetition."""
    if op.function == "repeat":
        return x.repeat(op.kernel[0], axis=2).repeat(op.kernel[1], axis=3)
    fill = 0 if op.function == "sum" else np.iinfo(np.int64).min
    w = windows(x, op.kernel, op.stride, op.padding, fill=int(fill))
    result: IntArray = w.sum(axis=(4, 5)) if op.function == "sum" else w.max(axis=(4, 5))
    return result


def fire(op: Neuron, x: IntArray, state: IntArray) -> tuple[IntArray, IntArray, IntArray | None]:
    """One step of a neuron.

    Args:
        op: The neuron.
        x: Current ``[N, C, H, W]`` int64.
        state: State words (int64) of the same shape.

    Returns:
        Spikes, the new state, and the membrane reading (None when there is no such output).
    """
    channel = np.arange(x.shape[1])[:, None, None]
    theta = op.threshold.astype(np.int64)[channel % op.threshold.size]
    value = op.reset_value.astype(np.int64)[channel % op.reset_value.size]
    leak = op.leak.astype(np.int64)
    row = channel % leak.shape[0]
    if op.bits == 32:
        m, s, offset = leak[row, 0], leak[row, 1], leak[row, 2]
        h = ((state * m + (np.int64(1) << (s - 1))) >> s) + offset + x
    else:
        h = leak[row, state] + x
        if op.delay == "gate":
            h = np.where(state >> op.bits == 1, 0, h)
    if op.order == "quantize_first":
        code = np.searchsorted(op.bounds, h, side="right") - op.levels
        spike = (code >= theta).astype(np.int64)
    else:
        spike = (h >= theta).astype(np.int64)
        if op.reset == "hard":
            v = np.where(spike == 1, value, h)
        elif op.reset == "soft":
            v = h - value * spike
        else:
            v = h
        if op.bits == 32:
            new = np.clip(v, -WIDE_LIMIT, WIDE_LIMIT)
            return spike, new, None if op.membrane is None else new + op.reading[1] * spike
        code = np.searchsorted(op.bounds, v, side="right") - op.levels
    code = np.where(spike == 1, code, np.minimum(code, op.ceiling))
    new = code & (2**op.bits - 1)
    if op.delay != "none":
        new = new | (spike << op.bits)
    return spike, new, None if op.membrane is None else op.reading.astype(np.int64)[new]


def check_state(program: Program, batch: int, state: dict[str, IntArray]) -> None:
    """Raise :class:`InputError` unless ``state`` is one that a session of the program returned.

    Args:
        program: A valid program.
        batch: Number of samples of the session that is to go on from it.
        state: Name of neuron -> state words ``[N, C, H, W]``.
    """
    for op in program.neurons:
        shape = (batch, *program.values[op.source].shape)
        words = state.get(op.name)
        if words is None:
            raise InputError(f"the state lacks neuron {op.name!r}; it is of another program")
        if words.shape != shape:
            raise InputError(
                f"the state of neuron {op.name!r} has shape {words.shape}; "
                f"this session needs {shape}"
            )
        top = 2**op.state_bits
        if op.bits < 32 and not ((words >= 0) & (words < top)).all():
            raise InputError(f"the state of neuron {op.name!r} holds words outside 0..{top - 1}")


def check_codes(program: Program, batch: int, codes: IntArray) -> None:
    """Raise :class:`InputError` unless ``codes`` are the input of one time step."""
    expected = (batch, *program.values[0].shape)
    if codes.shape != expected:
        raise InputError(f"input of shape {codes.shape}; this session takes {expected}")


class ReferenceSession:
    """A program in execution by NumPy, one time step at a time.

    Args:
        program: A valid program.
        batch: Number of independent samples.
    """

    def __init__(self, program: Program, batch: int = 1) -> None:
        self.program = program
        self.batch = batch
        self.trace: dict[int, IntArray] = {}  # every value of the last step, for tests and reports
        self._weights = {id(op): unpack_weight(op) for op in program.ops if isinstance(op, Conv)}
        self.reset()

    def reset(self) -> None:
        """Put every neuron into its initial state."""
        self._state = {
            op.name: np.full(
                (self.batch, *self.program.values[op.source].shape), op.initial, np.int64
            )
            for op in self.program.neurons
        }

    def state(self) -> dict[str, IntArray]:
        """A copy of all states: name of neuron -> int32 ``[N, C, H, W]`` of state words."""
        return {k: v.astype(np.int32) for k, v in self._state.items()}

    def restore(self, state: dict[str, IntArray]) -> None:
        """Continue from what :meth:`state` returned.

        Raises:
            InputError: If it is the state of another program or batch; nothing is changed then.
        """
        check_state(self.program, self.batch, state)
        self._state = {k: np.array(state[k], np.int64) for k in self._state}

    def step(self, codes: IntArray) -> list[IntArray]:
        """Run one time step.

        Args:
            codes: Input codes ``[N, C, H, W]``.

        Returns:
            One int32 array ``[N, C, H, W]`` per output of the program.

        Raises:
            InputError: If the shape is another.
        """
        check_codes(self.program, self.batch, codes)
        live: dict[int, IntArray] = {0: codes.astype(np.int64)}
        for op in self.program.ops:
            for target, result in zip(targets_of(op), self._execute(op, live), strict=True):
                live[target] = result
        self.trace = live
        return [live[i].astype(np.int32) for i in self.program.outputs]

    def _execute(self, op: Any, live: dict[int, IntArray]) -> list[IntArray]:
        if isinstance(op, Conv):
            return [fixed_point(convolve(op, live[op.source], self._weights[id(op)]), op)]
        if isinstance(op, Affine):
            return [fixed_point(live[op.source], op)]
        if isinstance(op, Add):
            terms = [live[i] * f for i, f in zip(op.sources, op.factors, strict=True)]
            return [np.sum(terms, axis=0)]
        if isinstance(op, Logic):
            a, b = (live[i] for i in op.sources)
            return [a & b if op.function == "and" else (1 - a) & b]
        if isinstance(op, Pool):
            return [pool(op, live[op.source])]
        spike, new, membrane = fire(op, live[op.source], self._state[op.name])
        self._state[op.name] = new
        return [spike] if membrane is None else [spike, membrane]
