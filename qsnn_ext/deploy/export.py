"""Writes a program as self-contained C99: the runtime's source, the model as constants, a main."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qsnn_ext.deploy.image import build_image
from qsnn_ext.deploy.program import Program

RUNTIME = Path(__file__).with_name("runtime")
SOURCES = ("qsnn.h", "qsnn_vector.h", "qsnn_count.h", "qsnn.c")

_MODEL_H = """\
/* {title}: written by qsnn_ext.deploy.export_c. */
#ifndef QSNN_MODEL_H
#define QSNN_MODEL_H

#include "qsnn.h"

#define QSNN_STATE_WORDS {state}
#define QSNN_ARENA_WORDS {arena}
#define QSNN_INPUT_WORDS {input}   /* one time step: {input_shape} */
#define QSNN_OUTPUT_WORDS {output}  /* one time step */

extern const uint32_t qsnn_model[{image}];

#endif
"""

_MAIN_C = """\
/* Reads the input codes of one time step after the other (int32, as the machine stores them) and
 * prints the answers. */
#include <stdio.h>
#include "model.h"

static uint32_t state[QSNN_STATE_WORDS], arena[QSNN_ARENA_WORDS];
static int32_t input[QSNN_INPUT_WORDS], output[QSNN_OUTPUT_WORDS];

int main(void) {
    int i;
    setvbuf(stdin, 0, _IONBF, 0); /* without buffers, stdio needs no heap */
    setvbuf(stdout, 0, _IONBF, 0);
    qsnn_reset(qsnn_model, state);
    while (fread(input, sizeof input, 1, stdin) == 1) {
        qsnn_run(qsnn_model, state, arena, input, 1, 0, output);
        for (i = 0; i < QSNN_OUTPUT_WORDS; i++) printf("%ld\\n", (long)output[i]);
    }
    return 0;
}
"""


@dataclass(frozen=True)
class ResidentSize:
    """Memory of a program on a device, in bytes; code is not counted.

    Args:
        flash: Constants: weights, scales, tables.
        state: Membrane potentials of one sample, packed.
        arena: Activations and scratch of one running sample.
        io: Input codes and answers of one time step.
    """

    flash: int
    state: int
    arena: int
    io: int

    @property
    def ram(self) -> int:
        """Everything that is written to."""
        return self.state + self.arena + self.io

    def __str__(self) -> str:
        return (
            f"flash {self.flash:,} bytes (constants); RAM {self.ram:,} bytes "
            f"(membranes {self.state:,}, activations and scratch {self.arena:,}, "
            f"input and output {self.io:,})"
        )


def resident_size(program: Program) -> ResidentSize:
    """What a program occupies when it runs, one sample at a time.

    Args:
        program: A valid program.
    """
    image = build_image(program)
    io = program.values[0].elements + sum(program.values[i].elements for i in program.outputs)
    return ResidentSize(4 * image.words.size, 4 * image.state_words, 4 * image.arena_words, 4 * io)


def export_c(
    program: Program, folder: str | os.PathLike[str], *, verbose: bool = True
) -> ResidentSize:
    """Write a program as C99 that needs no heap and no library but the standard one.

    Compile with ``cc -std=c99 -O2 *.c``; flags such as ``-march=native`` select vector code. The
    answers are the integers Python gives.

    Args:
        program: A valid program.
        folder: Where to write ``qsnn.c``, its headers, ``model.c``, ``model.h`` and ``main.c``;
            created if missing.
        verbose: Print the memory it takes.

    Returns:
        The memory it takes.

    Raises:
        FormatError: If the program is not valid.
    """
    image = build_image(program)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for name in SOURCES:
        (target / name).write_bytes((RUNTIME / name).read_bytes())
    size = resident_size(program)
    header = _MODEL_H.format(
        title=program.metadata.get("model", "model").replace("*/", ""),
        state=max(image.state_words, 1),
        arena=image.arena_words,
        input=program.values[0].elements,
        input_shape=list(program.values[0].shape),
        output=sum(program.values[i].elements for i in program.outputs),
        image=image.words.size,
    )
    (target / "model.h").write_text(header)
    (target / "model.c").write_text(_constants(image.words))
    (target / "main.c").write_text(_MAIN_C)
    if verbose:
        print(f"{target}: {size}")
    return size


def _constants(words: np.ndarray[tuple[int, ...], np.dtype[np.uint32]]) -> str:
    lines = ['#include "model.h"', "", f"const uint32_t qsnn_model[{words.size}] = {{"]
    for start in range(0, words.size, 8):
        lines.append(
            "    " + ", ".join(f"0x{w:08x}u" for w in words[start : start + 8].tolist()) + ","
        )
    return "\n".join([*lines, "};", ""])
