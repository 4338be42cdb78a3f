"""Promise: many threads asking at once get the bits that one thread would. A deployed model may be
shared by all of them. A torch model keeps its membrane potentials in its neurons, as the hosts have
it, so every thread takes a copy of its own; nothing else in this package is shared between copies.
"""

import copy
import threading

import numpy as np
import pytest
import torch

import qsnn_ext
from qsnn_ext import deploy, quantize_

from .test_corrupt_files import network
from .test_interrupted_conversion import snntorch_model

THREADS, ROUNDS = 8, 6


def in_threads(work):
    """Run ``work(k)`` in threads that start together; their results, or the first error."""
    gate, results, failures = threading.Barrier(THREADS), {}, []

    def run(k):
        try:
            gate.wait()
            results[k] = [work(k) for _ in range(ROUNDS)]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    found = network().eval()
    quantize_(found, "1w-2u", torch.rand(1, 1, 8, 8))
    qsnn_ext.calibrate(found, [torch.rand(4, 1, 8, 8)])
    return found


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)
    # Batches of different size and firing rate, so that threads take different paths.
    return [torch.rand(k % 3 + 1, 1, 8, 8, generator=generator) * (k + 1) for k in range(THREADS)]


@pytest.mark.parametrize("backend", deploy.backends())
@pytest.mark.parametrize("inner", [1, 3])
def test_a_deployed_model_is_shared(model, inputs, tmp_path, backend, inner):
    path = tmp_path / "net.qsnn"
    deploy.save(model, path, inputs[0])
    alone = deploy.load(path, backend="numpy")
    expected = [alone(x) for x in inputs]
    assert len({e.tobytes() for e in expected}) > 1
    shared = deploy.load(path, backend=backend, threads=inner)
    for k, answers in in_threads(lambda k: shared(inputs[k])).items():
        for answer in answers:
            np.testing.assert_array_equal(answer, expected[k])


def test_sessions_keep_their_own_state(model, inputs, tmp_path):
    """Streams of one program side by side: every session has its own membranes."""
    path = tmp_path / "net.qsnn"
    deploy.save(model, path, inputs[0])
    shared = deploy.load(path)
    codes = [shared.codes(x) for x in inputs]

    def stream(k):
        session = shared.session(len(codes[k]))
        return [session.step(codes[k])[0].copy() for _ in range(5)]

    expected = [stream(k) for k in range(THREADS)]
    for k, rounds in in_threads(stream).items():
        for steps in rounds:
            for ours, theirs in zip(steps, expected[k], strict=True):
                np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("host", ["spikingjelly", "snntorch"])
@pytest.mark.parametrize("mode", ["dynamic", "frozen"])
def test_copies_of_a_torch_model(inputs, host, mode):
    torch.manual_seed(0)
    original = (network() if host == "spikingjelly" else snntorch_model()).eval()
    quantize_(original, "1w-2u", torch.rand(1, 1, 8, 8))
    if mode == "frozen":
        qsnn_ext.calibrate(original, [torch.rand(4, 1, 8, 8)])
    copies = [copy.deepcopy(original) for _ in range(THREADS)]
    for one in copies:
        qsnn_ext.hosts.reset(one)

    def answer(k):
        qsnn_ext.hosts.reset(copies[k])
        with torch.no_grad():
            return torch.stack([copies[k](inputs[k]) for _ in range(4)])

    expected = [answer(k) for k in range(THREADS)]
    for k, answers in in_threads(answer).items():
        for found in answers:
            assert torch.equal(found, expected[k])
