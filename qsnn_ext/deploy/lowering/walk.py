"""The walk over the traced graph: which node becomes what.

Layers and neurons are single nodes, everything else is a function of torch. Whatever repeats over
time collapses here, since equal operations on equal inputs are written once
(:meth:`~qsnn_ext.deploy.lowering.draft.Draft.write`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from qsnn_ext import hosts
from qsnn_ext.deploy.lowering.arithmetic import lower_add, lower_multiply
from qsnn_ext.deploy.lowering.axes import expand, flatten, regroup, select, sizes, stack
from qsnn_ext.deploy.lowering.calls import lower_neuron, read_membrane, runs_over_time
from qsnn_ext.deploy.lowering.draft import Array, Complement, Constant, Draft, Membrane
from qsnn_ext.deploy.lowering.layers import lower_conv, lower_linear, lower_norm
from qsnn_ext.deploy.lowering.pooling import lower_mean, lower_pool
from qsnn_ext.deploy.lowering.tracing import origin

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_POOL_FUNCTIONS: dict[str, Any] = {
    "max_pool1d": nn.MaxPool1d, "max_pool2d": nn.MaxPool2d,
    "avg_pool1d": nn.AvgPool1d, "avg_pool2d": nn.AvgPool2d,
    "adaptive_avg_pool2d": nn.AdaptiveAvgPool2d,
}  # fmt: skip


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is a single node of the graph: those that :func:`walk` knows."""
    kinds = (*_CONVS, nn.Linear, *_NORMS, *_POOLS, *_IDENTITIES, nn.Flatten)
    return isinstance(module, kinds) or _is_neuron(module)


def walk(draft: Draft, graph: fx.Graph, model: nn.Module, sample: Array) -> Any:
    """Write the operations of a graph into the draft.

    Args:
        draft: The program, with nothing but its input.
        graph: The graph of ``model``, with concrete values.
        model: The model.
        sample: The input.

    Returns:
        What the model returns, tensors replaced by what is known of them.

    Raises:
        LoweringError: If something has no exact integer counterpart.
    """
    known: dict[fx.Node, Any] = {}
    result: Any = None
    for node in graph.nodes:
        args = [_resolve(a, known) for a in node.args]
        kwargs = {k: _resolve(v, known) for k, v in node.kwargs.items()}
        if node.op == "output":
            result = args[0]
            break
        found = sample
        if node.op != "placeholder":
            found = _visit(draft, node, model, args, kwargs)
            _check_shape(draft, found, node.meta.get("concrete"))
        known[node] = found
    return result


def as_tensor(draft: Draft, a: Any) -> Any:
    """An operand, where numbers are constants and a membrane potential is read."""
    if isinstance(a, Membrane):
        return read_membrane(draft, a)
    return Constant(a) if isinstance(a, int | float) else a


def as_array(draft: Draft, a: Any, why: str, remedy: str) -> Array:
    """As :func:`as_tensor`, where only a tensor of the program will do; else the error says why."""
    a = as_tensor(draft, a)
    if isinstance(a, Complement):
        raise draft.fail(
            "1 - spikes is possible within a product only",
            "multiply it with spikes, as SEW's IAND does",
        )
    if not isinstance(a, Array):
        raise draft.fail(why, remedy)
    return a


def _check_shape(draft: Draft, found: Any, concrete: Any) -> None:
    """Layers read other axes for other ranks; here a misreading cannot go unnoticed."""
    if isinstance(found, Array) and sizes(found) != list(concrete.shape):
        raise draft.fail(
            f"as an operation on [C, H, W] it would give {sizes(found)}, not the model's "
            f"{list(concrete.shape)}",
            "keep channels, height and width apart, with batch and time in front",
        )


def _depends(x: Any) -> bool:
    """Whether anything in ``x`` depends on the input."""
    if isinstance(x, tuple | list):
        return any(_depends(i) for i in x)
    return isinstance(x, Array | Complement | Membrane)


def _is_neuron(module: nn.Module) -> bool:
    return hosts.adapter_of(module) is not None or runs_over_time(module)


def _resolve(x: Any, known: dict[fx.Node, Any]) -> Any:
    if isinstance(x, fx.Node):
        return known[x]
    if isinstance(x, tuple | list):
        return type(x)(_resolve(i, known) for i in x)
    return Constant(x) if isinstance(x, Tensor) else x


def _visit(
    draft: Draft, node: fx.Node, model: nn.Module, args: list[Any], kwargs: dict[str, Any]
) -> Any:
    if node.op == "get_attr":
        found: Any = model
        for part in str(node.target).split("."):
            found = getattr(found, part)
        return Constant(found)
    # What is mostly passed by position, under torch's names.
    args += [kwargs.pop(k) for k in ("input", "tensors", "other") if k in kwargs]
    if node.op == "call_module":
        draft.where = str(node.target)
        return _module(draft, model.get_submodule(draft.where), args, kwargs)
    draft.where = origin(node)
    if not (_depends(args) or _depends(list(kwargs.values()))):
        return Constant(node.meta.get("concrete"))
    if not args:
        raise draft.fail("its tensors are passed by name", "pass them by position")
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "?")
    return _function(draft, name, args, kwargs, node.meta.get("concrete"))


def _module(draft: Draft, module: nn.Module, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if not args:
        raise draft.fail("its input is passed by name", "pass it by position")
    x = as_array(
        draft, args[0], "its input does not depend on the input of the model",
        "remove it, or feed it from the model's input",
    )  # fmt: skip
    if _is_neuron(module):
        return lower_neuron(draft, module, x, args[1] if len(args) > 1 else kwargs.get("mem"))
    _once_per_step(draft, x)
    if isinstance(module, _CONVS):
        return lower_conv(draft, module, x)
    if isinstance(module, nn.Linear):
        return lower_linear(draft, module, x)
    if isinstance(module, _NORMS):
        return lower_norm(draft, module, x)
    if isinstance(module, _POOLS):
        return lower_pool(draft, module, x)
    if isinstance(module, nn.Flatten):
        start = module.start_dim
        if getattr(module, "step_mode", "s") == "m" and start >= 0:
            start += 1  # SpikingJelly's counts from the batch axis, behind time
        return flatten(x, start, module.end_dim)
    return x  # an identity


def _once_per_step(draft: Draft, x: Array) -> None:
    if x.reduction != "none":
        raise draft.fail(
            "it follows a sum over time, so it would run once per sequence",
            "sum or average over time last",
        )


def _function(
    draft: Draft, name: str, args: list[Any], kwargs: dict[str, Any], concrete: Any
) -> Any:
    """A function or method of torch; ``concrete`` is its result on the sample."""
    if name in ("add", "add_", "iadd"):
        if kwargs.get("alpha", 1) != 1:
            raise draft.fail("a scaled addition cannot be lowered", "add without alpha")
        return lower_add(draft, as_tensor(draft, args[0]), as_tensor(draft, args[1]))
    if name in ("sub", "sub_", "isub"):
        return lower_add(draft, as_tensor(draft, args[0]), as_tensor(draft, args[1]), sign=-1)
    if name == "rsub":
        return lower_add(draft, as_tensor(draft, args[1]), as_tensor(draft, args[0]), sign=-1)
    if name in ("mul", "mul_", "imul", "logical_and"):
        return lower_multiply(draft, as_tensor(draft, args[0]), as_tensor(draft, args[1]))
    if name in ("truediv", "div", "div_", "itruediv"):
        if not isinstance(args[1], int | float) or args[1] == 0:
            raise draft.fail("dividing by a tensor cannot be lowered", "divide by a number")
        return lower_multiply(draft, as_tensor(draft, args[0]), Constant(1.0 / args[1]))
    if name == "getitem":
        return _item(draft, args[0], args[1], concrete)
    if name == "unbind":
        if args[1:] not in ([], [0]) or kwargs.get("dim", 0) != 0:
            raise draft.fail("this unbind cannot be lowered", "unbind time only, the first axis")
        return tuple(_item(draft, args[0], t, c) for t, c in enumerate(concrete))
    if name == "stack":
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        return stack(draft, [as_tensor(draft, a) for a in args[0]], dim)
    if isinstance(args[0], Membrane) and name in ("detach", "clone", "contiguous"):
        return args[0]
    if name in ("zeros_like", "ones_like"):
        return Constant(concrete)
    if name in ("contiguous", "clone", "detach", "float", "to", "dropout", "type_as", "cpu"):
        return as_tensor(draft, args[0])
    x = as_array(
        draft, args[0], f"{name!r} cannot be lowered for what it is applied to",
        "apply it to one tensor that depends on the model's input",
    )  # fmt: skip
    if name in ("mean", "sum"):
        if kwargs.get("keepdim"):
            raise draft.fail("keepdim cannot be lowered", "leave the axis out")
        dims = args[1] if len(args) > 1 else kwargs.get("dim")
        return lower_mean(draft, x, dims, total=name == "sum")
    if name in ("flatten", "view", "reshape", "unsqueeze", "squeeze", "unflatten"):
        return regroup(draft, x, concrete.shape)
    if name in ("expand", "repeat", "unsqueeze_"):
        return expand(draft, x, concrete.shape)
    if name in _POOL_FUNCTIONS:
        _once_per_step(draft, x)
        return lower_pool(draft, _POOL_FUNCTIONS[name](*args[1:], **kwargs), x)
    raise draft.fail(
        f"the operation {name!r} has no integer form",
        "express it with layers, neurons, additions and poolings",
    )


def _item(draft: Draft, a: Any, index: Any, concrete: Any) -> Any:
    if isinstance(a, tuple | list):
        return a[index]
    if isinstance(a, Constant):
        return Constant(concrete)
    array = as_array(draft, a, "indexing cannot be lowered for it", "index time steps only")
    return select(draft, array, index, concrete.shape)
