"""The integer program: a typed graph of integer operations, and the rules that make it valid.

A :class:`Program` is what a quantized network means once no float is left: values are integers in
``[channels, height, width]`` order, operations are the dataclasses below, and
``docs/integer-program.md`` defines each to the bit. Nothing here executes anything: the NumPy
reference (:mod:`qsnn_ext.deploy.reference`) and the C engine (:mod:`qsnn_ext.deploy.engine`) do.

:meth:`Program.validate` proves by interval arithmetic that no int32 can overflow, so executors
need no checks at run time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from qsnn_ext.deploy import answers
from qsnn_ext.errors import FormatError

IntArray: TypeAlias = npt.NDArray[Any]

INT32_MAX = 2**31 - 1
WIDE_LIMIT = 2**30 - 1  # a 32-bit membrane saturates here, so that adding a current cannot overflow
MAX_PLANES = 16
MAX_DIMENSION = 2**16
MAX_ELEMENTS = 2**26  # of one activation: 256 MiB as int32, far above any network the engine suits
MAX_OPS = 4096
MAX_SHIFT = 46  # |accumulator * multiplier| < 2**62, so larger shifts would only lose everything


def words(bits: int) -> int:
    """Number of 32-bit words that hold ``bits`` bits."""
    return (bits + 31) // 32


def output_size(size: int, padding: int, kernel: int, stride: int, dilation: int = 1) -> int:
    """Windows along one axis; ``padding`` counts both ends. Below 1 if the kernel does not fit."""
    return (size + padding - dilation * (kernel - 1) - 1) // stride + 1


@dataclass(frozen=True)
class Value:
    """One activation of the graph.

    Args:
        name: Unique name, for messages and reports.
        shape: ``(channels, height, width)``; a vector of features is ``(features, 1, 1)``.
        planes: 0 for signed int32; p in 1..16 for integers in ``[0, 2**p)`` held as p bit planes
            (p = 1: spikes).
        scale: The real number that one unit stands for. Information only: executors never use it.
    """

    name: str
    shape: tuple[int, int, int]
    planes: int
    scale: float = 1.0

    @property
    def elements(self) -> int:
        """Number of integers in one sample."""
        return self.shape[0] * self.shape[1] * self.shape[2]


@dataclass(eq=False)
class Conv:
    """Convolution, then the folded batch norm ``y = ((dot * multiplier + half) >> shift) + bias``.

    A linear layer is a convolution whose kernel covers its input.

    Args:
        name: Module path of the layer it came from.
        source: Index of the input value.
        target: Index of the output value (signed int32).
        weight: Binary: uint32 ``[groups, kh*kw*cin, words(cout)]``; bit ``c % 32`` of word
            ``c // 32`` is 1 for weight +1 and 0 for -1; rows in (ky, kx, channel) order. Otherwise
            int8 ``[groups, kh*kw*cin, cout]``. ``cin`` and ``cout`` are per group.
        kernel, stride, dilation: ``(vertical, horizontal)``.
        padding: ``(top, left, bottom, right)`` rows and columns of zeros.
        groups: Channel groups.
        multiplier: int32 ``[C_out]``.
        shift: uint8 ``[C_out]``, 1..46.
        bias: int32 ``[C_out]``.
    """

    name: str
    source: int
    target: int
    weight: IntArray
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    multiplier: IntArray
    shift: IntArray
    bias: IntArray

    @property
    def binary(self) -> bool:
        """Whether the weights are single bits."""
        return self.weight.dtype == np.uint32


@dataclass(eq=False)
class Affine:
    """Per-channel ``y = ((x * multiplier + half) >> shift) + bias``: a batch norm on its own."""

    name: str
    source: int
    target: int
    multiplier: IntArray
    shift: IntArray
    bias: IntArray


@dataclass(eq=False)
class Add:
    """``y = sum_i factors[i] * sources[i]``: residual connections."""

    name: str
    sources: tuple[int, ...]
    factors: tuple[int, ...]
    target: int


@dataclass(eq=False)
class Logic:
    """Products of spikes: ``"and"`` is ``a * b``, ``"iand"`` is ``(1 - a) * b``."""

    name: str
    sources: tuple[int, int]
    target: int
    function: Literal["and", "iand"]


@dataclass(eq=False)
class Pool:
    """Maximum or sum over windows; ``"repeat"`` copies each pixel ``kernel`` times instead.

    Padding counts as 0 in a sum and as absent in a maximum. An average is a sum whose divisor is
    part of the scale of its target.
    """

    name: str
    source: int
    target: int
    function: Literal["max", "sum", "repeat"]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]


@dataclass(eq=False)
class Neuron:
    """A leaky integrate-and-fire neuron with a k-bit membrane potential.

    With ``n = 2**(bits-1) - 1`` the state of a neuron is a code in ``[-n, n]`` in k-bit two's
    complement (``delay != "none"`` adds the last spike as bit k). One step, all int32::

        h = leak[state] + x                       # what was carried, leaked, plus the current
        fire_first:      s = h >= threshold;  v = reset(h, s);  code = Q(v)
        quantize_first:  code = Q(h);         s = code >= threshold
        where s = 0: code = min(code, ceiling)

    ``Q(v) = (number of bounds <= v) - n``. ``reset``: hard ``reset_value`` where s, soft
    ``h - reset_value`` where s, none ``h``.

    Args:
        name: Module path.
        source: Index of the input current (any kind).
        target: Index of the spikes (1 plane).
        bits: k in 2..8, or 32 for an int32 membrane, for which ``leak`` is ``[rows, 3]`` of
            (multiplier, shift, offset): ``h = ((v * multiplier + half) >> shift) + offset + x``
            and ``v`` saturates at +-(2**30 - 1).
        leak: int32 ``[rows, 2**state_bits]``, rows 1 or C.
        threshold: int32 ``[1]`` or ``[C]``; a code for ``quantize_first``.
        bounds: int32 ``[2n]`` ascending (empty for 32 bits).
        reset: ``"hard"``, ``"soft"`` or ``"none"`` (what ``fire_first`` and 32 bits apply).
        reset_value: int32 ``[1]`` or ``[C]``.
        order: ``"fire_first"`` (Eq. 12) or ``"quantize_first"`` (Algorithm 1).
        delay: ``"none"``, or ``"table"``: a reset of the next step sees the last spike, which
            selects the upper half of ``leak``.
        ceiling: Largest code of a neuron that did not fire.
        initial: State before the first step (the raw k- or (k+1)-bit word, or the int32).
        membrane: Index of an int32 value that receives the stored membrane after each step, or
            None. Its entries are ``reading[state]`` (32 bits: the membrane itself, plus
            ``reading[1]`` where s).
        reading: int32 ``[2**state_bits]`` (``[2]`` for 32 bits); empty when ``membrane`` is None.
    """

    name: str
    source: int
    target: int
    bits: int
    leak: IntArray
    threshold: IntArray
    bounds: IntArray
    reset: Literal["hard", "soft", "none"]
    reset_value: IntArray
    order: Literal["fire_first", "quantize_first"] = "fire_first"
    delay: Literal["none", "table"] = "none"
    ceiling: int = 127
    initial: int = 0
    membrane: int | None = None
    reading: IntArray = field(default_factory=lambda: np.zeros(0, np.int32))

    @property
    def state_bits(self) -> int:
        """Bits of state per neuron."""
        return self.bits + (1 if self.delay != "none" else 0)

    @property
    def levels(self) -> int:
        """n, the largest code (0 for 32 bits)."""
        return 0 if self.bits == 32 else 2 ** (self.bits - 1) - 1


@dataclass(eq=False)
class Gather:
    """Elements in another order: ``y[c, h, w] = x[channel[c] + row[h] + column[w]]``.

    ``x`` is counted as it lies, in the order channels, height, width; where one of the three
    numbers is -1 the result is 0. This is a permutation of axes, a slice, a repetition, a padding
    with zeros or with copies of what is inside.

    Args:
        name: Module path.
        source, target: Indices of values of equal planes.
        channel: int32 ``[C]``, each -1 or more, as in ``row`` and ``column``.
        row: int32 ``[H]``.
        column: int32 ``[W]``.
    """

    name: str
    source: int
    target: int
    channel: IntArray
    row: IntArray
    column: IntArray


@dataclass(eq=False)
class Concat:
    """Values side by side along their channels."""

    name: str
    sources: tuple[int, ...]
    target: int


@dataclass(eq=False)
class Matmul:
    """Products of matrices, one for each head: attention.

    A value ``[heads * n, H, W]`` is ``heads`` matrices of ``H * W`` rows, its pixels, and ``n``
    columns, the channels of the head. Per head, ``y = op(a) b`` with ``op(a)`` the matrix or its
    transpose, and likewise ``b``.

    Args:
        name: Module path.
        sources: Indices of ``a`` and ``b``.
        target: Index of the product.
        heads: Number of matrices in each.
        transpose: Whether ``a``, and whether ``b``, is transposed first.
    """

    name: str
    sources: tuple[int, int]
    target: int
    heads: int
    transpose: tuple[bool, bool]


@dataclass(eq=False)
class Delay:
    """``y`` is what ``x`` was one time step before, 0 at the first: recurrence.

    ``x`` holds counts or spikes, or is the membrane output of a neuron of 8 bits or less, whose
    range its reading tells. It may be written by a later operation: it is taken at the end of the
    step.
    """

    name: str
    source: int
    target: int


Op: TypeAlias = Conv | Affine | Add | Logic | Pool | Neuron | Gather | Concat | Matmul | Delay
OP_TYPES: dict[str, type[Any]] = {
    t.__name__: t for t in (Conv, Affine, Add, Logic, Pool, Neuron, Gather, Concat, Matmul, Delay)
}


def sources_of(op: Op) -> tuple[int, ...]:
    """Indices of the values an operation reads."""
    return op.sources if isinstance(op, Add | Logic | Concat | Matmul) else (op.source,)


def targets_of(op: Op) -> tuple[int, ...]:
    """Indices of the values an operation writes."""
    if isinstance(op, Neuron) and op.membrane is not None:
        return (op.target, op.membrane)
    return (op.target,)


@dataclass(eq=False)
class Program:
    """An executable integer network.

    Args:
        values: All activations; ``values[0]`` is the input (int32 codes).
        ops: Operations in execution order.
        outputs: Indices of the values that are the answer of every time step.
        reduction: What the whole run returns: ``"none"`` the answer of every step, ``"sum"`` or
            ``"mean"`` over time.
        input_scale: Real value of one input code: ``code = clip(round(x / scale), lo, hi)``.
        input_range: ``(lo, hi)`` of the input codes.
        timesteps: Default number of steps for an input without a time axis.
        metadata: Text (str -> str). These keys have a meaning, all others are for people:
            ``input_rank`` and ``output_ranks``, axes per sample and time step of the input and of
            every answer (``"1"`` to ``"3"``, separated by commas); ``time`` (``"step"``, the model
            takes and gives one step; ``"repeat"``, one input for all steps; ``"sequence"``, or
            ``"batch_first"`` if the model takes ``[N, T, ...]``); ``structure`` (``"tensor"`` or
            ``"tuple"``) and ``answer`` (:func:`qsnn_ext.deploy.answers.parse`), what the host makes
            of the outputs; ``input_gain`` and ``input_bias``, what it does to the input before
            that becomes codes (``x * gain + bias``, one number or one per channel, separated by
            commas); ``views``, JSON of the order in which the model holds a neuron's values; and
            ``model``, the name of its class.
    """

    values: list[Value]
    ops: list[Op]
    outputs: tuple[int, ...]
    reduction: Literal["none", "sum", "mean"] = "none"
    input_scale: float = 1.0
    input_range: tuple[int, int] = (-127, 127)
    timesteps: int = 1
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def neurons(self) -> list[Neuron]:
        """The neuron operations, in order."""
        return [op for op in self.ops if isinstance(op, Neuron)]

    @property
    def delays(self) -> list[Delay]:
        """The operations that remember a value for a step, in order."""
        return [op for op in self.ops if isinstance(op, Delay)]

    def delay_range(self, delay: Delay) -> tuple[int, int]:
        """Least and largest number that a delay may hold.

        Raises:
            FormatError: If it delays an int32 of which nothing is known beforehand.
        """
        planes = self.values[delay.source].planes
        if planes:
            return 0, 2**planes - 1
        for n in self.neurons:
            if n.membrane == delay.source and n.bits != 32:
                reading = n.reading
                if isinstance(reading, np.ndarray) and reading.dtype == np.int32 and reading.size:
                    return min(int(reading.min()), 0), max(int(reading.max()), 0)
        raise _fail(
            delay.name, "it delays counts, spikes, or membrane outputs of neurons of 8 bits or less"
        )

    @property
    def input_rank(self) -> int:
        """Axes of the input per sample and time step, 1 to 3: ``metadata["input_rank"]``."""
        return int(self.metadata.get("input_rank", "3"))

    @property
    def output_ranks(self) -> list[int]:
        """Axes of every answer per sample and time step, 1 to 3: ``metadata["output_ranks"]``."""
        ranks = self.metadata.get("output_ranks", "")
        return [int(r) for r in ranks.split(",")] if ranks else [3] * len(self.outputs)

    @property
    def answer(self) -> tuple[list[list[Any]], Any]:
        """Steps of every answer and the form of the result: ``metadata["answer"]``."""
        text, count = self.metadata.get("answer"), len(self.outputs)
        if text is not None:
            return answers.parse(text, count)
        several = count > 1 or self.metadata.get("structure") == "tuple"
        return [[] for _ in self.outputs], {"tuple": list(range(count))} if several else 0

    @property
    def prologue(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]] | None:
        """Gain and bias of the input before it becomes codes, float64 ``[1]`` or ``[C]``."""
        if "input_gain" not in self.metadata and "input_bias" not in self.metadata:
            return None
        found = []
        for key, default in (("input_gain", "1"), ("input_bias", "0")):
            try:
                numbers = [float(n) for n in self.metadata.get(key, default).split(",")]
            except ValueError:
                numbers = []
            array = np.array(numbers, np.float64)
            if array.size not in (1, self.values[0].shape[0]) or not np.isfinite(array).all():
                raise _fail("metadata", f"{key} must be one finite number or one per channel")
            found.append(array)
        return found[0], found[1]

    @property
    def input_bits(self) -> int:
        """Bits of an input code."""
        lo, hi = self.input_range
        return max(hi, -lo).bit_length() + (lo < 0)

    def validate(self) -> list[tuple[int, int]]:
        """Check every rule of the program.

        Returns:
            The interval ``(low, high)`` that every value is proven to stay in.

        Raises:
            FormatError: If anything is out of range; the message names the operation.
        """
        return _Validator(self).run()


def _fail(where: str, what: str) -> FormatError:
    return FormatError(f"invalid program: {where}: {what}")


class _Validator:
    """Walks a program once, checking every field before it is used."""

    def __init__(self, program: Program) -> None:
        self.p = program

    def run(self) -> list[tuple[int, int]]:
        p = self.p
        if not 1 <= len(p.values) <= 4 * MAX_OPS or not 1 <= len(p.ops) <= MAX_OPS:
            raise _fail("program", "it needs 1 to 4096 operations and a value for each")
        names: set[str] = set()
        for v in p.values:
            self._value(v)
            if v.name in names:
                raise _fail("value", f"two values are named {v.name!r}")
            names.add(v.name)
        if sum(v.elements for v in p.values) > 4 * MAX_ELEMENTS:
            raise _fail("program", "its activations are too large")
        lo, hi = self._pair("input_range", p.input_range)
        if not -32768 <= lo <= 0 <= hi <= 32767 or p.values[0].planes != 0:
            raise _fail("input", "its codes must be int32 within 16 bits around 0")
        if not (isinstance(p.input_scale, float) and 0 < p.input_scale < 1e30):
            raise _fail("input", "its scale must be a positive finite number")
        if p.reduction not in ("none", "sum", "mean"):
            raise _fail("program", f"unknown reduction {p.reduction!r}")
        if not (type(p.timesteps) is int and 1 <= p.timesteps <= 2**16):
            raise _fail("program", "timesteps must be 1 to 65536")
        self.range: list[tuple[int, int] | None] = [None] * len(p.values)
        self.range[0] = (lo, hi)
        op_names: set[str] = set()
        for op in p.ops:
            if not isinstance(op.name, str) or not op.name or len(op.name) > 512:
                raise _fail("operation", "a name must be 1 to 512 characters")
            if op.name in op_names:
                raise _fail(op.name, "two operations have this name")
            op_names.add(op.name)
            for i in sources_of(op):
                known = type(i) is int and 0 <= i < len(p.values)
                if not known or (self.range[i] is None and not isinstance(op, Delay)):
                    raise _fail(op.name, "it reads a value that was not written before")
            for i in targets_of(op):
                if not (type(i) is int and 0 < i < len(p.values)) or self.range[i] is not None:
                    raise _fail(op.name, "it writes a value that does not exist or exists already")
            check = getattr(self, f"_{type(op).__name__.lower()}")
            check(op)
        for delay in p.delays:
            if self.range[delay.source] is None:
                raise _fail(delay.name, "it delays a value that is never written")
        if not p.outputs or len(p.outputs) > 16:
            raise _fail("program", "it needs 1 to 16 outputs")
        for i in p.outputs:
            if not (type(i) is int and 0 <= i < len(p.values)) or self.range[i] is None:
                raise _fail("output", "it names a value that is never written")
        if any(r is None for r in self.range):
            raise _fail("value", "some value is never written")
        self._metadata()
        return [r for r in self.range if r is not None]

    def _metadata(self) -> None:
        """What the metadata say of shape and form must agree with the program."""
        p = self.p
        known = isinstance(p.metadata, dict)
        if not known or not all(isinstance(t, str) for kv in p.metadata.items() for t in kv):
            raise _fail("metadata", "they must be text")
        _, height, width = p.values[0].shape
        rank = p.metadata.get("input_rank", "3")
        if rank not in ("1", "2", "3") or (rank == "2" and height > 1):
            raise _fail("metadata", f"an input of rank {rank[:40]!r} contradicts its shape")
        if rank == "1" and height * width > 1:
            raise _fail("metadata", f"an input of rank {rank!r} contradicts its shape")
        ranks = p.metadata.get("output_ranks", "")
        parts = ranks.split(",") if ranks else ["3"] * len(p.outputs)
        if len(parts) != len(p.outputs) or not set(parts) <= {"1", "2", "3"}:
            raise _fail("metadata", f"impossible ranks {ranks[:40]!r} of {len(p.outputs)} outputs")
        _ = p.answer, p.prologue  # malformed ones raise
        self._views()

    def _views(self) -> None:
        """Loops over the elements of a neuron's value stay within it."""
        size = {n.name: self.p.values[n.source].elements for n in self.p.neurons}
        try:
            views = json.loads(self.p.metadata.get("views", "{}"))
            for name, loops in views.items():
                count, last = 1, 0
                for times, stride in loops:
                    if type(times) is not int or type(stride) is not int or stride < 0:
                        raise _fail("metadata", f"a loop of the views of {name[:40]!r} is none")
                    count, last = count * times, last + (times - 1) * stride
                if not 1 <= count <= size[name] or not 0 <= last < size[name]:
                    raise _fail("metadata", f"views of {name[:40]!r} go beyond its value")
        except FormatError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise _fail("metadata", "views do not fit the neurons") from None

    # -- small checks ------------------------------------------------------------------------

    def _value(self, v: Value) -> None:
        if not isinstance(v.name, str) or not 0 < len(v.name) <= 512:
            raise _fail("value", "a name must be 1 to 512 characters")
        ok = isinstance(v.shape, tuple) and len(v.shape) == 3
        ok = ok and all(type(d) is int and 1 <= d <= MAX_DIMENSION for d in v.shape)
        if not ok or v.elements > MAX_ELEMENTS:
            raise _fail(v.name, f"shape {v.shape!r} is not three sizes of 1 to {MAX_DIMENSION}")
        if not (type(v.planes) is int and 0 <= v.planes <= MAX_PLANES):
            raise _fail(v.name, f"planes must be 0 to {MAX_PLANES}")
        if not (isinstance(v.scale, float) and 0 < v.scale < 1e30):
            raise _fail(v.name, "scale must be a positive finite number")

    def _pair(self, where: str, pair: Any) -> tuple[int, int]:
        if not (isinstance(pair, tuple) and len(pair) == 2 and all(type(i) is int for i in pair)):
            raise _fail(where, "expected two integers")
        return pair

    def _array(
        self, where: str, array: Any, dtype: npt.DTypeLike, shape: Sequence[int]
    ) -> IntArray:
        if not isinstance(array, np.ndarray) or array.dtype != np.dtype(dtype):
            raise _fail(where, f"expected an array of {np.dtype(dtype).name}")
        if array.shape != tuple(shape):
            raise _fail(where, f"shape {array.shape} where {tuple(shape)} was expected")
        return array

    def _interval(self, i: int) -> tuple[int, int]:
        r = self.range[i]
        assert r is not None
        return r

    def _set(self, name: str, target: int, lo: int, hi: int) -> None:
        v = self.p.values[target]
        if v.planes == 0:
            if max(-lo, hi) > INT32_MAX:
                raise _fail(name, f"its result may reach {max(-lo, hi)}, which exceeds int32")
        elif lo < 0 or hi >= 2**v.planes:
            raise _fail(name, f"results in [{lo}, {hi}] do not fit {v.planes} bit planes")
        self.range[target] = (lo, hi)

    def _geometry(
        self,
        name: str,
        source: Value,
        target: Value,
        kernel: Any,
        stride: Any,
        padding: Any,
        dilation: Any,
    ) -> None:
        for what, pair in (("kernel", kernel), ("stride", stride), ("dilation", dilation)):
            a, b = self._pair(f"{name} {what}", pair)
            if not (1 <= a <= 4096 and 1 <= b <= 4096):
                raise _fail(name, f"{what} must be 1 to 4096")
        ok = isinstance(padding, tuple) and len(padding) == 4
        if not ok or not all(type(q) is int and 0 <= q <= 4096 for q in padding):
            raise _fail(name, "padding must be four sizes of 0 to 4096")
        top, left, bottom, right = padding
        for axis, before, after in ((0, top, bottom), (1, left, right)):
            size = source.shape[1 + axis]
            out = output_size(size, before + after, kernel[axis], stride[axis], dilation[axis])
            if out != target.shape[1 + axis]:
                raise _fail(name, f"output shape {target.shape} does not follow from its geometry")

    def _fixed_point(
        self, op: Conv | Affine, channels: int, lo: IntArray, hi: IntArray
    ) -> tuple[int, int]:
        """Interval of ``((x * multiplier + half) >> shift) + bias`` for x in [lo, hi]."""
        m = self._array(f"{op.name} multiplier", op.multiplier, np.int32, [channels])
        s = self._array(f"{op.name} shift", op.shift, np.uint8, [channels])
        b = self._array(f"{op.name} bias", op.bias, np.int32, [channels])
        if int(s.min()) < 1 or int(s.max()) > MAX_SHIFT:
            raise _fail(op.name, f"shifts must be 1 to {MAX_SHIFT}")
        m64, s64, b64 = m.astype(np.int64), s.astype(np.int64), b.astype(np.int64)
        half = np.int64(1) << (s64 - 1)
        ends = [((x.astype(np.int64) * m64 + half) >> s64) + b64 for x in (lo, hi)]
        low, high = np.minimum(*ends).min(), np.maximum(*ends).max()
        return int(low), int(high)

    # -- one rule set per operation ------------------------------------------------------------

    def _conv(self, op: Conv) -> None:
        src, dst = self.p.values[op.source], self.p.values[op.target]
        self._geometry(op.name, src, dst, op.kernel, op.stride, op.padding, op.dilation)
        g = op.groups
        if not (type(g) is int and g >= 1 and src.shape[0] % g == 0 and dst.shape[0] % g == 0):
            raise _fail(op.name, "groups must divide the channels")
        if dst.planes != 0:
            raise _fail(op.name, "a convolution writes int32")
        rows = op.kernel[0] * op.kernel[1] * (src.shape[0] // g)
        cout = dst.shape[0] // g
        lo, hi = self._interval(op.source)
        if isinstance(op.weight, np.ndarray) and op.weight.dtype == np.uint32:
            weight = self._array(op.name + " weight", op.weight, np.uint32, [g, rows, words(cout)])
            if cout % 32 and int((weight[:, :, -1] >> np.uint32(cout % 32)).max()) != 0:
                raise _fail(op.name, "weight bits beyond the last channel must be 0")
            bound = np.full(dst.shape[0], rows * max(-lo, hi), np.int64)
        else:
            weight = self._array(op.name + " weight", op.weight, np.int8, [g, rows, cout])
            total = np.abs(weight.astype(np.int16)).sum(axis=1, dtype=np.int64).reshape(-1)
            bound = total * max(-lo, hi)
        if int(bound.max()) > INT32_MAX:
            raise _fail(op.name, f"its accumulator may reach {int(bound.max())}: exceeds int32")
        self._set(op.name, op.target, *self._fixed_point(op, dst.shape[0], -bound, bound))

    def _affine(self, op: Affine) -> None:
        src, dst = self.p.values[op.source], self.p.values[op.target]
        if src.shape != dst.shape or dst.planes != 0:
            raise _fail(op.name, "it must keep the shape and write int32")
        lo, hi = self._interval(op.source)
        c = src.shape[0]
        ends = self._fixed_point(op, c, np.full(c, lo, np.int64), np.full(c, hi, np.int64))
        self._set(op.name, op.target, *ends)

    def _add(self, op: Add) -> None:
        dst = self.p.values[op.target]
        if not 2 <= len(op.sources) <= 16 or len(op.sources) != len(op.factors):
            raise _fail(op.name, "it needs 2 to 16 sources and a factor for each")
        lo = hi = 0
        for i, f in zip(op.sources, op.factors, strict=True):
            if not (type(f) is int and abs(f) <= INT32_MAX):
                raise _fail(op.name, "factors must be int32")
            if self.p.values[i].shape != dst.shape:
                raise _fail(op.name, "its operands differ in shape")
            a, b = (f * e for e in self._interval(i))
            lo, hi = lo + min(a, b), hi + max(a, b)
            if max(-lo, hi, abs(a), abs(b)) > INT32_MAX:
                raise _fail(op.name, "its result may exceed int32")
        self._set(op.name, op.target, lo, hi)

    def _logic(self, op: Logic) -> None:
        dst = self.p.values[op.target]
        if len(op.sources) != 2 or op.function not in ("and", "iand") or dst.planes != 1:
            raise _fail(op.name, "it needs two sources, a known function and spikes as target")
        for i in op.sources:
            if self.p.values[i].shape != dst.shape or self.p.values[i].planes != 1:
                raise _fail(op.name, "its operands must be spikes of the same shape")
        self._set(op.name, op.target, 0, 1)

    def _pool(self, op: Pool) -> None:
        src, dst = self.p.values[op.source], self.p.values[op.target]
        lo, hi = self._interval(op.source)
        if src.shape[0] != dst.shape[0]:
            raise _fail(op.name, "it must keep the channels")
        if op.function == "repeat":
            kh, kw = self._pair(f"{op.name} kernel", op.kernel)
            if dst.shape[1:] != (src.shape[1] * kh, src.shape[2] * kw):
                raise _fail(op.name, "output shape does not follow from its geometry")
            if op.stride != (1, 1) or op.padding != (0, 0, 0, 0):
                raise _fail(op.name, "repeat has neither stride nor padding")
        elif op.function in ("max", "sum"):
            self._geometry(op.name, src, dst, op.kernel, op.stride, op.padding, (1, 1))
            top, left, bottom, right = op.padding
            if max(top, bottom) >= op.kernel[0] or max(left, right) >= op.kernel[1]:
                raise _fail(op.name, "padding must be smaller than the kernel")
            if op.function == "sum":
                area = op.kernel[0] * op.kernel[1]
                lo, hi = min(lo * area, 0), max(hi * area, 0)
        else:
            raise _fail(op.name, f"unknown function {op.function!r}")
        if (src.planes == 0) != (dst.planes == 0):
            raise _fail(op.name, "it cannot turn int32 into bit planes or back")
        if op.function != "sum" and src.planes != dst.planes:
            raise _fail(op.name, "it must keep the bit planes")
        self._set(op.name, op.target, lo, hi)

    def _gather(self, op: Gather) -> None:
        src, dst = self.p.values[op.source], self.p.values[op.target]
        if src.planes != dst.planes:
            raise _fail(op.name, "it must keep the bit planes")
        reach = 0
        zeros = False
        for what, n in zip(("channel", "row", "column"), dst.shape, strict=True):
            array = self._array(f"{op.name} {what}", getattr(op, what), np.int32, [n])
            if int(array.min()) < -1:
                raise _fail(op.name, f"{what} must hold numbers of -1 or more")
            zeros = zeros or int(array.min()) < 0
            reach += max(int(array.max()), 0)
        if reach >= src.elements:
            raise _fail(op.name, f"it reaches element {reach} of {src.elements}")
        lo, hi = self._interval(op.source)
        self._set(op.name, op.target, *((min(lo, 0), max(hi, 0)) if zeros else (lo, hi)))

    def _concat(self, op: Concat) -> None:
        dst = self.p.values[op.target]
        if not isinstance(op.sources, tuple) or not 2 <= len(op.sources) <= 64:
            raise _fail(op.name, "it needs 2 to 64 sources")
        values = [self.p.values[i] for i in op.sources]
        if any(v.shape[1:] != dst.shape[1:] for v in values):
            raise _fail(op.name, "its operands differ in height or width")
        if sum(v.shape[0] for v in values) != dst.shape[0]:
            raise _fail(op.name, "its channels are not those of its operands together")
        if any((v.planes == 0) != (dst.planes == 0) for v in values):
            raise _fail(op.name, "it cannot turn int32 into bit planes or back")
        lows, highs = zip(*(self._interval(i) for i in op.sources), strict=True)
        self._set(op.name, op.target, min(lows), max(highs))

    def _matmul(self, op: Matmul) -> None:
        dst = self.p.values[op.target]
        ok = isinstance(op.sources, tuple) and len(op.sources) == 2
        ok = ok and isinstance(op.transpose, tuple) and len(op.transpose) == 2
        if not ok or not all(type(t) is bool for t in op.transpose):
            raise _fail(op.name, "it needs two sources, and whether each is transposed")
        values = [self.p.values[i] for i in op.sources]
        if not (type(op.heads) is int and op.heads >= 1):
            raise _fail(op.name, "it needs at least one head")
        if any(v.shape[0] % op.heads for v in (*values, dst)):
            raise _fail(op.name, "heads must divide the channels")
        sizes = []
        for v, flipped in zip((*values, dst), (*op.transpose, False), strict=True):
            rows, columns = v.shape[1] * v.shape[2], v.shape[0] // op.heads
            sizes.append((columns, rows) if flipped else (rows, columns))
        (i, k), (same, j), product = sizes
        if k != same or product != (i, j):
            raise _fail(op.name, f"matrices {sizes[0]} and {sizes[1]} do not make {product}")
        ends = [a * b for a in self._interval(op.sources[0]) for b in self._interval(op.sources[1])]
        lo, hi = k * min(ends), k * max(ends)
        if max(-lo, hi) > INT32_MAX:
            raise _fail(op.name, f"its sums may reach {max(-lo, hi)}: exceeds int32")
        self._set(op.name, op.target, lo, hi)

    def _delay(self, op: Delay) -> None:
        src, dst = self.p.values[op.source], self.p.values[op.target]
        if src.shape != dst.shape or src.planes != dst.planes:
            raise _fail(op.name, "a delay keeps shape and planes")
        if dst.planes:
            # Whatever is written to the source fits its planes; that is checked there.
            self._set(op.name, op.target, 0, 2**dst.planes - 1)
            return
        lo, hi = self.p.delay_range(op)
        self._set(op.name, op.target, lo, hi)

    def _neuron(self, op: Neuron) -> None:
        src, dst = self.p.values[op.source], self.p.values[op.target]
        c = src.shape[0]
        if src.shape != dst.shape or dst.planes != 1:
            raise _fail(op.name, "a neuron writes spikes of the shape it reads")
        if op.reset not in ("hard", "soft", "none") or op.delay not in ("none", "table"):
            raise _fail(op.name, "unknown reset or delay")
        if op.order not in ("fire_first", "quantize_first"):
            raise _fail(op.name, f"unknown order {op.order!r}")
        for what, array in (("threshold", op.threshold), ("reset_value", op.reset_value)):
            if not isinstance(array, np.ndarray) or array.shape not in ((1,), (c,)):
                raise _fail(op.name, f"{what} needs 1 or {c} entries")
            self._array(f"{op.name} {what}", array, np.int32, array.shape)
        shape = op.leak.shape if isinstance(op.leak, np.ndarray) else ()
        if len(shape) != 2 or shape[0] not in (1, c):
            raise _fail(op.name, f"leak needs 1 or {c} rows")
        if type(op.initial) is not int or type(op.ceiling) is not int:
            raise _fail(op.name, "initial and ceiling must be integers")
        if not -127 <= op.ceiling <= 127:
            raise _fail(op.name, "the ceiling must be -127 to 127")
        lo, hi = self._interval(op.source)
        if op.bits == 32:
            mlo, mhi = self._wide(op, lo, hi)
        else:
            mlo, mhi = self._narrow(op, lo, hi)
        self._set(op.name, op.target, 0, 1)
        if op.membrane is not None:
            m = self.p.values[op.membrane]
            if m.shape != src.shape or m.planes != 0:
                raise _fail(op.name, "its membrane output must be int32 of the same shape")
            self._set(op.name, op.membrane, mlo, mhi)
        elif op.reading.size:
            raise _fail(op.name, "a reading without a membrane output")

    def _wide(self, op: Neuron, lo: int, hi: int) -> tuple[int, int]:
        leak = self._array(f"{op.name} leak", op.leak, np.int32, [op.leak.shape[0], 3])
        self._array(f"{op.name} bounds", op.bounds, np.int32, [0])
        m, s, offset = (leak[:, i].astype(np.int64) for i in range(3))
        if int(m.min()) < 0 or int(s.min()) < 1 or int(s.max()) > 31:
            raise _fail(op.name, "the leak needs a multiplier >= 0 and a shift of 1 to 31")
        if bool((m > (np.int64(1) << s)).any()):
            raise _fail(op.name, "a leak above 1 would grow without bound")
        if op.order != "fire_first":
            raise _fail(op.name, "a 32-bit membrane is not quantized: order must be fire_first")
        if abs(op.initial) > WIDE_LIMIT:
            raise _fail(op.name, "the initial membrane is out of range")
        extra = int(np.abs(offset).max()) + int(np.abs(op.reset_value.astype(np.int64)).max())
        if WIDE_LIMIT + 1 + max(-lo, hi) + extra > INT32_MAX:
            raise _fail(op.name, "its charge may exceed int32")
        if op.membrane is None:
            return 0, 0
        reading = self._array(f"{op.name} reading", op.reading, np.int32, [2])
        if int(reading[0]) != 0:
            raise _fail(op.name, "reading[0] must be 0")
        extra = abs(int(reading[1]))
        return -WIDE_LIMIT - extra, WIDE_LIMIT + extra

    def _narrow(self, op: Neuron, lo: int, hi: int) -> tuple[int, int]:
        if not (type(op.bits) is int and 2 <= op.bits <= 8):
            raise _fail(op.name, "bits must be 2 to 8, or 32")
        n = op.levels
        size = 2**op.state_bits
        leak = self._array(f"{op.name} leak", op.leak, np.int32, [op.leak.shape[0], size])
        bounds = self._array(f"{op.name} bounds", op.bounds, np.int32, [2 * n])
        if bool((np.diff(bounds.astype(np.int64)) < 0).any()):
            raise _fail(op.name, "bounds must ascend")
        if not 0 <= op.initial < size or not -n <= op.ceiling <= 127:
            raise _fail(op.name, "initial or ceiling is out of range")
        reach = int(np.abs(leak.astype(np.int64)).max()) + max(-lo, hi)
        reach += int(np.abs(op.reset_value.astype(np.int64)).max())
        if reach > INT32_MAX:
            raise _fail(op.name, f"its charge may reach {reach}: exceeds int32")
        if op.membrane is None:
            return 0, 0
        reading = self._array(f"{op.name} reading", op.reading, np.int32, [size])
        return int(reading.min()), int(reading.max())
