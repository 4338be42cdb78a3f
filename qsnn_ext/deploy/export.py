"""Writes a program as a C99 library, alone or inside a project that is ready to be built."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from qsnn_ext.deploy import checks
from qsnn_ext.deploy.boards import (
    BOARDS,
    TARGETS,
    check_room,
    fits_bytes,
    folded,
    samples_header,
    write_board,
)
from qsnn_ext.deploy.folder import write_files
from qsnn_ext.deploy.image import Image, build_image
from qsnn_ext.deploy.layout import MEMORY_LIMIT
from qsnn_ext.deploy.model import DeployedModel
from qsnn_ext.deploy.pixels import pixel_table
from qsnn_ext.deploy.program import IntArray, Program
from qsnn_ext.deploy.records import LAYOUT, RECORDS
from qsnn_ext.deploy.size import ResidentSize, compiled_size, size_of
from qsnn_ext.errors import ConfigError, InputError, InputTypeError
from qsnn_ext.files import check_path

Optimize: TypeAlias = Literal["size", "speed"]
Target: TypeAlias = Literal[
    "library", "stdio", "arduino", "platformio", "mps2-an386", "mps3-an547", "riscv32-virt"
]
#: Targets that run bundled samples, and so need some.
WITH_SAMPLES = ("arduino", "platformio", *BOARDS)

RUNTIME = Path(__file__).with_name("runtime")
SOURCES = ("qsnn.c", *sorted(p.name for p in RUNTIME.glob("*.h")))
#: Headers of the C library that a model's own header of that name would hide from the compiler.
_STANDARD = (
    "assert complex ctype errno features fenv float immintrin inttypes iso646 limits locale math "
    "setjmp signal stdalign stdarg stdatomic stdbool stddef stdint stdio stdlib stdnoreturn string "
    "tgmath threads time uchar wchar wctype alloca dirent dlfcn endian fcntl malloc memory poll "
    "pthread regex sched semaphore strings syscall termios unistd"
)
#: Names that no file may have under Windows.
_DEVICES = {"con", "prn", "aux", "nul"} | {f"{p}{n}" for p in ("com", "lpt") for n in range(10)}
#: Names of files that stand beside the model's in one project or another, and of headers.
_TAKEN = {
    "arduino", "samples", *_STANDARD.split(), *_DEVICES,
    *(Path(p).stem for p in SOURCES), *(p.stem for p in (TARGETS / "bare").glob("*.[ch]")),
}  # fmt: skip
#: What the runtime exports; every copy of it gets names of its own.
SYMBOLS = ("qsnn_reset", "qsnn_run", "qsnn_run_part", "qsnn_run_step", "qsnn_layout")


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
        InputTypeError: If ``program`` is none.
    """
    checks.program(program, "resident_size")
    return size_of(program, _image(program, optimize, memory_limit))


def _image(program: Program, optimize: str, memory_limit: int) -> Image:
    if optimize not in ("size", "speed"):
        raise ConfigError(f"optimize={optimize!r} must be 'size' or 'speed'")
    return build_image(program, compact=optimize == "size", memory_limit=memory_limit)


def export_c(
    program: Program,
    folder: str | os.PathLike[str],
    target: Target = "library",
    *,
    name: str = "model",
    samples: Any = None,
    pixels: IntArray | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    classes: Sequence[str] | None = None,
    optimize: Optimize = "size",
    compiler: str | None = None,
    memory_limit: int = MEMORY_LIMIT,
    verbose: bool = True,
) -> ResidentSize:
    """Write a program as a C99 library that needs no heap, no floating point and no stdio.

    ``NAME.h`` declares it: the model's constants as macros, ``NAME_start``, ``NAME_step``,
    ``NAME_sum`` and ``NAME_largest``. Two exported models link together if their names differ.
    Compile with ``cc -std=c99 -O2 -c *.c``; flags such as ``-march=native`` select vector code. The
    answers are the integers Python gives.

    Args:
        program: A valid program.
        folder: Where to write; created if missing. An earlier export there is replaced, but for
            edited files of a project (not of the library): these are kept, with a warning.
        target: ``"library"``, or a project around it: ``"stdio"``, a program that reads input codes
            from standard input and prints the answers; ``"arduino"``, an Arduino library with an
            example; ``"platformio"``, a PlatformIO project; the name of a board, for bare metal
            with start-up, linker script and Makefile (``"mps2-an386"``, a Cortex-M4;
            ``"mps3-an547"``, a Cortex-M55; ``"riscv32-virt"``).
        name: Of the model: prefix of every symbol and name of its files.
        samples: Inputs that projects run: ``[N, ...]`` (shown at every step) or ``[N, T, ...]``;
            real numbers or input codes, as :meth:`DeployedModel.codes` takes them. All targets but
            the library and ``"stdio"`` need some.
        pixels: Table of :func:`~qsnn_ext.deploy.pixel_table`: the library then has
            ``NAME_pixel_code`` and ``NAME_step_pixels``, which takes 8-bit pixels.
        mean, std: Of the normalisation the model was trained with, in place of ``pixels``; they
            are among the constants then.
        classes: Names of the classes; without them ``metadata["classes"]``, a list in JSON.
        optimize: ``"size"`` stores what is used and no more. ``"speed"`` also stores what makes
            layers faster: weights in the order of both ways to count, tables that decide spikes on
            bits, alignment to cache lines. The integers are the same.
        compiler: Command with all flags, such as ``"arm-none-eabi-gcc -mcpu=cortex-m4 -Os"``:
            compiles the library and adds code and stack to the size.
        memory_limit: Bytes that the program may take on the device.
        verbose: Print the memory it takes.

    Returns:
        The memory it takes.

    Raises:
        ConfigError: If a name or option is unknown, the folder cannot be written or holds files of
            somebody else's by the same names, or the compiler fails.
        FormatError: If the program is not valid or needs more memory than the limit, or than the
            board has.
        InputError: If samples, mean or std do not fit the program.
        InputTypeError: If ``program`` is none, ``folder`` is no path, or ``pixels`` is not a table
            for the program. After any error the folder is as it was.
    """
    checks.program(program, "export_c")
    check_path(folder, "export_c")
    if not os.fspath(folder):
        raise ConfigError("folder='' is no folder; '.' is the present one")
    _check_names(target, name)
    image = _image(program, optimize, memory_limit)
    if mean is not None or std is not None:
        if pixels is not None or mean is None or std is None:
            raise ConfigError("give mean and std, or a table of pixels, not a part of each")
        pixels = pixel_table(program, mean, std)
    elif pixels is not None:
        _check_pixels(program, pixels)
    library = _library(program, image, pixels, mean, std, _class_names(program, classes))
    bundled = _bundled(program, target, samples)
    project = _project(target, library, bundled)
    code = stack = 0
    if compiler is not None:
        own = {_path(p, name): _named(t, name) for p, t in library.items()}
        code, stack = compiled_size(own, name, compiler)
    size = size_of(program, image, 0 if pixels is None else pixels.nbytes, code, stack)
    if target in BOARDS and bundled is not None:
        item = 1 if fits_bytes(*program.input_range) else 2
        check_room(target, size.flash + item * bundled[0].size, size.memory)
    files = {_path(p, name): _named(t, name) for p, t in project.items()}
    given = {*library, "samples.h"}
    editable = {_path(p, name) for p in project if p.rsplit("/", 1)[-1] not in given}
    header = next(p for p in files if Path(p).name == f"{name}.h")
    write_files(Path(folder), files, editable, header)
    if verbose:
        print(f"{folder}: {size}")
    return size


# -- what may be asked for -----------------------------------------------------------------------


def _check_names(target: str, name: str) -> None:
    known = ("library", "stdio", *WITH_SAMPLES)
    if target not in known:
        raise ConfigError(f"target={target!r} is unknown; choose one of {', '.join(known)}")
    if not (isinstance(name, str) and re.fullmatch("[a-z][a-z0-9_]{0,39}", name)):
        raise ConfigError(
            f"name={name!r} must be a C identifier of small letters, digits and underscores"
        )
    if name in _TAKEN:
        raise ConfigError(
            f"name={name!r} is that of a device, or of a file or header beside the model's: choose "
            "another"
        )


def _check_pixels(program: Program, pixels: IntArray) -> None:
    channels = program.values[0].shape[0]
    if not isinstance(pixels, np.ndarray) or (pixels.shape, pixels.dtype) != (
        (channels, 256), np.dtype(np.int16)
    ):  # fmt: skip
        raise InputTypeError(
            f"pixels must be an int16 array of shape ({channels}, 256): "
            "pixel_table(program, mean, std)"
        )


def _class_names(program: Program, classes: Sequence[str] | None) -> list[str] | None:
    """Names of the classes as given, or as the program's metadata have them."""
    answers = [program.values[i].elements for i in program.outputs]
    if classes is not None:
        names = [] if isinstance(classes, str) or not isinstance(classes, Iterable) else [*classes]
        if not names or not all(isinstance(n, str | int) and "\0" not in str(n) for n in names):
            raise ConfigError(f"classes={classes!r} must be a list of names")
        if len(answers) != 1 or len(names) != answers[0]:
            raise ConfigError(f"{len(names)} classes for answers of {answers} numbers")
        return [str(n) for n in names]
    try:
        found = json.loads(program.metadata.get("classes", "null"))
    except ValueError:
        return None
    fits = isinstance(found, list) and len(answers) == 1 and len(found) == answers[0]
    return found if fits and all(isinstance(n, str) and "\0" not in n for n in found) else None


def _bundled(program: Program, target: str, samples: Any) -> tuple[IntArray, bool] | None:
    """Codes of the samples that a target runs, and whether they are the same at every step."""
    if target not in WITH_SAMPLES:
        if samples is not None:
            raise ConfigError(f"target={target!r} takes no samples; a board or a project does")
        return None
    if samples is None:
        raise ConfigError(f"target={target!r} needs samples to run, such as ten test inputs")
    codes = DeployedModel(program, "numpy").codes(samples)
    if codes.ndim not in (4, 5) or not len(codes):
        raise InputError("samples must be [N, ...] or [N, T, ...], at least one")
    static = codes.ndim == 4
    if not static and codes.shape[1] != program.timesteps:
        raise InputError(
            f"samples of {codes.shape[1]} time steps; the program runs {program.timesteps}"
        )
    return checks.run_codes(program, len(codes), codes, program.timesteps, static), static


# -- the files -------------------------------------------------------------------------------------


def _project(
    target: str, library: dict[str, str], bundled: tuple[IntArray, bool] | None
) -> dict[str, str]:
    """All files of a target: path in the folder -> text."""
    if bundled is None:
        if target == "stdio":
            return {**library, "main.c": (TARGETS / "stdio" / "main.c").read_text()}
        return library
    header = samples_header(*bundled)
    if target in BOARDS:
        c_files = [f for f in library if f.endswith(".c")]
        board = write_board(target, TARGETS / "bare", c_files)
        return {**library, **board, "samples.h": header}
    folder = TARGETS / "arduino"
    sketch = (folder / "sketch.ino").read_text()
    if target == "platformio":
        inside = {f"lib/model/src/{path}": text for path, text in library.items()}
        return {
            **inside,
            "lib/model/library.properties": (folder / "library.properties").read_text(),
            "platformio.ini": (folder / "platformio.ini").read_text(),
            "src/main.cpp": f"#include <Arduino.h>\n{sketch}",
            "src/samples.h": header,
        }
    inside = {f"src/{path}": text for path, text in library.items() if path != "LICENSE"}
    return {
        **inside,
        "LICENSE": library["LICENSE"],
        "library.properties": (folder / "library.properties").read_text(),
        "examples/samples/samples.ino": sketch,
        "examples/samples/samples.h": header,
    }


def _library(
    program: Program,
    image: Image,
    pixels: IntArray | None,
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
    classes: list[str] | None,
) -> dict[str, str]:
    """Runtime, constants and interface of a model named ``model``."""
    folder = TARGETS / "library"
    header, source = ((folder / f).read_text() for f in ("model.h", "model.c"))
    extra, definitions = "", ""
    if classes is not None:
        count = len(classes)
        extra += f"\nextern const char *const model_class_names[{count}];\n"
        quoted = "".join(f"    {_quoted(n)},\n" for n in classes)
        definitions += f"\nconst char *const model_class_names[{count}] = {{\n{quoted}}};\n"
    if pixels is not None:
        extra += (folder / "pixels.h").read_text()
        definitions += _pixel_constants(pixels) + (folder / "pixels.c").read_text()
    lo, hi = program.input_range
    header = _filled(header, {
        "TITLE": _identifier(program.metadata.get("model", "model")),
        "CONSTANTS": _constants(program, mean, std, classes),
        "CODE": "uint8_t" if fits_bytes(lo, hi) else "int16_t",
        "STATE": max(image.state_words, 1), "ARENA": image.arena_words, "EXTRA": extra,
    })  # fmt: skip
    value = dict(zip(_fields("value"), _record(image, "value", _header(image)["input"]),
                     strict=True))  # fmt: skip
    source = _filled(source, {
        "LAYOUT": LAYOUT, "IMAGE": image.words.size, "WORDS": _words(image),
        "INPUT_AT": value["offset"], "INPUT_PITCH": value["stride"],
    })  # fmt: skip
    runtime = {name: (RUNTIME / name).read_text() for name in SOURCES}
    renamed = "".join(f"#define {s} model_{s}\n" for s in SYMBOLS)
    mark = "#include <stdint.h>\n"
    assert mark in runtime["qsnn.h"]
    renamed = f"{mark}\n/* This copy's names, so that several exported models link. */\n{renamed}"
    runtime["qsnn.h"] = runtime["qsnn.h"].replace(mark, renamed, 1)
    return {
        **runtime, "model.h": header, "model.c": source + definitions,
        "LICENSE": (folder / "LICENSE").read_text(),
    }  # fmt: skip


def _constants(
    program: Program,
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
    classes: list[str] | None,
) -> str:
    """What a program means, as macros."""
    (channels, height, width), outputs = program.values[0].shape, program.outputs
    lo, hi = program.input_range
    total = sum(program.values[i].elements for i in outputs)
    reductions = {"none": 0, "sum": 1, "mean": 2}
    rows: list[tuple[str, object, str]] = [
        ("TIME_STEPS", program.timesteps, ""),
        ("INPUT_CHANNELS", channels, ""),
        ("INPUT_HEIGHT", height, ""),
        ("INPUT_WIDTH", width, ""),
        ("INPUT_SIZE", channels * height * width, "numbers of one time step"),
        ("INPUT_MIN", lo if lo >= 0 else f"({lo})", ""),
        ("INPUT_MAX", hi, ""),
        ("INPUT_SCALE", repr(program.input_scale), "real number that a code of 1 stands for"),
    ]
    folded_in = "before that becomes a code: x * gain + bias"
    gain, bias = program.prologue or (None, None)
    for what, numbers, meaning in (
        ("INPUT_GAIN", gain, folded_in), ("INPUT_BIAS", bias, folded_in),
        ("INPUT_MEAN", mean, "of the normalisation"), ("INPUT_STD", std, "of the normalisation"),
    ):  # fmt: skip
        if numbers is not None:
            listed = [float(n) for n in np.atleast_1d(checks.as_array(numbers))]
            rows.append((what, f"{{{', '.join(map(repr, listed))}}}", meaning))
    rows.append(("OUTPUT_SIZE", total, "answers of one time step"))
    for k, index in enumerate(outputs):
        value, number = program.values[index], "" if len(outputs) == 1 else str(k)
        if number:
            rows.append((f"OUTPUT{number}_SIZE", value.elements, ""))
        meaning = "real number that an answer of 1 stands for"
        rows.append((f"OUTPUT{number}_SCALE", repr(value.scale), meaning))
    meaning = "of the answers over time: 0 none, 1 sum, 2 mean"
    rows.append(("REDUCTION", reductions[program.reduction], meaning))
    if classes is not None:
        rows.append(("CLASSES", len(classes), "named in model_class_names"))
    return "\n".join(
        f"#define MODEL_{n} {v}" + (f" /* {said} */" if said else "") for n, v, said in rows
    )


def _fields(record: str) -> list[str]:
    return [field for field, _ in RECORDS[record][1]]


def _record(image: Image, record: str, offset: int) -> list[int]:
    return [int(w) for w in image.words[offset : offset + len(_fields(record))]]


def _header(image: Image) -> dict[str, int]:
    return dict(zip(_fields("header"), _record(image, "header", 0), strict=True))


def _words(image: Image) -> str:
    listed = [f"0x{w:08x}u" for w in image.words.tolist()]
    return "\n".join(
        "    " + ", ".join(listed[at : at + 8]) + "," for at in range(0, len(listed), 8)
    )


def _pixel_constants(pixels: IntArray) -> str:
    lines = ["", "const int16_t model_pixel_code[MODEL_INPUT_CHANNELS][256] = {"]
    for row in pixels.tolist():
        lines += ["    {", *folded(row, "        "), "    },"]
    return "\n".join([*lines, "};", ""])


def _filled(template: str, values: dict[str, object]) -> str:
    """A template with every ``@NAME@`` replaced."""
    return re.sub("@([A-Z_]+)@", lambda m: str(values[m[1]]), template)


def _path(path: str, name: str) -> str:
    """Where a file of the model named ``model`` lies for another name."""
    return re.sub(r"\bmodel\.", f"{name}.", path.replace("lib/model/", f"lib/{name}/"))


def _named(text: str, name: str) -> str:
    """A file of the model named ``model``, for another name."""
    text = text.replace("@NAME@", name).replace("@HEADER@", f"{name}.h")
    text = re.sub(r"\bMODEL_", f"{name.upper()}_", text)
    text = re.sub(r"\bmodel_(?!=)", f"{name}_", text)
    return re.sub(r"\bmodel\.(?=[ch]\b)", f"{name}.", text)


def _identifier(text: str) -> str:
    """Text from a file, as far as it may reach a compiler: nothing but [A-Za-z0-9_]."""
    return re.sub("[^A-Za-z0-9_]", "_", text)[:64] or "model"


def _quoted(text: str) -> str:
    """A C string; whatever is not a plain character becomes an octal escape of its UTF-8 bytes."""
    # Neither "_" nor ".": a class named model_a is no name of ours to be replaced.
    plain = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 -+,:"
    raw = text.encode("utf-8", "replace")
    return '"' + "".join(chr(b) if b in plain else f"\\{b:03o}" for b in raw) + '"'
