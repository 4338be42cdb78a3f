"""Axes: reshapes, indexing and stacking move no data, they only relabel.

A program works on ``[C, H, W]`` of one sample at one time step. Whatever the model does to the
order of its axes must therefore be a way to look at those, with time and batch in front. Anything
that would move data is refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from qsnn_ext.deploy.lowering.draft import Array, Atom, Axes, Axis, Draft, Shape
from qsnn_ext.deploy.lowering.settle import settle


def sample_axes(sample: torch.Size, time_first: bool) -> tuple[Shape, Axes]:
    """``[C, H, W]`` and axes of an input ``[N, ...]`` or ``[T, N, ...]``; 1 to 3 axes a sample."""
    lead: Axes = ((("T", sample[0]),),) if time_first else ()
    lead = (*lead, (("N", sample[len(lead)]),))
    rest = sample[len(lead) :]
    c, h, w = (rest[0], *(1,) * (3 - len(rest)), *rest[1:])
    return (c, h, w), per_sample_axes(lead, (c, h, w), len(rest))


def per_sample_axes(lead: Axes, shape: Shape, rank: int) -> Axes:
    """``lead``, then a value's ``[C, H, W]`` as the ``rank`` axes a tensor has per sample."""
    c, h, w = shape
    if rank == 1:
        return (*lead, (("C", c), ("H", h), ("W", w)))
    if rank == 2:
        return (*lead, (("C", c),), (("H", h), ("W", w)))
    return (*lead, (("C", c),), (("H", h),), (("W", w),))


def sizes(a: Array) -> list[int]:
    """Shape of the tensor in the model."""
    return [math.prod(n for _, n in axis) for axis in a.axes]


def labels(axis: Axis) -> set[str]:
    """What an axis runs over."""
    return {label for label, _ in axis}


def lead_axes(draft: Draft, a: Array) -> Axes:
    """Time and batch axes, in front of the axes of one sample."""
    lead = tuple(x for x in a.axes if x and labels(x) <= {"T", "N"})
    if lead != a.axes[: len(lead)]:
        raise draft.fail(
            "its batch or time axis is not in front",
            "permute the axes to [T, N, ...] before it",
        )
    return lead


def rank_per_sample(draft: Draft, a: Array) -> int:
    """Number of axes besides time and batch."""
    return len(a.axes) - len(lead_axes(draft, a))


def spatial_axes(draft: Draft, a: Array) -> Axes:
    """Axes of one sample, checked to be in the order channels, height, width."""
    rest = a.axes[len(lead_axes(draft, a)) :]
    flat = [atom for axis in rest for atom in axis if atom[0] in "CHW"]
    expected = list(zip("CHW", draft.shape(a), strict=True))
    if [f for f in flat if f[1] != 1] != [e for e in expected if e[1] != 1]:
        raise draft.fail(
            f"its input axes {a.axes} are not channels, height, width in order",
            "keep that order; a program moves no data",
        )
    return rest


def flatten(a: Array, start: int, end: int) -> Array:
    """Join the axes from ``start`` to ``end``."""
    rank = len(a.axes)
    start, end = start % rank, end % rank
    merged = tuple(atom for axis in a.axes[start : end + 1] for atom in axis)
    return replace(a, axes=(*a.axes[:start], merged, *a.axes[end + 1 :]))


def regroup(draft: Draft, a: Array, shape: Sequence[int]) -> Array:
    """A reshape to ``shape``: the same atoms in the same order, grouped into other axes."""
    atoms = [atom for axis in a.axes for atom in axis]
    axes: list[Axis] = []
    at = 0
    for size in shape:
        group: list[Atom] = []
        product = 1
        while product < size and at < len(atoms):
            group.append(atoms[at])
            product *= atoms[at][1]
            at += 1
        if size == 1 and at < len(atoms) and atoms[at][1] == 1:
            group.append(atoms[at])
            at += 1
        if product != size:
            raise draft.fail(
                f"a reshape from {a.axes} to {list(shape)} splits an axis",
                "only join neighbouring axes, as Flatten does, or split what was joined",
            )
        axes.append(tuple(group))
    while at < len(atoms) and atoms[at][1] == 1 and axes:
        axes[-1] = (*axes[-1], atoms[at])
        at += 1
    if at != len(atoms):
        raise draft.fail(
            f"a reshape to {list(shape)} loses elements", "only join or split neighbouring axes"
        )
    return replace(a, axes=tuple(axes))


def expand(draft: Draft, a: Array, shape: Sequence[int]) -> Array:
    """Showing a still input at every step: a new first axis is time."""
    new, old = list(shape), sizes(a)
    time: Axis = (("T", new[0]),)
    if new[1:] == old:
        return replace(a, axes=(time, *a.axes), steps=None)
    if len(new) == len(old) and new[1:] == old[1:] and old[0] == 1 and not a.axes[0]:
        return replace(a, axes=(time, *a.axes[1:]), steps=None)
    if new == old:
        return a
    raise draft.fail(
        "this expansion cannot be lowered", "only repeat the input over time, as a first axis"
    )


def select(draft: Draft, a: Array, index: Any, shape: Sequence[int]) -> Array:
    """``a[index]``, of the given shape: one time step, or a new axis of size 1."""
    if isinstance(index, tuple) and index and isinstance(index[0], int):
        if any(i != slice(None) for i in index[1:]):
            raise draft.fail("indexing into a sample cannot be lowered", "index time steps only")
        index = index[0]
    if isinstance(index, int) and a.axes and labels(a.axes[0]) == {"T"}:
        steps = a.axes[0][0][1]
        return replace(a, axes=a.axes[1:], steps=frozenset([index % steps]))
    if _adds_axes(index):
        return regroup(draft, a, shape)
    raise draft.fail(
        "indexing or slicing can only be lowered over time steps",
        "crop or select outside the model",
    )


def _adds_axes(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return None in parts and all(p is None or p is Ellipsis or p == slice(None) for p in parts)


def stack(draft: Draft, items: Sequence[Any], dim: int) -> Array:
    """The outputs of all time steps, along a new first axis."""
    if not all(isinstance(a, Array) for a in items) or dim != 0:
        raise draft.fail(
            "this stack cannot be lowered",
            "stack the outputs of all time steps along the first axis",
        )
    arrays = [settle(draft, a) for a in items]
    first = arrays[0]
    for t, a in enumerate(arrays):
        if a.base != first.base or (a.steps is not None and a.steps != frozenset([t])):
            raise draft.fail(
                "it stacks something else than one output at every time step",
                "stack that alone, all steps in order",
            )
    return replace(first, axes=((("T", len(arrays)),), *first.axes), steps=None)
