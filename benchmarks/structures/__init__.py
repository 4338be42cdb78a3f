"""Small networks shaped like those that people publish, for what is promised of them.

The structure of a published network is a fact; the code here is written anew, in the habits of the
code that surrounds such models: neurons written from scratch, subclasses with a fixed kernel,
loops over time, batch-first frames, heads after the mean over time.

Every file holds one family. Each builder takes ``small`` and returns a :class:`Built`: with
``small=True`` a network that runs in well under a second, otherwise one at the published width
(not at the published depth or image size), so that shares of weights mean something.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

#: Files of this package, in the order of the page.
FAMILIES = (
    "transformers",
    "resnets",
    "vggs",
    "dense",
    "detectors",
    "audio",
    "recurrent",
    "agents",
    "events",
    "tutorials",
)


class Built(NamedTuple):
    """A network, an input, and how it is run.

    Attributes:
        model: the network in floating point, in training mode.
        sample: what ``model`` takes, or with ``forward`` a sequence ``[T, N, ...]``.
        forward: ``forward(model, sample)`` for networks that are called once per time step.
    """

    model: nn.Module
    sample: Any
    forward: Callable[[nn.Module, Any], Any] | None = None


#: A class of neurons, and what makes a neuron of a host of one.
Replace = dict[type[nn.Module], Callable[[Any], nn.Module]]


@dataclass(frozen=True)
class Structure:
    """One entry of the registry.

    Attributes:
        name: of the entry.
        family: file it is in.
        like: the public model, or the habit, whose structure it has.
        build: ``build(small=True)``.
        replace: its neurons that extend none of a host, and what its user says that they are: a
            function of one that makes a neuron of a host.
    """

    name: str
    family: str
    like: str
    build: Callable[..., Built]
    replace: Replace = field(default_factory=dict)


_REGISTRY: dict[str, Structure] = {}

Builder = Callable[..., Built]


def structure(name: str, like: str, replace: Replace | None = None) -> Callable[[Builder], Builder]:
    """Register a builder under a name."""

    def register(build: Builder) -> Builder:
        family = build.__module__.rpartition(".")[2]
        assert name not in _REGISTRY, name
        _REGISTRY[name] = Structure(name, family, like, build, replace or {})
        return build

    return register


def structures() -> dict[str, Structure]:
    """All entries by name, family by family."""
    for family in FAMILIES:
        importlib.import_module(f"{__name__}.{family}")
    order = {family: place for place, family in enumerate(FAMILIES)}
    return dict(sorted(_REGISTRY.items(), key=lambda item: order[item[1].family]))
