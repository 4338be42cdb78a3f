"""Products of matrices: attention.

On spikes everything is an integer. ``q k^T`` counts coincidences, ``(q k^T) v`` sums counts, and a
scale such as 1/8 goes into the unit of the result. Heads are axes that channels were split into.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qsnn_ext.deploy.lowering.axes import (
    arrange,
    is_whole,
    joined,
    labels,
    lead_axes,
    permute,
    rest_axes,
    size_of,
    sizes,
)
from qsnn_ext.deploy.lowering.draft import Array, Atom, Axis, Draft
from qsnn_ext.deploy.lowering.pooling import once_per_step
from qsnn_ext.deploy.lowering.settle import rescaled, settle
from qsnn_ext.deploy.program import Matmul


def lower_matmul(draft: Draft, a: Any, b: Any) -> Array:
    """``a @ b`` over the last two axes, heads before them, time and batch in front."""
    if not (isinstance(a, Array) and isinstance(b, Array)):
        raise draft.fail(
            "a product with a constant matrix cannot be lowered",
            "make it the weight of a layer and quantize that",
        )
    if len(a.axes) != len(b.axes) or sizes(a)[:-2] != sizes(b)[:-2]:
        raise draft.fail(
            f"this product of shapes {sizes(a)} and {sizes(b)} cannot be lowered",
            "give both the same axes before the last two",
        )
    steps = {x.steps for x in (a, b) if x.steps is not None}
    if len(steps) > 1:
        raise draft.fail("it combines different time steps", "let only neurons carry anything on")
    for x in (a, b):
        draft.check_input(x)
        once_per_step(draft, x)
    lead = lead_axes(draft, a)
    if lead != lead_axes(draft, b):
        raise draft.fail("its operands differ in batch or time", "keep both alike")
    inner = size_of(a.axes[-1])
    a, b = settle(draft, a), settle(draft, b)
    # In the program the rows of a matrix are pixels. Of the product, those that are pixels already.
    rows_are_pixels = labels(a.axes[-2]) <= {"H", "W"}
    columns_are_pixels = bool(b.axes[-1]) and labels(b.axes[-1]) <= {"H", "W"}
    flipped = columns_are_pixels and not (rows_are_pixels and a.axes[-2])
    if not rows_are_pixels and not columns_are_pixels:
        # Of two that are channels: the side that a following product sums over stays channels.
        flipped = True
    first, second = (_transposed(b), _transposed(a)) if flipped else (a, b)
    first, flip_first, heads = _matrix(draft, first)
    second, flip_second, _ = _matrix(draft, second)
    high = [draft.largest[x.index] for x in (first, second)]
    if inner * high[0] * high[1] >= 2**31:
        room = 30 - inner.bit_length()
        share = room // 2
        wide = [draft.values[x.index].planes == 0 for x in (first, second)]
        first, second = (
            rescaled(draft, x, share if all(wide) else room - other.bit_length())
            if current else x
            for x, current, other in zip((first, second), wide, reversed(high), strict=True)
        )  # fmt: skip
        high = [draft.largest[x.index] for x in (first, second)]
        if inner * high[0] * high[1] >= 2**31:
            raise draft.fail(
                f"its sums may reach {inner * high[0] * high[1]}, which exceeds 32 bits",
                "use fewer tokens or heads of fewer channels",
            )
    rows, columns = first.axes[-2], second.axes[-1]
    _, h, w = draft.shape(first)
    shape = (heads * size_of(columns), h, w) if not flip_first else (
        heads * size_of(columns), size_of(rows), 1
    )  # fmt: skip
    scale = first.scale * second.scale
    counts = all(draft.values[x.index].planes for x in (first, second))
    largest = inner * high[0] * high[1]
    planes = largest.bit_length() if counts and largest < 2**16 else 0
    sources = (first.index, second.index)
    base = draft.write(
        ("matmul", sources, heads, flip_first, flip_second),
        "matmul" if draft.where == "the model" else f"{draft.where}.matmul",
        (shape, planes, scale, largest),
        lambda name, target: Matmul(name, sources, target, heads, (flip_first, flip_second)),
    )  # fmt: skip
    n = size_of(columns)
    kept = rows if not flip_first else _loops("H", rows)
    front: list[Axis] = list(lead)
    stride = heads * n
    for axis in first.axes[len(lead) : -2]:
        stride //= size_of(axis)
        front.append((Atom("C", size_of(axis), stride),) if axis else ())
    axes = (*front, kept, (Atom("C", n),) if n > 1 else ())
    product = Array(base, tuple(axes), scale, steps=next(iter(steps), None))
    return _transposed(product) if flipped else product


def _loops(label: str, axis: Axis) -> Axis:
    return (Atom(label, size_of(axis)),) if size_of(axis) > 1 else ()


def _transposed(a: Array) -> Array:
    n = len(a.axes)
    return permute(a, [*range(n - 2), n - 1, n - 2])


def _matrix(draft: Draft, a: Array) -> tuple[Array, bool, int]:
    """A tensor ``[..., heads..., i, j]`` whose value is matrices of pixels by channels.

    Returns:
        The array, whether its rows are the channels, and the number of heads.
    """
    front = len(lead_axes(draft, a))
    heads = a.axes[front:-2]
    count = 1
    for axis in heads:
        count *= size_of(axis)
    for rows, columns, flipped in ((a.axes[-2], a.axes[-1], False), (a.axes[-1], a.axes[-2], True)):
        channels = joined(tuple(atom for axis in (*heads, columns) for atom in axis))
        c, h, w = draft.shape(a)
        pixels = tuple(Atom(label, n) for label, n in (("H", h), ("W", w)) if n > 1)
        natural = channels == ((Atom("C", c),) if c > 1 else ()) and joined(rows) == pixels
        if natural and is_whole(draft, a):
            return a, flipped, count
    # Moved to [heads, columns, rows], the first two joined as channels.
    n = len(a.axes)
    moved = arrange(draft, permute(a, [*range(n - 2), n - 1, n - 2]))
    moved = replace(moved, axes=moved.axes)
    value_channels = draft.shape(moved)[0]
    if value_channels != count * size_of(a.axes[-1]) or len(rest_axes(draft, a)) != 3:
        moved = _joined_heads(draft, a, count)
    return _transposed(moved), False, count


def _joined_heads(draft: Draft, a: Array, count: int) -> Array:
    """``[..., heads..., j, i]`` with heads and j as channels, whatever was there before."""
    n = len(a.axes)
    front = len(lead_axes(draft, a))
    turned = permute(a, [*range(n - 2), n - 1, n - 2])
    together = tuple(atom for axis in turned.axes[front:-1] for atom in axis)
    flat = arrange(draft, replace(turned, axes=(*turned.axes[:front], together, turned.axes[-1])))
    rows = flat.axes[-1]
    axes: list[Axis] = []
    stride = count * size_of(a.axes[-1])
    for axis in turned.axes[front:-1]:
        stride //= max(size_of(axis), 1)
        axes.append((Atom("C", size_of(axis), stride),) if size_of(axis) > 1 else ())
    return replace(flat, axes=(*flat.axes[:front], *axes, rows))
