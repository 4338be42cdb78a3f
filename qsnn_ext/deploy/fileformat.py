"""The ``.qsnn`` file: a safetensors container that holds one integer program.

The container's metadata carry the format version, the program as JSON and a SHA-256 checksum over
both program and tensor bytes. The reader trusts nothing: every size is checked against the file
before memory is touched, nothing is unpickled or executed, and the program is validated before it
is returned. Anything wrong raises :class:`~qsnn_ext.errors.FormatError`.

The container is read and written here rather than through the safetensors library, so that a
deployed network needs NumPy only; files can be opened with that library all the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qsnn_ext.deploy import checks
from qsnn_ext.deploy.program import OP_TYPES, IntArray, Neuron, Op, Program, Value
from qsnn_ext.errors import FormatError
from qsnn_ext.files import ZIP, check_path, write_atomically

FORMAT_VERSION = 2
#: Versions that are read. Version 1 had no Gather, Concat, Matmul and Delay.
READ_VERSIONS = ("1", "2")
MAX_HEADER = 8 * 2**20  # bytes of JSON
MAX_FILE = 2**31  # bytes
_DTYPES = {"U32": "<u4", "I32": "<i4", "I8": "|i1", "U8": "|u1"}
_NAMES = {np.dtype(v): k for k, v in _DTYPES.items()}
#: Fields of the operations that are tensors of the container.
_ARRAYS = {
    "weight", "multiplier", "shift", "bias", "leak", "threshold", "bounds", "reset_value",
    "reading", "channel", "row", "column",
}  # fmt: skip


def dump_program(program: Program) -> bytes:
    """The bytes of a ``.qsnn`` file.

    Args:
        program: The program; it is validated first.

    Raises:
        FormatError: If the program is not valid.
        InputTypeError: If ``program`` is none.
    """
    checks.program(program, "a .qsnn file").validate()
    return _encode(program)


def _encode(program: Program) -> bytes:
    tensors: dict[str, IntArray] = {}
    ops = []
    for k, op in enumerate(program.ops):
        record: dict[str, Any] = {"op": type(op).__name__}
        for f in fields(op):
            value = getattr(op, f.name)
            if f.name in _ARRAYS:
                tensors[f"{k}.{f.name}"] = np.ascontiguousarray(value)
            else:
                record[f.name] = value
        ops.append(record)
    description = {
        "values": [[v.name, list(v.shape), v.planes, v.scale] for v in program.values],
        "ops": ops,
        "outputs": list(program.outputs),
        "reduction": program.reduction,
        "input_scale": program.input_scale,
        "input_range": list(program.input_range),
        "timesteps": program.timesteps,
        "metadata": program.metadata,
    }
    text = json.dumps(description, separators=(",", ":"), allow_nan=False)
    header: dict[str, Any] = {}
    blobs, at = [], 0
    # Wider types first, so that every tensor is aligned.
    for name, array in sorted(tensors.items(), key=lambda kv: -kv[1].dtype.itemsize):
        array = array.astype(array.dtype.newbyteorder("<"))
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        blobs.append(array.tobytes())
        at += array.nbytes
    data = b"".join(blobs)
    metadata = {
        "format": "qsnn",
        "version": str(FORMAT_VERSION),
        "program": text,
        "sha256": _checksum(text, header, data),
    }
    encoded = json.dumps({"__metadata__": metadata, **header}, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 64 + 56)  # with the length word: data starts at 64 bytes
    return len(encoded).to_bytes(8, "little") + encoded + data


def save_program(program: Program, path: str | os.PathLike[str]) -> int:
    """Write a ``.qsnn`` file (atomically) and return its size in bytes.

    Args:
        program: The program; it is validated first.
        path: Where to write.

    Raises:
        FormatError: If the program is not valid, or the file cannot be written.
        InputTypeError: If ``program`` is none.
    """
    content = dump_program(program)
    write_atomically(Path(path), lambda file: file.write(content), FormatError)
    return len(content)


def load_program(path: str | os.PathLike[str]) -> Program:
    """Read and check a ``.qsnn`` file.

    Args:
        path: A file written by :func:`save_program`.

    Raises:
        FormatError: If the file is damaged, hostile, of an unknown version, or cannot be read.
        InputTypeError: If ``path`` is none.
    """
    remedy = "; parse_program(content) reads bytes, DeployedModel(program) runs a program"
    check_path(path, "a .qsnn file", remedy)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE:
                raise FormatError(f"{path}: {size} bytes is more than any .qsnn file has")
            content = file.read(size + 1)
    except (OSError, ValueError) as error:  # a name may hold what no file system takes
        raise FormatError(f"{path!r} cannot be read: {error}") from error
    return parse_program(content, str(path))


def parse_program(content: bytes, origin: str = "the data") -> Program:
    """Read and check the bytes of a ``.qsnn`` file.

    Args:
        content: The whole file.
        origin: Its name, for messages.

    Raises:
        FormatError: If anything is wrong with it.
    """
    try:
        return _parse(content)
    except FormatError as error:
        raise FormatError(f"{origin}: {error}") from None
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:
        raise FormatError(f"{origin}: malformed ({type(error).__name__}: {error})") from None


def _checksum(text: str, header: dict[str, Any], data: bytes | memoryview) -> str:
    digest = hashlib.sha256()
    digest.update(text.encode())
    digest.update(json.dumps(header, sort_keys=True, separators=(",", ":")).encode())
    digest.update(data)
    return digest.hexdigest()


def _no_constant(name: str) -> Any:
    raise FormatError(f"its JSON contains {name}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise FormatError("its JSON repeats a key")
    return found


def _json(text: str | bytes, what: str) -> dict[str, Any]:
    decoded = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)
    if not isinstance(decoded, dict):
        raise FormatError(f"its {what} is not a JSON object")
    return decoded


def _parse(content: bytes) -> Program:
    if len(content) < 8:
        raise FormatError("it is too short to be a .qsnn file")
    if content[:4] == ZIP:
        raise FormatError("it is a zip archive, which torch.save writes, and no .qsnn file")
    length = int.from_bytes(content[:8], "little")
    if length > MAX_HEADER or length > len(content) - 8:
        raise FormatError(
            f"its header claims {length} bytes; the file is truncated or no .qsnn file"
        )
    header = _json(content[8 : 8 + length].decode("utf-8"), "header")
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("format") != "qsnn":
        raise FormatError("it is a safetensors file but holds no qsnn program")
    if not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError("its metadata must be text")
    version = metadata.get("version", "")
    if version not in READ_VERSIONS:
        raise FormatError(
            f"it has format version {version[:20]!r} and this qsnn_ext reads versions "
            f"{' and '.join(READ_VERSIONS)}; upgrade qsnn_ext or export the model again"
        )
    data = memoryview(content)[8 + length :]
    tensors = _tensors(header, data)
    if metadata.get("sha256") != _checksum(metadata["program"], header, data):
        raise FormatError("its checksum does not match: the file is damaged")
    program = _program(_json(metadata["program"], "program"), tensors)
    program.validate()
    return program


def _tensors(header: dict[str, Any], data: memoryview) -> dict[str, IntArray]:
    """Views of all tensors, which must tile the data exactly."""
    tensors: dict[str, IntArray] = {}
    spans = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise FormatError(f"tensor {name[:60]!r} has a malformed entry")
        if entry["dtype"] not in _DTYPES:
            raise FormatError(
                f"tensor {name[:60]!r} has the unknown type {str(entry['dtype'])[:20]!r}"
            )
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        shape, offsets = entry["shape"], entry["data_offsets"]
        for numbers, most in ((shape, 4), (offsets, 2)):
            ok = isinstance(numbers, list) and len(numbers) <= most
            if not ok or not all(type(n) is int and 0 <= n <= MAX_FILE for n in numbers):
                raise FormatError(f"tensor {name[:60]!r} has a malformed shape or position")
        if len(offsets) != 2:
            raise FormatError(f"tensor {name[:60]!r} has a malformed position")
        size = dtype.itemsize
        for n in shape:
            size *= n
        start, end = offsets
        if end - start != size or end > len(data):
            raise FormatError(f"tensor {name[:60]!r} does not fit the file")
        spans.append((start, end))
        tensors[name] = np.frombuffer(data[start:end], dtype).reshape(shape)
    at = 0
    for start, end in sorted(spans):
        if start != at:
            raise FormatError("its tensors leave a gap or overlap")
        at = end
    if at != len(data):
        raise FormatError(f"{len(data) - at} bytes follow its last tensor")
    return tensors


def _tuples(value: Any) -> Any:
    """Lists, as JSON has them, back to tuples."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise FormatError("a scale is not a number")
    return float(value)


def _program(d: dict[str, Any], tensors: dict[str, IntArray]) -> Program:
    values = []
    for entry in d["values"]:
        name, shape, planes, scale = entry
        values.append(Value(name, _tuples(shape), planes, _number(scale)))
    ops: list[Op] = []
    for k, record in enumerate(d["ops"]):
        kind = OP_TYPES.get(record.pop("op", None))
        if kind is None:
            raise FormatError(f"operation {k} is of an unknown kind")
        given: dict[str, Any] = {name: _tuples(v) for name, v in record.items()}
        expected = {f.name for f in fields(kind)}
        for name in expected & _ARRAYS:
            given[name] = _native(tensors.pop(f"{k}.{name}"))
        if set(given) != expected:
            raise FormatError(f"operation {k} lacks a field or has one too many")
        op: Op = kind(**given)
        if isinstance(op, Neuron) and not (op.membrane is None or type(op.membrane) is int):
            raise FormatError(f"operation {k} has a malformed membrane output")
        ops.append(op)
    if tensors:
        raise FormatError(f"tensor {next(iter(tensors))[:60]!r} belongs to no operation")
    metadata = d["metadata"]
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError("its metadata must be text")
    return Program(
        values, ops, _tuples(d["outputs"]), d["reduction"], _number(d["input_scale"]),
        _tuples(d["input_range"]), d["timesteps"], metadata,
    )  # fmt: skip


def _native(array: npt.NDArray[Any]) -> IntArray:
    return array.astype(array.dtype.newbyteorder("="), copy=False)
