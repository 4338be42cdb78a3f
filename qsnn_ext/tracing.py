"""Running somebody else's model to learn about it, and leaving it as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from qsnn_ext.quantizers import MembraneQuantizer
from qsnn_ext.trace import untouched

#: Attributes of a module that hold tensors by name: torch's buffers, SpikingJelly's memories.
_STORES = ("_buffers", "_memories")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, reset states; afterwards everything is as before.

    See :func:`qsnn_ext.trace.untouched` for what "everything" is.
    """
    with untouched(model):
        model.eval()
        for module in model.modules():
            if isinstance(module, MembraneQuantizer) and not module.calibrated:
                module.mode = "dynamic"  # a frozen scale without a value cannot run
        yield


def running_order(
    model: nn.Module, modules: Iterable[nn.Module], run: Callable[[], Any]
) -> list[nn.Module]:
    """Those of ``modules`` that ``run`` calls, once for every call, in order."""
    calls: list[nn.Module] = []
    handles = [m.register_forward_pre_hook(lambda m, _: calls.append(m)) for m in modules]
    try:
        with undisturbed(model):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def graph_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Tensors kept by the modules of ``model`` that are part of a live graph (running states)."""
    for module in model.modules():
        held = list(module.__dict__.values())
        for name in _STORES:
            held += module.__dict__.get(name, {}).values()
        for value in held:
            if isinstance(value, Tensor) and value.grad_fn is not None:
                yield value
