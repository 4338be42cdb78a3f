"""What a neuron of one's own computes, found by running its step.

A subclass may charge, fire and reset in its own way. Its step is run on many potentials and
currents at once; where that shows an affine charge and the reset that its description says, the
neuron is an ordinary one. Where it shows anything else, it is none.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qsnn_ext.neuron import Charge, NeuronModel

SAMPLES = 512
ROUNDING = 1e-9


@dataclass(frozen=True)
class Probed:
    """A neuron as its step shows it.

    Args:
        charge: Its charge.
        readout: Whether it gives its potential and never fires.
    """

    charge: Charge
    readout: bool


def probe(module: nn.Module, model: NeuronModel) -> Probed | None:
    """Run the step of a neuron whose only state is its potential; None if it is no ordinary one.

    Args:
        module: The neuron, quantized or not.
        model: Its description.
    """
    own: Any = type(module)
    theta = model.threshold
    if [s.name for s in model.states] != [model.potential] or not isinstance(theta, int | float):
        return None
    kind = own.float_type() if hasattr(own, "float_type") else own
    try:
        found = _steps(module, kind, str(model.potential))
    except Exception:  # whatever a user's step may raise on another shape than its own
        return None
    v, x, out, after = found[0]
    readout = torch.equal(out, after)
    fired = torch.zeros_like(out) if readout else out
    if not bool(((fired == 0) | (fired == 1)).all()):
        return None
    quiet = fired == 0
    if int(quiet.sum()) < 16:
        return None
    terms = torch.stack([v, x, torch.ones_like(v)], 1)
    solution = torch.linalg.lstsq(terms[quiet], after[quiet, None]).solution[:, 0]
    decay, gain, offset = (_plain(float(c)) for c in solution)
    for v, x, out, after in found:
        charge = decay * v + gain * x + offset
        expected = charge
        if not readout:
            apart = (charge - theta).abs() > ROUNDING * (1 + charge.abs())
            if not torch.equal((charge > theta)[apart], (out == 1)[apart]):
                return None
            reset = {"hard": torch.full_like(v, model.v_reset), "soft": charge - theta}
            expected = torch.where(out == 1, reset.get(model.reset, charge), charge)
        scale = 1 + after.abs()
        if model.delayed or not bool(((expected - after).abs() <= ROUNDING * scale).all()):
            return None
        if readout and not torch.equal(out, after):
            return None
    return Probed(Charge(decay, gain, offset), readout)


def _plain(value: float) -> float:
    """Without the rounding of the fit, where a short number is meant."""
    short = round(value, 8)
    return short if abs(short - value) < ROUNDING else value


def _steps(
    module: nn.Module, kind: type[nn.Module], potential: str
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Potential, current, answer and potential after each of some steps, all float64.

    Their magnitudes go from hundredths to thousands, so that a bound shows, and the second step
    goes on from the first, so that what counts steps shows.
    """
    g = torch.Generator().manual_seed(0)
    one: Any = copy.copy(module)
    one.__dict__.update({k: copy.deepcopy(t) for k, t in vars(module).items() if k != "_memories"})
    memories = vars(module).get("_memories")
    if memories is not None:
        one.__dict__["_memories"] = dict(memories)
    one.__class__ = kind
    one.double().eval()
    setattr(one, potential, _numbers(g))
    found = []
    for _ in range(3):
        v, x = getattr(one, potential).clone(), _numbers(g)
        with torch.no_grad():
            out = one.single_step_forward(x.clone())
        after = getattr(one, potential).clone()
        assert isinstance(out, Tensor)
        assert out.shape == after.shape == v.shape
        found.append((v, x, out.double(), after.double()))
    return found


def _numbers(g: torch.Generator) -> Tensor:
    magnitudes = torch.tensor([1.0, 0.01, 1.0, 30.0, 1.0, 3000.0], dtype=torch.float64)
    signed = 4 * torch.rand(SAMPLES, generator=g, dtype=torch.float64) - 2
    return signed * magnitudes[torch.arange(SAMPLES) % len(magnitudes)]
