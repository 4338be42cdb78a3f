"""The kernels in C (``kernels/native/``) as functions of tensors.

A shared library is compiled when the package is built; nothing is compiled at run time. Its loops
are built for several instruction sets, of which the best that the processor has is taken, and it
runs on the threads of PyTorch, found in the OpenMP library that PyTorch has loaded.

Tensors are taken as they lie in memory, whatever the order of their dimensions: the neurons of a
step must be dense, and in the same order in all tensors. What is not is copied first.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import warnings
from collections.abc import Container
from pathlib import Path

import torch
from torch import Tensor

from qsnn_ext import functional as F
from qsnn_ext.errors import InputError
from qsnn_ext.kernels import backend as B
from qsnn_ext.kernels import buffers
from qsnn_ext.kernels.grid import compute_dtype
from qsnn_ext.kernels.options import LIFOptions

_SUFFIX = {"Windows": "dll", "Darwin": "dylib"}.get(platform.system(), "so")
PATH = Path(__file__).parent / f"_kernels.{_SUFFIX}"

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_ALPHAS = {"dynamic": 0, "running": 1, "given": 2}
_RESETS = {"hard": 0, "soft": 1, "none": 2}
_SURROGATES = (
    "triangle", "piecewise_quadratic", "piecewise_exp", "sigmoid", "soft_sign", "super_spike",
    "atan", "erf", "rect", "fast_sigmoid", "straight_through", "slope_above", "slope_from",
    "rate_escape",
)  # fmt: skip
_STANDARDIZE = {"none": 0, "layer": 1, "channel": 2}
_SCALE = {"mean": 0, "power_of_two": 1, "none": 2}
_GRADIENT = {"clipped": 0, "identity": 1, "annealed": 2}

#: Values, neurons times steps, that are worth a thread of their own.
PER_THREAD = 1 << 15


class _LIFJob(ctypes.Structure):
    """``lif_job`` of ``native.h``."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in (
            "surrogate", "strict", "levels", "absmax", "alpha_mode", "squash", "quantize_first",
            "reset", "detach", "delayed", "saved_charge",
        )],
        *[(name, ctypes.c_double) for name in ("a", "b", "momentum", "v_reset")],
        *[(name, ctypes.c_int64) for name in ("dtype", "steps", "neurons")],
        *[(name, ctypes.c_void_p) for name in (
            "x", "v", "params", "alpha", "spikes", "last", "charges", "work", "alphas", "counts",
            "g_spikes", "g_v", "g_x", "g_v0", "g_params",
        )],
    ]  # fmt: skip


class _WeightJob(ctypes.Structure):
    """``weight_job`` of ``native.h``."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in (
            "standardize", "scale", "gradient", "dtype", "rows", "columns",
        )],
        ("temperature", ctypes.c_double),
        *[(name, ctypes.c_void_p) for name in ("w", "g", "mean", "std", "alpha", "out")],
    ]  # fmt: skip


_LAYOUT = ctypes.sizeof(_LIFJob) * 1000 + ctypes.sizeof(_WeightJob)


class Library:
    """The compiled kernels, for the best instruction set this processor has.

    Attributes:
        isa: 0 portable, 1 AVX2, 2 AVX-512.
    """

    def __init__(self, path: Path) -> None:
        """Load it.

        Raises:
            OSError: there is none, or not for this machine.
            AttributeError: it is of another version.
        """
        self._library = ctypes.CDLL(str(path))
        if self._library.qsnn_native_layout() != _LAYOUT:
            raise AttributeError("another layout of jobs")
        self.isa = max(isa for isa in range(3) if self._library.qsnn_native_supports(isa))
        self.threaded = self._use_threads_of_torch()
        if hasattr(os, "register_at_fork"):  # not on Windows
            # A forked process has the locks of its parent's threads but not the threads.
            os.register_at_fork(after_in_child=self._stay_alone)

    def _use_threads_of_torch(self) -> bool:
        names = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")
        try:
            # Looks in the libraries it depends on too.
            torch_cpu = ctypes.CDLL(_torch_library())
            entries = [ctypes.cast(getattr(torch_cpu, name), ctypes.c_void_p) for name in names]
        except (OSError, AttributeError):
            return False
        self._library.qsnn_native_threads(*entries)
        return True

    def _stay_alone(self) -> None:
        self.threaded = False

    def run(self, name: str, job: ctypes.Structure, values: int) -> None:
        """Run a kernel.

        Args:
            name: of the operation, without ``qsnn_native_``.
            job: what it works on.
            values: how many; decides the number of threads.

        Raises:
            MemoryError: no memory for its buffers.
        """
        threads = 1
        if self.threaded and values >= 2 * PER_THREAD:
            threads = min(torch.get_num_threads(), values // PER_THREAD)
        if getattr(self._library, f"qsnn_native_{name}")(self.isa, ctypes.byref(job), threads):
            raise MemoryError(f"no memory for the buffers of {name} on {threads} threads")


def _torch_library() -> str:
    name = {"Windows": "torch_cpu.dll", "Darwin": "libtorch_cpu.dylib"}
    folder = Path(torch.__file__).parent / "lib"
    return str(folder / name.get(platform.system(), "libtorch_cpu.so"))


@functools.cache
def library() -> Library | None:
    """The compiled kernels; ``None`` where the package was built without a C compiler."""
    try:
        return Library(PATH)
    except OSError:
        return None
    except AttributeError as error:
        warnings.warn(
            f"{PATH.name} is of another version of qsnn_ext ({error}) and is not used; install the "
            "package again, or run python hatch_build.py in its source tree.",
            stacklevel=2,
        )
        return None


def wanted(x: Tensor, dtypes: Container[torch.dtype] = DTYPES) -> Library | None:
    """The compiled kernels where they shall compute with tensors like this one, else ``None``.

    They do on the CPU, where :func:`qsnn_ext.kernels.use_backend` has not chosen others.
    """
    known = x.device.type == "cpu" and x.dtype in dtypes and x.numel() > 0
    return library() if known and B.current_backend() in ("auto", "native") else None


# --------------------------------------------------------------------------- memory


@functools.lru_cache(maxsize=1024)
def _dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether steps follow each other in memory and the neurons of each are dense."""
    expected = 1
    for size, step in sorted(zip(shape[1:], stride[1:], strict=True), key=lambda p: (p[1], p[0])):
        if size != 1 and step != expected:
            return False
        expected *= size
    return shape[0] == 1 or stride[0] == expected


def _sequence(x: Tensor) -> Tensor:
    return x if x.is_contiguous() or _dense(x.shape, x.stride()) else x.contiguous()


def _as(like: Tensor, x: Tensor | None) -> Tensor | None:
    """``x`` with shape, dtype and memory order of ``like``."""
    if x is None:
        return None
    if x.dtype == like.dtype and x.shape == like.shape and x.stride() == like.stride():
        return x
    return torch.empty_like(like).copy_(x)


def _numbers(x: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """``count`` numbers (or more) of a dtype in a row.

    Raises:
        InputError: fewer.
    """
    if x.numel() < count:
        raise InputError(f"{count} numbers are needed, got a tensor of shape {tuple(x.shape)}.")
    return x.to(dtype).contiguous()


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


# --------------------------------------------------------------------------- the recurrence


@functools.lru_cache(maxsize=1024)
def _template(o: LIFOptions) -> _LIFJob:
    s = o.surrogate
    return _LIFJob(
        surrogate=_SURROGATES.index(s.kind),
        a=s.a,
        b=s.b,
        strict=s.strict,
        levels=F.levels(o.bits) if o.bits else 0,
        absmax=o.scale == "absmax",
        alpha_mode=_ALPHAS[o.alpha],
        momentum=o.momentum,
        squash=bool(o.squash),
        quantize_first=o.order == "quantize_first",
        reset=_RESETS[o.reset or "none"],
        v_reset=o.v_reset,
        detach=o.detach_reset,
        delayed=o.delayed,
        saved_charge=o.save == "charge",
    )


def _job(o: LIFOptions, x: Tensor) -> _LIFJob:
    job = _LIFJob.from_buffer_copy(_template(o))
    job.dtype = DTYPES[x.dtype]
    job.steps = x.shape[0]
    job.neurons = x.numel() // x.shape[0]
    job.x = x.data_ptr()
    return job


def lif_forward(
    lib: Library,
    o: LIFOptions,
    x: Tensor,
    v: Tensor | None,
    params: Tensor,
    alpha: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Forward of :func:`qsnn_ext.kernels.lif_multi_step`.

    Args:
        lib: the compiled kernels.
        o: the layer's :class:`~qsnn_ext.kernels.LIFOptions`.
        x: input ``[T, N, ...]``, not empty.
        v: state before the first step ``[N, ...]``; ``None`` is zero.
        params: decay, gain, offset, threshold ``[4]``.
        alpha: 0-dim scale, for ``"given"`` and ``"running"``.

    Returns:
        Spikes ``[T, N, ...]``; state after the last step; scales ``[T + 1]``, the last of them the
        running one; spikes of each step ``[T]``; charges, empty but with ``save="charge"``.
    """
    x = _sequence(x)
    job = _job(o, x)
    last, spikes = buffers.empty_like(x[0]), buffers.empty_like(x)
    # Said in full: a default device or dtype of the caller's must not change what C writes to.
    counts = torch.empty(job.steps, dtype=torch.float32, device="cpu")
    dtype = compute_dtype(x)
    params = _numbers(params, dtype, 4)
    alpha = None if alpha is None else _numbers(alpha, dtype, 1)
    alphas = params.new_empty(job.steps + 1)
    keeps = o.save == "charge"
    charges = buffers.empty_like(x, dtype) if keeps else x.new_empty(0)
    # Between two passes the charges of a step lie where the state will.
    work = last if dtype == x.dtype else params.new_empty(job.neurons)
    v = _as(x[0], v)
    job.v, job.params, job.alpha = _pointer(v), params.data_ptr(), _pointer(alpha)
    job.spikes, job.last, job.counts = spikes.data_ptr(), last.data_ptr(), counts.data_ptr()
    job.work, job.alphas = work.data_ptr(), alphas.data_ptr()
    job.charges = charges.data_ptr() if keeps else None
    lib.run("lif_forward", job, x.numel())
    return spikes, last, alphas, counts, charges


def lif_backward(
    lib: Library,
    o: LIFOptions,
    g_spikes: Tensor | None,
    g_v: Tensor | None,
    g_counts: Tensor | None,
    saved: Tensor,
    v: Tensor | None,
    params: Tensor,
    alphas: Tensor,
    need_v: bool,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Its backward.

    Args:
        lib: the compiled kernels.
        o: the layer's options; ``save`` says what ``saved`` is.
        g_spikes: gradient of the spikes ``[T, N, ...]``.
        g_v: gradient of the last state ``[N, ...]``.
        g_counts: gradient of the counts ``[T]``.
        saved: the input, or the charges ``[T, N, ...]``, not empty.
        v: state before the first step; with saved charges it is needed for the gradients of params,
            and for those of a delayed hard reset.
        params: decay, gain, offset, threshold ``[4]``.
        alphas: scale of each step ``[T + 1]``.
        need_v: whether the gradient of the first state is wanted.
        need_params: whether that of ``params`` is; that of the gain needs the saved input.

    Returns:
        Gradients of input, first state (empty unless wanted) and params.
    """
    saved = _sequence(saved)
    job = _job(o, saved)
    dtype = compute_dtype(saved)
    g_x = buffers.empty_like(saved)
    g_v0 = buffers.empty_like(saved[0]) if need_v else saved.new_empty(0)
    given, params = params.dtype, _numbers(params, dtype, 4)
    g_params = torch.zeros_like(params)
    g_spikes, g_v, v = _as(saved, g_spikes), _as(saved[0], g_v), _as(saved[0], v)
    alphas = _numbers(alphas, dtype, job.steps)
    g_counts = None if g_counts is None else _numbers(g_counts, torch.float32, job.steps)
    job.v, job.params, job.alphas = _pointer(v), params.data_ptr(), alphas.data_ptr()
    job.g_spikes, job.g_v, job.counts = _pointer(g_spikes), _pointer(g_v), _pointer(g_counts)
    job.g_x, job.g_v0 = g_x.data_ptr(), g_v0.data_ptr() if need_v else None
    job.g_params = g_params.data_ptr() if need_params else None
    lib.run("lif_backward", job, saved.numel())
    return g_x, g_v0, g_params.to(given)


# --------------------------------------------------------------------------- binary weights


def weight_forward(
    lib: Library, w: Tensor, standardize: str, scale: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Binary weights of one layer, see :mod:`qsnn_ext.kernels.weights`.

    Args:
        lib: the compiled kernels.
        w: latent weights ``[C, K]``, float32 or float64, not empty.
        standardize: ``"layer"``, ``"channel"`` or ``"none"``.
        scale: ``"mean"``, ``"power_of_two"`` or ``"none"``.

    Returns:
        ``alpha * sign(What)`` ``[C, K]``; mean and deviation of the groups ``[G, 1]``; alpha
        ``[C, 1]``.
    """
    w = w.contiguous()
    rows, columns = w.shape
    groups = rows if standardize == "channel" else 1
    value, alpha = torch.empty_like(w), w.new_empty(rows, 1)
    mean, std = w.new_empty(groups, 1), w.new_empty(groups, 1)
    job = _WeightJob(
        standardize=_STANDARDIZE[standardize], scale=_SCALE[scale], dtype=DTYPES[w.dtype],
        rows=rows, columns=columns, w=w.data_ptr(), mean=mean.data_ptr(), std=std.data_ptr(),
        alpha=alpha.data_ptr(), out=value.data_ptr(),
    )  # fmt: skip
    lib.run("weight_forward", job, w.numel())
    return value, mean, std, alpha


def weight_backward(
    lib: Library,
    g: Tensor,
    w: Tensor,
    mean: Tensor,
    std: Tensor,
    alpha: Tensor,
    temperature: float,
    standardize: str,
    gradient: str,
) -> Tensor:
    """Gradient of the latent weights ``[C, K]``.

    Args:
        lib: the compiled kernels.
        g: gradient of the binary weights ``[C, K]``.
        w: latent weights ``[C, K]``.
        mean: of the groups.
        std: of the groups.
        alpha: scales ``[C, 1]``.
        temperature: for the annealed gradient.
        standardize: as in the forward.
        gradient: ``"clipped"``, ``"identity"`` or ``"annealed"``.
    """
    w = w.contiguous()
    rows, columns = w.shape
    groups = rows if standardize == "channel" else 1
    g = _numbers(g, w.dtype, w.numel())
    mean, std = (_numbers(t, w.dtype, groups) for t in (mean, std))
    alpha = _numbers(alpha, w.dtype, rows)
    out = torch.empty_like(w)
    job = _WeightJob(
        standardize=_STANDARDIZE[standardize], gradient=_GRADIENT[gradient], dtype=DTYPES[w.dtype],
        rows=rows, columns=columns, temperature=temperature, w=w.data_ptr(), g=g.data_ptr(),
        mean=mean.data_ptr(), std=std.data_ptr(), alpha=alpha.data_ptr(), out=out.data_ptr(),
    )  # fmt: skip
    lib.run("weight_backward", job, w.numel())
    return out
