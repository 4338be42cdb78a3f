"""What the core may ask of a host library without importing one.

Each host's module (:mod:`qsnn_ext.spikingjelly`, :mod:`qsnn_ext.snntorch`) has one object
``ADAPTER`` that answers for its modules. A model can only contain modules of a host that has been
imported, so adapters are looked up among the modules already loaded and importing this file imports
neither host.
"""

from __future__ import annotations

import abc
import importlib
import sys
from typing import Any

import torch
from torch import Tensor, nn

from qsnn_ext.errors import ConfigError, MissingDependencyError
from qsnn_ext.neuron import Link, NeuronModel


class Adapter(abc.ABC):
    """The questions a host's module answers, and what it may add to the answers given here."""

    #: Modules of the host whose code only calls what it is given: no line of a model is in there.
    helpers: tuple[str, ...] = ()

    @abc.abstractmethod
    def describe(self, module: nn.Module) -> NeuronModel | None:
        """What a step of a neuron computes; ``None`` for what is no neuron of this host."""

    @abc.abstractmethod
    def counterpart(self, float_type: type[nn.Module]) -> type[Any] | None:
        """The class that takes a float neuron's place; ``None`` where there is none."""

    @abc.abstractmethod
    def reset(self, model: nn.Module) -> None:
        """Put all state of the host's modules in ``model`` back to its reset value."""

    def starts_sequence(self, module: nn.Module, x: Tensor | None, left: Tensor | None) -> bool:
        """Whether a call that is handed no state is the first since the state was reset.

        It is, if nothing else is known of the host, where the state is none, all zero, or another
        tensor than the last call left.

        Args:
            module: the neuron, before the call.
            x: its input.
            left: the state the neuron kept after the call before.
        """
        state = self.state(module)
        return state is None or state is not left or not torch.any(state)

    def adopt(self, model: nn.Module, copied: bool) -> None:  # noqa: B027
        """Called with a model some of whose modules changed their class, or with a fresh copy."""

    def weighted(self) -> None:  # noqa: B027
        """Called whenever a layer gets a quantizer of its weights."""

    def restart(self, module: nn.Module) -> None:
        """Put the membrane potentials in ``module`` back, in a way ``torch.compile`` traces."""
        self.reset(module)

    def paper_neuron(self, bits: int | None, preset: str = "paper", **options: Any) -> nn.Module:
        """The paper's neuron over ``[T, N, ...]``, for :mod:`qsnn_ext.models`."""
        raise ConfigError("the paper's networks cannot be built with these neurons.")

    def is_neuron(self, module: nn.Module) -> bool:
        """Whether the module is a neuron of this host, of any kind, spiking or not."""
        return self.describe(module) is not None

    def over_time(self, module: nn.Module) -> bool:
        """Whether a layer or neuron takes whole sequences ``[T, N, ...]``, as it is set now."""
        return False

    def link(self, module: nn.Module) -> Link | None:
        """What ties steps together in a module of the host that is no neuron, if it does."""
        return None

    def encodes(self, module: nn.Module) -> bool:
        """Whether the module turns input values into spikes: it fires and is no neuron."""
        return False

    def is_spiking(self, module: nn.Module) -> bool:
        """Whether the module emits spikes and so has a firing rate."""
        model = self.describe(module)
        return model is not None and model.spiking

    def state(self, module: nn.Module) -> Tensor | None:
        """The membrane potential a neuron keeps; ``None`` before the first step."""
        model = self.describe(module)
        value = None if model is None else getattr(module, model.potential or "", None)
        return value if isinstance(value, Tensor) else None


#: Hosts by name: the module whose presence says that a model may contain their neurons.
HOSTS = {
    "spikingjelly": "spikingjelly.activation_based.neuron",
    "snntorch": "snntorch",
    "sinabs": "sinabs.layers",
}


def adapters() -> list[Adapter]:
    """Adapters of the hosts that have been imported, behind that of the registered neurons."""
    found = [
        importlib.import_module(f"qsnn_ext.{host}").ADAPTER
        for host, trigger in HOSTS.items()
        if trigger in sys.modules
    ]
    registered = sys.modules.get("qsnn_ext.registered")
    return found if registered is None else [registered.ADAPTER, *found]


def adapter(host: str) -> Adapter:
    """The adapter of one host, imported now.

    Raises:
        ConfigError: no host of that name is known here.
        MissingDependencyError: the host is not installed; names the pip extra.
    """
    if host not in list(HOSTS):
        known = " or ".join(map(repr, HOSTS))
        raise ConfigError(f"host={host!r} is unknown; choose {known}.")
    found: Adapter = importlib.import_module(f"qsnn_ext.{host}").ADAPTER
    return found


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter for which ``module`` is a spiking neuron, or ``None``."""
    return next((host for host in adapters() if host.is_spiking(module)), None)


def describe(module: nn.Module) -> NeuronModel | None:
    """What a step of ``module`` computes; ``None`` for what is no neuron of any host."""
    return next((m for host in adapters() if (m := host.describe(module)) is not None), None)


def belongs(kind: type[Any]) -> bool:
    """Whether a class is a host's own, and neither a user's nor one of this package."""
    return kind.__module__.partition(".")[0] in HOSTS


def over_time(module: nn.Module) -> bool:
    """Whether ``module`` is a host's and takes whole sequences ``[T, N, ...]``, as it is set."""
    return any(host.over_time(module) for host in adapters())


def link(module: nn.Module) -> Link | None:
    """What ties steps together in a module that is no neuron of any host, if it does."""
    return next((found for host in adapters() if (found := host.link(module)) is not None), None)


def helpers() -> tuple[str, ...]:
    """Modules of the hosts whose code only calls what it is given, and what is in them."""
    return tuple(name for host in adapters() for name in host.helpers)


def encodes(module: nn.Module) -> bool:
    """Whether ``module`` is a host's encoder of input values."""
    return any(host.encodes(module) for host in adapters())


def counterpart(module: nn.Module) -> type[Any] | None:
    """The quantized class that can take a neuron's place, or is its class already."""
    for host in adapters():
        if host.describe(module) is not None:
            remade = getattr(module, "remade", None)
            return host.counterpart(type(module)) if remade is None else remade()
    return None


def reset(model: nn.Module) -> None:
    """Put all state of all hosts' modules in ``model`` back to its reset value."""
    for host in adapters():
        host.reset(model)


def missing(host: str, error: ImportError) -> MissingDependencyError:
    """The error that says how to install a host (or what of it failed to import)."""
    return MissingDependencyError(
        f"qsnn_ext.{host} needs {host}, which could not be imported ({error}); "
        f"install it with: pip install 'qsnn_ext[{host}]'."
    )


def spikes(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The spikes in what a neuron returned: hosts return ``spk`` or ``(spk, mem)``."""
    return output[0] if isinstance(output, tuple) else output
