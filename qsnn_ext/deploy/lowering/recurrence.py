"""Neurons whose spikes come back, and neurons that carry a second state.

What a step takes from the step before is a delay of spikes, or a membrane potential of its own: a
current that is filtered first is a neuron without threshold whose potential is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from qsnn_ext import hosts
from qsnn_ext.deploy.lowering.arithmetic import is_spikes, lower_add, lower_multiply
from qsnn_ext.deploy.lowering.axes import (
    full,
    is_natural,
    labels,
    natural,
    rest_axes,
    select,
    size_of,
    sizes,
)
from qsnn_ext.deploy.lowering.calls import (
    fire,
    is_neuron,
    read_membrane,
    takes_sequences,
)
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
from qsnn_ext.deploy.lowering.neurons import Constants, Real, membrane_of, read_neuron
from qsnn_ext.deploy.lowering.pooling import lower_mean, once_per_step
from qsnn_ext.deploy.lowering.settle import NEURON_BITS, settle
from qsnn_ext.deploy.program import Delay
from qsnn_ext.neuron import Charge
from qsnn_ext.quantizers import MembraneQuantizer

_SECOND_STATES = ("Synaptic", "RSynaptic")
_RECURRENT = ("RLeaky", "RSynaptic")
_CONTAINERS = ("LinearRecurrentContainer", "ElementWiseRecurrentContainer")


@dataclass
class Loop:
    """Spikes of a neuron that are an input of its next step."""

    spikes: int
    delayed: int
    current: dict[tuple[Any, ...], Array]


def _kinds(module: nn.Module) -> set[str]:
    return {base.__name__ for base in type(module).__mro__ if hosts.belongs(base)}


def is_recurrent(module: nn.Module) -> bool:
    """Whether :func:`lower_recurrent` knows a module."""
    known = {*_SECOND_STATES, *_RECURRENT, *_CONTAINERS}
    known |= {"Alpha", "Delay", "NonSpikingBaseNode", "SynapseFilter"}
    return bool(_kinds(module) & known)


def lower_recurrent(draft: Draft, module: Any, x: Array, given: list[Any]) -> Any:
    """One call of a recurrent module.

    Args:
        draft: The program so far.
        module: snnTorch's ``RLeaky``, ``Synaptic`` or ``RSynaptic``, SpikingJelly's recurrent
            containers or its ``Delay``.
        x: Its input.
        given: States that the call passes, as far as the host takes any.

    Returns:
        The outputs of the call, spikes first.
    """
    kinds = _kinds(module)
    if "NonSpikingBaseNode" in kinds:
        return _readout(draft, module, x, kinds)
    if "SynapseFilter" in kinds:
        raise draft.fail(
            "a SynapseFilter leaks only where there is no spike, which no integer operation does",
            "use a NonSpikingLIFNode, or snnTorch's Synaptic, whose current leaks at every step",
        )
    if "Delay" in kinds:
        return (_delayed(draft, module, x),)
    if kinds & {*_CONTAINERS}:
        return (_container(draft, module, x, "LinearRecurrentContainer" in kinds),)
    if "Alpha" in kinds:
        return _alpha(draft, module, x, given)
    return _host_neuron(draft, module, x, given, kinds)


# --------------------------------------------------------------------------- snnTorch


def _host_neuron(draft: Draft, module: Any, x: Array, given: list[Any], kinds: set[str]) -> Any:
    """``[spk], [syn], mem`` of snnTorch's neurons, in the order the host has them."""
    if any(v is not None and not isinstance(v, Constant | Membrane | Array) for v in given):
        raise draft.fail("it is given a state of another kind", "hand on what it returned last")
    takes_sequences(draft, module, x)
    recurrent, second = bool(kinds & {*_RECURRENT}), bool(kinds & {*_SECOND_STATES})
    states = dict(zip([*["spk"] * recurrent, *["syn"] * second, "mem"], given, strict=False))
    described: Any = hosts.describe(module)
    charge = Charge(torch.as_tensor(module.beta).detach().clamp(0, 1))
    model = read_neuron(draft.where, module, charge)
    if model.reset == "hard" and model.delayed:
        raise draft.fail(
            "its delayed reset to zero drops the current of the step after a spike",
            "use reset_mechanism='subtract' or reset_delay=False",
        )
    current: Array = x
    loop = None
    if recurrent:
        loop = _loop(draft, module, draft.shape(x))
        _check_spikes(draft, loop, states.get("spk"))
        current = _with_feedback(draft, module, x, loop)
    outputs: list[Any] = []
    if second:
        quantizer = next((s.quantizer for s in described.states if s.name == "syn"), None)
        if quantizer is not None and described.order != "fire_first":
            raise draft.fail(
                "its synaptic current is quantized before it is used",
                "choose the order fire_first, or leave that state in floating point",
            )
        held = states.get("syn")
        with draft.at(f"{draft.where}.syn"):
            current, after = _filtered(draft, module.alpha, quantizer, current, held)
        outputs.append(after)
    spikes, membrane = fire(
        draft, module, model, current, states.get("mem"), False, loop.spikes if loop else None
    )
    return (spikes, *outputs, membrane)


def _filtered(
    draft: Draft, rate: Any, quantizer: MembraneQuantizer | None, x: Array, held: Any
) -> tuple[Array, Membrane]:
    """A synaptic current, which leaks and never fires; with a quantizer k bits are carried on.

    Args:
        draft: The program so far.
        rate: How much of it is left after a step; the host's own, which tells it from others.
        quantizer: Of what is carried on, or None.
        x: What flows into it.
        held: What the call passes as its state, or None.

    Returns:
        What is used, and what is carried.
    """
    model = _silent(_rates(rate).reshape(-1))
    if quantizer is not None:
        model.bits, model.alpha, model.squash = membrane_of(draft.where, quantizer)
        return _carried_and_used(draft, rate, model, x, held, False)
    _, after = fire(draft, rate, model, x, held, False)
    return read_membrane(draft, after), after


def _rates(rate: Any) -> Real:
    """A rate as the host uses it, between 0 and 1."""
    return real(torch.as_tensor(rate).clamp(0, 1))


def _alpha(draft: Draft, module: Any, x: Array, given: list[Any]) -> Any:
    """``Alpha`` of snnTorch: the difference of two filtered currents, without a reset.

    Returns:
        ``spk, syn_exc, syn_inh, mem`` of a call.
    """
    described: Any = hosts.describe(module)
    if module.reset_mechanism != "none":
        raise draft.fail(
            "a spike of an Alpha resets two currents that do not fire themselves, which no integer "
            "operation does",
            "use reset_mechanism='none' (a read-out), or Synaptic",
        )
    takes_sequences(draft, module, x)
    quantizers = {s.name: s.quantizer for s in described.states}
    held = dict(zip(("syn_exc", "syn_inh", "mem"), given, strict=False))
    x = settle(draft, x)
    parts: list[Array] = []
    carried: list[Membrane] = []
    for name, rate, sign in (("syn_exc", module.alpha, 1.0), ("syn_inh", module.beta, -1.0)):
        with draft.at(f"{draft.where}.{name}"):
            signed = x if sign > 0 else lower_multiply(draft, x, Constant(sign))
            assert isinstance(signed, Array)
            current, after = _filtered(draft, rate, quantizers[name], signed, held.get(name))
        parts.append(current)
        carried.append(after)
    rates = (module.alpha, module.beta)
    slow, fast = (np.log(_rates(rate)) for rate in rates)
    tau = slow / (fast - slow) + 1
    total = lower_add(draft, parts[0], parts[1])
    potential = lower_multiply(draft, total, Constant(torch.as_tensor(tau)))
    assert isinstance(potential, Array)
    charge = Charge(torch.zeros(()))
    model = read_neuron(draft.where, module, charge)
    spikes, _ = fire(draft, module, replace(model, bits=32), potential, None, False)
    return (spikes, *carried, potential)


def lower_readout(
    draft: Draft, module: Any, model: Constants, x: Array
) -> tuple[Array | Membrane, Membrane]:
    """A neuron of one's own that answers with its potential.

    Returns:
        The answer, and the potential that is carried on.
    """
    over_time = takes_sequences(draft, module, x)
    if model.bits == 32:
        _, after = fire(draft, module, model, x, None, over_time)
        return (read_membrane(draft, replace(after, axes=x.axes, whole=True)) if over_time
                else after), after  # fmt: skip
    if model.gain != 1.0:
        x = settle(draft, x)
        x = replace(x, scale=x.scale * model.gain)
    if model.offset or model.v_initial:
        raise draft.fail("its potential leaks towards another value than 0", "let it rest at 0")
    one = replace(model, gain=1.0)
    return _carried_and_used(draft, module, one, x, None, over_time)


def _carried_and_used(
    draft: Draft, module: Any, model: Constants, x: Array, held: Any, over_time: bool
) -> tuple[Array, Membrane]:
    """What is carried on with k bits, but used before it is rounded.

    What was carried is read a step later: a delay of the membrane potential of a neuron that never
    fires. Leaked, and with the current of the step, it is what the membrane potential integrates.

    Returns:
        What is used, and what is carried.
    """
    x, alpha = settle(draft, x), model.alpha
    _, after = fire(draft, module, model, x, held, over_time)
    use = draft.neurons[after.neuron]
    if use.membrane is None:
        shape = draft.shape(x)
        unit = 2.0 ** (math.ceil(math.log2(max(alpha, 1e-6))) - NEURON_BITS)
        largest = round(max(alpha, 0.0) / unit) + 1
        use.membrane = draft.value(f"{use.name}.membrane", shape, 0, unit, largest)
    unit = draft.values[use.membrane].scale
    key = ("delay", id(module), use.membrane)
    source = use.membrane
    last = draft.write(
        key, f"{draft.where}.last", (draft.shape(x), 0, unit, draft.largest[source]),
        lambda name, target: Delay(name, source, target),
    )  # fmt: skip
    carried = affine(draft, Array(last, x.axes, unit, steps=x.steps), model.decay, np.zeros(1))
    total = lower_add(draft, x, carried)
    assert isinstance(total, Array)
    return replace(total, axes=x.axes), after


def _silent(decay: Real) -> Constants:
    """What leaks and never fires."""
    return Constants(
        decay=decay, theta=np.ones(1), gain=1.0, offset=0.0, reset="none", v_reset=0.0,
        v_initial=0.0, strict=True, delayed=False, bits=32, alpha=1.0, squash=False,
        order="fire_first", silent=True,
    )  # fmt: skip


def _with_feedback(draft: Draft, module: Any, x: Array, loop: Loop) -> Array:
    """The current of this step plus that of the last step's spikes."""
    x = settle(draft, x)
    key = (x.index, x.steps)
    if key not in loop.current:
        last = Array(loop.delayed, x.axes, 1.0, steps=x.steps)
        with draft.at(f"{draft.where}.recurrent"):
            back = _feedback(draft, module.recurrent, last)
        loop.current[key] = lower_add(draft, x, back)  # type: ignore[assignment]
    return loop.current[key]


def _feedback(draft: Draft, layer: Any, last: Array) -> Array:
    if isinstance(layer, nn.Linear):
        return lower_linear(draft, layer_weights(draft, layer), last)
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return lower_conv(draft, layer_weights(draft, layer), kernel_of(layer), last)
    factor = getattr(layer, "V", None)
    if factor is None:
        raise draft.fail(
            f"feedback through a {type(layer).__name__} cannot be lowered",
            "use a linear layer, a convolution or one weight for each neuron",
        )
    return affine(draft, last, real(torch.as_tensor(factor)), np.zeros(1))


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


# --------------------------------------------------------------------------- SpikingJelly


def _readout(draft: Draft, module: Any, x: Array, kinds: set[str]) -> Any:
    """SpikingJelly's neurons that never fire: their potential is the output."""
    if not kinds & {"NonSpikingIFNode", "NonSpikingLIFNode"}:
        raise draft.fail(
            f"a {type(module).__name__} has no integer form", "use a NonSpikingLIFNode or IFNode"
        )
    if getattr(module, "membrane", None) is not None:
        raise draft.fail(
            "its potential is quantized between steps and given out unquantized",
            "leave this read-out in floating point",
        )
    once_per_step(draft, x)
    if not (x.axes and labels(x.axes[0]) == {"T"}):
        raise draft.fail(
            "it runs over its first axis, which is not time here",
            "put time in front, [T, N, ...], or say where it is with time_first=",
        )
    gain = 1.0 / float(module.tau) if "NonSpikingLIFNode" in kinds else 1.0
    decay = 1.0 - gain if "NonSpikingLIFNode" in kinds else 1.0
    model = replace(_silent(np.array([decay])), gain=gain)
    _, after = fire(draft, module, model, x, None, True)
    steps = size_of(x.axes[0])
    if module.decode == "last_mem":
        return (after,)
    every = read_membrane(draft, replace(after, axes=x.axes, whole=True))
    if module.decode == "mean-mem":
        return (lower_mean(draft, every, 0, total=False),)
    if module.decode == "max-mem":
        return (Answer(every, (("max", 0, False),), tuple(sizes(every)[1:])),)
    if module.decode is not None:
        raise draft.fail(
            f"decode={module.decode!r} has no integer form",
            "use 'last_mem', 'mean-mem', 'max-mem' or None",
        )
    return tuple(select(draft, every, t) for t in range(steps))


def _delayed(draft: Draft, module: Any, x: Array) -> Array:
    """SpikingJelly's ``Delay`` of spikes by some steps."""
    takes_sequences(draft, module, x)
    x = settle(draft, x)
    if draft.values[x.index].planes == 0:
        raise draft.fail("a delay of currents cannot be lowered", "delay the spikes before them")
    base = x.index
    for k in range(module.delay_steps):
        source, value = base, draft.values[base]
        base = draft.write(
            ("delay", id(module), k, source), f"{draft.where}.{k}",
            (value.shape, value.planes, value.scale, 2**value.planes - 1),
            lambda name, target, source=source: Delay(name, source, target),  # type: ignore[misc]
        )  # fmt: skip
    return replace(x, base=base)


def _container(draft: Draft, module: Any, x: Array, linear: bool) -> Array:
    """SpikingJelly's recurrent containers around a neuron."""
    over_time = takes_sequences(draft, module, x)
    inner = module.sub_module
    if not is_neuron(inner):
        raise draft.fail(
            f"a recurrent container around a {type(inner).__name__} cannot be lowered",
            "put a neuron into it, and layers before or behind",
        )
    name = draft.where
    if linear:
        x = natural(draft, settle(draft, x))
        shape = (module.sub_module_out_features, 1, 1)
        shown = replace(x, axes=(*x.axes[:-1], full("C", shape[0])))
    else:
        shown = x = settle(draft, x)
        shape = draft.shape(x)
    with draft.at(f"{name}.sub_module"):
        loop = _loop(draft, module, shape)
    key = (x.index, x.steps)
    if key not in loop.current:
        back = Array(loop.delayed, shown.axes, 1.0, steps=x.steps)
        if linear:
            with draft.at(f"{name}.rc"):
                loop.current[key] = _split_linear(draft, module.rc, x, back)
        else:
            loop.current[key] = _joined(draft, module.element_wise_function, x, back)
    with draft.at(f"{name}.sub_module"):
        model = read_neuron(draft.where, inner)
        spiked, _ = fire(draft, inner, model, loop.current[key], None, over_time, loop.spikes)
    return spiked


def _split_linear(draft: Draft, layer: Any, x: Array, back: Array) -> Array:
    """A linear layer on ``cat((x, back), -1)``: its weights fall into two parts."""
    weights = layer_weights(draft, layer)
    codes = weights.codes
    n = codes.shape[1] - sizes(back)[-1]
    if len(rest_axes(draft, x)) != 1 or not is_natural(draft, x):
        raise draft.fail("its input is no vector of features", "flatten it before")
    parts = []
    for value, part, bias in (
        (x, codes[:, :n], weights.bias),
        (back, codes[:, n:], np.zeros_like(weights.bias)),
    ):
        kernel = part.reshape(part.shape[0], *draft.shape(value))
        y = convolve(draft, replace(weights, codes=kernel, bias=bias), value, Geometry())
        parts.append(replace(y, axes=(*value.axes[:-1], full("C", codes.shape[0]))))
    total = lower_add(draft, parts[0], parts[1])
    assert isinstance(total, Array)
    return total


def _joined(draft: Draft, function: Any, x: Array, back: Array) -> Array:
    """What an element-wise function makes of the last output and the input: their sum."""
    y, z = torch.rand(2, 5, dtype=torch.float64)
    if not torch.equal(function(y, z), y + z):
        raise draft.fail(
            "its element-wise function is not the sum of its operands", "add them in it"
        )
    if is_spikes(draft, x):
        return lower_add(draft, back, x)  # type: ignore[return-value]
    total = lower_add(draft, x, back)
    assert isinstance(total, Array)
    return total
