"""From a trained model to an integer program.

:func:`lower` below is the whole way. In the order of the data:

- :mod:`~qsnn_ext.deploy.lowering.input_codes`: unit and range of the input's integer codes;
- :mod:`~qsnn_ext.deploy.lowering.tracing`: the model on a sample becomes a graph;
- :mod:`~qsnn_ext.deploy.lowering.draft`: the program while it is being written, and what is known
  of the model's tensors meanwhile;
- :mod:`~qsnn_ext.deploy.lowering.walk`: every node of the graph is interpreted, with
  :mod:`~qsnn_ext.deploy.lowering.axes` (reshapes only relabel), ``layers``, ``pooling``,
  ``arithmetic`` and ``calls`` (of neurons);
- :mod:`~qsnn_ext.deploy.lowering.settle`: scales and biases become fixed point;
- :mod:`~qsnn_ext.deploy.lowering.neurons`: so do leak, threshold and quantization;
- :mod:`~qsnn_ext.deploy.lowering.finish`: outputs, pruning, the proof that nothing overflows.

What has no exact counterpart raises :class:`~qsnn_ext.errors.LoweringError` with the module path,
the reason and a remedy.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from qsnn_ext import hosts
from qsnn_ext.deploy.lowering.axes import sample_axes
from qsnn_ext.deploy.lowering.draft import Array, Draft
from qsnn_ext.deploy.lowering.finish import finish
from qsnn_ext.deploy.lowering.input_codes import requested_code
from qsnn_ext.deploy.lowering.tracing import trace
from qsnn_ext.deploy.lowering.walk import is_leaf, walk
from qsnn_ext.deploy.program import Program
from qsnn_ext.errors import InputError, LoweringError


def lower(
    model: nn.Module,
    sample: Tensor,
    *,
    time_first: bool | None = None,
    input_scale: float | None = None,
    input_bits: int | None = None,
) -> Program:
    """Turn a quantized model into an integer program.

    The model is left as it was, but for the state of its neurons, which is reset.

    Args:
        model: A quantized model of either host with frozen membrane scales.
        sample: Representative input, as the model is called with: ``[N, ...]`` or ``[T, N, ...]``.
            It fixes the input shape and, unless ``input_scale`` is given, the range of the input
            codes.
        time_first: Whether the first axis of the sample is time. By default it is for 3 axes
            (``[T, N, features]``) and 5 axes (``[T, N, C, H, W]``).
        input_scale: Real value of one input code.
        input_bits: Bits of an input code, 2 to 16. By default 8 where those are exact for the
            sample (see :func:`~qsnn_ext.deploy.lowering.input_codes.input_code`), else 16, or as
            many as the first layer's 32-bit accumulators leave room for.

    Returns:
        A valid program.

    Raises:
        LoweringError: If something has no exact integer counterpart; names the module.
        InputError: If the sample is not a finite floating point tensor, or all zero without an
            ``input_scale``, or ``input_scale`` or ``input_bits`` is out of range.
    """
    _check(sample, input_scale, input_bits)
    first = sample.dim() in (3, 5) if time_first is None else time_first
    data = sample.detach().cpu()
    hosts.reset(model)
    twin = copy.deepcopy(model).cpu().eval()
    # Two samples, so that no axis but a real one has size 1 by accident.
    axis = 1 if first else 0
    pair = data.float().narrow(axis, 0, 1)
    pair = torch.cat([pair, pair], axis)
    graph = trace(twin, pair, is_leaf)
    hosts.reset(twin)  # tracing ran it, and the graph reads the first membrane potentials from it
    rank = pair.dim() - axis - 1
    if not 1 <= rank <= 3:
        raise LoweringError(
            f"the model: a sample of shape {tuple(sample.shape)} is not [N, ...] or [T, N, ...] of "
            "features, channels x length or images; pass one that is; time_first= tells whether "
            "its first axis is time"
        )
    shape, axes = sample_axes(pair.shape, first)
    widest = 16
    while True:
        scale, limits = requested_code(data.numpy(), input_scale, input_bits, widest)
        draft = Draft(shape, scale, max(-limits[0], limits[1]))
        if first:
            draft.steps = pair.shape[0]
        try:
            result = walk(draft, graph, twin, Array(draft.input, axes, scale))
        except LoweringError:
            if input_bits is not None or draft.room is None or not 2 <= draft.room < widest:
                raise
            widest = draft.room
            continue
        return finish(draft, result, limits, type(model).__name__, first, rank)


def _check(sample: Tensor, input_scale: float | None, input_bits: int | None) -> None:
    if not isinstance(sample, Tensor) or not sample.is_floating_point() or sample.dim() < 2:
        raise InputError("the sample must be a floating point tensor [N, ...] or [T, N, ...]")
    if not bool(torch.isfinite(sample).all()) or sample.numel() == 0:
        raise InputError("the sample must be finite and not empty")
    if input_bits is not None and not 2 <= input_bits <= 16:
        raise InputError(f"input_bits={input_bits}: choose 2 to 16")
    if input_scale is not None and not 0 < input_scale < 1e30:
        raise InputError(f"input_scale={input_scale}: it must be a positive finite number")
    if input_scale is None and not bool(sample.any()):
        raise InputError(
            "the sample is all zero and does not show the range of the inputs; pass representative "
            "inputs, or input_scale="
        )
