"""The runtime alone, compiled for any machine and with any sanitizer, fed with images."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from qsnn_ext.deploy.engine import _unpack_state
from qsnn_ext.deploy.export import RUNTIME
from qsnn_ext.deploy.image import Image
from qsnn_ext.deploy.program import Program
from qsnn_ext.deploy.reference import ReferenceSession

STRICT = ["-std=c99", "-g", "-Wall", "-Wextra", "-Werror", "-fno-sanitize-recover=all"]
UNDEFINED = ["-fsanitize=address,undefined"]
INTEGER = ["-fsanitize=address,undefined,integer"]
PLAIN = ["-DQSNN_PLAIN"]
NATIVE = ["-march=native"]


@dataclass(frozen=True)
class Target:
    """A compiler, its flags, Debian's packages that have it, and what runs the result."""

    command: tuple[str, ...]
    packages: str
    runner: tuple[str, ...] = ()
    order: str = "<"


def big_endian(name: str, emulated: str = "", flags: Sequence[str] = ()) -> Target:
    """Debian's cross compiler for a processor, and qemu."""
    return Target(
        (f"{name}-linux-gnu-gcc", "-static", *flags),
        f"gcc-{name}-linux-gnu qemu-user",
        (f"qemu-{emulated or name}",),
        ">",
    )


TARGETS = {
    "gcc": Target(("gcc", *UNDEFINED), "gcc"),
    "gcc native": Target(("gcc", *UNDEFINED, *NATIVE), "gcc"),
    "gcc plain": Target(("gcc", *UNDEFINED, *PLAIN), "gcc"),
    "clang integer": Target(("clang", *INTEGER), "clang"),
    "clang integer native": Target(("clang", *INTEGER, *NATIVE), "clang"),
    "clang integer plain": Target(("clang", *INTEGER, *PLAIN), "clang"),
    "mips": big_endian("mips"),
    "ppc": big_endian("powerpc", "ppc"),
    "s390x": big_endian("s390x"),
    "s390x plain": big_endian("s390x", flags=PLAIN),
}


def compiled(name: str, folder: Path, optimize: str = "-O0") -> list[str]:
    """Command that runs the harness on a target; skips the test where it cannot be built.

    Without optimization compiling takes a tenth of the time and the checks are the same; many
    programs want ``-O1``, which runs faster.
    """
    target = TARGETS[name]
    for tool in (target.command[0], *target.runner[:1]):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed: apt-get install {target.packages}")
    probe = folder / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    binary = folder / "harness"
    done = subprocess.run(
        [*target.command, str(probe), "-o", str(binary)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"{name} does not link: apt-get install {target.packages}")
    sources = [str(Path(__file__).with_name("harness.c")), str(RUNTIME / "qsnn.c")]
    command = [*target.command, *STRICT, optimize, "-I", str(RUNTIME), *sources, "-o", str(binary)]
    subprocess.run(command, check=True)
    return [*target.runner, str(binary)]


def run(
    command: list[str], name: str, images: list[Image], inputs: list[np.ndarray]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Answers and state words of every image, given its input ``[T, C, H, W]``."""
    order = TARGETS[name].order
    given = bytearray()
    for image, x in zip(images, inputs, strict=True):
        for words in ([image.words.size], image.words, [len(x)], x.astype(np.int32)):
            array = np.asarray(words)
            kind = array.dtype if array.dtype != np.int64 else np.dtype(np.uint32)
            given += array.astype(kind.newbyteorder(order)).tobytes()
    done = subprocess.run(command, input=bytes(given), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    words = np.frombuffer(done.stdout, f"{order}u4").astype(np.uint32)
    found, at = [], 0
    for image, x in zip(images, inputs, strict=True):
        answers = len(x) * int(image.words[4])  # header.output_words
        end = at + answers + image.state_words
        found.append((words[at : at + answers].view(np.int32), words[at + answers : end]))
        at = end
    assert at == words.size
    return found


def same_as_reference(
    program: Program, image: Image, x: np.ndarray, answers: np.ndarray, state: np.ndarray
) -> None:
    """Compare what the harness gave with the NumPy reference."""
    session = ReferenceSession(program)
    expected = [a.reshape(-1) for t in range(len(x)) for a in session.step(x[None, t])]
    np.testing.assert_array_equal(answers, np.concatenate(expected))
    want = session.state()
    for slot in image.slots:
        np.testing.assert_array_equal(_unpack_state(state, slot), want[slot.name][0])
