"""Runs programs with the compiled C engine, or with NumPy where no engine was built.

The library is loaded with :mod:`ctypes`, which releases the interpreter lock while C runs, so
sessions on different threads run side by side.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from qsnn_ext.deploy.image import Image, StateSlot, build_image
from qsnn_ext.deploy.program import IntArray, Program, words
from qsnn_ext.deploy.reference import ReferenceSession, check_codes, check_state
from qsnn_ext.errors import ConfigError, StateError

Backend: TypeAlias = Literal["auto", "portable", "avx2", "avx512", "numpy"]
PATHS = {"portable": 0, "avx2": 1, "avx512": 2}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled engine, or None where this installation has none."""
    suffix = {"Windows": "dll", "Darwin": "dylib"}.get(platform.system(), "so")
    path = Path(__file__).with_name(f"_qsnn.{suffix}")
    try:
        lib = ctypes.CDLL(str(path))
    except OSError:
        return None
    i32, i64, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
    lib.qsnn_supports.argtypes, lib.qsnn_supports.restype = [i32], i32
    lib.qsnn_reset_dispatch.argtypes = [pointer, pointer]
    lib.qsnn_reset_dispatch.restype = None
    lib.qsnn_run_dispatch.argtypes = [
        i32, pointer, pointer, i64, pointer, pointer, i64, i32, i32, i32, pointer, i64,
    ]  # fmt: skip
    lib.qsnn_run_dispatch.restype = None
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
        return flat.reshape(-1).view(np.uint32)
    planes = (flat[:, None, :] >> np.arange(slot.state_bits)[:, None]) & 1
    padded = np.zeros((*planes.shape[:2], words(c) * 32), np.uint8)
    padded[:, :, :c] = planes
    packed = np.packbits(padded, axis=-1, bitorder="little")
    return packed.view("<u4").astype(np.uint32).reshape(-1)


def _unpack_state(area: npt.NDArray[np.uint32], slot: StateSlot) -> npt.NDArray[np.int32]:
    """Inverse of :func:`_pack_state`."""
    c, h, w = slot.shape
    if slot.state_bits == 32:
        flat = area[slot.offset : slot.offset + h * w * c].view(np.int32).reshape(h * w, c)
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
        batch: Number of independent samples.
        backend: ``"portable"``, ``"avx2"`` or ``"avx512"``.
        threads: Samples that run at the same time.
        image: The program's image, if it was built before.

    Raises:
        ConfigError: If the backend is unknown or this processor cannot run it.
        StateError: If the installation has no compiled engine.
    """

    def __init__(
        self,
        program: Program,
        batch: int = 1,
        backend: str = "portable",
        threads: int = 1,
        image: Image | None = None,
    ) -> None:
        lib = library()
        if lib is None:
            raise StateError("the compiled engine is missing; use backend='numpy'")
        _check_available(backend, backends()[:-1])  # the last is NumPy
        self._lib = lib
        self.program = program
        self.batch = batch
        self.image = image if image is not None else build_image(program)
        self._path = PATHS[backend]
        self._threads = max(1, min(threads, batch))
        pitch = -(-self.image.state_words // 16) * 16
        self._states = _aligned(batch * pitch).reshape(batch, pitch)
        self._arenas = [_aligned(self.image.arena_words) for _ in range(self._threads)]
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
        """
        check_state(self.program, self.batch, state)
        for slot in self.image.slots:
            for row, array in zip(self._states, state[slot.name], strict=True):
                packed = _pack_state(array, slot)
                row[slot.offset : slot.offset + packed.size] = packed

    def run(self, codes: npt.NDArray[np.int32], steps: int, static: bool) -> list[IntArray]:
        """Run several time steps.

        Args:
            codes: int32 ``[N, C, H, W]`` shown at every step (``static``), or ``[N, T, C, H, W]``.
            steps: Number of time steps.
            static: Whether the same input is shown at every step.

        Returns:
            One int32 array ``[N, T, C, H, W]`` per output of the program.
        """
        codes = np.ascontiguousarray(codes, np.int32)
        per_step = self.program.values[0].elements
        size = sum(c * h * w for c, h, w in self._shapes)
        out = np.empty((self.batch, steps, size), np.int32)
        image, words_ = self.image.words.ctypes.data, self._states.shape[1]

        def work(worker: int) -> None:
            first = self.batch * worker // self._threads
            last = self.batch * (worker + 1) // self._threads
            if first == last:
                return
            self._lib.qsnn_run_dispatch(
                self._path, image, self._states[first:].ctypes.data, words_,
                self._arenas[worker].ctypes.data, codes[first:].ctypes.data,
                per_step * (1 if static else steps), last - first, steps,
                0 if static else per_step, out[first:].ctypes.data, steps * size,
            )  # fmt: skip

        if self._threads == 1:
            work(0)
        else:
            with ThreadPoolExecutor(self._threads) as executor:
                list(executor.map(work, range(self._threads)))
        results, at = [], 0
        for c, h, w in self._shapes:
            part = out[:, :, at : at + c * h * w]
            results.append(part.reshape(self.batch, steps, c, h, w))
            at += c * h * w
        return results

    def step(self, codes: IntArray) -> list[IntArray]:
        """Run one time step: ``[N, C, H, W]`` codes in, one int32 array per output.

        Raises:
            InputError: If the shape is another.
        """
        check_codes(self.program, self.batch, codes)
        return [r[:, 0] for r in self.run(np.asarray(codes, np.int32), 1, static=True)]


Session: TypeAlias = EngineSession | ReferenceSession


def open_session(
    program: Program,
    batch: int = 1,
    backend: Backend = "auto",
    threads: int = 1,
    image: Image | None = None,
) -> Session:
    """Start executing a program, one time step at a time.

    Args:
        program: A valid program.
        batch: Number of independent samples.
        backend: ``"auto"``: the fastest available.
        threads: Samples that run at the same time (engine only).
        image: The program's image, if it was built before.

    Raises:
        ConfigError: If the backend is unknown or cannot run here.
    """
    name = choose(backend)
    if name == "numpy":
        return ReferenceSession(program, batch)
    return EngineSession(program, batch, name, threads, image)
