"""Records what a model does to one sample as a ``torch.fx`` graph.

A plain symbolic trace fails on ``x.dim()``, on loops over time and on any other Python that looks
at its tensors. Here every proxy carries the concrete result for the sample, so such code just
runs, and loops over time are unrolled. Layers and neurons stay single nodes.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from qsnn_ext.errors import LoweringError

#: Attributes and methods of a tensor whose answer is the same for every sample.
_SHAPE_ATTRIBUTES = ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "requires_grad")


def origin(node: fx.Node) -> str:
    """Path of the module that a node was recorded in."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(v[0]) for v in stack.values() if v and v[0]]
    return paths[-1] if paths else "the model"


class ConcreteProxy(fx.Proxy):
    """A proxy that knows its value for the sample."""

    concrete: Any

    def __getattr__(self, name: str) -> Any:
        if name in _SHAPE_ATTRIBUTES and isinstance(self.concrete, Tensor):
            return getattr(self.concrete, name)
        return super().__getattr__(name)

    def size(self, dim: int | None = None) -> Any:
        """Concrete sizes."""
        return self.concrete.size() if dim is None else self.concrete.size(dim)

    def dim(self) -> int:
        """Concrete rank."""
        return int(self.concrete.dim())

    def numel(self) -> int:
        """Concrete number of elements."""
        return int(self.concrete.numel())

    def is_floating_point(self) -> bool:
        """Concrete dtype class."""
        return bool(self.concrete.is_floating_point())

    def __len__(self) -> int:
        return len(self.concrete)

    def __iter__(self) -> Iterator[Any]:
        return (operator.getitem(self, i) for i in range(len(self.concrete)))

    def __bool__(self) -> bool:
        raise LoweringError(
            f"{origin(self.node)}: it branches on the values of a tensor "
            f"({self.node.format_node()}); branch on shapes only"
        )


class ConcreteTracer(fx.Tracer):
    """Traces with a sample.

    Args:
        sample: The tensor the model is called with.
        is_leaf: Which modules become single nodes.
    """

    def __init__(self, sample: Tensor, is_leaf: Callable[[nn.Module], bool]) -> None:
        super().__init__(autowrap_functions=())
        self.sample = sample
        self._is_leaf = is_leaf
        self._inside = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """See the class."""
        return self._is_leaf(m)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Record a leaf, or trace into the module."""
        if self._inside:  # a leaf is being executed: what it calls is its own business
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters are constants here, not nodes of their own."""
        return attr_val

    def proxy(self, node: fx.Node) -> ConcreteProxy:
        """A proxy of our kind."""
        return ConcreteProxy(node, self)

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any | None = None,
        proxy_factory_fn: Any = None,
    ) -> Any:
        """Record a node and compute its value."""
        result = super().create_proxy(kind, target, args, kwargs, name, type_expr, proxy_factory_fn)
        if kind == "output":
            return result
        try:
            concrete = self._execute(kind, target, args, kwargs)
        except LoweringError:
            raise
        except Exception as error:
            where = target if kind == "call_module" else origin(result.node)
            raise LoweringError(
                f"{where}: it fails on the sample ({type(error).__name__}: {error}); check that "
                "model(sample) runs"
            ) from error
        if not isinstance(concrete, Tensor | tuple | list):
            return concrete  # a number or a size: the same for every sample
        result.concrete = concrete
        result.node.meta["concrete"] = concrete
        return result

    def _execute(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        def real(x: Any) -> Any:
            if isinstance(x, ConcreteProxy):
                return x.concrete
            if isinstance(x, tuple | list):
                return type(x)(real(i) for i in x)
            if isinstance(x, slice):
                return slice(real(x.start), real(x.stop), real(x.step))
            return x

        if kind == "placeholder":
            return self.sample
        if kind == "get_attr":
            found: Any = self.root
            for part in target.split("."):
                found = getattr(found, part)
            return found
        args, kwargs = real(tuple(args)), {k: real(v) for k, v in kwargs.items()}
        if kind == "call_function":
            return target(*args, **kwargs)
        if kind == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        self._inside = True
        try:
            return self.root.get_submodule(target).forward(*args, **kwargs)
        finally:
            self._inside = False


def trace(model: nn.Module, sample: Tensor, is_leaf: Callable[[nn.Module], bool]) -> fx.Graph:
    """The graph of ``model(sample)``; every node carries its value in ``meta["concrete"]``.

    Args:
        model: A model in evaluation mode.
        sample: What it is called with.
        is_leaf: Which modules become single nodes.

    Raises:
        LoweringError: If the model cannot be traced.
    """
    tracer = ConcreteTracer(sample, is_leaf)
    count = len([p for p in _parameters(model) if p.default is p.empty])
    if count > 1:
        raise LoweringError(
            f"{type(model).__name__}.forward takes {count} inputs; a deployed program takes one: "
            "keep the membrane potentials inside the model"
        )
    optional = {p.name: p.default for p in _parameters(model)[1:] if p.default is not p.empty}
    try:
        with torch.no_grad():
            return tracer.trace(model, optional)
    except LoweringError:
        raise
    except Exception as error:  # whatever Python does between the layers
        raise LoweringError(
            f"{type(model).__name__}: its forward cannot be traced ({type(error).__name__}: "
            f"{error}); check that model(sample) runs, and keep what it does to tensors to layers, "
            "neurons, additions and poolings"
        ) from error


def _parameters(model: nn.Module) -> list[Any]:
    return [
        p
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
