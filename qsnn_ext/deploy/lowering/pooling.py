"""Poolings and means: maxima and sums over windows, over features, and over time.

An average is a sum whose divisor goes into the scale of the result.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
from torch import nn

from qsnn_ext.deploy.lowering.axes import (
    arrange,
    full,
    labels,
    lead_axes,
    natural,
    per_sample_axes,
    rest_axes,
    size_of,
    whole,
)
from qsnn_ext.deploy.lowering.draft import Array, Axis, Draft, Geometry, PendingConv, Shape
from qsnn_ext.deploy.lowering.settle import rescaled, settle
from qsnn_ext.deploy.program import Pool, output_size

_ONE_DIMENSIONAL = (nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d)


def lower_pool(draft: Draft, module: Any, x: Array) -> Array:
    """Any pooling layer of torch that has windows of equal size here."""
    one = isinstance(module, _ONE_DIMENSIONAL)
    if getattr(module, "return_indices", False):
        raise draft.fail("return_indices cannot be lowered", "pool without it")
    x = natural(draft, settle(draft, x))
    if one and draft.shape(x)[1] > 1 and "C" not in labels(x.axes[-1]):
        x = arrange(draft, x)  # rows that were flattened become one
    _, h, w = draft.shape(x)
    over_features = one and (h, w) == (1, 1) and "C" in labels(x.axes[-1])
    if isinstance(module, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d):
        size = module.output_size
        if over_features:
            raise draft.fail(
                "adaptive pooling over features cannot be lowered",
                "average groups of them (AvgPool1d or VotingLayer)",
            )
        if one:
            wanted: Any = (None, size[0] if isinstance(size, tuple | list) else size)
        else:
            wanted = size if isinstance(size, tuple | list) else (size, size)
        out = (h if wanted[0] is None else wanted[0], w if wanted[1] is None else wanted[1])
        return _adaptive(draft, x, out, isinstance(module, nn.AdaptiveMaxPool2d))
    if over_features:
        return _vote(draft, module, x)
    kernel = _pair(module.kernel_size, one, 1)
    stride = _pair(module.stride if module.stride is not None else module.kernel_size, one, 1)
    vertical, horizontal = _pair(module.padding, one, 0)
    padding = (vertical, horizontal, vertical, horizontal)
    function: Literal["max", "sum"] = "max"
    if isinstance(module, nn.AvgPool1d | nn.AvgPool2d):
        function = "sum"
        if getattr(module, "divisor_override", None):
            raise draft.fail("divisor_override cannot be lowered", "pool without it")
        if (vertical or horizontal) and not module.count_include_pad:
            raise draft.fail(
                "count_include_pad=False divides by a different number at the edge",
                "set count_include_pad=True, or pool without padding",
            )
    elif _pair(module.dilation, one, 1) != (1, 1):
        raise draft.fail("dilated pooling cannot be lowered", "pool with dilation=1")
    if module.ceil_mode:
        for size, k, s, p in zip((h, w), kernel, stride, (vertical, horizontal), strict=True):
            if (size + 2 * p - k) % s:
                raise draft.fail(
                    "ceil_mode adds a partial window here",
                    "turn it off and pad the input instead",
                )
    if function == "max":
        once_per_step(draft, x)
    return _window(draft, x, function, kernel, stride, padding)


def once_per_step(draft: Draft, x: Array) -> None:
    """Refuse what must happen at every step, behind a sum over time."""
    if x.reduction != "none":
        raise draft.fail(
            "it follows a sum over time, so it would run once per sequence",
            "sum or average over time last",
        )


def lower_mean(draft: Draft, a: Array, dims: Any, total: bool, keepdim: bool = False) -> Array:
    """``a.mean(dims)``, or ``a.sum(dims)`` if ``total``: over time, pixels or channels."""
    if dims is None:
        raise draft.fail(
            "a mean over everything cannot be lowered",
            "name the axes: time, or height and width",
        )
    listed = [dims] if isinstance(dims, int) else list(dims)
    chosen = sorted(d % len(a.axes) for d in listed)
    over = {d: labels(a.axes[d]) for d in chosen}
    if any("N" in found for found in over.values()):
        raise draft.fail(
            "a mean over the batch makes a sample depend on its batch",
            "average over time, height, width or channels",
        )
    draft.check_input(a)
    a = whole(draft, settle(draft, a))
    over = {d: labels(a.axes[d]) for d in chosen}
    pixels = [d for d in chosen if over[d] and over[d] <= {"H", "W"}]
    if pixels:
        a = _over_pixels(draft, a, pixels, total)
    for d in chosen:
        if over[d] == {"C"}:
            a = _over_channels(draft, a, d, total)
        elif over[d] == {"T"}:
            a = _over_time(draft, a, d, total)
        elif over[d] and d not in pixels:
            raise draft.fail(
                "it averages an axis that joins time or channels with others",
                "average before joining them",
            )
    axes = [() if d in chosen else axis for d, axis in enumerate(a.axes)]
    if not keepdim:
        axes = [axis for d, axis in enumerate(axes) if d not in chosen]
    return replace(a, axes=tuple(axes))


def _over_time(draft: Draft, a: Array, dim: int, total: bool) -> Array:
    steps = size_of(a.axes[dim])
    known = a.steps if a.steps is not None else frozenset(range(steps))
    draft.steps = max(draft.steps, *(step + 1 for step in known))
    return replace(a, reduction="sum", factor=1.0 if total else 1.0 / steps, steps=known)


def _over_pixels(draft: Draft, a: Array, dims: list[int], total: bool) -> Array:
    """A sum over height, width, or both, each as a whole; their axes are left with size 1."""
    _, h, w = draft.shape(a)
    found = {atom.label: atom for d in dims for atom in a.axes[d]}
    count = sum(len(a.axes[d]) for d in dims)
    sizes = {"H": h, "W": w}
    at_once = all(found[k].size == sizes[k] and found[k].stride == 1 for k in found)
    if not at_once or len(found) != count or a.start != (0, 0, 0):
        a = arrange(draft, a)
        _, h, w = draft.shape(a)
        found = {atom.label: atom for d in dims for atom in a.axes[d]}
        if "C" in found:
            raise draft.fail("this mean cannot be lowered", "average height and width only")
    kernel = (h if "H" in found else 1, w if "W" in found else 1)
    before = a.axes
    pooled = _window(draft, a, "sum", kernel, kernel, (0, 0, 0, 0))
    if total:
        pooled = replace(pooled, scale=pooled.scale * kernel[0] * kernel[1])
    return replace(pooled, axes=tuple(() if d in dims else axis for d, axis in enumerate(before)))


def _over_channels(draft: Draft, a: Array, dim: int, total: bool) -> Array:
    """A sum over an axis that channels were split into, or over all of them."""
    a = whole(draft, a)
    c, h, w = draft.shape(a)
    axis = a.axes[dim]
    if len(axis) > 1 or axis[0].stride < 0:
        raise draft.fail("this mean cannot be lowered", "average the axes of a plain reshape")
    n, stride = axis[0].size, axis[0].stride
    source, outputs = a.index, c // n
    if draft.values[source].planes == 0 and source != draft.input:
        raise draft.fail("averaging channels needs spikes as its input", "put a neuron before it")
    key = ("channels", source, n, stride)
    if key not in draft.convolutions:
        if stride == 1:
            weight, groups = np.ones((outputs, n, 1), np.int8), outputs
        else:
            channel, target = np.arange(c), np.arange(outputs)
            kept = channel // (n * stride) * stride + channel % stride
            weight, groups = (kept[:, None] == target).astype(np.int8)[None], 1
        draft.convolutions[key] = PendingConv(
            draft.where, source, weight, (1, 1), Geometry(groups=groups), (outputs, h, w),
            n * draft.largest[source],
        )  # fmt: skip
    unit = a.scale if total else a.scale / n
    axes: list[Axis] = []
    for d, other in enumerate(a.axes):
        atoms = tuple(
            atom._replace(stride=atom.stride // n)
            if atom.label == "C" and atom.stride >= n * stride
            else atom
            for atom in other
        )
        axes.append(() if d == dim else atoms)
    return replace(
        a, base=draft.convolutions[key], gain=np.full(outputs, unit), bias=np.zeros(outputs),
        axes=tuple(axes), origin=draft.where,
    )  # fmt: skip


def repeat_pixels(draft: Draft, a: Array, factors: list[int]) -> Array:
    """Every pixel ``factors`` times along the axes of the tensor."""
    kernel = (factors[-2] if len(factors) > 2 else 1, factors[-1])
    a = natural(draft, settle(draft, a))
    if any(f != 1 for f in factors[:-2]) or len(rest_axes(draft, a)) < 2:
        raise draft.fail("it repeats channels or samples", "interpolate height and width only")
    if len(rest_axes(draft, a)) == 2:
        a = arrange(draft, a) if draft.shape(a)[1] > 1 else a
        kernel = (1, kernel[1])
    return _window(draft, a, "repeat", kernel, (1, 1), (0, 0, 0, 0))


def _pair(value: Any, one: bool, across: int) -> tuple[int, int]:
    """(vertical, horizontal) of a setting; ``across`` is the vertical one of one dimension."""
    listed = isinstance(value, tuple | list)
    if one:
        return across, int(value[0] if listed else value)
    return (int(value[0]), int(value[1])) if listed else (int(value), int(value))


def _adaptive(draft: Draft, x: Array, out: tuple[int, int], maximum: bool) -> Array:
    _, h, w = draft.shape(x)
    if maximum:
        once_per_step(draft, x)
    if h % out[0] == 0 and w % out[1] == 0:
        kernel = (h // out[0], w // out[1])
        return _window(draft, x, "max" if maximum else "sum", kernel, kernel, (0, 0, 0, 0))
    if out[0] % h == 0 and out[1] % w == 0:
        kernel = (out[0] // h, out[1] // w)
        return _window(draft, x, "repeat", kernel, (1, 1), (0, 0, 0, 0))
    raise draft.fail(
        f"adaptive pooling from {h}x{w} to {out[0]}x{out[1]} has windows of unequal size",
        "choose an output size that divides the input's, or another input size",
    )


def _window(
    draft: Draft,
    x: Array,
    function: Literal["max", "sum", "repeat"],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
) -> Array:
    area = kernel[0] * kernel[1]
    draft.check_input(x)
    x = settle(draft, x)
    if function == "sum" and draft.values[x.index].planes == 0:
        x = rescaled(draft, x, 30 - area.bit_length())
    source = x.index
    if kernel == (1, 1) and stride == (1, 1) and not any(padding):
        return x
    value, high = draft.values[source], draft.largest[source]
    c, h, w = value.shape
    top, left, bottom, right = padding
    shape: Shape
    if function == "repeat":
        shape = (c, h * kernel[0], w * kernel[1])
    else:
        shape = (
            c,
            output_size(h, top + bottom, kernel[0], stride[0]),
            output_size(w, left + right, kernel[1], stride[1]),
        )
    scale, planes = x.scale, value.planes
    if function == "sum":
        high, scale = high * area, scale / area
        planes = high.bit_length() if planes else 0
        if high >= 2**31 or planes > 16:
            raise draft.fail(
                "the sum of its window does not fit 16 bits of a count or 32 of a current",
                "use smaller windows",
            )
    base = draft.write(
        ("pool", source, function, kernel, stride, padding), draft.where,
        (shape, planes, scale, high),
        lambda name, target: Pool(name, source, target, function, kernel, stride, padding),
    )  # fmt: skip
    axes = per_sample_axes(lead_axes(draft, x), shape, len(rest_axes(draft, x)))
    return replace(x, base=base, scale=scale, axes=axes)


def _vote(draft: Draft, module: Any, x: Array) -> Array:
    """Average of neighbouring features, SpikingJelly's VotingLayer: a convolution in groups."""
    if not isinstance(module, nn.AvgPool1d):
        raise draft.fail("a maximum over features cannot be lowered", "average them (AvgPool1d)")
    k = _pair(module.kernel_size, True, 1)[1]
    c = draft.shape(x)[0]
    if _pair(module.stride, True, 1)[1] != k or _pair(module.padding, True, 0)[1] or c % k:
        raise draft.fail(
            "features must be averaged in groups that do not overlap",
            "use kernel_size = stride, a divisor of the features, and no padding",
        )
    x = settle(draft, x)
    source, groups = x.index, c // k
    if draft.values[source].planes == 0 and source != draft.input:
        raise draft.fail("averaging features needs spikes as its input", "put a neuron before it")
    key = ("vote", source, k)
    if key not in draft.convolutions:
        draft.convolutions[key] = PendingConv(
            draft.where, source, np.ones((groups, k, 1), np.int8), (1, 1), Geometry(groups=groups),
            (groups, 1, 1), k * draft.largest[source],
        )  # fmt: skip
    return replace(
        x, base=draft.convolutions[key], gain=np.full(groups, x.scale / k), bias=np.zeros(groups),
        axes=(*x.axes[:-1], full("C", groups)), origin=draft.where,
    )  # fmt: skip
