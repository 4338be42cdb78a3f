"""Runs programs with the compiled C engine, or with NumPy where no engine was built.

The library is loaded with :mod:`ctypes`, which releases the interpreter lock while C runs, so
sessions on different threads run side by side.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from qsnn_ext.deploy import checks
from qsnn_ext.deploy.image import Image, build_image
from qsnn_ext.deploy.layout import MEMORY_LIMIT, StateSlot
from qsnn_ext.deploy.program import IntArray, Program, words
from qsnn_ext.deploy.records import LAYOUT
from qsnn_ext.deploy.reference import ReferenceSession, check_memory
from qsnn_ext.errors import ConfigError, StateError

Backend: TypeAlias = Literal["auto", "portable", "avx2", "avx512", "numpy"]
PATHS = {"portable": 0, "avx2": 1, "avx512": 2}
MAX_THREADS = 1024


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled engine, or None where this installation has none.

    Raises:
        StateError: If it was compiled from other sources than these: it would misread every image.
    """
    suffix = {"Windows": "dll", "Darwin": "dylib"}.get(platform.system(), "so")
    path = Path(__file__).with_name(f"_qsnn.{suffix}")
    try:
        lib = ctypes.CDLL(str(path))
    except OSError:
        return None
    if getattr(lib, "qsnn_layout", lambda: None)() != LAYOUT:
        raise StateError(
            f"the compiled engine {path} belongs to another version of qsnn_ext; install the "
            "package again, or run python hatch_build.py in its source tree"
        )
    i32, i64, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
    lib.qsnn_supports.argtypes, lib.qsnn_supports.restype = [i32], i32
    lib.qsnn_reset_dispatch.argtypes = [pointer, pointer]
    lib.qsnn_reset_dispatch.restype = None
    arguments: list[Any] = [
        i32,
        pointer,
        pointer,
        i64,
        pointer,
        pointer,
        i64,
        i32,
        i32,
        i32,
        pointer,
        i64,
    ]
    lib.qsnn_run_dispatch.argtypes = arguments
    lib.qsnn_run_dispatch.restype = None
    lib.qsnn_run_shared.argtypes = [*arguments, i32, pointer]
    lib.qsnn_run_shared.restype = None
    lib.qsnn_shares.argtypes, lib.qsnn_shares.restype = [], i32
    return lib


def backends() -> list[str]:
    """Names of what can run programs here, fastest first; always ends with ``"numpy"``."""
    lib = library()
    found = []
    if lib is not None:
        found = [name for name, k in PATHS.items() if lib.qsnn_supports(k)][::-1]
    return [*found, "numpy"]


def choose(backend: Backend) -> str:
    """Resolve ``"auto"`` and check that a backend is available.

    Raises:
        ConfigError: If the backend is unknown or cannot run here.
    """
    have = backends()
    if backend != "auto":
        _check_available(backend, have)
        return backend
    if have[0] == "numpy":
        warnings.warn(
            "qsnn_ext was installed without its compiled engine, so the slow NumPy reference "
            "answers; reinstall it where a C compiler is available",
            RuntimeWarning,
            stacklevel=3,
        )
    return have[0]


def _check_available(backend: str, have: list[str]) -> None:
    if backend not in have:
        raise ConfigError(f"backend {backend!r} is not available here; choose one of {have}")


def _aligned(count: int) -> npt.NDArray[np.uint32]:
    """Zeroed words that start at a cache line."""
    raw = np.zeros(count + 16, np.uint32)
    start = (-raw.ctypes.data // 4) % 16
    return raw[start : start + count]


def _pack_state(array: IntArray, slot: StateSlot) -> npt.NDArray[np.uint32]:
    """State words ``[C, H, W]`` in the layout of the engine."""
    c, h, w = slot.shape
    flat = np.ascontiguousarray(array.reshape(c, h * w).T).astype(np.int32)
    if slot.state_bits == 32:
        wide = np.zeros((h * w, slot.pitch), np.int32)
        wide[:, :c] = flat
        return wide.reshape(-1).view(np.uint32)
    planes = (flat[:, None, :] >> np.arange(slot.state_bits)[:, None]) & 1
    padded = np.zeros((*planes.shape[:2], words(c) * 32), np.uint8)
    padded[:, :, :c] = planes
    packed = np.packbits(padded, axis=-1, bitorder="little")
    return packed.view("<u4").astype(np.uint32).reshape(-1)


def _unpack_state(area: npt.NDArray[np.uint32], slot: StateSlot) -> npt.NDArray[np.int32]:
    """Inverse of :func:`_pack_state`."""
    c, h, w = slot.shape
    if slot.state_bits == 32:
        wide = area[slot.offset : slot.offset + h * w * slot.pitch].view(np.int32)
        flat = wide.reshape(h * w, slot.pitch)[:, :c]
    else:
        size = h * w * slot.state_bits * words(c)
        packed = area[slot.offset : slot.offset + size].astype("<u4").view(np.uint8)
        bits = np.unpackbits(packed, bitorder="little")
        bits = bits.reshape(h * w, slot.state_bits, words(c) * 32)[:, :, :c]
        flat = (bits.astype(np.int32) << np.arange(slot.state_bits)[:, None]).sum(axis=1)
    return np.ascontiguousarray(flat.T.astype(np.int32)).reshape(c, h, w)


class EngineSession:
    """A program in execution by the C engine; the interface of ``ReferenceSession``.

    Args:
        program: A valid program.
        batch: Number of independent samples, at least 1.
        backend: ``"portable"``, ``"avx2"`` or ``"avx512"``.
        threads: Threads that run at the same time: samples side by side, or the rows of every layer
            where there are fewer samples than threads.
        image: The program's image, if it was built before.
        memory_limit: Bytes that the program may take for one sample.

    Raises:
        ConfigError: If the backend is unknown or this processor cannot run it, or a number is none.
        FormatError: If the program is not valid or needs more memory than the limit.
        StateError: If the installation has no compiled engine.
    """

    def __init__(
        self,
        program: Program,
        batch: int = 1,
        backend: str = "portable",
        threads: int = 1,
        image: Image | None = None,
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        lib = library()
        if lib is None:
            raise StateError("the compiled engine is missing; use backend='numpy'")
        _check_available(backend, backends()[:-1])  # the last is NumPy
        self._lib = lib
        self.program = program
        self.batch = checks.count("batch", batch)
        self._path = PATHS[backend]
        threads = checks.count("threads", threads, MAX_THREADS)
        self.image = image if image is not None else build_image(program, memory_limit=memory_limit)
        # Samples side by side need nothing of each other; workers on one sample meet after every
        # layer, so they are for what has too few samples.
        shared = threads > batch and lib.qsnn_shares()
        self._workers = threads if shared else 1
        self._lanes = 1 if shared else min(threads, batch)
        self._executor: ThreadPoolExecutor | None = None
        pitch = -(-self.image.state_words // 16) * 16
        self._states = _aligned(batch * pitch).reshape(batch, pitch)
        arena = self.image.arena_words + (self._workers - 1) * self.image.workspace_words
        self._arenas = [_aligned(arena) for _ in range(self._lanes)]
        self._shapes = [program.values[i].shape for i in program.outputs]
        self.reset()

    def reset(self) -> None:
        """Put every neuron into its initial state."""
        image = self.image.words.ctypes.data
        for row in self._states:
            self._lib.qsnn_reset_dispatch(image, row.ctypes.data)

    def state(self) -> dict[str, IntArray]:
        """A copy of all states: name of neuron -> int32 ``[N, C, H, W]`` of state words."""
        return {
            slot.name: np.stack([_unpack_state(row, slot) for row in self._states])
            for slot in self.image.slots
        }

    def restore(self, state: dict[str, IntArray]) -> None:
        """Continue from what :meth:`state` returned.

        Raises:
            InputError: If it is the state of another program or batch; nothing is changed then.
            InputTypeError: If it is no dictionary of integer arrays.
        """
        words = checks.states(self.program, self.batch, state)
        for slot in self.image.slots:
            for row, array in zip(self._states, words[slot.name], strict=True):
                packed = _pack_state(array, slot)
                row[slot.offset : slot.offset + packed.size] = packed

    def run(self, codes: IntArray, steps: int, static: bool) -> list[IntArray]:
        """Run several time steps.

        Args:
            codes: Integers ``[N, C, H, W]`` shown at every step (``static``), or
                ``[N, T, C, H, W]``.
            steps: Number of time steps.
            static: Whether the same input is shown at every step.

        Returns:
            One int32 array ``[N, T, C, H, W]`` per output of the program.

        Raises:
            ConfigError: If ``steps`` is no whole number of at least 1.
            InputError: If the shape is another, or a code is out of range.
            InputTypeError: If they are real numbers: ``net.codes(frame)`` makes codes of them.
        """
        steps = checks.count("steps", steps)
        return self._run(checks.run_codes(self.program, self.batch, codes, steps, static), steps)

    def step(self, codes: IntArray) -> list[IntArray]:
        """Run one time step: ``[N, C, H, W]`` codes in, one int32 array per output.

        Raises:
            InputError: If the shape is another, or a code is out of range.
            InputTypeError: If they are real numbers: ``net.codes(frame)`` makes codes of them.
        """
        codes = checks.step_codes(self.program, self.batch, codes)
        return [r[:, 0] for r in self._run(codes, 1)]

    def _run(self, codes: npt.NDArray[np.int32], steps: int) -> list[IntArray]:
        """``run`` of codes that were checked: ``[N, C, H, W]`` or ``[N, T, C, H, W]``."""
        static = codes.ndim == 4
        per_step = self.program.values[0].elements
        size = sum(c * h * w for c, h, w in self._shapes)
        out = np.empty((self.batch, steps, size), np.int32)
        image, pitch = self.image.words.ctypes.data, self._states.shape[1]
        meeting = np.array([0, 0, self._workers], np.int32)

        def work(worker: int) -> None:
            lane = 0 if self._workers > 1 else worker
            first = self.batch * lane // self._lanes
            last = self.batch * (lane + 1) // self._lanes
            arguments = (
                self._path, image, self._states[first:].ctypes.data, pitch,
                self._arenas[lane].ctypes.data, codes[first:].ctypes.data,
                per_step * (1 if static else steps), last - first, steps,
                0 if static else per_step, out[first:].ctypes.data, steps * size,
            )  # fmt: skip
            if self._workers > 1:
                self._lib.qsnn_run_shared(*arguments, worker, meeting.ctypes.data)
            else:
                self._lib.qsnn_run_dispatch(*arguments)

        self._all(work, max(self._workers, self._lanes))
        results, at = [], 0
        for c, h, w in self._shapes:
            part = out[:, :, at : at + c * h * w]
            results.append(part.reshape(self.batch, steps, c, h, w))
            at += c * h * w
        return results

    def _all(self, work: Callable[[int], None], count: int) -> None:
        """Call ``work`` on as many threads as there are workers, this one among them.

        The threads are this session's own: workers wait for each other, so none may stand in a
        queue behind another session's.
        """
        if count == 1:
            work(0)
            return
        if self._executor is None:
            self._executor = ThreadPoolExecutor(count - 1, "qsnn")
        others = [self._executor.submit(work, k) for k in range(1, count)]
        work(0)
        for other in others:
            other.result()


Session: TypeAlias = EngineSession | ReferenceSession


def open_session(
    program: Program,
    batch: int = 1,
    backend: Backend = "auto",
    threads: int = 1,
    image: Image | None = None,
    memory_limit: int = MEMORY_LIMIT,
) -> Session:
    """Start executing a program, one time step at a time.

    Args:
        program: A valid program.
        batch: Number of independent samples, at least 1.
        backend: ``"auto"``: the fastest available.
        threads: Threads that run at the same time (engine only).
        image: The program's image, if it was built before.
        memory_limit: Bytes that the program may take for one sample.

    Raises:
        ConfigError: If the backend is unknown or cannot run here, or a number is none.
        FormatError: If the program is not valid or needs more memory than the limit.
    """
    name = choose(backend)
    checks.count("threads", threads, MAX_THREADS)
    if name == "numpy":
        check_memory(program, memory_limit)
        return ReferenceSession(program, batch)
    return EngineSession(program, batch, name, threads, image, memory_limit)
