"""Memory of large results serves again, and never while somebody still looks at it."""

import gc
import threading

import pytest
import torch

from qsnn_ext import kernels
from qsnn_ext.kernels import LIFOptions, Surrogate, buffers, lif_multi_step
from qsnn_ext.kernels.weights import PreparedWeight
from qsnn_ext.quantizers import BinaryWeight

SIZE = 1 << 14
OPTIONS = LIFOptions(Surrogate("triangle", 1.0, 0.0, False))


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(buffers, "LEAST", 4 * SIZE)
    buffers.clear()
    yield
    buffers.clear()


def filled(value, shape=(3, SIZE), **kwargs):
    return buffers.empty_like(torch.empty(shape, **kwargs)).fill_(value)


def test_memory_of_a_dead_tensor_serves_again():
    address = filled(1).data_ptr()
    assert filled(2).data_ptr() == address


@pytest.mark.parametrize("left", ["whole", "row", "view", "numpy", "detached"])
def test_memory_that_is_still_seen_does_not_serve_again(left):
    whole = filled(1)
    kept = {
        "whole": whole, "row": whole[1], "view": whole[2:].t()[5:], "numpy": whole.numpy(),
        "detached": whole.data,
    }[left]  # fmt: skip
    del whole
    filled(2)
    assert (kept == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_dtype_and_memory_order_are_kept(dtype):
    like = torch.empty(4, 8, 64, 64, 16, dtype=dtype).permute(0, 1, 4, 2, 3)
    got = buffers.empty_like(like)
    assert (got.dtype, got.shape, got.stride()) == (dtype, like.shape, like.stride())
    assert got.untyped_storage().nbytes() == like.untyped_storage().nbytes()


def test_small_tensors_are_left_to_the_heap():
    filled(1, 1000)
    assert not buffers._unused


def test_no_more_than_the_limit_is_kept(monkeypatch):
    monkeypatch.setattr(buffers, "MOST", 10 * 4 * SIZE)
    for steps in (1, 2, 3, 4, 5):  # fifteen rows in all
        filled(steps, (steps, SIZE))
    kept = sum(size * len(memory) for size, memory in buffers._unused.items())
    assert 0 < kept <= buffers.MOST


def run(x, backend):
    x = x.detach().requires_grad_()
    with kernels.use_backend(backend):
        result = lif_multi_step(x, None, OPTIONS, decay=0.5)
    result.spikes.backward(torch.ones_like(result.spikes))
    return result.spikes.detach(), result.v.detach(), x.grad


@pytest.mark.parametrize("backend", ["auto", "function"])
def test_results_stay_while_later_ones_are_computed(backend):
    inputs = [torch.randn(4, SIZE) for _ in range(3)]
    results = [run(x, backend) for x in inputs]
    gc.collect()
    run(torch.randn(4, SIZE), backend)  # into what the first three have left over, if anything
    for x, found in zip(inputs, results, strict=True):
        for ours, eager in zip(found, run(x, "eager"), strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)
        assert torch.equal(found[0], run(x, "eager")[0])
        assert torch.equal(found[1], run(x, "eager")[1])


@pytest.mark.parametrize("backend", ["auto", "function"])
def test_prepared_weights_stay_while_others_are_prepared(backend):
    quantizer = BinaryWeight()
    weights = [torch.randn(64, SIZE // 32, requires_grad=True) for _ in range(3)]
    with kernels.use_backend(backend):
        values = [PreparedWeight().get(w, quantizer) for w in weights]
        for value in values:
            value.backward(torch.ones_like(value))
    for w, value in zip(weights, values, strict=True):
        grad, w.grad = w.grad, None
        expected = quantizer(w)
        expected.backward(torch.ones_like(expected))
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(grad, w.grad, rtol=1e-4, atol=1e-4)


def test_threads_do_not_share_memory():
    wrong = []

    def work(number):
        for _ in range(300):
            whole = filled(number, (2, SIZE))
            whole[1] = -number
            if whole.sum() != 0 or whole[0, -1] != number:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sum(len(memory) for memory in buffers._unused.values()) <= 8  # two per thread
