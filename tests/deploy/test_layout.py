"""Where everything lies in image, state and arena: counted once, checked, and kept to."""

from __future__ import annotations

import numpy as np
import pytest

from qsnn_ext.deploy import records
from qsnn_ext.deploy.engine import EngineSession, backends, library
from qsnn_ext.deploy.export import RUNTIME, resident_size
from qsnn_ext.deploy.fileformat import dump_program, parse_program
from qsnn_ext.deploy.image import assemble, build_image
from qsnn_ext.deploy.layout import MEMORY_LIMIT, Layout
from qsnn_ext.deploy.model import DeployedModel
from qsnn_ext.deploy.program import INT32_MAX, Add, Neuron, Pool, Program, Value
from qsnn_ext.deploy.reference import ReferenceSession
from qsnn_ext.errors import ConfigError, FormatError, StateError
from tests.deploy.random_programs import random_block, random_input, random_program

COMPILED = [b for b in backends() if b != "numpy"]
needs_engine = pytest.mark.skipif(not COMPILED, reason="the C engine is not built")


def tower(*factors: tuple[int, int], planes: int = 0) -> Program:
    """One pixel repeated, again and again, then maxima down to one: large values, a small file."""
    values, ops = [Value("input", (1, 1, 1), 0)], []
    if planes:
        values.append(Value("spikes", (1, 1, 1), 1))
        one = np.ones(1, np.int32)
        ops.append(
            Neuron("n", 0, 1, 2, np.zeros((1, 4), np.int32), one, one.repeat(2), "hard", one * 0)
        )

    def pool(function: str, kernel: tuple[int, int], size: tuple[int, int]) -> None:
        name = f"v{len(values)}"
        stride = (1, 1) if function == "repeat" else kernel
        ops.append(Pool(name, len(values) - 1, len(values), function, kernel, stride, (0,) * 4))
        values.append(Value(name, (1, *size), planes))

    h, w = 1, 1
    for kernel in factors:
        h, w = h * kernel[0], w * kernel[1]
        pool("repeat", kernel, (h, w))
    while (h, w) != (1, 1):
        kernel = min(h, 4096), min(w, 4096)
        h, w = h // kernel[0], w // kernel[1]
        pool("max", kernel, (h, w))
    return Program(values, ops, (len(values) - 1,))


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize(
    "factors",
    [((4096, 4096), (4, 1)), ((4096, 4096), (2, 1)), ((4096, 2048),), ((4096, 4096), (1, 4))],
    ids=str,
)
def test_a_small_file_cannot_ask_for_much_memory(backend, factors):
    """The first wrapped an offset and wrote 8 GiB before the arena; others took gigabytes."""
    content = dump_program(tower(*factors))
    assert len(content) < 1200
    with pytest.raises(FormatError, match="bytes of memory to run, more than the limit of 268,"):
        DeployedModel(parse_program(content), backend)


def test_what_does_not_fit_32_bits_is_refused_whatever_the_limit():
    with pytest.raises(FormatError, match=r"arena_words would be .*, which exceeds int32"):
        build_image(tower((4096, 4096), (4, 1)), memory_limit=2**50)


def test_the_limit_counts_what_is_stored_and_can_be_raised():
    program = tower((64, 64))
    needed = Layout(program).bytes
    assert needed > 64 * 64 * 32 * 4  # padding included
    build_image(program, memory_limit=needed)
    with pytest.raises(FormatError, match=f"needs {needed:,} bytes"):
        build_image(program, memory_limit=needed - 1)
    DeployedModel(program, memory_limit=needed)
    with pytest.raises(FormatError, match="raise memory_limit"):
        DeployedModel(program, memory_limit=needed - 1)
    for wrong in (0, -1, "1G", 2.5, None, True):
        with pytest.raises(ConfigError, match="memory_limit"):
            DeployedModel(program, memory_limit=wrong)


@pytest.mark.parametrize("backend", backends())
def test_answers_of_a_long_run_count(backend):
    program = tower((64, 64))
    program.outputs, program.timesteps = (1,), 2**16
    with pytest.raises(FormatError, match="more than the limit"):
        DeployedModel(program, backend)


@needs_engine
@pytest.mark.parametrize("backend", COMPILED)
def test_a_program_as_large_as_the_limit_runs(backend):
    program = tower((512, 2048), planes=1)  # 8 MiB of bits, 32 words of scratch
    assert Layout(program).bytes < MEMORY_LIMIT
    codes = np.ones((1, 1, 1, 1), np.int32)
    assert EngineSession(program, backend=backend).step(codes)[0].item() == 1


def test_a_table_for_every_channel_is_not_made_of_one_for_all():
    """65,536 thresholds in a file made 65,536 leak tables of 512 entries in memory."""
    c = 2**14
    values = [Value("input", (c, 1, 1), 0), Value("spikes", (c, 1, 1), 1)]
    zeros = np.zeros((1, 256), np.int32)
    neuron = Neuron(
        "n", 0, 1, 8, zeros, np.zeros(c, np.int32), np.zeros(254, np.int32), "hard", zeros[0, :1]
    )
    assert Layout(Program(values, [neuron], (1,))).image_words < 4 * c


def test_planes_that_never_fill_do_not_widen_sums():
    """The largest sum follows from the proven range, not from the planes a file declares."""
    for seed in range(40):
        program = random_program(seed)
        layout = Layout(program)
        for plan in layout.plans:
            if plan.record == "events":
                assert plan.fields["centre"] <= INT32_MAX


@needs_engine
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("seed", range(24))
def test_nothing_is_written_outside_of_its_area(backend, compact, seed):
    """Areas are laid out with gaps; arena and state hold garbage, and the gaps keep theirs."""
    program = (random_program if seed % 3 else random_block)(seed)
    method = records.CODES["method"][seed % 2 * (1 + seed % 3 % 2)]
    layout = Layout(program, method, compact=compact, limit=2**30, gap=24)
    session = EngineSession(program, 1, backend, image=assemble(layout))
    rng = np.random.default_rng(seed)
    areas = layout.areas()
    memories = [session._states[0], session._arenas[0]]
    kept = []
    for memory, used in zip(memories, areas, strict=True):
        memory[:] = rng.integers(0, 2**32, memory.size, np.uint32)
        free = np.ones(memory.size, bool)
        for area in used:
            free[area.offset : area.offset + area.words] = False
        kept.append((memory, free, memory[free].copy()))
    session.reset()
    x = random_input(program, rng, 1, 3)
    answers = session.run(x, 3, static=False)
    reference = ReferenceSession(program)
    for t in range(3):
        for got, want in zip(answers, reference.step(x[:, t]), strict=True):
            np.testing.assert_array_equal(got[:, t], want)
    for memory, free, before in kept:
        np.testing.assert_array_equal(memory[free], before)


def test_the_header_is_the_generated_one():
    assert (RUNTIME / "qsnn_records.h").read_text() == records.header()


def test_numbers_of_a_record_are_checked():
    with pytest.raises(FormatError, match=r"value\.offset would be 2147483648"):
        records.encode("value", dict.fromkeys(
            ("channels", "height", "width", "pixels", "planes", "words", "stride"), 1
        ) | {"offset": 2**31})  # fmt: skip
    assert records.encode("fire", {"step": dict.fromkeys(
        ("kind", "source", "target", "add", "self_factor", "add_factor", "neuron"), -(2**31)
    )}) == [-(2**31)] * records.size("fire")  # fmt: skip


@needs_engine
def test_an_engine_of_another_version_is_refused(monkeypatch):
    library.cache_clear()
    monkeypatch.setattr("qsnn_ext.deploy.engine.LAYOUT", 12345)
    with pytest.raises(StateError, match=r"another version .* hatch_build"):
        library()
    library.cache_clear()


@pytest.mark.parametrize("seed", range(12))
def test_compact_images_are_smaller_and_say_the_same(seed):
    program = random_program(seed, length=10)
    small, fast = build_image(program, compact=True), build_image(program)
    assert small.words.size <= fast.words.size
    assert resident_size(program).flash == 4 * small.words.size
    if COMPILED:
        x = random_input(program, np.random.default_rng(seed), 2, 3)
        for a, b in zip(
            EngineSession(program, 2, image=small).run(x, 3, False),
            EngineSession(program, 2, image=fast).run(x, 3, False),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)


def test_many_operations_are_laid_out_in_reasonable_time():
    """4,096 operations, the most a file may have; minutes would be an attack too."""
    values = [Value("v0", (1, 1, 1), 0)]
    ops = []
    for k in range(1, 4096):
        values.append(Value(f"v{k}", (1, 1, 1), 0))
        ops.append(Add(f"o{k}", (k - 1, 0), (1, 0), k))
    layout = Layout(Program(values, ops, (4095,), input_range=(0, 1)))
    assert layout.arena_words < 10_000
