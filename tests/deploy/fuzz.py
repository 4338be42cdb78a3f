"""Feeds mutated .qsnn files to the loader: ``python -m tests.deploy.fuzz [files]``.

Half of the mutations make the checksum right again, so that the checks behind it are reached. A
file that is accepted is executed. Anything but an answer or a FormatError ends the run.
"""

from __future__ import annotations

import copy
import json
import resource
import struct
import sys

import numpy as np

from qsnn_ext.deploy.fileformat import _checksum, dump_program, parse_program
from qsnn_ext.deploy.model import DeployedModel
from qsnn_ext.errors import FormatError
from tests.deploy.random_programs import random_program

ODD = [0, -1, 1, 2, 7, 2**31, 2**31 - 1, -(2**31), 2**63, 10**30, 1.5, 1e308, None, True, "", "x",
       [], {}, [[]], [1, 2, 3], {"a": 1}]  # fmt: skip


def _mutate_json(node, rng):
    """Replace one random element of a nested structure."""
    while True:
        keys = list(node.keys()) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = keys[int(rng.integers(len(keys)))]
        child = node[key]
        if isinstance(child, dict | list) and child and rng.random() < 0.8:
            node = child
            continue
        choice = rng.random()
        if choice < 0.15 and isinstance(node, dict):
            del node[key]
        elif choice < 0.5 and type(child) is int:
            node[key] = child + int(rng.integers(-3, 4))
        else:
            node[key] = copy.deepcopy(ODD[int(rng.integers(len(ODD)))])
        return


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """A damaged copy of a file."""
    if rng.random() < 0.5:  # blind: bytes flipped, cut out, repeated or appended
        damaged = bytearray(content)
        for _ in range(int(rng.integers(1, 6))):
            at = int(rng.integers(len(damaged)))
            kind = int(rng.integers(4))
            if kind == 0:
                damaged[at] = int(rng.integers(256))
            elif kind == 1:
                del damaged[at : at + int(rng.integers(1, 64))]
            elif kind == 2:
                damaged[at:at] = damaged[at : at + int(rng.integers(1, 64))]
            else:
                damaged += bytes(rng.integers(0, 256, int(rng.integers(1, 9)), dtype=np.uint8))
            if not damaged:
                break
        return bytes(damaged)
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    data = bytearray(content[8 + length :])
    metadata = header.pop("__metadata__")
    program = json.loads(metadata["program"])
    for _ in range(int(rng.integers(1, 4))):
        which = rng.random()
        if which < 0.6:
            _mutate_json(program, rng)
        elif which < 0.8:
            _mutate_json(header, rng)
        elif data:
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
    metadata["program"] = json.dumps(program)
    metadata["sha256"] = _checksum(metadata["program"], header, bytes(data))
    encoded = json.dumps({"__metadata__": metadata, **header}).encode()
    return struct.pack("<Q", len(encoded)) + encoded + bytes(data)


def main(count: int) -> None:
    rng = np.random.default_rng(0)
    files = [dump_program(random_program(seed, length=6)) for seed in range(40)]
    files = [f for f in files if len(f) < 60_000]
    accepted = refused = 0
    for _ in range(count):
        content = mutate(files[int(rng.integers(len(files)))], rng)
        try:
            program = parse_program(content)
        except FormatError:
            refused += 1
            continue
        accepted += 1
        if sum(v.elements for v in program.values) < 100_000:
            try:
                model = DeployedModel(program)
            except FormatError:
                continue
            lo, hi = program.input_range
            model.integers(rng.integers(lo, hi + 1, (1, 1, *program.values[0].shape)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{count} mutated files: {refused} refused, {accepted} accepted and executed, no crash; "
          f"peak memory {peak:.0f} MiB")  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
