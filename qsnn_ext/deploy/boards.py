"""Ready projects around an exported model: bare metal under an emulator, Arduino, PlatformIO."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qsnn_ext.deploy.program import IntArray
from qsnn_ext.errors import FormatError

TARGETS = Path(__file__).with_name("targets")


@dataclass(frozen=True)
class Board:
    """A bare-metal board that an emulator of Debian has.

    Args:
        core: Its processor, for people.
        compiler: Compiler; the other tools have the same prefix.
        flags: What the core needs of the compiler.
        startup: Source of start-up, output and clock, in ``targets/bare``.
        emulator: Command that runs a program; ``-icount`` makes an instruction a nanosecond.
        packages: Debian's packages with all of it.
    """

    core: str
    compiler: str
    flags: str
    startup: str
    emulator: str
    packages: str


_ARM = "arm-none-eabi-gcc"
_ARM_PACKAGES = "gcc-arm-none-eabi libnewlib-arm-none-eabi qemu-system-arm"
_SEMIHOSTING = (
    "-display none -monitor none -serial none -chardev stdio,id=out "
    "-semihosting-config enable=on,target=native,chardev=out -icount shift=0"
)

BOARDS = {
    "mps2-an386": Board(
        "Cortex-M4", _ARM,
        "-mcpu=cortex-m4 -mthumb -DTICK_NUMERATOR=40u -DTICK_DENOMINATOR=1u",
        "cortex_m.c", f"qemu-system-arm -M mps2-an386 {_SEMIHOSTING}", _ARM_PACKAGES,
    ),
    "mps3-an547": Board(
        "Cortex-M55", _ARM,
        "-mcpu=cortex-m55 -mthumb -mfloat-abi=hard -DTICK_NUMERATOR=125u -DTICK_DENOMINATOR=4u",
        "cortex_m.c", f"qemu-system-arm -M mps3-an547 {_SEMIHOSTING}", _ARM_PACKAGES,
    ),
    "riscv32-virt": Board(
        "RV32IMAC", "riscv64-unknown-elf-gcc",
        "-march=rv32imac -mabi=ilp32 -misa-spec=2.2 -specs=picolibc.specs", "riscv32.c",
        "qemu-system-riscv32 -M virt -bios none -nographic -icount shift=0",
        "gcc-riscv64-unknown-elf picolibc-riscv64-unknown-elf qemu-system-misc",
    ),
}  # fmt: skip

_MAKEFILE = """\
# {board}, a {core}. `make` builds firmware.elf, `make run` runs it in the emulator and `make size`
# says what it occupies. Debian's packages for it: {packages}
CC = {compiler}
OPTIMIZE = -O2
FLAGS = {flags}
WARNINGS = -Wall -Wextra -Wconversion -Wpedantic
CFLAGS = -std=c99 $(OPTIMIZE) $(FLAGS) $(WARNINGS) -ffunction-sections -fdata-sections
LDFLAGS = -nostartfiles -T {board}.ld -L . -Wl,--gc-sections
SOURCES = {sources}
COMMAND = $(CC) $(CFLAGS) $(LDFLAGS) $(SOURCES) -o firmware.elf

firmware.elf: $(SOURCES) $(wildcard *.h) {board}.ld sections.ld .command
\t$(COMMAND)

# What it was built by: with other flags it is built anew.
.command: FORCE
\t@echo '$(COMMAND)' | cmp -s - $@ || echo '$(COMMAND)' > $@
FORCE:

run: firmware.elf
\t{emulator} -kernel firmware.elf

size: firmware.elf
\t{size} firmware.elf

clean:
\trm -f firmware.elf .command

.PHONY: run size clean FORCE
"""


def write_board(name: str, folder: Path, sources: list[str]) -> dict[str, str]:
    """Texts of what a board's project has beside the model: name of file -> text.

    Args:
        name: Key of ``BOARDS``.
        folder: Templates.
        sources: The model's C files.
    """
    board = BOARDS[name]
    shared = ("main.c", "board.h", "startup.h", "sections.ld", board.startup, f"{name}.ld")
    files = {f: (folder / f).read_text() for f in shared}
    files["Makefile"] = _MAKEFILE.format(
        board=name, core=board.core, packages=board.packages, compiler=board.compiler,
        flags=board.flags, emulator=board.emulator,
        size=board.compiler.replace("-gcc", "-size"),
        sources=" ".join(sorted([*sources, "main.c", board.startup])),
    )  # fmt: skip
    return files


def check_room(board: str, flash: int, memory: int) -> None:
    """Check what a board can hold, as far as it is known before a compiler has seen the code.

    Args:
        board: Key of ``BOARDS``.
        flash: Bytes of constants: the network and its samples.
        memory: Bytes that the network writes to.

    Raises:
        FormatError: If the board has less.
    """
    script = (TARGETS / "bare" / f"{board}.ld").read_text()
    stack = _bytes(r"link_stack_size = (\d+)([KM])", (TARGETS / "bare/sections.ld").read_text())
    for region, what, needed in (
        ("FLASH", "constants", flash), ("RAM", "memory and stack", memory + stack),
    ):  # fmt: skip
        there = _bytes(rf"{region} .*LENGTH = (\d+)([KM])", script)
        if needed > there:
            raise FormatError(
                f"{board} has {there:,} bytes of {region} and the network needs {needed:,} for "
                f"{what}: take fewer samples, a smaller network, or another board"
            )


def _bytes(pattern: str, script: str) -> int:
    found = re.search(pattern, script)
    assert found is not None
    return int(found[1]) * {"K": 2**10, "M": 2**20}[found[2]]


def samples_header(codes: IntArray, static: bool) -> str:
    """``samples.h``: input codes as constants.

    Args:
        codes: ``[N, C, H, W]`` (``static``) or ``[N, T, C, H, W]``.
        static: Whether the same input is shown at every step.
    """
    flat = codes.reshape(len(codes), -1)
    stride = "0 /* the same at every step */" if static else "MODEL_INPUT_SIZE"
    lines = [
        "/* Bundled samples, as input codes. */",
        "#ifndef SAMPLES_H",
        "#define SAMPLES_H",
        "",
        f"#define SAMPLES {len(flat)}",
        f"#define SAMPLE_STRIDE {stride}",
        "",
        f"static const model_code samples[SAMPLES][{flat.shape[1]}] = {{",
    ]
    for row in flat.tolist():
        lines += ["    {", *folded(row, "        "), "    },"]
    return "\n".join([*lines, "};", "", "#endif", ""])


def folded(numbers: list[int], indent: str) -> list[str]:
    """Numbers of an initializer, as lines of up to 96 characters."""
    lines, line = [], indent.rstrip("\n")
    for number in numbers:
        if len(line) + len(str(number)) > 94:
            lines.append(line.rstrip())
            line = indent
        line += f"{number}, "
    return [*lines, line.rstrip()]


def fits_bytes(lo: int, hi: int) -> bool:
    """Whether all input codes are bytes."""
    return 0 <= lo <= hi <= np.iinfo(np.uint8).max
