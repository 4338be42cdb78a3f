"""The pure tensor maths against the oracle."""

import numpy as np
import pytest
import reference as ref
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.testing import assert_allclose, assert_array_equal

from qsnn_ext import functional as F
from qsnn_ext.errors import ConfigError, QSNNError

BITS = [2, 3, 4, 8]

finite = st.floats(-8.0, 8.0, allow_nan=False, width=64)
arrays = hnp.arrays(
    np.float64, hnp.array_shapes(min_dims=1, max_dims=3, max_side=5), elements=finite
)


def _grad(function, x, g):
    """Forward and pseudo-gradient of a one-tensor function, as arrays."""
    xt = torch.tensor(x, requires_grad=True)
    y = function(xt)
    (gx,) = torch.autograd.grad(y, xt, torch.tensor(g))
    return y.detach().numpy(), gx.numpy()


# ------------------------------------------------------------------ sign and surrogate


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_sign_of_zero_is_one(dtype):
    y = F.sign(torch.tensor([0.0, -0.0, 1e-30, -1e-30], dtype=dtype))
    assert y.dtype == dtype
    assert y.tolist() == [1.0, 1.0, 1.0, -1.0]


@pytest.mark.parametrize(
    ("kind", "temperature"),
    [
        ("clipped", None),
        ("identity", None),
        ("annealed", 0.1),
        ("annealed", 1.0),
        ("annealed", 7.5),
    ],
)
def test_sign_gradient(rng, kind, temperature):
    x = np.concatenate([rng.normal(0, 1.5, 50), [0.0, 1.0, -1.0, 1.0 + 1e-9]])
    g = rng.normal(size=x.shape)
    y, gx = _grad(lambda t: F.sign(t, gradient=kind, temperature=temperature), x, g)
    assert_array_equal(y, ref.sign(x))
    assert_allclose(gx, ref.sign_gradient(x, g, kind, temperature or 1.0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("beta", [0.25, 1.0, 2.5])
def test_triangle(rng, beta):
    x = np.concatenate([rng.normal(0, 1.5, 50), [0.0, -0.0, beta, -beta]])
    g = rng.normal(size=x.shape)
    y, gx = _grad(lambda t: F.triangle(t, beta), x, g)
    assert_array_equal(y, x >= 0.0)
    assert_allclose(gx, g * ref.triangle_derivative(x, beta), rtol=1e-13, atol=0)


def test_unknown_sign_gradient_is_refused():
    with pytest.raises(QSNNError, match="steep"):
        F.sign(torch.zeros(3), gradient="steep")


# ------------------------------------------------------------------ standardisation


@pytest.mark.parametrize("over", ["layer", "channel"])
@pytest.mark.parametrize("shape", [(4, 6), (3, 2, 5), (5, 3, 3, 3), (2, 2, 2, 2, 2)], ids=str)
def test_standardize(rng, over, shape):
    w, g = rng.normal(0.3, 0.05, size=shape), rng.normal(size=shape)
    y, gw = _grad(lambda t: F.standardize(t, over=over), w, g)
    assert_allclose(y, ref.standardize(w, over), rtol=1e-9, atol=1e-10)
    assert_allclose(gw, ref.standardize_gradient(w, g, over), rtol=1e-7, atol=1e-9)


# ------------------------------------------------------------------ the membrane


def _check_membrane(u, bits, scale, squash, g=None):
    """Value, state grid and pseudo-gradient of one rounding, with alpha taken from the tensor."""
    model = ref.Membrane(bits, scale, squash)
    g = np.ones_like(u) if g is None else g
    ut = torch.tensor(u)
    squashed = torch.tanh(ut) if squash == "tanh" else ut
    alpha = F.membrane_alpha(squashed, scale)
    assert alpha.shape == ()
    assert not alpha.requires_grad
    assert_allclose(alpha.item(), model.alpha(u), rtol=1e-14)
    y, gu = _grad(lambda t: F.quantize_membrane(t, bits, alpha, squash), u, g)
    tied = np.abs(np.abs(model.ratio(u) % 1.0) - 0.5) < 1e-9  # tanh may differ in the last digit
    unit = model.unit(u)
    assert_allclose(y[~tied], model(u)[~tied], rtol=1e-13, atol=0)
    if squash is None:
        assert_array_equal(y, model(u))
    if unit > 0.0:
        assert_allclose(y / unit, np.round(y / unit), atol=1e-12)
    assert len(np.unique(y)) <= 2**bits - 1
    assert_allclose(gu, model.gradient(u, g), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale", ["max", "absmax"])
@pytest.mark.parametrize("squash", [None, "tanh"], ids=["plain", "tanh"])
@pytest.mark.parametrize("mean", [0.3, 0.0, -0.7])
def test_quantize_membrane(rng, bits, scale, squash, mean):
    for _ in range(5):
        u = rng.normal(mean, 1.0, size=(4, 3, 5))
        _check_membrane(u, bits, scale, squash, rng.normal(size=u.shape))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale", ["max", "absmax"])
@pytest.mark.parametrize("squash", [None, "tanh"], ids=["plain", "tanh"])
@pytest.mark.parametrize(
    "u", [np.zeros((2, 3)), -np.ones((2, 3)), np.array([[-1.0, -0.5, 0.0]])],
    ids=["zeros", "negative", "nonpositive"],
)  # fmt: skip
def test_alpha_guard(u, bits, scale, squash):
    _check_membrane(u, bits, scale, squash)
    ut = torch.tensor(u, requires_grad=True)
    y = F.quantize_membrane(ut, bits, torch.tensor(float(u.max())).double(), squash)
    (gu,) = torch.autograd.grad(y.sum(), ut)
    assert torch.equal(y, torch.zeros_like(y))
    assert torch.equal(gu, torch.zeros_like(gu))


@given(u=arrays, bits=st.sampled_from([2, 3, 4, 5, 8]), scale=st.sampled_from(["max", "absmax"]))
def test_quantize_membrane_anywhere(u, bits, scale):
    _check_membrane(u, bits, scale, None)


@given(u=arrays, bits=st.sampled_from([2, 4, 8]))
def test_rounding_error_is_at_most_half_a_level(u, bits):
    ut = torch.tensor(u)
    alpha = F.membrane_alpha(ut, "absmax")
    error = (F.quantize_membrane(ut, bits, alpha) - ut).abs().max()
    n = 2 ** (bits - 1) - 1
    assert error <= alpha / n / 2 * (1 + 1e-12)


def test_halves_go_to_the_even_code():
    """The tie of k = 2 is exact: u = alpha / 2 rounds to 0, as in round-half-even."""
    u = torch.tensor([2.0, 1.0, -1.0, 1.5])
    assert F.quantize_membrane(u, 2, torch.tensor(2.0)).tolist() == [2.0, 0.0, 0.0, 2.0]
    u = torch.tensor([3.0, 0.5, 1.5, 2.5])  # k = 3, n = 3: codes 0.5, 1.5, 2.5 -> 0, 2, 2
    assert F.quantize_membrane(u, 3, torch.tensor(3.0)).tolist() == [3.0, 0.0, 2.0, 2.0]


@pytest.mark.parametrize("bits", BITS)
def test_float32_codes_agree_but_for_ties(rng, bits):
    u = rng.normal(size=4000).astype(np.float32)
    model = ref.Membrane(bits)
    ratio = model.ratio(u.astype(np.float64))
    alpha = F.membrane_alpha(torch.tensor(u), "max")
    y = F.quantize_membrane(torch.tensor(u), bits, alpha)
    assert y.dtype == torch.float32
    clear = np.abs(np.abs(ratio - np.floor(ratio)) - 0.5) > 1e-5 * model.n
    assert clear.mean() > 0.98
    assert_allclose(y.numpy()[clear], model(u.astype(np.float64))[clear], rtol=1e-6)


# ------------------------------------------------------------------ one step


@pytest.mark.parametrize("order", ["fire_first", "quantize_first"])
@pytest.mark.parametrize(
    ("reset", "v_reset"),
    [("hard", 0.0), ("hard", -0.4), ("soft", None)],
    ids=["hard0", "hard", "soft"],
)
@pytest.mark.parametrize("bits", [2, 8, None])
def test_lif_step(rng, bits, reset, v_reset, order):
    """One step from an arbitrary state, by the arguments of the affine charge."""
    model = ref.SpikingJellyLIF(
        ref.Membrane(bits), 0.7, 1.3, 0.1, 0.8, v_reset, order, False, ref.triangle_derivative
    )
    x, v, g = rng.normal(size=(3, 4, 9))
    xt, vt = torch.tensor(x, requires_grad=True), torch.tensor(v, requires_grad=True)
    s, after = F.lif_step(
        xt, vt, decay=0.7, gain=1.3, offset=0.1, threshold=0.8, reset=reset,
        v_reset=v_reset or 0.0, surrogate=F.triangle, order=order,
        quantize=None
        if bits is None
        else lambda u: F.quantize_membrane(u, bits, F.membrane_alpha(u, "max")),
    )  # fmt: skip
    trace = model.forward(x[None], v)
    assert_array_equal(s.detach().numpy(), trace.steps[0]["s"])
    assert_allclose(after.detach().numpy(), trace.steps[0]["v"], atol=1e-13)
    gx, gv = torch.autograd.grad(
        (s * torch.tensor(g)).sum() + (after * after.detach()).sum(), (xt, vt)
    )
    expected = model.backward(trace, g[None], trace.stack("v"))
    assert_allclose(gx.numpy(), expected["x"][0], atol=1e-12)
    assert_allclose(gv.numpy(), expected["v0"], atol=1e-12)


def test_reset_none_lets_the_potential_grow():
    x = torch.full((1, 3), 0.8)
    v = torch.zeros(1, 3)
    for _ in range(3):
        s, v = F.lif_step(x, v, decay=1.0, reset="none")
    assert s.all()
    assert torch.allclose(v, 3 * x)


# ------------------------------------------------------------------ entropy


@given(p=st.floats(0.0, 1.0))
def test_entropy(p):
    value = float(F.entropy(torch.tensor(p, dtype=torch.float64)))
    assert_allclose(value, ref.entropy(p), atol=1e-12)


def test_entropy_is_greatest_at_one_half():
    p = torch.linspace(0, 1, 101, dtype=torch.float64)
    h = F.entropy(p)
    assert h.argmax() == 50
    assert h[0] == h[-1] == 0.0


def test_unknown_options_are_refused_and_not_ignored():
    x = torch.ones(3)
    with pytest.raises(ConfigError, match="order='fire_frist'"):
        F.lif_step(x, x, decay=0.5, quantize=torch.round, order="fire_frist")
    with pytest.raises(ConfigError, match="reset='weak'"):
        F.lif_step(x, x, decay=0.5, reset="weak")
    with pytest.raises(ConfigError, match="scale='mean'"):
        F.membrane_alpha(x, "mean")
