"""From the draft to the program: what is returned, and the integers of the neurons."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

from qsnn_ext.deploy.lowering.axes import labels, rank_per_sample
from qsnn_ext.deploy.lowering.draft import Array, Draft, NeuronUse
from qsnn_ext.deploy.lowering.neurons import integer_neuron
from qsnn_ext.deploy.lowering.settle import settle
from qsnn_ext.deploy.lowering.walk import as_array
from qsnn_ext.deploy.program import (
    Add,
    Logic,
    Neuron,
    Op,
    Program,
    Value,
    sources_of,
    targets_of,
)
from qsnn_ext.errors import FormatError, LoweringError


def finish(
    draft: Draft,
    result: Any,
    limits: tuple[int, int],
    model: str,
    time_first: bool,
    input_rank: int,
) -> Program:
    """The valid program that answers as the model did.

    Args:
        draft: All operations.
        result: What the model returned: an array or a tuple or list of them.
        limits: Range of the input codes.
        model: Name of the model.
        time_first: Whether the model is called with ``[T, N, ...]``.
        input_rank: Axes of one sample at one time step.

    Raises:
        LoweringError: If the result is not an answer per sample, or no valid program came out.
    """
    draft.where = "the output"
    structured = isinstance(result, tuple | list)
    arrays = []
    for a in result if structured else [result]:
        array = as_array(
            draft, a, "it does not depend on the input of the model", "return what does"
        )
        arrays.append(settle(draft, array))
    steps, reduction, rest = _over_time(draft, arrays)
    values = list(draft.values)
    for a in arrays:
        values[a.index] = replace(values[a.index], scale=a.scale * rest)
    unrolled = any(use.calls > 1 or use.multi_step for use in draft.neurons.values())
    program = Program(
        values,
        [_integer(op, values) if isinstance(op, NeuronUse) else op for op in draft.ops],
        tuple(a.index for a in arrays),
        reduction=reduction,
        input_scale=draft.values[draft.input].scale,
        input_range=limits,
        timesteps=steps,
        metadata={
            "model": model,
            "time": "sequence" if time_first else "repeat" if unrolled or steps > 1 else "step",
            "input_rank": str(input_rank),
            "output_ranks": ",".join(str(rank_per_sample(draft, a)) for a in arrays),
            "structure": "tuple" if structured else "tensor",
        },
    )
    program = _prune(program)
    try:
        program.validate()
    except FormatError as error:
        raise LoweringError(
            f"{model}: no exact integer form ({error}); look for exploded weights or scales there"
        ) from error
    return program


def _over_time(
    draft: Draft, arrays: list[Array]
) -> tuple[int, Literal["none", "sum", "mean"], float]:
    """Time steps, what the answers of all steps are reduced to, and the factor left over."""
    lengths = [n for a in arrays for axis in a.axes for label, n in axis if label == "T"]
    steps = max([draft.steps, *lengths])
    reductions = {(a.reduction, round(a.factor, 12)) for a in arrays}
    if len(reductions) != 1:
        raise draft.fail(
            "some outputs are summed over time and some are not", "return all of one kind"
        )
    reduction, factor = reductions.pop()
    if reduction == "sum":
        if any(a.steps is not None and len(a.steps) != steps for a in arrays):
            raise draft.fail(
                f"it sums over some of the {steps} time steps only", "sum over all of them"
            )
        if math.isclose(factor * steps, 1.0, rel_tol=1e-6):
            return steps, "mean", factor * steps
        return steps, "sum", factor
    timed = all(any("T" in labels(axis) for axis in a.axes) for a in arrays)
    if steps > 1 and not timed:
        raise draft.fail(
            "it is the answer of one time step only", "return all steps, or their mean"
        )
    return steps, "none", 1.0


def _integer(use: NeuronUse, values: list[Value]) -> Neuron:
    channels = values[use.source].shape[0]
    unit = values[use.membrane].scale if use.membrane is not None else 1.0
    return integer_neuron(
        use.name, use.model, use.source, use.spikes, use.unit, channels, use.membrane, unit
    )


def _prune(program: Program) -> Program:
    """Drop operations no output depends on, and renumber the values."""
    needed = set(program.outputs)
    kept: list[Op] = []
    for op in reversed(program.ops):
        if needed & set(targets_of(op)):
            needed |= set(sources_of(op))
            kept.append(op)
    kept.reverse()
    used = [0, *(t for op in kept for t in targets_of(op))]
    number = {old: new for new, old in enumerate(used)}
    ops: list[Op] = []
    for op in kept:
        changes: dict[str, Any] = {"target": number[op.target]}
        if isinstance(op, Add | Logic):
            changes["sources"] = tuple(number[i] for i in op.sources)
        else:
            changes["source"] = number[op.source]
        if isinstance(op, Neuron) and op.membrane is not None:
            changes["membrane"] = number[op.membrane]
        ops.append(replace(op, **changes))
    return replace(
        program,
        values=[program.values[i] for i in used],
        ops=ops,
        outputs=tuple(number[i] for i in program.outputs),
    )
