"""From a trained model to an integer program.

:func:`lower` below is the whole way. In the order of the data:

- :mod:`~qsnn_ext.deploy.lowering.tracing`: what the model does to a sample becomes a tape;
- :mod:`~qsnn_ext.deploy.lowering.input_codes`: unit and range of the input's integer codes;
- :mod:`~qsnn_ext.deploy.lowering.draft`: the program while it is being written, and what is known
  of the model's tensors meanwhile;
- :mod:`~qsnn_ext.deploy.lowering.walk`: every event of the tape is interpreted, with
  :mod:`~qsnn_ext.deploy.lowering.axes` (reshapes only relabel), ``layers``, ``pooling``,
  ``arithmetic``, ``functions`` and ``calls`` (of neurons);
- :mod:`~qsnn_ext.deploy.lowering.settle`: scales and biases become fixed point;
- :mod:`~qsnn_ext.deploy.lowering.neurons`: so do leak, threshold and quantization;
- :mod:`~qsnn_ext.deploy.lowering.finish`: outputs, pruning, the proof that nothing overflows.

What has no exact counterpart raises :class:`~qsnn_ext.errors.LoweringError` with the module path,
the reason, a remedy and the line of the model's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qsnn_ext import hosts
from qsnn_ext import trace as runs
from qsnn_ext.calibration import InputSeen, input_seen
from qsnn_ext.convert import conversion_report
from qsnn_ext.deploy.lowering.axes import sample_axes
from qsnn_ext.deploy.lowering.calls import has_state, inner_forward, kept_states
from qsnn_ext.deploy.lowering.draft import Array, Draft
from qsnn_ext.deploy.lowering.finish import finish
from qsnn_ext.deploy.lowering.functions import InputArithmeticError
from qsnn_ext.deploy.lowering.input_codes import requested_code
from qsnn_ext.deploy.lowering.neurons import Real
from qsnn_ext.deploy.lowering.tracing import Event, ModelFailedError, Tape, trace
from qsnn_ext.deploy.lowering.walk import is_leaf, walk
from qsnn_ext.deploy.program import Program
from qsnn_ext.errors import InputError, LoweringError

#: A sample this many times smaller than the calibration data shows something else than they did.
FAR_BELOW = 16.0


def lower(
    model: nn.Module,
    sample: Tensor,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    time_first: bool | None = None,
    input_scale: float | None = None,
    input_bits: int | None = None,
) -> Program:
    """Turn a quantized model into an integer program.

    The model runs on the sample and is left as it was, but for the state of its neurons, which is
    reset. Wrappers of ``torch.compile``, ``DataParallel`` and the like are looked through.

    Args:
        model: A quantized model of either host with frozen membrane scales.
        sample: Input as the model is called with, ``[N, ...]``, ``[T, N, ...]`` or
            ``[N, T, ...]``. It fixes the shape. It also fixes the range of the input codes, unless
            the model was calibrated (:func:`~qsnn_ext.calibrate` keeps the range it saw) or
            ``input_scale`` is given.
        forward: ``forward(model, sample)`` runs the model, where it is not called as
            ``model(sample)``.
        time_first: Whether the first axis of the sample is time. By default it is what the step
            modes and loops of the model say.
        input_scale: Real value of one input code.
        input_bits: Bits of an input code, 2 to 16. By default 8 where those are exact for the
            sample (see :func:`~qsnn_ext.deploy.lowering.input_codes.input_code`), else 16, or as
            many as the first layer's 32-bit accumulators leave room for.

    Returns:
        A valid program.

    Raises:
        LoweringError: If something has no exact integer counterpart; names the module.
        InputError: If the sample is not a finite floating point tensor, or far below the range
            that the model was calibrated with, or all zero where nothing else shows the range, or
            ``input_scale`` or ``input_bits`` is out of range.
    """
    model = runs.check_model(model, "deploy.lower")
    seen = input_seen(model)
    _check(sample, seen, input_scale, input_bits)
    leads = _leads(sample, time_first)
    shown = sample.detach().double().cpu().reshape(-1)
    if seen is not None:
        shown = torch.cat([shown, seen.values])
    tapes: dict[tuple[int, ...], Tape] = {}
    errors: list[tuple[int, LoweringError]] = []
    for lead, batch in _readings(sample, leads):
        try:
            if batch.shape not in tapes:
                tapes[tuple(batch.shape)] = _tape(model, batch, forward)
                hosts.reset(model)
        except LoweringError as found:
            errors.append((-1, found))
            continue
        tape = tapes[tuple(batch.shape)]
        attempt = _Attempt(model, tape, lead, shown.numpy(), input_scale, input_bits)
        try:
            return attempt.run()
        except LoweringError as found:
            errors.append((attempt.reached, found))
    _, error = max(errors, key=lambda pair: pair[0])
    raise error


def _readings(sample: Tensor, leads: list[str]) -> Iterator[tuple[str, Tensor]]:
    """What the first axes may be, each with a sample of which the batch is no single one.

    An axis of size 1 could be anything. A model that fixes its batch gets the sample as it is.
    """
    single = [lead for lead in leads if sample.shape[lead.index("N")] == 1]
    for lead in leads:
        axis = lead.index("N")
        yield lead, torch.cat([sample, sample], axis) if lead in single else sample
    for lead in single:
        yield lead, sample


def _leads(sample: Tensor, time_first: bool | None) -> list[str]:
    """What the first axes of the sample may be, the likeliest first."""
    rank = sample.dim()
    leads = {True: ["TN"], False: ["N", "NT"], None: ["TN", "NT", "N"]}[time_first]
    fitting = [lead for lead in leads if 1 <= rank - len(lead) <= 3]
    if not fitting:
        raise LoweringError(
            f"the model: a sample of shape {tuple(sample.shape)} is not [N, ...] or [T, N, ...] of "
            "features, channels x length or images; pass one that is; time_first= tells whether "
            "its first axis is time"
        )
    return fitting


def _tape(model: nn.Module, sample: Tensor, forward: Callable[..., Any] | None) -> Tape:
    """The tape of the model on its sample, in the sample's own shape."""
    like = next((p for p in model.parameters() if p.is_floating_point()), sample)
    x = sample.detach().to(like.device, like.dtype).clone()

    def run() -> Any:
        return forward(model, x) if forward is not None else model(x)

    with runs.undisturbed(model):
        try:
            return trace(model, run, x, is_leaf, kept_states, inner_forward)
        except LoweringError:
            raise
        except Exception as error:
            cause: BaseException = error
            where = "the model"
            if isinstance(error, ModelFailedError) and error.__cause__ is not None:
                cause, where = error.__cause__, str(error)
            raise LoweringError(
                f"{where}: it fails on the sample ({type(cause).__name__}: {cause}); check that "
                "model(sample) runs"
            ) from cause


class _Attempt:
    """One way to read the axes of the sample.

    Args:
        model: The model.
        tape: What it did to the sample.
        lead: First axes of the sample: "TN", "NT" or "N".
        shown: Values of inputs.
        scale, bits: As given to :func:`lower`.

    Attributes:
        reached: How many events could be lowered.
    """

    def __init__(
        self,
        model: nn.Module,
        tape: Tape,
        lead: str,
        shown: Real,
        scale: float | None,
        bits: int | None,
    ) -> None:
        self.model, self.tape, self.lead = model, tape, lead
        self.shown, self.scale, self.bits = shown, scale, bits
        self.events: list[Event] = tape.live(has_state)
        self.shape, self.axes = sample_axes(tape.shape, lead)
        self.prologue: list[tuple[Real, Real]] = []
        self.reached = 0
        report = conversion_report(model)
        self.left = {r.name: r.reason for r in report.of("unsupported", "kept")} if report else {}

    def run(self) -> Program:
        """The program; walks again where the walk learns what it should have known before."""
        widest = 16
        while True:
            scale, limits = requested_code(self._prepared(), self.scale, self.bits, widest)
            rank = len(self.tape.shape) - len(self.lead)
            draft = Draft(self.shape, rank, scale, max(-limits[0], limits[1]))
            draft.prologue, draft.left = self.prologue, self.left
            draft.modules = dict(self.model.named_modules())
            if "T" in self.lead:
                draft.steps = self.tape.shape[self.lead.index("T")]
            sample = Array(draft.input, self.axes, scale, raw=True)
            try:
                result = walk(draft, self.tape, self.events, sample)
            except InputArithmeticError as found:
                self.prologue = [*self.prologue, found.step]
                continue
            except LoweringError:
                self.reached = max(self.reached, draft.reached)
                if self.bits is not None or draft.room is None or not 2 <= draft.room < widest:
                    raise
                widest = draft.room
                continue
            self.reached = max(self.reached, draft.reached)
            return finish(draft, result, limits, type(self.model).__name__, self.lead, rank)

    def _prepared(self) -> Real:
        """The values shown, after what the host does to the input."""
        values = self.shown
        for gain, bias in self.prologue:
            values = np.unique(values[..., None] * gain + bias)
        return values


def _check(
    sample: Tensor, seen: InputSeen | None, input_scale: float | None, input_bits: int | None
) -> None:
    if isinstance(sample, tuple | list | dict):
        raise InputError(
            f"the sample is a {type(sample).__name__}, and a program takes one tensor; models of "
            "several inputs cannot be lowered: join the inputs into one, or lower each part"
        )
    if not isinstance(sample, Tensor) or not sample.is_floating_point() or sample.dim() < 2:
        raise InputError("the sample must be a floating point tensor [N, ...] or [T, N, ...]")
    if not bool(torch.isfinite(sample).all()) or sample.numel() == 0:
        raise InputError("the sample must be finite and not empty")
    if input_bits is not None and not 2 <= input_bits <= 16:
        raise InputError(f"input_bits={input_bits}: choose 2 to 16")
    if input_scale is not None and not 0 < input_scale < 1e30:
        raise InputError(f"input_scale={input_scale}: it must be a positive finite number")
    if input_scale is not None:
        return
    top = float(sample.abs().max())
    if seen is None and top == 0:
        raise InputError(
            "the sample is all zero and does not show the range of the inputs; pass representative "
            "inputs, or input_scale="
        )
    if seen is not None and 0 < top < seen.largest / FAR_BELOW:
        raise InputError(
            f"the sample reaches {top:.3g}, far below the range of the inputs that the model was "
            f"calibrated with, which reach {seen.largest:.3g}; pass inputs prepared as those were, "
            "or calibrate on inputs prepared as these, or pass input_scale="
        )
