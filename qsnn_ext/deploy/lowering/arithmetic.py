"""Sums, products and scalings of tensors: residual connections, SEW's AND and IAND."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from qsnn_ext.deploy.lowering.axes import (
    arrange,
    expand,
    has_time,
    is_whole,
    sizes,
    whole,
)
from qsnn_ext.deploy.lowering.draft import Array, Atom, Complement, Constant, Draft
from qsnn_ext.deploy.lowering.layers import affine, real
from qsnn_ext.deploy.lowering.settle import CURRENT_BITS, largest_of, rescaled, settle
from qsnn_ext.deploy.program import Add, Logic


def lower_add(draft: Draft, a: Any, b: Any, sign: int = 1) -> Array | Complement:
    """``a + sign * b`` of arrays and constants."""
    if isinstance(a, Constant) and isinstance(b, Array):
        return _plus_constant(draft, b, real(torch.as_tensor(a.value)), sign)
    if isinstance(b, Constant) and isinstance(a, Array):
        return _plus_constant(draft, a, sign * real(torch.as_tensor(b.value)), 1)
    if not (isinstance(a, Array) and isinstance(b, Array)):
        raise draft.fail(
            "this sum cannot be lowered",
            "add tensors of the network; 1 - spikes is possible within a product only",
        )
    over_time = _sum_over_time(draft, a, b) if sign > 0 else None
    if over_time is not None:
        return over_time
    steps = _common_steps(draft, a, b)
    if (a.reduction, a.factor) != (b.reduction, b.factor):
        raise draft.fail(
            "it adds a sum over time to something else", "sum or average over time last"
        )
    for x in (a, b):
        draft.check_input(x)
    # In one unit from the start, so that no operation has to bring them to one.
    together = largest_of(draft, a) + largest_of(draft, b)
    a, b = (settle(draft, x, CURRENT_BITS, beside=together) for x in (a, b))
    a, b = _alike(draft, a, b)
    a, b = _in_reach(draft, a, b)
    values, high = draft.values, draft.largest
    counts = [values[x.index].planes > 0 for x in (a, b)]
    if all(counts) and a.scale == b.scale and sign > 0:
        scale, factors = a.scale, (1, 1)
        planes = (high[a.index] + high[b.index]).bit_length()
    else:
        units = [x.scale for x, count in zip((a, b), counts, strict=True) if not count]
        scale = min(units) if units else 2.0**-16
        factors = (round(a.scale / scale), sign * round(b.scale / scale))
        planes = 0
    total = abs(factors[0]) * high[a.index] + abs(factors[1]) * high[b.index]
    if total >= 2**31:
        raise draft.fail(
            f"its operands differ too much in scale ({a.scale:.3g} and {b.scale:.3g}) for the "
            "fixed-point range",
            "look for a batch norm with exploded weights, or normalise both alike",
        )
    sources = (a.index, b.index)
    base = draft.write(
        ("add", sources, factors), "add" if draft.where == "the model" else f"{draft.where}.add",
        (values[a.index].shape, planes, scale, total),
        lambda name, target: Add(name, sources, factors, target),
    )  # fmt: skip
    axes = a.axes if len(a.axes) >= len(b.axes) else b.axes
    return Array(base, axes, scale, steps=steps, reduction=a.reduction, factor=a.factor)


def _in_reach(draft: Draft, a: Array, b: Array) -> tuple[Array, Array]:
    """Two values of which the currents have units so coarse that their sum fits 32 bits."""
    reach = [x.scale * draft.largest[x.index] for x in (a, b)]
    coarse = 2.0 ** math.ceil(math.log2(max(sum(reach), 1e-30) / 2**29))
    found = []
    for x, top in zip((a, b), reach, strict=True):
        current = draft.values[x.index].planes == 0 and x.scale < coarse
        bits = math.floor(math.log2(max(top / coarse, 16.0)))
        found.append(rescaled(draft, x, bits) if current else x)
    return found[0], found[1]


def lower_multiply(draft: Draft, a: Any, b: Any) -> Array | Constant:
    """``a * b``: spikes with spikes, spikes with a complement, or anything with numbers."""
    if isinstance(a, Constant):
        a, b = b, a
    if isinstance(b, Constant):
        if not isinstance(a, Array):
            raise draft.fail(
                "1 - spikes is possible within a product only",
                "multiply it with spikes, as SEW's IAND does",
            )
        return scaled(draft, a, real(torch.as_tensor(b.value)))
    function: Literal["and", "iand"] = "and"
    if isinstance(b, Complement):
        a, b = b, a
    if isinstance(a, Complement):
        function, a = "iand", a.spikes
    if not (isinstance(a, Array) and isinstance(b, Array)):
        raise draft.fail(
            "this product cannot be lowered",
            "multiply spikes with spikes, or with a positive number",
        )
    steps = _common_steps(draft, a, b)
    for x in (a, b):
        if not is_spikes(draft, x):
            raise draft.fail(
                "only spikes can be multiplied with each other", "put a neuron before it"
            )
    a, b = _alike(draft, a, b)
    sources = (a.index, b.index)
    base = draft.write(
        (function, sources), f"{draft.where}.{function}",
        (draft.values[a.index].shape, 1, 1.0, 1),
        lambda name, target: Logic(name, sources, target, function),
    )  # fmt: skip
    return Array(base, a.axes if len(a.axes) >= len(b.axes) else b.axes, 1.0, steps=steps)


def _alike(draft: Draft, a: Array, b: Array) -> tuple[Array, Array]:
    """Both operands as values of one shape, whose elements belong together."""
    if sizes(a) != sizes(b):
        shape = np.broadcast_shapes(tuple(sizes(a)), tuple(sizes(b)))
        timed = has_time(a) or has_time(b)
        a, b = (_broadcast(draft, x, shape, timed) for x in (a, b))
    one, other = ([_behind(axis) for axis in x.axes if _behind(axis)] for x in (a, b))
    stored = draft.shape(a) == draft.shape(b) and a.start == b.start
    if one == other and stored and is_whole(draft, a):
        return a, b
    return arrange(draft, a), arrange(draft, b)


def _behind(axis: tuple[Atom, ...]) -> tuple[Atom, ...]:
    """The loops of an axis within one sample."""
    return tuple(atom for atom in axis if atom.label not in "TN")


def _broadcast(draft: Draft, a: Array, shape: tuple[int, ...], timed: bool) -> Array:
    """Repeat ``a`` to the shape of what it meets; a missing time axis stays missing."""
    if timed and not has_time(a):
        if len(a.axes) == len(shape):
            kept = tuple(n if i else 1 for i, n in enumerate(shape))
        else:
            kept = shape[len(shape) - len(a.axes) :]
        return a if tuple(sizes(a)) == kept else whole(draft, expand(draft, a, kept))
    return whole(draft, expand(draft, a, shape))


def _sum_over_time(draft: Draft, a: Array, b: Array) -> Array | None:
    """Two outputs of one thing at different time steps, or a sum of such and one more."""
    if a.steps is None or b.steps is None or not a.steps.isdisjoint(b.steps):
        return None
    if has_time(a) or has_time(b) or a.factor != b.factor or a.axes != b.axes:
        return None
    one, other = settle(draft, a), settle(draft, b)
    if one.base != other.base or one.scale != other.scale or one.start != other.start:
        return None
    assert a.steps is not None
    assert b.steps is not None
    return replace(one, steps=a.steps | b.steps, reduction="sum")


def scaled(draft: Draft, a: Array, values: np.ndarray[Any, Any]) -> Array | Constant:
    """``a * values``, which goes into a pending scale or into the unit."""
    if not values.any():
        return Constant(torch.zeros(sizes(a)))
    if values.size != 1:
        return affine(draft, a, values, np.zeros(1))
    factor = float(values.reshape(-1)[0])
    if a.reduction == "sum":
        return replace(a, factor=a.factor * factor)
    if a.gain is not None and a.bias is not None:
        return replace(a, gain=a.gain * factor, bias=a.bias * factor)
    if factor <= 0:
        return affine(draft, a, values, np.zeros(1))
    return replace(a, scale=a.scale * factor)


def _plus_constant(
    draft: Draft, a: Array, c: np.ndarray[Any, Any], sign: int
) -> Array | Complement:
    """``c + sign * a``."""
    if c.size and not c.any() and sign > 0:
        return a
    if sign < 0 and is_spikes(draft, a) and c.size and bool((c == 1).all()):
        return Complement(a)
    return affine(draft, a, np.full(1, float(sign)), c)


def is_spikes(draft: Draft, a: Array) -> bool:
    """Whether it is single bits, each of which counts 1."""
    if a.gain is not None or a.scale != 1.0 or a.reduction != "none":
        return False
    return draft.values[a.index].planes == 1


def _common_steps(draft: Draft, a: Array, b: Array) -> frozenset[int] | None:
    if a.steps is not None and b.steps is not None and a.steps != b.steps:
        raise draft.fail(
            "it combines different time steps", "let only neurons carry anything over time"
        )
    return a.steps if a.steps is not None else b.steps
