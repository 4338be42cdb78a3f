"""What one synaptic operation costs.

The table is an estimate of arithmetic alone: fetching weights and states from memory, which often
costs more, is not in it, and a real chip's numbers differ. Replace it with your hardware's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from qsnn_ext.errors import ConfigError

#: Kinds of synaptic operation, dearest first. The names are the fields of :class:`EnergyTable`.
OPERATIONS = ("mac", "mac8", "ac", "ac8", "and_ac")


def operation(weight_bits: int | None, spikes: bool) -> str:
    """The kind of operation in which a weight meets an input.

    A spike needs no multiplication, and a 1-bit weight turns one into a change of sign.

    Args:
        weight_bits: 1 to 8, ``None`` for floating point.
        spikes: whether the input is binary.

    Returns:
        ``"mac"`` (float weight, real input), ``"mac8"`` (weight of up to 8 bits, real input, which
        is taken to have 8 bits as an image has), ``"ac"`` (float weight and spike, or 1-bit weight
        and real input), ``"ac8"`` (weight of up to 8 bits, spike), ``"and_ac"`` (1-bit weight,
        spike).
    """
    if weight_bits is None:
        return "ac" if spikes else "mac"
    if weight_bits == 1:
        return "and_ac" if spikes else "ac"
    return "ac8" if spikes else "mac8"


@dataclass(frozen=True)
class EnergyTable:
    """Energy per synaptic operation in picojoule.

    The defaults are for a 45 nm process at 0.9 V: M. Horowitz, "Computing's energy problem (and
    what we can do about it)", ISSCC 2014, doi 10.1109/ISSCC.2014.6757323, whose figures are: float
    32 multiply 3.7, float 32 add 0.9, 8-bit integer multiply 0.2, 8-bit integer add 0.03.

    Args:
        mac: float 32 multiply and add, 3.7 + 0.9 = 4.6; the usual value in SNN papers.
        mac8: 8-bit multiply and add, derived: 0.2 + 0.03 = 0.23.
        ac: float 32 add, 0.9; the usual value in SNN papers.
        ac8: 8-bit integer add, 0.03.
        and_ac: AND of weight and spike, then a count. Derived, and in no source: counting the ones
            among n bits takes about n full adders, an 8-bit adder has 8, so 0.03 / 8 = 0.00375;
            the AND gate is neglected.
        source: where the values come from, printed with every report.

    Raises:
        ConfigError: a cost is negative or not finite.
    """

    mac: float = 4.6
    mac8: float = 0.23
    ac: float = 0.9
    ac8: float = 0.03
    and_ac: float = 0.03 / 8
    source: str = "Horowitz, ISSCC 2014, 45 nm; mac8 and and_ac derived from it"

    def __post_init__(self) -> None:
        for item in fields(self):
            cost = getattr(self, item.name)
            if item.name != "source" and not (math.isfinite(cost) and cost >= 0):
                raise ConfigError(f"energy {item.name}={cost!r} must be a number of pJ >= 0.")

    def picojoules(self, operations: Mapping[str, int]) -> float:
        """Energy of that many operations of each kind.

        Raises:
            ConfigError: a kind the table does not have.
        """
        for kind in operations:
            if kind not in OPERATIONS:
                raise ConfigError(
                    f"operation {kind!r} is unknown; choose one of {', '.join(OPERATIONS)}."
                )
        return float(sum(count * getattr(self, kind) for kind, count in operations.items()))
