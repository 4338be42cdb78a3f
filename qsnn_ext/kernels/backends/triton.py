"""Kernels written for a GPU in Triton, launched as they are: no compiler around them, no guards.

The scale of a step is a maximum over the whole layer, so with dynamic or running scales a launch
ends where a maximum is due, and the next one begins with it: ``T + 1`` launches. What lies between
two of them is not written down: a launch computes the steps before its own again, from the input,
as long as that reads less than carrying the state would (:data:`RECOMPUTED`); with more steps the
state is carried in the tensor of last states. A small layer is one launch by a single block, and so
is a layer whose scale is given or that is not rounded (:data:`WINDOW` steps each). Every spike,
charge and last state is written once. The backward is one launch.

No product is contracted with a sum (``enable_fp_fusion=False``) and divisions are rounded as IEEE
754 has it, so that forward results are bit for bit those of the core as it stands.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qsnn_ext import functional as F
from qsnn_ext.kernels import backend as B
from qsnn_ext.kernels.backends import Call, function
from qsnn_ext.kernels.options import LIFOptions

_log = logging.getLogger(__name__)

#: The kernels are for this version of Triton and later ones.
OLDEST = (3, 6)
#: Where they run. `TRITON_INTERPRET=1` would run them on the CPU, for tests.
DEVICES = ("cuda",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Up to this many steps with dynamic scales are computed again rather than carried: with 4 both
#: move 15 values a neuron in float32, and in half precision carrying saves nothing either.
RECOMPUTED = 4
#: Steps of one launch where no maximum is waited for: their inputs are held in registers.
WINDOW = 8
#: Steps of a backward, which holds all of them in registers.
LONGEST = 16
#: Neurons of a block, and its warps; of the block that is alone.
BLOCK, WARPS = 1024, 4
ALONE_BLOCK, ALONE_WARPS = 4096, 16
#: Steps times neurons of a block of a backward, so that they fit its registers.
HELD = 2048
#: Up to this many neurons a sum of ones in float32 is exact, whatever its order.
EXACT = 1 << 24


@functools.cache
def kernels() -> Any:
    """The module of the kernels, loaded where they run: importing Triton takes a second."""
    return importlib.import_module("qsnn_ext.kernels.backends._triton_kernels")


@functools.cache
def missing() -> str | None:
    """Why the kernels cannot run here at all, if they cannot."""
    if "cuda" in DEVICES and not (torch.version.cuda and torch.cuda.is_available()):
        return "the Triton kernels need an NVIDIA GPU, and PyTorch sees none."
    try:
        found = kernels().VERSION
    except ImportError as error:
        return f"the Triton kernels need Triton, which cannot be imported: {error}."
    if found >= OLDEST:
        return None
    wanted, found = (".".join(map(str, version)) for version in (OLDEST, found))
    return f"the Triton kernels need Triton {wanted} or later; {found} is installed."


@functools.cache
def _runs_on(device: torch.device) -> bool:
    if device.type not in DEVICES or missing() is not None:
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def covers(call: Call) -> bool:
    """float32 and half precision on NVIDIA GPUs since Ampere.

    Left to others are a delayed reset, ``tanh``, gradients of the parameters and backwards of more
    than :data:`LONGEST` steps.
    """
    o = call.options
    return (
        _runs_on(call.device)
        and _broken is None
        and call.dtype in DTYPES
        and not o.delayed
        and not o.squash
        and not call.need_params
        and (call.kind == "forward" or call.steps <= LONGEST)
    )


def recomputes(x: Tensor) -> bool:
    """Whether a backward of this input would compute the charges again, rather than read them."""
    return (
        B.current_backend() in ("auto", "triton")
        and _broken is None
        and x.dtype in DTYPES
        and x.shape[0] <= LONGEST
        and _runs_on(x.device)
    )


def run(call: Call, *args: Any) -> Any:
    """What the core of this call returns."""
    device = call.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return run(call, *args)
    plan = _plan(call)
    compute = _forward if call.kind == "forward" else _backward
    if plan.fresh:
        plan.fresh.clear()
        return _first(compute, call, plan, args)
    return compute(call, plan, *args)


# Why compiling or launching failed in this process; None as long as it has not.
_broken: str | None = None


def _first(compute: Callable[..., Any], call: Call, plan: _Plan, args: tuple[Any, ...]) -> Any:
    """A call whose kernels are compiled; by plain operations where that fails, unless asked for."""
    global _broken
    try:
        with B.announced(f"{call.kind} kernels in Triton", "1 to 5 s"):
            return compute(call, plan, *args)
    except Exception as error:
        if B.current_backend() == "triton":
            raise
        result = function.run(call, *args)  # an error of the caller shows itself here
        _broken = f"{type(error).__name__}: {error}"
        _log.warning("kernels in Triton do not run here, others do: %s", _broken)
        return result


class _Launch(NamedTuple):
    """One launch of the forward kernel; see its arguments of these names."""

    first: int
    known: int
    ahead: bool
    carried: bool
    writes_last: bool


class _Plan(NamedTuple):
    """All about a call that its tensors do not say."""

    grid: tuple[int]
    launches: tuple[_Launch, ...]
    alone: bool
    scale: str
    chunks: int
    constants: dict[str, Any]
    fresh: list[bool]  # not empty until its compilation was announced


#: What was announced: once per process, and Triton keeps on disk what it has compiled.
_told: set[Hashable] = set()


@functools.lru_cache(maxsize=1024)
def _plan(call: Call) -> _Plan:
    o, steps, size = call.options, call.steps, call.size
    scale = o.alpha if o.bits else "none"
    align = 16 if size % 16 == 0 else 1  # rows that start at multiples of 16 are read by vectors
    constants = {
        **_constants(o),
        "SCALE": scale,
        # PyTorch on CUDA divides by a number by multiplying with its reciprocal.
        "RECIPROCAL": "cuda" in DEVICES,
        "ALIGN": align,
        "enable_fp_fusion": False,
    }
    launches: tuple[_Launch, ...] = ()
    alone, block, warps = False, BLOCK, WARPS
    if call.kind == "forward":
        alone = size <= ALONE_BLOCK and steps <= WINDOW
        if alone and size > BLOCK:
            block, warps = ALONE_BLOCK, ALONE_WARPS
        launches = _launches(steps, scale in ("dynamic", "running") and not alone)
        constants |= {"ALONE": alone, "MOMENTUM": o.momentum}
    else:
        block = min(BLOCK, HELD >> (steps - 1).bit_length())
        surrogate = o.surrogate
        constants |= {
            "T": steps, "CHARGES": o.save == "charge", "DETACH": o.detach_reset,
            "SURROGATE": surrogate.kind, "A": surrogate.a, "B": surrogate.b,
        }  # fmt: skip
    constants |= {"BLOCK": block, "num_warps": warps}
    told = (call.kind, o, steps, call.dtype)
    fresh = [True] * (told not in _told)
    _told.add(told)
    return _Plan((-(-size // block),), launches, alone, scale, size // align, constants, fresh)


def _constants(o: LIFOptions) -> dict[str, Any]:
    return {
        "LEVELS": float(F.levels(o.bits)) if o.bits else 0.0,
        "ABSMAX": o.scale == "absmax",
        "QUANTIZE_FIRST": bool(o.bits) and o.order == "quantize_first",
        "RESET": o.reset,
        "V_RESET": float(o.v_reset),
        "STRICT": o.surrogate.strict,
    }


def _launches(steps: int, waits: bool) -> tuple[_Launch, ...]:
    if not waits:
        firsts = range(0, steps, WINDOW)
        return tuple(_Launch(t, min(WINDOW, steps - t), False, t > 0, True) for t in firsts)
    if steps <= RECOMPUTED:
        return tuple(_Launch(0, t, t < steps, False, t == steps) for t in range(steps + 1))
    begin = _Launch(0, 0, True, False, False)
    return begin, *[_Launch(t, 1, t < steps - 1, t > 0, True) for t in range(steps)]


def _forward(
    call: Call, plan: _Plan, x: Tensor, v: Tensor | None, p: Tensor, given: Tensor | None
) -> Any:
    steps, size = x.shape
    v, p = None if v is None else v.contiguous(), p.contiguous()
    given = None if given is None else given.to(x.device)  # a number may lie anywhere
    spikes, last = torch.empty_like(x), x.new_empty(size)
    charges = torch.empty_like(x, dtype=p.dtype) if call.options.save == "charge" else None
    seen = None
    if plan.alone:
        alphas, counts = p.new_empty(steps + 1), p.new_empty(steps)
    else:  # many blocks compare and add
        counts = p.new_zeros(steps, dtype=torch.float32 if size <= EXACT else torch.int32)
        if plan.scale == "dynamic":
            alphas = seen = p.new_full((steps + 1,), -torch.inf)
        else:
            alphas = p.new_empty(steps + 1)
            if plan.scale == "running":
                seen = p.new_full((steps,), -torch.inf)
    launch = kernels().forward[plan.grid]
    for first, known, ahead, carried, writes_last in plan.launches:
        launch(
            x, last if carried else v, p, given,
            spikes, last if writes_last else None, seen, alphas, counts, charges,
            first, steps, plan.chunks, KNOWN=known, AHEAD=ahead, CARRIED=carried,
            **plan.constants,
        )  # fmt: skip
    results = spikes, last, alphas, counts.to(torch.float32)
    return results if charges is None else (*results, charges)


def _backward(
    call: Call,
    plan: _Plan,
    g_spikes: Tensor | None,
    g_v: Tensor | None,
    g_counts: Tensor,
    saved: Tensor,
    v: Tensor | None,
    p: Tensor,
    alphas: Tensor,
) -> Any:
    # The gradient of a sum is one number, whatever the length of its tensor.
    g_v, v = (None if state is None else state.contiguous() for state in (g_v, v))
    g_counts, p = g_counts.contiguous(), p.contiguous()
    g_x = torch.empty_like(saved)
    g_v0 = saved.new_empty(call.size) if call.need_v else None
    kernels().backward[plan.grid](
        g_spikes, g_v, g_counts, saved, v, p, alphas, g_x, g_v0, plan.chunks, **plan.constants
    )
    return (g_x,) if g_v0 is None else (g_x, g_v0)
