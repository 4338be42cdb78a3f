"""Functions and methods of torch that lowering knows, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from qsnn_ext.deploy.lowering.arithmetic import is_spikes, lower_add, lower_multiply
from qsnn_ext.deploy.lowering.attention import lower_matmul
from qsnn_ext.deploy.lowering.axes import (
    along,
    expand,
    full,
    gather,
    has_time,
    labels,
    lead_axes,
    natural,
    padded_index,
    permute,
    pick,
    regroup,
    select,
    sizes,
    stack,
)
from qsnn_ext.deploy.lowering.draft import (
    Answer,
    Array,
    Constant,
    Draft,
    Filling,
    Membrane,
)
from qsnn_ext.deploy.lowering.layers import Kernel, affine, lower_batch_norm, real
from qsnn_ext.deploy.lowering.neurons import Real
from qsnn_ext.deploy.lowering.operands import as_array, as_tensor
from qsnn_ext.deploy.lowering.pooling import lower_mean, lower_pool, repeat_pixels
from qsnn_ext.deploy.lowering.settle import CURRENT_BITS, settle
from qsnn_ext.deploy.lowering.tracing import Event
from qsnn_ext.deploy.lowering.weights import lower_product
from qsnn_ext.deploy.program import Affine, Concat


@dataclass(frozen=True)
class Call:
    """A call of a function.

    Attributes:
        event: Where it stands on the tape.
        name: Of the function, without underscores.
        args, kwargs: Its operands as far as they are known.
    """

    event: Event
    name: str
    args: list[Any]
    kwargs: dict[str, Any]

    def get(self, place: int, name: str, default: Any = None) -> Any:
        """An argument by position or name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of its results."""
        return list(self.event.shapes.values())

    def array(self, draft: Draft) -> Array:
        """Its first operand, a tensor of the program."""
        return as_array(
            draft, self.args[0], f"{self.name!r} cannot be lowered for what it is applied to",
            "apply it to one tensor that depends on the model's input",
        )  # fmt: skip


FUNCTIONS: dict[str, Callable[[Draft, Call], Any]] = {}


def _named(*names: str) -> Callable[[Callable[[Draft, Call], Any]], Callable[[Draft, Call], Any]]:
    def register(function: Callable[[Draft, Call], Any]) -> Callable[[Draft, Call], Any]:
        FUNCTIONS.update(dict.fromkeys(names, function))
        return function

    return register


# --------------------------------------------------------------------------- arithmetic


def _operands(draft: Draft, call: Call) -> tuple[Any, Any]:
    a, b = (call.args[0], call.args[1])
    return as_tensor(draft, a), as_tensor(draft, b)


def _affine_of_input(draft: Draft, a: Any, factor: Any, shift: Any) -> Array | None:
    """``x * factor + shift`` of the model's input is the host's work, before codes are made."""
    if not isinstance(a, Array) or not a.raw or a.base != draft.input or a.reduction != "none":
        return None
    factors, shifts = real(torch.as_tensor(factor)), real(torch.as_tensor(shift))
    if not factors.all():
        return None  # a blank
    step = along(draft, a, factors, "factors"), along(draft, a, shifts, "summands")
    if a.done == len(draft.prologue):
        raise InputArithmeticError(step)
    same = all(np.array_equal(x, y) for x, y in zip(step, draft.prologue[a.done], strict=True))
    if not same:
        raise draft.fail(
            "it normalises the input in another way than another part of the model",
            "normalise the input once, for all that read it",
        )
    return replace(a, done=a.done + 1)


class InputArithmeticError(Exception):
    """The walk has met arithmetic on the input: it begins anew with that left to the host."""

    def __init__(self, step: tuple[Real, Real]) -> None:
        super().__init__()
        self.step = step


def _value(c: Any) -> Any:
    return c.value if isinstance(c, Constant) else c


@_named("add", "iadd", "radd")
def _add(draft: Draft, call: Call) -> Any:
    if _answers(call):
        return _host_affine(draft, call)
    a, b = _operands(draft, call)
    alpha = call.kwargs.get("alpha", 1)
    if alpha != 1:
        b = lower_multiply(draft, b, Constant(alpha)) if isinstance(b, Array) else Constant(
            torch.as_tensor(_value(b)) * alpha
        )  # fmt: skip
    for x, c in ((a, b), (b, a)):
        if isinstance(c, Constant):
            found = _affine_of_input(draft, x, 1.0, c.value)
            if found is not None:
                return found
    return lower_add(draft, a, b)


@_named("sub", "isub", "subtract")
def _sub(draft: Draft, call: Call) -> Any:
    if _answers(call):
        return _host_affine(draft, call)
    a, b = _operands(draft, call)
    if call.kwargs.get("alpha", 1) != 1:
        raise draft.fail("a scaled subtraction cannot be lowered", "subtract without alpha")
    return _difference(draft, call, a, b)


@_named("rsub")
def _rsub(draft: Draft, call: Call) -> Any:
    if _answers(call):
        return _host_affine(draft, call)
    b, a = _operands(draft, call)
    return _difference(draft, call, a, b)


def _difference(draft: Draft, call: Call, a: Any, b: Any) -> Any:
    if isinstance(b, Constant):
        found = _affine_of_input(draft, a, 1.0, -torch.as_tensor(b.value))
        if found is not None:
            return found
    if isinstance(a, Constant):
        found = _affine_of_input(draft, b, -1.0, a.value)
        if found is not None:
            return found
    return lower_add(draft, a, b, sign=-1)


@_named("mul", "imul", "rmul", "multiply", "logical_and", "and", "bitwise_and", "iand")
def _mul(draft: Draft, call: Call) -> Any:
    if _answers(call):
        return _host_affine(draft, call)
    a, b = _operands(draft, call)
    for x, c in ((a, b), (b, a)):
        if isinstance(c, Constant):
            found = _affine_of_input(draft, x, c.value, 0.0)
            if found is not None:
                return found
    return lower_multiply(draft, a, b)


@_named("div", "idiv", "truediv", "itruediv", "true_divide", "divide")
def _div(draft: Draft, call: Call) -> Any:
    if _answers(call):
        return _host_affine(draft, call)
    a, b = _operands(draft, call)
    if not isinstance(b, Constant) or call.kwargs.get("rounding_mode") is not None:
        raise draft.fail("dividing by a tensor cannot be lowered", "divide by a number")
    divisor = torch.as_tensor(b.value).double()
    if bool((divisor == 0).any()):
        raise draft.fail("it divides by zero", "divide by a number that is not 0")
    found = _affine_of_input(draft, a, 1 / divisor, 0.0)
    return found if found is not None else lower_multiply(draft, a, Constant(1 / divisor))


@_named("neg", "negative")
def _neg(draft: Draft, call: Call) -> Any:
    if _answers(call):
        return _host(call.args[0], ("scale", -1.0), call)
    a = call.array(draft)
    found = _affine_of_input(draft, a, -1.0, 0.0)
    return found if found is not None else lower_multiply(draft, a, Constant(-1.0))


@_named("zero")
def _zero(draft: Draft, call: Call) -> Any:
    return Constant(torch.zeros(call.shapes[0]))


@_named("copy")
def _copy(draft: Draft, call: Call) -> Any:
    source = as_array(
        draft, call.args[1], "it overwrites a tensor with what does not depend on the input",
        "use a tensor of its own",
    )  # fmt: skip
    if tuple(sizes(source)) != call.shapes[0]:
        raise draft.fail("it copies into a tensor of another shape", "copy between equal shapes")
    return source


# --------------------------------------------------------------------------- shapes and time


@_named(
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout",
    "feature_alpha_dropout",
)  # fmt: skip
def _dropout(draft: Draft, call: Call) -> Any:
    if call.get(1, "p", 0.5) and call.get(2, "training", call.kwargs.get("train", True)):
        raise draft.fail(
            "it drops values at random at inference too",
            "pass training=self.training, or use nn.Dropout",
        )
    return _same(draft, call)


@_named(
    "contiguous", "clone", "detach", "float", "half", "double", "bfloat16", "to", "type_as", "cpu",
    "cuda", "requires_grad", "alias", "lift_fresh", "pos", "positive",
)  # fmt: skip
def _same(draft: Draft, call: Call) -> Any:
    if isinstance(call.args[0], Membrane | Answer | Filling):
        return call.args[0]
    return as_tensor(draft, call.args[0])


@_named("relu", "abs", "absolute")
def _not_negative(draft: Draft, call: Call) -> Any:
    a = settle(draft, call.array(draft))
    if draft.values[a.index].planes == 0:
        raise draft.fail(
            f"the operation {call.name!r} on a current has no integer form",
            "use a neuron, or apply it to spikes",
        )
    return a


@_named("bool", "int", "long", "round", "floor", "byte")
def _spikes(draft: Draft, call: Call) -> Any:
    a = call.array(draft)
    if not is_spikes(draft, settle(draft, a)):
        raise draft.fail(
            f"the operation {call.name!r} has no integer form on what is no spike",
            "apply it to spikes only",
        )
    return a


@_named(
    "flatten", "view", "reshape", "unsqueeze", "squeeze", "unflatten", "view_as", "reshape_as",
    "ravel", "unsafe_view",
)  # fmt: skip
def _reshape(draft: Draft, call: Call) -> Any:
    a = call.args[0]
    if isinstance(a, Answer):
        return _host(a, ("shape", 0, list(call.shapes[0])), call)
    return regroup(draft, call.array(draft), call.shapes[0])


@_named("permute")
def _permute(draft: Draft, call: Call) -> Any:
    order = call.args[1:] or call.kwargs.get("dims", ())
    if len(order) == 1 and isinstance(order[0], tuple | list):
        order = order[0]
    return _reorder(draft, call, list(order))


@_named("transpose", "swapaxes", "swapdims")
def _transpose(draft: Draft, call: Call) -> Any:
    order = list(range(len(call.shapes[0])))
    i = call.get(1, "dim0", call.kwargs.get("axis0"))
    j = call.get(2, "dim1", call.kwargs.get("axis1"))
    order[i], order[j] = order[j], order[i]
    return _reorder(draft, call, order)


@_named("t", "mT")
def _last_two(draft: Draft, call: Call) -> Any:
    order = list(range(len(call.shapes[0])))
    if len(order) > 1:
        order[-1], order[-2] = order[-2], order[-1]
    return _reorder(draft, call, order)


@_named("movedim", "moveaxis")
def _movedim(draft: Draft, call: Call) -> Any:
    places = torch.arange(len(call.shapes[0]))
    blank = torch.empty([2 + int(i) for i in places])
    moved = blank.movedim(call.get(1, "source"), call.get(2, "destination"))
    return _reorder(draft, call, [n - 2 for n in moved.shape])


def _reorder(draft: Draft, call: Call, order: list[int]) -> Any:
    a = call.args[0]
    order = [i % len(order) for i in order]
    if isinstance(a, Answer):
        return _host(a, ("permute", order), call)
    if isinstance(a, Membrane):
        a = as_tensor(draft, a)
    return permute(call.array(draft), order)


@_named("expand", "repeat", "expand_as", "broadcast_to", "tile")
def _expand(draft: Draft, call: Call) -> Any:
    return expand(draft, call.array(draft), call.shapes[0])


@_named("getitem")
def _getitem(draft: Draft, call: Call) -> Any:
    return _index(draft, call, call.args[0], call.args[1])


def _index(draft: Draft, call: Call, a: Any, index: Any) -> Any:
    if isinstance(a, Constant):
        return Constant(torch.as_tensor(a.value)[index])
    if isinstance(a, Filling):
        parts = index if isinstance(index, tuple) else (index,)
        place = parts[a.dim] if len(parts) > a.dim else None
        rest = [p for i, p in enumerate(parts) if i != a.dim]
        at = place % a.length if isinstance(place, int) else -1
        if at in a.items and all(p == slice(None) for p in rest):
            return a.items[at]
    if isinstance(a, Answer):
        parts = index if isinstance(index, tuple) else (index,)
        if all(p is None or isinstance(p, int | slice) for p in parts):
            plain = [
                "new" if p is None else [p.start, p.stop, p.step] if isinstance(p, slice) else p
                for p in parts
            ]
            return _host(a, ("index", plain), call)
    array = as_array(draft, a, "indexing cannot be lowered for it", "index tensors only")
    return select(draft, array, index)


@_named("select")
def _select(draft: Draft, call: Call) -> Any:
    dim, index = call.get(1, "dim"), call.get(2, "index")
    return _index(draft, call, call.args[0], _at(call.array(draft), dim, index))


@_named("narrow")
def _narrow(draft: Draft, call: Call) -> Any:
    dim, start, length = call.get(1, "dim"), call.get(2, "start"), call.get(3, "length")
    a = call.array(draft)
    return select(draft, a, _at(a, dim, slice(start, start + length)))


def _at(a: Array, dim: int, part: Any) -> tuple[Any, ...]:
    return (*(slice(None) for _ in range(dim % len(a.axes))), part)


@_named("unbind")
def _unbind(draft: Draft, call: Call) -> Any:
    a = as_tensor(draft, call.args[0])
    dim = call.get(1, "dim", 0)
    if isinstance(a, Constant):
        return tuple(Constant(t) for t in torch.as_tensor(a.value).unbind(dim))
    array = call.array(draft)
    return tuple(select(draft, array, _at(array, dim, t)) for t in range(len(call.shapes)))


@_named("chunk", "split", "split_with_sizes", "tensor_split")
def _split(draft: Draft, call: Call) -> Any:
    a = call.array(draft)
    dim = call.get(2, "dim", 0)
    parts, start = [], 0
    for shape in call.shapes:
        n = shape[dim]
        parts.append(select(draft, a, _at(a, dim, slice(start, start + n))))
        start += n
    return tuple(parts)


@_named("setitem")
def _setitem(draft: Draft, call: Call) -> Any:
    base, index, item = call.args[:3]
    parts = index if isinstance(index, tuple) else (index,)
    if isinstance(base, Array) and isinstance(item, Constant | int | float):
        return _overwrite(draft, base, parts, real(torch.as_tensor(_value(item))))
    dims = [i for i, p in enumerate(parts) if isinstance(p, int)]
    others = all(p == slice(None) or p is Ellipsis for p in parts if not isinstance(p, int))
    if len(dims) != 1 or not others or Ellipsis in parts[: dims[0]]:
        raise draft.fail(
            "this assignment to a part of a tensor cannot be lowered",
            "assign whole time steps, out[t] = y, or collect them in a list and stack it",
        )
    dim, length = dims[0], call.shapes[0][dims[0]]
    items: dict[int, Any] = {}
    if isinstance(base, Filling) and base.dim == dim:
        items = dict(base.items)
    elif not isinstance(base, Constant):
        raise draft.fail(
            "it overwrites a part of a tensor of the network",
            "collect what is computed in a list and stack it",
        )
    items[parts[dim] % length] = item
    return Filling(dim, length, items)


def _overwrite(draft: Draft, a: Array, parts: tuple[Any, ...], value: Real) -> Array:
    """``a[parts] = value`` with a constant, one for all or one per channel: a border, a mask."""
    draft.check_input(a)
    a = natural(draft, settle(draft, a))
    if Ellipsis in parts:
        at = parts.index(Ellipsis)
        missing = len(a.axes) - (len(parts) - 1)
        parts = (*parts[:at], *[slice(None)] * missing, *parts[at + 1 :])
    sliced = [d for d, p in enumerate(parts) if not (isinstance(p, slice) and p == slice(None))]
    plain = all(isinstance(p, int | slice) and not isinstance(p, bool) for p in parts)
    front = len(lead_axes(draft, a))
    if not plain or len(sliced) != 1 or sliced[0] < front or len(a.axes) - front != 3:
        raise draft.fail(
            "this assignment to a part of a tensor cannot be lowered",
            "assign a number, or one per channel, to a slice of one axis of [C, H, W]",
        )
    shape = draft.shape(a)
    c, h, w = shape
    part = parts[sliced[0]]
    chosen = range(shape[sliced[0] - front])[part]
    places = np.isin(np.arange(shape[sliced[0] - front]), list(np.atleast_1d(chosen)))
    behind = len(a.axes) - 1 - sliced[0]
    if isinstance(part, int) and value.ndim > behind:  # its axis is missing there
        value = np.expand_dims(value, value.ndim - behind)
    constant = along(draft, a, value, "numbers")
    integers = np.rint(np.broadcast_to(constant, (c,)) / a.scale)
    if np.abs(integers).max() >= 2**30 or (draft.values[a.index].planes and integers.any()):
        raise draft.fail(
            "what it writes does not fit the range of the tensor", "write zeros, or write currents"
        )
    tables = [np.arange(c) * h * w, np.arange(h) * w, np.arange(w)]
    table = tables[sliced[0] - front]
    source = a.index
    if not integers.any():
        table[places] = -1
        return replace(a, base=gather(draft, source, shape, tables), raw=False)
    top = max(int(np.abs(integers).max()), draft.largest[source])
    words = integers.astype(np.int32)
    filled = draft.write(
        ("filled", source, words.tobytes()), f"{draft.where}.constant", (shape, 0, a.scale, top),
        lambda name, target: Affine(
            name, source, target, np.zeros(c, np.int32), np.ones(c, np.uint8), words
        ),
    )  # fmt: skip
    both = draft.write(
        ("concat", (source, filled)), f"{draft.where}.cat", ((2 * c, h, w), 0, a.scale, top),
        lambda name, target: Concat(name, (source, filled), target),
    )  # fmt: skip
    table[places] += c * h * w
    return replace(a, base=gather(draft, both, shape, tables), raw=False)


@_named("stack")
def _stack(draft: Draft, call: Call) -> Any:
    items = [as_tensor(draft, a) for a in call.args[0]]
    return stack(draft, items, call.get(1, "dim", 0))


@_named("cat", "concat", "concatenate")
def _cat(draft: Draft, call: Call) -> Any:
    items = [as_tensor(draft, a) for a in call.args[0]]
    arrays = [a for a in items if isinstance(a, Array)]
    dim = call.get(1, "dim", call.kwargs.get("axis", 0))
    if len(arrays) == len(items):
        dim %= len(arrays[0].axes)
        if len(arrays) == 1:
            return arrays[0]
        if all(not a.axes[dim] and not has_time(a) for a in arrays):
            dropped = [select(draft, a, _at(a, dim, 0)) for a in arrays]
            if arrays[0].steps != arrays[1].steps:
                return stack(draft, dropped, dim)
        if "T" not in labels(arrays[0].axes[dim]):
            return concatenate(draft, arrays, dim)
    raise draft.fail(
        "this concatenation cannot be lowered",
        "join the outputs of time steps, or channels of the network's own tensors",
    )


def concatenate(draft: Draft, arrays: list[Array], dim: int) -> Array:
    """Tensors side by side along an axis of a sample."""
    for a in arrays:
        draft.check_input(a)
    arrays = [settle(draft, a) for a in arrays]
    front = len(lead_axes(draft, arrays[0]))
    if dim < front:
        raise draft.fail("it joins samples of the batch", "answer for every sample alike")
    order = [*range(front), dim, *(i for i in range(front, len(arrays[0].axes)) if i != dim)]
    back = [order.index(i) for i in range(len(order))]
    moved = [natural(draft, permute(a, order)) for a in arrays]
    steps = {a.steps for a in moved if a.steps is not None}
    if len(steps) > 1 or len({(a.reduction, a.factor) for a in moved}) > 1:
        raise draft.fail("it joins different time steps", "let only neurons carry anything on")
    unit = min(a.scale for a in moved)
    counts = all(draft.values[a.index].planes for a in moved)
    if any(a.scale != unit for a in moved) or not (
        counts or not any(draft.values[a.index].planes for a in moved)
    ):
        top = 1.001 * max(a.scale * draft.largest[a.index] for a in moved)
        one, none = np.full(1, 1.0), np.zeros(1)
        moved = [
            settle(draft, affine(draft, a, one, none), CURRENT_BITS, beside=top) for a in moved
        ]
        unit = min(a.scale for a in moved)
        if any(a.scale != unit for a in moved):
            raise draft.fail(
                "it joins tensors of different scales", "join spikes, or normalise all alike"
            )
        counts = False
    shapes = [draft.shape(a) for a in moved]
    shape = (sum(s[0] for s in shapes), *shapes[0][1:])
    sources = tuple(a.index for a in moved)
    planes = max(draft.values[i].planes for i in sources) if counts else 0
    base = draft.write(
        ("concat", sources), "cat" if draft.where == "the model" else f"{draft.where}.cat",
        (shape, planes, unit, max(draft.largest[i] for i in sources)),
        lambda name, target: Concat(name, sources, target),
    )  # fmt: skip
    axes = (*moved[0].axes[:front], full("C", shape[0]), *moved[0].axes[front + 1 :])
    joined = replace(moved[0], base=base, axes=axes, scale=unit, steps=next(iter(steps), None))
    return permute(replace(joined, raw=False), back)


@_named("matmul", "bmm")
def _matmul(draft: Draft, call: Call) -> Any:
    return lower_matmul(draft, *_operands(draft, call))


@_named("rmatmul")
def _rmatmul(draft: Draft, call: Call) -> Any:
    b, a = _operands(draft, call)
    return lower_matmul(draft, a, b)


@_named("einsum")
def _einsum(draft: Draft, call: Call) -> Any:
    """Products of two operands whose letters are batches, rows, sums and columns."""
    equation = call.args[0]
    operands = [as_tensor(draft, a) for a in _flat(call.args[1:])]
    letters, _, out = equation.replace(" ", "").partition("->")
    terms = letters.split(",")
    ok = out and "." not in equation and len(terms) == len(operands) == 2
    if not ok or any(len(set(t)) != len(t) for t in (*terms, out)):
        raise draft.fail(f"einsum of {equation!r} cannot be lowered", "write a matmul")
    a, b = terms
    shared = [c for c in a if c in b and c in out]
    summed = [c for c in a if c in b and c not in out]
    rows, columns = [c for c in a if c not in b], [c for c in b if c not in a]
    if len(summed) != 1 or len(rows) != 1 or len(columns) != 1 or len(out) != len(shared) + 2:
        raise draft.fail(f"einsum of {equation!r} cannot be lowered", "write a matmul")
    wanted = [*shared, *rows, *columns]
    x = permute(operands[0], [a.index(c) for c in (*shared, *rows, *summed)])
    y = permute(operands[1], [b.index(c) for c in (*shared, *summed, *columns)])
    return permute(lower_matmul(draft, x, y), [wanted.index(c) for c in out])


def _flat(values: Any) -> list[Any]:
    return [x for v in values for x in (_flat(v) if isinstance(v, tuple | list) else [v])]


def _tuple(value: Any, dims: int) -> Any:
    listed = tuple(value) if isinstance(value, tuple | list) else (value,)
    return value if isinstance(value, str) else listed * (dims if len(listed) == 1 else 1)


@_named("linear")
def _linear(draft: Draft, call: Call) -> Any:
    weight, bias = _value(call.get(1, "weight")), _value(call.get(2, "bias"))
    return lower_product(draft, call.array(draft), weight, bias, None)


@_named("conv1d", "conv2d", "conv3d")
def _conv(draft: Draft, call: Call) -> Any:
    names = {"weight": None, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    weight, bias, *rest = (
        _value(call.get(place + 1, name, default))
        for place, (name, default) in enumerate(names.items())
    )
    dims = int(call.name[4])
    stride, padding, dilation = (_tuple(v, dims) for v in rest[:3])
    kernel = Kernel(stride, padding, dilation, rest[3])
    return lower_product(draft, call.array(draft), weight, bias, kernel)


@_named("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(draft: Draft, call: Call) -> Any:
    names = {
        "weight": None, "bias": None, "stride": 1, "padding": 0, "output_padding": 0, "groups": 1,
        "dilation": 1,
    }  # fmt: skip
    weight, bias, *rest = (
        _value(call.get(place + 1, name, default))
        for place, (name, default) in enumerate(names.items())
    )
    dims = int(call.name[14])
    stride, padding, dilation = (_tuple(v, dims) for v in (rest[0], rest[1], rest[4]))
    kernel = Kernel(stride, padding, dilation, rest[3])
    return lower_product(draft, call.array(draft), weight, bias, kernel, call.shapes[0])


# --------------------------------------------------------------------------- pixels elsewhere


@_named("pixel_shuffle")
def _pixel_shuffle(draft: Draft, call: Call) -> Any:
    a, r = call.array(draft), call.get(1, "upscale_factor")
    *lead, c, h, w = sizes(a)
    n = len(lead)
    split = regroup(draft, a, [*lead, c // r**2, r, r, h, w])
    mixed = permute(split, [*range(n), n, n + 3, n + 1, n + 4, n + 2])
    return regroup(draft, mixed, call.shapes[0])


@_named("pixel_unshuffle")
def _pixel_unshuffle(draft: Draft, call: Call) -> Any:
    a, r = call.array(draft), call.get(1, "downscale_factor")
    *lead, c, h, w = sizes(a)
    n = len(lead)
    split = regroup(draft, a, [*lead, c, h // r, r, w // r, r])
    mixed = permute(split, [*range(n), n, n + 2, n + 4, n + 1, n + 3])
    return regroup(draft, mixed, call.shapes[0])


@_named("channel_shuffle")
def _channel_shuffle(draft: Draft, call: Call) -> Any:
    a, groups = call.array(draft), call.get(1, "groups")
    *lead, c, h, w = sizes(a)
    n = len(lead)
    split = regroup(draft, a, [*lead, groups, c // groups, h, w])
    mixed = permute(split, [*range(n), n + 1, n, n + 2, n + 3])
    return regroup(draft, mixed, call.shapes[0])


@_named("flip", "fliplr", "flipud")
def _flip(draft: Draft, call: Call) -> Any:
    a = call.array(draft)
    dims = {"fliplr": (1,), "flipud": (0,)}.get(call.name) or _flat(
        call.args[1:] or [call.kwargs.get("dims")]
    )
    for dim in dims:
        index = list(range(sizes(a)[dim]))[::-1]
        a = pick(draft, a, dim % len(a.axes), index)
    return a


@_named("roll")
def _roll(draft: Draft, call: Call) -> Any:
    a = call.array(draft)
    shifts, dims = _flat([call.get(1, "shifts")]), _flat([call.get(2, "dims")])
    if None in dims:
        raise draft.fail("roll without dims cannot be lowered", "name the axes")
    for shift, dim in zip(shifts, dims, strict=True):
        n = sizes(a)[dim]
        a = pick(draft, a, dim % len(a.axes), [(i - shift) % n for i in range(n)])
    return a


@_named("index_select")
def _index_select(draft: Draft, call: Call) -> Any:
    a, dim, index = call.array(draft), call.get(1, "dim"), _value(call.get(2, "index"))
    if not isinstance(index, torch.Tensor):
        raise draft.fail("it selects what depends on the input", "select fixed places")
    return pick(draft, a, dim % len(a.axes), [int(i) % sizes(a)[dim] for i in index])


@_named("repeat_interleave")
def _repeat_interleave(draft: Draft, call: Call) -> Any:
    a, times, dim = call.array(draft), call.get(1, "repeats"), call.get(2, "dim")
    if not isinstance(times, int) or dim is None:
        raise draft.fail("this repetition cannot be lowered", "give one number and an axis")
    return pick(draft, a, dim % len(a.axes), [i // times for i in range(sizes(a)[dim] * times)])


@_named("pad")
def _pad(draft: Draft, call: Call) -> Any:
    a, widths, mode = call.array(draft), call.get(1, "pad"), call.get(2, "mode", "constant")
    value = call.get(3, "value", 0)
    if mode == "constant" and value not in (0, None):
        raise draft.fail(f"padding with {value} cannot be lowered", "pad with zeros")
    for k in range(len(widths) // 2):
        dim = len(a.axes) - 1 - k
        n = sizes(a)[dim]
        index = padded_index(draft, n, widths[2 * k], widths[2 * k + 1], mode)
        if index != list(range(n)):
            a = pick(draft, a, dim, index)
    return a


# --------------------------------------------------------------------------- sums and windows


@_named("mean", "sum")
def _mean(draft: Draft, call: Call) -> Any:
    dims = call.get(1, "dim", call.kwargs.get("axis"))
    keep = bool(call.get(2, "keepdim", call.kwargs.get("keepdims", False)))
    a = call.args[0]
    if isinstance(a, Answer):
        return _host(a, (call.name, _listed(dims), keep), call)
    return lower_mean(draft, call.array(draft), dims, call.name == "sum", keep)


def _listed(dims: Any) -> Any:
    return tuple(dims) if isinstance(dims, list) else dims


_POOL_FUNCTIONS: dict[str, Any] = {
    "max_pool1d": nn.MaxPool1d, "max_pool2d": nn.MaxPool2d,
    "avg_pool1d": nn.AvgPool1d, "avg_pool2d": nn.AvgPool2d,
    "adaptive_avg_pool1d": nn.AdaptiveAvgPool1d, "adaptive_avg_pool2d": nn.AdaptiveAvgPool2d,
    "adaptive_max_pool2d": nn.AdaptiveMaxPool2d,
}  # fmt: skip


@_named(*_POOL_FUNCTIONS, "boolean_dispatch", "fn")
def _pool(draft: Draft, call: Call) -> Any:
    kind = _POOL_FUNCTIONS.get(call.name)
    if kind is None:
        raise draft.fail("return_indices cannot be lowered", "pool without it")
    return lower_pool(draft, kind(*call.args[1:], **call.kwargs), call.array(draft))


@_named("max_pool3d", "avg_pool3d", "adaptive_avg_pool3d", "adaptive_max_pool3d")
def _pool3d(draft: Draft, call: Call) -> Any:
    """Pooling of three axes, of which the first stays as it is: of pixels only."""
    a = call.array(draft)
    depth = sizes(a)[-3]
    settings: dict[str, Any] = {}
    if call.name.startswith("adaptive"):
        wanted = _tuple(call.get(1, "output_size"), 3)
        kept = wanted[0] in (None, depth)
        kind: Any = nn.AdaptiveAvgPool2d if "avg" in call.name else nn.AdaptiveMaxPool2d
        module = kind(wanted[1:])
    else:
        names: tuple[tuple[str, Any], ...] = (
            ("kernel_size", None), ("stride", None), ("padding", 0),
        )  # fmt: skip
        given = [call.get(place + 1, name, default) for place, (name, default) in enumerate(names)]
        kernel = _tuple(given[0], 3)
        stride = _tuple(given[1], 3) if given[1] not in (None, ()) else kernel
        padding = _tuple(given[2], 3)
        kept = (kernel[0], stride[0], padding[0]) == (1, 1, 0)
        extra = ("dilation", "ceil_mode") if "max" in call.name else (
            "ceil_mode", "count_include_pad", "divisor_override",
        )  # fmt: skip
        for place, name in enumerate(extra):
            value = call.get(4 + place, name)
            if value is not None:
                settings[name] = _tuple(value, 3)[1:] if name == "dilation" else value
        kind = nn.MaxPool2d if "max" in call.name else nn.AvgPool2d
        module = kind(kernel[1:], stride[1:], padding[1:], **settings)
    if not kept:
        raise draft.fail(
            "a window over three axes would join time steps or channels",
            "pool height and width only, with a window of 1 along the first axis",
        )
    return lower_pool(draft, module, a)


@_named("multi_head_attention_forward", "scaled_dot_product_attention")
def _softmax_attention(draft: Draft, call: Call) -> Any:
    raise draft.fail(
        "torch's attention divides by a sum of exponentials (softmax), which is no sum of integers",
        "write the attention of spikes as products, q @ k.transpose(-2, -1) @ v times a number, "
        "with a neuron behind it",
    )


@_named("batch_norm")
def _batch_norm(draft: Draft, call: Call) -> Any:
    names = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    mean, var, weight, bias, training, _, eps = (
        _value(call.get(i + 1, name)) for i, name in enumerate(names)
    )
    if training and mean is not None:
        raise draft.fail(
            "a batch norm in training mode makes a sample depend on its batch", "call model.eval()"
        )
    a = call.array(draft)
    return lower_batch_norm(draft, a, mean, var, weight, bias, 1e-5 if eps is None else eps)


@_named("instance_norm")
def _instance_norm(draft: Draft, call: Call) -> Any:
    names = ("running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
    mean, var, weight, bias, own, _, eps = (
        _value(call.get(i + 1, name)) for i, name in enumerate(names)
    )
    if own in (True, None):
        raise draft.fail(
            "an instance norm takes its statistics from the sample, so it is no fixed scale",
            "build it with track_running_stats=True, or use a batch norm",
        )
    a = call.array(draft)
    return lower_batch_norm(draft, a, mean, var, weight, bias, 1e-5 if eps is None else eps)


@_named("layer_norm", "group_norm", "rms_norm", "normalize")
def _own_statistics(draft: Draft, call: Call) -> Any:
    raise draft.fail(
        f"{call.name!r} takes its statistics from the sample, so it is no fixed scale",
        "use a batch norm, whose statistics are fixed at inference",
    )


@_named("interpolate", "upsample", "upsample_nearest")
def _interpolate(draft: Draft, call: Call) -> Any:
    a = call.array(draft)
    mode = call.get(3, "mode", "nearest")
    if mode not in ("nearest", "nearest-exact"):
        raise draft.fail(
            f"interpolation of mode {mode!r} makes values between spikes", "use mode='nearest'"
        )
    before, after = sizes(a), call.shapes[0]
    scale = None if call.get(5, "recompute_scale_factor") else call.get(2, "scale_factor")
    how: dict[str, Any] = {"size": after[2:]} if scale is None else {"scale_factor": scale}
    factors = [1, 1]
    for place, (n, wanted) in enumerate(zip(before[2:], after[2:], strict=True)):
        # Torch itself says which pixel stands where: a factor given is not that of the sizes.
        ramp = torch.arange(n, dtype=torch.float32).view(-1, *[1] * (len(before) - 3 - place))
        found = nn.functional.interpolate(ramp.expand(1, 1, *before[2:]), mode=mode, **how)
        line = found[0, 0].movedim(place, -1).reshape(-1, wanted)[0]
        index = [int(i) for i in line]
        whole = wanted % n == 0 and index == [i // (wanted // n) for i in range(wanted)]
        factors.append(wanted // n if whole else 1)
        if not whole:
            a = pick(draft, a, 2 + place, index)
    if all(factor == 1 for factor in factors):
        return a
    return repeat_pixels(draft, a, factors)


# --------------------------------------------------------------------------- after the program


def _answers(call: Call) -> bool:
    """Whether an operand has already left the program."""
    return any(isinstance(a, Answer) for a in call.args[:2])


def _host(a: Any, step: tuple[Any, ...], call: Call) -> Answer:
    before = a.steps if isinstance(a, Answer) else ()
    array = a.array if isinstance(a, Answer) else a
    return Answer(array, (*before, step), call.shapes[0])


def _host_affine(draft: Draft, call: Call) -> Answer:
    """A number, or a tensor of few, added to or multiplied with an answer."""
    a, b = call.args[0], call.args[1]
    if not isinstance(a, Answer):
        a, b = b, a
    swapped = a is not call.args[0]
    value = _value(b)
    if not isinstance(value, int | float | torch.Tensor):
        raise draft.fail("this operation on the answer cannot be carried along", "do it outside")
    by = torch.as_tensor(value).double()
    if call.name in ("div", "idiv", "truediv", "itruediv", "true_divide", "divide"):
        if swapped:
            raise draft.fail("dividing by the answer cannot be carried along", "do it outside")
        return _host(a, ("scale", (1 / by).tolist()), call)
    if call.name in ("mul", "imul", "rmul", "multiply"):
        return _host(a, ("scale", by.tolist()), call)
    if call.name in ("sub", "isub", "subtract", "rsub"):
        if swapped != (call.name == "rsub"):
            a = _host(a, ("scale", -1.0), call)
        else:
            by = -by
    return _host(a, ("shift", by.tolist()), call)


@_named("softmax", "log_softmax", "sigmoid")
def _activation(draft: Draft, call: Call) -> Any:
    if call.name == "sigmoid":
        return _host(_final(draft, call), ("sigmoid",), call)
    dim = call.get(1, "dim")
    if dim is None:
        raise draft.fail(f"{call.name} without a dim cannot be lowered", "name the axis")
    return _host(_final(draft, call), (call.name, dim), call)


@_named("argmax", "argmin")
def _arg(draft: Draft, call: Call) -> Any:
    dim, keep = call.get(1, "dim"), bool(call.get(2, "keepdim", False))
    if dim is None:
        raise draft.fail(f"{call.name} over the whole batch cannot be lowered", "name the axis")
    return _host(_final(draft, call), (call.name, dim, keep), call)


@_named("max", "min")
def _extreme(draft: Draft, call: Call) -> Any:
    dim, keep = call.get(1, "dim"), bool(call.get(2, "keepdim", False))
    if not isinstance(dim, int):
        raise draft.fail(
            f"{call.name} over everything or of two tensors cannot be lowered", "name the axis"
        )
    a = _final(draft, call)
    values = _host(a, (call.name, dim, keep), call)
    return values, _host(a, (f"arg{call.name}", dim, keep), call)


@_named("amax", "amin")
def _amax(draft: Draft, call: Call) -> Any:
    dim, keep = call.get(1, "dim"), bool(call.get(2, "keepdim", False))
    if not isinstance(dim, int):
        raise draft.fail(f"{call.name} over several axes cannot be lowered", "name one axis")
    return _host(_final(draft, call), (call.name[1:], dim, keep), call)


def _final(draft: Draft, call: Call) -> Any:
    a = call.args[0]
    return a if isinstance(a, Answer) else settle(draft, call.array(draft))
