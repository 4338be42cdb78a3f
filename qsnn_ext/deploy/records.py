"""Records of the image: what Python writes and C reads, said once.

Every field is an int32. An *offset* counts words: of the image where the field points to parameters
or to another record, of the state area, of the arena, or of a worker's workspace, as its comment
says. The C structs of ``runtime/qsnn_records.h`` are generated from this file
(``python -m qsnn_ext.deploy.records``); ``LAYOUT`` is a number over all names in order, which the
compiled engine and the exported source carry, so that code and image of two versions never meet.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from qsnn_ext.errors import FormatError

Fields: TypeAlias = dict[str, Any]

INT32_MAX = 2**31 - 1

#: Numbers that stand for words, as C enumerations ``QSNN_<GROUP>_<NAME>``.
CODES: dict[str, tuple[str, ...]] = {
    "kind": (
        "events",
        "codes",
        "groups",
        "rows",
        "affine",
        "add",
        "logic",
        "pool",
        "fire",
        "gather",
        "concat",
        "matmul",
        "delay",
        "keep",
    ),
    "method": ("measure", "events", "dense"),
    "pool": ("max", "sum", "repeat"),
    "logic": ("and", "iand"),
    "reset": ("none", "hard", "soft"),
    "order": ("fire_first", "quantize_first"),
    "delay": ("none", "table"),
}

#: Name of record -> what it is, and (field, comment) pairs; a name ``record:field`` is a record
#: inside the record.
RECORDS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "header": (
        "The start of an image. Offsets into the image unless said otherwise",
        (
            ("image_words", ""),
            ("state_words", "membranes of one sample"),
            ("arena_words", "activations of one running sample and the workspace of one worker"),
            ("input_words", "input codes of one time step, [C, H, W]"),
            ("output_words", "answers of one time step, each [C, H, W]"),
            ("input", "value record of the input"),
            ("steps", "list of the steps' records, in order"),
            ("step_count", ""),
            ("neurons", "list of neuron records"),
            ("neuron_count", ""),
            ("outputs", "list of the answers' value records"),
            ("output_count", ""),
            ("workspace", "of the first worker, in the arena"),
            ("workspace_words", "from one worker's to the next one's"),
            ("line", "in the workspace: one pixel's channels"),
            ("other", "in the workspace: another pixel's"),
        ),
    ),
    "value": (
        "One activation: int32 [pixel][stride], or bits [pixel][plane][word]",
        (
            ("channels", ""),
            ("height", ""),
            ("width", ""),
            ("pixels", "height * width"),
            ("planes", "0: int32"),
            ("words", "that hold one bit per channel"),
            ("stride", "words from one pixel to the next"),
            ("offset", "in the arena"),
        ),
    ),
    "neuron": (
        "A neuron. Parameters are offsets into the image",
        (
            ("bits", ""),
            ("state_bits", ""),
            ("levels", ""),
            ("reset", ""),
            ("order", ""),
            ("delay", ""),
            ("ceiling", ""),
            ("initial", ""),
            ("leak", ""),
            ("leak_pitch", "entries from one channel to the next; 0: one table for all"),
            ("threshold", ""),
            ("reset_value", ""),
            ("per_channel", "whether threshold and reset value exist once per channel"),
            ("bounds", ""),
            ("reading", ""),
            ("state", "in the state area"),
            ("state_pitch", "words from one pixel to the next"),
            ("spikes", "value record"),
            ("membrane", "value record; 0: not an output"),
        ),
    ),
    "step": (
        "What every step begins with: where it reads and writes, and what is fused behind it",
        (
            ("kind", ""),
            ("source", "value record"),
            ("target", "value record; the spikes where a neuron takes what was computed"),
            ("add", "value record of a residual; 0: none"),
            ("self_factor", "of what was computed"),
            ("add_factor", "of the residual"),
            ("neuron", "neuron record; 0: none"),
        ),
    ),
    "scale": (
        "y = ((x * multiplier + half) >> shift) + bias. Parameters are offsets into the image",
        (
            ("multiplier", ""),
            ("shift", "bytes"),
            ("bias", ""),
            ("channels", "entries of each"),
            ("product32", "whether the products are proven to fit int32"),
        ),
    ),
    "window": (
        "Geometry of a sliding window",
        (
            ("kh", ""),
            ("kw", ""),
            ("sh", ""),
            ("sw", ""),
            ("dh", ""),
            ("dw", ""),
            ("top", ""),
            ("left", ""),
        ),
    ),
    "events": (
        "Convolution of bits with single-bit weights, event-driven",
        (
            ("step:step", ""),
            ("window:window", ""),
            ("scale:scale", ""),
            ("weight", "in the image: rows of bits, a row of zeros after the last"),
            ("joined", "whether rows of the kernel's columns lie side by side"),
            ("pitch", "bytes from one input channel's row to the next one's"),
            ("tap", "bytes from one kernel column to the next"),
            ("kernel_row", "bytes from one kernel row to the next"),
            ("zeros", "byte offset of the row of zeros"),
            ("depth", "planes of the largest dot product's number"),
            ("deepest", "planes that are counted"),
            ("centre", "largest dot product"),
            ("method", ""),
            ("dense", "in the image: weights for AND and popcount; 0: none"),
            ("dense_rows", "words of 32 inputs"),
            ("firing", "in the image: where spike and level step; 0: plain numbers follow"),
            ("firing_block", "words for one residual spike"),
            ("after", "in the image: planes of the level after a spike"),
            ("span", "input rows in the ring"),
            ("starts", "in the workspace, as all that follow"),
            ("starts_pitch", ""),
            ("ring", ""),
            ("ring_pitch", ""),
            ("list", ""),
            ("dense_counts", ""),
            ("together", ""),
            ("together_pitch", ""),
            ("counts", ""),
            ("counts_pitch", "from one plane to the next"),
            ("active", ""),
            ("active_pitch", ""),
            ("slots", ""),
            ("sums", ""),
        ),
    ),
    "codes": (
        "Convolution of 16-bit codes with 8-bit weights, in pairs",
        (
            ("step:step", ""),
            ("window:window", ""),
            ("scale:scale", ""),
            ("weight", "in the image: [word of channels][pair][channel]"),
            ("weight_pitch", "words from one word of channels to the next"),
            ("pairs", ""),
            ("firing", "in the image: [word of channels][question][channel]; 0: plain numbers"),
            ("firing_pitch", "words from one word of channels to the next"),
            ("after", "in the image: planes of the level after a spike"),
            ("patches", "in the workspace"),
            ("lines", "in the workspace"),
            ("line_pitch", ""),
        ),
    ),
    "groups": (
        "Convolution of bits with single-bit weights in groups, AND and popcount",
        (
            ("step:step", ""),
            ("window:window", ""),
            ("scale:scale", ""),
            ("groups", ""),
            ("cin", "channels of a group"),
            ("cout", ""),
            ("columns", "cout, rounded up"),
            ("dense", "in the image"),
            ("dense_pitch", "words from one group to the next"),
            ("dense_rows", "words of 32 inputs"),
            ("patch", "in the workspace"),
            ("counts", "in the workspace"),
        ),
    ),
    "rows": (
        "Any other convolution: multiples of weight rows",
        (
            ("step:step", ""),
            ("window:window", ""),
            ("scale:scale", ""),
            ("groups", ""),
            ("cin", "channels of a group"),
            ("cout", ""),
            ("binary", "whether weights are bits; otherwise bytes, the first the lowest of a word"),
            ("weight", "in the image"),
            ("row_pitch", "words (binary) or bytes from one row to the next"),
            ("group_pitch", "words or bytes from one group to the next"),
            ("list", "in the workspace"),
            ("sums", "in the workspace"),
        ),
    ),
    "affine": ("Scale of a value", (("step:step", ""), ("scale:scale", ""))),
    "add": (
        "Sum of values",
        (("step:step", ""), ("list", "in the image: value record, factor"), ("count", "")),
    ),
    "logic": (
        "Product of spikes",
        (("step:step", ""), ("second", "value record"), ("function", "")),
    ),
    "pool": ("Pooling", (("step:step", ""), ("window:window", ""), ("function", ""))),
    "fire": ("A neuron on its own", (("step:step", ""),)),
    "gather": (
        "Elements in another order. Parameters are offsets into the image",
        (
            ("step:step", ""),
            ("channel", ""),
            ("row", ""),
            ("column", ""),
            ("in_order", "whether channels stay where they are"),
        ),
    ),
    "concat": (
        "Values side by side",
        (("step:step", ""), ("list", "in the image: value records"), ("count", "")),
    ),
    "matmul": (
        "Products of matrices, pixels by channels of a head",
        (
            ("step:step", ""),
            ("second", "value record"),
            ("heads", ""),
            ("inner", "length of a sum"),
            ("columns", "of the product"),
            ("flip_first", "whether its rows are channels"),
            ("flip_second", ""),
        ),
    ),
    "delay": (
        "A value of the time step before: read at its place, kept at the end of the step",
        (("step:step", ""), ("state", "in the state area")),
    ),
    "keep": (
        "The end of a delay",
        (("step:step", ""), ("state", "in the state area")),
    ),
}  # fmt: skip


def size(name: str) -> int:
    """Words of a record."""
    return sum(size(f.split(":")[0]) if ":" in f else 1 for f, _ in RECORDS[name][1])


def encode(name: str, given: Mapping[str, Any]) -> list[int]:
    """The words of a record.

    Args:
        name: Of the record.
        given: A number for every field, a mapping for every record inside it.

    Raises:
        FormatError: If a number does not fit 32 bits.
    """
    fields = RECORDS[name][1]
    assert set(given) == {f.split(":")[-1] for f, _ in fields}
    encoded: list[int] = []
    for field, _ in fields:
        kind, _, inner = field.rpartition(":")
        if kind:
            encoded += encode(kind, given[inner])
        else:
            encoded.append(narrow(given[field], f"{name}.{field}"))
    return encoded


def narrow(number: int, what: str) -> int:
    """The number, if it is an int32.

    Raises:
        FormatError: Otherwise.
    """
    if not -INT32_MAX - 1 <= number <= INT32_MAX:
        raise FormatError(f"invalid program: {what} would be {number}, which exceeds int32")
    return int(number)


def _names() -> Iterable[str]:
    for group, members in CODES.items():
        yield f"{group}={','.join(members)}"
    for name, (_, fields) in RECORDS.items():
        yield f"{name}={','.join(f for f, _ in fields)}"


#: To be raised when parameters change their order or meaning and no record does.
REVISION = 2
#: Differs whenever a field, its place, the meaning of a code or the revision does.
LAYOUT = zlib.crc32("\n".join([str(REVISION), *_names()]).encode()) & INT32_MAX


def header() -> str:
    """The text of ``runtime/qsnn_records.h``."""
    lines = [
        "/* Records of the image. Generated by python -m qsnn_ext.deploy.records: do not edit. */",
        "#ifndef QSNN_RECORDS_H",
        "#define QSNN_RECORDS_H",
        "#include <stdint.h>",
        "",
        f"#define QSNN_LAYOUT {LAYOUT} /* code and images of two versions never meet */",
        "",
    ]
    for group, members in CODES.items():
        names = ", ".join(f"QSNN_{group}_{m}".upper() for m in members)
        lines += _folded(f"enum {{ {names} }};")
    for name, (meaning, fields) in RECORDS.items():
        lines += ["", f"/* {meaning}. */", "typedef struct {"]
        for field, comment in fields:
            kind, _, inner = field.rpartition(":")
            said = f"    {f'qsnn_{kind}' if kind else 'int32_t'} {inner};"
            lines.append(said + (f" /* {comment} */" if comment else ""))
        lines.append(f"}} qsnn_{name};")
        words = size(name)
        assertion = f"sizeof(qsnn_{name}) == {words} * 4 ? 1 : -1"
        lines += _folded(f"typedef char qsnn_{name}_has_{words}_words[{assertion}];")
    return "\n".join([*lines, "", "#endif", ""])


def _folded(text: str) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        if len(lines[-1]) + len(word) > 98:
            lines.append("   ")
        lines[-1] += (" " if lines[-1] else "") + word
    return lines


HEADER_FILE = Path(__file__).with_name("runtime") / "qsnn_records.h"

if __name__ == "__main__":
    HEADER_FILE.write_text(header())
