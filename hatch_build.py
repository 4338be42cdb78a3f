"""Build hook: compiles the C engine of ``qsnn_ext.deploy`` with the system's C compiler.

Without a working compiler the wheel is a pure one and the NumPy reference answers at run time.
Run ``python hatch_build.py`` to compile into a source tree.
"""

from __future__ import annotations

import os
import platform
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
    """Compile the engine into ``target``; return whether a compiler could do it."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        return False
    cc = compiler.split()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    with tempfile.TemporaryDirectory() as scratch:
        objects = []

        def build(source: str, name: str, flags: list[str]) -> None:
            objects.append(f"{scratch}/{name}.o")
            command = [*cc, *FLAGS, *extra, *flags, "-c", str(SOURCE / source), "-o", objects[-1]]
            subprocess.run(command, check=True)

        try:
            build("qsnn.c", "portable", ["-DQSNN_SUFFIX=_portable"])
            for name, flags in X86.items() if x86 else ():
                build("qsnn.c", name, [f"-DQSNN_SUFFIX=_{name}", *flags])
            build("qsnn_dispatch.c", "dispatch", ["-DQSNN_HAVE_X86"] if x86 else [])
            fresh = f"{scratch}/{target.name}"
            subprocess.run([*cc, *extra, "-shared", "-o", fresh, *objects], check=True)
            shutil.move(fresh, target)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"qsnn_ext: no compiled engine ({error})", file=sys.stderr)
            return False
    return True


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
