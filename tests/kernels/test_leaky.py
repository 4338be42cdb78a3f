"""QLeaky's fused step, with the reset delayed or in the step, against the eager loop."""

import itertools

import pytest
import torch

from qsnn_ext import kernels
from qsnn_ext.kernels import LIFOptions, Surrogate
from qsnn_ext.regularizers import WSDRRegularizer
from tests.pairwise import pairwise

snn = pytest.importorskip("snntorch")
from qsnn_ext.snntorch import QLeaky, Triangle  # noqa: E402


def run(node, x, backend):
    """Spikes, last state, gradients of the input and of the decay."""
    leaf = x.clone().requires_grad_()
    mem = torch.zeros_like(x[0])
    spikes = []
    with kernels.use_backend(backend):
        for step in leaf:
            spk, mem = node(step, mem)
            spikes.append(spk)
    spikes = torch.stack(spikes)
    rng = torch.Generator().manual_seed(1)
    weights = torch.randn(spikes.shape, generator=rng), torch.randn(mem.shape, generator=rng)
    ((spikes * weights[0]).sum() + (mem * weights[1]).sum()).backward()
    grad_beta = node.beta.grad if node.beta.requires_grad else torch.zeros(())
    node.beta.grad = None
    return spikes.detach(), mem.detach(), leaf.grad, grad_beta


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("order", ["fire_first", "quantize_first"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("learn_beta", [False, True])
def test_equals_plain_operations(reset, order, bits, learn_beta):
    options = pairwise(
        ("max", "absmax"), (None, "tanh"), (None, Triangle(0.8)), (1.0, 2.0), (1.0, 0.3)
    )
    for scale, squash, surrogate, graded, theta in options:
        node = QLeaky(
            0.8, bits=bits, scale=scale, squash=squash, order=order, reset_mechanism=reset,
            learn_beta=learn_beta, spike_grad=surrogate, graded_spikes_factor=graded,
            threshold=theta,
        )  # fmt: skip
        x = torch.randn(4, 3, 5)
        fused, plain = run(node, x, "function"), run(node, x, "eager")
        assert torch.equal(fused[0], plain[0])
        assert torch.equal(fused[1], plain[1])
        for got, expected in zip(fused[2:], plain[2:], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_frozen_scale(mode):
    results = []
    for backend in ("function", "eager"):
        torch.manual_seed(0)
        node = QLeaky(0.8, bits=4)
        node.membrane.freeze(0.9)
        getattr(node, mode)()
        results.append((*run(node, torch.randn(4, 3, 5), backend), node.membrane.alpha))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_changed_threshold_and_decay_are_noticed():
    node, x = QLeaky(0.8, bits=4), torch.randn(3, 2, 5)
    run(node, x, "function")
    node.beta.fill_(0.3)
    node.threshold.fill_(0.2)
    fused, plain = run(node, x, "function"), run(node, x, "eager")
    assert torch.equal(fused[0], plain[0])
    assert torch.equal(fused[1], plain[1])


def test_regularizer_takes_the_count():
    torch.manual_seed(0)
    net = torch.nn.ModuleList([torch.nn.Linear(5, 6), QLeaky(0.8, bits=2)])
    wsdr = WSDRRegularizer(net, strength=1.0, exclude=None)
    x, grads, losses = torch.randn(3, 2, 5), [], []
    for backend in ("function", "eager"):
        net.zero_grad()
        mem = torch.zeros(2, 6)
        with kernels.use_backend(backend):
            for step in x:
                _, mem = net[1](net[0](step), mem)
            loss = wsdr()
        loss.backward()
        losses.append(loss.item())
        grads.append(net[0].weight.grad.clone())
    assert losses[0] == pytest.approx(losses[1])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("reset", ["hard", "soft"])
@pytest.mark.parametrize("save", ["charge", "input"])
def test_opcheck(reset, save):
    options = LIFOptions(
        Surrogate("atan", 2.0, 0.0, True), 4, reset=reset, delayed=True, save=save
    ).encode()
    x, mem = torch.randn(2, 3, 4, requires_grad=True), torch.randn(3, 4)
    params = torch.tensor([0.8, 1.0, 0.0, 1.0, 1.0000001])
    op = torch.ops.qsnn_ext.lif_multi_step.default
    torch.library.opcheck(op, (x, mem, params, None, options))
    _, _, alphas, _, charges = op(x.detach(), mem, params, None, options)
    saved = charges if save == "charge" else x.detach()
    args = (torch.randn(2, 3, 4), None, None, saved, mem, params, alphas, options, True)
    op = torch.ops.qsnn_ext.lif_multi_step_backward.default
    torch.library.opcheck(op, (*args, save == "input"))


@pytest.mark.parametrize("reset", ["hard", "soft", "none"])
@pytest.mark.parametrize("order", ["fire_first", "quantize_first"])
@pytest.mark.parametrize("learn", [False, True])
def test_several_delayed_steps_at_once(reset, order, learn):
    """Gradients of input, state, decay and threshold through time, either way of saving."""
    for bits, squash, scale in itertools.product((None, 2, 4), (None, "tanh"), ("max", "absmax")):
        options = LIFOptions(
            Surrogate("atan", 2.0, 0.0, True), bits, scale, squash=squash, order=order,
            reset=reset, delayed=True,
        )  # fmt: skip
        results = []
        for backend in ("eager", "function"):
            torch.manual_seed(1)
            x = (torch.randn(4, 30) * 1.5).requires_grad_()
            v = torch.randn(30, requires_grad=True)
            numbers = {
                name: torch.tensor(value, requires_grad=learn)
                for name, value in (("decay", 0.7), ("threshold", 1.0))
            }
            r = kernels.lif_multi_step(x, v, options, backend=backend, **numbers)
            weight = torch.randn(4, 30)
            ((r.spikes * weight).sum() + (r.v * weight[0]).sum()).backward()
            leaves = [x, v, *(numbers.values() if learn else ())]
            results.append(([r.spikes, r.v, r.alphas], [leaf.grad for leaf in leaves]))
        (eager, eager_grads), (fused, fused_grads) = results
        assert all(map(torch.equal, fused, eager))
        for got, expected in zip(fused_grads, eager_grads, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


def test_whoever_writes_to_decay_and_threshold_is_heard():
    """Also writes that bump no version counter."""
    node, x = QLeaky(0.8, bits=4), torch.randn(3, 2, 5)
    run(node, x, "function")
    node.beta.data.fill_(0.3)
    node.threshold.data.fill_(0.2)
    fused, plain = run(node, x, "function"), run(node, x, "eager")
    assert torch.equal(fused[1], plain[1])
    assert torch.equal(fused[0], plain[0])


@pytest.mark.slow
def test_compiled():
    node = QLeaky(0.8, bits=4)
    for shape in [(3, 2, 5), (3, 7, 11), (3, 1, 1)]:
        x = torch.randn(shape)
        compiled, plain = run(node, x, "compiled"), run(node, x, "eager")
        assert torch.equal(compiled[0], plain[0])
        assert torch.equal(compiled[1], plain[1])
        torch.testing.assert_close(compiled[2], plain[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
@pytest.mark.parametrize("order", ["fire_first", "quantize_first"])
@pytest.mark.parametrize("learn", [False, True])
def test_immediate_reset_equals_plain_operations(reset, order, learn, monkeypatch):
    """Reset in the same step, with decay and threshold learnt or not."""
    calls = []
    stock = kernels.layer.lif_multi_step
    monkeypatch.setattr(
        kernels.layer, "lif_multi_step", lambda *a, **k: calls.append(1) or stock(*a, **k)
    )
    options = pairwise((2, 8), (None, "tanh"), (None, Triangle(0.8)), (1.0, 2.0), (1, 0.3))
    for bits, squash, surrogate, graded, theta in options:
        node = QLeaky(
            0.8, bits=bits, squash=squash, order=order, reset_mechanism=reset, reset_delay=False,
            learn_beta=learn, learn_threshold=learn, spike_grad=surrogate, threshold=float(theta),
            graded_spikes_factor=graded,
        )  # fmt: skip
        x, thresholds, calls[:] = torch.randn(4, 3, 5), [], []
        results = []
        for backend in ("function", "eager"):
            results.append(run(node, x, backend))
            thresholds.append(node.threshold.grad)
            node.threshold.grad = None
        assert len(calls) == len(x)
        fused, plain = results
        assert torch.equal(fused[0], plain[0])
        torch.testing.assert_close(fused[1], plain[1], rtol=0, atol=0)
        for got, expected in zip(fused[2:], plain[2:], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)
        if learn:
            torch.testing.assert_close(*thresholds, rtol=1e-4, atol=1e-5)
