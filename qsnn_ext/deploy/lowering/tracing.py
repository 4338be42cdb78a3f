"""Records what a model does to a sample: the tape that lowering reads.

The model itself runs, on real tensors, so any Python between its layers just runs too: loops over
time, optional arguments, hooks, branches on shapes. What is written down is every call of a layer
or neuron and every function of torch whose operands depend on the sample. Two things would make
that record incomplete, and both are refused with the line they happen in: numbers taken out of a
tensor (``item()``, ``if x.sum() > 0``), and tensors that come about where torch does not tell of
it, as in a ``torch.autograd.Function``.
"""

from __future__ import annotations

import functools
import linecache
import os
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from qsnn_ext import hosts, kernels
from qsnn_ext.errors import LoweringError


@dataclass(frozen=True)
class Ref:
    """A tensor that depends on the sample, by its number on the tape."""

    index: int


@dataclass(eq=False)
class Event:
    """One thing the model did.

    Attributes:
        name: Path of a module, or name of a function.
        module: The layer or neuron that was called; None for a function of torch.
        args, kwargs: Its operands, tensors that depend on the sample being :class:`Ref`.
        where: Path of the innermost module whose ``forward`` did it.
        line: Where that stands in the model's code, ``""`` if unknown.
        output: What came out, likewise.
        shapes: Shape of every tensor that came out, by number.
        states: Attribute of the neuron -> its membrane potential after the call.
    """

    name: str
    module: nn.Module | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    where: str
    line: str
    output: Any = None
    shapes: dict[int, tuple[int, ...]] = field(default_factory=dict)
    states: dict[str, int] = field(default_factory=dict)

    def reads(self) -> Iterator[int]:
        """Numbers of the tensors it depends on."""
        yield from _numbers((self.args, self.kwargs))

    def writes(self) -> Iterator[int]:
        """Numbers of the tensors that it made."""
        yield from self.shapes


@dataclass(eq=False)
class Tape:
    """What a model did to a sample.

    Attributes:
        events: In order.
        sample: Number of the sample.
        output: What the model returned, tensors that depend on the sample being :class:`Ref`.
        shape: Of the sample.
    """

    events: list[Event]
    sample: Ref
    output: Any
    shape: torch.Size

    def live(self, has_state: Callable[[nn.Module], bool]) -> list[Event]:
        """The events the output depends on, among them all calls of a neuron that has a say.

        Args:
            has_state: Whether a module carries anything from call to call.
        """
        needed = set(_numbers(self.output))
        neurons: set[int] = set()
        kept: set[int] = set()
        while True:
            before = len(kept), len(neurons)
            for place in range(len(self.events) - 1, -1, -1):
                event = self.events[place]
                own = event.module is not None and id(event.module) in neurons
                if place not in kept and (own or not needed.isdisjoint(event.writes())):
                    kept.add(place)
                    needed.update(event.reads())
                    if event.module is not None and has_state(event.module):
                        neurons.add(id(event.module))
            if (len(kept), len(neurons)) == before:
                return [event for place, event in enumerate(self.events) if place in kept]


def trace(
    model: nn.Module,
    forward: Callable[[], Any],
    sample: Tensor,
    is_leaf: Callable[[nn.Module], bool],
    states_of: Callable[[nn.Module], dict[str, Tensor]],
    inner_forward: Callable[[nn.Module], type[nn.Module] | None],
) -> Tape:
    """The tape of ``forward()``, which calls ``model`` with ``sample``.

    Args:
        model: A model in evaluation mode.
        forward: Runs it.
        sample: What it is run on.
        is_leaf: Which modules are written down as one event.
        states_of: The membrane potentials that such a module keeps, by attribute.
        inner_forward: The class whose ``forward`` is written down as one event of a module, where
            the module's own goes around it.

    Raises:
        LoweringError: If the model does something that leaves the tape incomplete.
        Exception: Whatever the model raises.
    """
    recorder = _Recorder(model, is_leaf, states_of)
    around = {id(m): kind for m in model.modules() if (kind := inner_forward(m)) is not None}
    ref = recorder.track(sample)
    with (
        kernels.use_backend("function"),  # nothing is compiled for one pass
        torch.compiler.set_stance("force_eager"),
        torch.no_grad(),
        recorder.calls(),
        recorder.inner_calls(around),
        recorder.taint,
        recorder,
    ):
        result = forward()
    return Tape(recorder.events, ref, recorder.refs(result, "the output"), sample.shape)


# --------------------------------------------------------------------------- what torch is asked


def _set_of(names: str) -> frozenset[str]:
    return frozenset(names.split())


#: Questions whose answer is the same for every sample of a shape.
_SHAPES = _set_of(
    """
    size dim numel nelement ndimension stride is_floating_point is_complex is_contiguous
    get_device element_size storage_offset __len__ __hash__ __repr__ __format__ type is_tensor
    is_signed has_names is_same_size result_type untyped_storage register_hook retain_grad
    is_shared is_pinned is_inference __dir__ is_set_to
    """
)
#: Attributes of a tensor that are no such questions.
_VIEWS = {"T": "t", "mT": "mT", "data": "detach", "H": "t", "mH": "mT", "real": "detach"}
#: Functions that take a number out of a tensor.
_LEAKS = _set_of(
    """
    item tolist numpy __bool__ __int__ __float__ __index__ __complex__ __contains__ __array__
    equal allclose is_nonzero __dlpack__
    """
)
#: Functions whose result has the shape of an operand but none of its values.
_BLANKS = _set_of(
    """
    zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_tensor
    """
)
_RANDOM = _set_of("rand_like randn_like randint_like")


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))


class _Taint(TorchDispatchMode):
    """Knows which tensors depend on the sample, seen from beneath all of torch's Python."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tensors: Any = WeakIdKeyDictionary()
        self.off = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.off and any(t in self.tensors for t in _tensors((args, kwargs or {}))):
            for tensor in _tensors(out):
                self.tensors[tensor] = True
        return out


class _Recorder(TorchFunctionMode):
    """Writes the tape."""

    def __init__(
        self,
        model: nn.Module,
        is_leaf: Callable[[nn.Module], bool],
        states_of: Callable[[nn.Module], dict[str, Tensor]],
    ) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.taint = _Taint()
        self.names = {id(m): n for n, m in reversed(list(model.named_modules()))}
        self.is_leaf, self.states_of = is_leaf, states_of
        self.stack: list[str] = []
        self.inside = False  # a leaf: what it calls is its own business
        self.count = 0
        # Tensor -> its number, and how often its storage had been written into by then.
        self.tracked: Any = WeakIdKeyDictionary()
        self.writes: dict[int, int] = {}
        # Neuron -> value and version of the potential that its last call left.
        self.left: dict[int, Any] = {}
        self.held: list[Tensor] = []  # storages written into: their addresses stay taken

    # -- tensors -----------------------------------------------------------------------------

    def track(self, tensor: Tensor) -> Ref:
        """Give a tensor a (new) number."""
        self.tracked[tensor] = (self.count, self.writes.get(_storage(tensor), 0))
        self.taint.tensors[tensor] = True
        self.count += 1
        return Ref(self.count - 1)

    def refs(self, value: Any, name: str) -> Any:
        """``value`` with every tensor that depends on the sample replaced by its number."""
        if isinstance(value, Tensor):
            return self._ref(value, name)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self.refs(v, name) for v in value))
        if isinstance(value, (tuple, list)):
            return type(value)(self.refs(v, name) for v in value)
        if isinstance(value, dict) or hasattr(value, "items"):
            return {k: self.refs(v, name) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(*(self.refs(v, name) for v in (value.start, value.stop, value.step)))
        return value

    def _ref(self, tensor: Tensor, name: str) -> Any:
        found = self.tracked.get(tensor)
        written = self.writes.get(_storage(tensor), 0)
        if found is not None and found[1] == written:
            return Ref(found[0])
        if found is not None or written:
            raise self._fail(
                f"{name!r} reads a tensor that was written into through another view of it",
                "write x = x + y instead of an assignment in place",
            )
        if tensor in self.taint.tensors:
            raise self._fail(
                f"{name!r} reads a tensor that depends on the input in a way that is not seen (a "
                "torch.autograd.Function, a state kept by a layer, a view of another library)",
                "express it with functions of torch, or use a neuron of SpikingJelly or snnTorch",
            )
        # What is no parameter may be written into before the tape is read.
        return tensor if isinstance(tensor, nn.Parameter) else tensor.detach().clone()

    def _fail(self, why: str, remedy: str) -> LoweringError:
        where = self.stack[-1] if self.stack and self.stack[-1] else "the model"
        return error_at(where, own_line(), why, remedy)

    # -- functions ---------------------------------------------------------------------------

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.inside:
            return func(*args, **kwargs)
        name = _name(func)
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", "")
            if name not in _VIEWS:
                return func(*args, **kwargs)
            name = _VIEWS[name]
        if name in _SHAPES or name.startswith(("_set_grad", "_has_", "_is_")):
            return func(*args, **kwargs)
        known = [t for t in _tensors((args, kwargs)) if t in self.taint.tensors]
        if not known:
            return func(*args, **kwargs)
        if name in _LEAKS:
            raise self._fail(
                f"it branches on the values of a tensor, or takes them out of it ({name})",
                "branch on shapes only, and keep numbers for logging out of forward",
            )
        if name in _RANDOM:
            raise self._fail(
                f"it draws random numbers ({name}), which a program would draw once and for all",
                "draw them in training only, or before the model is called",
            )
        if name in _BLANKS:
            with self._untainted():
                return func(*args, **kwargs)
        event = Event(
            name, None, self.refs(args, name), self.refs(kwargs, name),
            self.stack[-1] if self.stack else "", own_line(),
        )  # fmt: skip
        before = [(t, t._version) for t in _tensors((args, kwargs))]
        out = func(*args, **kwargs)
        written = next((t for t, version in before if t._version != version), None)
        if written is not None:
            key = _storage(written)
            self.writes[key] = self.writes.get(key, 0) + 1
            self.held.append(written)
        return self._record(event, out, written)

    def _record(self, event: Event, out: Any, written: Tensor | None) -> Any:
        for tensor in _tensors(out if written is None else (out, written)):
            ref = self.track(tensor)
            event.shapes[ref.index] = tuple(tensor.shape)
        event.output = self.refs(out if written is None or out is not None else written, event.name)
        self.events.append(event)
        return out

    @contextmanager
    def _untainted(self) -> Iterator[None]:
        self.taint.off = True
        try:
            yield
        finally:
            self.taint.off = False

    # -- modules -----------------------------------------------------------------------------

    @contextmanager
    def calls(self) -> Iterator[None]:
        """Hear of every call of a module in this thread."""
        stock, thread, recorder = nn.Module.__call__, threading.get_ident(), self

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if recorder.inside or threading.get_ident() != thread:
                return stock(module, *args, **kwargs)
            return recorder._call(stock, module, args, kwargs)

        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = stock  # type: ignore[method-assign]

    @contextmanager
    def inner_calls(self, around: dict[int, type[nn.Module]]) -> Iterator[None]:
        """Hear of the forward of a class that a subclass's own goes around."""
        thread, recorder = threading.get_ident(), self
        before = {kind: vars(kind)["forward"] for kind in around.values()}

        def heard(kind: type[nn.Module]) -> Any:
            def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                inner = functools.partial(before[kind], module)
                elsewhere = recorder.inside or threading.get_ident() != thread
                if elsewhere or around.get(id(module)) is not kind:
                    return inner(*args, **kwargs)
                path = recorder.names.get(id(module), type(module).__name__)
                return recorder._leaf(path, module, inner, args, kwargs)

            return forward

        for kind in before:
            kind.forward = heard(kind)
        try:
            yield
        finally:
            for kind, forward in before.items():
                kind.forward = forward

    def _call(
        self, stock: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.names.get(id(module), type(module).__name__)
        read = (args, kwargs, self.states_of(module))
        reads = any(t in self.taint.tensors for t in _tensors(read))
        if not (reads and self.is_leaf(module)):
            self.stack.append(path)
            try:
                return stock(module, *args, **kwargs)
            finally:
                self.stack.pop()
        # Hooks of a leaf are the model's own code: only its forward is one event.
        forward, own = module.forward, vars(module).get("forward")
        vars(module)["forward"] = lambda *a, **k: self._leaf(path, module, forward, a, k)
        try:
            return stock(module, *args, **kwargs)
        finally:
            del vars(module)["forward"]
            if own is not None:
                vars(module)["forward"] = own

    def _leaf(
        self,
        path: str,
        module: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        event = Event(
            path, module, self.refs(args, path), self.refs(kwargs, path), path, own_line()
        )
        if len(args) == 1 and not kwargs:
            self._check_state(path, module)
        self.inside = True
        try:
            out = forward(*args, **kwargs)
        except Exception as error:
            raise ModelFailedError(path) from error
        finally:
            self.inside = False
        if (potential := _potential(module)) is not None:
            self.left[id(module)] = potential
        for name, state in self.states_of(module).items():
            ref = self.track(state)
            event.states[name] = ref.index
            event.shapes[ref.index] = tuple(state.shape)
        # After its states: a host may return the very tensor that it keeps.
        return self._record(event, out, None)

    def _check_state(self, path: str, module: nn.Module) -> None:
        """A neuron begins at rest and goes on from what it left itself."""
        held = _potential(module)
        if held is None:
            return
        value, version, rest = held
        if id(module) in self.left:
            before = self.left[id(module)]
            if value is before[0] and version == before[1]:
                return
            why = "its membrane potential was set or reset between two of its steps"
        else:
            value = torch.as_tensor(value)
            if not bool(((value != 0) & (value != rest)).any()):
                return
            why = "its membrane potential is set before its first step"
        raise error_at(
            path, own_line(), why, "let it start from rest and hand its potential on by itself"
        )


def _potential(module: nn.Module) -> tuple[Any, int, float] | None:
    """The membrane potential that a neuron keeps, how often it was written, where it rests.

    What is kept during one call only is none.
    """
    link = hosts.link(module)
    inner: Any = module if link is None else getattr(module, link.neuron or "", None)
    model = hosts.describe(inner)
    if model is None or model.output != "spikes":
        return None
    value = getattr(inner, model.potential or "", None)
    if not isinstance(value, int | float | Tensor):
        return None
    return value, value._version if isinstance(value, Tensor) else 0, model.v_reset


class ModelFailedError(Exception):
    """A layer of the model raised an error; the message is its path, the cause the error."""


def error_at(where: str, line: str, why: str, remedy: str) -> LoweringError:
    """The error for something at a place of the model."""
    return LoweringError(
        f"{where or 'the model'}: {why}; {remedy}" + (f" (at {line})" if line else "")
    )


# --------------------------------------------------------------------------- places in code

_LIBRARIES = tuple(
    os.path.join(os.path.dirname(m.__file__), "")
    for name in ("torch", "qsnn_ext")
    if (m := sys.modules.get(name)) is not None and m.__file__
)
_STANDARD = os.path.join(sysconfig.get_path("stdlib"), "")


def own_line() -> str:
    """The innermost line of the model's own code that is being executed: ``file:line: text``."""
    frame: Any = sys._getframe(1)
    helpers = hosts.helpers()
    while frame is not None:
        path = frame.f_code.co_filename
        helper = frame.f_globals.get("__name__", "").startswith(helpers)
        library = path.startswith(_LIBRARIES) or helper
        standard = path.startswith(_STANDARD) and "site-packages" not in path
        if not library and not standard and not path.startswith("<frozen"):
            text = linecache.getline(path, frame.f_lineno).strip()
            place = f"{os.path.basename(path)}:{frame.f_lineno}"
            return f"{place}: {text}" if text else place
        if path.startswith(_LIBRARIES) and frame.f_code.co_name == "lower":
            return ""  # the call of deploy.lower is no part of the model
        frame = frame.f_back
    return ""


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for v in value:
            yield from _tensors(v)
    elif isinstance(value, dict):
        for v in value.values():
            yield from _tensors(v)
    elif isinstance(value, slice):
        yield from _tensors((value.start, value.stop, value.step))


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, Ref):
        yield value.index
    elif isinstance(value, (tuple, list)):
        for v in value:
            yield from _numbers(v)
    elif isinstance(value, dict):
        for v in value.values():
            yield from _numbers(v)
    elif isinstance(value, slice):
        yield from _numbers((value.start, value.stop, value.step))
