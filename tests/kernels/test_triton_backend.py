"""The kernels written in Triton, where there is no GPU: interpreted, and compiled for one."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qsnn_ext.errors import ConfigError
from qsnn_ext.kernels import LIFOptions, Surrogate, backends, use_backend
from qsnn_ext.kernels.backends import Call, function, triton
from qsnn_ext.kernels.surrogates import DERIVATIVES
from tests.kernels.triton_cases import ALPHAS, CASES, ORDERS, SIGMOID
from tests.pairwise import pairwise

pytest.importorskip("triton")
without_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a GPU: test_devices.py runs"
)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def interpreted():
    """What was wrong with each case under Triton's interpreter, which takes a process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton_cases"],
        cwd=Path(__file__).parents[2], env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@without_gpu
@pytest.mark.parametrize("name", CASES)
def test_interpreted(name, interpreted):
    assert interpreted[name] is None, interpreted[name]


# --------------------------------------------------------------------------- compiled


class Driver:
    """Triton's, of a device that is described and not there."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Compiled:
    """A kernel that is compiled for its arguments, and not launched."""

    def __init__(self, kernel):
        self.kernel, self.made = kernel, []

    def __getitem__(self, grid):
        def compile_(*args, **options):
            self.made.append(self.kernel.run(*args, grid=grid, warmup=True, **options))

        return compile_


@pytest.fixture
def described_gpu(monkeypatch):
    """The kernels, compiled for a GPU by whoever would launch them."""
    from triton.runtime import driver

    before = driver._active
    driver.set_active(Driver())
    kernels = triton.kernels()
    for name in ("forward", "backward"):
        monkeypatch.setattr(kernels, name, Compiled(getattr(kernels, name)))
    yield kernels
    driver._active = before


def both_ways(o, steps, size, dtype, starts=False, absent=(False, False), need_v=False):
    """Run the host's code of forward and backward, on tensors of the CPU."""
    x, v = torch.zeros(steps, size, dtype=dtype), torch.zeros(size, dtype=dtype)
    p = torch.tensor([0.5, 1.0, 0.0, 1.0])
    alpha = torch.tensor(0.9) if o.bits and o.alpha != "dynamic" else None
    first = v if starts else None
    call = Call("forward", o, steps, dtype, CPU, size, (not starts, alpha is None))
    spikes, last, alphas, counts, *charges = triton.run(call, x, first, p, alpha)
    g_spikes, g_v = (None if gone else g for gone, g in zip(absent, (spikes, last), strict=True))
    call = Call("backward", o, steps, dtype, CPU, size, (*absent, not starts), need_v)
    triton.run(call, g_spikes, g_v, counts, charges[0] if charges else x, first, p, alphas)


def check(kernels):
    made = [*kernels.forward.made, *kernels.backward.made]
    for kernel in made:
        assert kernel.asm["cubin"][:4] == b"\x7fELF"
        assert "fma" not in kernel.asm["ptx"]  # a product contracted with a sum
    return made


@without_gpu
@pytest.mark.parametrize("order", ORDERS)
def test_compiles_for_a_gpu(order, described_gpu):
    for bits, mode, scale, reset, save, starts, dtype, (steps, size), absent in pairwise(
        (None, 2, 4), ALPHAS, ("max", "absmax"), ("hard", "soft", "none"), ("input", "charge"),
        (False, True), DTYPES, [(2, 4000), (2, 8192), (3, 8191), (6, 8192), (9, 8192)],
        [(False, False), (True, False), (False, True)],
    ):  # fmt: skip
        o = LIFOptions(
            SIGMOID, bits, scale, mode if bits else "dynamic", order=order, reset=reset, save=save
        )
        if save == "charge" and dtype != torch.float32:
            continue
        both_ways(o, steps, size, dtype, starts, absent, need_v=starts)
    assert len(check(described_gpu)) > 20


@without_gpu
def test_every_surrogate_compiles(described_gpu):
    for kind in DERIVATIVES:
        both_ways(LIFOptions(Surrogate(kind, 2.0, 0.3, True), 2), 1, 8192, torch.float32)
    assert len(set(described_gpu.backward.made)) == len(DERIVATIVES)
    check(described_gpu)


@without_gpu
def test_rows_are_read_by_vectors_and_divided_exactly(described_gpu):
    both_ways(LIFOptions(SIGMOID, 4), 2, 8192, torch.bfloat16)
    for kernel in check(described_gpu):
        ptx = kernel.asm["ptx"]
        assert "ld.global.v4" in ptx
        assert "div.approx" not in ptx
    assert "div.rn.f32" in ptx


@without_gpu
@pytest.mark.parametrize(("o", "steps", "size", "forwards"), [
    (LIFOptions(SIGMOID, 2), 4, 4096, 1),  # a single block
    (LIFOptions(SIGMOID, 2), 4, 4097, 5),
    (LIFOptions(SIGMOID, 2, alpha="running"), 12, 8192, 13),
    (LIFOptions(SIGMOID, 2, alpha="given"), 8, 8192, 1),
    (LIFOptions(SIGMOID, None), 12, 8192, 2),
])  # fmt: skip
def test_launches(o, steps, size, forwards, described_gpu):
    both_ways(o, steps, size, torch.float32)
    assert len(described_gpu.forward.made) == forwards
    assert len(described_gpu.backward.made) == 1


# --------------------------------------------------------------------------- where it runs


def call(device=CUDA, steps=4, dtype=torch.float32, kind="backward", need_params=False, **options):
    o = LIFOptions(SIGMOID, 2, **options)
    absent = (False, False, False)
    return Call(kind, o, steps, dtype, device, 100, absent, need_params=need_params)


def test_what_it_covers(monkeypatch):
    monkeypatch.setattr(triton, "_runs_on", lambda device: device.type == "cuda")
    assert triton.covers(call())
    assert triton.covers(call(dtype=torch.bfloat16, order="quantize_first", alpha="running"))
    assert triton.covers(call(kind="forward", steps=100))
    for other in (
        call(CPU), call(dtype=torch.float64), call(squash="tanh"), call(delayed=True),
        call(need_params=True), call(steps=triton.LONGEST + 1),
    ):  # fmt: skip
        assert not triton.covers(other)


def test_it_is_tried_before_the_compiler():
    names = list(backends.BACKENDS)
    assert names.index("triton") < names.index("compiled")


@without_gpu
def test_without_a_gpu_it_is_not_there():
    assert not triton.covers(call(CPU))
    assert not triton.covers(call(CUDA))
    with pytest.raises(ConfigError, match="NVIDIA GPU"), use_backend("triton"):
        pass


def test_an_old_triton_is_told(monkeypatch):
    monkeypatch.setattr(triton, "DEVICES", ("cpu",))
    monkeypatch.setattr(triton.kernels(), "VERSION", (3, 1))
    triton.missing.cache_clear()
    try:
        assert "3.1 is installed" in triton.missing()
    finally:
        triton.missing.cache_clear()


def test_where_it_fails_others_run_unless_it_was_asked_for(monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("no assembler")

    monkeypatch.setattr(triton, "_runs_on", lambda device: True)
    monkeypatch.setattr(triton, "missing", lambda: None)
    monkeypatch.setattr(triton, "_broken", None)
    monkeypatch.setattr(triton.kernels(), "forward", {(1,): fails})
    p, x = torch.tensor([0.5, 1.0, 0.0, 1.0]), torch.randn(3, 100)
    for asked, momentum in ((True, 0.31), (False, 0.32)):  # options that no other test has
        o = LIFOptions(SIGMOID, 2, momentum=momentum)
        one = Call("forward", o, 3, torch.float32, CPU, 100, (True, True))
        assert triton.covers(one)
        with use_backend("triton" if asked else "auto"):
            if asked:
                with pytest.raises(RuntimeError, match="no assembler"):
                    triton.run(one, x, None, p, None)
            else:
                expected = function.run(one, x, None, p, None)
                for got, other in zip(triton.run(one, x, None, p, None), expected, strict=True):
                    assert torch.equal(got, other)
    assert not triton.covers(one)
    # A mistake of the caller's is no failure of Triton.
    monkeypatch.setattr(triton, "_broken", None)
    one = replace(one, options=replace(o, momentum=0.33))
    with pytest.raises(TypeError), use_backend("auto"):
        triton.run(one, None, None, p, None)
    assert triton.covers(one)
