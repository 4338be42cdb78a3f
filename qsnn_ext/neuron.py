"""What one step of a neuron computes, said without naming a host.

A host's adapter describes each of its neurons once (:meth:`qsnn_ext.hosts.Adapter.describe`);
kernels, deployment, report and regularizer read the description and know no host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor, nn

from qsnn_ext import functional as F
from qsnn_ext.quantizers import MembraneQuantizer

#: Potential and current -> what a step gives, and the potential after it.
Step: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Output: TypeAlias = Literal["spikes", "potential", "each", "mean", "max", "last"]


@dataclass(frozen=True)
class Charge:
    """An affine charge ``h = decay*v + gain*x + offset``.

    Attributes:
        decay: leak factor, a number or a tensor of one value or one per neuron.
        gain: factor of the input current, likewise.
        offset: constant added at every step, likewise.
    """

    decay: float | Tensor
    gain: float | Tensor = 1.0
    offset: float | Tensor = 0.0


@dataclass(frozen=True)
class State:
    """One tensor that is carried from a step to the next.

    Attributes:
        name: attribute of the module that holds it.
        quantizer: rounds it; ``None`` leaves it in floating point.
        why_float: why no quantizer may round it, for states that are no real numbers to keep.
    """

    name: str
    quantizer: MembraneQuantizer | None = None
    why_float: str | None = None


@dataclass(frozen=True)
class Filter:
    """A current that leaks from step to step: ``i = decay*i + sign*x``.

    Attributes:
        state: name of the state that it is.
        decay: leak factor, a number or a tensor of one value or one per neuron.
        sign: 1, or -1 for one that inhibits.
    """

    state: str
    decay: float | Tensor
    sign: float = 1.0


@dataclass(frozen=True)
class Feedback:
    """Spikes that come back a step later: what of them and the input becomes the current.

    Attributes:
        how: ``"add"``: the input and what ``by`` makes of the last spikes; ``"join"``: what it
            makes of the two, one behind the other along the last axis; ``"call"``: ``by(last
            spikes, input)``, element by element.
        by: a layer, a function, or for ``"add"`` a tensor of weights one to one.
        name: path of the layer in the module that has it.
    """

    how: Literal["add", "join", "call"]
    by: nn.Module | Tensor | Callable[..., Tensor]
    name: str


@dataclass(frozen=True)
class Drive:
    """How the current of a step comes about, and what it does.

    Attributes:
        charge: what the current does to the membrane potential.
        filters: currents side by side, of which it is the sum; without any it is the input.
        gain: factor of that sum, if any: a number or a tensor of one value or one per neuron.
        feedback: what becomes of the input before.
    """

    charge: Charge
    filters: tuple[Filter, ...] = ()
    gain: float | Tensor | None = None
    feedback: Feedback | None = None


@dataclass(frozen=True)
class Link:
    """A module that is no neuron and yet ties the steps of a sequence together.

    Attributes:
        neuron: attribute that holds the neuron it runs; ``None`` for none.
        feedback: how that neuron's spikes come back to it.
        delay: steps by which spikes leave later than they came, where it runs no neuron.
    """

    neuron: str | None = None
    feedback: Feedback | None = None
    delay: int = 0


@dataclass(frozen=True)
class NeuronModel:
    """One step of a neuron: charge, fire, reset, and what is carried to the next.

    Attributes:
        kind: the host's class that the neuron is, in what it computes.
        states: what is carried, in the host's order, the membrane potential included.
        potential: name of the membrane potential among the states; ``None`` where there is none.
        potential_seq: attribute that holds the potentials of all steps of a call, if one does.
        passed: states that a call may be given behind its input, in order, the last spikes first
            where they come back; spikes and then states are what it returns.
        charge: the charge where it is affine in potential and current; ``None`` where it is not, or
            where more than the neuron's own state goes into it (recurrence, a synaptic current), or
            where it never fires.
        own_drive: finds out about current and charge where there is no ``charge`` but more is
            known; :attr:`drive` calls it.
        alone: makes the step of a copy of the neuron in double precision, whose potential is its
            only state, for tools that find out what it computes; ``None`` where none can be had.
        spiking: whether it emits spikes, and so has a firing rate.
        threshold: firing threshold, a number or a tensor of one value or one per neuron; ``None``
            where it is not one number that the potential has to reach.
        fire: maps ``h - threshold`` to spikes and carries the surrogate gradient.
        reset: ``"hard"``, ``"soft"`` or ``"none"``.
        v_reset: target of the hard reset, and where the potential starts.
        delayed: whether the reset that a spike causes is taken at the start of the next step, read
            from the stored potential (snnTorch's default), and not in the step itself.
        resets_again: whether what is above the threshold after its reset is reset once more at the
            start of the next step.
        detach_reset: whether the spike inside the reset is a constant of the backward pass.
        order: ``"fire_first"`` (Eq. 12) or ``"quantize_first"`` (Algorithm 1).
        graded: factor of the emitted spikes.
        recurrent: whether a step's spikes are an input of the next.
        readout: whether it only integrates: no spike ever resets its potential.
        output: what a call returns: ``"spikes"``; the ``"potential"`` in their place; or of a
            sequence that starts from rest the potentials of its steps, ``"each"`` apart, their
            ``"mean"`` or ``"max"``, or the ``"last"``.
        stateless: what a neuron without states does instead of carrying any.
        obstacle: why the neuron cannot be quantized, if it cannot.
        no_integers: why no integer program can be made of it, if the rest does not say so; and
            behind a semicolon what to do about that.
    """

    kind: str
    states: tuple[State, ...]
    potential: str | None = None
    potential_seq: str | None = None
    passed: tuple[str, ...] = ()
    charge: Charge | None = None
    own_drive: Callable[[], Drive | None] | None = None
    alone: Callable[[], Step] | None = None
    spiking: bool = True
    threshold: float | Tensor | None = None
    fire: Callable[[Tensor], Tensor] | None = None
    reset: F.Reset = "none"
    v_reset: float = 0.0
    delayed: bool = False
    resets_again: bool = False
    detach_reset: bool = False
    order: F.StepOrder = "fire_first"
    graded: float | Tensor = 1.0
    recurrent: bool = False
    readout: bool = False
    output: Output = "spikes"
    stateless: str = "it carries no state from one step to the next"
    obstacle: str | None = None
    no_integers: str | None = None

    @property
    def drive(self) -> Drive | None:
        """How the current of a step comes about, and what it does; ``None`` if that is unknown."""
        if self.charge is not None:
            return Drive(self.charge)
        return None if self.own_drive is None else self.own_drive()

    @property
    def quantizer(self) -> MembraneQuantizer | None:
        """What rounds the membrane potential; ``None`` for one in floating point."""
        return next((s.quantizer for s in self.states if s.name == self.potential), None)

    @property
    def rounded(self) -> tuple[State, ...]:
        """The states that a quantizer may round."""
        return tuple(s for s in self.states if s.why_float is None)
