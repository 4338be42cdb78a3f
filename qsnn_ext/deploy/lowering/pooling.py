"""Poolings and means: maxima and sums over windows, over features, and over time.

An average is a sum whose divisor goes into the scale of the result.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
from torch import nn

from qsnn_ext.deploy.lowering.axes import (
    labels,
    lead_axes,
    per_sample_axes,
    rank_per_sample,
    spatial_axes,
)
from qsnn_ext.deploy.lowering.draft import Array, Draft, Geometry, PendingConv, Shape
from qsnn_ext.deploy.lowering.settle import settle
from qsnn_ext.deploy.program import Pool, output_size

_ONE_DIMENSIONAL = (nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d)


def lower_pool(draft: Draft, module: Any, x: Array) -> Array:
    """Any pooling layer of torch that has windows of equal size here."""
    _, h, w = draft.shape(x)
    one = isinstance(module, _ONE_DIMENSIONAL)
    if getattr(module, "return_indices", False):
        raise draft.fail("return_indices cannot be lowered", "pool without it")
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
    spatial_axes(draft, x)
    return _window(draft, x, function, kernel, stride, padding)


def lower_mean(draft: Draft, a: Array, dims: Any, total: bool) -> Array:
    """``a.mean(dims)``, or ``a.sum(dims)`` if ``total``: over time, or over height and width."""
    if dims is None:
        raise draft.fail(
            "a mean over everything cannot be lowered",
            "name the axes: time, or height and width",
        )
    listed = [dims] if isinstance(dims, int) else list(dims)
    chosen = sorted(d % len(a.axes) for d in listed)
    over = {label for d in chosen for label in labels(a.axes[d])}
    if over == {"T"} and chosen == [0]:
        steps = a.axes[0][0][1]
        draft.steps = max(draft.steps, steps)
        return replace(
            settle(draft, a), axes=a.axes[1:], reduction="sum",
            factor=1.0 if total else 1.0 / steps, steps=frozenset(range(steps)),
        )  # fmt: skip
    if over <= {"H", "W"}:
        _, h, w = draft.shape(a)
        kernel = (h if "H" in over else 1, w if "W" in over else 1)
        pooled = _window(draft, a, "sum", kernel, kernel, (0, 0, 0, 0))
        if total:
            pooled = replace(pooled, scale=pooled.scale * kernel[0] * kernel[1])
        now = dict(zip("CHW", draft.shape(pooled), strict=True))
        axes = tuple(
            tuple((k, now.get(k, n)) for k, n in axis)
            for d, axis in enumerate(a.axes)
            if d not in chosen
        )
        return replace(pooled, axes=axes)
    raise draft.fail(
        "a mean over channels or the batch cannot be lowered",
        "average over time, height or width; a VotingLayer averages features",
    )


def _pair(value: Any, one: bool, across: int) -> tuple[int, int]:
    """(vertical, horizontal) of a setting; ``across`` is the vertical one of one dimension."""
    listed = isinstance(value, tuple | list)
    if one:
        return across, int(value[0] if listed else value)
    return (int(value[0]), int(value[1])) if listed else (int(value), int(value))


def _adaptive(draft: Draft, x: Array, out: tuple[int, int], maximum: bool) -> Array:
    _, h, w = draft.shape(x)
    spatial_axes(draft, x)
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
    x = settle(draft, x)
    source, area = x.index, kernel[0] * kernel[1]
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
    axes = per_sample_axes(lead_axes(draft, x), shape, rank_per_sample(draft, x))
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
        axes=(*x.axes[:-1], (("C", groups), ("H", 1), ("W", 1))), origin=draft.where,
    )  # fmt: skip
