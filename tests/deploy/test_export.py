"""The exported C program compiles without a warning and prints the integers Python computes."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest

from qsnn_ext.deploy import export_c
from qsnn_ext.deploy.export import resident_size
from qsnn_ext.deploy.reference import ReferenceSession
from tests.deploy.random_programs import random_block, random_input, random_program

GCC = shutil.which("gcc") or shutil.which("cc")
FLAGS = ["-std=c99", "-O1", "-Wall", "-Wextra", "-Werror"]
TARGETS = {
    "plain": [GCC],
    "native": [GCC, "-march=native"],
    "no vectors": [GCC, "-DQSNN_PLAIN"],
    "32 bit": [GCC, "-m32"],
    "arm": ["arm-linux-gnueabihf-gcc", "-static"],
    "sanitized native": [
        GCC,
        "-march=native",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    ],
    "sanitized": [GCC, "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"],
}
PROBE = '#include <stdio.h>\nint main(void) { return puts("") < 0; }\n'


def compiler(target, folder) -> list[str]:
    """Compile command of a target; skips where the machine cannot build for it."""
    command = TARGETS[target]
    if command[0] is None or shutil.which(command[0]) is None:
        pytest.skip(f"{command[0] or 'a C compiler'} is not installed")
    probe = folder / "probe.c"
    probe.write_text(PROBE)
    done = subprocess.run(
        [*command, str(probe), "-o", str(folder / "probe")], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no libraries for {target}: {done.stderr.strip().splitlines()[0]}")
    return command


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("make", "seed"),
    [(random_program, 3), (random_program, 8), (random_program, 21), (random_block, 1)],
)
def test_same_bits_as_python(target, make, seed, tmp_path):
    command = compiler(target, tmp_path)
    program = make(seed)
    folder = tmp_path / "c"
    export_c(program, folder, verbose=False)
    sources = sorted(str(p) for p in folder.glob("*.c"))
    binary = tmp_path / "net"
    subprocess.run([*command, *FLAGS, *sources, "-o", str(binary)], check=True)
    runner = [str(binary)]
    if target == "arm":
        qemu = shutil.which("qemu-arm") or shutil.which("qemu-arm-static")
        if qemu is None:
            pytest.skip("qemu-arm is not installed")
        runner = [qemu, str(binary)]
    x = random_input(program, np.random.default_rng(seed), 1, 4)
    done = subprocess.run(runner, input=x.tobytes(), capture_output=True, check=True)
    session = ReferenceSession(program)
    expected = np.concatenate([a.reshape(-1) for t in range(4) for a in session.step(x[:, t])])
    np.testing.assert_array_equal(np.array(done.stdout.split(), int), expected)


@pytest.mark.skipif(GCC is None or shutil.which("nm") is None, reason="needs gcc and nm")
def test_no_heap(tmp_path):
    export_c(random_program(3), tmp_path, verbose=False)
    subprocess.run(
        [GCC, *FLAGS, "-c", str(tmp_path / "qsnn.c"), "-o", str(tmp_path / "qsnn.o")], check=True
    )
    symbols = subprocess.run(
        ["nm", "-u", str(tmp_path / "qsnn.o")], capture_output=True, text=True, check=True
    ).stdout
    needed = {line.split()[-1] for line in symbols.splitlines()}
    assert needed <= {"memcpy", "memset", "memmove", "__stack_chk_fail", "_GLOBAL_OFFSET_TABLE_"}


def test_sizes_are_printed(tmp_path, capsys):
    program = random_program(3)
    size = export_c(program, tmp_path)
    assert size == resident_size(program)
    printed = capsys.readouterr().out
    assert f"{size.flash:,}" in printed
    assert f"{size.ram:,}" in printed
    assert (tmp_path / "main.c").read_text().count("\n") <= 25
