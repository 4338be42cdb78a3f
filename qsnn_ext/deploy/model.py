"""A deployed network: a program, ready to answer."""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from qsnn_ext.deploy import checks
from qsnn_ext.deploy.answers import apply, build
from qsnn_ext.deploy.engine import (
    MAX_THREADS,
    Backend,
    EngineSession,
    Session,
    choose,
    open_session,
)
from qsnn_ext.deploy.fileformat import load_program
from qsnn_ext.deploy.image import Image, build_image
from qsnn_ext.deploy.layout import MEMORY_LIMIT
from qsnn_ext.deploy.program import IntArray, Program
from qsnn_ext.deploy.reference import check_memory
from qsnn_ext.errors import InputError, InputTypeError

KEPT_SESSIONS = 2  # memory of finished calls that the next ones may use again

Answer = Any  # array, or arrays in the form that the model returned them in


class DeployedModel:
    """Calls a program like the model it came from.

    One object may be used from several threads at once: every call has its own membranes. The
    memory of the last calls is kept and used again by calls of as many samples.

    Args:
        program: A valid program.
        backend: ``"auto"``, ``"avx512"``, ``"avx2"``, ``"portable"`` or ``"numpy"``.
        threads: Threads that run at the same time: samples of a batch side by side, or the rows of
            every layer where there are fewer samples than threads.
        memory_limit: Bytes that the program may take for one sample: constants, membrane
            potentials, activations and the answers of a run. Whoever wrote a file chose how many
            it needs.

    Attributes:
        input_shape: Shape of one sample at one time step.
        output_ranks: Axes of every answer per sample and time step.

    Raises:
        ConfigError: If the backend is not available here, or a number is none.
        FormatError: If the program is not valid or needs more memory than the limit.
        InputTypeError: If ``program`` is none.
    """

    def __init__(
        self,
        program: Program,
        backend: Backend = "auto",
        threads: int = 1,
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        checks.program(program, "DeployedModel").validate()
        self.program = program
        self.backend: Any = choose(backend)
        self.threads = checks.count("threads", threads, MAX_THREADS)
        self.memory_limit = memory_limit
        self._image: Image | None = None
        self._idle: list[EngineSession] = []
        if self.backend == "numpy":
            check_memory(program, memory_limit)
        else:
            self._image = build_image(program, memory_limit=memory_limit)
        shape = program.values[0].shape
        self.input_shape = {1: shape[:1], 2: shape[::2], 3: shape}[program.input_rank]
        self.output_ranks = program.output_ranks
        self._batch_first = program.metadata.get("time") == "batch_first"
        self._prologue = program.prologue
        self._answer = program.answer

    def session(self, batch: int = 1) -> Session:
        """A run of its own, one time step at a time: step, reset, state, restore.

        Args:
            batch: Number of independent samples, at least 1.

        Raises:
            ConfigError: If the batch is no such number.
        """
        return open_session(
            self.program, batch, self.backend, self.threads, self._image, self.memory_limit
        )

    def _take(self, batch: int) -> Session:
        """A session at its beginning: one that an earlier call has left, if there is any."""
        for session in list(self._idle):
            try:
                if session.batch == batch:
                    self._idle.remove(session)
                    session.reset()
                    return session
            except ValueError:  # another thread took it
                continue
        return self.session(batch)

    def _leave(self, session: EngineSession) -> None:
        """Keep a session for the next call; the oldest one goes."""
        self._idle.append(session)
        while len(self._idle) > KEPT_SESSIONS:
            try:
                self._idle.pop(0)
            except IndexError:  # another thread took the last one
                return

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_idle": []}  # what runs cannot be copied

    def codes(self, x: Any) -> npt.NDArray[np.int32]:
        """Integer input codes ``[..., C, H, W]`` of real inputs: the last float there is.

        Args:
            x: Array or tensor ``[..., *input_shape]``; integers are taken to be codes already. Of
                a program whose model takes ``[N, T, ...]`` the codes are ``[T, N, ...]``.

        Warns:
            UserWarning: Values beyond the range of the codes, which are clipped; says how many.

        Raises:
            InputError: If the shape is wrong or a value is not finite.
            InputTypeError: If ``x`` holds neither real numbers nor integers.
        """
        x = checks.as_array(x)
        rank = len(self.input_shape)
        if x.ndim < rank or x.shape[x.ndim - rank :] != self.input_shape:
            raise InputError(
                f"input of shape {x.shape}; this program takes [..., {self.input_shape}]"
            )
        if self._batch_first and x.ndim == rank + 2:
            x = x.swapaxes(0, 1)
        lo, hi = self.program.input_range
        if np.issubdtype(x.dtype, np.floating):
            if not np.isfinite(x).all():
                raise InputError("the input contains NaN or infinity")
            x = x.astype(np.float64)
            with np.errstate(over="ignore"):  # a code saturates, whatever is too large
                if self._prologue is not None:
                    behind = (-1,) + (1,) * (rank - 1)
                    gain, bias = (c if c.size == 1 else c.reshape(behind) for c in self._prologue)
                    x = x * gain + bias
                x = np.rint(x / self.program.input_scale)
            self._say_clipped(x)
        elif not np.issubdtype(x.dtype, np.integer):
            raise InputTypeError(
                f"input of type {x.dtype}; it must be real numbers or integer codes: "
                'x.astype("float32") makes real numbers'
            )
        clipped = np.clip(x, lo, hi).astype(np.int32)
        codes: npt.NDArray[np.int32] = clipped.reshape(
            *x.shape[: x.ndim - rank], *self.program.values[0].shape
        )
        return codes

    def inputs(self, codes: IntArray) -> npt.NDArray[np.float64]:
        """The real inputs that ``codes`` stand for: :meth:`codes` backwards, but for the rounding.

        Args:
            codes: ``[..., C, H, W]``.
        """
        lead = codes.shape[: codes.ndim - 3]
        x: npt.NDArray[np.float64] = codes.astype(np.float64) * self.program.input_scale
        if self._prologue is not None:
            gain, bias = (c.reshape(-1, 1, 1) for c in self._prologue)
            x = (x - bias) / gain
        x = x.reshape(*lead, *self.input_shape)
        return x.swapaxes(0, 1) if self._batch_first and len(lead) == 2 else x

    def _say_clipped(self, codes: npt.NDArray[np.float64]) -> None:
        lo, hi = self.program.input_range
        outside = int(((codes < lo) | (codes > hi)).sum())
        if outside:
            scale = self.program.input_scale
            warnings.warn(
                f"{outside} of {codes.size} input values ({outside / codes.size:.3g} of them) lie "
                f"beyond the range of the input codes, {lo * scale:.4g} to {hi * scale:.4g}, and "
                "are clipped to it; lower the model with representative inputs, or calibrate it on "
                "them before",
                stacklevel=3,
            )

    def integers(self, x: Any) -> list[IntArray]:
        """Integer answers ``[T, N, C, H, W]`` of every output, before any scale.

        Args:
            x: ``[N, ...]``, shown ``program.timesteps`` times, or ``[T, N, ...]``, or
                ``[N, T, ...]`` if the model takes that.

        Raises:
            InputError: If the shape is wrong, a value is not finite, or there are no samples.
            InputTypeError: If ``x`` holds neither real numbers nor integers.
        """
        codes = self.codes(x)
        if codes.ndim not in (4, 5):
            raise InputError(
                f"input has {codes.ndim - 3} axes before {self.input_shape}; give [N, ...] or "
                "[T, N, ...]"
            )
        static = codes.ndim == 4
        steps = self.program.timesteps if static else codes.shape[0]
        batch = codes.shape[0] if static else codes.shape[1]
        if batch == 0 or steps == 0:
            raise InputError("the input is empty")
        session = self._take(batch)
        if isinstance(session, EngineSession):
            order = codes if static else codes.swapaxes(0, 1)
            order = np.ascontiguousarray(order)
            found = [r.swapaxes(0, 1) for r in session._run(order, steps)]
            self._leave(session)
            return found
        answers = [session.step(codes if static else codes[t]) for t in range(steps)]
        return [np.stack([a[i] for a in answers]) for i in range(len(self.program.outputs))]

    def __call__(self, x: Any) -> Answer:
        """Answer as the model did.

        Args:
            x: ``[N, ...]`` (shown at every step) or ``[T, N, ...]`` (``[N, T, ...]`` if the model
                takes that); real numbers or input codes.

        Returns:
            float32 array ``[T, N, ...]``; ``[N, ...]`` if the program sums or averages over time or
            is a single step. Several of them in the form that the model returned them in, tuple or
            dictionary. The values are integers times the scale of the output, after whatever the
            model does to its answer last (:mod:`qsnn_ext.deploy.answers`).

        Raises:
            FormatError: If a file's steps for the answer do not fit it.
        """
        p = self.program
        x = checks.as_array(x)
        single = p.metadata.get("time") == "step"
        flat = x.ndim == len(self.input_shape) + 1
        answers = []
        for raw, rank, index in zip(self.integers(x), self.output_ranks, p.outputs, strict=True):
            value = raw.astype(np.int64)
            scale = p.values[index].scale
            if p.reduction != "none":
                value = value.sum(axis=0)
                scale = scale / raw.shape[0] if p.reduction == "mean" else scale
            elif single and flat:
                value = value[0]
            c, h, w = value.shape[-3:]
            shape = {1: (c * h * w,), 2: (c, h * w), 3: (c, h, w)}.get(rank, (c, h, w))
            answers.append(value.reshape(*value.shape[:-3], *shape) * scale)
        chains, form = self._answer
        for place, chain in enumerate(chains):
            # A model called once per step does to a sequence what it does to each step.
            apart = chain and single and not flat and p.reduction == "none"
            x = answers[place]
            answers[place] = np.stack([apply(v, chain) for v in x]) if apart else apply(x, chain)
        return build(form, [a if a.dtype.kind == "i" else a.astype(np.float32) for a in answers])


def load(
    path: str | os.PathLike[str],
    backend: Backend = "auto",
    threads: int = 1,
    memory_limit: int = MEMORY_LIMIT,
) -> DeployedModel:
    """Read a ``.qsnn`` file.

    Args:
        path: The file.
        backend: What runs it; ``"auto"`` takes the fastest available.
        threads: Threads that run at the same time, as for :class:`DeployedModel`.
        memory_limit: Bytes that the program may take for one sample.

    Raises:
        FormatError: If the file is damaged, hostile, of an unknown version, or needs more memory
            than the limit.
        ConfigError: If the backend is not available here.
        InputTypeError: If ``path`` is none.
    """
    return DeployedModel(load_program(path), backend, threads, memory_limit)
