"""Where everything lies: sizes and offsets of an image, computed once, before anything is built.

Sizes are Python integers and count words as they are stored, padding included, so nothing can wrap;
what ends up in a record is checked to fit it (:mod:`qsnn_ext.deploy.records`). The C runtime adds
offsets and never computes one.

Three areas are laid out: the **image** (records and parameters, constant), the **state** (membrane
potentials of one sample) and the **arena** (activations of one running sample, then a workspace for
every worker that runs it).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from qsnn_ext.deploy.checks import within_limit
from qsnn_ext.deploy.program import (
    INT32_MAX,
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
    sources_of,
    words,
)
from qsnn_ext.deploy.records import CODES, Fields, narrow, size
from qsnn_ext.deploy.schedule import Step, place, schedule

Method: TypeAlias = Literal["measure", "events", "dense"]

CACHE_LINE = 16  # words
TAIL = 16  # words after the last parameter: vector loads may read that far past it
NARROW = 64  # output channels up to which AND and popcount can beat listing active inputs
TILE = 4  # most pixels whose dot products the input layer keeps in registers
QUESTIONS = 9  # in each of three states: fires, new level at least 0, at least 1

#: Bytes that a program's image, state, arena and answers may take if no argument says otherwise.
MEMORY_LIMIT = 256 * 2**20


def round_up(n: int, to: int) -> int:
    """The next multiple of ``to``."""
    return -(-n // to) * to


def _code(group: str, member: str) -> int:
    return CODES[group].index(member)


@dataclass(frozen=True)
class Area:
    """A stretch of words."""

    offset: int
    words: int


class Region:
    """Hands out stretches of words one after the other.

    Args:
        align: Words that every stretch starts at a multiple of.
        gap: Words left free behind every stretch; tests look whether they stay untouched.
    """

    def __init__(self, align: int = CACHE_LINE, gap: int = 0) -> None:
        self.align, self.gap = align, gap
        self.size = 0
        self.areas: list[Area] = []

    def take(self, count: int) -> int:
        """Offset of the next ``count`` words."""
        self.areas.append(Area(self.size, count))
        self.size += round_up(count + self.gap, self.align)
        return self.areas[-1].offset


@dataclass(frozen=True)
class StateSlot:
    """Where the membrane potentials of one neuron operation lie in the state area.

    Args:
        name: Of the operation.
        offset: Where they begin.
        shape: ``[C, H, W]``.
        state_bits: 32 for plain int32, channel last; otherwise bit planes.
        pitch: Words from one pixel to the next.
    """

    name: str
    offset: int
    shape: tuple[int, int, int]
    state_bits: int
    pitch: int


@dataclass(eq=False)
class Plan:
    """A record to be written, and the parameters that belong to it.

    Args:
        record: Name of the record.
        offset: Of the record in the image.
        fields: Its numbers.
        areas: Name of parameter -> place in the image.
    """

    record: str
    offset: int
    fields: Fields
    areas: dict[str, Area] = field(default_factory=dict)


class Layout:
    """Sizes and offsets of a program's image, state and arena.

    Args:
        program: The program; it is validated first.
        method: How layers of single bits count: ``"events"`` lists active inputs, ``"dense"`` is
            AND and popcount over all inputs; ``"measure"`` decides at every step by the density of
            the input, in layers narrow enough for either to win. The bits are the same.
        compact: Store what is used and no more: parameters lie side by side, and what would only
            make a layer faster is left out where it is large beside the layer's weights.
        limit: Bytes that image, state, arena and the answers of one run may take together.
        gap: Words left free between areas, for tests.

    Attributes:
        steps: All steps, in order.
        plans: One per step.
        slots: Layout of the state area.
        image_words, state_words, arena_words, workspace_words: Sizes; the arena has room for one
            worker, each further one needs another workspace.
        parameter_words: Words of the image that hold parameters, padding included.

    Raises:
        FormatError: If the program is not valid, a size does not fit 32 bits, or the limit is
            exceeded.
        ConfigError: If the limit is not a positive number of bytes.
    """

    def __init__(
        self,
        program: Program,
        method: Method = "measure",
        *,
        compact: bool = False,
        limit: int = MEMORY_LIMIT,
        gap: int = 0,
    ) -> None:
        self.program = program
        self.method = method
        self.compact = compact
        self.gap = gap
        self.ranges = program.validate()
        self.steps = schedule(program)
        align = 1 if compact else CACHE_LINE
        self._image = Region(align, gap)
        self._state = Region(align, gap)
        self._values()
        self._check(limit)  # before the long lists: most of what is too large is too large here
        self.header = self._image.take(size("header"))
        self._value_records()
        self.slots: list[StateSlot] = []
        self._neurons()
        self._workspaces: list[Region] = []
        self._widest = max(v.shape[0] for v in program.values)
        self.plans = [self._plan(step) for step in self.steps]
        self.step_list = self._image.take(len(self.plans))
        self.neuron_list = self._image.take(len(self.neurons))
        self.output_list = self._image.take(len(program.outputs))
        self.image_words = self._image.size + TAIL
        self.state_words = self._state.size
        self.workspace_words = round_up(max(r.size for r in self._workspaces), align)
        self.arena_words = self.workspace + self.workspace_words
        self._check(limit)

    # -- the memory of it all --------------------------------------------------------------------

    @property
    def bytes(self) -> int:
        """Bytes of image, state, arena and the answers of one run of the default length."""
        p = self.program
        answers = sum(p.values[i].elements for i in p.outputs) * p.timesteps
        known = (self.image_words, self.state_words, self.arena_words)
        return 4 * (sum(known) + p.values[0].elements + answers)

    def _check(self, limit: int) -> None:
        within_limit(self.bytes, limit)
        for what in ("image_words", "state_words", "arena_words"):
            narrow(getattr(self, what), what)

    def areas(self) -> tuple[list[Area], list[Area]]:
        """Everything that may be written: of the state, and of the arena with one worker."""
        p = self.program
        arena = [Area(self.offset[i], self._stored(p.values[i], i)) for i in self.offset]
        for region in self._workspaces:
            arena += [Area(self.workspace + a.offset, a.words) for a in region.areas]
        return list(self._state.areas), arena

    # -- activations -------------------------------------------------------------------------------

    def _stride(self, index: int) -> int:
        """Words from one pixel of a value to the next."""
        v = self.program.values[index]
        if v.planes:
            return v.planes * words(v.shape[0])
        return v.shape[0] if index == 0 and self._bare_input else words(v.shape[0]) * 32

    def _stored(self, v: Value, index: int) -> int:
        return self._stride(index) * v.shape[1] * v.shape[2]

    def _values(self) -> None:
        p = self.program
        readers = [s for s in self.steps if 0 in s.reads]
        # Where only convolutions read the input, its pixels need no padding to whole vectors.
        self._bare_input = 0 not in p.outputs and all(
            isinstance(s.op, Conv) and (s.residual is None or s.residual.value) for s in readers
        )
        written = {0}.union(*(s.writes for s in self.steps))
        sizes = {i: round_up(self._stored(p.values[i], i) + self.gap, CACHE_LINE) for i in written}
        self.offset, self.workspace = place(self.steps, sizes, p.outputs)
        # So far known; the rest is added as it is laid out.
        self.image_words = 0
        self.state_words = sum(self._state_words(n) for n in p.neurons)
        self.state_words += sum(self._stored(p.values[d.source], d.source) for d in p.delays)
        self.arena_words = self.workspace

    def _value_records(self) -> None:
        """A record for every value that is stored."""
        self.value_records: dict[int, Plan] = {}
        for i in sorted(self.offset):
            v = self.program.values[i]
            c, h, w = v.shape
            fields = {
                "channels": c, "height": h, "width": w, "pixels": h * w, "planes": v.planes,
                "words": words(c), "stride": self._stride(i), "offset": self.offset.get(i, 0),
            }  # fmt: skip
            self.value_records[i] = Plan("value", self._image.take(size("value")), fields)

    def _value(self, index: int) -> int:
        return self.value_records[index].offset

    # -- neurons -----------------------------------------------------------------------------------

    def _state_pitch(self, n: Neuron) -> int:
        channels = self.program.values[n.source].shape[0]
        return channels if n.bits == 32 else n.state_bits * words(channels)

    def _state_words(self, n: Neuron) -> int:
        _, h, w = self.program.values[n.source].shape
        return h * w * self._state_pitch(n)

    def _neurons(self) -> None:
        self.neurons: dict[int, Plan] = {}
        for n in self.program.neurons:
            shape = self.program.values[n.source].shape
            padded = words(shape[0]) * 32
            per_leak = n.leak.shape[0] > 1
            per = n.threshold.size > 1 or n.reset_value.size > 1
            plan = Plan("neuron", self._image.take(size("neuron")), {})
            self._parameter(plan, "leak", n.leak.shape[1] * (padded if per_leak else 1))
            self._parameter(plan, "threshold", padded if per else 1)
            self._parameter(plan, "reset_value", padded if per else 1)
            # Bisection, which takes over at 5 bits, needs a power of two of them.
            self._parameter(plan, "bounds", 2**n.bits if 4 < n.bits <= 8 else n.bounds.size)
            self._parameter(plan, "reading", n.reading.size)
            state = self._state.take(self._state_words(n))
            plan.fields.update(
                bits=n.bits, state_bits=n.state_bits, levels=n.levels,
                reset=_code("reset", n.reset), order=_code("order", n.order),
                delay=_code("delay", n.delay), ceiling=n.ceiling, initial=n.initial,
                leak_pitch=n.leak.shape[1] if per_leak else 0, per_channel=int(per), state=state,
                state_pitch=self._state_pitch(n), spikes=self._value(n.target),
                membrane=0 if n.membrane is None else self._value(n.membrane),
            )  # fmt: skip
            self.neurons[id(n)] = plan
            bits = n.state_bits if n.bits <= 8 else 32
            self.slots.append(StateSlot(n.name, state, shape, bits, self._state_pitch(n)))
        self._delays: dict[int, int] = {}
        for d in self.program.delays:
            v = self.program.values[d.source]
            self._delays[id(d)] = self._state.take(self._stored(v, d.source))
            slot = StateSlot(
                d.name, self._delays[id(d)], v.shape, v.planes or 32, self._stride(d.source)
            )
            self.slots.append(slot)

    def _parameter(self, plan: Plan, name: str, count: int) -> None:
        offset = self._image.take(count) if count else 0
        plan.areas[name] = Area(offset, count)
        plan.fields[name] = offset

    # -- steps -------------------------------------------------------------------------------------

    def _plan(self, step: Step) -> Plan:
        op = step.op
        self._workspace = Region(1 if self.compact else CACHE_LINE, self.gap)
        line = round_up(self._widest, 64) + 64
        self.line, self.other = self._workspace.take(line), self._workspace.take(line)
        self._workspaces.append(self._workspace)
        if isinstance(op, Conv):
            form = self._form(op)
            plan = self._record(form, step)
            plan.fields["window"] = _window(op.kernel, op.stride, op.padding, op.dilation)
            getattr(self, f"_{form}")(plan, step, op)
        elif isinstance(op, Affine):
            plan = self._record("affine", step)
            self._scale(plan, op)
        elif isinstance(op, Add):
            plan = self._record("add", step)
            self._parameter(plan, "list", 2 * len(op.sources))
            plan.fields["count"] = len(op.sources)
        elif isinstance(op, Logic):
            plan = self._record("logic", step)
            plan.fields.update(
                second=self._value(op.sources[1]), function=_code("logic", op.function)
            )
        elif isinstance(op, Gather):
            plan = self._record("gather", step)
            for name in ("channel", "row", "column"):
                self._parameter(plan, name, getattr(op, name).size)
            c, h, w = self.program.values[op.source].shape
            stays = np.array_equal(op.channel, np.arange(c) * h * w)
            plan.fields["in_order"] = int(stays)
        elif isinstance(op, Concat):
            plan = self._record("concat", step)
            self._parameter(plan, "list", len(op.sources))
            plan.fields["count"] = len(op.sources)
        elif isinstance(op, Matmul):
            plan = self._record("matmul", step)
            c, h, w = self.program.values[op.sources[0]].shape
            plan.fields.update(
                second=self._value(op.sources[1]), heads=op.heads,
                inner=h * w if op.transpose[0] else c // op.heads,
                columns=self.program.values[op.target].shape[0] // op.heads,
                flip_first=int(op.transpose[0]), flip_second=int(op.transpose[1]),
            )  # fmt: skip
        elif isinstance(op, Delay):
            plan = self._record("keep" if step.keep else "delay", step)
            plan.fields["state"] = self._delays[id(op)]
        elif isinstance(op, Pool):
            plan = self._record("pool", step)
            plan.fields["window"] = _window(op.kernel, op.stride, op.padding, (1, 1))
            plan.fields["function"] = _code("pool", op.function)
        else:
            plan = self._record("fire", step)
        return plan

    def _record(self, name: str, step: Step) -> Plan:
        r = step.residual
        source = sources_of(step.op)[0]
        fields = {
            "kind": _code("kind", name), "source": self._value(source),
            "target": self._value(step.target if step.neuron is None else step.neuron.target),
            "add": 0 if r is None else self._value(r.value),
            "self_factor": 1 if r is None else r.own, "add_factor": 0 if r is None else r.other,
            "neuron": 0 if step.neuron is None else self.neurons[id(step.neuron)].offset,
        }  # fmt: skip
        return Plan(name, self._image.take(size(name)), {"step": fields})

    def _scale(self, plan: Plan, op: Conv | Affine, used: bool = True) -> None:
        count = op.multiplier.size if used else 0
        scale = Plan("scale", 0, {})
        self._parameter(scale, "multiplier", count)
        self._parameter(scale, "shift", -(-count // 4))  # bytes
        self._parameter(scale, "bias", count)
        reach = self.reach(op) * np.abs(op.multiplier.astype(np.int64))
        reach += np.int64(1) << (op.shift.astype(np.int64) - 1)
        product32 = bool(reach.max() <= INT32_MAX) and int(op.shift.max()) <= 31
        scale.fields.update(channels=count, product32=int(product32))
        plan.fields["scale"] = scale.fields
        plan.areas.update(scale.areas)

    def reach(self, op: Conv | Affine) -> int:
        """Largest absolute value that is multiplied."""
        lo, hi = self.ranges[op.source]
        if isinstance(op, Affine):
            return max(-lo, hi)
        if op.binary:
            return int(op.weight.shape[1]) * max(-lo, hi)
        total = np.abs(op.weight.astype(np.int16)).sum(axis=1, dtype=np.int64)
        return int(total.max()) * max(-lo, hi)

    # -- convolutions ------------------------------------------------------------------------------

    def _form(self, op: Conv) -> str:
        planes = self.program.values[op.source].planes
        lo, hi = self.ranges[op.source]
        if op.binary and planes:
            return "events" if op.groups == 1 else "groups"
        if not op.binary and op.groups == 1 and not planes and -32768 <= lo <= hi <= 32767:
            # Pairs are padded to 32 channels; a narrow layer's weights are a fraction of that.
            padded = 2 * round_up(op.weight.shape[1], 2) * words(op.weight.shape[2]) * 32
            return "codes" if not self.compact or padded <= 3 * op.weight.nbytes else "rows"
        return "rows"

    def _events(self, plan: Plan, step: Step, op: Conv) -> None:
        """Rows of weight bits, and what listing and counting them works in."""
        src, out = self.program.values[op.source], self.program.values[op.target].shape
        (kh, kw), (_, rows, columns) = op.kernel, op.weight.shape
        cin = src.shape[0]
        # Where rows are short, those of the columns of the kernel lie side by side.
        joined = 2 <= kw <= 8 and columns <= 8 and op.stride[1] == 1 and out[2] > 1
        pitch = columns
        if joined:
            wide = kw * columns
            pitch = wide if self.compact else _vector_pitch(wide)
        kernel_row = (1 if joined else kw) * cin * pitch
        centre = rows * max(1, self.ranges[op.source][1])
        depth = centre.bit_length()
        deepest = max(5, depth)
        f = plan.fields
        self._parameter(plan, "weight", kh * kernel_row + pitch)
        f.update(
            joined=int(joined), pitch=4 * pitch, tap=4 * (columns if joined else cin * pitch),
            kernel_row=4 * kernel_row, zeros=4 * kh * kernel_row, depth=depth, deepest=deepest,
            centre=centre, method=_code("method", self.method),
        )  # fmt: skip
        dense = 0
        if self.method == "dense" or (
            self.method == "measure" and out[0] <= NARROW and not self.compact
        ):
            dense = round_up(words(rows), 8)
        self._parameter(plan, "dense", dense * columns * 32)
        f["dense_rows"] = dense
        sets = 1 if step.residual is None else 2
        block = (depth + 1) * QUESTIONS * columns
        firing = self.fires_on_bits(step) and self._worth(sets * block + 2 * columns, op)
        self._firing(plan, firing, sets * block, columns)
        f["firing_block"] = block
        self._scale(plan, op, used=not firing)
        take = self._workspace.take
        height, width = src.shape[1:]
        span = min(op.dilation[0] * (kh - 1) + 1, height)
        ring = width * words(cin) * 32 + 16  # a compressed store may write 16 past the last
        places = out[2] + (op.dilation[1] * (kw - 1) if joined else 0)
        operands = kw if joined else 1
        counts = round_up(places * columns + 16, 1 if self.compact else CACHE_LINE)
        beside = round_up(kw * columns, 16)
        listed = take(max(rows + 32, dense + columns * 32))  # whole vectors are copied
        f.update(
            span=span, starts_pitch=width + 1, starts=take(span * src.planes * (width + 1)),
            ring_pitch=ring, ring=take(span * src.planes * ring + 16), list=listed,
            dense_counts=listed + dense, together_pitch=beside,
            together=take(deepest * beside + 16 if joined else 0), counts_pitch=counts,
            counts=take(src.planes * operands * deepest * counts), active_pitch=places,
            active=take(src.planes * places), slots=take(kh), sums=take(out[2] + 16),
        )  # fmt: skip

    def _worth(self, extra: int, op: Conv) -> bool:
        """Whether something that only makes a layer faster is small enough to be stored."""
        return not self.compact or 8 * extra <= op.weight.nbytes // 4

    def _firing(self, plan: Plan, firing: bool, count: int, columns: int) -> None:
        self._parameter(plan, "firing", count if firing else 0)
        self._parameter(plan, "after", 2 * columns if firing else 0)

    def _codes(self, plan: Plan, step: Step, op: Conv) -> None:
        """8-bit weights as pairs of 16-bit numbers."""
        _, rows, columns = op.weight.shape
        pairs, wide = -(-rows // 2), words(columns)
        out = self.program.values[op.target].shape
        self._parameter(plan, "weight", pairs * wide * 32)
        firing = self.fires_on_bits(step) and self._worth(QUESTIONS * wide * 32, op)
        self._firing(plan, firing, QUESTIONS * wide * 32, wide)
        self._scale(plan, op, used=not firing)
        plan.fields.update(
            weight_pitch=pairs * 32, pairs=pairs, firing_pitch=QUESTIONS * 32,
            patches=self._workspace.take((out[2] + TILE) * pairs),
            lines=self._workspace.take(TILE * wide * 32), line_pitch=wide * 32,
        )  # fmt: skip

    def _groups(self, plan: Plan, step: Step, op: Conv) -> None:
        """Weights for AND and popcount."""
        groups, rows, _ = op.weight.shape
        cout = op.multiplier.size // groups
        columns, dense = round_up(cout, 16), round_up(words(rows), 8)
        self._parameter(plan, "dense", groups * columns * dense)
        self._scale(plan, op)
        plan.fields.update(
            groups=groups, cin=self.program.values[op.source].shape[0] // groups, cout=cout,
            columns=columns, dense_pitch=columns * dense, dense_rows=dense,
            patch=self._workspace.take(dense), counts=self._workspace.take(columns),
        )  # fmt: skip

    def _rows(self, plan: Plan, step: Step, op: Conv) -> None:
        """Rows of bits or of bytes as they are in the file."""
        groups, rows, columns = op.weight.shape
        count = narrow(groups * rows * columns, "the size of its weights")
        self._parameter(plan, "weight", count if op.binary else -(-count // 4))
        self._scale(plan, op)
        cout = op.multiplier.size // groups
        plan.fields.update(
            groups=groups, cin=self.program.values[op.source].shape[0] // groups, cout=cout,
            binary=int(op.binary), row_pitch=columns, group_pitch=rows * columns,
            list=self._workspace.take(2 * rows + 2),
            sums=self._workspace.take(round_up(cout, 32)),
        )  # fmt: skip

    # -- neurons that are decided on bits ----------------------------------------------------------

    def fires_on_bits(self, step: Step) -> bool:
        """Whether scale, residual and neuron are a comparison of dot products with constants."""
        op, n = step.op, step.neuron
        if not isinstance(op, Conv) or n is None or op.weight.shape[0] > 1:
            return False
        spikes = self.program.values[op.source].planes > 0
        lo, hi = self.ranges[op.source]
        if spikes != op.binary or not -32768 <= lo <= hi <= (65535 if spikes else 32767):
            return False
        if op.multiplier.min() <= -INT32_MAX - 1 or self.reach(op) >= INT32_MAX:
            return False
        if n.bits != 2 or n.delay != "none" or n.order != "fire_first" or n.reset == "soft":
            return False
        if n.ceiling < n.levels or n.membrane is not None or n.initial == 2:
            return False
        if step.residual is None:
            return True
        other = self.program.values[step.residual.value]
        return spikes and other.planes == 1 and step.residual.own > 0


def _vector_pitch(n: int) -> int:
    return round_up(n, 8) if n > 16 else 1 << (n - 1).bit_length()


def _window(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
) -> Fields:
    (kh, kw), (sh, sw), (dh, dw) = kernel, stride, dilation
    top, left = padding[:2]
    return {"kh": kh, "kw": kw, "sh": sh, "sw": sw, "dh": dh, "dw": dw, "top": top, "left": left}
