"""Parameters as the C runtime reads them: one function per parameter of a record.

Each gives as many words as the layout has room for, which ``image.assemble`` checks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qsnn_ext.deploy.layout import Layout, Plan
from qsnn_ext.deploy.program import (
    INT32_MAX,
    Add,
    Affine,
    Concat,
    Conv,
    Gather,
    IntArray,
    Neuron,
    words,
)
from qsnn_ext.deploy.schedule import Step

Words = npt.NDArray[np.uint32]


def parameters_of_neuron(n: Neuron, areas: dict[str, Any]) -> dict[str, IntArray]:
    """Tables of a neuron; what exists once per channel is padded to whole words of channels."""
    leak = np.zeros((areas["leak"].words // n.leak.shape[1], n.leak.shape[1]), np.int32)
    leak[: n.leak.shape[0]] = n.leak
    bounds = np.full(areas["bounds"].words, INT32_MAX, np.int32)
    bounds[: n.bounds.size] = n.bounds
    found = {"leak": leak, "bounds": bounds, "reading": n.reading}
    for name in ("threshold", "reset_value"):
        array = getattr(n, name)
        padded = np.zeros(areas[name].words, np.int32)
        padded[:] = array if array.size == 1 else np.pad(array, (0, padded.size - array.size))
        found[name] = padded
    return found


def parameters_of_step(layout: Layout, step: Step, plan: Plan) -> dict[str, IntArray]:
    """Weights, scales, lists and firing constants of a step."""
    op, areas = step.op, plan.areas
    found: dict[str, IntArray] = {}
    if isinstance(op, Add):
        records = [layout.value_records[i].offset for i in op.sources]
        found["list"] = np.asarray(list(zip(records, op.factors, strict=True)), np.int32)
    if isinstance(op, Concat):
        records = [layout.value_records[i].offset for i in op.sources]
        found["list"] = np.asarray(records, np.int32)
    if isinstance(op, Gather):
        found.update(channel=op.channel, row=op.row, column=op.column)
    if isinstance(op, Conv | Affine) and areas["multiplier"].words:
        found["multiplier"], found["bias"] = op.multiplier, op.bias
        found["shift"] = _bytes(op.shift.view(np.int8))
    if isinstance(op, Conv):
        firing = "firing" in areas and areas["firing"].words > 0
        # Where firing is decided on bits no channel's multiplier may be negative.
        flip = op.multiplier < 0 if firing else np.zeros(op.multiplier.size, bool)
        if plan.record == "events":
            weight = op.weight ^ _sign_words(flip)
            found["weight"] = _event_rows(op, weight[0], plan)
            if areas["dense"].words:
                found["dense"] = _dense(weight, weight.shape[2] * 32)
        elif plan.record == "codes":
            found["weight"] = _pairs(op.weight[0] * np.where(flip, -1, 1).astype(np.int16))
        elif plan.record == "groups":
            found["dense"] = _dense(op.weight, op.multiplier.size // op.groups)
        else:
            found["weight"] = op.weight if op.binary else _bytes(op.weight)
        if firing:
            found["firing"], found["after"] = _firing(layout, step, plan)
    return found


# -- weights -------------------------------------------------------------------------------------


def _event_rows(op: Conv, weight: IntArray, plan: Plan) -> IntArray:
    """Rows of bits and a row of zeros; joined: the rows of the kernel's columns side by side."""
    pitch = plan.fields["pitch"] // 4
    if plan.fields["joined"]:
        (kh, kw), (rows, columns) = op.kernel, weight.shape
        cin = rows // (kh * kw)
        side = weight.reshape(kh, kw, cin, columns).transpose(0, 2, 1, 3)
        weight = np.zeros((kh * cin, pitch), np.uint32)
        weight[:, : kw * columns] = side.reshape(kh * cin, kw * columns)
    return np.concatenate([weight.reshape(-1), np.zeros(pitch, np.uint32)])


def _dense(weight: IntArray, channels: int) -> IntArray:
    """Words of 32 inputs: ``[group][16 channels][word][channel]``."""
    groups, rows, _ = weight.shape
    n, wide = -(-rows // 256) * 8, -(-channels // 16) * 16
    bits = np.unpackbits(weight.astype("<u4").view(np.uint8), axis=-1, bitorder="little")
    padded = np.zeros((groups, wide, n * 32), np.uint8)
    padded[:, :channels, :rows] = bits[:, :, :channels].transpose(0, 2, 1)
    packed = _pack(padded).reshape(groups, wide // 16, 16, n).transpose(0, 1, 3, 2)
    return np.ascontiguousarray(packed)


def _pairs(weight: IntArray) -> IntArray:
    """Pairs of rows, the first in the lower half: ``[word of channels][pair][channel]``."""
    rows, columns = weight.shape
    pairs, wide = -(-rows // 2), words(columns)
    padded = np.zeros((2 * pairs, wide * 32), np.int32)
    padded[:rows, :columns] = weight
    both = (padded[0::2] & 0xFFFF) | (padded[1::2] << 16)
    return both.reshape(pairs, wide, 32).transpose(1, 0, 2).astype(np.int32)


def _bytes(weight: IntArray) -> Words:
    """Bytes in words, the first the lowest, whatever the order of bytes of this machine."""
    flat = weight.reshape(-1)
    padded = np.zeros(-(-flat.size // 4) * 4, np.int8)
    padded[: flat.size] = flat
    return padded.view("<u4").astype(np.uint32)


def _pack(bits: IntArray) -> Words:
    """Zeros and ones, the last axis a multiple of 32, as a flat array of words."""
    packed = np.packbits(bits.astype(np.uint8), axis=-1, bitorder="little")
    return packed.reshape(-1).view("<u4").astype(np.uint32)


def _sign_words(flags: npt.NDArray[np.bool_]) -> Words:
    """Flags of channels as words of bits."""
    padded = np.zeros(words(flags.size) * 32, np.uint8)
    padded[: flags.size] = flags
    return _pack(padded)


# -- neurons that are decided on bits ------------------------------------------------------------


def _steps(layout: Layout, step: Step) -> npt.NDArray[np.int64]:
    """The smallest dot products for which the answer to a question is yes.

    The questions, for no residual spike and then for one: in each of the states 0, 1 and -1, does
    the neuron fire, is its new level at least 0, at least 1 if it does not?

    Returns:
        int64 ``[9 or 18, C]`` for weights whose sign makes every multiplier positive; values one
        beyond what a dot product can be mean never.
    """
    op, n = step.op, step.neuron
    assert isinstance(op, Conv)
    assert n is not None
    channels, reach = op.multiplier.size, layout.reach(op)
    m = np.abs(op.multiplier.astype(np.int64))
    shift = op.shift.astype(np.int64)
    half = np.int64(1) << (shift - 1)
    largest = ((reach * m + half) >> shift) + 2
    r = step.residual
    own, other = (1, 0) if r is None else (r.own, r.other)
    leak = np.broadcast_to(n.leak, (channels, n.leak.shape[1])).astype(np.int64)
    theta = np.broadcast_to(n.threshold, (channels,)).astype(np.int64)
    levels = [theta, *(np.full(channels, b, np.int64) for b in n.bounds)]
    steps = []
    for spike in (0,) if r is None else (0, 1):
        for word in (0, 1, 3):
            for level in levels:
                y = -((leak[:, word] + other * spike - level) // own) - op.bias
                need = (np.clip(y, -largest, largest) << shift) - half  # of dot * multiplier
                dot = -(-need // np.maximum(m, 1))
                steps.append(np.where(m > 0, dot, np.where(need <= 0, -reach, reach + 1)))
    clipped: npt.NDArray[np.int64] = np.clip(np.array(steps), -reach, reach + 1)
    return clipped


def _firing(layout: Layout, step: Step, plan: Plan) -> tuple[IntArray, IntArray]:
    """What a firing decision compares with, and two planes: the level after a spike."""
    op, n = step.op, step.neuron
    assert isinstance(op, Conv)
    assert n is not None
    steps, reach = _steps(layout, step), layout.reach(op)
    sets, channels = steps.shape
    # Padding channels never fire and stay at level 0.
    padded = np.tile(np.array([reach + 1, -reach, reach + 1]), sets // 3)
    padded = np.repeat(padded[:, None], words(channels) * 32, axis=1)
    padded[:, :channels] = steps
    value = np.broadcast_to(n.reset_value, (channels,))
    code = np.searchsorted(n.bounds, value, side="right") - n.levels
    after = np.zeros((2, padded.shape[1]), np.uint8)
    after[:, :channels] = (code >> np.arange(2)[:, None]) & 1
    if plan.record == "codes":  # [word of channels][question][channel]
        plain = padded.reshape(sets, -1, 32).transpose(1, 0, 2)
        return plain.astype(np.int32), _pack(after)
    # Complements of the planes of dot + centre: [residual spike][plane][question][word].
    planes = np.arange(plan.fields["depth"] + 1)
    bits = ~((padded + plan.fields["centre"])[:, None, :] >> planes[:, None]) & 1
    bits = bits.reshape(-1, 9, planes.size, padded.shape[1]).transpose(0, 2, 1, 3)
    return _pack(bits), _pack(after)
