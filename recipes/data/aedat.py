"""AEDAT files read as event arrays.

The readers are vectorised and refuse a file that is cut short; SpikingJelly's loop over single
events in Python, and tonic's take what is there.
"""

from pathlib import Path

import numpy as np

from qsnn_ext.errors import DataError

from .events import EVENT, Events, make_events


def _body(path: Path, version: bytes) -> bytes:
    """Return what follows the header, a run of lines that start with ``#``."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    if not data.startswith(b"#!AER-DAT" + version):
        raise DataError(
            f"{path} does not begin with '#!AER-DAT{version.decode()}': it is damaged or of "
            f"another format."
        )
    start = 0
    while data[start : start + 1] == b"#":
        line, start = start, data.find(b"\n", start) + 1
        if start == 0:
            raise DataError(f"{path} is cut short inside its header: unpack or fetch it again.")
        if data.startswith(b"#!END-HEADER", line):
            break
    return data[start:]


def read_aedat2(path: Path) -> Events:
    """Read an AEDAT 2.0 file of a DVS128, as CIFAR10-DVS has them.

    An event is two big-endian 32-bit words: an address (bit 0 polarity, bits 1-7 column, bits 8-14
    row, both counted from the far corner of a camera lying on its side) and a time in microseconds.
    The coordinates returned are turned so that the pictures stand upright, as in SpikingJelly.

    Raises:
        DataError: The file is unreadable, of another format, empty or cut short.

    """
    body = _body(path, b"2")
    if not body or len(body) % 8:
        raise DataError(
            f"{path} is cut short ({len(body):,} bytes of events, not a positive multiple of 8): "
            f"unpack or fetch it again."
        )
    words = np.frombuffer(body, ">u4").reshape(-1, 2)
    address = words[:, 0]
    return make_events(
        x=127 - (address >> 8 & 0x7F),
        y=127 - (address >> 1 & 0x7F),
        t=words[:, 1],
        p=(address & 1) == 0,
    )


def read_aedat3(path: Path) -> tuple[Events, bool]:
    """Read the polarity events of an AEDAT 3.1 file, as DVS-Gesture has them.

    The body is a run of packets: a header of 28 bytes, then ``eventCapacity`` events of
    ``eventSize`` bytes. A polarity event is two little-endian words: bit 1 polarity, bits 2-16 y,
    bits 17-31 x; then 31 bits of time in microseconds, to which the packet adds its overflow.

    Returns:
        The events, and whether the last packet is whole.

    Raises:
        DataError: The file is unreadable or of another format.

    """
    body = _body(path, b"3.1")
    header = np.dtype(
        [("type", "<u2"), ("source", "<u2")]
        + [(n, "<u4") for n in ("size", "offset", "overflow", "capacity", "number", "valid")]
    )
    packets: list[Events] = []
    start, whole = 0, True
    while start < len(body):
        first = start + header.itemsize
        if first > len(body):
            whole = False
            break
        head = np.frombuffer(body, header, 1, start)[0]
        size, start = int(head["size"]), first + int(head["size"]) * int(head["capacity"])
        if start > len(body):
            whole = False
        if head["type"] != 1:  # 1 is a polarity event; 0, 2, ... are the camera's own messages
            continue
        if size != 8:
            raise DataError(f"{path} is damaged: it has polarity events of {size} bytes, not 8.")
        count = (min(start, len(body)) - first) // size
        words = np.frombuffer(body, "<u4", 2 * count, first).reshape(-1, 2)
        data, time = words[:, 0], words[:, 1].astype(np.int64) | int(head["overflow"]) << 31
        packets.append(make_events(data >> 17, data >> 2 & 0x7FFF, time, data >> 1 & 1))
    return (np.concatenate(packets) if packets else np.empty(0, EVENT)), whole
