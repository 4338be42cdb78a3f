"""What the engine executes: operations fused into steps, and how long every value lives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qsnn_ext.deploy.program import (
    Add,
    Affine,
    Conv,
    Delay,
    Neuron,
    Op,
    Program,
    sources_of,
    targets_of,
)


@dataclass(frozen=True)
class Residual:
    """A sum fused behind an operation: ``own * result + other * value``."""

    value: int
    own: int
    other: int


@dataclass(eq=False)
class Step:
    """One operation with whatever was fused behind it, pixel by pixel.

    Args:
        op: The operation.
        target: Value that is written when no neuron follows.
        residual: Sum with another value.
        neuron: Neuron that takes the result; the operation itself if it is one.
        keep: Whether it is the end of a delay, where the value is stored for the next step.
    """

    op: Op
    target: int
    residual: Residual | None = None
    neuron: Neuron | None = None
    keep: bool = False

    @property
    def reads(self) -> set[int]:
        """Values that are read."""
        if isinstance(self.op, Delay):
            return {self.op.source} if self.keep else set()
        more = () if self.residual is None else (self.residual.value,)
        return {*sources_of(self.op), *more}

    @property
    def writes(self) -> set[int]:
        """Values that are written."""
        if self.keep:
            return set()
        return set(targets_of(self.neuron)) if self.neuron is not None else {self.target}


def schedule(program: Program) -> list[Step]:
    """Group the operations of a valid program into steps.

    A residual sum and a neuron that are the only readers of a convolution, a scale or a sum are
    taken with it, so that int32 currents are never stored.
    """
    readers: dict[int, list[Op]] = {}
    for op in program.ops:
        for i in sources_of(op):
            readers.setdefault(i, []).append(op)
    producer = {t: k for k, op in enumerate(program.ops) for t in targets_of(op)}

    def only_reader(value: int) -> Op | None:
        found = readers.get(value, [])
        return found[0] if len(found) == 1 and value not in program.outputs else None

    absorbed: set[int] = set()
    steps = []
    for k, op in enumerate(program.ops):
        if id(op) in absorbed:
            continue
        step = Step(op, op.target, neuron=op if isinstance(op, Neuron) else None)
        if isinstance(op, Conv | Affine):
            following = only_reader(op.target)
            if isinstance(following, Add) and len(following.sources) == 2:
                own = following.sources.index(op.target)
                other = following.sources[1 - own]
                # The other operand must be ready here, and not be this same value.
                ready = other != op.target and producer.get(other, -1) < k
                if ready and program.values[following.target].planes == 0:
                    factors = following.factors
                    step.residual = Residual(other, factors[own], factors[1 - own])
                    step.target = following.target
                    absorbed.add(id(following))
        if isinstance(op, Conv | Affine | Add):
            following = only_reader(step.target)
            if isinstance(following, Neuron):
                step.neuron = following
                absorbed.add(id(following))
        steps.append(step)
    return steps + [Step(op, op.target, keep=True) for op in program.delays]


def place(
    steps: list[Step], sizes: dict[int, int], outputs: Iterable[int]
) -> tuple[dict[int, int], int]:
    """Offsets of stored values in the arena; values that never live together overlap.

    Args:
        steps: All steps.
        sizes: Words of every value, rounded up to whole units of alignment.
        outputs: Values that live until the answers are read.

    Returns:
        Offsets by value, and the words that all of them need.
    """
    birth = {0: -1}
    death = {0: len(steps), **dict.fromkeys(outputs, len(steps))}
    for k, step in enumerate(steps):
        for i in step.writes:
            birth[i] = k
        for i in step.writes | step.reads:
            death[i] = max(death.get(i, k), k)
    offsets: dict[int, int] = {}
    placed: list[tuple[int, int, int, int]] = []  # start, end, birth, death
    for i in sorted(birth, key=lambda i: -sizes[i]):
        at = 0
        alive = [p for p in placed if p[2] <= death[i] and birth[i] <= p[3]]
        for start, end, _, _ in sorted(alive):
            if start < at + sizes[i] and at < end:
                at = end
        offsets[i] = at
        placed.append((at, at + sizes[i], birth[i], death[i]))
    return offsets, max(end for _, end, _, _ in placed)
