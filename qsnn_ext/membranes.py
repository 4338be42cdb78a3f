"""What a forward pass tells of the membrane potentials a model holds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from qsnn_ext import hosts


@dataclass
class _Chain:
    """One membrane potential that is handed from call to call."""

    start: int
    end: int
    last: Tensor


@dataclass
class Membrane:
    """The membrane potential of one neuron layer, as a pass has seen it.

    Attributes:
        shape: of one time step, batch first.
        itemsize: bytes of one element as the host holds it.
        calls: number of calls seen.
        states: how many such potentials are alive at once: more than one where a neuron is called
            with several explicit membranes in a step.
    """

    shape: tuple[int, ...] = ()
    itemsize: int = 4
    calls: int = 0
    _chains: list[_Chain] = field(default_factory=list, repr=False)

    def observe(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Take note of one call of the neuron."""
        spikes = hosts.spikes(output)
        if not isinstance(spikes, Tensor):
            return
        multi_step = hosts.over_time(module)
        shape = tuple(spikes.shape[1:] if multi_step else spikes.shape)
        if math.prod(shape) >= math.prod(self.shape) or not self.calls:
            self.shape, self.itemsize = shape, spikes.element_size()
        given = args[-1] if len(args) > 1 else kwargs.get("mem")
        if isinstance(given, Tensor) and isinstance(output, tuple):
            self._follow(given, output[-1])
        self.calls += 1

    def _follow(self, given: Tensor, returned: Tensor) -> None:
        # By storage: a potential may be detached or reshaped between calls. Chains keep their last
        # tensor alive, so no later one can take its address.
        address = given.untyped_storage().data_ptr()
        for chain in self._chains:
            if chain.last.untyped_storage().data_ptr() == address:
                chain.end, chain.last = self.calls, returned
                return
        self._chains.append(_Chain(self.calls, self.calls, returned))

    @property
    def states(self) -> int:
        """How many potentials are alive at once, at least 1."""
        return max(
            [1] + [sum(c.start <= at.start <= c.end for c in self._chains) for at in self._chains]
        )

    @property
    def elements(self) -> int:
        """Number of potentials held at once, over the whole batch."""
        return math.prod(self.shape) * self.states
