"""Surrogate gradients in closed form, and how to recognize a host's.

A fused kernel cannot call a Python callable per neuron, so it asks for the kind of the surrogate
and its numbers. Each derivative below is the one the host's own backward computes. A surrogate that
is not recognized is no error: the neuron then runs the eager loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qsnn_ext import functional as F


class Surrogate(NamedTuple):
    """A firing rule with its pseudo-gradient.

    Attributes:
        kind: a key of :data:`DERIVATIVES`.
        a: first number of the kind.
        b: second number, 0 where there is none.
        strict: whether the threshold itself does not fire: ``>``, and not ``>=``.
    """

    kind: str
    a: float
    b: float
    strict: bool

    @classmethod
    def of(cls, kind: str, numbers: list[Any], strict: bool) -> Surrogate | None:
        """One with these numbers, up to two; ``None`` if they are anything else than numbers."""
        if any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in numbers):
            return None
        a, b = (*[float(v) for v in numbers], 0.0, 0.0)[:2]
        return cls(kind, a, b, strict)


def _piecewise_quadratic(x: Tensor, a: float, b: float) -> Tensor:
    size = x.abs()
    return torch.where(size > 1 / a, 0.0, a - a * a * size)


def _sigmoid(x: Tensor, a: float, b: float) -> Tensor:
    s = torch.sigmoid(a * x)
    return (1.0 - s) * s * a


def _atan(x: Tensor, a: float, b: float) -> Tensor:
    y = (math.pi / 2 * a) * x
    return (a / 2) / (1 + y * y)


#: ``d(x, a, b)`` for ``x = h - theta``, by kind.
DERIVATIVES: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "triangle": lambda x, a, b: (a - x.abs()).clamp(min=0),
    "piecewise_quadratic": _piecewise_quadratic,
    "piecewise_exp": lambda x, a, b: a / 2 * torch.exp(-a * x.abs()),
    "sigmoid": _sigmoid,
    "soft_sign": lambda x, a, b: 1 / (2 * a * (1 / a + x.abs()).square()),
    "super_spike": lambda x, a, b: a / (x.abs() + 1.0).square(),
    "atan": _atan,
    "erf": lambda x, a, b: torch.exp(-(a * x).square()) * (a / math.sqrt(math.pi)),
    "rect": lambda x, a, b: torch.where(x.abs() < 0.5 / a, torch.full_like(x, a), 0.0),
    "fast_sigmoid": lambda x, a, b: 1 / (a * x.abs() + 1.0).square(),
    "straight_through": lambda x, a, b: torch.ones_like(x),
    "slope_above": lambda x, a, b: torch.where(x > 0, torch.full_like(x, a), b),
    "slope_from": lambda x, a, b: torch.where(x >= 0, torch.full_like(x, a), b),
    "rate_escape": lambda x, a, b: b * torch.exp(-a * (x - 1).abs()),
}

#: What recognizes surrogates of a host; its module adds its own.
RECOGNIZERS: list[Callable[[Any], Surrogate | None]] = []


def recognize(surrogate: Any) -> Surrogate | None:
    """The closed form of a surrogate function, or ``None`` where there is none.

    Args:
        surrogate: what a neuron calls with ``h - threshold``: :func:`qsnn_ext.functional.triangle`,
            or a surrogate of a host.
    """
    if surrogate is F.triangle:
        return Surrogate("triangle", 1.0, 0.0, False)
    if isinstance(surrogate, FunctionType) and torch.compiler.is_compiling():
        return None  # tracing finds no module of the type; the graph fuses the loop anyway
    for known in RECOGNIZERS:
        found = known(surrogate)
        if found is not None:
            return found
    return None
