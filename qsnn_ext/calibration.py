"""``calibrate``: give the membrane quantizers of a model fixed scales, taken from data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qsnn_ext import hosts, trace
from qsnn_ext.batches import check_batches, explained
from qsnn_ext.conversion.report import conversion_report
from qsnn_ext.errors import ConfigError, InputError, InputTypeError, StateError
from qsnn_ext.progress import tracking
from qsnn_ext.quantizers import MembraneQuantizer
from qsnn_ext.wrapping import named_modules, unwrap

#: Attribute of a calibrated model that holds its :class:`InputSeen`.
_ATTRIBUTE = "calibrated_input"
#: How many different values of the inputs are kept.
_LEVELS = 4096


@dataclass(frozen=True)
class InputSeen:
    """What a model was called with while it was calibrated: for deployment, and no sample of it.

    Attributes:
        shape: of the first input.
        values: different values of all inputs, ascending float64 on the CPU: the least, the
            largest, and of more than 4096 an even choice.
    """

    shape: tuple[int, ...]
    values: Tensor

    @property
    def largest(self) -> float:
        """Largest absolute value."""
        return float(self.values.abs().max()) if self.values.numel() else 0.0


def input_seen(model: nn.Module) -> InputSeen | None:
    """What ``model`` was last calibrated with. Copies and pickles of a model have it too."""
    seen = getattr(unwrap(model), _ATTRIBUTE, None)
    return seen if isinstance(seen, InputSeen) else None


class _InputWatch:
    """A forward pre-hook of the model that collects what an :class:`InputSeen` holds."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] | None = None
        self.values = torch.empty(0, dtype=torch.float64)

    def __call__(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        if x is None or x.numel() == 0 or x.is_complex():
            return
        if self.shape is None:
            self.shape = tuple(x.shape)
        flat = x.detach().reshape(-1)
        some = torch.cat(
            [flat[:: -(-flat.numel() // (1 << 16))], flat.min()[None], flat.max()[None]]
        ).double().cpu()  # fmt: skip
        values = torch.unique(torch.cat([self.values, some]))
        if values.numel() > _LEVELS:
            values = values[torch.linspace(0, values.numel() - 1, _LEVELS).round().long()]
        self.values = values

    def result(self) -> InputSeen | None:
        """What was seen, unless the model itself was never called with a finite tensor."""
        if self.shape is None or not bool(self.values.isfinite().all()):
            return None
        return InputSeen(self.shape, self.values)


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
    and random numbers are left as they are found. Shape and range of the inputs are kept as the
    model's attribute ``calibrated_input``, for :func:`qsnn_ext.deploy.lower`.

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
        InputTypeError: ``model`` is not a module, ``batches`` is a tensor, or the model fails on an
            array.
        ConfigError: unknown statistic or a percentile out of range.
        InputError: no batches, or potentials that are NaN or infinite.
        StateError: no quantized membrane potential in the model.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"calibrate needs a module, got {type(model).__name__}.")
    check_batches(batches)
    if statistic not in ("mean", "max", "percentile"):
        raise ConfigError(f"statistic={statistic!r} is unknown; 'mean', 'max' or 'percentile'.")
    if not 0 < percentile <= 100:
        raise ConfigError(f"percentile={percentile!r} must be above 0 and at most 100.")
    model = unwrap(model)
    quantizers = {n: m for n, m in named_modules(model) if isinstance(m, MembraneQuantizer)}
    if not quantizers:
        raise StateError(_nothing_quantized(model))
    seen: dict[str, list[Tensor]] = {name: [] for name in quantizers}
    count = 0
    with trace.undisturbed(model):
        for name, quantizer in quantizers.items():
            quantizer.mode = "dynamic"
            quantizer.observer = _recorder(
                quantizer, seen[name], percentile if statistic == "percentile" else None
            )
        watch = _InputWatch()
        handle = model.register_forward_pre_hook(watch, with_kwargs=True)
        try:
            with tracking(batches, "calibrate") as shown:
                for batch in shown:
                    count += 1
                    hosts.reset(model)
                    with explained(f"batch {count}", _input(batch), forward):
                        (forward or _run)(model, batch)
        finally:
            handle.remove()
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
    with torch.inference_mode(False):  # a scale must stay a tensor that training may change
        for name, alpha in frozen.items():
            quantizers[name].freeze(alpha)
    setattr(model, _ATTRIBUTE, watch.result())
    idle = [_owner(name) for name in quantizers if name not in frozen]
    if idle:
        warnings.warn(f"not calibrated because they did not run: {', '.join(idle)}", stacklevel=2)
    silent = [_owner(name) for name, alpha in frozen.items() if alpha == 0]
    if silent:
        warnings.warn(
            "no membrane potential was above zero on the calibration data, so that these neurons "
            f"have scale 0 and from step to step nothing is carried: {', '.join(silent)}; "
            "calibrate on data that make them charge",
            stacklevel=2,
        )
    return {_owner(name): alpha for name, alpha in frozen.items()}


def _nothing_quantized(model: nn.Module) -> str:
    kind, report = type(model).__name__, conversion_report(model)
    if report is None:
        return f"{kind} has no quantized membrane potential; call quantize_ first."
    neurons = [
        f"{row.name or '(model)'} ({row.type}): {row.reason}"
        for row in report.modules
        if row.neuron and row.membrane_bits is None
    ]
    return (
        f"{kind} has no quantized membrane potential: quantize_ ran and left "
        f"{'; '.join(neurons) or 'no neuron to quantize'}."
    )


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
        # Scales leave out what is not finite, and a percentile steps over it: here it must show.
        alpha = torch.where(torch.isfinite(v).all(), alpha, torch.nan)
        values.append(alpha.clamp(min=0))

    return record
