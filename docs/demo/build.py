"""Writes what the demo page loads: the runtime, the networks and their samples, as scripts.

    python docs/demo/build.py [--data-dir DIR] [--open]

The page has to work from a folder (``file://``), where browsers load neither modules nor data, so
everything stands in ``bundle.js`` as text. Pictures of CIFAR-10 come from the reader's own copy of
it alone, in any form that the recipes read: with ``--data-dir`` some of its test pictures stand in
``pictures.js``, which is in no repository; without, that script says that there are none.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import io
import json
import os
import re
import sys
import tempfile
import webbrowser
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
RESULTS = ROOT / "recipes" / "results"
#: What the page calls a network -> its file.
NETWORKS = {
    "digits": RESULTS / "devices" / "digits.qsnn",
    "events": RESULTS / "devices" / "events.qsnn",
    "pictures": RESULTS / "models" / "cifar10-quarter-1w-2u.qsnn",
}
#: Modules of the npm package, each after those it imports.
MODULES = ("errors", "records", "program", "sha256", "file", "image", "model")
SHOWN = ("samples", "labels", "shape", "steps", "mean", "std", "accuracy_program", "test_samples")
PAGE = ("index.html", "demo.css", "demo.js", "picture.js", "bundle.js", "pictures.js")
LIMIT = 500_000  # bytes of the whole page
OF_EACH_CLASS = 2  # test pictures


def package() -> ModuleType:
    """``js/build.py``."""
    spec = importlib.util.spec_from_file_location("qsnn_js_build", ROOT / "js" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def packed(path: Path) -> str:
    """A file as the page unpacks it: zlib, in base64."""
    return base64.b64encode(zlib.compress(path.read_bytes(), 9)).decode()


def script(text: str) -> str:
    """A module without its imports and exports."""
    text = re.sub(r"^import .*?;\n", "", text, flags=re.M | re.S)
    text = re.sub(r"^export \{.*?\};\n", "", text, flags=re.M)
    return re.sub(r"^export ", "", text, flags=re.M)


def chosen(labels: Any, count: int = OF_EACH_CLASS, seed: int = 0) -> list[int]:
    """Some samples of every class, drawn by chance: first one of each class, then another."""
    labels, rng = np.asarray(labels), np.random.default_rng(seed)
    drawn = [
        rng.choice(np.flatnonzero(labels == k), count, replace=False) for k in np.unique(labels)
    ]
    return [int(i) for i in np.stack(drawn, 1).reshape(-1)]


def cifar_pictures(data_dir: Path, facts: Any = None) -> dict[str, Any]:
    """Some test pictures of CIFAR-10, PNG files in base64, and their labels.

    Args:
        data_dir: Where it lies.
        facts: What it is checked against; none takes what is published.

    Raises:
        DataError: If it is not there, incomplete or damaged.
    """
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from recipes.data import datasets

    with tempfile.TemporaryDirectory() as scratch:
        cache = data_dir / "cache" if os.access(data_dir, os.W_OK) else Path(scratch)
        _, test = datasets(
            "cifar10", data_dir, augment=False, download=False, cache=cache, facts=facts
        )
        picked = chosen(test.labels)  # type: ignore[attr-defined]
        images = np.asarray(test.images[picked])  # type: ignore[attr-defined]
        return {
            "samples": [png(image) for image in images],
            "labels": [test.labels[i] for i in picked],  # type: ignore[attr-defined]
        }


def asked_for(data_dir: Path) -> dict[str, Any]:
    """The pictures, or the end of the program with what is missing and what to do."""
    from qsnn_ext.errors import QSNNError

    try:
        return cifar_pictures(data_dir)
    except QSNNError as error:
        raise SystemExit(f"no pictures: {error}") from None


def png(image: Any) -> str:
    """A picture [H, W, 3] of bytes as a PNG file in base64."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


def pictures_script(pictures: dict[str, Any] | None) -> str:
    """``pictures.js``."""
    return (
        "// Written by docs/demo/build.py: not to be passed on where it holds pictures.\n"
        f"const demoPictures = {json.dumps(pictures)};\n"
    )


def build(pictures: dict[str, Any] | None = None) -> int:
    """Write ``bundle.js`` and ``pictures.js``.

    Args:
        pictures: Of :func:`cifar_pictures`; none leaves the page without any.

    Returns:
        The bytes of the page with all it loads.

    Raises:
        SystemExit: If the page is larger than it may be, or there is no compiler for WebAssembly.
    """
    js = package()
    js.build()
    sources = "\n".join(script((js.FOLDER / "src" / f"{m}.js").read_text()) for m in MODULES)
    data = {
        "engines": {name: packed(js.DIST / name) for name in js.BUILDS},
        "networks": {},
    }
    for name, path in NETWORKS.items():
        card = json.loads(path.with_suffix(".json").read_text())
        entry = {key: card[key] for key in SHOWN if key in card}
        entry["file"] = packed(path)
        data["networks"][name] = entry
    (FOLDER / "bundle.js").write_text(
        "// Written by docs/demo/build.py: do not edit.\n"
        f'"use strict";\nconst qsnn = (() => {{\n{sources}\n'
        "return { QSNNError, compileEngine, load };\n})();\n"
        f"const demoData = {json.dumps(data)};\n"
    )
    (FOLDER / "pictures.js").write_text(pictures_script(pictures))
    size = sum((FOLDER / name).stat().st_size for name in PAGE)
    if size > LIMIT:
        raise SystemExit(f"the page has {size:,} bytes; {LIMIT:,} are allowed")
    return size


def main() -> None:
    """Build; with ``--open`` show the page where there is a screen, and say where it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="directory that holds CIFAR-10")
    parser.add_argument("--open", action="store_true", help="show the page in a browser")
    given = parser.parse_args()
    pictures = None if given.data_dir is None else asked_for(given.data_dir)
    size = build(pictures)
    count = 0 if pictures is None else len(pictures["samples"])
    print(f"{FOLDER.relative_to(ROOT)}/index.html: {size:,} bytes with all it loads, "
          f"{count or 'no'} test pictures of CIFAR-10")  # fmt: skip
    if given.open:
        page = (FOLDER / "index.html").as_uri()
        screen = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY")
        if not (screen and webbrowser.open(page)):
            print(f"open {page} in a browser")


if __name__ == "__main__":
    main()
