"""Implementations of the multi-step operation, one file each, tried in order.

A backend has a name, ``covers(call)``, which says whether it computes that call, and
``run(call, *args)``, which does. Another one is a file here and a line in :data:`BACKENDS`, or in
:data:`ON_REQUEST` as long as nobody has measured where it wins;
``run``'s arguments and results are those of the cores in :mod:`qsnn_ext.kernels.recurrence`.
:mod:`~qsnn_ext.kernels.backends.eager` stands beside them: it is the loop in plain autograd that
runs what the operation itself does not cover, and the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from qsnn_ext.kernels import backend as B
from qsnn_ext.kernels.options import LIFOptions


@dataclass(frozen=True)
class Call:
    """One pass over one layer, as a backend is told.

    Attributes:
        kind: ``"forward"`` or ``"backward"``.
        options: of the layer.
        steps: number of time steps ``T``.
        dtype: of the input.
        device: where it lies.
        size: number of neurons ``M``.
        absent: which of the optional arguments are ``None``: first state and scale going forward;
            gradients of spikes and last state, and first state, going back.
        need_v: whether the gradient of the first state is wanted.
        need_params: whether the gradient of the parameters is wanted.
    """

    kind: Literal["forward", "backward"]
    options: LIFOptions
    steps: int
    dtype: torch.dtype
    device: torch.device
    size: int
    absent: tuple[bool, ...]
    need_v: bool = False
    need_params: bool = False


class Implementation(Protocol):
    """What a file of this package is to :func:`run`."""

    def covers(self, call: Call) -> bool:
        """Whether it computes this call, and is worth while where nobody has chosen."""

    def run(self, call: Call, *args: Tensor | None) -> Any:
        """What the core of this call returns."""


from qsnn_ext.kernels.backends import compiled, function, native, stepwise, triton  # noqa: E402

#: In the order in which they are tried. The last covers everything.
BACKENDS: dict[str, Implementation] = {
    "native": native,
    "triton": triton,
    "compiled": compiled,
    "function": function,
}


#: Those that run only where :func:`qsnn_ext.kernels.use_backend` asks for them.
ON_REQUEST: dict[str, Implementation] = {"stepwise": stepwise}


def run(call: Call, *args: Tensor | None) -> Any:
    """Run a call by the backend that was asked for, or the first that covers it."""
    chosen = B.current_backend()
    for backend in BACKENDS.values() if chosen == "auto" else (_named(chosen),):
        if backend is not None and backend.covers(call):
            return backend.run(call, *args)
    return function.run(call, *args)


def _named(name: str) -> Implementation | None:
    return BACKENDS.get(name) or ON_REQUEST.get(name)


def missing(name: str) -> str | None:
    """Why a backend cannot run here at all, if it cannot: what its ``missing()`` says."""
    tell = getattr(_named(name), "missing", None)
    return None if tell is None else tell()
