"""What an operand is taken for."""

from __future__ import annotations

from typing import Any

from qsnn_ext.deploy.lowering.axes import stack
from qsnn_ext.deploy.lowering.calls import read_membrane
from qsnn_ext.deploy.lowering.draft import (
    Answer,
    Array,
    Complement,
    Constant,
    Draft,
    Filling,
    Membrane,
)


def as_tensor(draft: Draft, a: Any) -> Any:
    """An operand, where numbers are constants and a membrane potential is read."""
    if isinstance(a, Membrane):
        return read_membrane(draft, a)
    if isinstance(a, Filling):
        if sorted(a.items) != list(range(a.length)):
            raise draft.fail(
                f"it reads a tensor of {a.length} time steps of which {len(a.items)} were written",
                "write all of them before it",
            )
        return stack(draft, [as_tensor(draft, a.items[t]) for t in range(a.length)], a.dim)
    if isinstance(a, Answer):
        raise draft.fail(
            f"it follows {a.steps[-1][0]!r}, which has no integer form and is left to the host, "
            "after the program",
            "do that to the answer of the model only, or put a neuron in its place",
        )
    return Constant(a) if isinstance(a, int | float) else a


def as_array(draft: Draft, a: Any, why: str, remedy: str) -> Array:
    """As :func:`as_tensor`, where only a tensor of the program will do; else the error says why."""
    a = as_tensor(draft, a)
    if isinstance(a, Complement):
        raise draft.fail(
            "1 - spikes is possible within a product only",
            "multiply it with spikes, as SEW's IAND does",
        )
    if not isinstance(a, Array):
        raise draft.fail(why, remedy)
    return a
