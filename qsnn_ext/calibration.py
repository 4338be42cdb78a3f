"""``calibrate``: give the membrane quantizers of a model fixed scales, taken from data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from qsnn_ext import hosts, trace
from qsnn_ext.errors import ConfigError, InputError, InputTypeError, StateError
from qsnn_ext.quantizers import MembraneQuantizer

#: A few inputs of each model calibrated in this process, for exporting it later.
_examples: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    statistic: Literal["mean", "max", "percentile"] = "mean",
    percentile: float = 99.9,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> dict[str, float]:
    """Freeze the membrane scales at values seen on data.

    The model runs over the batches with dynamic scales; then every membrane quantizer is switched
    to ``mode="frozen"`` with the chosen statistic of its scales. From then on a sample's result no
    longer depends on its batch mates. Training mode, membrane potentials, batch norm statistics
    and random numbers are left as they are found.

    Args:
        model: a model with quantized membrane potentials, of either host.
        batches: an iterable of batches, for instance a data loader. A batch is a tensor, or a
            tuple or list whose first element is the input.
        statistic: over all batches and time steps: the ``"mean"`` of the dynamic scale, its
            ``"max"``, or the mean of a ``"percentile"`` of the potentials (of their absolute
            values for ``scale="absmax"``), which clips the rest.
        percentile: which one, above 0 and at most 100.
        forward: ``forward(model, batch)`` runs one batch over all its time steps; by default
            ``model(input)``. States are reset before each batch.

    Returns:
        The frozen scale of each neuron by its name. Neurons that did not run are not among them,
        keep what they had, and are named in a warning.

    Raises:
        InputTypeError: ``model`` is not a module, or ``batches`` is a tensor.
        ConfigError: unknown statistic or a percentile out of range.
        InputError: no batches, or potentials that are NaN or infinite.
        StateError: no quantized membrane potential in the model.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"calibrate needs a module, got {type(model).__name__}.")
    if isinstance(batches, Tensor):
        raise InputTypeError("batches must be an iterable of batches; for a single one pass [x].")
    if statistic not in ("mean", "max", "percentile"):
        raise ConfigError(f"statistic={statistic!r} is unknown; 'mean', 'max' or 'percentile'.")
    if not 0 < percentile <= 100:
        raise ConfigError(f"percentile={percentile!r} must be above 0 and at most 100.")
    quantizers = {n: m for n, m in model.named_modules() if isinstance(m, MembraneQuantizer)}
    if not quantizers:
        raise StateError(
            f"{type(model).__name__} has no quantized membrane potential; call quantize_ first."
        )
    seen: dict[str, list[Tensor]] = {name: [] for name in quantizers}
    with trace.undisturbed(model):
        for name, quantizer in quantizers.items():
            quantizer.mode = "dynamic"
            quantizer.observer = _recorder(
                quantizer, seen[name], percentile if statistic == "percentile" else None
            )
        count = 0
        example = None
        for count, batch in enumerate(batches, start=1):
            hosts.reset(model)
            (forward or _run)(model, batch)
            if count == 1 and forward is None:
                example = _some(_input(batch))
    if count == 0:
        raise InputError("there is no batch to calibrate on.")
    scales = {name: torch.stack(values).double() for name, values in seen.items() if values}
    frozen = {
        name: (values.max() if statistic == "max" else values.mean()).item()
        for name, values in scales.items()
    }
    for name, alpha in frozen.items():
        if not math.isfinite(alpha):
            raise InputError(
                f"the membrane potentials of {_owner(name)} became NaN or infinite on the "
                "calibration data; no scale was changed."
            )
    for name, alpha in frozen.items():
        quantizers[name].freeze(alpha)
    if example is not None:
        _examples[model] = example
    idle = [_owner(name) for name in quantizers if name not in frozen]
    if idle:
        warnings.warn(f"not calibrated because they did not run: {', '.join(idle)}", stacklevel=2)
    return {_owner(name): alpha for name, alpha in frozen.items()}


def example_of(model: nn.Module) -> Tensor | None:
    """A few inputs that ``model`` was last calibrated with in this process, if it was.

    They are kept beside the model, not in it: copies, pickles and checkpoints are without.
    """
    return _examples.get(model)


def _some(x: Any) -> Tensor | None:
    """At most 16 samples of ``[N, ...]`` or ``[T, N, ...]`` (3 and 5 axes), on the CPU."""
    if not isinstance(x, Tensor) or x.dim() < 2:
        return None
    axis = 1 if x.dim() in (3, 5) else 0
    return x.detach().narrow(axis, 0, min(16, x.shape[axis])).cpu().clone()


def _input(batch: Any) -> Any:
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def _run(model: nn.Module, batch: Any) -> Any:
    return model(_input(batch))


def _owner(name: str) -> str:
    return name.removesuffix("membrane").removesuffix(".") or "(model)"


def _recorder(
    quantizer: MembraneQuantizer, values: list[Tensor], percentile: float | None
) -> Callable[[Tensor], None]:
    """Records the scale of every time step; a scale below zero means a zero state, like 0."""

    def record(v: Tensor) -> None:
        if percentile is None:
            alpha = quantizer.observe(v)
        else:
            flat = (v.abs() if quantizer.scale == "absmax" else v).flatten().float()
            if flat.numel() == 0:
                return
            # kthvalue, because quantile refuses more than 16 million values.
            alpha = flat.kthvalue(math.ceil(percentile / 100 * flat.numel())).values
            # A percentile steps over what the maximum shows: a few values that are not finite.
            alpha = torch.where(torch.isfinite(flat).all(), alpha, torch.nan)
        values.append(alpha.clamp(min=0))

    return record
