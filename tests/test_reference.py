"""The oracle itself, held against the float neurons of both hosts and finite differences."""

import numpy as np
import pytest
import reference as ref
import torch
from numpy.testing import assert_allclose, assert_array_equal

FLOAT = ref.Membrane(bits=None)


class _Atan(torch.autograd.Function):
    """snnTorch's default surrogate, whose own spikes are float32 whatever the membrane is."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).to(x)

    @staticmethod
    def backward(ctx, g):
        return g / (1 + (torch.pi * ctx.saved_tensors[0]) ** 2)


def _upstream(rng, shape):
    """Gradients that arrive at spikes and states, representable in float32."""
    return (rng.integers(-8, 9, size=shape) / 8.0, rng.integers(-8, 9, size=shape) / 8.0)


@pytest.mark.parametrize("detach_reset", [False, True], ids=["through", "detached"])
@pytest.mark.parametrize("v_reset", [0.0, -0.3, None], ids=["hard0", "hard", "soft"])
@pytest.mark.parametrize("decay_input", [True, False], ids=["decayed", "plain"])
def test_spikingjelly_float_neuron(rng, decay_input, v_reset, detach_reset):
    from spikingjelly.activation_based import neuron, surrogate

    x = rng.normal(0.4, 1.2, size=(9, 4, 7))
    g_s, g_v = _upstream(rng, x.shape)
    lif = ref.SpikingJellyLIF.from_tau(
        FLOAT, 1.6, decay_input, v_reset, theta=0.8, detach_reset=detach_reset
    )
    trace = lif.forward(x)
    expected = lif.backward(trace, g_s, g_v)

    node = neuron.LIFNode(
        1.6, decay_input, 0.8, v_reset, surrogate.Sigmoid(), detach_reset, "m", True
    )
    xt = torch.tensor(x, requires_grad=True)
    s = node(xt)
    ((s * torch.tensor(g_s)).sum() + (node.v_seq * torch.tensor(g_v)).sum()).backward()
    assert trace.stack("s").mean() > 0.1
    assert_array_equal(s.detach().numpy(), trace.stack("s"))
    assert_allclose(node.v_seq.detach().numpy(), trace.stack("v"), rtol=0, atol=1e-12)
    assert_allclose(xt.grad.numpy(), expected["x"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("reset_delay", [True, False], ids=["delayed", "immediate"])
@pytest.mark.parametrize("mechanism", ["subtract", "zero", "none"])
@pytest.mark.parametrize("graded", [1.0, 0.5], ids=["plain", "graded"])
def test_snntorch_float_neuron(rng, mechanism, reset_delay, graded):
    import snntorch as snn

    x = rng.normal(0.2, 0.9, size=(9, 4, 7))
    g_s, g_v = _upstream(rng, x.shape)
    leaky = ref.SnnTorchLeaky(FLOAT, 0.75, 0.875, mechanism, reset_delay, graded=graded)
    trace = leaky.forward(x)
    expected = leaky.backward(trace, g_s, g_v)

    node = snn.Leaky(
        beta=0.75, threshold=0.875, spike_grad=_Atan.apply, learn_beta=True, learn_threshold=True,
        reset_mechanism=mechanism, reset_delay=reset_delay, graded_spikes_factor=graded,
    ).double()  # fmt: skip
    xt = torch.tensor(x, requires_grad=True)
    mem = torch.zeros(4, 7, dtype=torch.float64)
    loss = 0.0
    for t in range(9):
        s, mem = node(xt[t], mem)
        assert_array_equal(s.detach().numpy(), trace.steps[t]["s"])
        assert_allclose(mem.detach().numpy(), trace.steps[t]["v"], rtol=0, atol=1e-12)
        loss = loss + (s * torch.tensor(g_s[t])).sum() + (mem * torch.tensor(g_v[t])).sum()
    loss.backward()
    assert trace.stack("b").mean() > 0.1
    assert_allclose(xt.grad.numpy(), expected["x"], rtol=0, atol=1e-11)
    assert_allclose(node.beta.grad.item(), expected["beta"], rtol=1e-11)
    assert_allclose(node.threshold.grad.item(), expected["theta"], rtol=1e-11)


@pytest.mark.parametrize("over", ["layer", "channel"])
def test_standardize_gradient_is_the_derivative(rng, over):
    w, g = rng.normal(size=(3, 2, 3)), rng.normal(size=(3, 2, 3))
    numeric = np.empty_like(w)
    for at in np.ndindex(w.shape):
        up, down = w.copy(), w.copy()
        up[at] += 1e-6
        down[at] -= 1e-6
        rise = ref.standardize(up, over) - ref.standardize(down, over)
        numeric[at] = (g * rise).sum() / 2e-6
    assert_allclose(ref.standardize_gradient(w, g, over), numeric, rtol=1e-6, atol=1e-8)


def test_membrane_by_hand():
    """k = 2 has the levels {-a, 0, a}; halves go to the even code."""
    two = ref.Membrane(2)
    assert_array_equal(two(np.array([2.0, 1.0, 1.01, -1.0, -9.0])), [2.0, 0.0, 2.0, 0.0, -2.0])
    assert_array_equal(two(np.array([-1.0, -2.0])), [0.0, 0.0])
    assert_array_equal(two.gradient(np.array([-1.0, -2.0]), np.ones(2)), [0.0, 0.0])
    assert_array_equal(two.gradient(np.array([2.0, -2.0, -2.1]), np.ones(3)), [1.0, 1.0, 0.0])
    assert ref.Membrane(2, "absmax").unit(np.array([1.0, -4.0])) == 4.0
    assert ref.entropy(0.5) == pytest.approx(np.log(2.0))
    assert ref.entropy(0.0) == ref.entropy(1.0) == 0.0


@pytest.mark.parametrize("mechanism", ["subtract", "zero"])
def test_stored_membrane_tells_the_spike(rng, mechanism):
    """The reset that snnTorch reads from the membrane is the spike that was emitted, always."""
    for k in (2, 3, 8):
        for scale in ("max", "absmax"):
            leaky = ref.SnnTorchLeaky(ref.Membrane(k, scale), reset_mechanism=mechanism)
            trace = leaky.forward(rng.normal(0.1, 1.0, size=(12, 5, 20)))
            assert 0.05 < trace.stack("b").mean() < 0.95
            assert_array_equal(trace.stack("b")[:-1], trace.stack("reset")[1:])


def test_coarse_rounding_makes_no_difference_at_many_levels(rng):
    """With very many levels every rounded neuron tends to its float twin."""
    x = rng.normal(0.3, 1.0, size=(8, 3, 9))
    fine = ref.Membrane(40, "absmax")
    for order in ("fire_first", "quantize_first"):
        for v_reset in (0.0, -0.25, None):
            one = ref.SpikingJellyLIF.from_tau(fine, 2.0, False, v_reset, order=order).forward(x)
            two = ref.SpikingJellyLIF.from_tau(FLOAT, 2.0, False, v_reset).forward(x)
            assert_array_equal(one.stack("s"), two.stack("s"))
            assert_allclose(one.stack("v"), two.stack("v"), atol=1e-9)
        for mechanism in ("subtract", "none"):
            one = ref.SnnTorchLeaky(fine, 0.5, reset_mechanism=mechanism, order=order).forward(x)
            two = ref.SnnTorchLeaky(FLOAT, 0.5, reset_mechanism=mechanism).forward(x)
            assert_array_equal(one.stack("s"), two.stack("s"))
            if order == "quantize_first" or mechanism == "none":
                assert_allclose(one.stack("v"), two.stack("v"), atol=1e-9)
