"""The fused multi-step LIF against the eager loop it replaces."""

import itertools
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsnn_ext import kernels
from qsnn_ext.errors import ConfigError
from qsnn_ext.kernels import LIFOptions, Surrogate, lif_multi_step
from qsnn_ext.kernels import backend as kernel_backend
from tests.pairwise import pairwise

SIGMOID = Surrogate("sigmoid", 4.0, 0.0, False)


def both(options, x, v=None, *, backend="function", decay=0.5, gain=1.0, offset=0.0, alpha=None):
    """``[spikes, v, alphas, running alpha, counts], gradients`` of the fused and the eager run."""
    results = []
    for chosen in (backend, "eager"):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        first = None if v is None else v.detach().clone().requires_grad_()
        numbers = [
            n.detach().clone().requires_grad_() if isinstance(n, torch.Tensor) else n
            for n in (decay, gain, offset)
        ]
        r = lif_multi_step(
            leaf, first, options, decay=numbers[0], gain=numbers[1], offset=numbers[2],
            alpha=alpha, backend=chosen,
        )  # fmt: skip
        rng = torch.Generator().manual_seed(1)
        weight = torch.randn(r.spikes.shape, generator=rng).to(x.dtype)
        weight_v = torch.randn(r.v.shape, generator=rng).to(x.dtype)
        steps = torch.arange(len(r.counts), dtype=torch.float32)
        loss = (r.spikes * weight).sum() + (r.v * weight_v).sum() + 0.01 * (r.counts * steps).sum()
        loss.backward()
        leaves = [leaf, first, *[n for n in numbers if isinstance(n, torch.Tensor)]]
        forward = [r.spikes, r.v, r.alphas, r.running_alpha, r.counts]
        results.append(([t.detach() for t in forward], [t.grad for t in leaves if t is not None]))
    return results


def assert_equal(results, forward_tolerance=0.0, gradient_tolerance=1e-6):
    (fused, fused_grads), (eager, eager_grads) = results
    for got, expected in zip(fused, eager, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(
            got, expected, rtol=forward_tolerance, atol=forward_tolerance, equal_nan=True
        )
    for got, expected in zip(fused_grads, eager_grads, strict=True):
        assert got.shape == expected.shape
        if expected.numel():
            # Gradients of 0-dim parameters are sums with cancellation: measured against 1.
            size = max(expected.abs().max().item(), 1.0)
            assert (got - expected).abs().max().item() <= gradient_tolerance * size * 4


ALPHAS = ("dynamic", "running", "given")
RESETS = ("hard", "soft", "none")
ORDERS = ("fire_first", "quantize_first")


@pytest.mark.parametrize("bits", [None, 2, 3, 4, 8])
@pytest.mark.parametrize("scale", ["max", "absmax"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("reset", RESETS)
def test_every_option(bits, scale, order, reset):
    x, v = torch.randn(3, 5, 7) * 1.5, torch.randn(5, 7)
    for mode, squash, detach, state, v_reset in pairwise(
        ALPHAS if bits else ("dynamic",), (None, "tanh"), (False, True), (None, v), (0.0, -0.3)
    ):
        options = LIFOptions(SIGMOID, bits, scale, mode, 0.1, squash, order, reset, v_reset, detach)
        alpha = None if mode == "dynamic" else torch.tensor(0.9)
        assert_equal(both(options, x, state, alpha=alpha))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("bits", [None, 2, 4])
def test_learnable_parameters(order, reset, bits):
    x, v = torch.randn(4, 5, 7) * 1.5, torch.randn(5, 7)
    options = LIFOptions(SIGMOID, bits, order=order, reset=reset)
    number = torch.tensor
    for state in (None, v):
        assert_equal(
            both(options, x, state, decay=number(0.6), gain=number(0.4), offset=number(0.1)),
            gradient_tolerance=1e-5,
        )


@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    steps=st.integers(1, 4),
    bits=st.sampled_from([None, 2, 4, 8]),
    kind=st.sampled_from(["normal", "zero", "negative", "threshold"]),
    order=st.sampled_from(ORDERS),
    reset=st.sampled_from(RESETS),
    scale=st.sampled_from(["max", "absmax"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_odd_inputs(shape, steps, bits, kind, order, reset, scale, dtype, seed):
    x = torch.randn(steps, *shape, generator=torch.Generator().manual_seed(seed))
    x = {"normal": x, "zero": x * 0, "negative": -x.abs(), "threshold": x.round()}[kind].to(dtype)
    options = LIFOptions(SIGMOID, bits, scale, order=order, reset=reset)
    # bfloat16 gradients are rounded once at the end of a step here, at every operation there.
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
    assert_equal(both(options, x), gradient_tolerance=tolerance)


@pytest.mark.parametrize("surrogate", [
    SIGMOID, Surrogate("triangle", 0.7, 0.0, True), Surrogate("atan", 2.0, 0.0, False)
], ids=lambda s: s.kind)  # fmt: skip
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("reset", RESETS)
def test_float64_gradients(surrogate, detach, reset):
    """Relative to the largest gradient, with no allowance for rounding to float32."""
    x, v = torch.randn(5, 9, 13, dtype=torch.float64) * 1.5, torch.randn(9, 13).double()
    for bits, order, squash in itertools.product((None, 2, 4, 8), ORDERS, (None, "tanh")):
        options = LIFOptions(
            surrogate, bits, order=order, squash=squash, reset=reset, detach_reset=detach
        )
        (_, fused), (_, eager) = both(options, x, v, decay=0.7)
        for got, expected in zip(fused, eager, strict=True):
            assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_bfloat16_is_computed_in_float32():
    x = torch.randn(3, 40).to(torch.bfloat16)
    options = LIFOptions(SIGMOID, None, reset="none")
    v = torch.zeros(40)
    for t in range(3):
        v = (0.5 * v + x[t].float()).to(torch.bfloat16).float()
    assert torch.equal(lif_multi_step(x, None, options, decay=0.5).v.float(), v)


@pytest.mark.parametrize("steps", [1, 3])
def test_memory_orders(steps):
    options = LIFOptions(SIGMOID, 4)
    dense = torch.randn(steps * 2, 3, 5, 4)
    last = dense.to(memory_format=torch.channels_last).view(steps, 2, 3, 5, 4)
    assert_equal(both(options, last))
    result = lif_multi_step(last, None, options, decay=0.5)
    assert result.spikes.stride() == last.stride()
    assert result.v.stride() == last[0].stride()
    strided = torch.randn(5, steps, 8).transpose(0, 1)[..., ::2]
    assert_equal(both(options, strided))
    assert_equal(both(options, torch.randn(steps, 1, 4).expand(steps, 3, 4)))


def test_states_are_no_views():
    """Hosts detach states in place."""
    x = torch.randn(2, 3, requires_grad=True)
    lif_multi_step(x, None, LIFOptions(SIGMOID), decay=0.5).v.detach_()


def test_nan_and_infinity_stay_visible():
    for bad in (torch.nan, torch.inf):
        x = torch.ones(3, 4) * 0.5
        x[0, 1] = bad
        for bits, reset in itertools.product((2, 4), ("soft", "none")):
            (fused, _), (eager, _) = both(LIFOptions(SIGMOID, bits, reset=reset), x)
            assert torch.equal(fused[1].isnan(), eager[1].isnan())
            assert fused[1].isnan().any()


@pytest.mark.parametrize("save", ["input", "charge"])
def test_saves_at_most_the_input(save):
    x = torch.randn(4, 1000, requires_grad=True)
    saved = []
    options = LIFOptions(SIGMOID, 4)
    state = None if save == "input" else torch.zeros(1000)
    with (
        kernels.use_backend("function"),
        pytest.MonkeyPatch.context() as patch,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        patch.setattr("qsnn_ext.kernels.lif._recompute", lambda x: save == "input")
        result = lif_multi_step(x, state, options, decay=0.5)
    large = [t for t in saved if t.numel() >= 1000]
    assert sum(t.numel() for t in large) <= x.numel()
    assert (large[0].data_ptr() == x.data_ptr()) == (save == "input")
    result.spikes.sum().backward()


def test_both_ways_of_saving_agree():
    x = torch.randn(4, 30) * 1.5
    for order, squash in itertools.product(ORDERS, (None, "tanh")):
        options = LIFOptions(SIGMOID, 4, order=order, squash=squash)
        grads = []
        for recompute in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("qsnn_ext.kernels.lif._recompute", lambda x, r=recompute: r)
                leaf = x.clone().requires_grad_()
                lif_multi_step(leaf, None, options, decay=0.5).spikes.square().sum().backward()
                grads.append(leaf.grad)
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chosen", ["function", "auto", "eager"])
def test_the_backward_runs_as_its_forward_did(chosen):
    """Whatever is chosen by then: a tanh of another library does not equal the largest of ours."""
    options = LIFOptions(SIGMOID, 2, squash="tanh")
    grads = []
    for outside in (chosen, "function", "auto"):
        leaf = (
            torch.randn(2, 40, generator=torch.Generator().manual_seed(3)) * 1.5
        ).requires_grad_()
        with kernels.use_backend(chosen):
            loss = lif_multi_step(leaf, None, options, decay=0.5).v.sum()
        with kernels.use_backend(outside):
            loss.backward()
        grads.append(leaf.grad)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


def test_count_carries_the_gradient_of_the_rate():
    x = torch.randn(3, 20, requires_grad=True)
    result = lif_multi_step(x, None, LIFOptions(SIGMOID), decay=0.5)
    (by_count,) = torch.autograd.grad(result.counts.sum().square(), x, retain_graph=True)
    (by_spikes,) = torch.autograd.grad(result.spikes.sum().square(), x)
    torch.testing.assert_close(by_count, by_spikes)
    assert by_count.abs().sum() > 0


@pytest.mark.parametrize("options", [
    LIFOptions(SIGMOID),
    LIFOptions(SIGMOID, 4, alpha="running", save="charge"),
    LIFOptions(Surrogate("atan", 2.0, 0.0, True), None, reset="soft", save="input"),
], ids=["inference", "running", "float"])  # fmt: skip
def test_opcheck(options):
    alpha = torch.tensor(0.8) if options.alpha == "running" else None
    params = torch.tensor([0.5, 1.0, 0.0, 1.0])
    x = torch.randn(3, 2, 4, requires_grad=options.save != "nothing")
    v = torch.randn(2, 4)
    op = torch.ops.qsnn_ext.lif_multi_step.default
    torch.library.opcheck(op, (x, v, params, alpha, options.encode()))
    _, _, alphas, _, charges = op(x.detach(), v, params, alpha, options.encode())
    if options.save != "nothing":
        saved = charges if options.save == "charge" else x.detach()
        first = None if options.save == "charge" else v
        args = (torch.randn(3, 2, 4), None, None, saved, first, params, alphas, options.encode())
        op = torch.ops.qsnn_ext.lif_multi_step_backward.default
        torch.library.opcheck(op, (*args, True, False))


def test_wrong_use_is_an_error():
    x = torch.randn(2, 3)
    with pytest.raises(ConfigError, match="alpha"):
        lif_multi_step(x, None, LIFOptions(SIGMOID, alpha="given"), decay=0.5)
    with pytest.raises(ConfigError, match="alpha"):
        lif_multi_step(x, None, LIFOptions(SIGMOID), decay=0.5, alpha=torch.tensor(1.0))
    with pytest.raises(ConfigError, match="cuda"):
        lif_multi_step(x, None, LIFOptions(SIGMOID), decay=0.5, backend="cuda")
    with pytest.raises(ConfigError, match="fast"), kernels.use_backend("fast"):
        pass


def test_options_survive_the_string():
    from qsnn_ext.kernels.options import decode

    options = LIFOptions(
        Surrogate("slope_above", 0.1, 1e-30, True), 8, "absmax", "given", 0.3, "tanh",
        "quantize_first", "soft", -0.25, True, True, "charge",
    )  # fmt: skip
    assert decode(options.encode()) == options


def test_no_compiler_is_no_error(caplog, monkeypatch):
    """A compiler that fails is asked once; one line says so and the results are the same."""
    monkeypatch.setattr("qsnn_ext.kernels._native.library", lambda: None)

    def broken(*args, **kwargs):
        raise RuntimeError("no compiler here")

    kernel_backend.clear()
    x = torch.randn(2, 1 << 15)
    with (
        pytest.MonkeyPatch.context() as patch,
        kernels.use_backend("auto"),
        caplog.at_level(logging.DEBUG, logger="qsnn_ext.kernels.backend"),
    ):
        patch.setattr(torch, "compile", lambda fn, **kwargs: broken)
        first = lif_multi_step(x, None, LIFOptions(SIGMOID), decay=0.5)
        lif_multi_step(x, None, LIFOptions(SIGMOID, 4), decay=0.5)
        with kernels.use_backend("compiled"), pytest.raises(RuntimeError, match="no compiler"):
            lif_multi_step(x, None, LIFOptions(SIGMOID, 8), decay=0.5)
    kernel_backend.clear()
    announced, told, again = caplog.records
    assert "compiling the forward kernel for cpu" in announced.message
    assert announced.levelname == "WARNING"
    assert "no compiler here" in told.message
    assert again.message == announced.message  # asked for by name, it tries again
    expected = lif_multi_step(x, None, LIFOptions(SIGMOID), decay=0.5, backend="eager")
    assert torch.equal(first.spikes, expected.spikes)


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    LIFOptions(SIGMOID, 2),
    LIFOptions(Surrogate("atan", 2.0, 0.0, True), 4, "absmax", "running", squash="tanh"),
    LIFOptions(Surrogate("triangle", 1.0, 0.0, False), 8, order="quantize_first", reset="soft"),
], ids=["2", "4-running-tanh", "8-algorithm1-soft"])  # fmt: skip
def test_compiled(options):
    """One compilation serves all sizes; odd ones included."""
    tolerance = 1e-6 if options.squash else 0.0
    alpha = torch.tensor(0.9) if options.alpha == "running" else None
    kernel_backend.clear()
    for shape in [(3, 5, 7), (3, 64), (3, 11, 13), (3, 1), (3, 0), (3, 2, 3, 5)]:
        if not all(shape) and alpha is not None:
            continue  # the eager loop moves a running scale towards 0 when a batch is empty
        x = torch.randn(shape) * 1.5
        assert_equal(both(options, x, backend="compiled", alpha=alpha), tolerance)
    assert len(kernel_backend._cores) <= 4


def test_long_sequences_are_not_compiled_unasked(monkeypatch):
    """Compiling takes longer the longer the sequence."""
    monkeypatch.setattr("qsnn_ext.kernels._native.library", lambda: None)
    monkeypatch.setattr(kernel_backend, "_broken", None)
    with kernels.use_backend("auto"):
        assert kernel_backend.compiles(1 << 20, kernel_backend.LONGEST)
        assert not kernel_backend.compiles(1 << 20, kernel_backend.LONGEST + 1)
    with kernels.use_backend("compiled"):
        assert kernel_backend.compiles(1, kernel_backend.LONGEST + 1)
    x = torch.randn(kernel_backend.LONGEST + 1, 2048, requires_grad=True)
    monkeypatch.setattr(torch, "compile", None)
    monkeypatch.setattr(kernel_backend, "_cores", {})
    lif_multi_step(x, None, LIFOptions(SIGMOID), decay=0.5).spikes.sum().backward()
    assert kernel_backend._broken is None


def test_traces_for_a_device_that_is_not_there():
    """Shapes and layouts of the operation and its backward, on CUDA tensors without data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    options = LIFOptions(SIGMOID, 4, save="input").encode()
    with FakeTensorMode():
        x = torch.empty(3, 2, 5, 4, device="cuda").transpose(2, 3)
        params = torch.empty(4, device="cuda")
        op, back = torch.ops.qsnn_ext.lif_multi_step, torch.ops.qsnn_ext.lif_multi_step_backward
        spikes, v, alphas, counts, _ = op(x, None, params, None, options)
        g_x, _, _ = back(spikes, None, None, x, None, params, alphas, options, False, False)
    assert all(t.device.type == "cuda" for t in (spikes, v, alphas, counts, g_x))
    assert spikes.stride() == g_x.stride() == x.stride()
    assert v.stride() == x.stride()[1:]
