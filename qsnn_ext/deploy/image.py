"""The image of a program: what the C runtime executes (``runtime/qsnn.h``).

An image is one array of 32-bit words: a header, records of values, neurons and steps, and the
parameters. Where everything lies is decided in :mod:`qsnn_ext.deploy.layout`, what it is in
:mod:`qsnn_ext.deploy.pack`; here it is put together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qsnn_ext.deploy.layout import MEMORY_LIMIT, Area, Layout, Method, Plan, StateSlot
from qsnn_ext.deploy.pack import parameters_of_neuron, parameters_of_step
from qsnn_ext.deploy.program import IntArray, Program
from qsnn_ext.deploy.records import encode


@dataclass(frozen=True)
class Image:
    """A program as the C runtime sees it, and the sizes of the work areas it needs.

    Args:
        words: The image, uint32.
        state_words: Membranes of one sample.
        arena_words: Activations of one running sample and the workspace of one worker.
        workspace_words: What every further worker needs.
        slots: Layout of the state area.
    """

    words: npt.NDArray[np.uint32]
    state_words: int
    arena_words: int
    workspace_words: int
    slots: tuple[StateSlot, ...]


def build_image(
    program: Program,
    method: Method = "measure",
    *,
    compact: bool = False,
    memory_limit: int = MEMORY_LIMIT,
) -> Image:
    """Translate a program for the C runtime.

    Args:
        program: A valid program.
        method: How layers of single bits count: ``"events"`` lists active inputs, ``"dense"`` is
            AND and popcount over all inputs; ``"measure"`` decides at every step by the density of
            the input, in layers narrow enough for either to win. The bits are the same.
        compact: Store what is used and no more, for devices with little flash.
        memory_limit: Bytes that image, state, arena and answers may take together.

    Returns:
        The image and the sizes of its work areas.

    Raises:
        FormatError: If the program is not valid or needs more memory than the limit.
    """
    return assemble(Layout(program, method, compact=compact, limit=memory_limit))


def assemble(layout: Layout) -> Image:
    """The image of a layout."""
    p = layout.program
    image = np.zeros(layout.image_words, np.uint32)

    def put(area: Area, array: IntArray) -> None:
        assert array.size == area.words
        assert array.dtype in (np.uint32, np.int32)
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint32)
        image[area.offset : area.offset + area.words] = flat

    def put_record(plan: Plan) -> None:
        record = np.asarray(encode(plan.record, plan.fields), np.int32)
        put(Area(plan.offset, record.size), record)

    def put_parameters(plan: Plan, found: dict[str, IntArray]) -> None:
        for name, area in plan.areas.items():
            if area.words:
                put(area, found[name])

    def put_list(offset: int, plans: list[Plan]) -> None:
        put(Area(offset, len(plans)), np.asarray([plan.offset for plan in plans], np.int32))

    for plan in layout.value_records.values():
        put_record(plan)
    for neuron in p.neurons:
        plan = layout.neurons[id(neuron)]
        put_record(plan)
        put_parameters(plan, parameters_of_neuron(neuron, plan.areas))
    for step, plan in zip(layout.steps, layout.plans, strict=True):
        put_record(plan)
        put_parameters(plan, parameters_of_step(layout, step, plan))
    answers = [layout.value_records[i] for i in p.outputs]
    put_list(layout.step_list, layout.plans)
    put_list(layout.neuron_list, list(layout.neurons.values()))
    put_list(layout.output_list, answers)
    header = {
        "image_words": layout.image_words, "state_words": layout.state_words,
        "arena_words": layout.arena_words, "input_words": p.values[0].elements,
        "output_words": sum(p.values[i].elements for i in p.outputs),
        "input": layout.value_records[0].offset,
        "steps": layout.step_list, "step_count": len(layout.plans),
        "neurons": layout.neuron_list, "neuron_count": len(layout.neurons),
        "outputs": layout.output_list, "output_count": len(p.outputs),
        "workspace": layout.workspace, "workspace_words": layout.workspace_words,
        "line": layout.line, "other": layout.other,
    }  # fmt: skip
    put_record(Plan("header", layout.header, header))
    return Image(
        image, layout.state_words, layout.arena_words, layout.workspace_words, tuple(layout.slots)
    )
