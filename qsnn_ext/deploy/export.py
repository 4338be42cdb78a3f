"""Writes a program as self-contained C99: the runtime's source, the model as constants, a main."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from qsnn_ext.deploy.image import Image, build_image
from qsnn_ext.deploy.layout import MEMORY_LIMIT
from qsnn_ext.deploy.program import Conv, IntArray, Program, words
from qsnn_ext.deploy.records import LAYOUT
from qsnn_ext.errors import ConfigError, InputTypeError

Optimize: TypeAlias = Literal["size", "speed"]

RUNTIME = Path(__file__).with_name("runtime")
SOURCES = ("qsnn.c", *sorted(p.name for p in RUNTIME.glob("*.h")))

_MODEL_H = """\
/* {title}: written by qsnn_ext.deploy.export_c. */
#ifndef QSNN_MODEL_H
#define QSNN_MODEL_H

#include "qsnn.h"
#if QSNN_LAYOUT != {layout}
#error "this model and the qsnn.c beside it were written by different versions; export it again"
#endif

#define QSNN_STATE_WORDS {state}
#define QSNN_ARENA_WORDS {arena}
#define QSNN_INPUT_WORDS {input}   /* one time step: {input_shape} */
#define QSNN_OUTPUT_WORDS {output}  /* one time step */

extern const uint32_t qsnn_model[{image}];
{pixels}
#endif
"""

_PIXELS_H = """\
extern const int16_t qsnn_pixel_code[{channels}][256]; /* input codes of 8-bit pixels */
"""

_MAIN_C = """\
/* Reads the input codes of one time step after the other (int32) and prints the answers. */
#include <stdio.h>
#include "model.h"
#ifdef _WIN32
#include <fcntl.h>
#include <io.h>
#endif

static uint32_t state[QSNN_STATE_WORDS], arena[QSNN_ARENA_WORDS];
static int32_t input[QSNN_INPUT_WORDS], output[QSNN_OUTPUT_WORDS];

int main(void) {
#ifdef _WIN32
    _setmode(0, _O_BINARY); /* codes are bytes; as text they would end at the first 0x1A */
#endif
    setvbuf(stdin, 0, _IONBF, 0), setvbuf(stdout, 0, _IONBF, 0); /* stdio buffers are heap */
    qsnn_reset(qsnn_model, state);
    while (fread(input, sizeof input, 1, stdin)) {
        qsnn_run(qsnn_model, state, arena, input, 1, 0, output);
        for (int i = 0; i < QSNN_OUTPUT_WORDS; i++) printf("%ld\\n", (long)output[i]);
    }
}
"""


@dataclass(frozen=True)
class ResidentSize:
    """Memory of a program on a device, in bytes; code is not counted.

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
    """

    weights: int
    constants: int
    layout: int
    pixels: int
    membranes: int
    resets: int
    activations: int
    io: int

    @property
    def flash(self) -> int:
        """Everything that is only read."""
        return self.weights + self.constants + self.layout + self.pixels

    @property
    def ram(self) -> int:
        """Everything that is written to."""
        return self.membranes + self.resets + self.activations + self.io

    def __str__(self) -> str:
        return (
            f"flash {self.flash:,} bytes (weights {self.weights:,}, constants {self.constants:,}, "
            f"layout {self.layout:,}, pixel table {self.pixels:,}); RAM {self.ram:,} bytes "
            f"(membranes {self.membranes:,}, resets and alignment {self.resets:,}, activations and "
            f"scratch {self.activations:,}, input and output {self.io:,})"
        )


def resident_size(
    program: Program, *, optimize: Optimize = "size", memory_limit: int = MEMORY_LIMIT
) -> ResidentSize:
    """What a program occupies when it runs as exported C, one sample at a time.

    Args:
        program: A valid program.
        optimize, memory_limit: As for :func:`export_c`.

    Raises:
        FormatError: If the program is not valid or needs more memory than the limit.
        ConfigError: If ``optimize`` is neither.
    """
    return _resident_size(program, _image(program, optimize, memory_limit), 0)


def _image(program: Program, optimize: str, memory_limit: int) -> Image:
    if optimize not in ("size", "speed"):
        raise ConfigError(f"optimize={optimize!r} must be 'size' or 'speed'")
    return build_image(program, compact=optimize == "size", memory_limit=memory_limit)


def _resident_size(program: Program, image: Image, pixels: int) -> ResidentSize:
    weights = constants = membranes = 0
    for op in program.ops:
        if isinstance(op, Conv):
            groups, rows, columns = op.weight.shape  # columns: words of bits, or bytes
            weights += groups * rows * (columns if op.binary else words(8 * columns)) * 4
        for name in ("multiplier", "shift", "bias", "leak", "threshold", "bounds", "reset_value",
                     "reading"):  # fmt: skip
            array = getattr(op, name, None)
            constants += array.nbytes if isinstance(array, np.ndarray) else 0
    for neuron in program.neurons:
        c, h, w = program.values[neuron.source].shape
        membranes += h * w * (c if neuron.bits == 32 else neuron.bits * words(c)) * 4
    io = program.values[0].elements + sum(program.values[i].elements for i in program.outputs)
    return ResidentSize(
        weights, constants, 4 * image.words.size - weights - constants, pixels, membranes,
        4 * max(image.state_words, 1) - membranes, 4 * image.arena_words, 4 * io,
    )  # fmt: skip


def export_c(
    program: Program,
    folder: str | os.PathLike[str],
    *,
    pixels: IntArray | None = None,
    optimize: Optimize = "size",
    memory_limit: int = MEMORY_LIMIT,
    verbose: bool = True,
) -> ResidentSize:
    """Write a program as C99 that needs no heap and no library but the standard one.

    Compile with ``cc -std=c99 -O2 *.c``; flags such as ``-march=native`` select vector code. The
    answers are the integers Python gives.

    Args:
        program: A valid program.
        folder: Where to write ``qsnn.c``, its headers, ``model.c``, ``model.h`` and ``main.c``;
            created if missing.
        pixels: Table of :func:`~qsnn_ext.deploy.pixel_table`, to be written as
            ``qsnn_pixel_code[channel][pixel]`` beside the model.
        optimize: ``"size"`` stores what is used and no more. ``"speed"`` also stores what makes
            layers faster: weights in the order of both ways to count, tables that decide spikes on
            bits, alignment to cache lines. The integers are the same.
        memory_limit: Bytes that the program may take on the device.
        verbose: Print the memory it takes.

    Returns:
        The memory it takes.

    Raises:
        ConfigError: If ``optimize`` is neither.
        FormatError: If the program is not valid or needs more memory than the limit.
        InputTypeError: If ``pixels`` is not a table for this program.
    """
    image = _image(program, optimize, memory_limit)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    shape = program.values[0].shape
    declaration = definition = ""
    if pixels is not None:
        if not isinstance(pixels, np.ndarray) or (pixels.shape, pixels.dtype) != (
            (shape[0], 256), np.dtype(np.int16)
        ):  # fmt: skip
            raise InputTypeError(
                f"pixels must be an int16 array of shape ({shape[0]}, 256): "
                "pixel_table(program, mean, std)"
            )
        declaration = _PIXELS_H.format(channels=shape[0])
        definition = _pixel_constants(pixels)
    for name in SOURCES:
        (target / name).write_bytes((RUNTIME / name).read_bytes())
    size = _resident_size(program, image, 0 if pixels is None else pixels.nbytes)
    header = _MODEL_H.format(
        title=_identifier(program.metadata.get("model", "model")),
        layout=LAYOUT,
        state=max(image.state_words, 1),
        arena=image.arena_words,
        input=program.values[0].elements,
        input_shape=list(shape),
        output=sum(program.values[i].elements for i in program.outputs),
        image=image.words.size,
        pixels=declaration,
    )
    (target / "model.h").write_text(header)
    (target / "model.c").write_text(_constants(image.words) + definition)
    (target / "main.c").write_text(_MAIN_C)
    if verbose:
        print(f"{target}: {size}")
    return size


def _identifier(text: str) -> str:
    """Text from a file, as far as it may reach a compiler: nothing but [A-Za-z0-9_]."""
    return re.sub("[^A-Za-z0-9_]", "_", text)[:64] or "model"


def _pixel_constants(pixels: IntArray) -> str:
    lines = ["", f"const int16_t qsnn_pixel_code[{len(pixels)}][256] = {{"]
    for row in pixels.tolist():
        lines.append("    {")
        for start in range(0, 256, 16):
            lines.append("        " + ", ".join(map(str, row[start : start + 16])) + ",")
        lines.append("    },")
    return "\n".join([*lines, "};", ""])


def _constants(words: np.ndarray[tuple[int, ...], np.dtype[np.uint32]]) -> str:
    lines = ['#include "model.h"', "", f"const uint32_t qsnn_model[{words.size}] = {{"]
    for start in range(0, words.size, 8):
        lines.append(
            "    " + ", ".join(f"0x{w:08x}u" for w in words[start : start + 8].tolist()) + ","
        )
    return "\n".join([*lines, "};", ""])
