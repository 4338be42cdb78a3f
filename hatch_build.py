"""Build hook: compiles the C engine of ``qsnn_ext.deploy`` with the system's C compiler.

Without a working compiler the wheel is a pure one and the NumPy reference answers at run time.
Run ``python hatch_build.py`` to compile into a source tree.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand, outside a build
    BuildHookInterface = object

ROOT = Path(__file__).parent
SOURCE = ROOT / "qsnn_ext" / "deploy" / "runtime"
SUFFIX = {"Windows": "dll", "Darwin": "dylib"}.get(platform.system(), "so")
TARGET = ROOT / "qsnn_ext" / "deploy" / f"_qsnn.{SUFFIX}"
FLAGS = ["-std=c99", "-O3", "-fPIC", "-fvisibility=default", "-ffp-contract=off"]
X86 = {
    "avx2": ["-mavx2", "-mbmi", "-mbmi2", "-mpopcnt", "-mtune=haswell"],
    "avx512": [
        "-mavx2", "-mbmi", "-mbmi2", "-mpopcnt", "-mavx512f", "-mavx512bw", "-mavx512vl",
        "-mavx512dq", "-mprefer-vector-width=512", "-mtune=icelake-server",
    ],
}  # fmt: skip


def compile_engine(target: Path = TARGET, extra: tuple[str, ...] = ()) -> bool:
    """Compile the engine into ``target``.

    What a compiler cannot build of the variants for newer processors is left out, and a library
    that cannot be loaded does not count; the next compiler is tried then.

    Args:
        target: Where the library goes.
        extra: Further flags, such as those of sanitizers.

    Returns:
        Whether there is an engine now.
    """
    named = os.environ.get("CC")
    names = [named] if named else ["cc", "gcc", "clang"]
    compilers = [shlex.split(c) for c in names if shutil.which(shlex.split(c)[0])]
    for k, compiler in enumerate(compilers):
        if any(shutil.which(compiler[0]) == shutil.which(c[0]) for c in compilers[:k]):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            built = _build([*compiler, *FLAGS, *extra], Path(scratch), target.name)
            if built is not None:
                shutil.move(built, target)
                return True
    print("qsnn_ext: no compiled engine; NumPy will run programs, slowly", file=sys.stderr)
    return False


def _build(compiler: list[str], scratch: Path, name: str) -> Path | None:
    """The library as far as this compiler gets, or None if that is nothing that can be loaded."""

    def compiled(source: str, name: str, flags: list[str]) -> str | None:
        target = str(scratch / f"{name}.o")
        command = [*compiler, *flags, "-c", str(SOURCE / source), "-o", target]
        return target if _succeeds(command, f"the {name} engine") else None

    portable = compiled("qsnn.c", "portable", ["-DQSNN_SUFFIX=_portable"])
    if portable is None:
        return None
    variants = {}
    if platform.machine().lower() in ("x86_64", "amd64"):
        for variant, flags in X86.items():
            found = compiled("qsnn.c", variant, [f"-DQSNN_SUFFIX=_{variant}", *flags])
            if found is not None:
                variants[variant] = found
    # Some compilers take every flag and know none of it: without the variants they may do.
    for chosen in (variants, {}) if variants else ({},):
        have = [f"-DQSNN_HAVE_{v.upper()}" for v in chosen]
        dispatch = compiled("qsnn_dispatch.c", "dispatch", have)
        library = scratch / name
        objects = [portable, *chosen.values(), str(dispatch)]
        link = [*compiler, "-shared", "-o", str(library), *objects]
        if dispatch is not None and _succeeds(link, "the library") and _loads(library):
            return library
    return None


def _succeeds(command: list[str], what: str) -> bool:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        line = next((s for s in said if "rror" in s), said[0])
        print(f"qsnn_ext: {what} is left out: {line[:200]}", file=sys.stderr)
        return False
    return True


def _loads(library: Path) -> bool:
    """Whether the library can be loaded and answers; in another process, as it may do anything."""
    check = (
        "import ctypes, sys; lib = ctypes.CDLL(sys.argv[1]); "
        "[lib.qsnn_supports(k) for k in range(3)]; sys.exit(lib.qsnn_layout() <= 0)"
    )
    return _succeeds([sys.executable, "-c", check, str(library)], "a library that does not load")


def wheel_tag() -> str:
    """Tag of a wheel that holds a shared library but no Python extension module."""
    import sysconfig

    tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    return f"py3-none-{tag}"


class CustomBuildHook(BuildHookInterface):
    """Adds the compiled engine to wheels and editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and tag the wheel for this platform if that worked."""
        if self.target_name != "wheel" or not compile_engine():
            return
        build_data["pure_python"] = False
        build_data["tag"] = wheel_tag()
        build_data["artifacts"].append(str(TARGET.relative_to(ROOT)))


if __name__ == "__main__":
    sys.exit(0 if compile_engine() else 1)
