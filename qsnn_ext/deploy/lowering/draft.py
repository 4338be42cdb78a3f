"""The program while it is being written, and what is known of the model's tensors meanwhile.

Lowering walks the model's graph. What the model computes at a node is one of the classes below:
mostly an :class:`Array`, that is, a value of the program seen through the axes, the scale and the
time steps the model sees it with. Values and operations are collected in a :class:`Draft`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import nn

from qsnn_ext.deploy.lowering.neurons import Constants, Real
from qsnn_ext.deploy.lowering.tracing import error_at
from qsnn_ext.deploy.program import IntArray, Op, Value
from qsnn_ext.errors import LoweringError


class Atom(NamedTuple):
    """A loop over time (T), the batch (N), or over channels, height or width (C, H, W) of a value.

    Args:
        label: Of the axis it runs over.
        size: How many steps it makes.
        stride: How far along that axis each step goes; 0 repeats, below 0 runs backwards.
    """

    label: str
    size: int
    stride: int = 1


Axis: TypeAlias = tuple[Atom, ...]  # several atoms: axes flattened into one; none: of size 1
Axes: TypeAlias = tuple[Axis, ...]
Shape: TypeAlias = tuple[int, int, int]  # [C, H, W]


@dataclass(frozen=True)
class Geometry:
    """How the kernel of a convolution is laid over its input."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # top, left, bottom, right
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


@dataclass(frozen=True, eq=False)
class PendingConv:
    """A convolution whose scale and bias are still being collected."""

    name: str
    source: int
    weight: IntArray
    kernel: tuple[int, int]
    geometry: Geometry
    shape: Shape  # of its output
    reach: int  # largest absolute accumulator


@dataclass(frozen=True, eq=False)
class Array:
    """A tensor of the model: one value of the program, seen through relabelled axes.

    Args:
        base: Index of the value, or a convolution not yet written.
        axes: Its axes as the model sees them.
        scale: Real value of one unit of the value.
        gain, bias: Per-channel real factors not yet applied (weight scales and batch norms), or
            None.
        origin: Module path that gain and bias came from last.
        steps: Time steps it stands for: None for all (or a single-step model).
        reduction: Whether time has been summed over.
        factor: What the sum over time is multiplied with.
        start: Channel, row and column at which its loops start.
        raw: Whether it is the input.
        done: How many steps of the prologue it has been through.
    """

    base: int | PendingConv
    axes: Axes
    scale: float = 1.0
    gain: Real | None = None
    bias: Real | None = None
    origin: str = ""
    steps: frozenset[int] | None = None
    reduction: Literal["none", "sum"] = "none"
    factor: float = 1.0
    start: Shape = (0, 0, 0)
    raw: bool = False
    done: int = 0

    @property
    def index(self) -> int:
        """Index of its value, which must have been written."""
        assert isinstance(self.base, int)
        return self.base


@dataclass(frozen=True)
class Complement:
    """``1 - spikes``, which exists as an operand of a product only (SEW's IAND)."""

    spikes: Array


@dataclass(frozen=True)
class Membrane:
    """The membrane potential a neuron returned: of which neuron, after which step.

    ``whole``: those after all steps, with time among the axes.
    """

    neuron: tuple[Hashable, int]
    step: int
    axes: Axes
    whole: bool = False


@dataclass(frozen=True)
class Answer:
    """What the model computes of an answer, outside the program: see :mod:`epilogue`.

    Args:
        array: The answer of the program.
        steps: What is done to it, in order.
        shape: Of the result.
    """

    array: Array
    steps: tuple[tuple[Any, ...], ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Filling:
    """A tensor of constants that outputs of time steps are written into.

    Args:
        dim: Its axis of time.
        length: Of that axis.
        items: Step -> what was written there.
    """

    dim: int
    length: int
    items: dict[int, Any]


@dataclass(frozen=True)
class Constant:
    """A tensor or number that does not depend on the input."""

    value: Any


@dataclass
class NeuronUse:
    """All calls of one neuron on one current."""

    name: str
    model: Constants
    source: int
    spikes: int
    unit: float  # real value of one unit of the current
    multi_step: bool  # called once, on the whole sequence
    calls: int = 0
    membrane: int | None = None
    view: list[list[int]] | None = None  # loops over the value as the model nests them


class Draft:
    """Values and operations so far.

    Attributes:
        values: As in the finished program, but for the scales of the outputs.
        largest: Largest absolute integer of each value.
        ops: Operations in execution order; neurons get their integers last, when it is known
            whether their membrane potentials are read.
        neurons: Neuron and current -> its calls. Keys are ``(what tells the neuron, value)``.
        convolutions: Layer and input -> the convolution.
        where: Path of what is being lowered, for names and errors.
        line: Where that stands in the model's code.
        prologue: What the host does to the input before it becomes codes: steps ``x * gain +
            bias`` of one entry or one per channel.
        rank: Axes of one sample of the input.
        steps: Time steps the model is known to run.
        loops: Recurrent module -> where its spikes come back.
        reached: How many events have been lowered.
        modules: Path -> module of the model.
        left: Layer -> why ``quantize_`` left it in floating point.
        room: Bits of input codes that the first layer has room for, once it found too many.
    """

    def __init__(self, shape: Shape, rank: int, scale: float, largest: int) -> None:
        self.values: list[Value] = []
        self.largest: list[int] = []
        self.ops: list[Op | NeuronUse] = []
        self.neurons: dict[tuple[Hashable, int], NeuronUse] = {}
        self.convolutions: dict[tuple[Any, ...], PendingConv] = {}
        self.rank = rank
        self.steps = 1
        self.where = "the model"
        self.line = ""
        self.prologue: list[tuple[Real, Real]] = []
        self.loops: dict[int, Any] = {}
        self.reached = 0
        self.modules: dict[str, nn.Module] = {}
        self.left: dict[str, str] = {}
        self.room: int | None = None
        self._written: dict[tuple[Any, ...], int] = {}
        self._names: dict[str, int] = {}
        self.input = self.value("input", shape, 0, scale, largest)

    def fail(self, why: str, remedy: str) -> LoweringError:
        """The error for what is being lowered: where, why, and what to do about it."""
        return error_at(self.where, self.line, why, remedy)

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        """Let errors and names be about another module than the one being visited."""
        before = self.where, self.line
        if where != self.where:
            self.where, self.line = where, ""
        try:
            yield
        finally:
            self.where, self.line = before

    def shape(self, array: Array) -> Shape:
        """``[C, H, W]`` of the value behind an array."""
        base = array.base
        return base.shape if isinstance(base, PendingConv) else self.values[base].shape

    def check_input(self, a: Array) -> None:
        """Refuse a reader of the input that takes it before what the host does to it."""
        if a.raw and a.base == self.input and a.done != len(self.prologue):
            raise self.fail(
                "it reads the input without what another part of the model does to it first",
                "normalise the input once, for all that read it",
            )

    def unique(self, name: str) -> str:
        """A name that no operation has yet."""
        self._names[name] = self._names.get(name, 0) + 1
        return name if self._names[name] == 1 else f"{name}#{self._names[name]}"

    def value(self, name: str, shape: Shape, planes: int, scale: float, largest: int) -> int:
        """Add a value; return its index."""
        taken = {v.name for v in self.values}
        unique, k = name, 2
        while unique in taken:
            unique, k = f"{name}#{k}", k + 1
        self.values.append(Value(unique, shape, planes, float(scale)))
        self.largest.append(int(largest))
        return len(self.values) - 1

    def write(
        self,
        key: tuple[Any, ...],
        name: str,
        value: tuple[Shape, int, float, int],
        op: Callable[[str, int], Op],
    ) -> int:
        """Add an operation, or find the equal one: this is how repetition over time collapses.

        Args:
            key: What the operation computes; equal keys mean equal operations on equal inputs.
            name: Name of operation and value, made unique.
            value: Shape, planes, scale and largest absolute integer of the result.
            op: Builds the operation from its name and the index of its result.

        Returns:
            Index of the result.
        """
        if key not in self._written:
            unique = self.unique(name)
            target = self.value(unique, *value)
            self.ops.append(op(unique, target))
            self._written[key] = target
        return self._written[key]
