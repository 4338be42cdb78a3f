"""Neurons: what flows into one, what comes back to it, what it carries and what it gives.

What a step takes from the step before is a delay of spikes, or a membrane potential of its own: a
current that is filtered first is a neuron without threshold whose potential is read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qsnn_ext import hosts
from qsnn_ext.deploy.lowering.arithmetic import is_spikes, lower_add, lower_multiply
from qsnn_ext.deploy.lowering.axes import (
    full,
    is_natural,
    natural,
    rest_axes,
    select,
    size_of,
    sizes,
)
from qsnn_ext.deploy.lowering.calls import fire, read_membrane, takes_sequences
from qsnn_ext.deploy.lowering.draft import Answer, Array, Constant, Draft, Geometry, Membrane
from qsnn_ext.deploy.lowering.layers import (
    affine,
    convolve,
    kernel_of,
    layer_weights,
    lower_conv,
    lower_linear,
    real,
)
from qsnn_ext.deploy.lowering.neurons import Constants, integrator, read_neuron
from qsnn_ext.deploy.lowering.pooling import lower_mean
from qsnn_ext.deploy.lowering.settle import NEURON_BITS, settle
from qsnn_ext.deploy.program import Delay
from qsnn_ext.neuron import Drive, Feedback, NeuronModel


@dataclass
class Loop:
    """Spikes of a neuron that are an input of its next step."""

    spikes: int
    delayed: int
    current: dict[tuple[Any, ...], Any]


def lower_neuron(
    draft: Draft, module: Any, x: Array, args: list[Any], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str | None, Any]]:
    """One call of a neuron, or of what links the steps of a sequence.

    Args:
        draft: The program so far.
        module: What is called.
        x: Its input.
        args: States that the call passes behind it.
        kwargs: States that it passes by name.

    Returns:
        What the call gives, spikes first, and the states after it, by attribute.
    """
    link, where = hosts.link(module), draft.where
    if link is not None and link.neuron is None:
        takes_sequences(draft, module, x)
        return (_delayed(draft, module, x, link.delay),), {}
    neuron = module if link is None else getattr(module, link.neuron or "")
    model, feedback, loop = hosts.describe(neuron), None, None
    if link is not None and link.feedback is not None:
        feedback, where = link.feedback, f"{where}.{link.neuron}"
    if model is None or not (link is None or model.spiking):
        raise draft.fail(
            f"a recurrent container around a {type(neuron).__name__} cannot be lowered",
            "put a neuron into it, and layers before or behind",
        )
    if model.no_integers is not None:
        why, _, remedy = model.no_integers.partition("; ")
        raise draft.fail(why, remedy or "run it in its own framework")
    constants, drive = read_neuron(where, neuron, model)
    over_time = takes_sequences(draft, module, x)
    given = {**dict(zip(model.passed, args, strict=False)), **kwargs}
    feedback = feedback or drive.feedback
    if feedback is not None:
        x, loop = _with_feedback(draft, module, feedback, where, x)
        for name in given.keys() - {s.name for s in model.states}:
            _check_spikes(draft, loop, given[name])
    with draft.at(where):
        x, after = _filtered(draft, neuron, model, drive, x, given)
        if constants.output != "spikes":
            gives, membrane = _readout(draft, neuron, constants, x, over_time)
            return gives, _kept(model, membrane, x)
        held = given.get(model.potential or "")
        forgets = bool(after) and constants.reset == "none" and not constants.decay.any()
        if forgets:  # the potential is its current, and nothing of it is carried on
            constants, held = replace(constants, bits=32), None
        back = None if loop is None else loop.spikes
        spikes, membrane = fire(draft, id(neuron), constants, x, held, over_time, back)
    after |= {model.potential: x} if forgets else _kept(model, membrane, spikes)
    return (spikes, *(after[name] for name in model.passed if name in after)), after


def _kept(model: NeuronModel, membrane: Membrane, x: Array) -> dict[str | None, Any]:
    """The potentials that a neuron keeps: of the last step, and of all steps of a call."""
    every = replace(membrane, axes=x.axes, whole=True)
    return {model.potential_seq: every, model.potential: membrane}


# --------------------------------------------------------------------------- what it carries


def _filtered(
    draft: Draft, neuron: nn.Module, model: NeuronModel, drive: Drive, x: Array, given: Any
) -> tuple[Array, dict[str | None, Any]]:
    """Currents that leak and never fire; with a quantizer k bits of each are carried on.

    Returns:
        What they make of the input, and what is carried, by name.
    """
    quantizers, where = {s.name: s.quantizer for s in model.states}, draft.where
    total: Any = settle(draft, x) if len(drive.filters) > 1 else x
    parts: list[Any] = []
    carried: dict[str | None, Any] = {}
    for one in drive.filters:
        quantizer, held = quantizers[one.state], given.get(one.state)
        if quantizer is not None and model.order != "fire_first":
            raise draft.fail(
                "its synaptic current is quantized before it is used",
                "choose the order fire_first, or leave that state in floating point",
            )
        with draft.at(f"{where}.{one.state}"):
            constants = integrator(draft.where, one.decay, quantizer)
            flow: Any = total if one.sign > 0 else lower_multiply(draft, total, Constant(one.sign))
            owner = (id(neuron), one.state)
            if quantizer is None:
                _, after = fire(draft, owner, constants, flow, held, False)
                part = read_membrane(draft, after)
            else:
                part, after = _carried_and_used(draft, owner, constants, flow, held, False)
        parts.append(part)
        carried[one.state] = after
    if parts:
        total = functools.reduce(functools.partial(lower_add, draft), parts)
    if drive.gain is not None:
        total = lower_multiply(draft, total, Constant(drive.gain))
    return total, carried


def _carried_and_used(
    draft: Draft, owner: Hashable, model: Constants, x: Array, held: Any, over_time: bool
) -> tuple[Array, Membrane]:
    """What is carried on with k bits, but used before it is rounded.

    What was carried is read a step later: a delay of the membrane potential of a neuron that never
    fires. Leaked, and with the current of the step, it is what the membrane potential integrates.

    Returns:
        What is used, and what is carried.
    """
    x, alpha, decay = settle(draft, x), model.alpha, model.decay
    _, after = fire(draft, owner, model, x, held, over_time)
    use = draft.neurons[after.neuron]
    if use.membrane is None:
        shape = draft.shape(x)
        unit = 2.0 ** (math.ceil(math.log2(max(alpha, 1e-6))) - NEURON_BITS)
        largest = round(max(alpha, 0.0) / unit) + 1
        use.membrane = draft.value(f"{use.name}.membrane", shape, 0, unit, largest)
    unit = draft.values[use.membrane].scale
    key = ("delay", owner, use.membrane)
    source = use.membrane
    last = draft.write(
        key, f"{draft.where}.last", (draft.shape(x), 0, unit, draft.largest[source]),
        lambda name, target: Delay(name, source, target),
    )  # fmt: skip
    carried = affine(draft, Array(last, x.axes, unit, steps=x.steps), decay, np.zeros(1))
    total = lower_add(draft, x, carried)
    assert isinstance(total, Array)
    return replace(total, axes=x.axes), after


def _readout(
    draft: Draft, neuron: nn.Module, model: Constants, x: Array, over_time: bool
) -> tuple[tuple[Any, ...], Membrane]:
    """A neuron that answers with its potential.

    Returns:
        The answers, and the potential that is carried on.
    """
    owner = id(neuron)
    if model.bits != 32:
        if model.gain != 1.0:
            x = settle(draft, x)
            x = replace(x, scale=x.scale * model.gain)
        if model.offset or model.v_initial:
            raise draft.fail("its potential leaks towards another value than 0", "let it rest at 0")
        used, after = _carried_and_used(draft, owner, replace(model, gain=1.0), x, None, over_time)
        return (used,), after
    _, after = fire(draft, owner, model, x, None, over_time)
    if not over_time or model.output == "last":
        return (after,), after
    every = read_membrane(draft, replace(after, axes=x.axes, whole=True))
    if model.output == "mean":
        return (lower_mean(draft, every, 0, total=False),), after
    if model.output == "max":
        return (Answer(every, (("max", 0, False),), tuple(sizes(every)[1:])),), after
    if model.output == "each":
        return tuple(select(draft, every, t) for t in range(size_of(x.axes[0]))), after
    return (every,), after


# --------------------------------------------------------------------------- what comes back


def _with_feedback(
    draft: Draft, module: nn.Module, feedback: Feedback, neuron: str, x: Array
) -> tuple[Array, Loop]:
    """What input and last spikes make, and where the spikes of this step will go.

    Args:
        draft: The program so far.
        module: What has the feedback.
        feedback: How the two become one.
        neuron: Path of the neuron.
        x: The input.
    """
    how, by = feedback.how, feedback.by
    if how != "add":
        x = settle(draft, x)
    shape = draft.shape(x)
    if isinstance(by, nn.Linear) and how == "join":
        x, shape = natural(draft, x), (by.out_features, 1, 1)
    with draft.at(neuron):
        loop = _loop(draft, module, shape)
    x = settle(draft, x)
    key = (x.index, x.steps)
    if key not in loop.current:
        axes = (*x.axes[:-1], full("C", shape[0])) if how == "join" else x.axes
        last = Array(loop.delayed, axes, 1.0, steps=x.steps)
        with draft.at(f"{draft.where}.{feedback.name}" if feedback.name else draft.where):
            total = _BACK[how](draft, by, x, last)
        loop.current[key] = lower_add(draft, x, total) if how == "add" else total
    return loop.current[key], loop


def _through(draft: Draft, by: Any, x: Array, last: Array) -> Array:
    """What a layer, or weights one to one, make of the last spikes."""
    if isinstance(by, nn.Linear):
        return lower_linear(draft, layer_weights(draft, by), last)
    if isinstance(by, nn.Conv1d | nn.Conv2d):
        return lower_conv(draft, layer_weights(draft, by), kernel_of(by), last)
    if not isinstance(by, Tensor):
        raise draft.fail(
            f"feedback through a {type(by).__name__} cannot be lowered",
            "use a linear layer, a convolution or one weight for each neuron",
        )
    return affine(draft, last, real(by), np.zeros(1))


def _joined(draft: Draft, layer: Any, x: Array, last: Array) -> Array:
    """A linear layer on ``cat((x, last), -1)``: its weights fall into two parts."""
    weights = layer_weights(draft, layer)
    codes = weights.codes
    n = codes.shape[1] - sizes(last)[-1]
    if len(rest_axes(draft, x)) != 1 or not is_natural(draft, x):
        raise draft.fail("its input is no vector of features", "flatten it before")
    parts = []
    for value, part, bias in (
        (x, codes[:, :n], weights.bias),
        (last, codes[:, n:], np.zeros_like(weights.bias)),
    ):
        kernel = part.reshape(part.shape[0], *draft.shape(value))
        y = convolve(draft, replace(weights, codes=kernel, bias=bias), value, Geometry())
        parts.append(replace(y, axes=(*value.axes[:-1], full("C", codes.shape[0]))))
    total = lower_add(draft, parts[0], parts[1])
    assert isinstance(total, Array)
    return total


def _called(draft: Draft, function: Any, x: Array, last: Array) -> Array:
    """What an element-wise function makes of the last output and the input: their sum."""
    y, z = torch.rand(2, 5, dtype=torch.float64)
    if not torch.equal(function(y, z), y + z):
        raise draft.fail(
            "its element-wise function is not the sum of its operands", "add them in it"
        )
    if is_spikes(draft, x):
        return lower_add(draft, last, x)  # type: ignore[return-value]
    total = lower_add(draft, x, last)
    assert isinstance(total, Array)
    return total


_BACK = {"add": _through, "join": _joined, "call": _called}


def _check_spikes(draft: Draft, loop: Loop, spikes: Any) -> None:
    """A call may be given no spikes, zeros, or those that the neuron returned last."""
    if spikes is None or (isinstance(spikes, Array) and spikes.base == loop.spikes):
        return
    if isinstance(spikes, Constant) and not bool(torch.as_tensor(spikes.value).any()):
        return
    raise draft.fail(
        "the spikes it is given are not its own last ones", "hand on what it returned last"
    )


def _loop(draft: Draft, module: Any, shape: tuple[int, int, int]) -> Loop:
    """The delay of the spikes that come back, ``[C, H, W]``."""
    if id(module) not in draft.loops:
        name = draft.unique(f"{draft.where}.last")
        spikes = draft.value(f"{draft.where}.spikes", shape, 1, 1.0, 1)
        delayed = draft.value(name, shape, 1, 1.0, 1)
        draft.ops.append(Delay(name, spikes, delayed))
        draft.loops[id(module)] = Loop(spikes, delayed, {})
    found: Loop = draft.loops[id(module)]
    return found


def _delayed(draft: Draft, module: nn.Module, x: Array, steps: int) -> Array:
    """Spikes, some steps later."""
    x = settle(draft, x)
    if draft.values[x.index].planes == 0:
        raise draft.fail("a delay of currents cannot be lowered", "delay the spikes before them")
    base = x.index
    for k in range(steps):
        source, value = base, draft.values[base]
        base = draft.write(
            ("delay", id(module), k, source), f"{draft.where}.{k}",
            (value.shape, value.planes, value.scale, 2**value.planes - 1),
            lambda name, target, source=source: Delay(name, source, target),  # type: ignore[misc]
        )  # fmt: skip
    return replace(x, base=base)
