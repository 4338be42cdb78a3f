"""Neurons of nobody's library: a user says what they carry, and they are quantized like any other.

    register_neuron(MyNeuron, states=("v",))

A registered module is called once per time step and keeps its states as attributes between calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qsnn_ext import hosts
from qsnn_ext.counterparts import QuantizedNeuron, held, rounder
from qsnn_ext.errors import ConfigError, InputTypeError
from qsnn_ext.neuron import NeuronModel, State


@dataclass(frozen=True)
class _Registration:
    states: tuple[str, ...]
    spiking: bool
    readout: bool


_registered: dict[type[nn.Module], _Registration] = {}


def register_neuron(
    cls: type[nn.Module],
    *,
    states: tuple[str, ...],
    spiking: bool = True,
    readout: bool = False,
) -> type[nn.Module]:
    """Say that a class of modules is a neuron, and what it carries from step to step.

    From then on :func:`qsnn_ext.quantize_` rounds these states after every call, each with a scale
    of its own, and report, calibration and regularizer treat the module as a neuron. Subclasses are
    registered with it. May be used again for the same class; the last word counts.

    A neuron that loops over time inside its forward pass keeps its states in there, where nothing
    can round them: replace it by a neuron of a host, ``quantize_(..., replace={cls: factory})``.

    Args:
        cls: the class. Its ``forward`` runs one time step.
        states: names of the attributes or buffers that it carries, the membrane potential first;
            whatever of them is no floating point tensor is left alone.
        spiking: whether what it returns are spikes.
        readout: whether it only integrates; such are kept in floating point by default.

    Returns:
        ``cls``, so that this serves as a decorator through :func:`functools.partial`.

    Raises:
        InputTypeError: ``cls`` is no class of modules.
        ConfigError: no state is named.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise InputTypeError(f"register_neuron needs a class of modules, got {cls!r}.")
    names = (states,) if isinstance(states, str) else tuple(states)
    if not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"states={states!r} must name the tensors that a {cls.__name__} carries.")
    _registered[cls] = _Registration(names, spiking, readout)
    return cls


class QuantizedModule(QuantizedNeuron):
    """Mixin over a registered neuron: what it carries is rounded after every call."""

    prefix = "Quant"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own step, after which its states are rounded."""
        returned = super().forward(*args, **kwargs)  # type: ignore[misc]
        if self.membrane is None:
            return returned
        model = ADAPTER.describe(self)  # type: ignore[arg-type]
        assert model is not None
        replaced: dict[int, Tensor] = {}
        for state in model.states:
            left = getattr(self, state.name, None)
            if state.quantizer is None or not isinstance(left, Tensor):
                continue
            if left.is_floating_point():
                replaced[id(left)] = rounder(state.quantizer)(left)
                setattr(self, state.name, replaced[id(left)])
        if isinstance(returned, tuple):
            return tuple(replaced.get(id(value), value) for value in returned)
        return replaced.get(id(returned), returned)

    def extra_repr(self) -> str:
        """The module's, with bits."""
        own = super().extra_repr()  # type: ignore[misc]
        return f"{own}{', ' if own else ''}bits={self.bits}"


class _Registered(hosts.Adapter):
    """See :class:`qsnn_ext.hosts.Adapter`."""

    def _of(self, cls: type) -> _Registration | None:
        return next((_registered[c] for c in cls.__mro__ if c in _registered), None)

    def describe(self, module: nn.Module) -> NeuronModel | None:
        """A registered module."""
        known = self._of(type(module))
        if known is None:
            return None
        return NeuronModel(
            kind=type(module).__name__,
            states=tuple(State(n, held(module, n, known.states[0])) for n in known.states),
            potential=known.states[0],
            spiking=known.spiking,
            readout=known.readout,
            order=getattr(module, "order", "fire_first"),
        )

    def counterpart(self, float_type: type[nn.Module]) -> type[Any] | None:
        """The class over it."""
        return QuantizedModule.over(float_type)

    def reset(self, model: nn.Module) -> None:
        """Call the ``reset`` of registered neurons that have one."""
        for module in model.modules():
            if self._of(type(module)) is not None and callable(getattr(module, "reset", None)):
                module.reset()  # type: ignore[operator]


ADAPTER = _Registered()
