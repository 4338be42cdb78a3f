"""No undefined behaviour, nothing read that was not written, the same bits on either byte order.

The runtime is compiled by itself and fed with random programs in buffers of exactly the size their
images state, which hold garbage. Where a tool is missing its tests are skipped and say so.
"""

from __future__ import annotations

import numpy as np
import pytest

from qsnn_ext.deploy.image import build_image
from qsnn_ext.deploy.records import CODES
from tests.deploy.random_programs import random_block, random_input, random_program
from tests.deploy.sanitizers import TARGETS, compiled, run, same_as_reference


def programs_of(first: int, count: int):
    """Random programs and blocks, each with its image in one of the ways there are, and input."""
    for seed in range(first, first + count):
        program = (random_block if seed % 4 == 3 else random_program)(seed)
        method = CODES["method"][seed // 4 % 3]
        image = build_image(program, method, compact=seed % 2 == 1)
        yield program, image, random_input(program, np.random.default_rng(seed), 1, 3)[0]


def check(target: str, folder, first: int, count: int, optimize: str = "-O0") -> None:
    command = compiled(target, folder, optimize)
    for start in range(first, first + count, 50):
        cases = list(programs_of(start, min(50, first + count - start)))
        found = run(command, target, [c[1] for c in cases], [c[2] for c in cases])
        for (program, image, x), (answers, state) in zip(cases, found, strict=True):
            same_as_reference(program, image, x, answers, state)


#: In every run of the suite: vectors and plain C, both compilers, the other order of bytes.
USUAL = ("gcc native", "clang integer plain", "s390x")


@pytest.mark.parametrize("target", USUAL)
def test_random_programs(target, tmp_path):
    check(target, tmp_path, 0, 24)


@pytest.mark.sweep
@pytest.mark.parametrize("target", TARGETS)
def test_many_random_programs(target, tmp_path):
    check(target, tmp_path, 1000, 2000, "-O1")
