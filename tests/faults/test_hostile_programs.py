"""Promise: a ``.qsnn`` file is refused or runs, in the memory that its reader allows; nothing else.

Files are changed with their structure known and a checksum that fits. What is accepted runs under
the sanitizers in buffers of exactly the size that the layout states, and must answer as the
reference does. ``-m sweep`` tries a hundred thousand.
"""

from __future__ import annotations

import random
import resource

import numpy as np
import pytest

from qsnn_ext.deploy.engine import EngineSession, backends
from qsnn_ext.deploy.fileformat import dump_program, parse_program
from qsnn_ext.deploy.image import build_image
from qsnn_ext.deploy.layout import MEMORY_LIMIT, Layout
from qsnn_ext.deploy.reference import ReferenceSession
from qsnn_ext.errors import FormatError
from tests.deploy.random_programs import random_block, random_input, random_program
from tests.deploy.sanitizers import compiled, run, same_as_reference

from .hostile_programs import LARGE, mutated, work
from .runs import Life

COMPILED = [b for b in backends() if b != "numpy"]
SLACK = 64 * 2**20  # of Python itself: lists, copies of a file
REFERENCE = 12  # counts in 64 bits, with copies; the engine has buffers of exactly what was counted


def in_limited_memory(attack, limit: int) -> None:
    """Run in a process of its own, which may not grow by more than the limit and some slack."""

    def measured():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        attack()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        assert grown < limit + SLACK, f"{grown:,} bytes more than before"

    life = Life(measured)
    assert life.wait(6000) == 0, life.said()


def attack(command: list[str], target: str, count: int, seed: int, limit: int = 2**24) -> None:
    """Mutations: each is refused with an error of ours, or runs and answers as the reference."""
    rng = random.Random(seed)
    seeds = [(random_block if k % 4 == 3 else random_program)(k) for k in range(40)]
    seeds = [p for p in seeds if work(p) < 10**6]
    refused = too_large = 0
    accepted = []

    def flush():
        images = [image for _, image, _ in accepted]
        inputs = [x for _, _, x in accepted]
        for (program, image, x), found in zip(
            accepted, run(command, target, images, inputs), strict=True
        ):
            same_as_reference(program, image, x, *found)
        accepted.clear()

    ran = held = 0
    for k in range(count):
        content = mutated(rng.choice(seeds), rng)
        try:
            program = parse_program(content)
        except FormatError:
            refused += 1
            continue
        try:
            image = build_image(program, compact=k % 2 == 1, memory_limit=limit)
        except FormatError:
            too_large += 1
            continue
        if work(program) > 3 * 10**6:
            continue
        x = random_input(program, np.random.default_rng(k), 1, 2)[0]
        accepted.append((program, image, x))
        ran += 1
        held += image.words.nbytes
        if len(accepted) == 50 or held > limit // 4:  # what is kept here is no part of the promise
            flush()
            held = 0
    flush()
    print(f"{count} mutated files: {refused} refused, {too_large} too large, {ran} run")
    assert refused > count / 4
    assert too_large > 0
    assert ran > count / 20


def test_mutated_programs(tmp_path):
    command = compiled("gcc native", tmp_path)
    in_limited_memory(lambda: attack(command, "gcc native", 400, seed=0), REFERENCE * 2**24)


@pytest.mark.sweep
@pytest.mark.parametrize("target", ["gcc native", "gcc plain", "clang integer plain", "gcc"])
def test_a_hundred_thousand_mutated_programs(target, tmp_path):
    command = compiled(target, tmp_path, "-O1")
    part = sum(map(ord, target))
    in_limited_memory(lambda: attack(command, target, 25_000, seed=part), REFERENCE * 2**24)


@pytest.mark.skipif(not COMPILED, reason="the C engine is not built")
@pytest.mark.parametrize("make", LARGE, ids=lambda f: f.__name__)
def test_programs_as_large_as_the_limits_allow(make):
    """Valid to the last field; they run in the memory that the layout says, or are refused."""

    def work_through():
        program = parse_program(dump_program(make()))
        needed = Layout(program, limit=2**40).bytes
        if needed > MEMORY_LIMIT:
            with pytest.raises(FormatError, match="more than the limit"):
                build_image(program)
            return
        session = EngineSession(program, backend=COMPILED[0])
        lo, hi = program.input_range
        x = np.random.default_rng(0).integers(lo, hi + 1, (1, *program.values[0].shape))
        reference = ReferenceSession(program)
        for _ in range(2):
            for got, want in zip(session.step(x), reference.step(x), strict=True):
                np.testing.assert_array_equal(got, want)

    in_limited_memory(work_through, 2 * MEMORY_LIMIT)  # the reference, and the program itself


def test_a_document_of_many_small_things():
    """The largest header that is read at all, of what takes most memory for its bytes."""

    def read():
        for text in (
            b"[" + b"[]," * 2_500_000 + b"0]",
            b'{"a":[' + b'{"":0},' * 1_100_000 + b"0]}",
        ):
            with pytest.raises(FormatError):
                parse_program(len(text).to_bytes(8, "little") + text)

    in_limited_memory(read, 4 * MEMORY_LIMIT)
