"""Translates a program into the image the C runtime executes (``runtime/qsnn.h``).

An image is one array of 32-bit words: a header, tables of values, operations and neurons, and the
parameters. Operations that follow a convolution pixel by pixel (residual addition, neuron) are
fused into it here, so that the runtime never writes their int32 currents to memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from qsnn_ext.deploy.program import (
    INT32_MAX,
    Add,
    Affine,
    Conv,
    IntArray,
    Logic,
    Neuron,
    Op,
    Pool,
    Program,
    sources_of,
    targets_of,
    words,
)

Method: TypeAlias = Literal["measure", "events", "dense"]
MAGIC, VERSION = 0x4E4E5351, 1
HEADER = (
    "magic", "version", "image_words", "state_words", "arena_words", "input_words",
    "output_words", "values", "value_count", "ops", "op_count", "neurons", "neuron_count",
    "outputs", "output_count", "scratch", "line_words",
)  # fmt: skip
OP_FIELDS = (
    "type", "source", "target", "weight", "binary", "row_words", "groups", "kh", "kw", "sh",
    "sw", "top", "left", "dh", "dw", "multiplier", "shift", "bias", "product32", "add",
    "self_factor", "add_factor", "neuron", "function", "list", "list_count", "joined", "pitch",
    "depth", "centre", "firing", "pairs", "dense", "dense_rows", "method",
)  # fmt: skip
NEURON_FIELDS = (
    "bits", "state_bits", "levels", "reset", "order", "delay", "ceiling", "initial", "leak",
    "per_channel", "threshold", "reset_value", "bounds", "state", "spikes", "membrane",
    "reading", "source", "guess_shift", "guess_multiplier",
)  # fmt: skip
TYPES = {Conv: 0, Affine: 1, Add: 2, Logic: 3, Pool: 4, Neuron: 5}
CODES = {
    "max": 0, "sum": 1, "repeat": 2,  # Pool.function
    "and": 0, "iand": 1,  # Logic.function
    "none": 0, "hard": 1, "soft": 2,  # Neuron.reset; "none" is 0 in Neuron.delay too
    "fire_first": 0, "quantize_first": 1,  # Neuron.order
    "table": 1, "gate": 2,  # Neuron.delay
}  # fmt: skip
ALIGN = 16  # words: one cache line
METHODS = {"measure": 0, "events": 1, "dense": 2}
NARROW = 64  # output channels up to which AND and popcount can beat listing active inputs


@dataclass(frozen=True)
class StateSlot:
    """Where the membrane potentials of one neuron operation lie in the state area."""

    name: str
    offset: int
    shape: tuple[int, int, int]
    state_bits: int  # 32: plain int32, channel last; otherwise bit planes


@dataclass(frozen=True)
class Image:
    """A program as the C runtime sees it, and the sizes of the work areas it needs.

    Args:
        words: The image, uint32.
        state_words: Membranes of one sample.
        arena_words: Activations and scratch of one running sample.
        parameter_words: How many of ``words`` hold weights and other parameters.
        slots: Layout of the state area.
    """

    words: npt.NDArray[np.uint32]
    state_words: int
    arena_words: int
    parameter_words: int
    slots: tuple[StateSlot, ...]


def _round(n: int, to: int = ALIGN) -> int:
    return -(-n // to) * to


@dataclass
class _Step:
    """One operation with whatever was fused behind it."""

    op: Op
    add: tuple[int, int, int] | None = None  # other value, own factor, other factor
    neuron: Neuron | None = None

    @property
    def members(self) -> list[Op]:
        return [self.op] if self.neuron is None else [self.op, self.neuron]


def _fuse(program: Program) -> tuple[list[_Step], set[int]]:
    """Group operations into steps; also return the values that are never stored."""
    readers: dict[int, list[Op]] = {}
    for op in program.ops:
        for i in sources_of(op):
            readers.setdefault(i, []).append(op)
    producer = {t: k for k, op in enumerate(program.ops) for t in targets_of(op)}
    position = {id(op): k for k, op in enumerate(program.ops)}

    def only_reader(value: int) -> Op | None:
        found = readers.get(value, [])
        return found[0] if len(found) == 1 and value not in program.outputs else None

    absorbed: set[int] = set()
    unstored: set[int] = set()
    steps = []
    for k, op in enumerate(program.ops):
        if id(op) in absorbed:
            continue
        step = _Step(op)
        last = op
        if isinstance(op, Conv | Affine):
            following = only_reader(op.target)
            if isinstance(following, Add) and len(following.sources) == 2:
                own = following.sources.index(op.target)
                other = following.sources[1 - own]
                # The other operand must be ready here, and not be this same value.
                ready = other != op.target and producer.get(other, -1) < k
                if ready and program.values[following.target].planes == 0:
                    step.add = (other, following.factors[own], following.factors[1 - own])
                    absorbed.add(id(following))
                    unstored.add(op.target)
                    last = following
        if isinstance(last, Conv | Affine | Add):
            following = only_reader(last.target)
            if isinstance(following, Neuron) and position[id(following)] > k:
                step.neuron = following
                absorbed.add(id(following))
                unstored.add(last.target)
        elif isinstance(last, Neuron):
            step.neuron = last
        steps.append(step)
    return steps, unstored


class _Builder:
    def __init__(self, program: Program, method: Method = "measure") -> None:
        self.p = program
        self.method = method
        self.ranges = program.validate()
        self.steps, self.unstored = _fuse(program)
        self.blocks: list[npt.NDArray[np.uint32]] = []
        self.size = 0
        self.line = max(_round(v.shape[0], 64) for v in program.values) + 64

    def put(self, array: IntArray) -> int:
        """Append an array of 32-bit words, aligned; return its offset."""
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint32)
        offset = self.size
        block = np.zeros(_round(flat.size), np.uint32)
        block[: flat.size] = flat
        self.blocks.append(block)
        self.size += block.size
        return offset

    def build(self) -> Image:
        p = self.p
        self.put(np.zeros(len(HEADER), np.int32))
        tables = {
            "values": self.put(np.zeros(len(p.values) * 6, np.int32)),
            "ops": self.put(np.zeros(len(self.steps) * len(OP_FIELDS), np.int32)),
            "neurons": self.put(np.zeros(max(len(p.neurons), 1) * len(NEURON_FIELDS), np.int32)),
            "outputs": self.put(np.asarray(p.outputs, np.int32)),
        }
        table_words = self.size
        offsets, strides, scratch_start = self._arena()
        neurons, slots, state_words = self._neurons()
        self.scratch = 0
        ops = [self._step(step, neurons) for step in self.steps]
        parameter_words = self.size - table_words
        self.put(np.zeros(32, np.int32))  # vector loads may read a little past the last parameter
        image = np.concatenate(self.blocks)
        arena_words = scratch_start + 2 * self.line + self.scratch
        out = [p.values[i].elements for i in p.outputs]
        header = {
            "magic": MAGIC, "version": VERSION, "image_words": image.size,
            "state_words": state_words, "arena_words": arena_words,
            "input_words": p.values[0].elements, "output_words": sum(out), **tables,
            "value_count": len(p.values), "op_count": len(ops), "neuron_count": len(p.neurons),
            "output_count": len(p.outputs), "scratch": scratch_start, "line_words": self.line,
        }  # fmt: skip
        image[: len(HEADER)] = [header[k] for k in HEADER]
        values = [
            [*v.shape, v.planes, stride, offset]
            for v, stride, offset in zip(p.values, strides, offsets, strict=True)
        ]
        for name, rows in (("values", values), ("ops", ops)):
            flat = np.asarray(rows, np.int64).astype(np.int32).reshape(-1).view(np.uint32)
            image[tables[name] : tables[name] + flat.size] = flat
        if p.neurons:
            records = [[neurons[id(n)][1][f] for f in NEURON_FIELDS] for n in p.neurons]
            flat = np.asarray(records, np.int32).reshape(-1).view(np.uint32)
            image[tables["neurons"] : tables["neurons"] + flat.size] = flat
        return Image(image, state_words, arena_words, parameter_words, tuple(slots))

    def _arena(self) -> tuple[list[int], list[int], int]:
        """Offset and words per pixel of every value; values that never live together overlap."""
        p = self.p
        strides = [
            v.planes * words(v.shape[0]) if v.planes else words(v.shape[0]) * 32 for v in p.values
        ]
        if all(isinstance(op, Conv) for op in p.ops if 0 in sources_of(op)) and 0 not in p.outputs:
            strides[0] = p.values[0].shape[0]  # only convolutions read it, and they need no padding
        birth = {0: -1}
        death = {0: len(self.steps), **{i: len(self.steps) for i in p.outputs}}
        for k, step in enumerate(self.steps):
            reads = {i for op in step.members for i in sources_of(op)}
            if step.add is not None:
                reads.add(step.add[0])
            writes = {t for op in step.members for t in targets_of(op)}
            if step.add is not None and step.neuron is None:
                writes = {self._add_target(step)}
            for i in writes - self.unstored:
                birth[i] = k
                death[i] = max(death.get(i, k), k)
            for i in reads - self.unstored:
                death[i] = max(death.get(i, k), k)
        offsets = [0] * len(p.values)
        placed: list[tuple[int, int, int, int]] = []  # start, end, birth, death
        order = sorted(
            birth, key=lambda i: -strides[i] * p.values[i].shape[1] * p.values[i].shape[2]
        )
        for i in order:
            size = _round(strides[i] * p.values[i].shape[1] * p.values[i].shape[2])
            at = 0
            for start, end, born, dead in sorted(placed):
                if born <= death[i] and birth[i] <= dead and start < at + size and at < end:
                    at = end
            offsets[i] = at
            placed.append((at, at + size, birth[i], death[i]))
        return offsets, strides, max((end for _, end, _, _ in placed), default=0)

    def _add_target(self, step: _Step) -> int:
        op = step.op
        assert isinstance(op, Conv | Affine)
        return next(o.target for o in self.p.ops if isinstance(o, Add) and op.target in o.sources)

    def _channels(self, array: IntArray, channels: int, fill: int = 0) -> IntArray:
        padded = np.full(words(channels) * 32, fill, np.int32)
        padded[:channels] = array
        return padded

    def _neurons(
        self,
    ) -> tuple[dict[int, tuple[int, dict[str, int]]], list[StateSlot], int]:
        records: dict[int, tuple[int, dict[str, int]]] = {}
        slots: list[StateSlot] = []
        state = 0
        for k, n in enumerate(self.p.neurons):
            c, h, w = shape = self.p.values[n.source].shape
            padded = words(c) * 32
            per = n.leak.shape[0] > 1 or n.threshold.size > 1 or n.reset_value.size > 1
            leak, theta, value = n.leak, n.threshold, n.reset_value
            if per:
                leak = np.zeros((padded, n.leak.shape[1]), np.int32)
                leak[:c] = n.leak
                theta = self._channels(np.broadcast_to(n.threshold, (c,)), c)
                value = self._channels(np.broadcast_to(n.reset_value, (c,)), c)
            bounds = n.bounds
            if n.bits <= 8:
                bounds = np.full(2**n.bits, INT32_MAX, np.int32)
                bounds[: n.bounds.size] = n.bounds
            slots.append(StateSlot(n.name, state, shape, n.state_bits if n.bits <= 8 else 32))
            records[id(n)] = (
                k,
                {
                    "bits": n.bits, "state_bits": n.state_bits, "levels": n.levels,
                    "reset": CODES[n.reset], "order": CODES[n.order], "delay": CODES[n.delay],
                    "ceiling": n.ceiling, "initial": n.initial, "leak": self.put(leak),
                    "per_channel": int(per), "threshold": self.put(theta),
                    "reset_value": self.put(value), "bounds": self.put(bounds), "state": state,
                    "spikes": n.target, "membrane": -1 if n.membrane is None else n.membrane,
                    "reading": self.put(n.reading), "source": n.source,
                    "guess_shift": 0, "guess_multiplier": 0,
                },
            )  # fmt: skip
            state += _round(h * w * (c if n.bits == 32 else n.state_bits * words(c)))
        return records, slots, state

    def _step(self, step: _Step, neurons: dict[int, tuple[int, dict[str, int]]]) -> list[int]:
        op = step.op
        f = dict.fromkeys(OP_FIELDS, 0)
        f.update(type=TYPES[type(op)], source=sources_of(op)[0], target=targets_of(op)[0])
        f.update(add=-1, neuron=-1, self_factor=1, groups=1)
        if isinstance(op, Conv):
            firing = self._steps_on_bits(step)
            self._conv(op, f, flip=firing)
            if firing:
                f["firing"] = self._firing(step, f)
        if isinstance(op, Conv | Affine) and not f["firing"]:
            self._fixed_point(op, f)
        if isinstance(op, Pool):
            f.update(function=CODES[op.function], kh=op.kernel[0], kw=op.kernel[1])
            f.update(sh=op.stride[0], sw=op.stride[1], top=op.padding[0], left=op.padding[1])
        if isinstance(op, Logic):
            f["function"] = CODES[op.function]
        if isinstance(op, Add | Logic):
            factors = op.factors if isinstance(op, Add) else (1, 1)
            pairs = np.asarray(list(zip(op.sources, factors, strict=True)), np.int32)
            f.update(list=self.put(pairs), list_count=len(pairs))
        if step.add is not None:
            f["add"], f["self_factor"], f["add_factor"] = step.add
            if step.neuron is None:
                f["target"] = self._add_target(step)
        if step.neuron is not None:
            f["neuron"] = neurons[id(step.neuron)][0]
        return [f[k] for k in OP_FIELDS]

    def _fixed_point(self, op: Conv | Affine, f: dict[str, int]) -> None:
        c = op.multiplier.size
        shift = self._channels(op.shift.astype(np.int32), c, fill=1)
        reach = self._reach(op) * np.abs(op.multiplier.astype(np.int64))
        reach += np.int64(1) << (op.shift.astype(np.int64) - 1)
        product32 = bool(reach.max() <= INT32_MAX) and int(op.shift.max()) <= 31
        half = np.int64(1) << (shift.astype(np.int64) - 1)
        both = np.concatenate([shift, (half & 0xFFFFFFFF).astype(np.uint32).view(np.int32)])
        f.update(
            multiplier=self.put(self._channels(op.multiplier, c)),
            shift=self.put(both),
            bias=self.put(self._channels(op.bias, c)),
            product32=int(product32),
        )

    def _reach(self, op: Conv | Affine) -> int:
        """Largest absolute value that is multiplied."""
        lo, hi = self.ranges[op.source]
        if isinstance(op, Affine):
            return max(-lo, hi)
        if op.binary:
            return int(op.weight.shape[1]) * max(-lo, hi)
        return int(np.abs(op.weight.astype(np.int64)).sum(axis=1).max()) * max(-lo, hi)

    def _conv(self, op: Conv, f: dict[str, int], flip: bool) -> None:
        src, target = self.p.values[op.source], self.p.values[op.target]
        groups, rows, columns = op.weight.shape
        f.update(groups=groups, list_count=rows, binary=int(op.binary))
        for names, pair in (("kh kw", op.kernel), ("sh sw", op.stride), ("dh dw", op.dilation)):
            f.update(zip(names.split(), pair, strict=True))
        f.update(top=op.padding[0], left=op.padding[1])
        lo, hi = self.ranges[op.source]
        if not op.binary and groups == 1 and not src.planes and lo >= -32768 and hi <= 32767:
            self._paired(op, f, flip)
            return
        if not op.binary:
            pitch = _round(columns, 64)
            f["row_words"] = pitch // 4
            padded = np.zeros((groups, rows, pitch), np.int8)
            padded[:, :, :columns] = op.weight
            f["weight"] = self.put(padded.view(np.uint32))
        elif groups == 1 and src.planes:
            self._counted(op, f, flip)
            self.scratch = max(self.scratch, _round(self._event_scratch(op, f)))
            return
        elif src.planes:
            self._dense(op.weight, columns, target.shape[0] // groups, f)
            self.scratch = max(self.scratch, _round(f["dense_rows"] + columns * 32 + 16))
            return
        else:
            f["row_words"] = columns
            f["weight"] = self.put(op.weight)
        width = target.shape[0] // groups
        self.scratch = max(self.scratch, _round(2 * rows + _round(width, 64) + 64))

    def _paired(self, op: Conv, f: dict[str, int], flip: bool) -> None:
        """8-bit weights as pairs of 16-bit numbers: [word of channels][pair of rows][channel]."""
        _, rows, columns = op.weight.shape
        pairs, wide = -(-rows // 2), words(columns)
        weight = np.zeros((2 * pairs, wide * 32), np.int32)
        weight[:rows, :columns] = op.weight[0]
        if flip:
            weight[:, :columns] *= np.where(op.multiplier < 0, -1, 1)
        both = (weight[0::2] & 0xFFFF) | (weight[1::2] << 16)
        f.update(pairs=pairs, row_words=wide)
        f["weight"] = self.put(both.reshape(pairs, wide, 32).transpose(1, 0, 2).astype(np.int32))
        need = (self.p.values[op.target].shape[2] + 4) * pairs + 4 * wide * 32
        self.scratch = max(self.scratch, _round(need))

    def _counted(self, op: Conv, f: dict[str, int], flip: bool) -> None:
        """Weights of an event-driven layer: rows of bits, and a row of zeros at the end."""
        src, out = self.p.values[op.source], self.p.values[op.target].shape
        (kh, kw), (_, rows, columns) = op.kernel, op.weight.shape
        weight = op.weight[0]
        if flip:  # so that no channel's multiplier is negative
            weight = weight ^ _sign_words(op.multiplier < 0)
        # Where rows are short, those of the columns of the kernel lie side by side.
        joined = 2 <= kw <= 8 and columns <= 8 and op.stride[1] == 1 and out[2] > 1
        pitch = columns
        if joined:
            cin = rows // (kh * kw)
            pitch = _round(kw * columns, 8) if kw * columns > 16 else _power_of_two(kw * columns)
            side = weight.reshape(kh, kw, cin, columns).transpose(0, 2, 1, 3)
            weight = np.zeros((kh * cin, pitch), np.uint32)
            weight[:, : kw * columns] = side.reshape(kh * cin, kw * columns)
        centre = rows * (2**src.planes - 1)
        f.update(row_words=columns, joined=int(joined), pitch=pitch)
        f.update(centre=centre, depth=centre.bit_length())
        stored = np.concatenate([weight.reshape(-1), np.zeros(pitch, np.uint32)])
        f.update(weight=self.put(stored), method=METHODS[self.method])
        if self.method == "dense" or (self.method == "measure" and out[0] <= NARROW):
            signs = op.weight ^ _sign_words(op.multiplier < 0) if flip else op.weight
            self._dense(signs, columns, columns * 32, f)

    def _dense(self, weight: IntArray, columns: int, channels: int, f: dict[str, int]) -> None:
        """Weights for AND and popcount, words of 32 inputs: [group][16 channels][word][channel]."""
        groups, rows, _ = weight.shape
        n, wide = _round(-(-rows // 32), 8), _round(channels)
        bits = np.unpackbits(weight.astype("<u4").view(np.uint8), axis=-1, bitorder="little")
        padded = np.zeros((groups, wide, n * 32), np.uint8)
        padded[:, :channels, :rows] = bits[:, :, :channels].transpose(0, 2, 1)
        packed = _pack(padded).reshape(groups, wide // 16, 16, n).transpose(0, 1, 3, 2)
        f.update(dense=self.put(np.ascontiguousarray(packed)), dense_rows=n)

    def _event_scratch(self, op: Conv, f: dict[str, int]) -> int:
        """Words ``conv_bits`` works in."""
        src, out = self.p.values[op.source], self.p.values[op.target].shape
        kw, columns, joined = op.kernel[1], f["row_words"], f["joined"]
        span = min(op.dilation[0] * (op.kernel[0] - 1) + 1, src.shape[1])
        ring = span * src.planes * (src.shape[2] * (words(src.shape[0]) * 32 + 1) + 17)
        places = out[2] + (op.dilation[1] * (kw - 1) if joined else 0)
        deepest = max(5, f["depth"])
        together = deepest * _round(columns * kw) if joined else 0
        counts = src.planes * (kw if joined else 1) * deepest * (places * columns + 16)
        lines = f["kh"] + src.planes * places + out[2] + 16
        listed = max(f["list_count"] + 32, f["dense_rows"] + columns * 32)
        return ring + listed + together + counts + lines

    def _steps_on_bits(self, step: _Step) -> bool:
        """Whether scale, residual and neuron are a comparison of dot products with constants."""
        op, n = step.op, step.neuron
        if not isinstance(op, Conv) or n is None or op.weight.shape[0] > 1:
            return False
        spikes = self.p.values[op.source].planes > 0
        lo, hi = self.ranges[op.source]
        if spikes != op.binary or not -32768 <= lo <= hi <= (65535 if spikes else 32767):
            return False
        if op.multiplier.min() <= -INT32_MAX - 1 or self._reach(op) >= INT32_MAX:
            return False
        if n.bits != 2 or n.delay != "none" or n.order != "fire_first" or n.reset == "soft":
            return False
        if n.ceiling < n.levels or n.membrane is not None or n.initial == 2:
            return False
        if step.add is None:
            return True
        return spikes and self.p.values[step.add[0]].planes == 1 and step.add[1] > 0

    def _steps(self, step: _Step) -> npt.NDArray[np.int64]:
        """The smallest dot products for which the answer to a question is yes.

        The questions, for no residual spike and then for one: in each of the states 0, 1 and -1,
        does the neuron fire, is its new level at least 0, at least 1 if it does not?

        Returns:
            int64 ``[9 or 18, C]`` for weights whose sign makes every multiplier positive; values
            one beyond what a dot product can be mean never.
        """
        op, n = step.op, step.neuron
        assert isinstance(op, Conv)
        assert n is not None
        channels, reach = op.multiplier.size, self._reach(op)
        m = np.abs(op.multiplier.astype(np.int64))
        shift = op.shift.astype(np.int64)
        half = np.int64(1) << (shift - 1)
        largest = ((reach * m + half) >> shift) + 2
        own, other = (1, 0) if step.add is None else step.add[1:]
        leak = np.broadcast_to(n.leak, (channels, n.leak.shape[1])).astype(np.int64)
        theta = np.broadcast_to(n.threshold, (channels,)).astype(np.int64)
        levels = [theta, *(np.full(channels, b, np.int64) for b in n.bounds)]
        steps = []
        for spike in (0,) if step.add is None else (0, 1):
            for word in (0, 1, 3):
                for level in levels:
                    y = -((leak[:, word] + other * spike - level) // own) - op.bias
                    need = (np.clip(y, -largest, largest) << shift) - half  # of dot * multiplier
                    dot = -(-need // np.maximum(m, 1))
                    steps.append(np.where(m > 0, dot, np.where(need <= 0, -reach, reach + 1)))
        clipped: npt.NDArray[np.int64] = np.clip(np.array(steps), -reach, reach + 1)
        return clipped

    def _firing(self, step: _Step, f: dict[str, int]) -> int:
        """What a firing decision compares with; at the end two planes: the level after a spike."""
        op, n = step.op, step.neuron
        assert isinstance(op, Conv)
        assert n is not None
        steps, reach = self._steps(step), self._reach(op)
        sets, channels = steps.shape
        # Padding channels never fire and stay at level 0.
        padded = np.tile(np.array([reach + 1, -reach, reach + 1]), sets // 3)
        padded = np.repeat(padded[:, None], words(channels) * 32, axis=1)
        padded[:, :channels] = steps
        value = np.broadcast_to(n.reset_value, (channels,))
        code = np.searchsorted(n.bounds, value, side="right") - n.levels
        after = np.zeros((2, padded.shape[1]), np.uint8)
        after[:, :channels] = (code >> np.arange(2)[:, None]) & 1
        if f["pairs"]:  # [word of channels][question][channel]
            plain = padded.reshape(sets, -1, 32).transpose(1, 0, 2).astype(np.int32)
            return self.put(np.concatenate([plain.reshape(-1).view(np.uint32), _pack(after)]))
        # Complements of the planes of dot + centre: [residual spike][plane][question][word].
        planes = np.arange(f["depth"] + 1)
        bits = ~((padded + f["centre"])[:, None, :] >> planes[:, None]) & 1
        bits = bits.reshape(-1, 9, planes.size, padded.shape[1]).transpose(0, 2, 1, 3)
        return self.put(np.concatenate([_pack(bits), _pack(after)]))


def _pack(bits: IntArray) -> npt.NDArray[np.uint32]:
    """Zeros and ones, the last axis a multiple of 32, as a flat array of words."""
    packed = np.packbits(bits.astype(np.uint8), axis=-1, bitorder="little")
    return packed.reshape(-1).view("<u4").astype(np.uint32)


def _power_of_two(n: int) -> int:
    return int(1 << (n - 1).bit_length())


def _sign_words(flags: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint32]:
    """Flags of channels as words of bits."""
    padded = np.zeros(words(flags.size) * 32, np.uint8)
    padded[: flags.size] = flags
    return _pack(padded)


def build_image(program: Program, method: Method = "measure") -> Image:
    """Translate a program for the C runtime.

    Args:
        program: A valid program.
        method: How layers of single bits count: ``"events"`` lists active inputs, ``"dense"`` is
            AND and popcount over all inputs; ``"measure"`` decides at every step by the density of
            the input, in layers narrow enough for either to win. The bits are the same.

    Returns:
        The image and the sizes of its work areas.

    Raises:
        FormatError: If the program is not valid.
    """
    return _Builder(program, method).build()
