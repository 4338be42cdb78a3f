"""The NumPy reference: what every operation of an integer program means, executed plainly.

Slow and obvious on purpose. The C engine is tested to give the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qsnn_ext.deploy import checks
from qsnn_ext.deploy.checks import within_limit
from qsnn_ext.deploy.program import (
    WIDE_LIMIT,
    Add,
    Affine,
    Concat,
    Conv,
    Delay,
    Gather,
    IntArray,
    Logic,
    Matmul,
    Neuron,
    Pool,
    Program,
    targets_of,
)


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

    One matrix product per tap, in float64, which is exact: accumulators are proven to fit int32.
    """
    w = windows(x, op.kernel, op.stride, op.padding, op.dilation)
    n, _, h, width, kh, kw = w.shape
    cin, cout = x.shape[1] // op.groups, op.multiplier.size // op.groups
    taps = weight.reshape(op.groups, kh, kw, cin, cout).astype(np.float64)
    dot = np.zeros((op.groups, n, h, width, cout))
    for g in range(op.groups):
        for ky in range(kh):
            for kx in range(kw):
                seen = w[:, g * cin : (g + 1) * cin, :, :, ky, kx].transpose(0, 2, 3, 1)
                dot[g] += seen.astype(np.float64) @ taps[g, ky, kx]
    return dot.transpose(1, 0, 4, 2, 3).reshape(n, -1, h, width).astype(np.int64)


def pool(op: Pool, x: IntArray) -> IntArray:
    """Maximum, sum or repetition."""
    if op.function == "repeat":
        return x.repeat(op.kernel[0], axis=2).repeat(op.kernel[1], axis=3)
    fill = 0 if op.function == "sum" else np.iinfo(np.int64).min
    w = windows(x, op.kernel, op.stride, op.padding, fill=int(fill))
    result: IntArray = w.sum(axis=(4, 5)) if op.function == "sum" else w.max(axis=(4, 5))
    return result


def gather(op: Gather, x: IntArray) -> IntArray:
    """Elements in another order, zeros where a number is -1."""
    c, h, w = (a.astype(np.int64) for a in (op.channel, op.row, op.column))
    index = c[:, None, None] + h[:, None] + w
    inside = (c[:, None, None] >= 0) & (h[:, None] >= 0) & (w >= 0)
    taken = x.reshape(x.shape[0], -1)[:, np.where(inside, index, 0)]
    result: IntArray = np.where(inside, taken, 0)
    return result


def matmul(op: Matmul, a: IntArray, b: IntArray, shape: tuple[int, int, int]) -> IntArray:
    """Products of matrices whose rows are pixels and whose columns are channels of a head."""
    matrices = []
    for x, flipped in zip((a, b), op.transpose, strict=True):
        m = x.reshape(x.shape[0], op.heads, x.shape[1] // op.heads, -1)  # [N, heads, columns, rows]
        matrices.append(m if flipped else m.swapaxes(2, 3))
    product = matrices[0] @ matrices[1]  # exact: int64
    result: IntArray = product.swapaxes(2, 3).reshape(a.shape[0], *shape)
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


def check_memory(program: Program, limit: int) -> None:
    """Refuse a program one sample of which takes more than ``limit`` bytes in NumPy.

    Counted are all values of a step, and copies of the largest.

    Raises:
        FormatError: If it takes more.
    """
    largest = max(v.elements for v in program.values)
    for op in program.ops:
        if isinstance(op, Conv | Pool):
            c, h, w = program.values[op.source].shape
            top, left, bottom, right = op.padding
            largest = max(largest, c * (h + top + bottom) * (w + left + right))
    answers = program.timesteps * sum(program.values[i].elements for i in program.outputs)
    within_limit(8 * (sum(v.elements for v in program.values) + 4 * largest) + 4 * answers, limit)


class ReferenceSession:
    """A program in execution by NumPy, one time step at a time.

    Args:
        program: A valid program.
        batch: Number of independent samples, at least 1.

    Raises:
        ConfigError: If the batch is no such number.
    """

    def __init__(self, program: Program, batch: int = 1) -> None:
        self.program = program
        self.batch = checks.count("batch", batch)
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
        for op in self.program.delays:
            shape = (self.batch, *self.program.values[op.source].shape)
            self._state[op.name] = np.zeros(shape, np.int64)

    def state(self) -> dict[str, IntArray]:
        """A copy of all states: name of neuron -> int32 ``[N, C, H, W]`` of state words."""
        return {k: v.astype(np.int32) for k, v in self._state.items()}

    def restore(self, state: dict[str, IntArray]) -> None:
        """Continue from what :meth:`state` returned.

        Raises:
            InputError: If it is the state of another program or batch; nothing is changed then.
            InputTypeError: If it is no dictionary of integer arrays.
        """
        words = checks.states(self.program, self.batch, state)
        self._state = {k: np.array(words[k], np.int64) for k in self._state}

    def step(self, codes: IntArray) -> list[IntArray]:
        """Run one time step.

        Args:
            codes: Input codes ``[N, C, H, W]``.

        Returns:
            One int32 array ``[N, C, H, W]`` per output of the program.

        Raises:
            InputError: If the shape is another, or a code is out of range.
            InputTypeError: If they are real numbers: ``net.codes(frame)`` makes codes of them.
        """
        codes = checks.step_codes(self.program, self.batch, codes)
        live: dict[int, IntArray] = {0: codes.astype(np.int64)}
        for op in self.program.ops:
            for target, result in zip(targets_of(op), self._execute(op, live), strict=True):
                live[target] = result
        for op in self.program.delays:
            self._state[op.name] = live[op.source]
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
        if isinstance(op, Gather):
            return [gather(op, live[op.source])]
        if isinstance(op, Concat):
            return [np.concatenate([live[i] for i in op.sources], axis=1)]
        if isinstance(op, Matmul):
            shape = self.program.values[op.target].shape
            a, b = (live[i] for i in op.sources)
            return [matmul(op, a, b, shape)]
        if isinstance(op, Delay):
            return [self._state[op.name]]
        spike, new, membrane = fire(op, live[op.source], self._state[op.name])
        self._state[op.name] = new
        return [spike] if membrane is None else [spike, membrane]
