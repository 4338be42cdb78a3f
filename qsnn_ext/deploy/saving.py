"""From a model to a ``.qsnn`` file in one call."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from qsnn_ext.calibration import input_seen
from qsnn_ext.deploy.fileformat import save_program
from qsnn_ext.deploy.lowering import lower
from qsnn_ext.deploy.program import Program
from qsnn_ext.errors import InputTypeError, LoweringError
from qsnn_ext.trace import check_model
from qsnn_ext.wrapping import unwrap


def save(
    model: nn.Module | Program,
    path: str | os.PathLike[str],
    sample: Tensor | None = None,
    **options: Any,
) -> Program:
    """Lower a model and write it to a ``.qsnn`` file.

    Args:
        model: A quantized model with frozen membrane scales, or a finished program.
        path: Where to write.
        sample: Representative input, as for :func:`~qsnn_ext.deploy.lower`. Without it the model's
            ``example_input_array`` (the name Lightning gives it) is used if it has one, else
            the shape that :func:`~qsnn_ext.calibrate` has seen.
        options: Further arguments of :func:`~qsnn_ext.deploy.lower`.

    Returns:
        The program that was written.

    Raises:
        LoweringError: If the model has no exact integer form, or no sample is known.
        InputTypeError: If ``model`` is neither, or ``path`` is none.
        FormatError: If the file cannot be written.
    """
    if not isinstance(model, Program):
        check_model(model, "deploy.save")
    if not isinstance(path, str | os.PathLike):
        raise InputTypeError(f"save(model, path, sample): a {type(path).__name__} is no path")
    if isinstance(model, Program):
        program = model
    else:
        if sample is None:
            sample = getattr(unwrap(model), "example_input_array", None)
        seen = input_seen(model)
        if sample is None and seen is not None:
            sample = torch.zeros(seen.shape)  # the range is known
        if not isinstance(sample, Tensor):
            raise LoweringError(
                f"{type(model).__name__}: shape and range of its input are unknown; pass a batch "
                "of representative inputs, save(model, path, sample), or calibrate(model, "
                "batches) before saving"
            )
        program = lower(model, sample, **options)
    save_program(program, path)
    return program
