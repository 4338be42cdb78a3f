"""Calls of neurons: a loop over time calls one neuron many times, the program has it once.

Only neurons carry anything from step to step. What makes one operation of many calls is that they
read the same current, one time step after the other, and continue from their own membrane
potential; all of that is checked here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qsnn_ext.deploy.lowering.axes import labels
from qsnn_ext.deploy.lowering.draft import Array, Constant, Draft, Membrane, NeuronUse
from qsnn_ext.deploy.lowering.neurons import read_neuron
from qsnn_ext.deploy.lowering.settle import NEURON_BITS, settle


def runs_over_time(module: nn.Module) -> bool:
    """Whether a module is snnTorch's neuron wrapped to take whole sequences."""
    return type(module).__name__ == "OverTime"


def lower_neuron(
    draft: Draft, module: nn.Module, x: Array, membrane: Any
) -> Array | tuple[Array, Membrane]:
    """One call of a neuron.

    Args:
        draft: The program so far.
        module: The neuron.
        x: Its current.
        membrane: What the call passes as the membrane potential, or None.

    Returns:
        Spikes, or spikes and membrane potential where the host returns both.
    """
    over_time = runs_over_time(module) or any("T" in labels(axis) for axis in x.axes)
    inner: Any = module.neuron if runs_over_time(module) else module
    model = read_neuron(draft.where, inner)
    x = settle(draft, x, NEURON_BITS, model.largest / model.gain)
    key = (id(inner), x.index)
    if membrane is None and any(k[0] == id(inner) and k != key for k in draft.neurons):
        raise draft.fail(
            "it is used in two places of the network, which would share a state",
            "give each place a neuron of its own",
        )
    if key not in draft.neurons:
        name = draft.unique(draft.where)
        spikes = draft.value(f"{name}.spikes", draft.shape(x), 1, 1.0, 1)
        draft.neurons[key] = NeuronUse(name, model, x.index, spikes, x.scale, over_time)
        draft.ops.append(draft.neurons[key])
    use = draft.neurons[key]
    step = use.calls
    use.calls += 1
    if use.multi_step and step:
        raise draft.fail(
            "it is called more than once on a whole sequence",
            "give each place a neuron of its own",
        )
    if x.steps is not None and x.steps != frozenset([step]):
        raise draft.fail(
            f"its call number {step} sees the input of step {sorted(x.steps)}",
            "feed the time steps in order, each once",
        )
    _check_membrane(draft, key, step, membrane)
    draft.steps = max(draft.steps, step + 1)
    spiked = Array(use.spikes, x.axes, 1.0, steps=None if over_time else frozenset([step]))
    if over_time or not _returns_membrane(inner):
        return spiked
    return spiked, Membrane(key, step, x.axes)


def read_membrane(draft: Draft, m: Membrane) -> Array:
    """Make the membrane potential of a neuron an output of it."""
    use = draft.neurons[m.neuron]
    unit = use.unit * use.model.gain if use.model.bits == 32 else 2.0**-16
    if use.membrane is None:
        shape = draft.values[use.source].shape
        use.membrane = draft.value(f"{use.name}.membrane", shape, 0, unit, 2**31 - 2)
    return Array(use.membrane, m.axes, unit, steps=frozenset([m.step]))


def _check_membrane(draft: Draft, key: tuple[int, int], step: int, membrane: Any) -> None:
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


def _returns_membrane(module: Any) -> bool:
    if "Leaky" not in {b.__name__ for b in type(module).__mro__}:
        return False
    return bool(module.output) or not bool(module.init_hidden)
