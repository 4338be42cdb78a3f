"""Random valid integer programs, for tests that hold executors to each other."""

from __future__ import annotations

import numpy as np

from qsnn_ext.deploy.program import (
    Add,
    Affine,
    Concat,
    Conv,
    Delay,
    Gather,
    Logic,
    Matmul,
    Neuron,
    Pool,
    Program,
    Value,
    targets_of,
    words,
)
from qsnn_ext.errors import FormatError

INPUT_RANGES = [(-100, 100), (0, 255), (-32767, 32767)]  # signed and unsigned bytes, 16 bits


class RandomProgram:
    """Grows a program operation by operation; ``rng`` decides everything."""

    def __init__(self, rng: np.random.Generator, input_range=(-100, 100)) -> None:
        self.rng = rng
        self.input_range = input_range
        shape = (int(rng.integers(1, 7)), int(rng.integers(1, 10)), int(rng.integers(1, 10)))
        self.values = [Value("input", shape, 0)]
        self.ops: list = []

    def pick(self, *options):
        return options[int(self.rng.integers(len(options)))]

    def value(self, shape, planes) -> int:
        self.values.append(Value(f"v{len(self.values)}", tuple(int(s) for s in shape), planes))
        return len(self.values) - 1

    def fixed(self, channels, reach):
        """Scales that keep currents around +-2**12, some channels negative or zero."""
        shift = self.rng.integers(1, 18, channels)
        top = max(1, min(2**30 // max(reach, 1), 2**16))
        multiplier = self.rng.integers(-top, top + 1, channels)
        if self.rng.random() < 0.2:  # too large for a 32-bit product
            multiplier = multiplier * 1024
            shift = shift + 12
        bias = self.rng.integers(-3000, 3000, channels)
        return (
            np.clip(multiplier, -(2**31) + 1, 2**31 - 1).astype(np.int32),
            shift.astype(np.uint8),
            bias.astype(np.int32),
        )

    def same_conv(self, source) -> int:
        """A binary convolution that keeps the shape, as the second of a residual block."""
        rng, v = self.rng, self.values[source]
        c, h, w = v.shape
        kernel = (int(rng.integers(1, 4)), int(rng.integers(1, 6)))
        dilation = (int(rng.integers(1, 3)), int(rng.integers(1, 3)))
        reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        before = [int(rng.integers(0, r + 1)) for r in reach]
        padding = (before[0], before[1], reach[0] - before[0], reach[1] - before[1])
        rows = kernel[0] * kernel[1] * c
        bits = rng.integers(0, 2, (1, rows, words(c) * 32), np.uint8)
        bits[:, :, c:] = 0
        weight = np.packbits(bits, axis=-1, bitorder="little").view("<u4").astype(np.uint32)
        target = self.value((c, h, w), 0)
        self.ops.append(
            Conv(
                f"op{len(self.ops)}", source, target, weight, kernel, (1, 1), padding, dilation,
                1, *self.fixed(c, rows * 2**v.planes),
            )
        )  # fmt: skip
        return target

    def block(self) -> Program:
        """Residual blocks on spikes, wide and narrow: what the engine decides on bits."""
        c = int(self.pick(1, 3, 10, 32, 33, 64, 100, 128, 130, 256, 300, 513))
        side = 9 if c < 100 else 4
        self.values[0] = Value("input", (c, *(int(i) for i in self.rng.integers(1, side, 2))), 0)
        skip = self.neuron(0, common=True)
        for _ in range(3):
            source = skip
            if self.rng.random() < 0.3:  # more than one plane
                source = self.value(self.values[skip].shape, 2)
                self.ops.append(Add(f"op{len(self.ops)}", (skip, skip), (1, 1), source))
            inner = self.neuron(self.same_conv(source), common=True)
            last = self.same_conv(inner)
            total = self.value(self.values[last].shape, 0)
            factors = tuple(int(f) for f in self.rng.integers([1, -900], [4, 900]))
            order = slice(None, None, self.pick(1, -1))
            self.ops.append(Add(f"op{len(self.ops)}", (last, skip)[order], factors[order], total))
            skip = self.neuron(total, common=True)
        return Program(self.values, self.ops, (skip, inner), input_range=(-100, 100))

    def conv(self, source) -> int:
        rng, v = self.rng, self.values[source]
        c, h, w = v.shape
        groups = int(rng.choice([g for g in range(1, c + 1) if c % g == 0]))
        if rng.random() < 0.6:
            groups = 1
        cout = groups * int(
            self.pick(1, 3, 10, 32, 33, 64, 100, 130, 260) // (1 if groups == 1 else 8) or 1
        )
        kernel = (int(rng.integers(1, 4)), int(rng.integers(1, 4)))
        dilation = (int(rng.integers(1, 3)), int(rng.integers(1, 3)))
        stride = (int(rng.integers(1, 3)), int(rng.integers(1, 3)))
        padding = tuple(int(p) for p in rng.integers(0, 3, 4))
        out = []
        for a in range(2):
            span = dilation[a] * (kernel[a] - 1) + 1
            size = (h, w)[a] + padding[a] + padding[a + 2]
            if size < span:
                kernel = tuple(1 if i == a else k for i, k in enumerate(kernel))
                span = 1
                size = max(size, 1)
            out.append((size - span) // stride[a] + 1)
        rows = kernel[0] * kernel[1] * c // groups
        columns = cout // groups
        if rng.random() < 0.7:
            bits = rng.integers(0, 2, (groups, rows, words(columns) * 32), np.uint8)
            bits[:, :, columns:] = 0
            weight = np.packbits(bits, axis=-1, bitorder="little").view("<u4").astype(np.uint32)
        else:
            weight = rng.integers(-127, 128, (groups, rows, columns)).astype(np.int8)
        high = 2**v.planes if v.planes else 2 * max(-self.input_range[0], self.input_range[1])
        reach = rows * 127 * high
        target = self.value((cout, *out), 0)
        self.ops.append(
            Conv(
                f"op{len(self.ops)}", source, target, weight, kernel, stride, padding, dilation,
                groups, *self.fixed(cout, reach),
            )
        )  # fmt: skip
        return target

    def affine(self, source) -> int:
        target = self.value(self.values[source].shape, 0)
        c = self.values[source].shape[0]
        self.ops.append(Affine(f"op{len(self.ops)}", source, target, *self.fixed(c, 2**14)))
        return target

    def pool(self, source) -> int:
        rng, v = self.rng, self.values[source]
        c, h, w = v.shape
        function = self.pick("max", "sum", "repeat")
        if function == "repeat":
            k = (int(rng.integers(1, 3)), int(rng.integers(1, 3)))
            target = self.value((c, h * k[0], w * k[1]), v.planes)
            self.ops.append(
                Pool(f"op{len(self.ops)}", source, target, "repeat", k, (1, 1), (0, 0, 0, 0))
            )
            return target
        k = (int(rng.integers(1, min(h, 3) + 1)), int(rng.integers(1, min(w, 3) + 1)))
        stride = (int(rng.integers(1, 3)), int(rng.integers(1, 3)))
        pad = tuple(int(rng.integers(0, k[i % 2])) for i in range(4))
        out = [((h, w)[a] + pad[a] + pad[a + 2] - k[a]) // stride[a] + 1 for a in range(2)]
        planes = v.planes
        if function == "sum" and planes:
            planes = min(16, planes + int(k[0] * k[1]).bit_length())
        target = self.value((c, *out), planes)
        self.ops.append(Pool(f"op{len(self.ops)}", source, target, function, k, stride, pad))
        return target

    def combine(self, a, b) -> int:
        va, vb = self.values[a], self.values[b]
        if va.planes == vb.planes == 1 and self.rng.random() < 0.4:
            target = self.value(va.shape, 1)
            self.ops.append(Logic(f"op{len(self.ops)}", (a, b), target, self.pick("and", "iand")))
            return target
        if va.planes and vb.planes and self.rng.random() < 0.6:
            target = self.value(va.shape, min(16, max(va.planes, vb.planes) + 1))
            factors = (1, 1)
        else:
            target = self.value(va.shape, 0)
            factors = tuple(int(f) for f in self.rng.integers(-5, 6, 2))
        self.ops.append(Add(f"op{len(self.ops)}", (a, b), factors, target))
        return target

    def neuron(self, source, common=None) -> int:
        rng, v = self.rng, self.values[source]
        c = v.shape[0]
        unit = 1 if v.planes else 2000
        rows = self.pick(1, 1, c)
        order = self.pick("fire_first", "quantize_first")
        delay = self.pick("none", "none", "table", "table")
        bits = int(self.pick(2, 2, 3, 4, 5, 6, 7, 8, 32))
        if common is None:
            common = rng.random() < 0.4
        if common:
            order, delay, bits = "fire_first", "none", 2
        target = self.value(v.shape, 1)
        shown = rng.random() < (0.05 if common else 0.25)
        membrane = self.value(v.shape, 0) if shown else None
        per = self.pick(1, 1, c)
        reset_value = rng.integers(-2, 3, per) * unit // 2
        name = f"op{len(self.ops)}"
        reset = self.pick("hard", "none") if common else self.pick("hard", "soft", "none")
        if bits == 32:
            leak = np.stack(
                [
                    rng.integers(0, 2**15 + 1, rows),
                    np.full(rows, 15),
                    rng.integers(-unit, unit + 1, rows),
                ],
                axis=1,
            )
            threshold = rng.integers(0, 2 * unit, per)
            bounds = np.zeros(0, np.int32)
            reading = np.array([0, unit]) if membrane is not None else np.zeros(0)
            ceiling, initial, order = 127, int(rng.integers(-unit, unit)), "fire_first"
            delay = "none"
        else:
            n = 2 ** (bits - 1) - 1
            size = 2 ** (bits + (delay != "none"))
            leak = rng.integers(-unit, unit + 1, (rows, size))
            bounds = np.sort(rng.integers(-2 * unit, 2 * unit + 1, 2 * n))
            threshold = (
                rng.integers(-unit, 2 * unit, per)
                if order == "fire_first"
                else rng.integers(-1, n + 1, per)
            )
            reading = rng.integers(-99, 99, size) if membrane is not None else np.zeros(0)
            ceiling = int(self.pick(127, n, n // 2))
            initial = int(rng.integers(0, size))
            if common:
                ceiling, initial = n, int(self.pick(0, 1, 3))
        self.ops.append(
            Neuron(
                name, source, target, bits, leak.astype(np.int32), threshold.astype(np.int32),
                bounds.astype(np.int32), reset, reset_value.astype(np.int32), order, delay,
                ceiling, initial, membrane, reading.astype(np.int32),
            )
        )  # fmt: skip
        return target

    def gather(self, source) -> int:
        """A permutation, a slice, a padding or a repetition; channels may stay where they are."""
        rng, v = self.rng, self.values[source]
        c, h, w = v.shape
        shape = [int(rng.integers(1, 2 * n + 1)) for n in v.shape]
        tables = [rng.integers(-1, n, m) for n, m in zip(v.shape, shape, strict=True)]
        kind = self.pick("any", "channels", "turned")
        if kind == "channels":
            shape[0], tables[0] = c, np.arange(c)
        tables = [np.where(t < 0, -1, t * s) for t, s in zip(tables, (h * w, w, 1), strict=True)]
        if kind == "turned":  # channels become columns
            shape = (w, h, c)
            tables = [np.arange(w), np.arange(h) * w, np.arange(c) * h * w]
        target = self.value(shape, v.planes)
        self.ops.append(
            Gather(f"op{len(self.ops)}", source, target, *(t.astype(np.int32) for t in tables))
        )
        return target

    def concat(self, source) -> int:
        v = self.values[source]
        others = [
            i
            for i, o in enumerate(self.values)
            if o.shape[1:] == v.shape[1:] and (o.planes == 0) == (v.planes == 0)
        ]
        sources = (source, *(int(self.pick(*others)) for _ in range(int(self.rng.integers(1, 3)))))
        planes = max(self.values[i].planes for i in sources)
        channels = sum(self.values[i].shape[0] for i in sources)
        target = self.value((channels, *v.shape[1:]), planes)
        self.ops.append(Concat(f"op{len(self.ops)}", sources, target))
        return target

    def matmul(self, source) -> int:
        """With itself, with another value, or with a part of one that fits."""
        rng, v = self.rng, self.values[source]
        c, h, w = v.shape
        heads = int(rng.choice([g for g in range(1, c + 1) if c % g == 0]))
        flips = (bool(rng.integers(2)), bool(rng.integers(2)))
        rows, columns = h * w, c // heads
        i, k = (columns, rows) if flips[0] else (rows, columns)
        other = source
        if (columns if flips[1] else rows) != k:  # bring another value into shape
            j = int(rng.integers(1, 6))
            shape = (heads * (k if flips[1] else j), j if flips[1] else k, 1)
            base = int(self.pick(*range(len(self.values))))
            b = self.values[base].shape
            tables = [
                (rng.integers(0, n, m) * s).astype(np.int32)
                for n, m, s in zip(b, shape, (b[1] * b[2], b[2], 1), strict=True)
            ]
            other = self.value(shape, self.values[base].planes)
            self.ops.append(Gather(f"op{len(self.ops)}", base, other, *tables))
        second = self.values[other]
        rows, columns = second.shape[1] * second.shape[2], second.shape[0] // heads
        j = rows if flips[1] else columns
        pixels = (h, w) if not flips[0] else (i, 1)
        counts = v.planes and second.planes
        most = k * (2**v.planes - 1) * (2**second.planes - 1)
        planes = most.bit_length() if counts and most < 2**16 else 0
        target = self.value((heads * j, *pixels), planes)
        self.ops.append(Matmul(f"op{len(self.ops)}", (source, other), target, heads, flips))
        return target

    def delay(self, source) -> int:
        """A value of the step before, among them of one that is written later."""
        v = self.values[source]
        if v.planes == 0:
            read = [
                op.membrane
                for op in self.ops
                if isinstance(op, Neuron) and op.membrane is not None and op.bits != 32
            ]
            if not read:
                return self.affine(source)
            source = self.pick(*read)
            v = self.values[source]
        target = self.value(v.shape, v.planes)
        op = Delay(f"op{len(self.ops)}", source, target)
        first = next((k for k, o in enumerate(self.ops) if source in targets_of(o)), len(self.ops))
        self.ops.insert(first if self.rng.random() < 0.5 else len(self.ops), op)
        return target

    def recurrent(self, source) -> int:
        """A neuron whose spikes of the step before come back through a convolution."""
        v = self.values[source]
        if v.planes:
            source = self.affine(source)
        last = self.value(v.shape, 1)
        delay = Delay(f"op{len(self.ops)}", -1, last)
        self.ops.append(delay)
        back = self.same_conv(last)
        total = self.value(v.shape, 0)
        self.ops.append(Add(f"op{len(self.ops)}", (source, back), (1, 1), total))
        delay.source = self.neuron(total)
        return delay.source

    def grow(self, length: int) -> Program:
        last = 0
        for _ in range(length):
            same = [
                i
                for i, v in enumerate(self.values)
                if i != last and v.shape == self.values[last].shape
            ]
            planes = self.values[last].planes
            options = ["conv"] * (3 if planes or last == 0 else 0) + ["neuron"] * 3
            options += ["pool", "affine"] + ["combine"] * (3 if same else 0)
            options += ["gather", "concat", "matmul", "delay", "recurrent"]
            if last == 0:
                options = ["conv", "conv", "conv", "neuron", "affine"]
            kind = self.pick(*options)
            before = (len(self.values), len(self.ops))
            args = (last, int(self.pick(*same))) if kind == "combine" else (last,)
            new = getattr(self, kind)(*args)
            if np.prod(self.values[new].shape) > 60_000 or not self._valid(new):
                del self.values[before[0] :], self.ops[before[1] :]
                continue
            last = new
        if last == 0:
            last = self.neuron(0)
        outputs = [last]
        if self.rng.random() < 0.3:
            outputs.append(int(self.rng.integers(1, len(self.values))))
        membranes = [op.membrane for op in self.ops if isinstance(op, Neuron) and op.membrane]
        outputs += membranes[:2]
        return Program(self.values, self.ops, tuple(outputs), input_range=self.input_range)

    def _valid(self, last: int) -> bool:
        try:
            Program(self.values, self.ops, (last,), input_range=self.input_range).validate()
        except FormatError:
            return False
        return True


def random_program(seed: int, length: int = 8) -> Program:
    """A valid program of about ``length`` operations; the seed decides the width of its input."""
    input_range = INPUT_RANGES[seed % len(INPUT_RANGES)]
    return RandomProgram(np.random.default_rng(seed), input_range).grow(length)


def random_block(seed: int) -> Program:
    """A valid program of residual blocks."""
    return RandomProgram(np.random.default_rng(seed)).block()


def random_input(program: Program, rng: np.random.Generator, batch: int, steps: int) -> np.ndarray:
    """Codes ``[N, T, C, H, W]``, with samples that are all zero or all alike among them."""
    lo, hi = program.input_range
    x = rng.integers(lo, hi + 1, (batch, steps, *program.values[0].shape))
    keep = rng.choice([0.0, 0.1, 0.5, 1.0], (batch, 1, 1, 1, 1))
    return np.where(rng.random(x.shape) < keep, x, 0).astype(np.int32)
