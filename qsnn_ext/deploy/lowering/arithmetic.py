"""Sums, products and scalings of tensors: residual connections, SEW's AND and IAND."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch

from qsnn_ext.deploy.lowering.draft import Array, Complement, Constant, Draft
from qsnn_ext.deploy.lowering.settle import settle
from qsnn_ext.deploy.program import Add, Logic


def lower_add(draft: Draft, a: Any, b: Any, sign: int = 1) -> Array | Complement:
    """``a + sign * b`` of arrays and constants."""
    if isinstance(a, Constant) and isinstance(b, Array):
        return _plus_constant(draft, b, a, sign)
    if isinstance(b, Constant) and isinstance(a, Array):
        if sign < 0:
            raise draft.fail(
                "subtracting a constant cannot be lowered", "put it into a layer's bias"
            )
        return _plus_constant(draft, a, b, 1)
    if not (isinstance(a, Array) and isinstance(b, Array)):
        raise draft.fail(
            "this sum cannot be lowered",
            "add tensors of the network; 1 - spikes is possible within a product only",
        )
    if sign > 0 and a.steps is not None and b.steps is not None and a.steps.isdisjoint(b.steps):
        one, other = settle(draft, a), settle(draft, b)
        if one.base == other.base and a.scale == b.scale and a.factor == b.factor:
            # A sum over time so far.
            return replace(one, steps=a.steps | b.steps, reduction="sum")
    steps = _common_steps(draft, a, b)
    if (a.reduction, a.factor) != (b.reduction, b.factor):
        raise draft.fail(
            "it adds a sum over time to something else", "sum or average over time last"
        )
    a, b = settle(draft, a), settle(draft, b)
    values, high = draft.values, draft.largest
    if values[a.index].shape != values[b.index].shape:
        raise draft.fail(
            "it adds values of different shapes", "bring both to one shape; nothing broadcasts"
        )
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


def lower_multiply(draft: Draft, a: Any, b: Any) -> Array:
    """``a * b``: spikes with spikes, spikes with a complement, or anything with a number."""
    if isinstance(a, Constant):
        a, b = b, a
    if isinstance(b, Constant):
        if torch.as_tensor(b.value).numel() != 1 or not isinstance(a, Array):
            raise draft.fail(
                "multiplying by a tensor cannot be lowered",
                "put the factors into a batch norm or a layer's weights",
            )
        return _scaled(draft, a, float(b.value))
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
        if not _is_spikes(draft, x):
            raise draft.fail(
                "only spikes can be multiplied with each other", "put a neuron before it"
            )
    sources = (a.index, b.index)
    base = draft.write(
        (function, sources), f"{draft.where}.{function}",
        (draft.values[a.index].shape, 1, 1.0, 1),
        lambda name, target: Logic(name, sources, target, function),
    )  # fmt: skip
    return Array(base, a.axes, 1.0, steps=steps)


def _scaled(draft: Draft, a: Array, factor: float) -> Array:
    """``a * factor``, which goes into a pending scale or into the unit."""
    if a.reduction == "sum":
        return replace(a, factor=a.factor * factor)
    if a.gain is not None and a.bias is not None:
        return replace(a, gain=a.gain * factor, bias=a.bias * factor)
    if factor <= 0:
        raise draft.fail(
            "multiplying by a number that is not positive cannot be lowered",
            "put it into a batch norm or a layer's weights",
        )
    return replace(a, scale=a.scale * factor)


def _plus_constant(draft: Draft, a: Array, c: Constant, sign: int) -> Array | Complement:
    """``c + sign * a``."""
    value = torch.as_tensor(c.value).detach().to(torch.float64)
    if sign > 0 and value.numel() and bool((value == 0).all()):
        return a
    if sign < 0 and isinstance(a.base, int) and value.numel() == 1 and float(value) == 1.0:
        return Complement(a)
    raise draft.fail("adding a constant cannot be lowered", "put it into a layer's bias")


def _is_spikes(draft: Draft, a: Array) -> bool:
    if a.gain is not None or a.scale != 1.0 or a.reduction != "none":
        return False
    return draft.values[a.index].planes == 1


def _common_steps(draft: Draft, a: Array, b: Array) -> frozenset[int] | None:
    if a.steps is not None and b.steps is not None and a.steps != b.steps:
        raise draft.fail(
            "it combines different time steps", "let only neurons carry anything over time"
        )
    return a.steps if a.steps is not None else b.steps
