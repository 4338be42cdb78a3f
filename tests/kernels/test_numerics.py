"""One meaning of half precision and of infinite currents, however a layer runs.

What is compiled is one case of each, in a test of its own: compiling takes longest.
"""

import itertools

import pytest
import torch

from qsnn_ext.kernels import LIFOptions, Surrogate, _native, lif_multi_step, use_backend
from qsnn_ext.kernels.grid import narrowed
from qsnn_ext.snntorch import QLeaky
from qsnn_ext.snntorch import Triangle as Strict
from qsnn_ext.spikingjelly import QuantLIFNode, Triangle

SIGMOID = Surrogate("sigmoid", 4.0, 0.0, False)
UNCOMPILED = ("eager", "function", *["native"] * (_native.library() is not None))
BACKENDS = (*UNCOMPILED, "compiled")
halves = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
resets = pytest.mark.parametrize("reset", ["hard", "soft", "none"])
orders = pytest.mark.parametrize("order", ["fire_first", "quantize_first"])


def everywhere(x, options, backends=BACKENDS, **numbers):
    """Spikes, last state and gradient of each backend."""
    results = {}
    for backend in backends:
        leaf = x.detach().clone().requires_grad_()
        r = lif_multi_step(leaf, None, options, backend=backend, **numbers)
        r.spikes.float().sum().backward()
        results[backend] = (r.spikes.detach(), r.v.detach(), leaf.grad)
    return results


def is_the_same(x, options, backends):
    runs = everywhere(x, options, backends, decay=0.7)
    spikes, state, grad = runs.pop("eager")
    for got in runs.values():
        assert torch.equal(got[0], spikes)
        assert torch.equal(got[1], state)
        torch.testing.assert_close(got[2], grad, rtol=0.05, atol=0.02)


@halves
@orders
@resets
def test_half_precision_is_the_same_everywhere(dtype, order, reset):
    x = (torch.randn(3, 300) * 1.5).to(dtype)
    for bits, squash in ((4, None), (None, None), (8, "tanh")):
        options = LIFOptions(SIGMOID, bits, squash=squash, order=order, reset=reset)
        is_the_same(x, options, UNCOMPILED)


@pytest.mark.slow
@halves
def test_half_precision_is_the_same_compiled(dtype):
    is_the_same((torch.randn(3, 300) * 1.5).to(dtype), LIFOptions(SIGMOID, 4), BACKENDS)


@pytest.mark.parametrize(
    "backends",
    [UNCOMPILED, pytest.param(("compiled",), marks=pytest.mark.slow)],
    ids=["here", "compiled"],
)
@halves
def test_a_state_is_rounded_to_half_precision_after_every_step(dtype, backends):
    """Written out: a float32 step, and what is carried has the input's dtype."""
    x = (torch.randn(5, 400) * 1.5).to(dtype)
    v = torch.zeros(400)
    spikes = []
    for step in x.float():
        h = 0.7 * v + step
        s = (h >= 1).float()
        v = (h * (1 - s)).to(dtype).float()
        spikes.append(s)
    for backend in backends:
        r = lif_multi_step(x, None, LIFOptions(SIGMOID, None), decay=0.7, backend=backend)
        assert torch.equal(r.spikes.float(), torch.stack(spikes)), backend
        assert torch.equal(r.v.float(), v), backend


@halves
def test_rounding_by_bits_is_the_conversion(dtype, monkeypatch):
    numbers = torch.cat([
        torch.randint(-(2**31), 2**31 - 1, (200_000,), dtype=torch.int64).int().view(torch.float32),
        torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 65504.0, 65519.0, 65520.0, -7e4, 6e-8]),
        torch.randn(1000) * 1e-6,
    ])  # fmt: skip
    expected = narrowed(numbers, dtype)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    got = narrowed(numbers, dtype)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(0.0), expected.nan_to_num(0.0))


def step_modes_agree(dtype, backend, **options):
    x = (torch.randn(3, 6, 200) * 1.5).to(dtype)
    node = QuantLIFNode(bits=4, step_mode="m", **options)
    with use_backend(backend), torch.no_grad():
        whole = node(x)
        last = node.v
        node.reset()
        node.step_mode = "s"
        steps = torch.stack([node(step) for step in x])
    assert torch.equal(whole, steps)
    assert torch.equal(last, node.v)


@halves
@orders
def test_step_modes_agree_in_half_precision(dtype, order):
    step_modes_agree(dtype, "eager", v_reset=0.0, order=order)
    step_modes_agree(dtype, "function", v_reset=None, order=order)


@pytest.mark.slow
def test_step_modes_agree_in_half_precision_compiled():
    step_modes_agree(torch.bfloat16, "compiled", v_reset=0.0)


@halves
@orders
@pytest.mark.parametrize("mechanism", ["subtract", "zero"])
def test_a_spike_is_reset_once_in_half_precision(dtype, order, mechanism):
    """The stored potential keeps to its side of a threshold that half precision cannot hold."""
    node = QLeaky(0.9, 0.3, Strict(), reset_mechanism=mechanism, bits=4, order=order)
    mem = torch.zeros(500, dtype=dtype)
    for _ in range(5):
        spikes, mem = node((torch.randn(500) * 0.5).to(dtype), mem)
        assert spikes.dtype == mem.dtype == dtype
        assert torch.equal(mem.float() > node.threshold, spikes.bool())


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("bits", [2, 4])
@orders
@resets
def test_a_current_that_is_no_number_harms_its_neuron_alone(bad, bits, order, reset):
    for scale, mode in itertools.product(("max", "absmax"), ("dynamic", "given", "running")):
        options = LIFOptions(SIGMOID, bits, scale, mode, order=order, reset=reset)
        harms_its_neuron_alone(bad, options, UNCOMPILED)


@pytest.mark.slow
def test_a_current_that_is_no_number_harms_its_neuron_alone_compiled():
    for bits, scale, mode in ((2, "max", "dynamic"), (4, "absmax", "given")):
        harms_its_neuron_alone(torch.inf, LIFOptions(SIGMOID, bits, scale, mode), BACKENDS)


def harms_its_neuron_alone(bad, options, backends):
    alpha = None if options.alpha == "dynamic" else torch.tensor(0.9)
    x = torch.randn(3, 50) * 1.5
    kept = torch.arange(50) != 7
    broken = x.clone()
    broken[1, 7] = bad
    runs = {}
    for backend in backends:
        r = lif_multi_step(broken, None, options, decay=0.7, alpha=alpha, backend=backend)
        # Its potential may have been the largest, so the clean run leaves the neuron out.
        clean = lif_multi_step(x[:, kept], None, options, decay=0.7, alpha=alpha, backend=backend)
        first = lif_multi_step(x[:1], None, options, decay=0.7, alpha=alpha, backend=backend)
        assert r.v[7].isnan()
        assert torch.isfinite(r.v[kept]).all()
        assert torch.equal(r.spikes[0], first.spikes[0])
        if options.alpha == "given":
            assert torch.equal(r.spikes[:, kept], clean.spikes)
            assert torch.equal(r.v[kept], clean.v)
        runs[backend] = r
    for r in runs.values():
        for name in ("spikes", "v", "alphas", "running_alpha"):
            a, b = getattr(r, name), getattr(runs["eager"], name)
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("mechanism", ["subtract", "zero", "none"])
@pytest.mark.parametrize("delay", [True, False])
def test_snntorchs_neuron_holds_an_infinite_current_alike(bad, mechanism, delay):
    holds_an_infinite_current_alike(bad, mechanism, delay, UNCOMPILED)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [True, False])
def test_snntorchs_neuron_holds_an_infinite_current_alike_compiled(delay):
    holds_an_infinite_current_alike(torch.inf, "zero", delay, BACKENDS)


def holds_an_infinite_current_alike(bad, mechanism, delay, backends):
    x = torch.randn(3, 50)
    x[1, 7] = bad
    runs = []
    for backend in backends:
        node = QLeaky(
            0.9, spike_grad=Strict(), reset_mechanism=mechanism, reset_delay=delay, bits=3
        )
        with use_backend(backend), torch.no_grad():
            mem = torch.zeros(50)
            for step in x:
                spikes, mem = node(step, mem)
        assert mem[7].isnan()
        assert torch.isfinite(mem[torch.arange(50) != 7]).all()
        runs.append((spikes, mem))
    for got in runs[1:]:
        for a, b in zip(got, runs[0], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_the_papers_surrogate_can_leave_the_threshold_itself_silent():
    x = torch.tensor([[0.0, 1.0, 1.001]])
    for strict, expected in ((False, [0.0, 1.0, 1.0]), (True, [0.0, 0.0, 1.0])):
        for backend in UNCOMPILED:
            node = QuantLIFNode(
                decay_input=False, bits=2, surrogate_function=Triangle(strict=strict)
            )
            with use_backend(backend):
                assert node(x)[0].tolist() == expected
