"""Surrogate gradients in closed form, and how to recognize a host's.

A fused kernel cannot call a Python callable per neuron, so it asks for the kind of the surrogate
and its numbers. Each derivative below is the one the host's own backward computes. A surrogate that
is not recognized is no error: the neuron then runs the eager loop.

Hosts are recognized by the names of their classes and closures; neither is imported.
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
        strict: whether the threshold itself does not fire (``>``); SpikingJelly's rule is ``>=``.
    """

    kind: str
    a: float
    b: float
    strict: bool


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

# Class in spikingjelly.activation_based.surrogate: our kind, names of its numbers.
_SPIKINGJELLY = {
    "PiecewiseQuadratic": ("piecewise_quadratic", ("alpha",)),
    "PiecewiseExp": ("piecewise_exp", ("alpha",)),
    "Sigmoid": ("sigmoid", ("alpha",)),
    "SoftSign": ("soft_sign", ("alpha",)),
    "SuperSpike": ("super_spike", ("alpha",)),
    "ATan": ("atan", ("alpha",)),
    "Erf": ("erf", ("alpha",)),
    "Rect": ("rect", ("alpha",)),
    "LeakyKReLU": ("slope_from", ("k", "leak")),
}

# Function in snntorch.surrogate that returns the closure: our kind, names in the closure or the
# number itself. Where the host has no second number it is 0.
_SNNTORCH: dict[str, tuple[str, tuple[str | float, ...]]] = {
    "atan": ("atan", ("alpha",)),
    "fast_sigmoid": ("fast_sigmoid", ("slope",)),
    # The host's exp overflows to NaN far below the threshold; this form gives the limit, 0.
    "sigmoid": ("sigmoid", ("slope",)),
    "straight_through_estimator": ("straight_through", ()),
    "heaviside": ("slope_above", (1.0, 0.0)),
    "LSO": ("slope_above", (1.0, "slope")),
    "spike_rate_escape": ("rate_escape", ("beta", "slope")),
}


def _numbers(kind: str, values: list[Any], strict: bool) -> Surrogate | None:
    if any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in values):
        return None
    a, b = (*[float(v) for v in values], 0.0, 0.0)[:2]
    return Surrogate(kind, a, b, strict)


def recognize(surrogate: Any) -> Surrogate | None:
    """The closed form of a surrogate function, or ``None`` where there is none.

    Args:
        surrogate: what a neuron calls with ``h - theta``: :func:`qsnn_ext.functional.triangle`,
            a SpikingJelly surrogate module, one of snnTorch's closures, or our ``Triangle``.
    """
    if surrogate is F.triangle:
        return Surrogate("triangle", 1.0, 0.0, False)
    if isinstance(surrogate, FunctionType) and torch.compiler.is_compiling():
        return None  # tracing finds no module of the type; the graph fuses the loop anyway
    cls = type(surrogate)
    home, name = cls.__module__, cls.__name__
    if home == "qsnn_ext.snntorch" and name == "Triangle":
        return _numbers("triangle", [surrogate.beta], True)
    if home == "qsnn_ext.spikingjelly" and name == "Triangle" and surrogate.spiking:
        return _numbers("triangle", [surrogate.beta], bool(surrogate.strict))
    if home == "spikingjelly.activation_based.surrogate" and name in _SPIKINGJELLY:
        if not surrogate.spiking:
            return None
        kind, names = _SPIKINGJELLY[name]
        return _numbers(kind, [getattr(surrogate, n) for n in names], False)
    if getattr(surrogate, "__module__", None) == "snntorch.surrogate" and name == "function":
        maker = surrogate.__qualname__.partition(".")[0]
        if maker in _SNNTORCH:
            kind, entries = _SNNTORCH[maker]
            cells = dict(
                zip(surrogate.__code__.co_freevars, surrogate.__closure__ or (), strict=True)
            )
            values = [cells[e].cell_contents if isinstance(e, str) else e for e in entries]
            return _numbers(kind, values, True)
    return None
