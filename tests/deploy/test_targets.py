"""Exported programs on every target that zig compiles for and qemu runs: ``nox -s targets``."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys

import numpy as np
import pytest

from qsnn_ext.deploy import export_c
from qsnn_ext.deploy.boards import fits_bytes
from qsnn_ext.deploy.reference import ReferenceSession
from tests.deploy.random_programs import random_block, random_input, random_program

pytestmark = pytest.mark.sweep

#: Name of row -> zig's target and flags, and the emulator's command.
TARGETS = {
    "x86-64": (["x86_64-linux-musl"], []),
    "x86-64, AVX2": (["x86_64-linux-musl", "-mcpu=x86_64_v3"], []),
    "x86, 32 bits": (["x86-linux-musl"], ["qemu-i386"]),
    "Arm, 64 bits, NEON": (["aarch64-linux-musl"], ["qemu-aarch64"]),
    "Arm, 64 bits, big-endian": (["aarch64_be-linux-musl"], ["qemu-aarch64_be"]),
    "Arm, 32 bits": (["arm-linux-musleabihf"], ["qemu-arm"]),
    "Arm, 32 bits, NEON": (["arm-linux-musleabihf", "-mcpu=cortex_a9"], ["qemu-arm"]),
    "RISC-V, 64 bits": (["riscv64-linux-musl"], ["qemu-riscv64"]),
    "RISC-V, 64 bits, V": (
        ["riscv64-linux-musl", "-mcpu=baseline_rv64+v"],
        ["qemu-riscv64", "-cpu", "rv64,v=true,vlen=128"],
    ),
    "RISC-V, 32 bits": (["riscv32-linux-musl"], ["qemu-riscv32"]),
    "PowerPC, 64 bits, VSX": (["powerpc64le-linux-musl"], ["qemu-ppc64le"]),
    "PowerPC, 64 bits, big-endian": (["powerpc64-linux-musl"], ["qemu-ppc64"]),
    "PowerPC, 32 bits, big-endian": (["powerpc-linux-musleabihf"], ["qemu-ppc"]),
    "MIPS, 32 bits": (["mipsel-linux-musleabihf"], ["qemu-mipsel"]),
    "MIPS, 32 bits, big-endian": (["mips-linux-musleabihf"], ["qemu-mips"]),
    "MIPS, 64 bits": (["mips64el-linux-muslabi64"], ["qemu-mips64el"]),
    "s390x, big-endian": (["s390x-linux-musl"], ["qemu-s390x"]),
    # Without vectors, which zig would use and qemu before 8.1 does not know.
    "LoongArch, 64 bits": (["loongarch64-linux-musl", "-mcpu=baseline-lsx"], ["qemu-loongarch64"]),
}
PROGRAMS = [(random_program, 3), (random_program, 8), (random_program, 21), (random_block, 1)]


def version(emulator):
    """Name and version of an emulator."""
    if not emulator:
        return "none"
    said = subprocess.run([emulator[0], "--version"], capture_output=True, text=True, check=True)
    return " ".join(said.stdout.split()[:3:2])


@pytest.mark.parametrize("target", TARGETS)
def test_same_integers(target, tmp_path, record_property):
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("zig is not installed: pip install ziglang")
    (triple, *flags), emulator = TARGETS[target]
    if emulator and shutil.which(emulator[0]) is None:
        pytest.skip(f"{emulator[0]} is not installed: apt-get install qemu-user")
    zig = [sys.executable, "-m", "ziglang", "cc", f"--target={triple}", *flags, "-std=c99", "-O2"]
    record_property("target", " ".join([triple, *flags]))
    record_property("emulator", version(emulator))
    runtime, compiled = str(tmp_path / "qsnn.o"), None
    for make, seed in PROGRAMS:
        program = make(seed)
        folder = tmp_path / f"{make.__name__}{seed}"
        export_c(program, folder, "stdio", verbose=False)
        binary, own = str(folder / "net"), [str(folder / f) for f in ("main.c", "model.c")]
        texts = {path.name: path.read_text() for path in folder.glob("qsnn*")}
        if texts != compiled:  # the same runtime serves all programs
            subprocess.run([*zig, "-c", str(folder / "qsnn.c"), "-o", runtime], check=True)
            compiled = texts
        subprocess.run([*zig, "-static", *own, runtime, "-o", binary], check=True)
        codes = random_input(program, np.random.default_rng(seed), 1, 4)
        big = triple.split("-")[0] in ("aarch64_be", "powerpc64", "powerpc", "mips", "s390x")
        kind = "u1" if fits_bytes(*program.input_range) else ">i2" if big else "<i2"
        done = subprocess.run(
            [*emulator, binary], input=codes.astype(kind).tobytes(), capture_output=True, check=True
        )
        session = ReferenceSession(program)
        expected = [a.reshape(-1) for t in range(4) for a in session.step(codes[:, t])]
        np.testing.assert_array_equal(np.array(done.stdout.split(), int), np.concatenate(expected))
