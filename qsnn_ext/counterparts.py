"""The quantized class that takes a host neuron's place: the host's own class with rounded states.

A host's module has a mixin over :class:`QuantizedNeuron` that knows how that host runs a step. Over
any class of the host, or of a user who extends one, it makes the class that conversion gives to a
neuron: same constructor, parameters and behaviour, and the states that it carries rounded.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from qsnn_ext import functional as F
from qsnn_ext import hosts, kernels
from qsnn_ext.errors import ConfigError, InputTypeError
from qsnn_ext.quantizers import MembraneQuantizer, membrane_quantizer

#: What a subclass may define without computing anything else than what it extends.
_HARMLESS = frozenset({
    "__init__", "__doc__", "__module__", "__qualname__", "__annotations__", "__dict__",
    "__weakref__", "__firstlineno__", "__static_attributes__", "__repr__", "extra_repr",
    "__abstractmethods__", "_abc_impl", "__parameters__", "__orig_bases__",
})  # fmt: skip


def kind_of(cls: Any, known: tuple[type, ...], besides: tuple[str, ...] = ()) -> Any:
    """Which of ``known`` a class computes as: itself, or what it extends and does not override.

    Args:
        cls: class of a module.
        known: classes whose computation is known.
        besides: what it may override all the same.
    """
    return _kind_of(cls, known, besides)


@functools.lru_cache(maxsize=4096)
def _kind_of(cls: type, known: tuple[type, ...], besides: tuple[str, ...]) -> type | None:
    lineage = [c for c in cls.__mro__ if not issubclass(c, QuantizedNeuron)]
    for at, base in enumerate(lineage):
        if base in known:
            return base
        inherited = {name for b in lineage[at + 1 :] for name in vars(b)}
        if base is nn.Module or (vars(base).keys() - _HARMLESS - {*besides}) & inherited:
            return None
    return None


class QuantizedNeuron:
    """Mixin over a host's neuron: what it carries from step to step is rounded.

    Without a quantizer (``bits=None`` or 32) the host's own code runs, bit for bit. What a neuron
    carries besides its membrane potential (a synaptic current, a recovery variable) has a quantizer
    of its own in ``carried``, with a scale of its own and the potential's options.

    Args:
        bits: 2 to 8, or ``None``/32 for states in floating point.
        membrane: a ready quantizer; overrides ``bits`` and the options below.
        preset: ``"paper"`` or ``"official"``: defaults of the options below and, in SpikingJelly,
            of :class:`qsnn_ext.spikingjelly.Triangle`.
        scale: ``"max"`` or ``"absmax"``.
        squash: ``"tanh"``, ``"none"``, or ``None`` for the preset's.
        mode: ``"dynamic"`` (default), ``"frozen"`` or ``"learned"``.
        order: ``"fire_first"`` (Eq. 12: fire, reset, quantize what is carried) or
            ``"quantize_first"`` (Algorithm 1: quantize the charge, then fire).

    Raises:
        ConfigError: unknown bits, preset or option, a neuron that cannot be quantized, or
            ``"quantize_first"`` for one whose charge is not affine and whose host fires in the same
            piece of code.
    """

    membrane: MembraneQuantizer | None
    order: F.StepOrder
    preset: str
    carried: nn.ModuleDict

    #: What the classes made by :meth:`over` are called: this and the host's name.
    prefix: ClassVar[str]
    #: Whether the host's step can be entered between charge and fire, as Algorithm 1 asks.
    rounds_charges: ClassVar[bool] = False
    _over: ClassVar[dict[type[nn.Module], type[Any]]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if QuantizedNeuron in cls.__bases__:
            cls._over = {}
        elif len(cls.__bases__) == 2 and not issubclass(cls.__bases__[1], QuantizedNeuron):
            base: Any = cls.__bases__[1]
            cls._over.setdefault(base, cls)

    def __init__(
        self,
        *args: Any,
        bits: int | None = 2,
        membrane: MembraneQuantizer | None = None,
        preset: str = "paper",
        scale: F.MembraneScale | None = None,
        squash: F.Squash | Literal["none"] | None = None,
        mode: Literal["dynamic", "frozen", "learned"] | None = None,
        order: F.StepOrder = "fire_first",
        **kwargs: Any,
    ) -> None:
        if membrane is None:
            membrane = membrane_quantizer(bits, preset, scale=scale, squash=squash, mode=mode)
        F.check_order(order)
        super().__init__(*args, **kwargs)
        self._take(membrane, order, preset)

    @property
    def bits(self) -> int | None:
        """Bits of the states; ``None`` when they are in floating point."""
        return None if self.membrane is None else self.membrane.bits

    @classmethod
    def float_type(cls) -> type[nn.Module]:
        """The class this neuron extends: the host's, or a user's own."""
        return next(
            b
            for b in cls.__mro__
            if issubclass(b, nn.Module) and not issubclass(b, QuantizedNeuron)
        )

    @classmethod
    def remade(cls) -> type[Any] | None:
        """This class if it was made over what it extends; ``None`` for a user's subclass."""
        mixin: Any = next(c for c in cls.__mro__ if QuantizedNeuron in c.__bases__)
        return cls if mixin.over(cls.float_type()) is cls else None

    @classmethod
    def over(cls, float_type: type[nn.Module]) -> type[Any]:
        """The quantized class over ``float_type``, the same one for every call."""
        found = cls._over.get(float_type)
        if found is None:
            name = cls.prefix + float_type.__name__
            text = f"``{float_type.__name__}`` with rounded states; see :class:`QuantizedNeuron`."
            body = {"__doc__": text, "__module__": cls.__module__, "__qualname__": name}
            meta: Any = type(float_type)
            found = cls._over[float_type] = meta(name, (cls, float_type), body)
        return found

    @classmethod
    def from_float(
        cls,
        node: nn.Module,
        membrane: MembraneQuantizer | None,
        order: F.StepOrder = "fire_first",
        preset: str = "paper",
    ) -> Self:
        """Turn a host neuron into this one, in place (its class changes), and return it.

        The object stays, so whatever the host holds of it (hooks, lists of neurons) stays valid.

        Raises:
            InputTypeError: ``node`` is not exactly of the class this one extends.
            ConfigError: it cannot be quantized so.
        """
        if type(node) is not cls.float_type():
            raise InputTypeError(
                f"{cls.__name__} replaces a {cls.float_type().__name__}, got {type(node).__name__}."
            )
        F.check_order(order)
        node.__class__ = cls  # type: ignore[assignment]
        assert isinstance(node, cls)
        try:
            node._take(membrane, order, preset)
        except ConfigError:
            node.to_float()
            raise
        return node

    def to_float(self) -> nn.Module:
        """Turn back into the class this one extends, in place, and return it."""
        for name in ("membrane", "order", "preset", "carried"):
            if name in self.__dict__ or name in self._modules:  # type: ignore[attr-defined]
                delattr(self, name)
        self.__class__ = self.float_type()  # type: ignore[assignment]
        assert isinstance(self, nn.Module)
        return self

    def _take(
        self, membrane: MembraneQuantizer | None, order: F.StepOrder, preset: str = "paper"
    ) -> None:
        """Hold the quantizers of the states."""
        assert isinstance(self, nn.Module)
        self.membrane = None
        self.order = order
        self.preset = preset
        model = hosts.describe(self)
        assert model is not None
        if membrane is None:
            return
        if model.obstacle is not None:
            raise ConfigError(f"a {model.kind} cannot be quantized: {model.obstacle}.")
        if order != "fire_first" and model.charge is None and not self.rounds_charges:
            raise ConfigError(
                f"a {type(self).__name__} runs the host's own step, which fires on the unrounded "
                "charge; use order='fire_first'."
            )
        further = [s.name for s in model.rounded if s.name != model.potential]
        device = next((t.device for t in (*self.parameters(), *self.buffers())), None)
        for q in (membrane, *(type(membrane)(**membrane.options()) for _ in further)):
            if device is not None:
                q.to(device)
            q.train(self.training)
            if q is membrane:
                self.membrane = membrane
            else:
                if "carried" not in self._modules:
                    self.carried = nn.ModuleDict()
                self.carried[further[len(self.carried)]] = q

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy; of a state inside a live graph, which torch refuses to copy, its values."""
        for tensor in live_tensors(self):
            memo[id(tensor)] = tensor.detach().clone()
        make, args, state = self.__reduce_ex__(4)[:3]
        copied = memo[id(self)] = make(*args)
        copied.__setstate__(copy.deepcopy(state, memo))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For pickle and copy: a class that was made is made again from the one it extends."""
        cls = type(self)
        reduced: Any = super().__reduce_ex__(protocol)
        if getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is cls:
            return reduced
        mixin: Any = next(c for c in cls.__mro__ if QuantizedNeuron in c.__bases__)
        return (_new, (mixin, cls.float_type()), *reduced[2:])


def _new(mixin: type[QuantizedNeuron], float_type: type[nn.Module]) -> nn.Module:
    cls: Any = mixin.over(float_type)
    made: nn.Module = cls.__new__(cls)
    return made


#: Attributes of a module that hold tensors by name: torch's buffers, SpikingJelly's memories.
_STORES = ("_buffers", "_memories")


def live_tensors(module: Any) -> Iterator[Tensor]:
    """Tensors that a module itself keeps and that are part of a live graph (running states)."""
    values = list(module.__dict__.values())
    for name in _STORES:
        values += module.__dict__.get(name, {}).values()
    for value in values:
        if isinstance(value, Tensor) and value.grad_fn is not None:
            yield value


def held(module: nn.Module, state: str, potential: str | None) -> MembraneQuantizer | None:
    """The quantizer that a module holds for one of its states, if it is a quantized neuron."""
    if not isinstance(module, QuantizedNeuron):
        return None
    if state == potential:
        return module.membrane
    further: Any = module._modules.get("carried")
    return None if further is None or state not in further else further[state]


def rounder(quantizer: MembraneQuantizer) -> Callable[[Tensor], Tensor]:
    """Rounds one state, unseen by operation counters."""
    quantize = kernels.rounding(quantizer, delayed=False)
    return lambda u: quantize(u)[0]
