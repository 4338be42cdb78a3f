"""What sessions accept: codes, states and counts, checked before anything runs."""

from __future__ import annotations

import operator
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from qsnn_ext.deploy.program import WIDE_LIMIT, IntArray, Program
from qsnn_ext.errors import ConfigError, FormatError, InputError, InputTypeError


def program(given: Any, what: str) -> Program:
    """``given``, if it is a program.

    Args:
        given: What somebody passed.
        what: Who needs it, for the message.

    Raises:
        InputTypeError: If it is none; says how to come by one.
    """
    if isinstance(given, Program):
        return given
    remedy = ""
    if isinstance(given, str | os.PathLike):
        remedy = "; deploy.load_program(path) reads one"
    elif hasattr(given, "named_modules"):
        remedy = "; deploy.lower(model, sample) makes one"
    elif isinstance(getattr(given, "program", None), Program):
        remedy = "; pass its .program"
    raise InputTypeError(f"{what} needs a program, got {type(given).__name__}{remedy}")


def count(what: str, given: Any, most: int = 2**31 - 1) -> int:
    """``given`` as a whole number of at least 1.

    Raises:
        ConfigError: If it is none.
    """
    try:
        number = operator.index(given)
    except TypeError:
        number = 0
    if isinstance(given, bool) or not 1 <= number <= most:
        raise ConfigError(f"{what}={given!r} must be a whole number of 1 to {most}")
    return number


def within_limit(needed: int, limit: int) -> None:
    """Check the bytes that a program needs for one sample.

    Raises:
        FormatError: If they are more than ``limit``.
        ConfigError: If the limit is no number of bytes.
    """
    checked = count("memory_limit", limit, 2**63)
    if needed > checked:
        raise FormatError(
            f"the program needs {needed:,} bytes of memory to run, more than the limit of "
            f"{checked:,}; if you trust it, raise memory_limit"
        )


def as_array(x: Any, what: str = "the input") -> npt.NDArray[Any]:
    """An array, tensor, or nested lists as a NumPy array; no value changes.

    Raises:
        InputTypeError: If it is none of them, or of a type that NumPy does not know.
    """
    try:
        if hasattr(x, "detach"):
            x = x.detach().cpu()
            if str(x.dtype) == "torch.bfloat16" or "float8" in str(x.dtype):
                x = x.float()  # NumPy has no such type, and float32 holds all their values
            x = x.numpy()
        return np.asarray(x)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise InputTypeError(
            f"{what} is a {type(x).__name__} that cannot be made a NumPy array ({error}); give an "
            "array or a dense tensor of numbers"
        ) from None


def step_codes(program: Program, batch: int, codes: Any) -> npt.NDArray[np.int32]:
    """Input codes ``[N, C, H, W]`` of one time step.

    Raises:
        InputError: If the shape is another, or a code is out of the program's range.
        InputTypeError: If they are no integers.
    """
    return _codes(program, (batch,), codes)


def run_codes(
    program: Program, batch: int, codes: Any, steps: int, static: bool
) -> npt.NDArray[np.int32]:
    """Input codes of a whole run: ``[N, C, H, W]`` (``static``) or ``[N, T, C, H, W]``.

    Raises:
        InputError, InputTypeError: As :func:`step_codes`.
    """
    return _codes(program, (batch,) if static else (batch, steps), codes)


def _codes(program: Program, lead: tuple[int, ...], codes: Any) -> npt.NDArray[np.int32]:
    array = as_array(codes)
    expected = (*lead, *program.values[0].shape)
    if not np.issubdtype(array.dtype, np.integer):
        raise InputTypeError(
            f"a session takes integer codes and was given {array.dtype}; net.codes(frame) makes "
            "codes of real numbers"
        )
    if array.shape != expected:
        raise InputError(f"input of shape {array.shape}; this session takes {expected}")
    lo, hi = program.input_range
    if array.size and not (lo <= int(array.min()) and int(array.max()) <= hi):
        raise InputError(
            f"input codes reach from {array.min()} to {array.max()}; this program takes {lo} to "
            f"{hi}: net.codes(frame) makes codes of real numbers"
        )
    return np.ascontiguousarray(array, np.int32)


def states(program: Program, batch: int, state: Any) -> dict[str, IntArray]:
    """State words of every neuron, as a session of the program returned them.

    Args:
        program: A valid program.
        batch: Number of samples of the session that is to go on from it.
        state: Name of neuron -> state words ``[N, C, H, W]``.

    Raises:
        InputError: If it is the state of another program or batch.
        InputTypeError: If it is no dictionary of integer arrays.
    """
    if not isinstance(state, dict):
        raise InputTypeError(
            f"a state is what session.state() returned, a dictionary; given was a "
            f"{type(state).__name__}"
        )
    found: dict[str, IntArray] = {}
    for op in program.neurons:
        name = op.name
        shape = (batch, *program.values[op.source].shape)
        if op.name not in state:
            raise InputError(f"the state lacks neuron {name!r}; it is of another program")
        words = as_array(state[op.name], f"the state of neuron {name!r}")
        if not np.issubdtype(words.dtype, np.integer):
            raise InputTypeError(
                f"the state of neuron {name!r} holds {words.dtype}; state words are integers"
            )
        if words.shape != shape:
            raise InputError(
                f"the state of neuron {name!r} has shape {words.shape}; this session needs {shape}"
            )
        low, high = (-WIDE_LIMIT, WIDE_LIMIT) if op.bits == 32 else (0, 2**op.state_bits - 1)
        if int(words.min()) < low or int(words.max()) > high:
            raise InputError(f"the state of neuron {name!r} holds words outside {low}..{high}")
        found[op.name] = words
    for delay in program.delays:
        v = program.values[delay.source]
        if delay.name not in state:
            raise InputError(f"the state lacks {delay.name!r}; it is of another program")
        words = as_array(state[delay.name], f"the state of {delay.name!r}")
        if not np.issubdtype(words.dtype, np.integer) or words.shape != (batch, *v.shape):
            raise InputError(
                f"the state of {delay.name!r} must be integers of shape {(batch, *v.shape)}"
            )
        low, high = program.delay_range(delay)
        if int(words.min()) < low or int(words.max()) > high:
            raise InputError(f"the state of {delay.name!r} holds numbers outside {low}..{high}")
        found[delay.name] = words
    extra = [k for k in state if k not in found]
    if extra:
        raise InputError(
            f"the state holds {str(extra[0])[:60]!r}, which this program lacks; it is of "
            "another program"
        )
    return found
