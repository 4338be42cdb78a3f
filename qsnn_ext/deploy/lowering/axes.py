"""Axes: what a model does to the order and shape of its tensors only relabels here.

A program works on ``[C, H, W]`` of one sample at one time step. A tensor of the model is a way to
look at such a value: every axis of it is a nest of loops over time, batch, channels, height and
width (:class:`~qsnn_ext.deploy.lowering.draft.Atom`). Reshapes regroup these loops, permutations
reorder them, slices start elsewhere or make larger steps, expansions make steps of 0. Where an
operation needs the elements in another order than they are stored in, :func:`arrange` moves them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from qsnn_ext.deploy.lowering.draft import Array, Atom, Axes, Axis, Constant, Draft, Shape
from qsnn_ext.deploy.lowering.neurons import Real
from qsnn_ext.deploy.lowering.settle import settle
from qsnn_ext.deploy.program import Gather, IntArray


def sample_axes(shape: Sequence[int], lead: str) -> tuple[Shape, Axes]:
    """``[C, H, W]`` and axes of an input whose first axes are ``lead``, "TN", "NT" or "N"."""
    front: Axes = tuple((Atom(label, shape[i]),) for i, label in enumerate(lead))
    rest = tuple(shape[len(lead) :])
    c, h, w = (rest[0], *(1,) * (3 - len(rest)), *rest[1:])
    return (c, h, w), per_sample_axes(front, (c, h, w), len(rest))


def full(label: str, size: int) -> Axis:
    """A whole axis of a value."""
    return (Atom(label, size),) if size > 1 else ()


def per_sample_axes(lead: Axes, shape: Shape, rank: int) -> Axes:
    """``lead``, then a value's ``[C, H, W]`` as the ``rank`` axes a tensor has per sample."""
    c, h, w = (full(label, size) for label, size in zip("CHW", shape, strict=True))
    if rank == 1:
        return (*lead, (*c, *h, *w))
    if rank == 2:
        return (*lead, c, (*h, *w))
    return (*lead, c, h, w)


def sizes(a: Array) -> list[int]:
    """Shape of the tensor in the model."""
    return [size_of(axis) for axis in a.axes]


def size_of(axis: Axis) -> int:
    """Length of an axis."""
    return math.prod(atom.size for atom in axis)


def labels(axis: Axis) -> set[str]:
    """What an axis runs over."""
    return {atom.label for atom in axis}


def has_time(a: Array) -> bool:
    """Whether some axis of it is time."""
    return any("T" in labels(axis) for axis in a.axes)


def lead_axes(draft: Draft, a: Array) -> Axes:
    """Time and batch axes, in front of the axes of one sample."""
    count = 0
    while count < len(a.axes) and a.axes[count] and labels(a.axes[count]) <= {"T", "N"}:
        count += 1
    if any(labels(axis) & {"T", "N"} for axis in a.axes[count:]):
        raise draft.fail(
            "its batch or time axis is not in front",
            "permute the axes to [T, N, ...] before it",
        )
    return a.axes[:count]


def rest_axes(draft: Draft, a: Array) -> Axes:
    """The axes of one sample, behind those of time and batch."""
    return a.axes[len(lead_axes(draft, a)) :]


def joined(axis: Axis) -> Axis:
    """The same loops, with those that are one put together."""
    atoms: list[Atom] = []
    for atom in axis:
        if atom.size == 1 and atom.label in "CHW":
            continue
        last = atoms[-1] if atoms else None
        if last and last.label == atom.label and last.stride == atom.size * atom.stride:
            atoms[-1] = Atom(atom.label, last.size * atom.size, atom.stride)
        else:
            atoms.append(atom)
    return tuple(atoms)


def flatten(a: Array, start: int, end: int) -> Array:
    """Join the axes from ``start`` to ``end``."""
    rank = len(a.axes)
    start, end = start % rank, end % rank
    merged = joined(tuple(atom for axis in a.axes[start : end + 1] for atom in axis))
    return replace(a, axes=(*a.axes[:start], merged, *a.axes[end + 1 :]))


def regroup(draft: Draft, a: Array, shape: Sequence[int]) -> Array:
    """A reshape to ``shape``: the same loops in the same order, grouped into other axes."""
    atoms = [atom for axis in a.axes for atom in axis]
    axes: list[Axis] = []
    for size, following in zip(shape, [*shape[1:], 0], strict=True):
        group: list[Atom] = []
        product = 1
        while product < size and atoms:
            atom = atoms.pop(0)
            if size % (product * atom.size) and product * atom.size > 1:
                inner = product * atom.size // size if product * atom.size % size == 0 else 0
                if inner < 1 or atom.label in "TN":
                    raise draft.fail(
                        f"a reshape from {sizes(a)} to {list(shape)} mixes the batch or time with "
                        "other axes, or parts of axes",
                        "let a reshape keep the batch and time as they are",
                    )
                outer = atom.size // inner
                atoms.insert(0, Atom(atom.label, inner, atom.stride))
                atom = Atom(atom.label, outer, atom.stride * inner)
            group.append(atom)
            product *= atom.size
        if size == 1 and atoms and atoms[0].size == 1:
            group.append(atoms.pop(0))
        # A batch of one goes with the time in front of it, not with the channels behind it.
        while following != 1 and group and atoms and atoms[0].size == 1:
            if not {group[-1].label, atoms[0].label} <= {"T", "N"}:
                break
            group.append(atoms.pop(0))
        if product != size:
            raise draft.fail(
                f"a reshape from {sizes(a)} to {list(shape)} mixes axes",
                "let a reshape join neighbouring axes, or split one",
            )
        axes.append(joined(tuple(group)))
    if axes and all(atom.size == 1 for atom in atoms):
        axes[-1] = (*axes[-1], *atoms)
        atoms = []
    if atoms:
        raise draft.fail(
            f"a reshape to {list(shape)} loses elements", "only join or split neighbouring axes"
        )
    return replace(a, axes=tuple(axes))


def permute(a: Array, order: Sequence[int]) -> Array:
    """The axes in another order."""
    return replace(a, axes=tuple(a.axes[i % len(a.axes)] for i in order))


def expand(draft: Draft, a: Array, shape: Sequence[int]) -> Array:
    """Repetition along axes of size 1, or along new ones in front; a new first one is time.

    An axis in front of a tensor without time is time: the input is shown at every step.
    """
    old: list[Axis] = [() for _ in range(len(shape) - len(a.axes))] + list(a.axes)
    axes: list[Axis] = []
    steps = a.steps
    for place, (axis, size) in enumerate(zip(old, shape, strict=True)):
        if size == size_of(axis):
            axes.append(axis)
        elif axis and size_of(axis) > 1:
            raise draft.fail("this repetition cannot be lowered", "repeat along an axis of size 1")
        elif not axis and not has_time(a) and _adds_time(draft, a, old, place):
            axes.append((Atom("T", size),))
            steps = None
        elif labels(axis) & {"T", "N"} or place == 0:
            raise draft.fail(
                "it repeats the batch or a time step", "repeat the input over time, as a first axis"
            )
        else:
            axes.append((Atom("C", size, 0),))
    return replace(a, axes=tuple(axes), steps=steps)


def _adds_time(draft: Draft, a: Array, axes: Sequence[Axis], place: int) -> bool:
    """Whether an axis to be repeated lies in front of a sample, and is none of its own."""
    _, h, w = draft.shape(a)
    own = 1 if (h, w) == (1, 1) else draft.rank
    batch = sum(labels(axis) == {"N"} for axis in axes)
    in_front = all(labels(axis) == {"N"} for axis in axes[:place])
    return in_front and len(axes) - batch > own


def select(draft: Draft, a: Array, index: Any) -> Array:
    """``a[index]`` with numbers, slices, ``None`` and ``...``."""
    parts = list(index) if isinstance(index, tuple) else [index]
    given = sum(p is not None and p is not Ellipsis for p in parts)
    if Ellipsis not in [p for p in parts if not isinstance(p, (torch.Tensor, Constant))]:
        parts.append(Ellipsis)
    at = next(i for i, p in enumerate(parts) if p is Ellipsis)
    parts[at : at + 1] = [slice(None)] * (len(a.axes) - given)
    dims = [dim for dim, part in enumerate(parts) if part is not None]
    for place, dim in enumerate(dims):  # slices of axes that were joined move elements
        part, axis = parts[dim], a.axes[place]
        plain = isinstance(part, int | slice) and not isinstance(part, bool)
        if len(axis) < 2 or labels(axis) & {"T", "N"} or not plain or part == slice(None):
            continue
        chosen = range(size_of(axis))[part]
        a = pick(draft, a, place, [chosen] if isinstance(chosen, int) else list(chosen))
        parts[dim] = 0 if isinstance(chosen, int) else slice(None)
    axes: list[Axis] = []
    source = iter(a.axes)
    for part in parts:
        if part is None:
            axes.append(())
            continue
        axis = next(source)
        if isinstance(part, bool) or not isinstance(part, int | slice):
            raise draft.fail(
                "indexing with a list or tensor cannot be lowered", "index with numbers and slices"
            )
        if isinstance(part, slice) and part == slice(None):
            axes.append(axis)
            continue
        if not axis and part == 0:
            continue
        a, taken = _cut(draft, a, axis, part)
        if isinstance(part, slice):
            axes.append(taken)
    return replace(a, axes=tuple(axes))


def _cut(draft: Draft, a: Array, axis: Axis, part: int | slice) -> tuple[Array, Axis]:
    """One element or a slice of an axis: the array with another start, and what is left of it."""
    size = size_of(axis)
    places = range(size)[part] if isinstance(part, slice) else [range(size)[part]]
    if not places:
        raise draft.fail("a slice of it is empty", "leave the slice out")
    if len(places) == size and places[0] == 0:
        return a, axis
    if labels(axis) == {"T"} and len(axis) == 1:
        known = sorted(a.steps) if a.steps is not None else list(range(size))
        chosen = [known[place] for place in places]
        if chosen != sorted(set(chosen)):
            raise draft.fail("it takes time steps in another order", "keep them ascending")
        return replace(a, steps=frozenset(chosen)), (Atom("T", len(places)),)
    if "N" in labels(axis) or "T" in labels(axis):
        raise draft.fail("it picks samples of the batch", "answer for every sample alike")
    atom = axis[0]
    start = list(a.start)
    start["CHW".index(atom.label)] += places[0] * atom.stride
    step = places[1] - places[0] if len(places) > 1 else 1
    taken = joined((Atom(atom.label, len(places), atom.stride * step),))
    return replace(a, start=(start[0], start[1], start[2])), taken


def stack(draft: Draft, items: Sequence[Any], dim: int) -> Array:
    """The outputs of all time steps, along a new axis."""
    if not items or not all(isinstance(a, Array) for a in items):
        raise draft.fail(
            "this stack cannot be lowered",
            "stack the outputs of time steps",
        )
    arrays = [settle(draft, a) for a in items]
    first = arrays[0]
    steps: list[int] = []
    for t, a in enumerate(arrays):
        if (a.base, a.axes, a.start) != (first.base, first.axes, first.start) or has_time(a):
            raise draft.fail(
                "it stacks something else than one output at several time steps",
                "stack that alone, the steps in order",
            )
        steps += sorted(a.steps) if a.steps is not None and len(a.steps) == 1 else [t]
    if steps != sorted(set(steps)):
        raise draft.fail("it stacks time steps in another order", "stack them in order")
    at = dim % (len(first.axes) + 1)
    axes = (*first.axes[:at], (Atom("T", len(arrays)),), *first.axes[at:])
    whole = steps == list(range(len(steps)))
    return replace(first, axes=axes, steps=None if whole else frozenset(steps))


# --------------------------------------------------------------------------- the order in store


def is_natural(draft: Draft, a: Array) -> bool:
    """Whether the axes of one sample are channels, height and width as they are stored."""
    rest = rest_axes(draft, a)
    expected = per_sample_axes((), draft.shape(a), len(rest))
    return 1 <= len(rest) <= 3 and rest == expected and a.start == (0, 0, 0)


def is_whole(draft: Draft, a: Array) -> bool:
    """Whether it shows every element of its value exactly once."""
    if a.start != (0, 0, 0):
        return False
    for label, size in zip("CHW", draft.shape(a), strict=True):
        loops = sorted(
            (atom for axis in a.axes for atom in axis if atom.label == label),
            key=lambda atom: atom.stride,
        )
        reached = 1
        for atom in loops:
            if atom.stride != reached:
                return False
            reached *= atom.size
        if reached != size:
            return False
    return True


def loops(draft: Draft, a: Array) -> list[list[int]]:
    """``[size, stride]`` of the loops over one sample's elements as stored, outermost first."""
    _, h, w = draft.shape(a)
    unit = {"C": h * w, "H": w, "W": 1}
    return [
        [atom.size, atom.stride * unit[atom.label]] for axis in rest_axes(draft, a) for atom in axis
    ]


def natural(draft: Draft, a: Array) -> Array:
    """The array, stored in the order that the model sees it in."""
    return a if is_natural(draft, a) else arrange(draft, a)


def whole(draft: Draft, a: Array) -> Array:
    """The array, as a value of its own elements and no others."""
    return a if is_whole(draft, a) else arrange(draft, a, heads=True)


def arrange(draft: Draft, a: Array, heads: bool = False) -> Array:
    """Move the elements into the order in which the model sees them.

    The result's channels, height and width are the axes of one sample; of more than three the
    first are joined.

    Args:
        draft: The program so far.
        a: The array.
        heads: Join all axes in front that channels were split into.
    """
    draft.check_input(a)
    a = settle(draft, a)
    lead, rest = lead_axes(draft, a), rest_axes(draft, a)
    while len(rest) > 3 or (
        heads and len(rest) > 1 and all(labels(axis) <= {"C"} for axis in rest[:2])
    ):
        rest = ((*rest[0], *rest[1]), *rest[2:])
    groups: tuple[Axis, ...] = {1: (*rest, (), ()), 2: (*rest[:1], (), *rest[1:])}.get(
        len(rest), rest
    ) or ((), (), ())
    shape = (size_of(groups[0]), size_of(groups[1]), size_of(groups[2]))
    _, h, w = draft.shape(a)
    unit = {"C": h * w, "H": w, "W": 1}
    start = a.start[0] * h * w + a.start[1] * w + a.start[2]
    tables = []
    for group in groups:
        table = np.zeros(1, np.int64)
        for atom in group:
            step = np.arange(atom.size) * atom.stride * unit[atom.label]
            table = np.add.outer(table, step).reshape(-1)
        tables.append(table)
    # What runs backwards counts from its end: every table holds numbers of 0 or more.
    for table in tables:
        start += int(table.min())
        table -= table.min()
    tables[0] += start
    base = gather(draft, a.index, shape, tables)
    axes: list[Axis] = []
    for label, axis in zip("CHW", groups, strict=True):
        stride = size_of(axis)
        for atom in axis:
            stride //= atom.size
            axes.append((Atom(label, atom.size, stride),))
    loops_of = iter(axes)
    seen = tuple(joined(tuple(next(loops_of)[0] for _ in axis)) for axis in rest_axes(draft, a))
    return replace(a, base=base, axes=(*lead, *seen), start=(0, 0, 0), raw=False)


def gather(draft: Draft, source: int, shape: Shape, tables: Sequence[IntArray]) -> int:
    """A value of other elements of ``source``: see :class:`~qsnn_ext.deploy.program.Gather`."""
    channel, row, column = (table.astype(np.int32) for table in tables)
    value = draft.values[source]
    key = ("gather", source, shape, channel.tobytes(), row.tobytes(), column.tobytes())
    name = "arrange" if draft.where == "the model" else f"{draft.where}.arrange"
    return draft.write(
        key, name, (shape, value.planes, value.scale, draft.largest[source]),
        lambda name, target: Gather(name, source, target, channel, row, column),
    )  # fmt: skip


def pick(draft: Draft, a: Array, dim: int, index: Sequence[int]) -> Array:
    """Elements ``index`` along an axis of a sample, in any order; -1 is a zero."""
    if labels(a.axes[dim]) & {"T", "N"}:
        raise draft.fail("it reorders the batch or time steps", "leave both as they are")
    draft.check_input(a)
    a = settle(draft, a)
    front = len(lead_axes(draft, a))
    # The axis in front of a sample becomes the channels.
    order = [*range(front), dim, *(i for i in range(front, len(a.axes)) if i != dim)]
    moved = natural(draft, permute(a, order))
    c, h, w = draft.shape(moved)
    if c != size_of(moved.axes[front]):
        moved = arrange(draft, moved)
        c, h, w = draft.shape(moved)
    table = np.array([i * h * w if i >= 0 else -1 for i in index], np.int64)
    shape = (len(index), h, w)
    base = gather(draft, moved.index, shape, [table, np.arange(h) * w, np.arange(w)])
    axes = (*moved.axes[:front], full("C", len(index)), *moved.axes[front + 1 :])
    picked = replace(moved, base=base, axes=axes, raw=False)
    return permute(picked, [order.index(i) for i in range(len(order))])


def padded_index(draft: Draft, n: int, before: int, after: int, mode: str) -> list[int]:
    """Which of ``n`` elements stand where after padding; -1 is a zero."""
    places = np.arange(-before, n + after)
    if mode == "constant":
        found = np.where((places >= 0) & (places < n), places, -1)
    elif mode == "circular":
        found = places % n
    elif mode == "replicate":
        found = np.clip(places, 0, n - 1)
    elif mode == "reflect":
        period = max(2 * (n - 1), 1)
        found = np.abs((places + n - 1) % period - (n - 1)) if n > 1 else np.zeros_like(places)
    else:
        raise draft.fail(f"padding of mode {mode!r} cannot be lowered", "pad with zeros")
    return [int(i) for i in found]


def along(draft: Draft, a: Array, values: Real, what: str) -> Real:
    """Numbers that ``a`` is added to or multiplied with, as one for all channels or one for each.

    Args:
        draft: The program so far.
        a: The array.
        values: Numbers of a shape that broadcasts to that of ``a``.
        what: What they are, for the error.

    Returns:
        ``[1]`` or ``[C]``, in the order of the value's channels.
    """
    if values.size == 1 or (values == values.flat[0]).all():
        return np.array([values.flat[0]], np.float64)
    rank = len(a.axes)
    values = values.reshape((1,) * (rank - values.ndim) + values.shape)
    channel = np.full((1,) * rank, a.start[0])
    wanted = [1] * rank
    for place, axis in enumerate(a.axes):
        atoms = [atom for atom in axis if atom.size > 1]
        if atoms and all(atom.label == "C" for atom in atoms):
            wanted[place] = size_of(axis)
            number = np.zeros(1, np.int64)
            for atom in atoms:
                number = np.add.outer(number, np.arange(atom.size) * atom.stride).reshape(-1)
            channel = channel + number.reshape([-1 if i == place else 1 for i in range(rank)])
        elif values.shape[place] > 1:
            first = values.take([0], axis=place)
            if not (values == first).all():
                raise draft.fail(
                    f"{what} that differ along another axis than the channels cannot be lowered",
                    "give one number, or one per channel",
                )
            values = first
    per_channel = np.full(draft.shape(a)[0], np.nan)
    per_channel[channel.reshape(-1)] = np.broadcast_to(values, wanted).reshape(-1)
    if np.isnan(per_channel).any():
        raise draft.fail(f"{what} meet some of the channels only", "apply them to all, or to none")
    return per_channel
