"""Makers of tiny archives in the real on-disk formats of the data sets.

Each writes the official archive names into a folder and returns the facts (MD5s, counts) that the
loaders are to check against. Written from the formats' descriptions, not with the loaders' code.
"""

import contextlib
import dataclasses
import functools
import hashlib
import http.server
import io
import pickle
import struct
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from recipes.data import OFFICIAL
from recipes.data.files import Archive, Facts, md5_of

GESTURES = (1, 2, 4, 11)  # classes of the gestures in every recording, counted from 1


@contextlib.contextmanager
def served(folder: Path):
    """Serve a folder over HTTP on this machine and give its address."""
    handler = functools.partial(_QuietHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


def facts_at(facts: Facts, address: str) -> Facts:
    """The same facts with archives that can be downloaded from an address."""
    archives = (dataclasses.replace(a, url=f"{address}/{a.name}") for a in facts.archives)
    return dataclasses.replace(facts, archives=tuple(archives))


def facts_of(name: str, folder: Path, train: int, test: int, members=None) -> Facts:
    archives = tuple(
        # The link leads nowhere: a test that needs a download serves the folder itself.
        Archive(a.name, md5_of(folder / a.name), a.url and f"http://127.0.0.1:9/{a.name}")
        for a in OFFICIAL[name].archives
    )
    return dataclasses.replace(
        OFFICIAL[name], archives=archives, train=train, test=test, members=members or {}
    )


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def make_cifar(name: str, folder: Path, per_batch: int = 4, classes: int | None = None) -> Facts:
    """Python 2 pickles of uint8 [N, 3072] (channel, row, column) and labels, in a .tar.gz."""
    rng = np.random.default_rng(0)
    ten = name == "cifar10"
    classes = classes or (10 if ten else 100)
    batches = (
        [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if ten else ["train", "test"]
    )
    files = {}
    for batch in batches:
        labels = rng.integers(classes, size=per_batch).tolist()
        content = {"data": rng.integers(256, size=(per_batch, 3072), dtype=np.uint8)}
        content |= {"labels": labels} if ten else {"fine_labels": labels, "coarse_labels": labels}
        files[batch] = pickle.dumps(content, protocol=2)
    meta = {"label_names" if ten else "fine_label_names": [f"class{i}" for i in range(classes)]}
    files["batches.meta" if ten else "meta"] = pickle.dumps(meta, protocol=2)

    folder.mkdir(parents=True, exist_ok=True)
    top = "cifar-10-batches-py" if ten else "cifar-100-python"
    with tarfile.open(folder / OFFICIAL[name].archives[0].name, "w:gz") as tar:
        for file, content in files.items():
            _add(tar, f"{top}/{file}", content)
    members = {file: hashlib.md5(content).hexdigest() for file, content in files.items()}
    return facts_of(name, folder, (5 if ten else 1) * per_batch, per_batch, members)


def make_tinyimagenet(folder: Path, per_class: int = 4, val: int = 6) -> Facts:
    """train/<id>/images/*.JPEG, val/images + val_annotations.txt, wnids.txt, unlabelled test."""
    rng = np.random.default_rng(0)
    ids = ["n03", "n01", "n02"]
    top = "tiny-imagenet-200"

    def jpeg(level: int, grey: bool = False) -> bytes:
        # The red level tells the class apart: 40 for n01, 120 for n02, 200 for n03.
        pixels = np.zeros((64, 64, 3), np.uint8)
        pixels[..., 0] = level
        pixels[..., 1] = rng.integers(256)
        buffer = io.BytesIO()
        Image.fromarray(pixels).convert("L" if grey else "RGB").save(buffer, "JPEG", quality=95)
        return buffer.getvalue()

    level = {"n01": 40, "n02": 120, "n03": 200}
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "tiny-imagenet-200.zip", "w") as archive:
        archive.writestr(f"{top}/wnids.txt", "\n".join(ids) + "\n")
        archive.writestr(f"{top}/words.txt", "".join(f"{i}\tword\n" for i in ids))
        for name in ids:
            boxes = "".join(f"{name}_{i}.JPEG\t0\t0\t63\t63\n" for i in range(per_class))
            archive.writestr(f"{top}/train/{name}/{name}_boxes.txt", boxes)
            for i in range(per_class):
                grey = i == per_class - 1
                archive.writestr(
                    f"{top}/train/{name}/images/{name}_{i}.JPEG", jpeg(level[name], grey)
                )
        rows = ""
        for i in range(val):
            name = ids[i % len(ids)]
            rows += f"val_{i}.JPEG\t{name}\t0\t0\t63\t63\n"
            archive.writestr(f"{top}/val/images/val_{i}.JPEG", jpeg(level[name]))
        archive.writestr(f"{top}/val/val_annotations.txt", rows)
        archive.writestr(f"{top}/test/images/test_0.JPEG", jpeg(0))
    return facts_of("tinyimagenet", folder, len(ids) * per_class, val)


def aedat3(t, x, y, p, packet: int = 64) -> bytes:
    """AEDAT 3.1: a text header, then packets, here also one of the camera's special events."""
    content = b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: DVS128\r\n#!END-HEADER\r\n"
    special = struct.pack("<HHIIIIII", 0, 1, 8, 4, 0, 1, 1, 1) + struct.pack("<II", 1, 0)
    content += special
    for start in range(0, len(t), packet):
        events = range(start, min(start + packet, len(t)))
        n = len(events)
        content += struct.pack("<HHIIIIII", 1, 1, 8, 4, 0, n, n, n)
        for i in events:
            data = int(x[i]) << 17 | int(y[i]) << 2 | int(p[i]) << 1 | 1
            content += struct.pack("<II", data, int(t[i]))
    return content


def aedat2(t, x, y, p) -> bytes:
    """AEDAT 2.0 of a DVS128: a text header, then big-endian address and time of each event."""
    content = b"#!AER-DAT2.0\r\n# This is a raw AE data file - do not edit\r\n# End of header\r\n"
    for i in range(len(t)):
        content += struct.pack(">II", int(y[i]) << 8 | int(x[i]) << 1 | int(p[i]), int(t[i]))
    return content


def random_events(rng: np.random.Generator, count: int, start: int, end: int):
    t = np.sort(rng.integers(start, end, size=count))
    return (
        t,
        rng.integers(128, size=count),
        rng.integers(128, size=count),
        rng.integers(2, size=count),
    )


def make_dvsgesture(folder: Path, per_gesture: int = 100) -> Facts:
    """Recordings of several gestures with pauses between them, tables and the two lists."""
    rng = np.random.default_rng(0)
    users = {"train": ["user01_led", "user02_lab"], "test": ["user24_led"]}
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "DvsGesture.tar.gz", "w:gz") as tar:
        for split, names in users.items():
            trials = "".join(f"{name}.aedat\n" for name in names) + "\n"
            _add(tar, f"DvsGesture/trials_to_{split}.txt", trials.encode())
            for name in names:
                table = "class,startTime_usec,endTime_usec\n"
                columns = []
                for i, label in enumerate(GESTURES):
                    start, end = 1_000_000 * (i + 1), 1_000_000 * (i + 1) + 600_000
                    table += f"{label},{start},{end}\n"
                    columns.append(random_events(rng, per_gesture, start, end))
                    columns.append(random_events(rng, 10, end, end + 400_000))  # the pause
                events = [np.concatenate(c) for c in zip(*columns, strict=True)]
                _add(tar, f"DvsGesture/{name}.aedat", aedat3(*events))
                _add(tar, f"DvsGesture/{name}_labels.csv", table.encode())
    return facts_of("dvsgesture", folder, 2 * len(GESTURES), len(GESTURES))


def make_dvscifar10(folder: Path, per_class: int = 10, count: int = 120) -> Facts:
    """One zip per class with a folder of recordings; the count of events tells the index."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for archive in OFFICIAL["dvscifar10"].archives:
        name = archive.name.removesuffix(".zip")
        with zipfile.ZipFile(folder / archive.name, "w", zipfile.ZIP_DEFLATED) as file:
            for i in range(per_class):
                content = aedat2(*random_events(rng, count + i, 0, 1_000_000))
                file.writestr(f"{name}/cifar10_{name}_{i}.aedat", content)
    tenth = per_class // 10
    return facts_of("dvscifar10", folder, 10 * (per_class - tenth), 10 * tenth)


def make(name: str, folder: Path) -> Facts:
    """Write the archive of any data set that has one."""
    if name.startswith("cifar"):
        return make_cifar(name, folder)
    makers = {
        "tinyimagenet": make_tinyimagenet,
        "dvsgesture": make_dvsgesture,
        "dvscifar10": make_dvscifar10,
    }
    return makers[name](folder)
