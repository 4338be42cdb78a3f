"""Writes what the demo page loads: the runtime, the networks and their samples, in one script.

    python docs/demo/build.py

The page has to work from a folder (``file://``), where browsers load neither modules nor data, so
everything stands in ``bundle.js`` as text.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import sys
import webbrowser
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
MODELS = ROOT / "recipes" / "results" / "devices"
#: Modules of the npm package, each after those it imports.
MODULES = ("errors", "records", "program", "sha256", "file", "image", "model")
SHOWN = ("samples", "labels", "shape", "steps", "mean", "std", "accuracy_program", "test_samples")
LIMIT = 500_000  # bytes of the whole page


def package() -> ModuleType:
    """``js/build.py``."""
    spec = importlib.util.spec_from_file_location("qsnn_js_build", ROOT / "js" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(text: str) -> str:
    """A module without its imports and exports."""
    text = re.sub(r"^import .*?;\n", "", text, flags=re.M | re.S)
    text = re.sub(r"^export \{.*?\};\n", "", text, flags=re.M)
    return re.sub(r"^export ", "", text, flags=re.M)


def build() -> int:
    """Write ``bundle.js``.

    Returns:
        The bytes of the page with all it loads.

    Raises:
        SystemExit: If the page is larger than it may be, or there is no compiler for WebAssembly.
    """
    js = package()
    js.build()
    sources = "\n".join(script((js.FOLDER / "src" / f"{m}.js").read_text()) for m in MODULES)
    data = {
        "engines": {
            name: base64.b64encode((js.DIST / name).read_bytes()).decode() for name in js.BUILDS
        },
        "networks": {},
    }
    for path in sorted(MODELS.glob("*.qsnn")):
        card = json.loads(path.with_suffix(".json").read_text())
        entry = {key: card[key] for key in SHOWN if key in card}
        entry["file"] = base64.b64encode(path.read_bytes()).decode()
        data["networks"][path.stem] = entry
    (FOLDER / "bundle.js").write_text(
        "// Written by docs/demo/build.py: do not edit.\n"
        f'"use strict";\nconst qsnn = (() => {{\n{sources}\n'
        "return { QSNNError, compileEngine, load };\n})();\n"
        f"const demoData = {json.dumps(data)};\n"
    )
    size = sum(
        (FOLDER / n).stat().st_size for n in ("index.html", "demo.css", "demo.js", "bundle.js")
    )
    if size > LIMIT:
        raise SystemExit(f"the page has {size:,} bytes; {LIMIT:,} are allowed")
    return size


def main() -> None:
    """Build; with ``--open`` show the page where there is a screen, and say where it is."""
    print(f"{FOLDER.relative_to(ROOT)}/index.html: {build():,} bytes with all it loads")
    if "--open" in sys.argv[1:]:
        page = (FOLDER / "index.html").as_uri()
        screen = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY")
        if not (screen and webbrowser.open(page)):
            print(f"open {page} in a browser")


if __name__ == "__main__":
    main()
