"""Calls of neurons: a loop over time calls one neuron many times, the program has it once.

Only neurons carry anything from step to step. What makes one operation of many calls is that they
read the same current, one time step after the other, and continue from their own membrane
potential; all of that is checked here.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qsnn_ext import hosts
from qsnn_ext.deploy.lowering.axes import (
    along,
    has_time,
    is_natural,
    labels,
    loops,
    sizes,
    whole,
)
from qsnn_ext.deploy.lowering.draft import Array, Constant, Draft, Membrane, NeuronUse
from qsnn_ext.deploy.lowering.layers import affine
from qsnn_ext.deploy.lowering.neurons import Constants, fits_unit
from qsnn_ext.deploy.lowering.pooling import once_per_step
from qsnn_ext.deploy.lowering.settle import NEURON_BITS, READOUT_BITS, rescaled, settle
from qsnn_ext.deploy.program import WIDE_LIMIT


def has_state(module: nn.Module) -> bool:
    """Whether a module is a neuron, or else carries anything from one time step to the next."""
    model = hosts.describe(module)
    if model is None:
        return hosts.link(module) is not None
    return model.spiking or model.output != "spikes"


def kept_states(module: nn.Module) -> dict[str, Tensor]:
    """The membrane potentials that a neuron keeps, which a model may read: attribute -> tensor."""
    model = hosts.describe(module)
    if model is None or not model.spiking:
        return {}
    names = (model.potential or "", model.potential_seq or "")
    found = {name: getattr(module, name, None) for name in names}
    return {name: state for name, state in found.items() if isinstance(state, Tensor)}


def inner_forward(module: nn.Module) -> type[nn.Module] | None:
    """The host's class whose ``forward`` a neuron's own ``forward`` goes around, if it has one."""
    own = "forward" in vars(module)
    for kind in type(module).__mro__:
        if "forward" not in vars(kind) or kind.__module__.startswith("qsnn_ext."):
            continue
        if hosts.belongs(kind) or kind.__module__.startswith("torch."):
            return kind if own and has_state(module) else None
        own = True
    return None


def takes_sequences(draft: Draft, module: Any, x: Array) -> bool:
    """Whether a module runs over the first axis of ``x`` as time; checks that it is."""
    over_time = hosts.over_time(module)
    once_per_step(draft, x)
    if over_time and x.axes and labels(x.axes[0]) & set("CHW"):
        raise draft.fail(
            "it runs over an axis of the sample along which layers before it run too, so that its "
            "steps do not come one after the other",
            "let convolutions see one time step at a time, with time in front: [T, N, ...]",
        )
    if over_time and not (x.axes and labels(x.axes[0]) == {"T"}):
        raise draft.fail(
            "it runs over its first axis, which is not time here",
            "put time in front, [T, N, ...], or say where it is with time_first=",
        )
    if not over_time and has_time(x):
        raise draft.fail(
            "it takes all time steps for one, as it is in single-step mode",
            "set its step mode to 'm', call it once per step, or say that the input has no time "
            "axis with time_first=False",
        )
    return over_time


def fire(
    draft: Draft,
    owner: Hashable,
    model: Constants,
    x: Array,
    membrane: Any,
    over_time: bool,
    spikes: int | None = None,
) -> tuple[Array, Membrane]:
    """A call of a neuron that is described already.

    Args:
        draft: The program so far.
        owner: Tells its calls from others'.
        model: What it computes.
        x: Its current.
        membrane: What the call passes as the membrane potential, or None.
        over_time: Whether the call is on a whole sequence.
        spikes: The value that its spikes go to, if there is one already.

    Returns:
        Spikes and the membrane potential after the call.
    """
    bits = _readout_bits(model) if model.silent and model.bits == 32 else NEURON_BITS
    if x.gain is None and not fits_unit(model, x.scale):
        x = replace(affine(draft, x, np.ones(1), np.zeros(1)), origin=f"{draft.where}.scale")
    # The scale of a 2-bit neuron's current costs nothing at run time: firing is decided on bits.
    x = whole(draft, settle(draft, x, bits, model.largest / model.gain, fast=model.bits != 2))
    if draft.largest[x.index] >= WIDE_LIMIT:  # a membrane potential as current
        x = rescaled(draft, x, NEURON_BITS)
    _per_channel(draft, model, x)
    key = (owner, x.index)
    if membrane is None and any(k[0] == owner and k != key for k in draft.neurons):
        raise draft.fail(
            "it is used in two places of the network, which would share a state",
            "give each place a neuron of its own",
        )
    if key not in draft.neurons:
        name = draft.unique(draft.where)
        if spikes is None:
            spikes = draft.value(f"{name}.spikes", draft.shape(x), 1, 1.0, 1)
        view = None if is_natural(draft, x) else loops(draft, x)
        draft.neurons[key] = NeuronUse(name, model, x.index, spikes, x.scale, over_time, view=view)
        draft.ops.append(draft.neurons[key])
    use = draft.neurons[key]
    step = use.calls
    use.calls += 1
    if use.multi_step and step:
        raise draft.fail(
            "it is called more than once on a whole sequence",
            "give each place a neuron of its own",
        )
    expected = None if over_time else frozenset([step])
    if x.steps is not None and x.steps != expected:
        raise draft.fail(
            f"its call number {step} sees the input of step {sorted(x.steps)}",
            "feed the time steps in order, each once",
        )
    _check_membrane(draft, key, step, membrane)
    last = x.axes[0][0].size - 1 if over_time else step
    draft.steps = max(draft.steps, last + 1)
    spiked = Array(use.spikes, x.axes, 1.0, steps=expected)
    return spiked, Membrane(key, last, x.axes[1:] if over_time else x.axes)


def _readout_bits(model: Constants) -> int:
    """Bits of a current that is summed up: with a leak the sum has a bound."""
    leak = float(model.decay.max())
    if leak >= 1:
        return READOUT_BITS
    return min(max(29 - math.ceil(math.log2(1 / (1 - leak))), READOUT_BITS), 26)


def _per_channel(draft: Draft, model: Constants, x: Array) -> None:
    """Leak and threshold that are tensors, in the order of the value's channels."""
    for what, name in (("leak", "decay"), ("threshold", "theta")):
        values = getattr(model, name)
        try:
            setattr(model, name, along(draft, x, values, f"{what}s"))
        except ValueError:
            raise draft.fail(
                f"its {what} has {values.size} entries of shape {values.shape}, which do not "
                f"broadcast to {sizes(x)}",
                "give it 1, or one per channel",
            ) from None


def read_membrane(draft: Draft, m: Membrane) -> Array:
    """Make the membrane potential of a neuron an output of it."""
    use = draft.neurons[m.neuron]
    model = use.model
    top = max(model.alpha, 0.0) + float(model.theta.max())
    unit = (
        use.unit * model.gain
        if model.bits == 32
        else 2.0 ** min(math.ceil(math.log2(top)) - 29, -8)
    )
    unit = max(unit, 2.0**-16) if model.bits != 32 else unit
    if use.membrane is None:
        shape = draft.values[use.source].shape
        use.membrane = draft.value(f"{use.name}.membrane", shape, 0, unit, 2**31 - 2)
    steps = None if m.whole else frozenset([m.step])
    return Array(use.membrane, m.axes, draft.values[use.membrane].scale, steps=steps)


def _check_membrane(draft: Draft, key: tuple[Hashable, int], step: int, membrane: Any) -> None:
    """A call may start from zero, then only from what the neuron itself returned last."""
    if membrane is None:
        return
    if isinstance(membrane, Membrane):
        if membrane.neuron == key and membrane.step == step - 1:
            return
        why = "it continues from a membrane potential that is not its own last"
    elif isinstance(membrane, Constant):
        value = torch.as_tensor(membrane.value)
        if step == 0 and not bool(value.any()):
            return
        why = "its membrane potential does not start at zero and stay its own"
    else:
        why = "its membrane potential is computed by something else than itself"
    raise draft.fail(
        why, "hand the membrane potential it returned last, and nothing else, to its next call"
    )
