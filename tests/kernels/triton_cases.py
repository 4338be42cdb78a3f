"""What the kernels in Triton must compute: run on a GPU by `test_devices.py`, and on the CPU by
Triton's interpreter, which is a matter of the whole process:

    TRITON_INTERPRET=1 python -m tests.kernels.triton_cases

prints what was wrong with each case, or null, as JSON.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import traceback
from unittest import mock

import numpy as np
import torch

from qsnn_ext.kernels import LIFOptions, Surrogate, lif_multi_step
from qsnn_ext.kernels.backends import triton
from qsnn_ext.kernels.surrogates import DERIVATIVES
from tests import reference
from tests.pairwise import pairwise

SIGMOID = Surrogate("sigmoid", 4.0, 0.0, False)
ORDERS = ("fire_first", "quantize_first")
ALPHAS = ("dynamic", "running", "given")
# Alone in one block or the larger one; several blocks that end in them or not, their steps computed
# again or carried; more steps than one launch takes.
SHAPES = [(3, 5, 7), (2, 1030), (4, 4099), (2, 16, 257), (6, 16, 257), (10, 33)]
#: How far a gradient may be off, of the largest or of 1.
LOOSE = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def agree(o, x, v=None, alpha=None, parts=("spikes", "v", "counts"), launched=2, weighted=True):
    """Forward bit for bit as plain operations have it, gradients nearly."""
    runs = []
    for backend in ("triton", "function"):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        first = None if v is None else v.detach().requires_grad_()
        with mock.patch.object(triton, "run", wraps=triton.run) as run:
            r = lif_multi_step(
                leaf, first, o, decay=0.6, gain=0.7, offset=0.1, threshold=0.9, alpha=alpha,
                backend=backend,
            )  # fmt: skip
            loss(r, parts, weighted).backward()
        assert run.call_count == (launched if backend == "triton" else 0)
        runs.append(
            (
                [r.spikes, r.v, r.alphas, r.running_alpha, r.counts],
                [leaf.grad] if first is None else [leaf.grad, first.grad],
            )
        )
    (got, got_grads), (expected, expected_grads) = runs
    for name, one, other in zip(("s", "v", "a", "r", "c"), got, expected, strict=True):
        assert one.dtype == other.dtype, name
        assert one.stride() == other.stride(), name
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=name)
    for one, other in zip(got_grads, expected_grads, strict=True):
        finite = other.float()[other.isfinite()]
        size = max(finite.abs().max().item(), 1.0) if finite.numel() else 1.0
        torch.testing.assert_close(
            one.float(), other.float(), rtol=0, atol=LOOSE[x.dtype] * size, equal_nan=True
        )


def loss(r, parts, weighted):
    rng = torch.Generator().manual_seed(1)
    total = 0
    for part in parts:
        value = getattr(r, part)
        weight = torch.randn(value.shape, generator=rng).to(value) if weighted else None
        total = total + (value.sum() if weight is None else (value * weight).sum())
    return total


def data(device, shape, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x, v = torch.randn(shape, generator=rng) * 1.5, torch.randn(shape[1:], generator=rng)
    return x.to(device, dtype), v.to(device, dtype)


def scale_for(o, device):
    waits = not o.bits or o.alpha == "dynamic"
    return None if waits else torch.tensor(0.9, device=device)


def thinned(device, *axes):
    """Fewer on a GPU, where each set of options is compiled: interpreting has seen the others."""
    return itertools.islice(pairwise(*axes), None, None, 1 if device == "cpu" else 3)


def every_option(device, order):
    for bits, scale, reset, mode, detach, starts, v_reset, shape, dtype in thinned(
        device, (None, 2, 3, 4, 8), ("max", "absmax"), ("hard", "soft", "none"), ALPHAS,
        (False, True), (False, True), (0.0, -0.3), SHAPES, list(LOOSE),
    ):  # fmt: skip
        o = LIFOptions(
            SIGMOID, bits, scale, mode if bits else "dynamic", 0.1, None, order, reset, v_reset,
            detach,
        )  # fmt: skip
        x, v = data(device, shape, dtype)
        agree(o, x, v if starts else None, scale_for(o, device))


def surrogates(device):
    x, _ = data(device, (2, 50))
    for kind in DERIVATIVES:
        for a, strict in ((0.7, True), (2.0, False))[: None if device == "cpu" else 1]:
            agree(LIFOptions(Surrogate(kind, a, 0.3, strict), 4), x)


def odd_inputs(device):
    """Nothing positive, nothing at all, ties, and what is no number."""
    normal, _ = data(device, (5, 4100))
    strange = normal.clone()
    strange[0, 3], strange[1, 5], strange[2, 7] = math.nan, math.inf, -math.inf
    nothing = torch.full_like(normal, math.nan)
    negative = -1 - normal.abs()
    kinds = [normal * 0, negative, (normal * 4).round() / 4, strange, nothing, normal * 1e-39]
    modes = [*itertools.product(("dynamic",), ("max", "absmax"), (0.9,)), ("running", "max", 0.9)]
    modes += [("running", "absmax", 0.0), ("running", "max", 0.0)]  # 0: no value yet
    sizes = [(5, 100), (3, 4100), (5, 4100)]  # alone, computed again, carried
    for x, (mode, scale, start), bits, order, (steps, size) in thinned(
        device, kinds, modes, (2, 4), ORDERS, sizes
    ):
        o = LIFOptions(SIGMOID, bits, scale, mode, order=order, reset="soft")
        alpha = None if mode == "dynamic" else torch.tensor(start, device=device)
        agree(o, x[:steps, :size].contiguous(), alpha=alpha)


def gradients_that_are_not_there(device):
    """Of spikes, of the last state or of counts alone; charges that were saved or not."""
    for parts, starts, order in itertools.product(
        (("spikes",), ("v",), ("counts",)), (False, True), ORDERS
    ):
        x, v = data(device, (3, 40))
        agree(LIFOptions(SIGMOID, 4, order=order), x, v if starts else None, parts=parts)


def one_number_for_all(device):
    """As gradient of a sum and as first state: tensors that are not as long as they look."""
    x, v = data(device, (3, 40, 110))
    agree(LIFOptions(SIGMOID, 4), x, v[:1, :1].expand_as(v), weighted=False)


def memory_formats(device):
    x, _ = data(device, (3, 2, 8, 5, 6))
    x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).view(x.shape)
    agree(LIFOptions(SIGMOID, 4), x)
    agree(LIFOptions(SIGMOID, 4), data(device, (3, 40, 110))[0].transpose(1, 2))
    agree(LIFOptions(SIGMOID, 4), data(device, (3, 4113))[0][:, 1:])


def long_sequences(device):
    """Forward alone: such a backward is left to others, and so are its charges saved."""
    x, _ = data(device, (triton.LONGEST + 2, 4100))
    for mode, order in zip(ALPHAS, (*ORDERS, ORDERS[0]), strict=True):
        o = LIFOptions(SIGMOID, 4, alpha=mode, order=order)
        agree(o, x, alpha=scale_for(o, device), launched=1)


def counts_beyond_float32(device):
    """Added in integers where a float would not hold every one of them."""
    with mock.patch.object(triton, "EXACT", 0):
        for order in ORDERS:
            agree(LIFOptions(SIGMOID, 4, order=order), data(device, (3, 4100))[0])


def oracle(device):
    """Against the definition in float64, which shares no code with either."""
    for order, preset, detach in itertools.product(
        ORDERS, ({"scale": "max"}, {"scale": "absmax"}), (False, True)
    ):
        membrane = reference.Membrane(4, squash=None, **preset)
        host = reference.SpikingJellyLIF(membrane, 0.6, 0.7, 0.1, 0.9, None, order, detach)
        o = LIFOptions(SIGMOID, 4, **preset, order=order, reset="soft", detach_reset=detach)
        x, v = (t.requires_grad_() for t in data(device, (4, 40)))
        r = lif_multi_step(
            x, v, o, decay=0.6, gain=0.7, offset=0.1, threshold=0.9, backend="triton"
        )
        r.spikes.sum().backward()
        trace = host.forward(*(t.detach().double().cpu().numpy() for t in (x, v)))
        expected = host.backward(trace, np.ones(x.shape), np.zeros(x.shape))
        np.testing.assert_array_equal(r.spikes.detach().cpu(), trace.stack("s"))
        np.testing.assert_allclose(r.v.detach().cpu(), trace.steps[-1]["v"], atol=1e-6)
        for got, name in ((x.grad, "x"), (v.grad, "v0")):
            np.testing.assert_allclose(got.cpu(), expected[name], rtol=1e-5, atol=1e-5)


CASES = {
    **{f"every option, {order}": (every_option, order) for order in ORDERS},
    **{
        case.__name__.replace("_", " "): (case,)
        for case in (
            surrogates, odd_inputs, gradients_that_are_not_there, one_number_for_all,
            memory_formats, long_sequences,
            counts_beyond_float32, oracle,
        )
    },
}  # fmt: skip


def check(name, device):
    case, *settings = CASES[name]
    case(device, *settings)


def interpret() -> None:
    """All cases on the CPU; wrong ones are told, on standard output."""
    assert os.environ["TRITON_INTERPRET"] == "1"
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def correctly(values, source, target, mode):
        # The interpreter rounds ties away from zero, and does not carry into the exponent.
        if (str(source), str(target)) != ("fp32", "bf16"):
            return convert(values, source, target, mode)
        return torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = correctly
    triton.DEVICES = ("cpu",)
    # What a kernel leaves unwritten is NaN, and no result of an earlier run.
    torch.use_deterministic_algorithms(True)
    wrong = {}
    with np.errstate(all="ignore"):
        for name in CASES:
            try:
                check(name, "cpu")
                wrong[name] = None
            except Exception:
                wrong[name] = traceback.format_exc()
    json.dump(wrong, sys.stdout)


if __name__ == "__main__":
    interpret()
