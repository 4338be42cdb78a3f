"""The operations on each device against the float64 oracle: every option, dtypes, shapes.

On CUDA the whole grid runs as plain operations, and what is compiled there, by Triton, is compiled
for options that between them reach every branch of the cores.
"""

import itertools

import numpy as np
import pytest
import torch

from qsnn_ext.kernels import LIFOptions, Surrogate, lif_multi_step, use_backend
from qsnn_ext.kernels.weights import binary_weight
from qsnn_ext.quantizers import BinaryWeight
from tests import reference
from tests.kernels import triton_cases

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)
on_cuda = pytest.mark.parametrize("device", DEVICES[1:])
SIGMOID = Surrogate("sigmoid", 4.0, 0.0, False)
ATAN = Surrogate("atan", 2.0, 0.0, True)
SHAPES = [(5, 40), (4, 2, 3, 5, 7), (1, 1), (2, 3, 4100)]
RESETS = {"subtract": "soft", "zero": "hard", "none": "none"}


def gradients_of(result, leaves, g_s, g_v):
    outputs = (result.spikes, result.v)
    return torch.autograd.grad(outputs, leaves, (g_s.to(outputs[0]), g_v.to(outputs[1])))


def data(shape, device):
    """Input, state, and the gradients of spikes and last state, float64."""
    rng = torch.Generator().manual_seed(0)
    x, g_s = (torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(2))
    v, g_v = (torch.randn(shape[1:], generator=rng, dtype=torch.float64) for _ in range(2))
    return [t.to(device) for t in (x * 1.5, v, g_s, g_v)]


def check_lif(device, backend, shape, bits, order, preset, v_reset, detach, alpha):
    options = reference.PRESET_MEMBRANE[preset]
    oracle = reference.SpikingJellyLIF(
        reference.Membrane(bits, frozen_alpha=alpha, **options),
        0.6, 0.7, 0.1, 0.9, v_reset, order, detach,
    )  # fmt: skip
    o = LIFOptions(
        SIGMOID, bits, options["scale"], "dynamic" if alpha is None else "given",
        squash=options["squash"], order=order, v_reset=v_reset or 0.0,
        reset="soft" if v_reset is None else "hard", detach_reset=detach,
    )  # fmt: skip
    x, v, g_s, g_v = data(shape, device)
    numbers = [torch.tensor(n, dtype=torch.float64, device=device) for n in (0.6, 0.7, 0.1)]
    leaves = [t.requires_grad_() for t in (x, v, *numbers)]
    scale = None if alpha is None else torch.tensor(alpha, dtype=torch.float64, device=device)
    with use_backend(backend):
        result = lif_multi_step(
            x, v, o, decay=numbers[0], gain=numbers[1], offset=numbers[2], threshold=0.9,
            alpha=scale,
        )  # fmt: skip
        grads = gradients_of(result, leaves, g_s, g_v)
    trace = oracle.forward(x.detach().cpu().numpy(), v.detach().cpu().numpy())
    g_states = np.zeros(shape)
    g_states[-1] = g_v.cpu().numpy()
    expected = oracle.backward(trace, g_s.cpu().numpy(), g_states)
    np.testing.assert_array_equal(result.spikes.detach().cpu(), trace.stack("s"))
    np.testing.assert_allclose(result.v.detach().cpu(), trace.steps[-1]["v"], atol=1e-12)
    for got, name in zip(grads, ("x", "v0", "decay", "gain", "offset"), strict=True):
        np.testing.assert_allclose(got.cpu(), expected[name], rtol=1e-9, atol=1e-9)


def check_leaky(device, backend, shape, bits, order, preset, mechanism, theta):
    options = reference.PRESET_MEMBRANE[preset]
    oracle = reference.SnnTorchLeaky(
        reference.Membrane(bits, **options), 0.8, theta, mechanism, True, order=order,
        derivative=reference.atan_derivative,
    )  # fmt: skip
    o = LIFOptions(
        ATAN, bits, options["scale"], squash=options["squash"], order=order, delayed=True,
        reset=RESETS[mechanism],
    )  # fmt: skip
    x, v, g_s, g_v = data(shape, device)
    beta = torch.tensor(0.8, dtype=torch.float64, device=device)
    leaves = [t.requires_grad_() for t in (x, v, beta)]
    with use_backend(backend):
        result = lif_multi_step(x, v, o, decay=beta, threshold=theta)
        grads = gradients_of(result, leaves, g_s, g_v)
    trace = oracle.forward(x.detach().cpu().numpy(), v.detach().cpu().numpy())
    g_states = np.zeros(shape)
    g_states[-1] = g_v.cpu().numpy()
    expected = oracle.backward(trace, g_s.cpu().numpy(), g_states)
    np.testing.assert_array_equal(result.spikes.detach().cpu(), trace.stack("s"))
    np.testing.assert_allclose(result.v.detach().cpu(), trace.steps[-1]["v"], atol=1e-12)
    for got, name in zip(grads, ("x", "m0", "beta"), strict=True):
        np.testing.assert_allclose(got.cpu(), expected[name], rtol=1e-9, atol=1e-9)


def without_compiler(device):
    return "function" if device == "cuda" else "auto"


LIF = list(
    itertools.product(
        ("fire_first", "quantize_first"),
        reference.PRESET_MEMBRANE,
        (0.0, 0.2, None),
        (False, True),
        (None, 0.8),
    )
)
LEAKY = list(
    itertools.product(
        ("fire_first", "quantize_first"), reference.PRESET_MEMBRANE, RESETS, (1.0, 0.3)
    )
)


@on_each_device
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [None, 2, 4, 8])
def test_oracle(device, bits, shape):
    for *options, alpha in LIF:
        if bits is not None or alpha is None:
            check_lif(device, without_compiler(device), shape, bits, *options, alpha)


@on_each_device
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_oracle_of_the_delayed_reset(device, bits, shape):
    for options in LEAKY:
        check_leaky(device, without_compiler(device), shape, bits, *options)


@on_cuda
@pytest.mark.parametrize("options", LIF[::5], ids=str)
def test_compiled_oracle(device, options):
    for shape in SHAPES[:2]:
        check_lif(device, "compiled", shape, 4, *options)


@on_cuda
@pytest.mark.parametrize("options", LEAKY[::5], ids=str)
def test_compiled_oracle_of_the_delayed_reset(device, options):
    for shape in SHAPES[:2]:
        check_leaky(device, "compiled", shape, 2, *options)


@on_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("mode", ["dynamic", "running"])
@pytest.mark.parametrize("backend", ["compiled", "triton"])
def test_narrow_dtypes_equal_the_eager_loop(device, dtype, bits, mode, backend):
    """Channels-last too; spikes, states and scales bit for bit."""
    rng = torch.Generator().manual_seed(0)
    x = (torch.randn(4, 6, 16, 9, 9, generator=rng) * 1.5).to(device, dtype)
    x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).view(x.shape)
    o = LIFOptions(SIGMOID, bits, alpha=mode)
    alpha = None if mode == "dynamic" else torch.tensor(0.9, device=device)
    runs = []
    for chosen in ("eager", backend):
        leaf = x.detach().requires_grad_()
        with use_backend(chosen):
            r = lif_multi_step(leaf, None, o, decay=0.7, alpha=alpha)
            r.spikes.sum(dtype=torch.float32).backward()
        runs.append((r.spikes.detach(), r.v.detach(), r.alphas, r.running_alpha, leaf.grad))
    for eager, fused in zip(*runs, strict=True):
        exact = fused is not runs[1][-1]
        loose = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
        torch.testing.assert_close(
            fused, eager, rtol=0 if exact else loose, atol=0 if exact else loose
        )
    assert runs[1][0].stride() == x.stride()


@on_cuda
@pytest.mark.parametrize("name", triton_cases.CASES)
def test_written_in_triton(device, name):
    triton_cases.check(name, device)


WEIGHTS = list(
    itertools.product(
        ("layer", "channel", None),
        ("mean", "power_of_two", None),
        ("clipped", "identity", "annealed"),
    )
)


def check_weights(device, backend, shape, over, scale, gradient):
    rng = torch.Generator().manual_seed(0)
    w, g = (torch.randn(shape, generator=rng, dtype=torch.float64).to(device) for _ in range(2))
    w = (w + 0.1).requires_grad_()
    with use_backend(backend):
        value = binary_weight(w, BinaryWeight(over, scale, gradient, temperature=0.75).to(device))
        (grad,) = torch.autograd.grad(value, w, g)
    latent = w.detach().cpu().numpy()
    expected = reference.binary_weight(latent, over, scale)[0]
    np.testing.assert_allclose(value.detach().cpu(), expected, rtol=1e-12)
    expected = reference.binary_weight_gradient(
        latent, g.cpu().numpy(), over, scale, gradient, 0.75
    )
    np.testing.assert_allclose(grad.cpu(), expected, rtol=1e-9, atol=1e-11)


@on_each_device
@pytest.mark.parametrize("options", WEIGHTS, ids=lambda o: "-".join(map(str, o)))
def test_weights_of_the_oracle(device, options):
    for shape in ((9, 50), (2, 3), (64, 1152)):
        check_weights(device, without_compiler(device), shape, *options)


@on_cuda
@pytest.mark.parametrize("options", WEIGHTS[::4], ids=lambda o: "-".join(map(str, o)))
def test_weights_of_the_oracle_compiled(device, options):
    for shape in ((9, 50), (64, 1152)):
        check_weights(device, "compiled", shape, *options)
