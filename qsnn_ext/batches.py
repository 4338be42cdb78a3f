"""Running a model on what somebody gave: what is no batch is refused, what fails is explained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from qsnn_ext.errors import InputTypeError, QSNNError


def check_batches(batches: Any) -> None:
    """Refuse a single tensor, which would be run sample by sample or step by step.

    Raises:
        InputTypeError: ``batches`` is a tensor.
    """
    if isinstance(batches, Tensor):
        raise InputTypeError("batches must be an iterable of batches; for a single one pass [x].")


@contextmanager
def explained(what: str, given: Any, forward: Any) -> Iterator[None]:
    """For the run of a model: its errors stay what they are, and say on what it ran.

    Args:
        what: Name of the data, such as ``"batch 1"``.
        given: What the model was called with; arrays are not what layers take.
        forward: The function that ran the model, if one was given.

    Raises:
        InputTypeError: The model failed, and was given an array.
    """
    try:
        yield
    except QSNNError:
        raise
    except Exception as error:
        inputs = given if isinstance(given, (tuple, list)) else (given,)
        if forward is None and any(isinstance(x, np.ndarray) for x in inputs):
            raise InputTypeError(
                f"the model fails on {what}, a NumPy array; torch.as_tensor(x) is a tensor."
            ) from error
        remedy = "" if forward else "; one that is called once per time step needs forward="
        error.add_note(f"This was the model, run on {what} by qsnn_ext{remedy}.")
        raise
