"""The program while it is being written, and what is known of the model's tensors meanwhile.

Lowering walks the model's graph. What the model computes at a node is one of the classes below:
mostly an :class:`Array`, that is, a value of the program seen through the axes, the scale and the
time steps the model sees it with. Values and operations are collected in a :class:`Draft`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from qsnn_ext.deploy.lowering.neurons import NeuronModel, Real
from qsnn_ext.deploy.program import IntArray, Op, Value
from qsnn_ext.errors import LoweringError

Atom: TypeAlias = tuple[str, int]  # (label, size); T and N are time and batch, the rest C, H, W
Axis: TypeAlias = tuple[Atom, ...]  # several atoms: axes flattened into one
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
        axes: Its axes, time and batch in front.
        scale: Real value of one unit of the value.
        gain, bias: Per-channel real factors not yet applied (weight scales and batch norms), or
            None.
        origin: Module path that gain and bias came from last.
        steps: Time steps it stands for: None for all (or a single-step model).
        reduction: Whether time has been summed over.
        factor: What the sum over time is multiplied with.
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
    """The membrane potential a neuron returned: of which neuron, after which of its calls."""

    neuron: tuple[int, int]
    step: int
    axes: Axes


@dataclass(frozen=True)
class Constant:
    """A tensor or number that does not depend on the input."""

    value: Any


@dataclass
class NeuronUse:
    """All calls of one neuron on one current."""

    name: str
    model: NeuronModel
    source: int
    spikes: int
    unit: float  # real value of one unit of the current
    multi_step: bool  # called once, on the whole sequence
    calls: int = 0
    membrane: int | None = None


class Draft:
    """Values and operations so far.

    Attributes:
        values: As in the finished program, but for the scales of the outputs.
        largest: Largest absolute integer of each value.
        ops: Operations in execution order; neurons get their integers last, when it is known
            whether their membrane potentials are read.
        neurons: Neuron and current -> its calls. Keys are ``(id of the module, value)``.
        convolutions: Layer and input -> the convolution.
        steps: Time steps the model is known to run.
        where: Path of what is being lowered, for names and errors.
        room: Bits of input codes that the first layer has room for, once it found too many.
    """

    def __init__(self, shape: Shape, scale: float, largest: int) -> None:
        self.values: list[Value] = []
        self.largest: list[int] = []
        self.ops: list[Op | NeuronUse] = []
        self.neurons: dict[tuple[int, int], NeuronUse] = {}
        self.convolutions: dict[tuple[Any, ...], PendingConv] = {}
        self.steps = 1
        self.where = "the model"
        self.room: int | None = None
        self._written: dict[tuple[Any, ...], int] = {}
        self._names: dict[str, int] = {}
        self.input = self.value("input", shape, 0, scale, largest)

    def fail(self, why: str, remedy: str) -> LoweringError:
        """The error for what is being lowered: where, why, and what to do about it."""
        return LoweringError(f"{self.where}: {why}; {remedy}")

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        """Let errors and names be about another module than the one being visited."""
        before, self.where = self.where, where
        try:
            yield
        finally:
            self.where = before

    def shape(self, array: Array) -> Shape:
        """``[C, H, W]`` of the value behind an array."""
        base = array.base
        return base.shape if isinstance(base, PendingConv) else self.values[base].shape

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
