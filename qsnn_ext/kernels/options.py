"""Everything about a layer of neurons that is compiled into its core."""

from __future__ import annotations

import ast
import dataclasses
import functools
from dataclasses import dataclass
from typing import Literal

from qsnn_ext import functional as F
from qsnn_ext.kernels.surrogates import Surrogate

AlphaMode = Literal["dynamic", "running", "given"]
Save = Literal["nothing", "input", "charge"]


@dataclass(frozen=True)
class LIFOptions:
    """Options of :func:`qsnn_ext.kernels.lif_multi_step`.

    Attributes:
        surrogate: firing rule and pseudo-gradient.
        bits: width of the membrane potential, 2 to 8; ``None`` leaves it in floating point.
        scale: ``"max"`` or ``"absmax"``.
        alpha: ``"dynamic"`` (this step's maximum), ``"given"``, or ``"running"`` (given, and moved
            towards the maximum after each step, as frozen mode does while training).
        momentum: weight of the newest step of ``"running"``.
        squash: ``"tanh"`` before rounding, or ``None``.
        order: ``"fire_first"`` (Eq. 12) or ``"quantize_first"`` (Algorithm 1).
        reset: ``"hard"``, ``"soft"`` or ``"none"``.
        v_reset: target of the hard reset.
        detach_reset: whether the spike inside the reset is a constant of the backward pass.
        delayed: whether a spike's reset is taken at the start of the next step, which reads it from
            the stored potential: :func:`qsnn_ext.functional.delayed_lif_step`.
        save: what the forward keeps for the backward.
    """

    surrogate: Surrogate
    bits: int | None = 2
    scale: F.MembraneScale = "max"
    alpha: AlphaMode = "dynamic"
    momentum: float = 0.1
    squash: F.Squash | None = None
    order: F.StepOrder = "fire_first"
    reset: F.Reset = "hard"
    v_reset: float = 0.0
    detach_reset: bool = False
    delayed: bool = False
    save: Save = "nothing"

    def encode(self, save: Save | None = None) -> str:
        """One string: operations of ``torch.library`` take tensors, numbers and strings.

        Args:
            save: in place of the option's own.
        """
        values = [repr(getattr(self, name)) for name in _PLAIN]
        return "|".join([*map(repr, self.surrogate), *values, repr(save or self.save)])


_PLAIN = tuple(f.name for f in dataclasses.fields(LIFOptions))[1:-1]  # all but the surrogate, save


@functools.cache
def decode(text: str) -> LIFOptions:
    """The inverse of :meth:`LIFOptions.encode`."""
    values = [ast.literal_eval(value) for value in text.split("|")]
    return LIFOptions(Surrogate(*values[:4]), *values[4:])
