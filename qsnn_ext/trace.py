"""Running somebody else's model to learn about it, and leaving it as it was found."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qsnn_ext import hosts
from qsnn_ext.batches import explained
from qsnn_ext.counterparts import live_tensors
from qsnn_ext.errors import InputError, InputTypeError
from qsnn_ext.quantizers import MembraneQuantizer
from qsnn_ext.regularizers import FiringRateHook
from qsnn_ext.wrapping import unwrap

#: Attributes of every module. Of these only the buffers are state; hooks must stay where they are,
#: because the handles that remove them point to their dictionaries.
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module())) - {"_buffers"}


def check_model(model: Any, what: str) -> nn.Module:
    """``model`` without its wrappers (:func:`~qsnn_ext.wrapping.unwrap`).

    Raises:
        InputTypeError: not a module.
        InputError: a lazy layer has no weights yet.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"{what} needs a module, got {type(model).__name__}.")
    original = unwrap(model)
    for name, parameter in original.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise InputError(f"{name} has no weights yet; run the model once, then {what}.")
    return original


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """``value`` with every tensor in it cloned; what is no tensor or plain container is kept."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        memo[id(value)] = value.detach().clone()
    elif type(value) is list:
        memo[id(value)] = [_copied(v, memo) for v in value]
    elif type(value) in (dict, OrderedDict):
        memo[id(value)] = type(value)((k, _copied(v, memo)) for k, v in value.items())
    elif type(value) is tuple:
        memo[id(value)] = tuple(_copied(v, memo) for v in value)
    elif type(value) is set:
        memo[id(value)] = set(value)
    else:
        return value
    return memo[id(value)]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run ``model`` as often as you like in here; afterwards nothing of it has changed.

    Meanwhile buffers and membrane potentials are copies, which start from their reset values, and
    gradients are off; so is inference mode, whose tensors a model could not keep. Kept as they
    were: parameters, buffers, batch-norm statistics, membrane potentials, frozen scales, training
    mode, plain attributes, and the random generators of torch, NumPy and Python. The firing-rate
    regularizers of the model do not see the pass; other forward hooks run as in any pass.
    """
    modules = list(model.modules())
    saved = [(dict(vars(m)), dict(m._modules), dict(m._parameters)) for m in modules]
    muted = [
        (hook, hook.owner)
        for m in modules
        for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())
        if isinstance(hook, FiringRateHook)
    ]
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.is_cuda}
    generators = random.getstate(), np.random.get_state()
    try:
        memo: dict[int, Any] = {}
        for module in modules:
            for name, value in vars(module).items():
                if name not in _MODULE_ATTRIBUTES:
                    vars(module)[name] = _copied(value, memo)
        for hook, _ in muted:
            hook.owner = None
        hosts.reset(model)
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.random.fork_rng(sorted(devices, key=str)),
        ):
            yield
    finally:
        for module, (attributes, children, parameters) in zip(modules, saved, strict=True):
            put_back(vars(module), attributes)
            module._modules.clear()
            module._modules.update(children)
            module._parameters.clear()
            module._parameters.update(parameters)
        for hook, owner in muted:
            hook.owner = owner
        random.setstate(generators[0])
        np.random.set_state(generators[1])


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, reset states; afterwards everything is as before.

    See :func:`untouched` for what "everything" is.
    """
    with untouched(model):
        model.eval()
        for module in model.modules():
            if isinstance(module, MembraneQuantizer) and not module.calibrated:
                module.mode = "dynamic"  # a frozen scale without a value cannot run
        yield


def put_back(attributes: dict[str, Any], before: dict[str, Any]) -> None:
    """Make a module's attributes what they were; never without those a module cannot lack."""
    attributes.update(before)
    for name in attributes.keys() - before.keys():
        del attributes[name]


def call(
    model: nn.Module, sample: Any, forward: Callable[[nn.Module, Any], Any] | None = None
) -> Any:
    """One pass: ``forward(model, sample)``, or the model called with ``sample``.

    Args:
        model: what to run.
        sample: a tensor, a tuple or list of positional, or a dictionary of keyword arguments.
        forward: for models that are called in another way, such as once per time step.

    Returns:
        What the pass returned.
    """
    with explained("the sample", sample, forward):
        if forward is not None:
            return forward(model, sample)
        if isinstance(sample, (tuple, list)):
            return model(*sample)
        if isinstance(sample, dict):
            return model(**sample)
        return model(sample)


@contextmanager
def watching(model: nn.Module, watch: Callable[[str, nn.Module], Any]) -> Iterator[None]:
    """Forward hooks for the time of a pass.

    Args:
        model: whose modules to watch.
        watch: gives, for a name and a module, a forward hook with keyword arguments, or ``None``.
    """
    handles = []
    try:
        for name, module in model.named_modules():
            hook = watch(name, module)
            if hook is not None:
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def graph_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Tensors kept by the modules of ``model`` that are part of a live graph (running states)."""
    for module in model.modules():
        yield from live_tensors(module)
