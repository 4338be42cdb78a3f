"""Exported libraries and ready projects: they link, run under emulators, and answer like Python."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks.devices import samples, sections
from qsnn_ext.deploy import DeployedModel, export_c
from qsnn_ext.deploy.boards import BOARDS
from qsnn_ext.errors import ConfigError, InputError
from tests.deploy.random_programs import random_block, random_program

ROOT = Path(__file__).parents[2]
GCC, GXX, CLANG = shutil.which("gcc"), shutil.which("g++"), shutil.which("clang")
STRICT = ["-Wall", "-Wextra", "-Wconversion", "-Wpedantic", "-Werror"]


def parsed(printed):
    """Classes, instructions and answers of the samples, as firmware prints them."""
    line = r"sample (\d+): class (\d+), instructions (\d+), answers((?: -?\d+)+)"
    found = [m.groups() for m in re.finditer(line, printed)]
    assert [int(f[0]) for f in found] == list(range(10)), printed
    return (
        [int(f[1]) for f in found], [int(f[2]) for f in found],
        np.array([[int(n) for n in f[3].split()] for f in found]),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["digits", "events"])
@pytest.mark.parametrize("board", BOARDS)
def test_ten_samples_on_a_board(board, name, tmp_path):
    spec = BOARDS[board]
    emulator = spec.emulator.split()[0]
    for tool in (spec.compiler, emulator, "make"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed: apt-get install {spec.packages}")
    program, codes, sums = samples(name)
    export_c(program, tmp_path, board, name=name, samples=codes, verbose=False)
    smaller = ["OPTIMIZE=-Os"] if name == "events" else []  # as the page on boards offers
    make = ["make", "-C", str(tmp_path), *smaller]
    built = subprocess.run(make, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "warning" not in built.stderr, built.stderr
    done = subprocess.run(
        [*make, "-s", "run"], capture_output=True, text=True, timeout=300,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    classes, instructions, answers = parsed(done.stdout)
    np.testing.assert_array_equal(answers, sums)
    assert classes == sums.argmax(1).tolist()
    assert all(1e6 < n < 1e9 for n in instructions), instructions
    taken = re.search(r"\nflash (\d+), RAM (\d+), stack (\d+)\n", done.stdout)
    assert taken, done.stdout
    flash, ram, stack = map(int, taken.groups())
    assert 200 < stack < 16_000
    listed = sections(spec, tmp_path / "firmware.elf")
    for printed, size in zip((flash, ram), listed, strict=True):
        assert size <= printed < size + 32  # sections are aligned


#: The rule is one for all boards; the quick suite tries one.
ONE_BOARD = [pytest.param(b, marks=[pytest.mark.slow] * (b != "mps2-an386")) for b in BOARDS]


@pytest.mark.parametrize("board", ONE_BOARD)
def test_other_flags_build_it_anew(board, tmp_path):
    spec = BOARDS[board]
    for tool in (spec.compiler, "make"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed: apt-get install {spec.packages}")
    program, codes, _ = samples("digits")
    export_c(program, tmp_path, board, samples=codes[:1], verbose=False)

    def text(*flags):
        command = ["make", "-s", "-C", str(tmp_path), *flags, "size"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        head, numbers = done.stdout.splitlines()
        assert head.split()[:3] == ["text", "data", "bss"]
        return int(numbers.split()[0])

    fast = text()
    assert text("OPTIMIZE=-Os") < fast
    before = (tmp_path / "firmware.elf").stat().st_mtime_ns
    text("OPTIMIZE=-Os")
    assert (tmp_path / "firmware.elf").stat().st_mtime_ns == before
    assert text() == fast


STUB = """\
#pragma once
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
struct Stub {
  void begin(long) {}
  explicit operator bool() { return true; }
  void print(const char *text) { std::fputs(text, stdout); }
  void print(long number) { std::printf("%ld", number); }
  void print(int number) { std::printf("%d", number); }
  void println(const char *text) { std::puts(text); }
  void println(unsigned long number) { std::printf("%lu\\n", number); }
};
static Stub Serial;
inline uint32_t micros() { return 1; }
inline void delay(int) { std::exit(0); }
"""


@pytest.mark.skipif(GCC is None or GXX is None, reason="needs gcc and g++")
@pytest.mark.parametrize("target", ["arduino", "platformio"])
def test_arduino_sketch(target, tmp_path):
    """The sketch as C++ and the library as C, with a stub of Arduino's functions around them."""
    program, codes, sums = samples("digits")
    export_c(program, tmp_path, target, name="digits", samples=codes, verbose=False)
    if target == "arduino":
        sketch, library = tmp_path / "examples/samples/samples.ino", tmp_path / "src"
        properties = (tmp_path / "library.properties").read_text()
    else:
        sketch, library = tmp_path / "src/main.cpp", tmp_path / "lib/digits/src"
        properties = (tmp_path / "lib/digits/library.properties").read_text()
        assert "[env:" in (tmp_path / "platformio.ini").read_text()
    given = dict(line.split("=", 1) for line in properties.splitlines())
    needed = {"name", "version", "author", "maintainer", "sentence", "category", "architectures"}
    assert needed <= set(given)
    assert given["includes"] == "digits.h"
    assert "@" not in properties
    (tmp_path / "Arduino.h").write_text(STUB)
    whole = tmp_path / "whole.cpp"
    whole.write_text(f'#include "Arduino.h"\n#include "{sketch}"\n'
                     "int main() { setup(); for (;;) loop(); }\n")  # fmt: skip
    objects = []
    for source in sorted(library.glob("*.c")):
        objects.append(str(tmp_path / f"{source.stem}.o"))
        subprocess.run([GCC, "-std=c99", *STRICT, "-c", str(source), "-o", objects[-1]],
                       check=True)  # fmt: skip
    binary = str(tmp_path / "sketch")
    subprocess.run([GXX, "-std=c++11", "-Wall", "-Wextra", "-Werror", f"-I{library}",
                    f"-I{sketch.parent}", f"-I{tmp_path}", str(whole), *objects, "-o", binary],
                   check=True)  # fmt: skip
    printed = subprocess.run([binary], capture_output=True, text=True, check=True).stdout
    classes = re.findall(r"sample (\d): class (\d), microseconds \d+", printed)
    assert classes == [(str(i), str(s.argmax())) for i, s in enumerate(sums)]


@pytest.mark.skipif(GCC is None, reason="needs gcc")
def test_two_models_link_together(tmp_path):
    first, second = random_block(1), random_program(3)
    export_c(first, tmp_path / "a", name="first", verbose=False)
    export_c(second, tmp_path / "b", name="second", verbose=False)
    main = tmp_path / "main.c"
    main.write_text(
        '#include "a/first.h"\n#include "b/second.h"\n#include <stdio.h>\n'
        "static first_memory one;\nstatic second_memory two;\n"
        "static first_code x[FIRST_INPUT_SIZE];\nstatic second_code y[SECOND_INPUT_SIZE];\n"
        "static int32_t p[FIRST_OUTPUT_SIZE], q[SECOND_OUTPUT_SIZE];\n"
        "int main(void) {\n"
        "    if (first_start(&one) != 0 || second_start(&two) != 0) return 1;\n"
        "    first_step(&one, x, p);\n    second_step(&two, y, q);\n"
        "    for (int i = 0; i < FIRST_OUTPUT_SIZE; i++) printf(\"%ld\\n\", (long)p[i]);\n"
        "    for (int i = 0; i < SECOND_OUTPUT_SIZE; i++) printf(\"%ld\\n\", (long)q[i]);\n"
        "    return 0;\n}\n"
    )  # fmt: skip
    sources = [str(p) for f in ("a", "b") for p in sorted((tmp_path / f).glob("*.c"))]
    binary = str(tmp_path / "net")
    subprocess.run([GCC, "-std=c99", *STRICT, str(main), *sources, "-o", binary], check=True)
    printed = subprocess.run([binary], capture_output=True, text=True, check=True).stdout
    expected = []
    for program in (first, second):
        zeros = np.zeros((1, *program.values[0].shape), np.int32)
        expected += [a.reshape(-1) for a in DeployedModel(program, "numpy").session().step(zeros)]
    assert [int(n) for n in printed.split()] == np.concatenate(expected).tolist()


COMPILERS = {
    "gcc": [GCC, "-std=c99"], "clang": [CLANG, "-std=c99"],
    "g++": [GXX, "-x", "c++", "-std=c++11"], "clang++": [CLANG, "-x", "c++", "-std=c++11"],
}  # fmt: skip


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("plain", [False, True], ids=["vectors", "plain"])
def test_no_warning(compiler, plain, tmp_path):
    command = COMPILERS[compiler]
    if command[0] is None:
        pytest.skip(f"{compiler} is not installed: apt-get install clang g++")
    program, _, _ = samples("digits")
    export_c(program, tmp_path, mean=0.3, std=0.3, verbose=False)
    for source in sorted(tmp_path.glob("*.c")):
        flags = ["-DQSNN_PLAIN"] if plain else []
        subprocess.run([*command, *STRICT, *flags, "-fsyntax-only", str(source)], check=True)


@pytest.mark.skipif(GCC is None, reason="needs gcc")
def test_start_notices_constants_that_are_not_there(tmp_path):
    """Flash that was not programmed reads as ones, or holds the constants of another version."""
    export_c(random_program(3), tmp_path, "stdio", verbose=False)
    source = (tmp_path / "model.c").read_text()
    sources = [str(p) for p in sorted(tmp_path.glob("*.c"))]
    for change, status in (("MAGIC, QSNN_LAYOUT,", 0), ("0xffffffffu, 0xffffffffu,", 1),
                           ("MAGIC, QSNN_LAYOUT ^ 1,", 1)):  # fmt: skip
        (tmp_path / "model.c").write_text(source.replace("MAGIC, QSNN_LAYOUT,", change))
        binary = str(tmp_path / "net")
        subprocess.run([GCC, "-std=c99", *sources, "-o", binary], check=True)
        assert subprocess.run([binary], stdin=subprocess.DEVNULL).returncode == status


def test_the_library_says_what_the_model_means(tmp_path):
    program, _, _ = samples("events")
    export_c(program, tmp_path, name="net", classes=list("abcdefghij"), verbose=False)
    header = (tmp_path / "net.h").read_text()
    macros = dict(re.findall(r"#define (NET_\w+) ([^ \n]+)", header))
    c, h, w = program.values[0].shape
    assert macros["NET_TIME_STEPS"] == str(program.timesteps)
    shape = [int(macros[f"NET_INPUT_{side}"]) for side in ("CHANNELS", "HEIGHT", "WIDTH")]
    assert shape == [c, h, w]
    assert float(macros["NET_INPUT_SCALE"]) == program.input_scale
    assert float(macros["NET_OUTPUT_SCALE"]) == program.values[program.outputs[0]].scale
    assert macros["NET_CLASSES"] == "10"
    assert "stdio" not in header
    assert '"j"' in (tmp_path / "net.c").read_text()
    assert "model_" not in header
    assert (tmp_path / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


@pytest.mark.skipif(GCC is None, reason="needs gcc")
def test_code_and_stack_from_the_compiler(tmp_path):
    program, _, _ = samples("digits")
    plain = export_c(program, tmp_path, verbose=False)
    small = export_c(program, tmp_path, compiler=f"{GCC} -Os -DQSNN_PLAIN", verbose=False)
    fast = export_c(program, tmp_path, compiler=f"{GCC} -O2", verbose=False)
    assert (plain.code, plain.stack) == (0, 0)
    assert 4_000 < small.code < fast.code < 100_000
    assert 200 < small.stack < 10_000
    assert small.flash == plain.flash + small.code
    assert small.ram == plain.ram + small.stack
    assert f"code {small.code:,}" in str(small)
    for bad in ("no-such-compiler -Os", f"{GCC} --no-such-flag"):
        with pytest.raises(ConfigError, match="no-such"):
            export_c(program, tmp_path, compiler=bad, verbose=False)


def test_refusals(tmp_path):
    program, codes, _ = samples("digits")
    for name in ("", "Model", "2nd", "a-b", "x" * 41, "a/../b"):
        with pytest.raises(ConfigError, match="must be a C identifier"):
            export_c(program, tmp_path / "no", name=name)
    # Their files would replace those of the project, or hide the C library's.
    for name in ("qsnn", "qsnn_line", "main", "samples", "cortex_m", "riscv32", "board", "startup",
                 "arduino", "string", "stdint"):  # fmt: skip
        with pytest.raises(ConfigError, match="a file or header beside the model's"):
            export_c(program, tmp_path / "no", name=name)
    with pytest.raises(ConfigError, match="choose one of library, stdio"):
        export_c(program, tmp_path / "no", "esp32")
    with pytest.raises(ConfigError, match="needs samples"):
        export_c(program, tmp_path / "no", "mps2-an386")
    with pytest.raises(ConfigError, match="takes no samples"):
        export_c(program, tmp_path / "no", samples=codes)
    with pytest.raises(ConfigError, match="3 classes"):
        export_c(program, tmp_path / "no", classes=["a", "b", "c"])
    for bad in (codes[:0], codes[0, 0], np.repeat(codes[:, None], 5, 1)):
        with pytest.raises(InputError):
            export_c(program, tmp_path / "no", "mps2-an386", samples=bad)
    assert not (tmp_path / "no").exists()
