"""The kernels in C against the eager loop, bit for bit, and against the float64 oracle."""

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given
from hypothesis import strategies as st

from qsnn_ext.errors import ConfigError
from qsnn_ext.kernels import (
    LIFOptions,
    Surrogate,
    _native,
    lif_multi_step,
    use_backend,
)
from qsnn_ext.kernels.grid import compute_dtype
from qsnn_ext.kernels.surrogates import DERIVATIVES
from qsnn_ext.layers import BinaryLinear
from qsnn_ext.quantizers import BinaryWeight
from tests import fresh, reference
from tests.pairwise import pairwise

LIBRARY = _native.library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="built without a C compiler")

SIGMOID = Surrogate("sigmoid", 4.0, 0.0, False)
DTYPES = {torch.float32: 4e-6, torch.float64: 1e-12, torch.bfloat16: 5e-2, torch.float16: 5e-3}
RESETS = ("hard", "soft", "none")
ORDERS = ("fire_first", "quantize_first")


def native(o, x, v, params, alpha, g_spikes, g_v, g_counts):
    """``[spikes, v, alphas, running alpha, counts], [g_x, g_v0, g_params]``."""
    s, last, alphas, counts, charges = _native.lif_forward(LIBRARY, o, x, v, params, alpha)
    saved = charges if o.save == "charge" else x
    grads = _native.lif_backward(
        LIBRARY, o, g_spikes, g_v, g_counts, saved, v, params, alphas, v is not None,
        o.save == "input",
    )  # fmt: skip
    return [s, last, alphas[:-1], alphas[-1], counts], grads


def eager(o, x, v, params, alpha, g_spikes, g_v, g_counts):
    """The same of the reference."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    v = None if v is None else v.detach().clone().requires_grad_()
    numbers = [p.clone().requires_grad_() for p in params]
    r = lif_multi_step(
        x, v, o, decay=numbers[0], gain=numbers[1], offset=numbers[2], threshold=numbers[3],
        alpha=alpha, backend="eager",
    )  # fmt: skip
    loss = (r.spikes * g_spikes).sum() + (r.v * g_v).sum() + (r.counts * g_counts).sum()
    loss.backward()
    forward = [t.detach() for t in (r.spikes, r.v, r.alphas, r.running_alpha, r.counts)]
    g_params = torch.stack([torch.zeros(()) if n.grad is None else n.grad for n in numbers])
    return forward, [x.grad, None if v is None else v.grad, g_params]


def check(o, x, v=None, numbers=(0.5, 1.0, 0.0, 1.0), alpha=None):
    """Both agree: forward bit for bit but for tanh, gradients to rounding."""
    dtype = compute_dtype(x)
    params = torch.tensor(numbers, dtype=dtype)
    alpha = None if alpha is None else torch.tensor(alpha, dtype=dtype)
    rng = torch.Generator().manual_seed(1)
    g_spikes, g_v = (torch.randn(t.shape, generator=rng).to(x.dtype) for t in (x, x[0]))
    given = (v, params, alpha, g_spikes, g_v, torch.arange(len(x)) * 0.1)
    expected, expected_grads = eager(o, x, *given)
    for save in ("input", "charge") if dtype == x.dtype else ("input",):
        got, grads = native(replace(o, save=save), x, *given)
        loose = 0.0 if not o.squash else DTYPES[x.dtype]
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=loose, atol=loose, equal_nan=True)
        assert got[0].stride() == x.stride()
        for a, b in zip(grads, expected_grads, strict=True):
            if b is None or (a is grads[2] and save == "charge"):  # asked of the saved input alone
                continue
            # Sums over all neurons cancel: the parameters' gradients are measured against 1.
            sums = 10 if a is grads[2] else 1
            size = max(b.abs().max().item(), 1.0)
            assert (a - b).abs().max().item() <= DTYPES[x.dtype] * size * sums


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("order", ORDERS)
def test_every_option(dtype, order, reset):
    x, v = (torch.randn(3, 5, 7) * 1.5).to(dtype), torch.randn(5, 7).to(dtype)
    others = (
        ("max", "absmax"),
        (None, "tanh"),
        ((False, None, 0.0), (True, v, -0.3), (False, v, 0.2)),
    )
    modes = ("dynamic", "running", "given")
    cases = [*pairwise((2, 4, 8), modes, *others), *pairwise((None,), ("dynamic",), *others)]
    for bits, mode, scale, squash, (detach, state, v_reset) in cases:
        o = LIFOptions(SIGMOID, bits, scale, mode, 0.1, squash, order, reset, v_reset, detach)
        numbers = (0.5, 1.0, 0.0, 1.0) if state is None else (0.7, 0.4, 0.1, 0.9)
        check(o, x, state, numbers, None if mode == "dynamic" else 0.9)


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    steps=st.integers(1, 5),
    bits=st.sampled_from([None, 2, 3, 8]),
    kind=st.sampled_from(["normal", "zero", "negative", "threshold", "tiny", "large", "infinite"]),
    order=st.sampled_from(ORDERS),
    reset=st.sampled_from(RESETS),
    scale=st.sampled_from(["max", "absmax"]),
    strict=st.booleans(),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 99),
)
def test_odd_inputs(shape, steps, bits, kind, order, reset, scale, strict, dtype, seed):
    x = torch.randn(steps, *shape, generator=torch.Generator().manual_seed(seed))
    x = {
        "normal": x,
        "zero": x * 0,
        "negative": -x.abs(),
        "threshold": x.round(),
        "tiny": x * torch.finfo(dtype).tiny,
        "large": x * (torch.finfo(dtype).max / 64),
        "infinite": torch.where(x > 1, x * torch.inf, x),
    }[kind].to(dtype)
    o = LIFOptions(SIGMOID._replace(strict=strict), bits, scale, order=order, reset=reset)
    if kind in ("large", "infinite"):  # no gradients: they exceed what the dtype holds
        params = torch.tensor([0.5, 1.0, 0.0, 1.0], dtype=compute_dtype(x))
        expected = lif_multi_step(x, None, o, decay=0.5, backend="eager")
        got = _native.lif_forward(LIBRARY, o, x, None, params, None)
        for a, b in zip(got, (expected.spikes, expected.v), strict=False):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        return
    check(o, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_builds_give_the_same_bits(dtype, monkeypatch):
    """Forward and backward, tanh and all: whatever instructions the processor has."""
    if not LIBRARY.isa:
        pytest.skip("there is one build for this processor")
    x, v, g = ((torch.randn(3, 1100) * 1.5).to(dtype) for _ in range(3))
    params = torch.tensor([0.6, 0.4, 0.1, 0.9], dtype=compute_dtype(x))
    for kind, bits, squash, order, reset in itertools.product(
        DERIVATIVES, (None, 4), (None, "tanh"), ORDERS, RESETS
    ):
        surrogate = Surrogate(kind, 2.0, 0.3, True)
        o = LIFOptions(surrogate, bits, squash=squash, order=order, reset=reset, save="input")
        results = []
        for isa in (0, LIBRARY.isa):
            with monkeypatch.context() as patch:
                patch.setattr(LIBRARY, "isa", isa)
                results.append(native(o, x, v[0], params, None, g, g[0], torch.ones(3)))
        for a, b in zip(*[[*forward, *grads] for forward, grads in results], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("steps", [1, 2, 40])
def test_blocks_and_their_ends(size, steps):
    check(LIFOptions(SIGMOID, 4), torch.randn(steps, size) * 1.5)
    o = LIFOptions(SIGMOID, 3, order="quantize_first", reset="soft")
    check(o, torch.randn(steps, size) * 1.5, torch.randn(size), (0.7, 0.4, 0.1, 0.9))


@pytest.mark.parametrize("kind", DERIVATIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_surrogates(kind, dtype):
    """Near the threshold and far from it, where exponentials underflow."""
    x = torch.cat([torch.randn(1, 500), torch.linspace(-300, 300, 601)[None]], 1).to(dtype)
    x[0, :3] = torch.tensor([1.0, 2.0, 0.0])
    for a, b in ((2.0, 0.3), (0.7, 1.5)):
        check(LIFOptions(Surrogate(kind, a, b, False), None, reset="none"), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tanh(dtype):
    """To 4 units in the last place, relative."""
    x = torch.cat([torch.randn(4000), 10.0 ** torch.linspace(-40, 2, 500)]).to(dtype)
    x = torch.cat([x, -x])
    o = LIFOptions(SIGMOID, 8, "absmax", "given", squash="tanh", reset="none")
    params = torch.tensor([0.0, 1.0, 0.0, 5.0], dtype=dtype)
    # Its derivative, 1 - tanh^2, where the surrogate's is 0.
    o = replace(o, surrogate=Surrogate("rect", 10.0, 0.0, False), save="input")
    g = torch.ones_like(x)
    _, _, alphas, _, _ = _native.lif_forward(LIBRARY, o, x[None], None, params, x.new_ones(()))
    grad, _, _ = _native.lif_backward(
        LIBRARY, o, None, g, None, x[None], None, params, alphas, False, False
    )
    expected = 1 - torch.tanh(x.double()) ** 2
    assert (grad[0].double() - expected).abs().max() <= 4 * torch.finfo(dtype).eps


def test_memory_orders():
    o = LIFOptions(SIGMOID, 4)
    last = torch.randn(6, 3, 5, 4).to(memory_format=torch.channels_last).view(3, 2, 3, 5, 4)
    check(o, last)
    check(o, last, torch.randn(2, 3, 5, 4))
    check(o, torch.randn(3, 4, 1, 5).transpose(1, 3))
    for x in (
        torch.randn(5, 3, 8).transpose(0, 1)[..., ::2],
        torch.randn(3, 1, 4).expand(3, 3, 4),
        torch.randn(4, 5, 3).permute(2, 0, 1),
        torch.randn(8, 6)[::2],
    ):
        dense = _native.lif_forward(
            LIBRARY, o, x.contiguous(), None, torch.tensor([0.5, 1, 0, 1]), None
        )
        got = _native.lif_forward(LIBRARY, o, x, None, torch.tensor([0.5, 1, 0, 1]), None)
        for a, b in zip(got[:4], dense[:4], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_charges_of_half_precision_are_kept_in_float32(dtype):
    x, g = (torch.randn(3, 2000).to(dtype) for _ in range(2))
    params = torch.tensor([0.5, 1.0, 0.0, 1.0])
    o = LIFOptions(SIGMOID, 4, save="charge")
    _, _, alphas, _, charges = _native.lif_forward(LIBRARY, o, x, None, params, None)
    assert charges.dtype == torch.float32
    got = _native.lif_backward(
        LIBRARY, o, g, None, None, charges, None, params, alphas, False, False
    )[0]
    o = replace(o, save="input")
    expected = _native.lif_backward(
        LIBRARY, o, g, None, None, x, None, params, alphas, False, False
    )[0]
    assert torch.equal(got.to(dtype), expected)


def test_parameters_of_another_dtype():
    """What C writes has the dtype of the computation, whatever it was given."""
    x, g = torch.randn(3, 40), torch.randn(3, 40)
    o = LIFOptions(SIGMOID, 4, save="input")
    results = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        params = torch.tensor([0.5, 1.0, 0.0, 1.0], dtype=dtype)
        forward = _native.lif_forward(LIBRARY, o, x, None, params, None)
        grads = _native.lif_backward(
            LIBRARY, o, g, None, None, x, None, params, forward[2], False, True
        )
        assert grads[2].dtype == dtype
        results.append([*forward[:4], grads[0], grads[2].float()])
    for got in results[1:]:
        for a, b in zip(got, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2 if a is got[-1] else 0, atol=0)


def test_default_device_and_dtype_are_no_matter():
    """Both are the caller's, for tensors of his own."""
    o = LIFOptions(SIGMOID, 4)
    x = torch.randn(3, 40, requires_grad=True)

    def run():
        x.grad = None
        r = lif_multi_step(x, None, o, decay=0.7, backend="native")
        r.spikes.sum().backward()
        return r.spikes.detach(), r.v.detach(), r.counts.detach(), x.grad

    expected = run()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = run()
    finally:
        torch.set_default_dtype(before)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_absent_gradients():
    """Each gradient that is not there counts as zero."""
    x, params = torch.randn(3, 50) * 1.5, torch.tensor([0.5, 1.0, 0.0, 1.0])
    o = LIFOptions(SIGMOID, 4, save="input")
    alphas = _native.lif_forward(LIBRARY, o, x, None, params, None)[2]

    def grad(s, v, c):
        return _native.lif_backward(LIBRARY, o, s, v, c, x, None, params, alphas, False, False)[0]

    s, v, c = torch.randn(3, 50), torch.randn(50), torch.randn(3)
    parts = grad(s, None, None) + grad(None, v, None) + grad(None, None, c)
    torch.testing.assert_close(parts, grad(s, v, c))
    torch.testing.assert_close(grad(None, v, None), grad(torch.zeros(3, 50), v, torch.zeros(3)))


# --------------------------------------------------------------------------- the oracle


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", [None, 2, 4, 8])
@pytest.mark.parametrize("preset", reference.PRESET_MEMBRANE)
def test_oracle(bits, order, preset):
    options = reference.PRESET_MEMBRANE[preset]
    x, v = torch.randn(5, 40).double() * 1.5, torch.randn(40).double()
    g_s, g_v = torch.randn(5, 40).double(), torch.randn(40).double()
    for v_reset, detach, alpha in itertools.product((0.0, 0.2, None), (False, True), (None, 0.8)):
        if bits is None and alpha is not None:
            continue
        oracle = reference.SpikingJellyLIF(
            reference.Membrane(bits, frozen_alpha=alpha, **options),
            0.6, 0.7, 0.1, 0.9, v_reset, order, detach,
        )  # fmt: skip
        o = LIFOptions(
            SIGMOID, bits, options["scale"], "dynamic" if alpha is None else "given",
            squash=options["squash"], order=order, v_reset=v_reset or 0.0,
            reset="soft" if v_reset is None else "hard", detach_reset=detach, save="input",
        )  # fmt: skip
        params = torch.tensor([0.6, 0.7, 0.1, 0.9], dtype=torch.float64)
        scale = None if alpha is None else torch.tensor(alpha, dtype=torch.float64)
        got, grads = native(o, x, v, params, scale, g_s, g_v, torch.zeros(5))
        trace = oracle.forward(x.numpy(), v.numpy())
        np.testing.assert_array_equal(got[0], trace.stack("s"))
        np.testing.assert_allclose(got[1], trace.steps[-1]["v"], atol=1e-12)
        g_states = np.zeros((5, 40))
        g_states[-1] = g_v
        expected = oracle.backward(trace, g_s.numpy(), g_states)
        np.testing.assert_allclose(grads[0], expected["x"], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(grads[1], expected["v0"], rtol=1e-9, atol=1e-12)
        for got_one, name in zip(grads[2], ("decay", "gain", "offset"), strict=False):
            np.testing.assert_allclose(got_one, expected[name], rtol=1e-9, atol=1e-10)


def test_the_backend_is_taken_where_it_is_there():
    """By itself on the CPU, by name, and not where another was asked for."""
    x = torch.randn(3, 40) * 1.5
    o = LIFOptions(SIGMOID, 4)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        run = _native.Library.run
        patch.setattr(
            _native.Library, "run", lambda self, name, *a: (calls.append(name), run(self, name, *a))
        )
        for backend, times in (("auto", 1), ("native", 1), ("function", 0), ("eager", 0)):
            calls.clear()
            leaf = x.clone().requires_grad_()
            with use_backend(backend):
                lif_multi_step(leaf, None, o, decay=0.5).spikes.sum().backward()
            assert calls == ["lif_forward", "lif_backward"] * times
        calls.clear()
        with use_backend("auto"):
            BinaryLinear(4, 3)(torch.randn(2, 4)).sum().backward()
        assert calls == ["weight_forward", "weight_backward"]


@pytest.mark.parametrize("how", ["inference", "autocast", "compiled", "checkpointed", "threads"])
def test_the_same_under_every_mode(how):
    """What surrounds a call changes neither spikes nor gradients."""
    x = torch.randn(3, 4, 50) * 1.5
    layer = BinaryLinear(50, 50, bias=False)
    o = LIFOptions(SIGMOID, 4)

    def run(x):
        return lif_multi_step(layer(x), None, o, decay=0.5).spikes

    def differentiated(call):
        layer.weight.grad = None
        spikes = call(x)
        spikes.square().sum().backward()
        return spikes.detach(), layer.weight.grad.clone()

    with use_backend("native"):
        expected = differentiated(run)
        if how == "inference":
            with torch.inference_mode():
                assert torch.equal(run(x), expected[0])
            got = differentiated(run)  # and what was prepared there serves no gradient
        elif how == "autocast":
            with torch.autocast("cpu", torch.bfloat16, enabled=True):
                assert run(x.bfloat16()).dtype == torch.bfloat16
            got = differentiated(run)
        elif how == "compiled":
            got = differentiated(torch.compile(run, backend="aot_eager", fullgraph=True))
        elif how == "checkpointed":
            got = differentiated(
                lambda x: torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)
            )
        else:
            with ThreadPoolExecutor(4) as pool:
                runs = pool.map(lambda _: run(x).detach(), range(8))
                assert all(torch.equal(spikes, expected[0]) for spikes in runs)
            got = differentiated(run)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=1e-6, atol=1e-6)


def test_no_library_is_no_error_unless_asked_for(monkeypatch):
    monkeypatch.setattr(_native, "library", lambda: None)
    x = torch.randn(3, 40)
    expected = lif_multi_step(x, None, LIFOptions(SIGMOID, 4), decay=0.5, backend="eager")
    got = lif_multi_step(x, None, LIFOptions(SIGMOID, 4), decay=0.5, backend="auto")
    assert torch.equal(got.spikes, expected.spikes)
    with pytest.raises(ConfigError, match="without a C compiler"), use_backend("native"):
        pass


def test_a_library_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(_native, "_LAYOUT", 0)
    _native.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="another version"):
            assert _native.library() is None
    finally:
        _native.library.cache_clear()


def test_shapes_that_do_not_fit_are_errors():
    x, params = torch.randn(3, 5, 7), torch.tensor([0.5, 1.0, 0.0, 1.0])
    o = LIFOptions(SIGMOID, 4)
    with pytest.raises(RuntimeError):
        _native.lif_forward(LIBRARY, o, x, torch.randn(4, 7), params, None)
    with pytest.raises(ValueError, match="4 numbers"):
        _native.lif_forward(LIBRARY, o, x, None, params[:3], None)
    row = torch.randn(1, 7)  # has the strides of a whole state
    got = _native.lif_forward(LIBRARY, o, x, row, params, None)
    expected = _native.lif_forward(LIBRARY, o, x, row.expand(5, 7).contiguous(), params, None)
    assert torch.equal(got[0], expected[0])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("preset", reference.PRESET_MEMBRANE)
def test_oracle_of_the_delayed_reset(bits, order, preset):
    options = reference.PRESET_MEMBRANE[preset]
    atan = Surrogate("atan", 2.0, 0.0, True)
    x, v = torch.randn(5, 40).double() * 1.5, torch.randn(40).double()
    g_s, g_v = torch.randn(5, 40).double(), torch.randn(40).double()
    for mechanism, theta in itertools.product(("subtract", "zero", "none"), (1.0, 0.3)):
        oracle = reference.SnnTorchLeaky(
            reference.Membrane(bits, **options), 0.8, theta, mechanism, True, order=order,
            derivative=reference.atan_derivative,
        )  # fmt: skip
        o = LIFOptions(
            atan, bits, options["scale"], squash=options["squash"], order=order, delayed=True,
            reset={"subtract": "soft", "zero": "hard", "none": "none"}[mechanism],
        )  # fmt: skip
        params = torch.tensor([0.8, 1.0, 0.0, theta], dtype=torch.float64)
        trace = oracle.forward(x.numpy(), v.numpy())
        g_states = np.zeros((5, 40))
        g_states[-1] = g_v
        expected = oracle.backward(trace, g_s.numpy(), g_states)
        for save in ("input", "charge"):
            got, grads = native(replace(o, save=save), x, v, params, None, g_s, g_v, torch.zeros(5))
            np.testing.assert_array_equal(got[0], trace.stack("s"))
            np.testing.assert_allclose(got[1], trace.steps[-1]["v"], atol=1e-12)
            np.testing.assert_allclose(grads[0], expected["x"], rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(grads[1], expected["m0"], rtol=1e-9, atol=1e-12)
            if save == "input":
                np.testing.assert_allclose(grads[2][0], expected["beta"], rtol=1e-9, atol=1e-10)
                np.testing.assert_allclose(grads[2][3], expected["theta"], rtol=1e-9, atol=1e-10)


# --------------------------------------------------------------------------- threads


@pytest.fixture
def many_threads(monkeypatch):
    """Three threads, each with work from one block on."""
    before = torch.get_num_threads()
    monkeypatch.setattr(_native, "PER_THREAD", 64)
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("mode", ["dynamic", "running", "given"])
def test_threads_change_nothing(many_threads, mode):
    if not LIBRARY.threaded:
        pytest.skip("PyTorch has no OpenMP that could be found")
    for size in (1, 1000, 1025, 7000):
        x, v = torch.randn(4, size) * 1.5, torch.randn(size)
        o = LIFOptions(SIGMOID, 4, alpha=mode)
        check(o, x, v, (0.7, 0.4, 0.1, 0.9), None if mode == "dynamic" else 0.9)


def test_threads_are_those_of_torch():
    """One pool: the threads of this process are no more after a kernel than before."""
    program = """
import os, torch
torch.set_num_threads(4)
torch.randn(1 << 20).exp()
before = len(os.listdir("/proc/self/task"))
from qsnn_ext.kernels import LIFOptions, Surrogate, _native
lib = _native.library()
o = LIFOptions(Surrogate("triangle", 1.0, 0.0, False), 4)
x = torch.randn(4, 1 << 18)
for _ in range(3):
    _native.lif_forward(lib, o, x, None, torch.tensor([0.5, 1, 0, 1]), None)
assert not lib.threaded or len(os.listdir("/proc/self/task")) == before
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("counts threads in /proc")
    done = fresh.run(program)
    assert done.returncode == 0, done.stderr


def test_a_forked_process_does_not_wait_for_threads_it_lacks():
    program = """
import os, sys, torch
torch.set_num_threads(4)
from qsnn_ext.kernels import LIFOptions, Surrogate, _native
lib = _native.library()
o = LIFOptions(Surrogate("triangle", 1.0, 0.0, False), 4)
x = torch.randn(4, 1 << 18)
call = lambda: _native.lif_forward(lib, o, x, None, torch.tensor([0.5, 1, 0, 1]), None)[0]
expected = call()
child = os.fork()
if child == 0:
    # Not torch.equal, which would wait itself.
    os._exit(0 if (call().numpy() == expected.numpy()).all() else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = fresh.run(program)
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------- binary weights

WEIGHTS = list(
    itertools.product(
        ("layer", "channel", None),
        ("mean", "power_of_two", None),
        ("clipped", "identity", "annealed"),
    )
)


def native_weight(options, w, g, temperature):
    standardize, scale, gradient = (o or "none" for o in options)
    value, *statistics = _native.weight_forward(LIBRARY, w, standardize, scale)
    grad = _native.weight_backward(LIBRARY, g, w, *statistics, temperature, standardize, gradient)
    return value, grad


@pytest.mark.parametrize("options", WEIGHTS, ids=lambda o: "-".join(map(str, o)))
@pytest.mark.parametrize("shape", [(5, 27), (4, 7), (2, 3), (64, 129)], ids=str)
def test_weights_are_the_quantizers(options, shape):
    torch.manual_seed(0)
    w, g = torch.randn(shape) + 0.1, torch.randn(shape)
    value, grad = native_weight(options, w, g, 0.7)
    leaf = w.clone().requires_grad_()
    expected = BinaryWeight(*options, temperature=0.7)(leaf)
    expected.backward(g)
    torch.testing.assert_close(value, expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", WEIGHTS, ids=lambda o: "-".join(map(str, o)))
def test_weights_of_the_oracle(options, many_threads):
    over, scale, gradient = options
    w, g = torch.randn(9, 50).double() + 0.1, torch.randn(9, 50).double()
    value, grad = native_weight(options, w, g, 0.7)
    expected = reference.binary_weight(w.numpy(), over, scale)[0]
    np.testing.assert_allclose(value, expected, rtol=1e-13)
    expected = reference.binary_weight_gradient(w.numpy(), g.numpy(), over, scale, gradient, 0.7)
    np.testing.assert_allclose(grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("over", ["layer", "channel", "none"])
def test_odd_weights(over):
    w = torch.full((3, 4), 0.3)
    value, mean, std, _ = _native.weight_forward(LIBRARY, w, over, "none")
    assert torch.equal(value, torch.ones(3, 4))
    assert torch.equal(mean, w[: len(mean), :1] if over != "none" else torch.zeros(1, 1))
    assert torch.equal(std, torch.ones_like(std))
    w = torch.randn(3, 4)
    w[1, 2] = torch.nan
    value = _native.weight_forward(LIBRARY, w, over, "mean")[0]
    assert value[1].isnan().all() if over != "none" else value[1].isnan().any()
    assert value.isnan().all() == (over == "layer")
    for shape in ((0, 4), (3, 0), (3, 1)):
        _native.weight_forward(LIBRARY, torch.randn(shape), "none", "mean")
