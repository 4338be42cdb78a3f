"""Which implementation of a kernel runs, and the cache of compiled cores.

A core is a function of plain tensors that knows its options as constants. ``torch.compile`` turns
it into C++ on the CPU and Triton on the GPU; where there is no compiler the same function runs as
it stands. One core serves every layer with the same options: the number of neurons is a symbol of
the compiled code, so layers and batches of different size share it.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import time
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from qsnn_ext.errors import ConfigError

#: ``"auto"``, ``"eager"`` or a name in the registry of :mod:`qsnn_ext.kernels.backends`.
Backend = str

_log = logging.getLogger(__name__)
_chosen: contextvars.ContextVar[Backend] = contextvars.ContextVar("backend", default="auto")
# Why compilation failed in this process; None as long as it has not.
_broken: str | None = None

#: From this many values on ``"auto"`` compiles; below it nothing is won that pays for compiling.
COMPILE_FROM = 1 << 15
#: From this many neurons on a core is compiled with parallel loops.
PARALLEL_FROM = 1 << 13
#: Up to this many time steps ``"auto"`` compiles: a core is unrolled over time, and the time that
#: compiling takes grows with it.
LONGEST = 16


def check_backend(name: object) -> Backend:
    """The name of a backend, checked.

    Raises:
        ConfigError: unknown name, or one that cannot run here at all.
    """
    from qsnn_ext.kernels import backends  # which import this file

    names = ("auto", *backends.BACKENDS, *backends.ON_REQUEST, "eager")
    if not isinstance(name, str) or name not in names:
        raise ConfigError(f"kernel backend {name!r} is unknown; choose one of {', '.join(names)}.")
    missing = backends.missing(name)
    if missing is not None:
        raise ConfigError(missing)
    return name


@contextlib.contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Force how kernels run inside a ``with`` block, for this thread or task.

    Args:
        name: ``"auto"`` (the first of the following that covers the layer and pays),
            ``"native"`` (C, on the CPU), ``"triton"`` (written in Triton, on an NVIDIA GPU),
            ``"compiled"`` (an error of the compiler is raised),
            ``"function"`` (plain tensor operations) or ``"eager"`` (the reference loop in plain
            autograd), or one of :data:`qsnn_ext.kernels.backends.ON_REQUEST`. What a backend does
            not cover, ``"function"`` runs.

    Raises:
        ConfigError: unknown name, ``"native"`` where the package was built without a compiler, or
            ``"triton"`` where there is no Triton or no GPU for it.
    """
    token = _chosen.set(check_backend(name))
    try:
        yield
    finally:
        _chosen.reset(token)


def current_backend() -> Backend:
    """What :func:`use_backend` has chosen; ``"auto"`` outside of it."""
    if torch.compiler.is_compiling():
        # Inside an outer torch.compile the choice is made when the compiled program runs.
        return "auto"
    return _chosen.get()


def compiles(work: int, steps: int = 1) -> bool:
    """Whether a kernel over ``work`` values runs compiled, as far as is known before trying.

    Args:
        work: size of its largest argument.
        steps: how many time steps it runs.
    """
    backend = _chosen.get()
    pays = _broken is None and work >= COMPILE_FROM and steps <= LONGEST
    return backend == "compiled" or (backend == "auto" and pays)


class Core:
    """One core: ``fn`` compiled on first call, or run as it stands.

    Args:
        name: what it computes, for the line that says so while it is compiled.
        fn: pure function of tensors.
        dynamic_dims: per argument, how many of its last dimensions are symbols of the code.
        steps: how many time steps it runs.
    """

    def __init__(
        self,
        name: str,
        fn: Callable[..., Any],
        dynamic_dims: tuple[int, ...],
        steps: int = 1,
    ) -> None:
        self._name = name
        self._fn = fn
        self._steps = steps
        self._dynamic_dims = dynamic_dims
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Tensor | None) -> Any:
        """Run on ``args``: tensors, or ``None`` where the core has no use for one."""
        global _broken
        if not compiles(max(a.numel() for a in args if a is not None), self._steps):
            return self._fn(*args)
        # Tensors that are no views: the compiler ties its code to the shape of a view's base too.
        args = tuple(None if a is None else a.data for a in args)
        if self._compiled is not None:
            return self._compiled(*args)
        for tensor, count in zip(args, self._dynamic_dims, strict=True):
            if tensor is not None:
                for dim in range(tensor.dim() - count, tensor.dim()):
                    if tensor.shape[dim] < 2:  # 0 and 1 are always compiled as constants
                        return self._fn(*args)
                    torch._dynamo.mark_dynamic(tensor, dim)
        compiled = torch.compile(_with_own_code(self._fn), fullgraph=True)
        try:
            with announced(f"{self._name}, once per process", "5 to 60 s"):
                result = compiled(*args)
        except Exception as error:
            result = self._fn(*args)  # an error of the caller shows itself here
            if _chosen.get() == "compiled":
                raise
            _broken = f"{type(error).__name__}: {error}"
            _log.debug("kernels run uncompiled, torch.compile failed: %s", _broken)
            return result
        self._compiled = compiled
        return result


@contextlib.contextmanager
def announced(name: str, takes: str) -> Iterator[None]:
    """Says what is compiled before it is, as it takes long, and how long it took."""
    _log.warning("compiling the %s: this takes %s", name, takes)
    # Without a GPU, PyTorch's compiler would warn of a CUDA_HOME that nobody asked for.
    elsewhere = logging.getLogger("torch.utils.cpp_extension")
    level, start = elsewhere.level, time.perf_counter()
    elsewhere.setLevel(logging.ERROR)
    try:
        yield
    finally:
        elsewhere.setLevel(level)
    _log.info("compiled the %s in %.1f s", name, time.perf_counter() - start)


def total(x: Tensor, dim: tuple[int, ...] = (), keepdim: bool = False) -> Tensor:
    """Sum over ``dim`` (all dimensions when empty), added up in float64 where the device has it.

    Besides being exact enough in any order, such a sum is compiled once for all sizes: PyTorch
    compiles a float32 sum of more than 4096 values otherwise than a shorter one, and recompiles.
    """
    if x.device.type not in ("cpu", "cuda"):
        return x.sum(dim, keepdim=keepdim)
    return x.sum(dim, keepdim=keepdim, dtype=torch.float64).to(x.dtype)


def count(fired: Tensor) -> Tensor:
    """How many are true, a 0-dim float32 tensor; counted in integers, see :func:`total`."""
    return fired.to(torch.int32).sum(dtype=torch.int32).to(torch.float32)


def _with_own_code(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of ``fn`` with a code object of its own.

    ``torch.compile`` counts recompilations per code object, and all closures of one function share
    one: without the copy the eighth set of options would hit the recompilation limit.
    """
    assert isinstance(fn, types.FunctionType)
    return types.FunctionType(
        fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__
    )


_cores: dict[Hashable, Core] = {}


def core(
    key: tuple[Hashable, ...],
    dtype: torch.dtype,
    device: torch.device,
    size: int,
    dynamic_dims: tuple[int, ...],
    build: Callable[[], Any],
    steps: int = 1,
) -> Core:
    """The core of these options, built on first use.

    Args:
        key: everything ``build`` depends on.
        dtype: of the tensors it is for.
        device: where these lie.
        size: length of its loops: short and long ones have a core each, because the compiler
            decides between serial and parallel loops by the first size it sees.
        dynamic_dims: see :class:`Core`.
        build: makes the function.
        steps: see :class:`Core`.
    """
    full = (key, dtype, device, size >= PARALLEL_FROM, torch.get_num_threads())
    found = _cores.get(full)
    if found is None:
        name = f"{key[0]} kernel for {device.type}"
        found = _cores[full] = Core(name, build(), dynamic_dims, steps)
    return found


def clear() -> None:
    """Forget all compiled cores and any failure of the compiler."""
    global _broken
    _cores.clear()
    _broken = None
