"""What one step of a neuron computes, said without naming a host.

A host's adapter describes each of its neurons once (:meth:`qsnn_ext.hosts.Adapter.describe`);
kernels, deployment, report and regularizer read the description and know no host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from qsnn_ext import functional as F
from qsnn_ext.quantizers import MembraneQuantizer


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
class NeuronModel:
    """One step of a neuron: charge, fire, reset, and what is carried to the next.

    Attributes:
        kind: the host's class that the neuron is, in what it computes.
        states: what is carried, in the host's order, the membrane potential included.
        potential: name of the membrane potential among the states; ``None`` where there is none.
        charge: the charge where it is affine in potential and current; ``None`` where it is not, or
            where more than the neuron's own state goes into it (recurrence, a synaptic current).
        spiking: whether it emits spikes, and so has a firing rate.
        threshold: firing threshold, a number or a tensor of one value or one per neuron; ``None``
            where it is not one number that the potential has to reach.
        fire: maps ``h - threshold`` to spikes and carries the surrogate gradient.
        reset: ``"hard"``, ``"soft"`` or ``"none"``.
        v_reset: target of the hard reset, and where the potential starts.
        delayed: whether the reset that a spike causes is taken at the start of the next step, read
            from the stored potential (snnTorch's default), and not in the step itself.
        detach_reset: whether the spike inside the reset is a constant of the backward pass.
        order: ``"fire_first"`` (Eq. 12) or ``"quantize_first"`` (Algorithm 1).
        graded: factor of the emitted spikes.
        recurrent: whether a step's spikes are an input of the next.
        readout: whether it only integrates: no spike ever resets its potential.
        stateless: what a neuron without states does instead of carrying any.
        obstacle: why the neuron cannot be quantized, if it cannot.
        no_integers: why no integer program can be made of it, if the rest does not say so.
    """

    kind: str
    states: tuple[State, ...]
    potential: str | None = None
    charge: Charge | None = None
    spiking: bool = True
    threshold: float | Tensor | None = None
    fire: Callable[[Tensor], Tensor] | None = None
    reset: F.Reset = "none"
    v_reset: float = 0.0
    delayed: bool = False
    detach_reset: bool = False
    order: F.StepOrder = "fire_first"
    graded: float | Tensor = 1.0
    recurrent: bool = False
    readout: bool = False
    stateless: str = "it carries no state from one step to the next"
    obstacle: str | None = None
    no_integers: str | None = None

    @property
    def quantizer(self) -> MembraneQuantizer | None:
        """What rounds the membrane potential; ``None`` for one in floating point."""
        return next((s.quantizer for s in self.states if s.name == self.potential), None)

    @property
    def rounded(self) -> tuple[State, ...]:
        """The states that a quantizer may round."""
        return tuple(s for s in self.states if s.why_float is None)
