"""What a small network takes on microcontrollers, measured under emulators.

``python -m benchmarks.devices`` exports the two networks of ``recipes/results/devices`` for every
board of :data:`qsnn_ext.deploy.boards.BOARDS`, builds them with the board's own compiler, runs ten
samples under qemu with ``-icount shift=0``, which counts instructions, compares the answers with
the NumPy reference, and writes ``results/devices.json``. ``python docs/generate.py`` puts it into
``docs/devices.md``. Debian's packages for all boards: gcc-arm-none-eabi libnewlib-arm-none-eabi
qemu-system-arm gcc-riscv64-unknown-elf picolibc-riscv64-unknown-elf qemu-system-misc.
"""

from __future__ import annotations

import base64
import datetime
import json
import re
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from qsnn_ext.deploy import DeployedModel, export_c, load_program, pixel_table
from qsnn_ext.deploy.boards import BOARDS, Board, fits_bytes
from qsnn_ext.deploy.program import Program

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "recipes" / "results" / "devices"
RESULTS = Path(__file__).with_name("results") / "devices.json"
PLAIN = "-O2 -DQSNN_PLAIN"
#: Flags beside the board's own -> what the table calls them.
BUILDS = {"-O2": "-O2", "-Os": "-Os", PLAIN: "-O2, plain words"}


def card(name: str) -> dict[str, Any]:
    """What ``recipes.devices`` noted of a network: data, accuracy, normalisation, samples."""
    noted: dict[str, Any] = json.loads((MODELS / f"{name}.json").read_text())
    return noted


def samples(name: str) -> tuple[Program, Any, Any]:
    """Program, the card's ten samples as codes, and the sums of answers the reference gives."""
    program = load_program(MODELS / f"{name}.qsnn")
    noted = card(name)
    raw = np.stack([np.frombuffer(base64.b64decode(s), np.uint8) for s in noted["samples"]])
    codes = raw.reshape(len(raw), *noted["shape"]).astype(np.int32)
    if "mean" in noted:
        codes = pixel_table(program, noted["mean"], noted["std"])[0][codes].astype(np.int32)
    given = codes if codes.ndim == 4 else codes.swapaxes(0, 1)
    sums = DeployedModel(program, "numpy").integers(given)[0].astype(np.int64).sum(0)
    return program, codes, sums.reshape(len(raw), -1)


def run(board: str, name: str, flags: str) -> dict[str, Any]:
    """Build and run a network on a board; what it took."""
    spec = BOARDS[board]
    program, codes, sums = samples(name)
    with tempfile.TemporaryDirectory() as folder:
        compiler = f"{spec.compiler} {spec.flags} {flags}"
        size = export_c(program, folder, board, name=name, samples=codes, compiler=compiler,
                        verbose=False)  # fmt: skip
        taken = built_and_run(spec, Path(folder), sums, f"OPTIMIZE={flags}")
    return {
        "board": board, "core": spec.core, "network": name, "steps": program.timesteps,
        "build": BUILDS[flags],
        "instructions": taken["instructions"],
        "flash": size.flash,
        "code": size.code,
        "ram": size.ram - size.stack,
        "stack": taken["stack"],
        "stack_by_compiler": size.stack,
        "firmware_flash": taken["flash"], "firmware_ram": taken["ram"], "samples": len(sums),
        "sample_bytes": codes.size * (1 if fits_bytes(*program.input_range) else 2),
    }  # fmt: skip


def built_and_run(spec: Board, folder: Path, answers: Any, *variables: str) -> dict[str, int]:
    """Build a board's project, run its samples, and check the answers; what they took.

    Args:
        spec: The board.
        folder: Of the project.
        answers: What each sample has to give ``[N, K]``.
        variables: Of its Makefile, such as ``"OPTIMIZE=-O2"``.

    Returns:
        Mean ``instructions`` of a sample, bytes of ``stack``, ``flash`` and ``ram``.
    """
    make = ["make", "-s", "-C", str(folder), *variables]
    subprocess.run(make, check=True)
    printed = subprocess.run(
        [*make, "run"], check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL
    ).stdout
    lines = re.findall(r"instructions (\d+), answers((?: -?\d+)+)", printed)
    given = np.array([[int(n) for n in found.split()] for _, found in lines])
    np.testing.assert_array_equal(given, answers)
    stack = re.search(r"stack (\d+)", printed)
    assert stack is not None, printed
    flash, ram = sections(spec, folder / "firmware.elf")
    instructions = round(statistics.mean(int(n) for n, _ in lines))
    return {"instructions": instructions, "stack": int(stack[1]), "flash": flash, "ram": ram}


def sections(spec: Board, firmware: Path) -> tuple[int, int]:
    """Bytes of flash and RAM of a firmware, its samples included, its stack not."""
    tool = spec.compiler.replace("-gcc", "-size")
    listed = subprocess.run([tool, "-A", str(firmware)], check=True, capture_output=True, text=True)
    found = {p[0]: int(p[1]) for line in listed.stdout.splitlines()
             if len(p := line.split()) == 3 and p[1].isdigit()}  # fmt: skip
    flash = sum(found.get(s, 0) for s in (".text", ".ARM.exidx", ".data"))
    return flash, found.get(".data", 0) + found.get(".bss", 0)


def main() -> None:
    rows = []
    for name in ("digits", "events"):
        for board in BOARDS:
            for flags in BUILDS if name == "digits" else ["-O2"]:
                if flags == PLAIN and board != "mps3-an547":
                    continue  # the others have no vectors
                rows.append(run(board, name, flags))
                row = rows[-1]
                print(f"{name:<7} {board:<13} {row['build']:<17} {row['instructions']:>12,} "
                      f"instructions, flash {row['flash']:>7,}, RAM "
                      f"{row['ram']:>7,}, stack {row['stack']:>5,}", flush=True)  # fmt: skip
    compilers = {
        spec.compiler: subprocess.run([spec.compiler, "-dumpfullversion"], check=True,
                                      capture_output=True, text=True).stdout.strip()
        for spec in BOARDS.values()
    }  # fmt: skip
    content = {
        "date": datetime.date.today().isoformat(), "compilers": compilers, "rows": rows,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
