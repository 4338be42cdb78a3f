"""The backend that compiles one step: as the eager loop, at any length, by one compilation."""

import itertools

import pytest
import torch

from qsnn_ext import kernels
from qsnn_ext.errors import ConfigError
from qsnn_ext.kernels import LIFOptions, backends
from qsnn_ext.kernels import backend as kernel_backend
from qsnn_ext.kernels.backends import function, stepwise
from tests.kernels.test_lif import ALPHAS, ORDERS, RESETS, SIGMOID, assert_equal, both


@pytest.fixture
def uncompiled(monkeypatch):
    """The same steps without a compiler, which takes longer than they do."""
    monkeypatch.setattr(stepwise, "compiled", function)


@pytest.mark.parametrize("bits", [None, 2, 4])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("reset", RESETS)
def test_every_option(bits, order, reset, uncompiled):
    x, v = torch.randn(5, 4, 7) * 1.5, torch.randn(4, 7)
    for mode, scale, squash, state in itertools.product(
        ALPHAS if bits else ("dynamic",), ("max", "absmax"), (None, "tanh"), (None, v)
    ):
        options = LIFOptions(SIGMOID, bits, scale, mode, 0.1, squash, order, reset, -0.2)
        alpha = None if mode == "dynamic" else torch.tensor(0.9)
        assert_equal(both(options, x, state, backend="stepwise", alpha=alpha))


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("delayed", [False, True])
def test_learnable_parameters(reset, delayed, uncompiled):
    """What is stored of a delayed reset may differ in the last place, as the core's own does."""
    x, v = torch.randn(6, 5, 7) * 1.5, torch.randn(5, 7)
    options = LIFOptions(SIGMOID, 3, reset=reset, delayed=delayed)
    numbers = {"decay": 0.6, "gain": 0.4, "offset": 0.1}
    for state in (None, v):
        given = {name: torch.tensor(value) for name, value in numbers.items()}
        results = both(options, x, state, backend="stepwise", **given)
        assert_equal(results, 2e-7 if delayed else 0.0, gradient_tolerance=1e-5)


def test_it_is_not_chosen_and_what_it_does_not_cover_runs(uncompiled):
    assert "stepwise" not in backends.BACKENDS
    options = LIFOptions(SIGMOID, 2)
    half = torch.randn(3, 40).to(torch.bfloat16)
    assert_equal(both(options, half, backend="stepwise"), gradient_tolerance=2e-2)
    calls = []

    class Watched:
        covers = staticmethod(lambda call: calls.append(call) or False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.ON_REQUEST, "stepwise", Watched)
        with kernels.use_backend("auto"):
            kernels.lif_multi_step(torch.randn(3, 40), None, options, decay=0.5)
        assert not calls
        with kernels.use_backend("stepwise"):
            kernels.lif_multi_step(torch.randn(3, 40), None, options, decay=0.5)
        assert calls
    with pytest.raises(ConfigError, match=r"'sideways' is unknown.*stepwise"):
        kernels.use_backend("sideways").__enter__()


@pytest.mark.slow
def test_one_compilation_serves_every_length():
    kernel_backend.clear()
    options = LIFOptions(SIGMOID, 2)
    for steps in (40, 7, 23):
        assert_equal(both(options, torch.randn(steps, 3, 50) * 1.5, backend="stepwise"))
    compiled = [core for core in kernel_backend._cores.values() if core._compiled is not None]
    # Forward, the steps again for the backward or not, and the backward of last and other steps.
    assert len(compiled) <= 4
