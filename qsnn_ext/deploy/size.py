"""What an exported program occupies on a device, in parts."""

from __future__ import annotations

import re
import shlex
import subprocess
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qsnn_ext.deploy.boards import fits_bytes
from qsnn_ext.deploy.image import Image
from qsnn_ext.deploy.program import Conv, Program, words
from qsnn_ext.errors import ConfigError


@dataclass(frozen=True)
class ResidentSize:
    """Memory of a program on a device, in bytes.

    ``weights`` and ``membranes`` are what :func:`qsnn_ext.footprint` counts as such with
    ``accounting="resident"``; its ``scales`` and ``others`` are real numbers, which became
    ``constants`` here. All the rest is in no footprint.

    Args:
        weights: Packed weights.
        constants: Multipliers, shifts and biases of layers, tables of neurons.
        layout: What executing from flash adds: lists of operations, alignment, padding of rows.
        pixels: The table from pixels to input codes, where one is written.
        membranes: Membrane potentials of one sample, packed.
        resets: Last spikes of neurons that reset a step later (snnTorch's ``reset_delay``), and
            alignment of the membrane potentials.
        activations: Spikes and currents between layers, and scratch, of one running sample.
        io: Input codes and answers of one time step.
        code: Machine code of runtime and model, where a compiler was named; otherwise 0.
        stack: Stack that a run needs, where the compiler tells (gcc); otherwise 0.
    """

    weights: int
    constants: int
    layout: int
    pixels: int
    membranes: int
    resets: int
    activations: int
    io: int
    code: int = 0
    stack: int = 0

    @property
    def flash(self) -> int:
        """Everything that is only read."""
        return self.weights + self.constants + self.layout + self.pixels + self.code

    @property
    def ram(self) -> int:
        """Everything that is written to."""
        return self.memory + self.io + self.stack

    @property
    def memory(self) -> int:
        """What ``NAME_memory`` holds: everything that is written to but input, answers, stack."""
        return self.membranes + self.resets + self.activations

    def __str__(self) -> str:
        code = f", code {self.code:,}" if self.code else "; code is not counted"
        stack = f", stack {self.stack:,}" if self.stack else "; stack is not counted"
        return (
            f"flash {self.flash:,} bytes (weights {self.weights:,}, constants {self.constants:,}, "
            f"layout {self.layout:,}, pixel table {self.pixels:,}{code}); RAM {self.ram:,} bytes "
            f"(membranes {self.membranes:,}, resets and alignment {self.resets:,}, activations and "
            f"scratch {self.activations:,}, input and output {self.io:,}{stack})"
        )


def size_of(
    program: Program, image: Image, pixels: int = 0, code: int = 0, stack: int = 0
) -> ResidentSize:
    """The parts of an image that was built for a device."""
    weights = constants = membranes = 0
    for op in program.ops:
        if isinstance(op, Conv):
            groups, rows, columns = op.weight.shape  # columns: words of bits, or bytes
            weights += groups * rows * (columns if op.binary else words(8 * columns)) * 4
        for name in ("multiplier", "shift", "bias", "leak", "threshold", "bounds", "reset_value",
                     "reading", "channel", "row", "column"):  # fmt: skip
            array = getattr(op, name, None)
            constants += array.nbytes if isinstance(array, np.ndarray) else 0
    for neuron in program.neurons:
        c, h, w = program.values[neuron.source].shape
        membranes += h * w * (c if neuron.bits == 32 else neuron.bits * words(c)) * 4
    for delay in program.delays:
        c, h, w = program.values[delay.source].shape
        planes = program.values[delay.source].planes
        membranes += h * w * (planes * words(c) if planes else c) * 4
    item = 1 if fits_bytes(*program.input_range) else 2
    io = item * program.values[0].elements
    io += 4 * sum(program.values[i].elements for i in program.outputs)
    layout = 4 * image.words.size - weights - constants
    resets = 4 * max(image.state_words, 1) - membranes
    activations = 4 * image.arena_words
    return ResidentSize(
        weights, constants, layout, pixels, membranes, resets, activations, io, code, stack
    )


def compiled_size(library: dict[str, str], name: str, compiler: str) -> tuple[int, int]:
    """Bytes of code, and of stack that ``NAME_sum`` needs (0 where the compiler does not tell).

    Args:
        library: Files of the exported library: name -> text.
        name: Of the model, whose constants are not counted.
        compiler: Command with all flags, such as ``"arm-none-eabi-gcc -mcpu=cortex-m4 -Os"``.

    Raises:
        ConfigError: If the compiler cannot be run or does not accept the sources.
    """
    try:
        command = shlex.split(compiler)
    except (ValueError, AttributeError, TypeError):
        command = []
    if not command:
        raise ConfigError(f"compiler={compiler!r} must be a command, such as 'cc -Os'")
    with tempfile.TemporaryDirectory() as scratch:
        for path, text in library.items():
            (Path(scratch) / path).write_text(text, encoding="ascii")
        size_tool = _run([*command, "-print-prog-name=size"], scratch, compiler).strip() or "size"
        code, graphs = 0, ""
        for source in sorted(path for path in library if path.endswith(".c")):
            build = [*command, "-std=c99", "-c", source, "-o", f"{source}.o"]
            try:
                _run([*build, "-fcallgraph-info=su"], scratch, compiler)
            except ConfigError:
                _run(build, scratch, compiler)
            kinds = (".text",) if source == f"{name}.c" else (".text", ".rodata", ".data")
            for line in _run([size_tool, "-A", f"{source}.o"], scratch, compiler).splitlines():
                section, *numbers = line.split() or [""]
                if section.startswith(kinds):
                    code += int(numbers[0])
        graphs = "\n".join(p.read_text() for p in sorted(Path(scratch).glob("*.ci")))
    return code, _deepest(graphs, f"{name}_sum")


def _run(command: list[str], folder: str, compiler: str) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"compiler={compiler!r}: {command[0]} cannot be run: {error}") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no message"]
        raise ConfigError(f"compiler={compiler!r} cannot build the network: {said[0][:200]}")
    return done.stdout


def _deepest(graphs: str, root: str) -> int:
    """Bytes of stack along the longest chain of calls; gcc's ``-fcallgraph-info=su``."""
    own = {
        m[1].split(":")[-1]: int(m[2])
        for m in re.finditer(r'node: \{ title: "([^"]+)" label: "[^"]*?(\d+) bytes \(', graphs)
    }
    calls = defaultdict(set)
    for m in re.finditer(r'edge: \{ sourcename: "([^"]+)" targetname: "([^"]+)"', graphs):
        calls[m[1].split(":")[-1]].add(m[2].split(":")[-1])

    def depth(function: str, above: tuple[str, ...] = ()) -> int:
        if function in above:
            return 0
        below = (depth(f, (*above, function)) for f in calls[function])
        return own.get(function, 0) + max(below, default=0)

    return depth(root) if root in own else 0
