"""Scale and bias become fixed point: the moment a current gets its unit.

Weight scale, batch norms and biases are collected as real numbers per channel
(:class:`~qsnn_ext.deploy.lowering.draft.Array`) until something reads the result. Only then is it
known which module was last and how large the result can get, and thus which unit suits it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from qsnn_ext.deploy.lowering.draft import Array, Draft, PendingConv
from qsnn_ext.deploy.lowering.neurons import Real
from qsnn_ext.deploy.program import MAX_SHIFT, Affine, Conv, IntArray

# A current is scaled so that its largest possible value has about this many bits.
CURRENT_BITS = 28  # sums of currents coarsen their units where they have to
NEURON_BITS = 28  # into a neuron, where nothing but the membrane potential is added
READOUT_BITS = 20  # into a neuron that only integrates, and may do so for a thousand steps


def settle(
    draft: Draft, a: Array, bits: int = CURRENT_BITS, beside: float = 0.0, fast: bool = False
) -> Array:
    """Write a pending convolution or batch norm into the program.

    Args:
        draft: The program so far.
        a: Any array; one with nothing pending comes back as it is.
        bits: Bits of the largest result.
        beside: Largest constant the result meets, in real numbers; it must fit as well.
        fast: Let products fit 32 bits where they can, which costs digits of the scale.
    """
    if a.gain is None or a.bias is None:
        return a
    with draft.at(a.origin):
        shape = draft.shape(a)
        if isinstance(a.base, PendingConv):
            conv, g = a.base, a.base.geometry
            f = _fixed_point(draft, a.gain, a.bias, conv.reach, bits, beside, fast)
            base = draft.write(
                ("conv", id(conv), *f.key), conv.name, (shape, 0, f.unit, f.largest),
                lambda name, target: Conv(
                    name, conv.source, target, conv.weight, conv.kernel, g.stride, g.padding,
                    g.dilation, g.groups, f.multiplier, f.shift, f.bias,
                ),
            )  # fmt: skip
        else:
            source = a.base
            f = _fixed_point(draft, a.gain, a.bias, draft.largest[source], bits, beside, fast)
            if f.changes_nothing and not draft.values[source].planes:
                return replace(a, scale=f.unit, gain=None, bias=None)
            base = draft.write(
                ("affine", source, *f.key), draft.where, (shape, 0, f.unit, f.largest),
                lambda name, target: Affine(name, source, target, f.multiplier, f.shift, f.bias),
            )  # fmt: skip
    return replace(a, base=base, scale=f.unit, gain=None, bias=None)


def largest_of(draft: Draft, a: Array) -> float:
    """Bound on the absolute real values of an array, settled or not."""
    if a.gain is None or a.bias is None:
        return abs(a.scale) * draft.largest[a.index]
    reach = a.base.reach if isinstance(a.base, PendingConv) else draft.largest[a.base]
    return float((np.abs(a.gain) * reach + np.abs(a.bias)).max())


@dataclass(frozen=True)
class _FixedPoint:
    """``((x * multiplier + half) >> shift) + bias``, each ``[C]``, in units of ``unit``."""

    unit: float
    multiplier: IntArray
    shift: IntArray
    bias: IntArray
    largest: int  # absolute result

    @property
    def key(self) -> tuple[bytes, bytes, bytes]:
        return self.multiplier.tobytes(), self.shift.tobytes(), self.bias.tobytes()

    @property
    def changes_nothing(self) -> bool:
        """Whether every number comes out as it went in: it was in this unit already."""
        ones = np.left_shift(np.int64(1), self.shift.astype(np.int64))
        return bool((self.multiplier == ones).all()) and not self.bias.any()


def _fixed_point(
    draft: Draft, gain: Real, bias: Real, reach: int, bits: int, beside: float, fast: bool
) -> _FixedPoint:
    """``gain * x + bias`` for ``|x| <= reach``; the rest as for :func:`settle`."""
    if not (np.isfinite(gain).all() and np.isfinite(bias).all()):
        raise draft.fail(
            "its scale or bias is not finite",
            "look for NaN and infinity in its parameters and train on or load a sound checkpoint",
        )
    top = float((np.abs(gain) * reach + np.abs(bias)).max())
    held = max(top, beside)
    exponent = bits - math.ceil(math.log2(held)) if held > 0 else 16
    exponent = max(-64, min(exponent, 24))
    unit = 2.0**-exponent
    # 32-bit products are faster; they leave the multiplier 15 bits where there is room.
    narrow = fast and reach * 2**15 < 2**30
    cap, longest = ((2**30) / max(reach, 1), 30) if narrow else (2.0**30, MAX_SHIFT)
    ratio = np.abs(gain) / unit
    with np.errstate(divide="ignore"):
        shift = np.floor(np.log2(np.where(ratio > 0, cap / ratio, 1.0)))
    shift = np.clip(shift, 1, longest)
    multiplier = np.rint(gain / unit * 2.0**shift)
    if np.abs(multiplier).max() > cap + 1:
        raise draft.fail(
            f"its scale, up to {float(np.abs(gain).max()):.3g}, exceeds the fixed-point range",
            "look for exploded weights or a running variance near zero",
        )
    if narrow:  # leave room for the rounding constant
        half = 2.0 ** (shift - 1)
        assert float((np.abs(multiplier) * reach + half).max()) < 2**31
    integers = np.rint(bias / unit)
    return _FixedPoint(
        unit, multiplier.astype(np.int64).astype(np.int32), shift.astype(np.uint8),
        integers.astype(np.int64).astype(np.int32), int(top / unit) + 4,
    )  # fmt: skip


def rescaled(draft: Draft, a: Array, bits: int) -> Array:
    """A settled current in a unit so coarse that its largest value has ``bits`` bits."""
    if draft.largest[a.index] < 2**bits:
        return a
    channels = draft.shape(a)[0]
    pending = replace(
        a, gain=np.full(channels, a.scale), bias=np.zeros(channels), origin=f"{draft.where}.scale"
    )
    return settle(draft, pending, bits)
