"""From the draft to the program: what is returned, and the integers of the neurons."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from qsnn_ext.deploy.lowering.axes import (
    arrange,
    has_time,
    is_natural,
    is_whole,
    labels,
    lead_axes,
    permute,
    rest_axes,
    size_of,
)
from qsnn_ext.deploy.lowering.draft import Answer, Array, Draft, NeuronUse
from qsnn_ext.deploy.lowering.neurons import integer_neuron
from qsnn_ext.deploy.lowering.operands import as_array
from qsnn_ext.deploy.lowering.settle import settle
from qsnn_ext.deploy.program import (
    Neuron,
    Op,
    Program,
    Value,
    sources_of,
    targets_of,
)
from qsnn_ext.errors import FormatError, LoweringError


def finish(
    draft: Draft, result: Any, limits: tuple[int, int], model: str, lead: str, input_rank: int
) -> Program:
    """The valid program that answers as the model did.

    Args:
        draft: All operations.
        result: What the model returned: tensors of the program, alone or in tuples, lists and
            dictionaries, and what is done to them last.
        limits: Range of the input codes.
        model: Name of the model.
        lead: First axes of the input: "TN", "NT" or "N".
        input_rank: Axes of one sample at one time step.

    Raises:
        LoweringError: If the result is not an answer per sample, or no valid program came out.
    """
    draft.where = "the output"
    found: list[tuple[Array, tuple[Any, ...]]] = []
    form = _form(draft, result, found)
    if not found:
        raise draft.fail("it does not depend on the input of the model", "return what does")
    found = [(settle(draft, a), chain) for a, chain in found]
    lengths = [size_of(x) for a, _ in found for x in a.axes if labels(x) == {"T"}]
    steps = max([draft.steps, *lengths])
    reduction, factor = _reduction(draft, [a for a, _ in found], steps)
    unrolled = any(use.calls > 1 or use.multi_step for use in draft.neurons.values())
    time = {"TN": "sequence", "NT": "batch_first"}.get(
        lead, "repeat" if unrolled or steps > 1 else "step"
    )
    outputs, chains = [], []
    for array, last in found:
        array, chain = _on_the_host(draft, array, steps, time != "step" and reduction == "none")
        outputs.append(array)
        chains.append([*chain, *last])
    factors = [a.scale * factor for a in outputs]
    scales: dict[int, float] = {}
    for place, (a, scale) in enumerate(zip(outputs, factors, strict=True)):
        known = scales.setdefault(a.index, abs(scale))
        if scale != known:  # negative, or one value seen with two scales
            chains[place].insert(0, ["scale", scale / known])
    values = list(draft.values)
    for index, scale in scales.items():
        values[index] = replace(values[index], scale=scale)
    metadata = {
        "model": model,
        "time": time,
        "input_rank": str(input_rank),
        "output_ranks": ",".join(str(_rank(draft, a)) for a in outputs),
        "structure": "tuple" if form != 0 else "tensor",
    }
    plain = form == 0 or form == {"tuple": list(range(len(outputs)))}
    if not plain or any(chains):
        metadata["answer"] = json.dumps({"steps": chains, "form": form})
    views = {use.name: use.view for use in draft.neurons.values() if use.view}
    if views:
        metadata["views"] = json.dumps(views)
    if draft.prologue:
        gain, bias = np.ones(1), np.zeros(1)
        for g, b in draft.prologue:
            gain, bias = gain * g, bias * g + b
        metadata["input_gain"] = ",".join(repr(float(g)) for g in gain)
        metadata["input_bias"] = ",".join(repr(float(b)) for b in bias)
    program = Program(
        values,
        [_integer(op, draft.values) if isinstance(op, NeuronUse) else op for op in draft.ops],
        tuple(a.index for a in outputs),
        reduction=reduction,
        input_scale=draft.values[draft.input].scale,
        input_range=limits,
        timesteps=steps,
        metadata=metadata,
    )
    program = _prune(program)
    try:
        program.validate()
    except FormatError as error:
        raise LoweringError(
            f"{model}: no exact integer form ({error}); look for exploded weights or scales there"
        ) from error
    return program


def _form(draft: Draft, result: Any, found: list[tuple[Array, tuple[Any, ...]]]) -> Any:
    """The form of a result as metadata describe it; its tensors are added to ``found``."""
    if isinstance(result, dict):
        if not all(isinstance(key, str) for key in result):
            raise draft.fail("it is a dictionary whose keys are no text", "name its entries")
        return {"dict": {k: _form(draft, v, found) for k, v in result.items()}}
    if isinstance(result, tuple) and hasattr(result, "_fields"):
        fields = zip(result._fields, result, strict=True)
        return {"named": [type(result).__name__, {k: _form(draft, v, found) for k, v in fields}]}
    if isinstance(result, tuple | list):
        # Steps and layers collected in a list come back as a tuple, as they always have.
        return {"tuple": [_form(draft, v, found) for v in result]}
    if found and (result is None or isinstance(result, bool | int | float | str)):
        return {"value": result}
    if isinstance(result, Answer):
        found.append((result.array, result.steps))
    else:
        found.append(
            (as_array(draft, result, "it does not depend on the input of the model",
                      "return what does"), ())
        )  # fmt: skip
    return len(found) - 1


def _reduction(
    draft: Draft, arrays: list[Array], steps: int
) -> tuple[Literal["none", "sum", "mean"], float]:
    """What the program itself reduces over time: what all answers have in common."""
    kinds = {(a.reduction, round(a.factor, 12)) for a in arrays}
    whole = all(a.steps is None or len(a.steps) == steps for a in arrays)
    if len(kinds) != 1 or not whole or arrays[0].reduction == "none":
        return "none", 1.0
    factor = arrays[0].factor
    if math.isclose(factor * steps, 1.0, rel_tol=1e-6):
        return "mean", factor * steps
    return "sum", factor


def _on_the_host(draft: Draft, a: Array, steps: int, timed: bool) -> tuple[Array, list[list[Any]]]:
    """An answer in the program's order, and what makes it the model's.

    Args:
        draft: The program.
        a: The answer.
        steps: Time steps of a run.
        timed: Whether the program answers step by step.
    """
    chain: list[list[Any]] = []
    front = {"T": 0, "N": 1}
    order = sorted(
        range(len(a.axes)),
        key=lambda i: min((front[k] for k in labels(a.axes[i]) if k in front), default=2),
    )
    joined = any(labels(axis) == {"T", "N"} for axis in a.axes)
    if joined:
        raise draft.fail(
            "it joins time and batch in one axis", "return [T, N, ...], or the mean over time"
        )
    a = permute(a, order)
    rest = rest_axes(draft, a)
    # What the program answers step by step has time in front, also where the model has summed it.
    first = len(lead_axes(draft, a)) + (timed and not has_time(a))
    if not is_whole(draft, a):
        a = arrange(draft, a)
    if is_natural(draft, a):
        c, h, w = draft.shape(a)
        shown = {1: [c * h * w], 2: [c, h * w], 3: [c, h, w]}[_rank(draft, a)]
        if shown != [size_of(axis) for axis in rest]:
            chain.append(["shape", first, [size_of(axis) for axis in rest]])
    else:  # the host may reorder elements as it likes
        loops = [atom for axis in rest for atom in axis]
        stored = sorted(range(len(loops)), key=lambda i: (loops[i].label, -loops[i].stride))
        chain.append(["shape", first, [loops[i].size for i in stored]])
        behind = [first + stored.index(i) for i in range(len(loops))]
        chain.append(["permute", [*range(first), *behind]])
        chain.append(["shape", first, [size_of(axis) for axis in rest]])
    if a.reduction == "sum" and timed:
        chosen = sorted(a.steps) if a.steps is not None else list(range(steps))
        if len(chosen) != steps:
            chain.append(["take", chosen])
        chain.append(["sum", 0, False])
        if a.factor != 1:
            chain.append(["scale", a.factor])
    elif timed:
        chosen = sorted(a.steps) if a.steps is not None else [steps - 1]
        if not has_time(a):
            chain.append(["last", -1 if chosen[0] == steps - 1 else chosen[0]])
        elif a.steps is not None and len(chosen) != steps:
            chain.append(["take", chosen])
    if order != sorted(order):
        chain.append(["permute", [order.index(i) for i in range(len(order))]])
    return a, chain


def _rank(draft: Draft, a: Array) -> int:
    """Axes per sample that the program's answer has."""
    return min(max(len(rest_axes(draft, a)), 1), 3)


def _integer(use: NeuronUse, values: list[Value]) -> Neuron:
    channels = values[use.source].shape[0]
    unit = values[use.membrane].scale if use.membrane is not None else 1.0
    return integer_neuron(
        use.name, use.model, use.source, use.spikes, use.unit, channels, use.membrane, unit
    )


def _prune(program: Program) -> Program:
    """Drop operations no output depends on, and renumber the values."""
    needed = set(program.outputs)
    size = 0
    while size != len(needed):  # again where a delay reads what is written after it
        size = len(needed)
        for op in reversed(program.ops):
            if needed & set(targets_of(op)):
                needed |= set(sources_of(op))
    kept = [op for op in program.ops if needed & set(targets_of(op))]
    used = [0, *(t for op in kept for t in targets_of(op))]
    number = {old: new for new, old in enumerate(used)}
    ops: list[Op] = []
    for op in kept:
        changes: dict[str, Any] = {"target": number[op.target]}
        if hasattr(op, "sources"):
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
