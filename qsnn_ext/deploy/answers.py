"""From the integers of a program to the answer of the model: what the host does last.

A program answers with integers per output and time step. What a model does to its answer after the
last layer, and what a program cannot or need not do, is carried in the file as a list of named
steps with numbers: the scale, sums over some time steps, a softmax, names of several outputs. This
needs NumPy only.
"""

from __future__ import annotations

import json
import keyword
from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qsnn_ext.errors import FormatError

Real = npt.NDArray[Any]


def _softmax(x: Real, dim: int) -> Real:
    e = np.exp(x - x.max(axis=dim, keepdims=True))
    result: Real = e / e.sum(axis=dim, keepdims=True)
    return result


def _log_softmax(x: Real, dim: int) -> Real:
    shifted = x - x.max(axis=dim, keepdims=True)
    result: Real = shifted - np.log(np.exp(shifted).sum(axis=dim, keepdims=True))
    return result


def _arg(x: Real, dim: int | None, keep: bool, largest: bool) -> Real:
    function = np.argmax if largest else np.argmin
    if dim is None:
        return np.asarray(function(x))
    found: Real = function(x, axis=dim)
    return np.expand_dims(found, dim) if keep else found


def _index(x: Real, parts: Sequence[Any]) -> Real:
    index = tuple(
        None if p == "new" else slice(*p) if isinstance(p, list) else int(p) for p in parts
    )
    result: Real = x[index]
    return result


def _take(x: Real, steps: Sequence[int]) -> Real:
    if len(steps) > len(x):
        raise FormatError("it repeats time steps")
    result: Real = x[np.asarray(steps)]
    return result


def _by(x: Real, by: Any) -> Real:
    """Numbers that are spread over ``x``, and never ``x`` over them: no step enlarges an answer."""
    numbers: Real = np.broadcast_to(np.asarray(by), x.shape)
    return numbers


#: Name of a step -> what it does. Time, where there is any, is the first axis of an answer.
STEPS: dict[str, Callable[..., Real]] = {
    "shape": lambda x, keep, shape: x.reshape(*x.shape[:keep], *shape),
    "take": _take,
    "last": lambda x, step: x[step],
    "sum": lambda x, dim, keep: x.sum(axis=dim, keepdims=keep),
    "mean": lambda x, dim, keep: x.mean(axis=dim, keepdims=keep),
    "max": lambda x, dim, keep: x.max(axis=dim, keepdims=keep),
    "min": lambda x, dim, keep: x.min(axis=dim, keepdims=keep),
    "permute": lambda x, order: x.transpose(order),
    "flatten": lambda x, start, end: x.reshape(*x.shape[:start], -1, *x.shape[end + 1 :]),
    "index": _index,
    "scale": lambda x, by: x * _by(x, by),
    "shift": lambda x, by: x + _by(x, by),
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "argmax": lambda x, dim, keep: _arg(x, dim, keep, True),
    "argmin": lambda x, dim, keep: _arg(x, dim, keep, False),
}

MAX_STEPS = 64  # of one answer


def parse(text: str, outputs: int) -> tuple[list[list[Any]], Any]:
    """The steps of every answer and the form of the result, from a program's metadata.

    Args:
        text: ``metadata["answer"]``: JSON of ``{"steps": [[name, ...], ...] for every output,
            "form": ...}``, where a form is the number of an output, or ``{"tuple": [form, ...]}``,
            ``{"list": ...}``, ``{"dict": {key: form}}``, ``{"named": [name, {field: form}]}`` or
            ``{"value": constant}``.
        outputs: How many outputs the program has.

    Raises:
        FormatError: If it is anything else.
    """
    try:
        data = json.loads(text)
        steps, form = data["steps"], data["form"]
        ok = isinstance(steps, list) and len(steps) == outputs
        for chain in steps:
            ok = ok and isinstance(chain, list) and len(chain) <= MAX_STEPS
            ok = ok and all(
                isinstance(s, list) and s and isinstance(s[0], str) and s[0] in STEPS for s in chain
            )
            ok = ok and all(len(a) <= 2**16 for s in chain for a in s[1:] if isinstance(a, list))
        ok = ok and _is_form(form, outputs, 0)
    except (ValueError, TypeError, KeyError, RecursionError, AttributeError):
        ok = False
    if not ok:
        raise FormatError("invalid program: the metadata's description of the answer is malformed")
    return steps, form


def _is_form(form: Any, outputs: int, depth: int) -> bool:
    if depth > 8:
        return False
    if type(form) is int:
        return 0 <= form < outputs
    if not isinstance(form, dict) or len(form) != 1:
        return False
    ((kind, content),) = form.items()
    if kind == "value":
        return content is None or isinstance(content, bool | int | float | str)
    if kind in ("tuple", "list"):
        parts = content if isinstance(content, list) else [None]
    elif kind == "dict":
        parts = list(content.values()) if isinstance(content, dict) else [None]
    elif kind == "named":
        if not isinstance(content, list) or len(content) != 2 or not isinstance(content[1], dict):
            return False
        names = [content[0], *content[1]]
        if not all(isinstance(n, str) and _is_name(n) for n in names):
            return False
        parts = list(content[1].values())
    else:
        return False
    return all(_is_form(part, outputs, depth + 1) for part in parts)


def _is_name(text: str) -> bool:
    return text.isascii() and text.isidentifier() and not keyword.iskeyword(text) and text[0] != "_"


def apply(x: Real, steps: Sequence[Sequence[Any]]) -> Real:
    """An answer after its steps.

    Raises:
        FormatError: If a step does not fit the answer.
    """
    for name, *arguments in steps:
        try:
            x = np.asarray(STEPS[name](x, *arguments))
        except (TypeError, ValueError, IndexError, OverflowError, AttributeError) as error:
            raise FormatError(
                f"the program's step {name!r} does not fit its answer of shape {x.shape} ({error})"
            ) from None
    return x


def build(form: Any, answers: Sequence[Any]) -> Any:
    """The result in the form that the model returns it."""
    if isinstance(form, int):
        return answers[form]
    ((kind, content),) = form.items()
    if kind == "value":
        return content
    if kind in ("tuple", "list"):
        parts = [build(part, answers) for part in content]
        return tuple(parts) if kind == "tuple" else parts
    if kind == "dict":
        return {key: build(part, answers) for key, part in content.items()}
    name, fields = content
    named = namedtuple(name, list(fields))  # type: ignore[misc]
    return named(*(build(part, answers) for part in fields.values()))
