"""What a neuron module calls: one layer's steps, by the fused operation or the eager loop."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from qsnn_ext.errors import ConfigError
from qsnn_ext.kernels import backend as B
from qsnn_ext.kernels.backends import eager
from qsnn_ext.kernels.grid import compute_dtype
from qsnn_ext.kernels.lif import fits, lif_multi_step
from qsnn_ext.kernels.options import AlphaMode, LIFOptions
from qsnn_ext.kernels.surrogates import Surrogate, recognize
from qsnn_ext.kernels.watching import is_watched, uncounted
from qsnn_ext.neuron import NeuronModel
from qsnn_ext.quantizers import MembraneQuantizer

_log = logging.getLogger(__name__)
_COUNTS = "_qsnn_spike_counts"


def run_layer(x: Tensor, v: Tensor | None, model: NeuronModel) -> tuple[Tensor, Tensor]:
    """All steps of a layer with an affine charge, fused where the operation covers it.

    Args:
        x: input ``[T, N, ...]``.
        v: state before the first step ``[N, ...]``; ``None`` is zero.
        model: what a step computes. The running scale of its quantizer is updated as by calling it.

    Returns:
        Spikes ``[T, N, ...]`` (not graded) and the state after the last step ``[N, ...]``.

    Raises:
        ConfigError: the charge is not affine, or the potential is not quantized.
    """
    charge, membrane = model.charge, model.quantizer
    if charge is None or membrane is None or model.fire is None or model.threshold is None:
        raise ConfigError(f"a {model.kind} has no affine charge and quantized potential to run.")
    numbers: dict[str, Any] = {
        "decay": charge.decay,
        "gain": charge.gain,
        "offset": charge.offset,
        "threshold": model.threshold,
    }
    # A graph being compiled cannot look into a closure; there, plain steps fuse by themselves.
    opaque = torch.compiler.is_compiling() and not isinstance(model.fire, nn.Module)
    known = None if opaque else recognize(model.fire)
    reason = _why_eager(x, v, model, membrane, known)
    if reason or known is None:
        if B.current_backend() != "eager" and not torch.compiler.is_compiling():
            _log.debug("the eager loop runs a layer: %s", reason)
        return eager.run(
            x, v, numbers,
            reset=model.reset, v_reset=model.v_reset, detach_reset=model.detach_reset,
            delayed=model.delayed, order=model.order, fire=model.fire,
            quantize=rounding(membrane, model.delayed),
        )  # fmt: skip
    options = _options(model, membrane, known)
    alpha = None if options.alpha == "dynamic" else membrane.alpha
    result = lif_multi_step(x, v, options, **numbers, alpha=alpha)
    if options.alpha == "running":
        membrane.alpha.copy_(result.running_alpha)
        membrane.calibrated = True
    if not torch.compiler.is_compiling() and not result.spikes.is_inference():
        setattr(result.spikes, _COUNTS, (result.spikes._version, result.counts))
    return result.spikes, result.v


def rounding(membrane: MembraneQuantizer, delayed: bool) -> eager.Quantize:
    """The quantizer as the eager loop wants it, unseen by operation counters."""

    def quantize(u: Tensor) -> tuple[Tensor, Tensor]:
        with uncounted():
            return membrane.quantize(u)

    def call(u: Tensor) -> tuple[Tensor, Tensor]:
        with uncounted():
            return membrane(u), membrane.alpha  # as a module: its hooks see every time step

    return quantize if delayed else call


def _options(model: NeuronModel, membrane: MembraneQuantizer, fire: Surrogate) -> LIFOptions:
    mode: AlphaMode = "dynamic"
    if membrane.mode == "frozen":
        mode = "running" if membrane.training else "given"
    return LIFOptions(
        fire, membrane.bits, membrane.scale, mode, membrane.momentum, membrane.squash,
        model.order, model.reset, model.v_reset, model.detach_reset, model.delayed,
    )  # fmt: skip


def _why_eager(
    x: Tensor,
    v: Tensor | None,
    model: NeuronModel,
    membrane: MembraneQuantizer,
    known: Surrogate | None,
) -> str | None:
    """Why no operation covers the layer, or ``None`` where one does."""
    assert model.charge is not None
    assert model.threshold is not None
    if B.current_backend() == "eager":
        return "it was asked for"
    if not x.numel():
        return "it is empty"
    if is_watched():
        return "operations are being watched, as operation counters do, and shall be seen"
    if known is None:
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
    if not fits(model.charge.decay, model.charge.gain, model.charge.offset, model.threshold):
        return "its decay or threshold differs between neurons"
    if v is not None and v.device != x.device:
        return "its state lies on another device"
    return None


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
