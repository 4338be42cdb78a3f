"""Build hook: compiles what is written in C with the system's C compiler.

That is the engine of ``qsnn_ext.deploy``, without which the NumPy reference answers at run time,
and the kernels of ``qsnn_ext.kernels``, without which PyTorch computes neurons and weights. Without
a working compiler the wheel is a pure one.
Run ``python hatch_build.py`` to compile into a source tree. For another processor, ``CC`` names a
compiler and ``_PYTHON_HOST_PLATFORM`` the platform, as for other builders; ``nox -s aarch64`` does.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand, outside a build
    BuildHookInterface = object

ROOT = Path(__file__).parent
SUFFIX = {"Windows": "dll", "Darwin": "dylib"}.get(platform.system(), "so")
FLAGS = ["-std=c99", "-O3", "-fPIC", "-fvisibility=default", "-ffp-contract=off"]
X86 = {
    "avx2": ["-mavx2", "-mbmi", "-mbmi2", "-mpopcnt", "-mtune=haswell"],
    "avx512": [
        "-mavx2", "-mbmi", "-mbmi2", "-mpopcnt", "-mavx512f", "-mavx512bw", "-mavx512vl",
        "-mavx512dq", "-mprefer-vector-width=512", "-mtune=icelake-server",
    ],
}  # fmt: skip


class Library(NamedTuple):
    """A shared library: one source built for several instruction sets, and one that chooses.

    No dataclass, as these look for their module, and build tools run this file without one.

    Attributes:
        what: for messages.
        missing: what happens without it, likewise.
        target: where it goes.
        source: folder of the sources.
        main: the source built once for each instruction set.
        dispatch: the source that chooses among these.
        answers: Python that sets ``ok`` from the loaded library ``lib``.
        flags: after :data:`FLAGS`.
    """

    what: str
    missing: str
    target: Path
    source: Path
    main: str
    dispatch: str
    answers: str
    flags: tuple[str, ...] = ()


ENGINE = Library(
    "engine",
    "NumPy will run programs, slowly",
    ROOT / "qsnn_ext" / "deploy" / f"_qsnn.{SUFFIX}",
    ROOT / "qsnn_ext" / "deploy" / "runtime",
    "qsnn.c",
    "qsnn_dispatch.c",
    "[lib.qsnn_supports(k) for k in range(3)]; ok = lib.qsnn_layout() > 0",
)
KERNELS = Library(
    "kernels",
    "PyTorch will compute neurons and weights",
    ROOT / "qsnn_ext" / "kernels" / f"_kernels.{SUFFIX}",
    ROOT / "qsnn_ext" / "kernels" / "native",
    "kernels.c",
    "dispatch.c",
    "[lib.qsnn_native_supports(k) for k in range(3)]; ok = lib.qsnn_native_layout() > 0",
    # Vectorised, but not unrolled: as fast, and a third of the time to compile. Mathematical
    # functions need set no errno, and comparisons raise no flags; no result depends on it.
    ("-O2", "-ftree-vectorize", "-fno-math-errno", "-fno-trapping-math"),
)
LIBRARIES = (ENGINE, KERNELS)


def compile_engine(target: Path = ENGINE.target, extra: tuple[str, ...] = ()) -> bool:
    """:func:`compile_library` of the engine."""
    return compile_library(ENGINE, target, extra)


def compile_library(library: Library, target: Path, extra: tuple[str, ...] = ()) -> bool:
    """Compile a library into ``target``.

    What a compiler cannot build of the variants for newer processors is left out, and a library
    that cannot be loaded does not count; the next compiler is tried then.

    Args:
        library: Which.
        target: Where it goes.
        extra: Further flags, such as those of sanitizers.

    Returns:
        Whether there is one now.
    """
    named = os.environ.get("CC")
    names = [named] if named else ["cc", "gcc", "clang"]
    compilers = [shlex.split(c) for c in names if shutil.which(shlex.split(c)[0])]
    for k, compiler in enumerate(compilers):
        if any(shutil.which(compiler[0]) == shutil.which(c[0]) for c in compilers[:k]):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            command = [*compiler, *FLAGS, *library.flags, *extra]
            built = _build(library, command, Path(scratch), target.name)
            if built is not None:
                shutil.move(built, target)
                return True
    print(f"qsnn_ext: no compiled {library.what}; {library.missing}", file=sys.stderr)
    return False


def _build(library: Library, compiler: list[str], scratch: Path, name: str) -> Path | None:
    """The library as far as this compiler gets, or None if that is nothing that can be loaded."""

    def compiled(source: str, name: str, flags: list[str]) -> str | None:
        target = str(scratch / f"{name}.o")
        command = [*compiler, *flags, "-c", str(library.source / source), "-o", target]
        return target if _succeeds(command, f"the {name} {library.what}") else None

    portable = compiled(library.main, "portable", ["-DQSNN_SUFFIX=_portable"])
    if portable is None:
        return None
    variants = {}
    if machine().lower() in ("x86_64", "amd64"):
        with ThreadPoolExecutor() as pool:
            objects = pool.map(
                lambda name: compiled(library.main, name, [f"-DQSNN_SUFFIX=_{name}", *X86[name]]),
                X86,
            )
        variants = {name: made for name, made in zip(X86, objects, strict=True) if made}
    # Some compilers take every flag and know none of it: without the variants they may do.
    for chosen in (variants, {}) if variants else ({},):
        have = [f"-DQSNN_HAVE_{v.upper()}" for v in chosen]
        dispatch = compiled(library.dispatch, "dispatch", have)
        built = scratch / name
        link = [*compiler, "-shared", "-o", str(built), portable, *chosen.values(), str(dispatch)]
        if dispatch is None or not _succeeds([*link, "-lm"], "the library"):
            continue
        # What is built for another processor is loaded by whoever has one.
        if machine() != platform.machine() or _loads(built, library.answers):
            return built
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


def _loads(library: Path, answers: str) -> bool:
    """Whether the library can be loaded and answers; in another process, as it may do anything."""
    check = f"import ctypes, sys; lib = ctypes.CDLL(sys.argv[1]); {answers}; sys.exit(not ok)"
    return _succeeds([sys.executable, "-c", check, str(library)], "a library that does not load")


def machine() -> str:
    """The processor that is built for: this one, or that of the platform that builders name."""
    named = os.environ.get("_PYTHON_HOST_PLATFORM")
    return named.rpartition("-")[2] if named else platform.machine()


def wheel_tag() -> str:
    """Tag of a wheel that holds a shared library but no Python extension module."""
    import sysconfig

    tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    return f"py3-none-{tag}"


class CustomBuildHook(BuildHookInterface):
    """Adds what is compiled to wheels and editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and tag the wheel for this platform if that worked."""
        if self.target_name != "wheel":
            return
        for library in LIBRARIES:
            if compile_library(library, library.target):
                build_data["pure_python"] = False
                build_data["tag"] = wheel_tag()
                build_data["artifacts"].append(str(library.target.relative_to(ROOT)))


if __name__ == "__main__":
    built = [compile_library(library, library.target) for library in LIBRARIES]
    sys.exit(not all(built))
