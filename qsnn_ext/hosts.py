"""What the core may ask of a host library without importing one.

Each adapter (:mod:`qsnn_ext.spikingjelly`, :mod:`qsnn_ext.snntorch`) answers for its own modules.
A model can only contain modules of a host that has been imported, so adapters are looked up among
the modules already loaded and importing this file imports neither host.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any, Protocol, cast

from torch import Tensor, nn

from qsnn_ext.errors import ConfigError, MissingDependencyError


class Adapter(Protocol):
    """The questions an adapter answers.

    Attributes:
        NEURONS: which class takes a host neuron's place, by exact type.
    """

    NEURONS: dict[type[nn.Module], Any]

    def is_spiking(self, module: nn.Module) -> bool:
        """Whether the module emits spikes and so has a firing rate."""

    def state(self, module: nn.Module) -> Tensor | None:
        """The membrane potential a neuron keeps between calls."""

    def starts_sequence(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        left: Tensor | None,
    ) -> bool:
        """Whether this call is the first since the state was reset.

        Args:
            module: the neuron, before the call.
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.
            left: the state the neuron kept after the call before.
        """

    def reset(self, model: nn.Module) -> None:
        """Put all state of the host's modules in ``model`` back to its reset value."""

    def is_neuron(self, module: nn.Module) -> bool:
        """Whether the module is a neuron of this host, of any kind, spiking or not."""

    def is_readout(self, module: nn.Module) -> bool:
        """Whether the neuron only integrates: it can never be reset by a spike."""

    def obstacle(self, module: nn.Module) -> str | None:
        """Why a neuron of a known type can still not be quantized, if it cannot."""

    def converted(self, model: nn.Module) -> None:
        """Called after modules of ``model`` have changed their class."""

    def copied(self, model: nn.Module) -> None:
        """Called with a fresh copy of a model: make the host know its neurons."""

    def restart(self, module: nn.Module) -> None:
        """Put the membrane potentials in ``module`` back, in a way ``torch.compile`` traces."""

    def paper_neuron(self, bits: int | None, preset: str = "paper", **options: Any) -> nn.Module:
        """The paper's neuron over ``[T, N, ...]``, for :mod:`qsnn_ext.models`."""


_ADAPTERS = {"spikingjelly": "qsnn_ext.spikingjelly", "snntorch": "qsnn_ext.snntorch"}
_TRIGGERS = {"spikingjelly": "spikingjelly.activation_based.neuron", "snntorch": "snntorch"}


def adapters() -> list[Adapter]:
    """Adapters of the hosts that have been imported."""
    return [
        cast(Adapter, importlib.import_module(_ADAPTERS[host]))
        for host, trigger in _TRIGGERS.items()
        if trigger in sys.modules
    ]


def adapter(host: str) -> Adapter:
    """The adapter module of one host, imported now.

    Raises:
        ConfigError: no host of that name is known here.
        MissingDependencyError: the host is not installed; names the pip extra.
    """
    if host not in list(_ADAPTERS):
        known = " or ".join(map(repr, _ADAPTERS))
        raise ConfigError(f"host={host!r} is unknown; choose {known}.")
    return cast(Adapter, importlib.import_module(_ADAPTERS[host]))


def adapter_of(module: nn.Module) -> Adapter | None:
    """The adapter for which ``module`` is a spiking neuron, or ``None``."""
    return next((host for host in adapters() if host.is_spiking(module)), None)


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
