"""Models inside other modules: compiled, data-parallel, averaged.

Such a wrapper holds the model as one child and calls it. What this package does to a model, it does
to the one inside, and names are those that the model has by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def _held(module: nn.Module) -> str | None:
    """The attribute that holds what a wrapper wraps."""
    if "_orig_mod" in module._modules:  # torch.compile; its class is not worth importing
        return "_orig_mod"
    # Fully sharded by name: it can only be there if its module has been imported.
    wraps = isinstance(module, _WRAPPERS) or type(module).__name__ == "FullyShardedDataParallel"
    return (
        "module"
        if wraps and "module" in module._modules
        else (
            "_fsdp_wrapped_module" if wraps and "_fsdp_wrapped_module" in module._modules else None
        )
    )


def uncompiled(model: nn.Module) -> AbstractContextManager[None]:
    """Within, what of ``model`` is compiled runs as it was written, so that it can be watched."""
    compiled = any("_orig_mod" in m._modules or m._compiled_call_impl for m in model.modules())
    if not compiled:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside any number of wrappers; the model itself if there is none."""
    name = _held(model)
    while name is not None:
        model = model._modules[name]  # type: ignore[assignment]
        name = _held(model)
    return model


def named_modules(
    model: nn.Module, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """As ``model.named_modules()``, without wrappers and without the parts of names they add."""
    seen: set[int] = set()

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        module = unwrap(module)
        if remove_duplicate and id(module) in seen:
            return
        seen.add(id(module))
        yield path, module
        for name, child in module._modules.items():
            if child is not None:
                yield from walk(child, f"{path}.{name}" if path else name)

    return walk(model, "")


def _prefixes(model: nn.Module) -> dict[str, str]:
    """Beginnings of keys of ``model.state_dict()`` -> the same without what wrappers add."""
    prefixes: dict[str, str] = {}

    def walk(module: nn.Module, path: str, plain: str) -> None:
        prefixes[path] = plain
        held = _held(module)
        for name, child in module._modules.items():
            if child is not None:
                walk(child, f"{path}{name}.", plain if name == held else f"{plain}{name}.")

    walk(model, "", "")
    return prefixes


def _renamed(keys: Iterable[str], prefixes: dict[str, str]) -> dict[str, str]:
    renamed = {}
    for key in keys:
        path, dot, last = key.rpartition(".")
        renamed[key] = prefixes.get(path + dot, path + dot) + last
    return renamed


def plain_keys(model: nn.Module) -> dict[str, str]:
    """Keys of ``model.state_dict()`` -> the same without the parts that wrappers add."""
    return _renamed(model.state_dict(), _prefixes(model))


def actual_keys(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """Plain keys -> those that ``model.load_state_dict`` knows them by."""
    inner = {plain: actual for actual, plain in _prefixes(model).items()}
    return _renamed(keys, inner)


def common_prefix(keys: Iterable[str]) -> str:
    """The wrappers' part that all keys begin with; empty without one."""
    keys, prefix = list(keys), ""
    while keys:
        found = next(
            (p for p in ("_orig_mod.", "module.") if all(k.startswith(prefix + p) for k in keys)),
            None,
        )
        if found is None:
            break
        prefix += found
    return prefix
