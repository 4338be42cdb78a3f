"""The walk over the tape: which event becomes what.

Layers and neurons are single events, everything else is a function of torch. Whatever repeats over
time collapses here, since equal operations on equal inputs are written once
(:meth:`~qsnn_ext.deploy.lowering.draft.Draft.write`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qsnn_ext import hosts
from qsnn_ext.deploy.lowering.axes import labels, sizes
from qsnn_ext.deploy.lowering.calls import has_state, inner_forward
from qsnn_ext.deploy.lowering.draft import Array, Constant, Draft
from qsnn_ext.deploy.lowering.functions import FUNCTIONS, Call
from qsnn_ext.deploy.lowering.layers import (
    kernel_of,
    layer_weights,
    lower_conv,
    lower_linear,
    lower_norm,
    lower_transposed_conv,
)
from qsnn_ext.deploy.lowering.operands import as_array
from qsnn_ext.deploy.lowering.pooling import lower_pool
from qsnn_ext.deploy.lowering.recurrence import lower_neuron
from qsnn_ext.deploy.lowering.tracing import Event, Ref, Tape

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)
_KINDS = (*_CONVS, *_TRANSPOSED, nn.Linear, *_NORMS, *_POOLS)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one event of the tape: those that :func:`walk` knows."""
    if isinstance(module, _KINDS):
        return not _computes_its_own_way(module)
    model = hosts.describe(module)
    if model is not None and model.no_integers is not None:
        return True  # which the walk then says
    return has_state(module) and inner_forward(module) is None


def _computes_its_own_way(module: nn.Module) -> bool:
    """Whether a layer's forward is neither torch's nor the same over time, as a host's is.

    What such a forward does is then recorded function by function.
    """
    if "forward" in vars(module):
        return True
    for kind in type(module).__mro__:
        if not {"forward", "_conv_forward", "__call__"} & set(vars(kind)):
            continue
        if kind.__module__.startswith("qsnn_ext."):
            continue
        if kind.__module__.startswith("torch.nn."):
            return False
        if not (hosts.belongs(kind) and getattr(nn, kind.__name__, None) in kind.__mro__):
            return True
    return False


def walk(draft: Draft, tape: Tape, events: list[Event], sample: Array) -> Any:
    """Write the operations of a tape into the draft.

    Args:
        draft: The program, with nothing but its input.
        tape: What the model did.
        events: Those of its events that matter.
        sample: The input.

    Returns:
        What the model returns, tensors replaced by what is known of them.

    Raises:
        LoweringError: If something has no exact integer counterpart.
    """
    known: dict[int, Any] = {tape.sample.index: sample}
    for event in events:
        draft.reached += 1
        draft.where, draft.line = event.where or "the model", event.line
        args = [_resolve(a, known) for a in event.args]
        kwargs = {k: _resolve(v, known) for k, v in event.kwargs.items()}
        if event.module is not None:
            found = _module(draft, event, args, kwargs, known)
        else:
            found = _function(draft, event, args, kwargs)
        _settle_output(draft, event, event.output, found, known)
    draft.where = "the output"
    return _resolve(tape.output, known)


def _settle_output(
    draft: Draft, event: Event, output: Any, found: Any, known: dict[int, Any]
) -> None:
    """Remember what an event gave, tensor by tensor."""
    if isinstance(output, Ref):
        if isinstance(found, tuple | list):
            found = found[0]
        _check_shape(draft, found, event.shapes[output.index])
        known[output.index] = found
    elif isinstance(output, tuple | list):
        if not isinstance(found, tuple | list) or len(found) != len(output):
            raise draft.fail(
                f"{event.name!r} gives {len(output)} results, which cannot be lowered",
                "use one that gives one tensor",
            )
        for part, value in zip(output, found, strict=True):
            _settle_output(draft, event, part, value, known)


def _check_shape(draft: Draft, found: Any, shape: tuple[int, ...]) -> None:
    """Layers read other axes for other ranks; here a misreading cannot go unnoticed."""
    if isinstance(found, Array) and sizes(found) != list(shape):
        raise draft.fail(
            f"as an operation on [C, H, W] it would give {sizes(found)}, not the model's "
            f"{list(shape)}",
            "keep channels, height and width apart, with batch and time in front",
        )


def _resolve(x: Any, known: dict[int, Any]) -> Any:
    if isinstance(x, Ref):
        return known[x.index]
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(_resolve(i, known) for i in x))
    if isinstance(x, tuple | list):
        return type(x)(_resolve(i, known) for i in x)
    if isinstance(x, dict):
        return {k: _resolve(v, known) for k, v in x.items()}
    return Constant(x) if isinstance(x, Tensor) else x


def _module(
    draft: Draft,
    event: Event,
    args: list[Any],
    kwargs: dict[str, Any],
    known: dict[int, Any],
) -> Any:
    module = event.module
    assert module is not None
    args += [kwargs.pop(k) for k in ("input", "input_", "x", "x_seq") if k in kwargs]
    x = as_array(
        draft, args[0] if args else None, "its input does not depend on the input of the model",
        "remove it, or feed it from the model's input, by position",
    )  # fmt: skip
    draft.check_input(x)
    if not isinstance(module, _KINDS):
        outputs, states = lower_neuron(draft, module, x, args[1:], kwargs)
        for name, index in event.states.items():
            known[index] = states[name]
        return outputs
    if isinstance(module, (*_NORMS, *_CONVS, *_TRANSPOSED)):
        _check_steps(draft, module, x)
    if isinstance(module, _CONVS):
        return lower_conv(draft, layer_weights(draft, module), kernel_of(module), x)
    if isinstance(module, _TRANSPOSED):
        target = next(iter(event.shapes.values()))
        weights = layer_weights(draft, module)
        return lower_transposed_conv(draft, weights, kernel_of(module), x, target)
    if isinstance(module, nn.Linear):
        return lower_linear(draft, layer_weights(draft, module), x)
    if isinstance(module, _NORMS):
        return lower_norm(draft, module, x)
    return lower_pool(draft, module, x)


def _check_steps(draft: Draft, module: Any, x: Array) -> None:
    """A host's layers may take time as their first axis."""
    if hosts.over_time(module) and not (x.axes and labels(x.axes[0]) == {"T"}):
        raise draft.fail(
            "it runs over its first axis, which is not time here",
            "put time in front, [T, N, ...], or say where it is with time_first=",
        )


def _function(draft: Draft, event: Event, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """A function or method of torch."""
    name = event.name.strip("_") if event.name.startswith("__") else event.name.removesuffix("_")
    # What is mostly passed by position, under torch's names.
    args += [kwargs.pop(k) for k in ("input", "tensors", "other") if k in kwargs]
    handler = FUNCTIONS.get(name)
    if handler is None or not args:
        raise draft.fail(
            f"the operation {name!r} has no integer form",
            "express it with layers, neurons, additions and poolings",
        )
    kwargs.pop("inplace", None)
    return handler(draft, Call(event, name, args, kwargs))
