"""What a neuron of one's own computes, found by running its step.

A subclass may charge, fire and reset in its own way. Its step is run on many potentials and
currents at once; where that shows an affine charge and the reset that its description says, the
neuron is an ordinary one. Where it shows anything else, it is none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qsnn_ext.neuron import Charge, NeuronModel, Step

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


def probe(model: NeuronModel) -> Probed | None:
    """Run the step of a neuron whose only state is its potential; None if it is no ordinary one."""
    theta = model.threshold
    if [s.name for s in model.states] != [model.potential] or not isinstance(theta, int | float):
        return None
    if model.alone is None:
        return None
    try:
        found = _steps(model.alone())
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


def _steps(step: Step) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Potential, current, answer and potential after each of some steps, all float64.

    Their magnitudes go from hundredths to thousands, so that a bound shows, and the second step
    goes on from the first, so that what counts steps shows.
    """
    g = torch.Generator().manual_seed(0)
    v, found = _numbers(g), []
    for _ in range(3):
        x = _numbers(g)
        with torch.no_grad():
            out, after = step(v.clone(), x.clone())
        assert isinstance(out, Tensor)
        assert out.shape == after.shape == v.shape
        after = after.double().clone()
        found.append((v, x, out.double(), after))
        v = after
    return found


def _numbers(g: torch.Generator) -> Tensor:
    magnitudes = torch.tensor([1.0, 0.01, 1.0, 30.0, 1.0, 3000.0], dtype=torch.float64)
    signed = 4 * torch.rand(SAMPLES, generator=g, dtype=torch.float64) - 2
    return signed * magnitudes[torch.arange(SAMPLES) % len(magnitudes)]
