"""A model inside the wrappers that training puts around it."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel


def unwrap(model: nn.Module) -> nn.Module:
    """The model without ``torch.compile``, ``DataParallel`` and the like, however deep it lies.

    Unwrapped are ``torch.compile``, ``DataParallel``, ``DistributedDataParallel``,
    ``AveragedModel`` and fully sharded data parallelism, in any order. The model itself, its
    parameters and its hooks are the same objects; a model with no wrapper comes back as it is.
    """
    while True:
        inner = _inner(model)
        if inner is None:
            return model
        model = inner


def _inner(model: nn.Module) -> nn.Module | None:
    name = "module"
    if type(model).__name__ == "OptimizedModule":
        name = "_orig_mod"
    elif not isinstance(model, (DataParallel, DistributedDataParallel, AveragedModel)) and (
        # By name: it can only be there if its module has been imported.
        type(model).__name__ != "FullyShardedDataParallel"
    ):
        return None
    inner = model._modules.get(name)
    return inner if isinstance(inner, nn.Module) else None
