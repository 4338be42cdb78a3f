"""Every operation under bfloat16 autocast."""

import pytest
import torch
from torch import nn

from qsnn_ext import kernels
from qsnn_ext.kernels import LIFOptions, Surrogate, lif_multi_step
from qsnn_ext.layers import BinaryConv2d

SIGMOID = Surrogate("sigmoid", 4.0, 0.0, False)
OPERATIONS = ["lif_multi_step", "binary_weight"]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("suffix", ["", "_backward"])
@pytest.mark.parametrize("key", ["AutocastCPU", "AutocastCUDA"])
def test_every_operation_has_a_rule(name, suffix, key):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qsnn_ext::{name}{suffix}", key)


def test_currents_keep_their_dtype():
    x = torch.randn(3, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        half = lif_multi_step(x.to(torch.bfloat16), None, LIFOptions(SIGMOID), decay=0.5)
        full = lif_multi_step(x, None, LIFOptions(SIGMOID), decay=0.5)
    assert half.spikes.dtype == half.v.dtype == torch.bfloat16
    assert full.spikes.dtype == full.v.dtype == torch.float32
    half.spikes.sum().backward()
    assert x.grad.dtype == torch.float32


def test_a_state_of_another_dtype_follows_the_input():
    x, v = torch.randn(3, 2, 5).to(torch.bfloat16), torch.randn(2, 5)
    params = torch.tensor([0.5, 1.0, 0.0, 1.0])
    options = LIFOptions(SIGMOID, 4).encode()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = torch.ops.qsnn_ext.lif_multi_step(x, v, params.double(), None, options)
    same = torch.ops.qsnn_ext.lif_multi_step(x, v.to(x.dtype), params, None, options)
    for got, expected in zip(mixed, same, strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


def test_backward_inside_the_region():
    x = torch.randn(3, 5, requires_grad=True)
    grads = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            r = lif_multi_step(x, None, LIFOptions(SIGMOID), decay=0.5)
            grads.append(torch.autograd.grad(r.spikes.square().sum(), x)[0])
    assert torch.equal(*grads)


def test_a_delayed_step_stays_in_float32():
    x, mem = torch.randn(1, 3, 4), torch.randn(3, 4)
    options = LIFOptions(Surrogate("atan", 2.0, 0.0, True), 4, reset="soft", delayed=True)
    plain = lif_multi_step(x, mem, options, decay=0.8)
    with torch.autocast("cpu", torch.bfloat16):
        result = lif_multi_step(x, mem, options, decay=0.8)
    for name in ("spikes", "v", "alphas"):
        assert getattr(result, name).dtype == torch.float32
        assert torch.equal(getattr(result, name), getattr(plain, name))


def test_weights_are_standardised_in_float32_and_multiplied_in_bfloat16():
    conv = BinaryConv2d(3, 4, 3)
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert conv.quantized_weight.dtype == torch.float32
        out = conv(x)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert conv.weight.grad.dtype == torch.float32
    conv.weight.grad, half = None, conv.weight.grad
    conv(x).square().sum().backward()
    torch.testing.assert_close(half, conv.weight.grad, rtol=0.05, atol=0.5)


def test_a_traced_model_keeps_the_rules():
    net = nn.Sequential(BinaryConv2d(3, 4, 3), nn.BatchNorm2d(4))

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            current = net(x)
            return lif_multi_step(current[None], None, LIFOptions(SIGMOID), decay=0.5).spikes

    x = torch.randn(2, 3, 8, 8)
    with kernels.use_backend("function"):
        traced = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
        plain = run(x)
    assert traced.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(traced, plain)
