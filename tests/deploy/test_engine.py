"""The C engine gives the bits of the NumPy reference."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qsnn_ext.deploy.engine import EngineSession, backends, choose, open_session
from qsnn_ext.deploy.image import build_image
from qsnn_ext.deploy.model import DeployedModel
from qsnn_ext.deploy.program import Neuron, Program, Value
from qsnn_ext.deploy.records import CODES
from qsnn_ext.deploy.reference import ReferenceSession
from qsnn_ext.errors import ConfigError, InputError, InputTypeError
from tests.deploy.random_programs import random_block, random_input, random_program

COMPILED = [b for b in backends() if b != "numpy"]
EXAMPLES = settings().max_examples  # of the profile; a random program says little, and is quick
METHODS = CODES["method"]  # how active inputs are counted
needs_engine = pytest.mark.skipif(not COMPILED, reason="the C engine is not built")


def run_reference(program, x):
    session = ReferenceSession(program, x.shape[0])
    answers = [session.step(x[:, t]) for t in range(x.shape[1])]
    return [np.stack([a[i] for a in answers], 1) for i in range(len(program.outputs))], session


@needs_engine
@pytest.mark.parametrize("backend", COMPILED)
@settings(max_examples=2 * EXAMPLES, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1),
    steps=st.sampled_from([1, 2, 3, 5, 16]),
    batch=st.integers(1, 3),
    method=st.sampled_from(METHODS),
)
def test_random_programs(backend, seed, steps, batch, method):
    same_bits(random_program(seed), backend, seed, steps, batch, method)


@needs_engine
@pytest.mark.parametrize("backend", COMPILED)
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1),
    steps=st.sampled_from([1, 2, 5]),
    method=st.sampled_from(METHODS),
)
def test_random_residual_blocks(backend, seed, steps, method):
    same_bits(random_block(seed), backend, seed, steps, 2, method)


def same_bits(program, backend, seed, steps, batch, method):
    """The engine's answers and states are those of the NumPy reference."""
    x = random_input(program, np.random.default_rng(seed), batch, steps)
    expected, reference = run_reference(program, x)
    session = EngineSession(program, batch, backend, image=build_image(program, method))
    answers = session.run(x, steps, static=False)
    for got, want in zip(answers, expected, strict=True):
        np.testing.assert_array_equal(got, want)
    for name, state in reference.state().items():
        np.testing.assert_array_equal(session.state()[name], state)


@needs_engine
@pytest.mark.parametrize("seed", range(8))
def test_streaming_save_and_restore(seed):
    program = random_program(seed, length=10)
    x = random_input(program, np.random.default_rng(seed), 2, 6)
    session = open_session(program, 2)
    whole = [session.step(x[:, t]) for t in range(6)]
    session.reset()
    for t in range(3):
        session.step(x[:, t])
    saved = session.state()
    for other in (open_session(program, 2), ReferenceSession(program, 2), session):
        other.restore(saved)
        for t in range(3, 6):
            for got, want in zip(other.step(x[:, t]), whole[t], strict=True):
                np.testing.assert_array_equal(got, want)


@needs_engine
def test_threads_give_the_same_bits():
    program = random_program(11, length=12)
    x = random_input(program, np.random.default_rng(1), 8, 4)
    expected, _ = run_reference(program, x)
    for threads in (1, 2, 3, 8):
        answers = EngineSession(program, 8, COMPILED[0], threads).run(x, 4, static=False)
        for got, want in zip(answers, expected, strict=True):
            np.testing.assert_array_equal(got, want)


@needs_engine
def test_one_image_in_many_threads():
    program = random_program(5, length=12)
    x = random_input(program, np.random.default_rng(2), 1, 8)
    expected, _ = run_reference(program, x)
    image = EngineSession(program).image
    failures = []

    def work():
        for _ in range(20):
            answers = EngineSession(program, 1, COMPILED[0], image=image).run(x, 8, static=False)
            if any((a != e).any() for a, e in zip(answers, expected, strict=True)):
                failures.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_wrong_input_and_unknown_backend():
    program = random_program(0)
    with pytest.raises(ConfigError, match="tpu"):
        choose("tpu")
    if COMPILED:
        with pytest.raises(InputError, match="shape"):
            EngineSession(program).step(np.zeros((1, 2, 3, 4), np.int32))


@pytest.mark.parametrize("kind", ["numpy", *COMPILED[:1]])
def test_a_state_of_something_else_is_refused_and_changes_nothing(kind):
    program = random_program(3, length=10)
    session = open_session(program, 2, kind)
    session.step(random_input(program, np.random.default_rng(0), 2, 1)[:, 0])
    before = session.state()
    name = next(iter(before))
    for wrong, message in [
        ({}, "lacks neuron"),
        ({k: v[:1] for k, v in before.items()}, "has shape"),
        ({**before, name: before[name] + 2**30}, "outside 0"),
    ]:
        with pytest.raises(InputError, match=message):
            session.restore(wrong)
        for key, words in session.state().items():
            np.testing.assert_array_equal(words, before[key])
    with pytest.raises(InputError, match="this session takes"):
        session.step(np.zeros((1, 2, 3, 4), np.int32))


@needs_engine
def test_an_engine_that_is_not_there_is_named():
    for name in ("numpy", "mmx"):
        with pytest.raises(ConfigError, match=f"backend '{name}' is not available"):
            EngineSession(random_program(0), backend=name)


class Unlike:
    """Nothing that an array could be made of."""

    def __array__(self, *args, **kwargs):
        raise TypeError("no array")


@pytest.mark.parametrize("kind", ["numpy", *COMPILED])
def test_sessions_take_codes_and_nothing_else(kind):
    """Engine and reference refuse alike; a camera frame in the place of its codes is named."""
    program = random_program(0)  # codes of -100 to 100
    session = open_session(program, 1, kind)
    fine = random_input(program, np.random.default_rng(0), 1, 1)[:, 0]
    want = session.step(fine)
    session.reset()
    before = session.state()
    frame = fine / 100.0
    refused = [
        (frame, InputTypeError, r"net\.codes\(frame\)"),
        (np.full_like(frame, np.nan), InputTypeError, r"net\.codes\(frame\)"),
        (torch.from_numpy(frame).to(torch.bfloat16), InputTypeError, r"net\.codes\(frame\)"),
        (fine > 0, InputTypeError, "integer codes"),
        (fine + 101 - fine.min(), InputError, "takes -100 to 100"),
        (fine.astype(np.int64) + 2**32, InputError, "takes -100 to 100"),
        (fine[0], InputError, "shape"),
        (fine.tolist()[0], InputError, "shape"),
        ([[1, 2], [3]], InputTypeError, "cannot be made a NumPy array"),
        ("frame", InputTypeError, "integer codes"),
        (None, InputTypeError, "integer codes"),
        (Unlike(), InputTypeError, "cannot be made a NumPy array"),
        (torch.zeros(fine.shape, device="meta"), InputTypeError, "cannot be made a NumPy array"),
    ]
    for wrong, error, message in refused:
        with pytest.raises(error, match=message):
            session.step(wrong)
        for key, words in session.state().items():
            np.testing.assert_array_equal(words, before[key])
    for same in (fine.tolist(), fine.astype(np.int8), torch.from_numpy(fine)):
        session.reset()
        for got, expected in zip(session.step(same), want, strict=True):
            np.testing.assert_array_equal(got, expected)


@needs_engine
def test_runs_take_codes_and_nothing_else():
    program = random_program(0)
    session = EngineSession(program, 2)
    x = random_input(program, np.random.default_rng(0), 2, 3)
    session.run(x, 3, static=False)
    for wrong, steps, error in [
        (x / 7, 3, InputTypeError), (x + 1000, 3, InputError), (x, 4, InputError),
        (x, 0, ConfigError), (x, -1, ConfigError), (x, 2.0, ConfigError), (x, 2**40, ConfigError),
    ]:  # fmt: skip
        with pytest.raises(error):
            session.run(wrong, steps, static=False)


@pytest.mark.parametrize("kind", ["numpy", *COMPILED])
def test_numbers_of_samples_and_threads_are_numbers(kind):
    program = random_program(0)
    net = DeployedModel(program, kind)
    for wrong in (0, -1, 1.5, "2", None, True, 2**31):
        with pytest.raises(ConfigError, match=r"batch=.* must be a whole number"):
            net.session(wrong)
        if wrong != 2**31:
            with pytest.raises(ConfigError, match=r"threads=.* must be a whole number"):
                DeployedModel(program, kind, threads=wrong)
            with pytest.raises(ConfigError, match=r"threads=.* must be a whole number"):
                open_session(program, 1, kind, threads=wrong)
    assert net.session(np.int64(2)).batch == 2


@pytest.mark.parametrize("kind", ["numpy", *COMPILED[:1]])
def test_states_of_other_kinds_are_refused(kind):
    """A membrane beyond its range would overflow what the program was proven to stay in."""
    values = [Value("input", (3, 1, 1), 0), Value("spikes", (3, 1, 1), 1)]
    leak = np.array([[2**14, 15, 0]], np.int32)
    top, none = np.array([2**29], np.int32), np.zeros(0, np.int32)
    neuron = Neuron("n", 0, 1, 32, leak, top, none, "soft", top)
    session = open_session(Program(values, [neuron], (1,)), 1, kind)
    fine = session.state()
    name = next(iter(fine))
    largest = {name: np.full_like(fine[name], 2**30 - 1)}
    session.restore(largest)
    for wrong, error, message in [
        (None, InputTypeError, "dictionary"), ([], InputTypeError, "dictionary"),
        ({name: None}, InputTypeError, "integers"),
        ({name: fine[name].astype(float)}, InputTypeError, "integers"),
        ({name: fine[name].tolist()[0]}, InputError, "shape"),
        ({name: np.full(fine[name].shape, 2**30)}, InputError, "outside"),
        ({name: np.full(fine[name].shape, -(2**31))}, InputError, "outside"),
        ({name: np.full(fine[name].shape, 2**32)}, InputError, "outside"),
        ({**fine, "other": fine[name]}, InputError, "'other', which this program lacks"),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            session.restore(wrong)
        np.testing.assert_array_equal(session.state()[name], largest[name])


@needs_engine
@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("seed", range(6))
def test_threads_share_the_rows_of_one_sample(backend, seed):
    program = (random_program if seed % 2 else random_block)(seed)
    x = random_input(program, np.random.default_rng(seed), 2, 3)
    expected, reference = run_reference(program, x)
    for threads in (2, 7):
        session = EngineSession(program, 1, backend, threads)
        assert session._workers == threads
        for sample in range(2):
            session.reset()
            answers = session.run(x[sample : sample + 1], 3, static=False)
            for got, want in zip(answers, expected, strict=True):
                np.testing.assert_array_equal(got, want[sample : sample + 1])
            for name, state in reference.state().items():
                np.testing.assert_array_equal(session.state()[name][0], state[sample])
    pair = EngineSession(program, 2, backend, 5)  # fewer samples than threads: one by one
    for got, want in zip(pair.run(x, 3, static=False), expected, strict=True):
        np.testing.assert_array_equal(got, want)
