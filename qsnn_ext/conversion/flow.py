"""What a run on a sample tells of a model: who feeds whom, what fires, and how much is computed.

Every tensor is followed from where it comes. Its sources are the model's input and the weighted
layers whose output it was made of without other weights in between. From the sources of a layer's
input follow the layers that see the model's input itself (the first ones) and those whose output
reaches no other weights (the last ones), however the model is put together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode

from qsnn_ext import hosts, trace
from qsnn_ext.layers import QuantizedWeight
from qsnn_ext.layers.counterparts import is_stock_class
from qsnn_ext.wrapping import uncompiled

#: Source that stands for the model's input; layers and parameter holders stand for themselves.
_INPUT = 0

#: Operations that take of a tensor its shape alone.
_SHAPE_ONLY = frozenset({
    "aten::zeros_like", "aten::ones_like", "aten::empty_like", "aten::full_like",
    "aten::rand_like", "aten::randn_like", "aten::new_zeros", "aten::new_ones", "aten::new_empty",
    "aten::new_full", "aten::new_empty_strided",
})  # fmt: skip

#: Operations whose first, or second, argument only chooses among values.
_CHOOSING = {"aten::where": 0, "aten::masked_fill": 1, "aten::masked_fill_": 1}

#: Operations that multiply with a matrix.
_PRODUCTS = frozenset({
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::addmv",
    "aten::linear", "aten::matmul", "aten::convolution", "aten::einsum",
})  # fmt: skip

#: Operations that do so with all the matrices of a layer of torch at once.
_FUSED = frozenset({"aten::_transformer_encoder_layer_fwd", "aten::_native_multi_head_attention"})

#: Operations that go through a tensor step by step.
_STEPWISE = frozenset({"aten::select", "aten::unbind", "aten::split", "aten::chunk"})

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)


@dataclass
class Flow:
    """What was seen.

    Attributes:
        order: weighted layers in the order of their first call.
        firsts: those that see the model's input, in that order.
        lasts: those after which no weights come, in that order.
        looped: ids of layers that see what they gave, with no other weights in between.
        operations: multiply-accumulates of each weighted layer, and of the others' matrices, by id.
        states: values that each neuron carries, by id.
        readouts: ids of neurons that gave their potential, and no spikes.
        neurons: modules that are probably neurons, by id, with what was seen of them.
        unscaled: ids of layers whose currents reach a neuron without a norm in between, and that
            do not normalize their weights themselves.
        read: ids of layers whose weights somebody else multiplied with.
    """

    order: list[nn.Module] = field(default_factory=list)
    firsts: list[nn.Module] = field(default_factory=list)
    lasts: list[nn.Module] = field(default_factory=list)
    looped: set[int] = field(default_factory=set)
    operations: dict[int, int] = field(default_factory=dict)
    states: dict[int, int] = field(default_factory=dict)
    readouts: set[int] = field(default_factory=set)
    neurons: dict[int, str] = field(default_factory=dict)
    unscaled: set[int] = field(default_factory=set)
    read: set[int] = field(default_factory=set)


def follow(
    model: nn.Module,
    layers: Sequence[nn.Module],
    holders: Sequence[nn.Module],
    sample: Any,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> Flow:
    """Run the model once, undisturbed, and follow what flows through it.

    Args:
        model: what to run.
        layers: its weighted layers.
        holders: modules with matrices of their own that are no layers to follow.
        sample: what it runs on.
        forward: see :func:`qsnn_ext.trace.call`.
    """
    watch = _Watch(layers, holders)
    with trace.undisturbed(model), uncompiled(model):
        with watch.hooks(model), watch:
            trace.call(model, sample, forward)
        watch.try_silent()
    return watch.flow(model)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the sources of every storage. A source behind a neuron or a norm is negative."""

    def __init__(self, layers: Sequence[nn.Module], holders: Sequence[nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._layers = {id(layer): layer for layer in layers}
        # Storages are told apart by their address, which a weak reference keeps from serving again.
        self._sources: dict[int, tuple[StorageWeakRef, frozenset[int]]] = {}
        # Tied weights have several owners.
        self._weights: dict[int, set[int]] = {}
        for module in (*layers, *holders):
            for p in module._parameters.values():
                if p is None or isinstance(p, nn.UninitializedParameter) or p.dim() < 2:
                    continue
                self._weights.setdefault(_address(p), set()).add(id(module))
        self._edges: dict[int, set[int]] = {}
        self._feeds: set[int] = set()
        self._inside: list[int] = []
        self._steps: list[int] = [0]
        self._seen = Flow()
        self._normalizing: set[int] = set()
        # Of each class of modules one that was silent, how it was called, and what it does in time.
        self._silent: dict[Any, tuple[nn.Module, Any, Any, str]] = {}

    # ----------------------------------------------------------------- sources of tensors

    def sources(self, values: Any) -> frozenset[int]:
        """Sources of all tensors in nested arguments."""
        found: frozenset[int] = frozenset()
        for tensor in _tensors(values):
            entry = self._sources.get(_address(tensor))
            if entry is not None:
                found |= entry[1]
        return found

    def give(self, values: Any, sources: frozenset[int], anew: bool = False) -> None:
        """Add sources to tensors, or put them in the place of those they had."""
        for tensor in _tensors(values):
            key = _address(tensor)
            before = self._sources.get(key)
            if before is None:
                alive = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
                self._sources[key] = (alive, sources)
            elif anew or not sources <= before[1]:
                self._sources[key] = (before[0], sources if anew else sources | before[1])

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # saves seconds of import: nothing is compiled while this watches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name
        if name in _STEPWISE:
            self._steps[-1] += len(out) if isinstance(out, (list, tuple)) else 1
        if name in _SHAPE_ONLY:
            return out
        choosing = _CHOOSING.get(name)
        used = [a for number, a in enumerate(args) if number != choosing]
        sources = self.sources((used, kwargs))
        if name in _FUSED:
            self._spend(args)
        if name in _PRODUCTS and sources:
            for tensor in _tensors(args):
                owners = self._weights.get(_address(tensor), set())
                if owners and owners.isdisjoint(self._inside):
                    self._spend(args)
                    # A product with weights outside of their owner's call is a layer all the same.
                    owner = min(owners)
                    self._enter(owner, sources)
                    self._seen.read.add(owner)
                    self.give(out, frozenset({owner}), anew=True)
                    return out
        if sources:
            self.give(out, sources)
            if func._schema.is_mutable:
                self.give(args[:1], sources)
        return out

    def _spend(self, args: Any) -> None:
        """Count a product with matrices outside of a layer's call: each once for every position."""
        tensors = list(_tensors(args))
        x = next((t for t in tensors if t.dim() > 1 and _address(t) not in self._weights), None)
        positions = 0 if x is None else x.numel() // max(1, x.shape[-1])
        for tensor in tensors:
            owners = self._weights.get(_address(tensor))
            if owners and tensor.dim() > 1:
                key = min(owners)
                spent = positions * tensor.numel()
                self._seen.operations[key] = self._seen.operations.get(key, 0) + spent

    def _enter(self, key: int, sources: frozenset[int]) -> None:
        for source in sources:
            if source == _INPUT:
                self._feeds.add(key)
            elif abs(source) != key:
                self._edges.setdefault(abs(source), set()).add(key)
            else:
                self._seen.looped.add(key)

    # ----------------------------------------------------------------- modules

    @contextlib.contextmanager
    def hooks(self, model: nn.Module) -> Iterator[None]:
        """Watch the modules of ``model`` for the time of a run."""
        handles = [model.register_forward_pre_hook(self._input, with_kwargs=True, prepend=True)]
        inner = _with_parts(model, self._layers)
        for module in model.modules():
            if id(module) in self._layers:
                handles.append(module.register_forward_pre_hook(self._layer_in, with_kwargs=True))
                handles.append(module.register_forward_hook(self._layer_out, with_kwargs=True))
            elif hosts.adapter_of(module) is not None:
                handles.append(module.register_forward_pre_hook(self._neuron_in, with_kwargs=True))
                handles.append(module.register_forward_hook(self._neuron_out))
            elif isinstance(module, _NORMS):
                handles.append(module.register_forward_hook(self._norm_out))
            elif id(module) not in inner and module is not model:
                state: list[Any] = [None]
                before, after = self._other_in(state), self._other_out(state)
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(after, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _input(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """A state that is passed in is zero at first, and later comes from somewhere."""
        fresh = [t for t in _tensors((args, kwargs)) if not self.sources(t)]
        given = [t for t in fresh if t.numel() and bool((t != 0).any())] or fresh[:1]
        self.give(given, frozenset({_INPUT}))

    def _layer_in(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        if layer not in self._seen.order:
            self._seen.order.append(layer)
        self._enter(id(layer), self.sources((args, kwargs)))
        self._inside.append(id(layer))

    def _layer_out(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if id(layer) not in self._seen.operations and _normalizes(layer, args, kwargs):
            self._normalizing.add(id(layer))
        self._inside.remove(id(layer))
        self.give(output, frozenset({id(layer)}), anew=True)
        key, spent = id(layer), _operations(layer, (args, kwargs), output)
        self._seen.operations[key] = self._seen.operations.get(key, 0) + spent

    def _neuron_in(self, neuron: nn.Module, args: Any, kwargs: Any) -> None:
        self._seen.unscaled |= {s for s in self.sources((args, kwargs)) if s > 0}

    def _neuron_out(self, neuron: nn.Module, args: Any, output: Any) -> None:
        inside = {id(part) for part in neuron.modules()} & self._layers.keys()
        self._seen.unscaled |= inside & self.sources(output)
        self._mark(args, output)
        model = hosts.describe(neuron)
        assert model is not None  # hooked as a neuron
        held = [getattr(neuron, state.name, None) for state in model.states]
        spikes, v = next(_tensors(output), None), getattr(neuron, model.potential or "", None)
        if spikes is not None and isinstance(v, Tensor) and not _are_counts(spikes):
            last = spikes[-1] if spikes.dim() > v.dim() else spikes
            if last.shape == v.shape and torch.equal(last, v):
                self._seen.readouts.add(id(neuron))
        values = sum(t.numel() for t in held if isinstance(t, Tensor))
        if not values and spikes is not None:  # states are handed over from step to step
            values = spikes.numel() * len(model.states)
        if values:
            self._seen.states[id(neuron)] = values

    def _norm_out(self, norm: nn.Module, args: Any, output: Any) -> None:
        self._mark(args, output)

    def _mark(self, args: Any, output: Any) -> None:
        """Behind a neuron, or a norm, the scale of a current is that no more."""
        sources = self.sources(output) or self.sources(args)  # a kernel may hide what it does
        spikes = output[0] if isinstance(output, tuple) and output else output
        self.give(spikes, frozenset(-abs(s) for s in sources), anew=True)

    def _other_in(self, state: list[Any]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._steps.append(0)
            state[:] = [_held(module), *state[1:]]

        return hook

    def _other_out(self, state: list[Any]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            steps = self._steps.pop()
            self._steps[-1] += steps
            # Whatever happened in there; but what went through a norm has been marked by it.
            marked = self.sources(output)
            self.give(
                output, frozenset(s for s in self.sources((args, kwargs)) if -s not in marked)
            )
            handed = {_address(t) for t in _tensors(state[1:])}
            if isinstance(output, (tuple, list)):  # spikes, and a state for the next step
                state[1:] = [output]  # kept alive, so that no other tensor takes its address
            if id(module) in self._seen.neurons:
                return
            if state[0] is not None and _held(module) != state[0]:
                how = "keeps a state"
            elif steps > 1:
                how = "goes through its input step by step"
            elif not handed.isdisjoint(map(_address, _tensors((args, kwargs)))):
                how = "is given back what it returned the step before"
            else:
                return
            spikes = _fires(args, output)
            if spikes is not None:
                what = "0 and 1" if bool((spikes <= 1).all()) else "whole numbers"
                self._seen.neurons[id(module)] = f"emits {what} only and {how}"
            elif _is_silent(args, output):
                kind = id(module) if _is_torchs(module) else type(module)
                self._silent.setdefault(kind, (module, args, kwargs, how))

        return hook

    def try_silent(self) -> None:
        """Drive what has been silent: an untrained network often gives its neurons too little."""
        for module, args, kwargs, how in self._silent.values():
            key = id(module)
            if key not in self._seen.neurons and _fires_when_driven(module, args, kwargs):
                self._seen.neurons[key] = f"emits whole numbers only, when it is driven, and {how}"

    def flow(self, model: nn.Module) -> Flow:
        """What was seen, with what follows from it."""
        seen = self._seen
        seen.firsts = [layer for layer in seen.order if id(layer) in self._feeds]
        seen.lasts = self._lasts()
        if not seen.firsts:  # an input that is drawn inside the model
            seen.firsts = seen.order[:1]
        seen.unscaled -= self._normalizing
        _all_of_a_class(model, seen.neurons)
        return seen

    def _lasts(self) -> list[nn.Module]:
        """Layers that reach no others, but for those that only feed themselves back."""
        back = {key for key in self._seen.looped if not self._edges.get(key)}
        ahead = [layer for layer in self._seen.order if id(layer) not in back]
        lasts = [layer for layer in ahead if self._edges.get(id(layer), set()) <= back]
        return lasts or [layer for layer in self._seen.order if not self._edges.get(id(layer))]


def _all_of_a_class(model: nn.Module, neurons: dict[int, str]) -> None:
    """Of modules in each other only the innermost is a neuron; with one, all of its class are."""
    modules = dict(model.named_modules())
    for module in modules.values():
        if any(id(part) in neurons for part in module.modules() if part is not module):
            neurons.pop(id(module), None)
    found = {type(m): name for name, m in reversed(modules.items()) if id(m) in neurons}
    for module in modules.values():
        name = found.get(type(module))
        if name is not None and not _is_torchs(module):
            neurons.setdefault(id(module), f"is what {name} is")


def _address(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        if values.layout == torch.strided:  # others have no storage
            yield values
    elif isinstance(values, (list, tuple, set, frozenset)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


def _with_parts(model: nn.Module, layers: Iterable[int]) -> set[int]:
    """Ids of modules that are known for what they are, of what is in them, and what they are in."""
    known = set(layers)
    found: set[int] = set()

    def is_known(module: nn.Module) -> bool:
        return id(module) in known or hosts.adapter_of(module) is not None or hosts.encodes(module)

    for module in model.modules():
        parts = list(module.modules())
        if is_known(module):
            found |= {id(part) for part in parts}
        elif any(map(is_known, parts)):
            found.add(id(module))
    return found


def _held(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Which tensors a module, and what is in it, keeps; numbers count too."""
    held: dict[str, tuple[int, int]] = {}
    for number, part in enumerate(module.modules()):
        for name, value in (*vars(part).items(), *part._buffers.items()):
            if isinstance(value, Tensor) and not value.is_inference():
                held[f"{number}.{name}"] = (id(value), value._version)
    return held


def _fires(args: Any, output: Any) -> Tensor | None:
    """What came out as 0 and 1 (or counts) only, where values went in that are no whole numbers."""
    if not _is_real(next(_tensors(args), None)):
        return None
    return next((y for y in _tensors(output) if _are_counts(y) and bool((y > 0).any())), None)


def _is_real(current: Tensor | None) -> bool:
    return (
        current is not None
        and current.is_floating_point()
        and bool((current != current.round()).any())
    )


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.")


def _are_counts(spikes: Tensor) -> bool:
    return spikes.is_floating_point() and bool(
        (spikes == spikes.round()).all() and spikes.min() >= 0
    )


def _is_silent(args: Any, output: Any) -> bool:
    """Whether values that are no whole numbers went in, and as many zeros came out."""
    current = args[0] if args else None
    if not isinstance(current, Tensor) or not _is_real(current):
        return False
    outputs = [y for y in _tensors(output) if y.is_floating_point() and y.shape == current.shape]
    return any(not bool(y.any()) for y in outputs)


#: How strongly a module is driven that has been silent: the deviation of its input. None so large
#: that a smooth function would give nothing but its limits.
_DRIVES = (1.0, 3.0, 10.0)


def _fires_when_driven(module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether a module emits only 0 and 1 (or counts), and not only 0, for larger currents."""
    generator = torch.Generator().manual_seed(0)
    emitted: list[list[Tensor]] = []
    for drive in _DRIVES:
        strong = torch.randn(args[0].shape, generator=generator) * drive
        try:
            emitted.append(list(_tensors(module(strong.to(args[0]), *args[1:], **kwargs))))
        except Exception:
            return False  # what it does cannot be told
    return any(
        all(map(_are_counts, same)) and any(bool((y > 0).any()) for y in same)
        for same in zip(*emitted, strict=False)
    )


def _normalizes(layer: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether a layer with a forward of its own gives the same for weights twice as large."""
    weight = layer._parameters.get("weight")
    kind: Any = layer.float_type() if isinstance(layer, QuantizedWeight) else type(layer)
    if weight is None or is_stock_class(kind) or not (args and isinstance(args[0], Tensor)):
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(args[0].shape, generator=generator).to(args[0])
    try:
        currents = kind.forward(layer, x, *args[1:], **kwargs)  # with the latent weights
        layer._parameters["weight"] = nn.Parameter(2 * weight, requires_grad=False)
        larger = kind.forward(layer, x, *args[1:], **kwargs)
    except Exception:
        return False  # what it does cannot be told
    finally:
        layer._parameters["weight"] = weight
    if not isinstance(currents, Tensor):
        return False
    return bool((larger - currents).norm() < 0.1 * currents.norm())  # a small number adds to some


def _operations(layer: nn.Module, args: Any, output: Any) -> int:
    """Multiply-accumulates of one call: every weight once for each position."""
    own: list[Any] = [*layer._parameters.values(), vars(layer).get("weight")]
    weights = [w for w in own if isinstance(w, Tensor) and w.dim() > 1]
    if isinstance(layer, nn.MultiheadAttention):
        weights.append(layer.out_proj.weight)  # of a layer that is never called
    x, y = next(_tensors(args), None), next(_tensors(output), None)
    if x is None or y is None or not weights:
        return 0
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        positions = x.numel() // layer.in_channels
    elif isinstance(layer, nn.modules.conv._ConvNd):
        positions = y.numel() // layer.out_channels
    else:
        positions = x.numel() // x.shape[-1] if x.dim() and x.shape[-1] else 0
    return positions * sum(w.numel() for w in weights)
