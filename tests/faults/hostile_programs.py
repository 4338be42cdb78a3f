"""Programs made to break what reads and runs them: mutated with their structure known, and valid
ones as large as the limits allow."""

from __future__ import annotations

import dataclasses
import random

import numpy as np

from qsnn_ext.deploy.fileformat import _encode
from qsnn_ext.deploy.program import Add, Affine, Conv, Logic, Neuron, Pool, Program, Value, words

#: Numbers at which something changes: widths of words, limits of the format, ends of integers.
EDGES = [
    -(2**63), -(2**31) - 1, -(2**31), -(2**15) - 1, -128, -2, -1, 0, 1, 2, 3, 7, 8, 15, 16, 17, 31,
    32, 33, 46, 47, 64, 127, 128, 255, 4095, 4096, 4097, 2**15, 2**16 - 1, 2**16, 2**16 + 1, 2**26,
    2**30 - 1, 2**30, 2**31 - 1, 2**31, 2**32, 2**63,
]  # fmt: skip


def copied(program: Program) -> Program:
    """A copy that shares nothing that a mutation writes to."""
    ops = []
    for op in program.ops:
        arrays = {
            f.name: v.copy()
            for f in dataclasses.fields(op)
            if isinstance(v := getattr(op, f.name), np.ndarray)
        }
        ops.append(dataclasses.replace(op, **arrays))
    return dataclasses.replace(
        program, values=list(program.values), ops=ops, metadata=dict(program.metadata)
    )


def mutated(program: Program, rng: random.Random) -> bytes:
    """A file with a right checksum whose program was changed in one to three places.

    Some changes keep sizes consistent, so that they pass the checks of geometry and reach what lies
    behind: another shape of a value with everything that follows from it, other planes, wider
    intervals, extreme parameters.
    """
    p = copied(program)
    for _ in range(rng.randint(1, 3)):
        rng.choice(CHANGES)(p, rng)
    return _encode(p)


def _number(rng: random.Random, old: int) -> int:
    return old + rng.choice((-1, 1)) if rng.random() < 0.4 else rng.choice(EDGES)


def _field(p: Program, rng: random.Random) -> None:
    """A number, a pair or a word of an operation."""
    op = rng.choice(p.ops)
    f = rng.choice([f.name for f in dataclasses.fields(op)])
    old = getattr(op, f)
    if isinstance(old, bool | np.ndarray):
        return
    if isinstance(old, int) or old is None:
        setattr(op, f, _number(rng, old or 0))
    elif isinstance(old, tuple) and old:
        k = rng.randrange(len(old))
        setattr(op, f, (*old[:k], _number(rng, old[k]), *old[k + 1 :]))
    elif isinstance(old, str):
        words_ = ("hard", "soft", "none", "table", "gate", "fire_first", "quantize_first", "max",
                  "sum", "repeat", "and", "iand", "", "\x1b[31m", "x" * 600)  # fmt: skip
        setattr(op, f, rng.choice(words_))


def _array(p: Program, rng: random.Random) -> None:
    """Entries, type or shape of a tensor."""
    op = rng.choice(p.ops)
    names = [f.name for f in dataclasses.fields(op) if isinstance(getattr(op, f.name), np.ndarray)]
    if not names:
        return
    name = rng.choice(names)
    array = getattr(op, name)
    kind = rng.randrange(5)
    if kind < 3 and array.size:
        info = np.iinfo(array.dtype)
        edge = rng.choice([int(info.min), int(info.max), 0, 1, min(2**30, int(info.max))])
        at = slice(None) if kind == 0 else rng.randrange(array.size)
        array.reshape(-1)[at] = edge
    elif kind == 3:
        setattr(op, name, array.astype(rng.choice([np.uint32, np.int32, np.int8, np.uint8])))
    else:
        shape = list(array.shape)
        shape[rng.randrange(len(shape))] += rng.choice((-1, 1, 7))
        setattr(op, name, np.resize(array, [max(0, n) for n in shape]))


def _value(p: Program, rng: random.Random) -> None:
    """Shape, planes or scale of a value."""
    k = rng.randrange(len(p.values))
    v = p.values[k]
    what = rng.randrange(3)
    if what == 0:
        axis = rng.randrange(3)
        shape = tuple(_number(rng, n) if i == axis else n for i, n in enumerate(v.shape))
        p.values[k] = dataclasses.replace(v, shape=shape)
    elif what == 1:
        p.values[k] = dataclasses.replace(v, planes=_number(rng, v.planes))
    else:
        p.values[k] = dataclasses.replace(v, scale=rng.choice([0.0, -1.0, 1e308, 5e-324, 2.0]))


def _program(p: Program, rng: random.Random) -> None:
    """What the program says of itself."""
    what = rng.randrange(6)
    if what == 0:
        p.timesteps = _number(rng, p.timesteps)
    elif what == 1:
        p.input_range = (_number(rng, p.input_range[0]), p.input_range[1])
    elif what == 2:
        p.input_range = (p.input_range[0], _number(rng, p.input_range[1]))
    elif what == 3:
        p.outputs = (*p.outputs, rng.randrange(len(p.values)))
    elif what == 4:
        p.input_scale = rng.choice([0.0, 1e308, 5e-324, -1.0])
    else:
        p.metadata["input_rank"] = rng.choice(["1", "2", "3", "0", "", "1,2"])


def _order(p: Program, rng: random.Random) -> None:
    """Operations swapped, repeated or removed."""
    a, b = rng.randrange(len(p.ops)), rng.randrange(len(p.ops))
    what = rng.randrange(3)
    if what == 0:
        p.ops[a], p.ops[b] = p.ops[b], p.ops[a]
    elif what == 1 and len(p.ops) > 1:
        del p.ops[a]
    else:
        p.ops.insert(b, p.ops[a])


def _grown(p: Program, rng: random.Random) -> None:
    """A repetition at the end, with a value of the size that follows."""
    source = len(p.values) - 1
    v = p.values[source]
    kernel = (rng.choice((1, 2, 3, 64, 1024, 4096)), rng.choice((1, 2, 5, 64, 2048)))
    shape = (v.shape[0], v.shape[1] * kernel[0], v.shape[2] * kernel[1])
    p.values.append(Value(f"grown{source}", shape, v.planes))
    name = f"grow{source}"
    p.ops.append(Pool(name, source, source + 1, "repeat", kernel, (1, 1), (0, 0, 0, 0)))
    p.outputs = (source + 1,)


def _padded(p: Program, rng: random.Random) -> None:
    """More padding, stride or dilation of a convolution or pool, and what follows of its target."""
    last = len(p.values)  # another change may have led an operation nowhere
    windows = [
        op
        for op in p.ops
        if isinstance(op, Conv | Pool) and op.stride
        and -last <= op.source < last and -last <= op.target < last
    ]  # fmt: skip
    if not windows:
        return
    op = rng.choice(windows)
    name = rng.choice(["padding", "stride"] + ["dilation"] * isinstance(op, Conv))
    numbers = list(getattr(op, name))
    numbers[rng.randrange(len(numbers))] += rng.choice((1, 2, 15, 31, 100))
    setattr(op, name, tuple(numbers))
    _, h, w = p.values[op.source].shape
    dilation = op.dilation if isinstance(op, Conv) else (1, 1)
    sizes = []
    for axis, size in ((0, h), (1, w)):
        total = size + op.padding[axis] + op.padding[axis + 2]
        reach = dilation[axis] * (op.kernel[axis] - 1) + 1
        sizes.append(max(1, (total - reach) // (op.stride[axis] or 1) + 1))
    old = p.values[op.target]
    p.values[op.target] = dataclasses.replace(old, shape=(old.shape[0], *sizes))
    # What only copies the shape follows; the rest of the program is cut off.
    keep = p.ops.index(op) + 1
    target = op.target
    p.ops = p.ops[:keep]
    following = p.values[target]
    used = {0, *(t for o in p.ops for t in _targets(o))}
    if used == set(range(len(used))):
        p.values = p.values[: len(used)]
        p.outputs = (target,)
        spikes = Value("cut", following.shape, 1)
        p.values.append(spikes)
        one = np.ones(1, np.int32)
        leak = np.array([[0, 1, -2, -1]], np.int32)
        p.ops.append(
            Neuron("cut", target, len(p.values) - 1, 2, leak, one, np.array([-1, 1], np.int32),
                   rng.choice(["hard", "none", "soft"]), one * 0)
        )  # fmt: skip
        p.outputs = (len(p.values) - 1,)


def _targets(op: object) -> list[int]:
    extra = getattr(op, "membrane", None)
    return [op.target] if extra is None else [op.target, extra]  # type: ignore[attr-defined]


CHANGES = [_field, _field, _array, _array, _value, _program, _order, _grown, _padded, _padded]


def work(program: Program) -> int:
    """About how many additions one step takes."""
    total = 0
    for op in program.ops:
        target = program.values[op.target]
        area = 1
        if isinstance(op, Conv):
            area = op.weight.shape[1] * op.groups
        elif isinstance(op, Pool):
            area = op.kernel[0] * op.kernel[1] if op.function != "repeat" else 1
        elif isinstance(op, Neuron) and op.bits <= 8:
            area = 2**op.bits
        total += area * target.elements + 32 * target.shape[1] * target.shape[2]
    return total


# -- as large as the limits allow -----------------------------------------------------------------


def _bits(rng: np.random.Generator, groups: int, rows: int, columns: int) -> np.ndarray:
    weight = rng.integers(0, 2**32, (groups, rows, words(columns)), np.uint32)
    if columns % 32:
        weight[:, :, -1] &= np.uint32((1 << columns % 32) - 1)
    return weight


def _one(c: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.ones(c, np.int32), np.ones(c, np.uint8), np.zeros(c, np.int32)


def _spikes(c: int, bits: int = 2, h: int = 1, w: int = 1) -> Program:
    """An input and a neuron on it."""
    n = 2 ** (bits - 1) - 1
    one = np.ones(1, np.int32)
    neuron = Neuron(
        "spikes", 0, 1, bits, np.zeros((1, 2**bits), np.int32), one,
        np.arange(2 * n, dtype=np.int32), "hard", one * 0,
    )  # fmt: skip
    values = [Value("input", (c, h, w), 0), Value("spikes", (c, h, w), 1)]
    return Program(values, [neuron], (1,), input_range=(0, 1))


def many_operations() -> Program:
    """4,096 operations on one pixel."""
    p = _spikes(1)
    for k in range(2, 4097):
        p.values.append(Value(f"v{k}", (1, 1, 1), 1))
        p.ops.append(Logic(f"o{k}", (k - 1, 1), k, "and"))
    p.outputs = (4096,)
    return p


def deep_sums() -> Program:
    """16 planes, and as many inputs as their sum may have in 32 bits."""
    p = _spikes(32768)
    p.values.append(Value("sum", (32768, 1, 1), 16))
    p.ops.append(Add("sum", (1, 1), (32767, 32767), 2))
    p.values.append(Value("dot", (40, 1, 1), 0))
    weight = _bits(np.random.default_rng(0), 1, 32768, 40)
    p.ops.append(
        Conv("dot", 2, 3, weight, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, *_one(40))
    )  # fmt: skip
    p.outputs = (3,)
    return p


def declared_planes() -> Program:
    """16 planes declared, 2 of them used: what they could sum to does not fit 32 bits."""
    c = 65536
    p = _spikes(c)
    p.values += [Value("sum", (c, 1, 1), 16), Value("dot", (8, 1, 1), 0)]
    weight = _bits(np.random.default_rng(0), 1, c, 8)
    p.ops += [
        Add("sum", (1, 1), (1, 1), 2),
        Conv("dot", 2, 3, weight, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1, *_one(8)),
    ]
    p.outputs = (3,)
    return p


def many_groups() -> Program:
    """A group for each of 65,536 channels: rows of one bit, padded for popcount."""
    p = _spikes(65536)
    p.values.append(Value("dot", (65536, 1, 1), 0))
    weight = _bits(np.random.default_rng(0), 65536, 1, 1)
    p.ops.append(
        Conv("dot", 1, 2, weight, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 65536, *_one(65536))
    )  # fmt: skip
    p.outputs = (2,)
    return p


def tall_kernel() -> Program:
    """A kernel as high as may be, on a column that is mostly padding."""
    p = _spikes(1, h=3)
    p.values.append(Value("dot", (33, 4097 + 3, 1), 0))
    weight = _bits(np.random.default_rng(0), 1, 4096, 33)
    p.ops.append(
        Conv("dot", 1, 2, weight, (4096, 1), (1, 1), (4096, 0, 4096, 0), (1, 1), 1, *_one(33))
    )  # fmt: skip
    p.outputs = (2,)
    return p


def wide_neurons() -> Program:
    """A leak table of its own for each of 32,768 channels, 9 bits of state."""
    c = 32768
    rng = np.random.default_rng(0)
    neuron = Neuron(
        "n", 0, 1, 8, rng.integers(-99, 99, (c, 512)).astype(np.int32), np.ones(c, np.int32),
        np.sort(rng.integers(-99, 99, 254)).astype(np.int32), "soft", np.ones(c, np.int32),
        delay="table",
    )  # fmt: skip
    values = [Value("input", (c, 1, 1), 0), Value("spikes", (c, 1, 1), 1)]
    return Program(values, [neuron], (1,))


def large_currents() -> Program:
    """A scale of a million pixels of one channel, each stored as 32."""
    values = [Value("input", (1, 1, 1), 0), Value("wide", (1, 1000, 800), 0),
              Value("scaled", (1, 1000, 800), 0), Value("sum", (1, 1, 1), 0)]  # fmt: skip
    ops = [
        Pool("wide", 0, 1, "repeat", (1000, 800), (1, 1), (0, 0, 0, 0)),
        Affine("scaled", 1, 2, *_one(1)),
        Pool("sum", 2, 3, "sum", (1000, 800), (1, 1), (0, 0, 0, 0)),
    ]
    return Program(values, ops, (3,), input_range=(0, 1))


LARGE = [
    many_operations,
    deep_sums,
    declared_planes,
    many_groups,
    tall_kernel,
    wide_neurons,
    large_currents,
]
