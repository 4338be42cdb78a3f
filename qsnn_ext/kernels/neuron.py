"""What a neuron module calls: picks the fused operation or the eager loop for one layer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qsnn_ext import functional as F
from qsnn_ext.kernels import backend as B
from qsnn_ext.kernels.leaky import leaky_step
from qsnn_ext.kernels.lif import (
    AlphaMode,
    LIFOptions,
    compute_dtype,
    fits,
    lif_multi_step,
)
from qsnn_ext.kernels.surrogates import Surrogate, recognise
from qsnn_ext.kernels.watching import is_watched, uncounted
from qsnn_ext.quantizers import MembraneQuantizer

_log = logging.getLogger(__name__)
_COUNTS = "_qsnn_spike_counts"


def run_layer(
    x: Tensor,
    v: Tensor | None,
    membrane: MembraneQuantizer,
    *,
    charge: dict[str, float | Tensor],
    threshold: float | Tensor,
    reset: F.Reset,
    v_reset: float,
    detach_reset: bool,
    surrogate: Callable[[Tensor], Tensor],
    order: F.StepOrder,
) -> tuple[Tensor, Tensor]:
    """All steps of an integrate-and-fire layer, fused where an operation covers it.

    Args:
        x: input ``[T, N, ...]``.
        v: state before the first step ``[N, ...]``; ``None`` is zero.
        membrane: quantizes the state; its running scale is updated as by calling it.
        charge: ``decay``, ``gain`` and ``offset``, see :func:`qsnn_ext.functional.lif_step`.
        threshold: as there, like the remaining arguments.
        reset: as there.
        v_reset: as there.
        detach_reset: as there.
        surrogate: as there.
        order: as there.

    Returns:
        Spikes ``[T, N, ...]`` and the state after the last step ``[N, ...]``.
    """
    known = recognise(surrogate)
    reason = _why_eager(x, membrane, known is None, (*charge.values(), threshold))
    if reason:
        if B.current_backend() != "eager" and not torch.compiler.is_compiling():
            _log.debug("the eager loop runs a layer: %s", reason)
        return _eager(
            x,
            v,
            **charge,
            threshold=threshold,
            reset=reset,
            v_reset=v_reset,
            detach_reset=detach_reset,
            surrogate=surrogate,
            quantize=rounded(membrane),
            order=order,
        )
    assert known is not None
    options = _options(membrane, known, order, reset, v_reset, detach_reset)
    alpha = None if options.alpha == "dynamic" else membrane.alpha
    result = lif_multi_step(
        x,
        v,
        options,
        decay=charge["decay"],
        gain=charge["gain"],
        offset=charge["offset"],
        threshold=threshold,
        alpha=alpha,
    )
    _account(membrane, options, result.running_alpha, result.spikes, result.counts)
    return result.spikes, result.v


def covers(
    x: Tensor,
    membrane: MembraneQuantizer,
    surrogate: Callable[[Tensor], Tensor],
    numbers: tuple[float | Tensor, ...],
) -> bool:
    """Whether :func:`run_layer` would run the fused operation.

    Args:
        x: input.
        membrane: quantizes the state.
        surrogate: the surrogate gradient.
        numbers: decay and threshold.
    """
    return not _why_eager(x, membrane, recognise(surrogate) is None, numbers)


def run_delayed_step(
    x: Tensor,
    mem: Tensor,
    membrane: MembraneQuantizer,
    *,
    params: Tensor,
    reset: F.Reset,
    surrogate: Callable[[Tensor], Tensor],
    order: F.StepOrder,
) -> tuple[Tensor, Tensor] | None:
    """One step of a layer with delayed reset, or ``None`` where no operation covers it.

    Args:
        x: input ``[N, ...]``.
        mem: stored state, like ``x``.
        membrane: quantizes the state; its running scale is updated as by calling it.
        params: see :func:`qsnn_ext.kernels.leaky.leaky_step`.
        reset: ``"soft"``, ``"hard"`` or ``"none"``.
        surrogate: maps ``u - theta`` to spikes.
        order: see :func:`qsnn_ext.functional.lif_step`.

    Returns:
        Spikes and the state to store, like ``x``.
    """
    known = recognise(surrogate)
    if _why_eager(x, membrane, known is None, ()) or x.dtype != torch.float32:
        return None
    assert known is not None
    options = _options(membrane, known, order, reset)
    alpha = None if options.alpha == "dynamic" else membrane.alpha
    spikes, stored, running, count = leaky_step(x, mem.to(x.dtype), params, options, alpha)
    _account(membrane, options, running, spikes, count)
    return spikes, stored


def _options(
    membrane: MembraneQuantizer,
    surrogate: Surrogate,
    order: F.StepOrder,
    reset: F.Reset,
    v_reset: float = 0.0,
    detach_reset: bool = False,
) -> LIFOptions:
    mode: AlphaMode = "dynamic"
    if membrane.mode == "frozen":
        mode = "running" if membrane.training else "given"
    return LIFOptions(
        surrogate,
        membrane.bits,
        membrane.scale,
        mode,
        membrane.momentum,
        membrane.squash == "tanh",
        order,
        reset,
        v_reset,
        detach_reset,
    )


def _account(
    membrane: MembraneQuantizer,
    options: LIFOptions,
    running: Tensor,
    spikes: Tensor,
    counts: Tensor,
) -> None:
    """Keep the running scale, and let the spikes carry their count."""
    if options.alpha == "running":
        membrane.alpha.copy_(running)
        membrane.calibrated = True
    if not torch.compiler.is_compiling() and not spikes.is_inference():
        setattr(spikes, _COUNTS, (spikes._version, counts))


def _why_eager(
    x: Tensor, membrane: MembraneQuantizer, unknown: bool, numbers: tuple[float | Tensor, ...]
) -> str | None:
    """Why no operation covers the layer, or ``None`` where one does."""
    if B.current_backend() == "eager":
        return "it was asked for"
    if not x.numel():
        return "it is empty"
    if is_watched():
        return "operations are being watched, as operation counters do, and shall be seen"
    if unknown:
        return "its surrogate gradient has no known closed form"
    if type(membrane) is not MembraneQuantizer:
        return f"its quantizer is a {type(membrane).__name__}"
    if membrane._forward_hooks or membrane._forward_pre_hooks:
        return "its quantizer has hooks, which want every time step"
    if membrane.sync_scale:
        return "its scale is the maximum over several processes"
    if membrane.observer is not None:
        return "its membrane potentials are being observed"
    if membrane.mode == "frozen" and not membrane.training and not membrane.calibrated:
        return "its scale has no value"
    if membrane.mode == "frozen" and membrane.training and compute_dtype(x) != membrane.alpha.dtype:
        return "its running scale has another dtype"
    if not fits(*numbers):
        return "its decay or threshold differs between neurons"
    return None


def rounded(membrane: MembraneQuantizer) -> Callable[[Tensor], Tensor]:
    """The quantizer, unseen by operation counters."""

    def quantize(u: Tensor) -> Tensor:
        with uncounted():
            value: Tensor = membrane(u)
        return value

    return quantize


def _eager(x: Tensor, v: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(x)
    state = torch.full_like(x[0], 0.0) if v is None else v
    spikes = []
    for step in x:
        spike, after = F.lif_step(step.to(dtype), state.to(dtype), **options)
        spikes.append(spike.to(x.dtype))
        state = after.to(x.dtype)
    return torch.stack(spikes), state


def spike_count(spikes: Tensor) -> Tensor:
    """Number of spikes, a differentiable 0-dim tensor (float32 or wider).

    Spikes that come straight from a fused operation bring their count with them, and nothing is
    read again; others are summed.

    Args:
        spikes: what a spiking layer returned.
    """
    version, counts = getattr(spikes, _COUNTS, (None, None))
    if counts is not None and not spikes.is_inference() and version == spikes._version:
        return counts.sum()  # type: ignore[no-any-return]
    # float32 whatever the spikes' dtype: a half-precision sum stops growing at 2048.
    return spikes.sum(dtype=torch.promote_types(spikes.dtype, torch.float32))
