"""Files spoilt at random, by accident (bytes) and on purpose (values of a document)."""

import copy
import os
import random
from collections.abc import Iterator
from typing import Any

from tests.pairwise import THOROUGH

#: Mutations of each kind of file: a hundred in the quick suite, four times as many in `make
#: test-all`, thousands with QSNN_MUTATIONS=5000.
COUNT = int(os.environ.get("QSNN_MUTATIONS", "400" if THOROUGH else "100"))

HOSTILE: list[Any] = [
    None, True, -1, 0, 1, 2, 2**31, 2**63, -(2**63), 10**30, 1e308, -0.0, "", "x", "../../etc",
    "/etc/passwd", "__class__", "\x00", "nan", "\ud83d\ude00" * 50, [], {}, [[]], [None] * 100,
    {"": {}}, {"__class__": "os.system"}, "9" * 5000,
]  # fmt: skip


def spoil(content: bytes, rng: random.Random) -> bytes:
    """One to three of the things that happen to bytes on disks, wires and in editors."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        n = len(data)
        at = rng.randrange(n + 1)
        span = slice(at, min(n, at + rng.choice((1, 2, 8, 64, 4096))))
        kind = rng.randrange(9)
        if kind == 0 and at < n:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < n:
            data[at] = rng.randrange(256)
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[span]
        elif kind == 4:
            data[at:at] = rng.randbytes(rng.choice((1, 4, 100)))
        elif kind == 5:
            data[at:at] = data[span]
        elif kind == 6:
            data[span] = bytes(len(data[span]))
        elif kind == 7:
            data[span] = b"\xff" * len(data[span])
        else:
            word = rng.choice((b"\x7f\xff\xff\xff", b"\xff" * 8, b"[" * 50, b"NaN", b"-", b"\n"))
            data[at : at + len(word)] = word
    return bytes(data)


def spots(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a document of dictionaries and lists."""
    pairs = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(pairs):
        yield document, key
        if isinstance(value, dict | list):
            yield from spots(value)


def corrupt(document: Any, rng: random.Random) -> None:
    """Change one value of a document in place: replaced, removed, renamed, moved or repeated."""
    container, key = rng.choice(list(spots(document)))
    kind = rng.randrange(5)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        container[rng.choice(("x", "", "__class__", key + "x"))] = container.pop(key)
    elif kind == 2:
        other, name = rng.choice(list(spots(document)))
        container[key] = copy.deepcopy(other[name])
    elif kind == 3 and isinstance(container, list):
        container.append(container[key])
    else:
        container[key] = copy.deepcopy(rng.choice(HOSTILE))
