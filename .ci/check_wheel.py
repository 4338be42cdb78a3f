"""Do the libraries inside a wheel load and answer? Needs nothing but Python.

python .ci/check_wheel.py dist/qsnn_ext-*.whl
"""

import ctypes
import sys
import tempfile
import zipfile
from pathlib import Path

#: Library, the function that answers it, and in which folder of the wheel it lies.
LIBRARIES = {
    "_qsnn": ("qsnn_ext/deploy", "qsnn_layout"),
    "_kernels": ("qsnn_ext/kernels", "qsnn_native_layout"),
}


def check(wheel: Path) -> None:
    """Raise ``SystemExit`` with what is wrong."""
    tag = wheel.stem.split("-")[-3:]
    if tag[:2] != ["py3", "none"] or tag[2] == "any":
        raise SystemExit(f"{wheel.name}: a wheel with the engine is py3-none-<platform>")
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        for name, (place, function) in LIBRARIES.items():
            found = [
                p
                for p in Path(folder, place).glob(f"{name}.*")
                if p.suffix in (".so", ".dll", ".dylib")
            ]
            if len(found) != 1:
                raise SystemExit(
                    f"{wheel.name} holds {len(found)} libraries {place}/{name}, not one"
                )
            answer = getattr(ctypes.CDLL(str(found[0])), function)()
            if answer <= 0:
                raise SystemExit(f"{wheel.name}: {function}() of {name} gives {answer}")
            print(f"{wheel.name}: {place}/{found[0].name} answers {answer}")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        check(Path(name))
