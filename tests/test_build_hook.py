"""The build hook keeps what a compiler can build, and takes nothing that cannot be loaded.

Compilers are played by scripts before the real one, so that old ones need not be there.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import shutil
import stat
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
hatch_build = pytest.importorskip("hatch_build")
CC = shutil.which("cc") or shutil.which("gcc")

pytestmark = [
    pytest.mark.skipif(CC is None, reason="needs a C compiler"),
    pytest.mark.skipif(os.name != "posix", reason="compilers are played by shell scripts"),
]
x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="there are no variants")


def compiler(folder: Path, name: str, body: str) -> str:
    """A script that stands for a compiler; ``$CC`` in it is the real one."""
    path = folder / name
    path.write_text(f"#!/bin/sh\nCC={CC}\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(hatch_build, "FLAGS", ["-std=c99", "-O0", "-fPIC"])
    return tmp_path / "_qsnn.so"


def supports(path: Path) -> list[int]:
    lib = ctypes.CDLL(str(path))
    return [lib.qsnn_supports(k) for k in range(3)]


@x86
def test_a_compiler_that_does_not_know_a_processor(tmp_path, monkeypatch, capfd):
    """One variant is dropped, the others stay."""
    target = quick(monkeypatch, tmp_path)
    body = """case "$*" in *icelake-server*) echo "error: bad value for -mtune" >&2; exit 1;; esac
exec $CC "$@\""""
    monkeypatch.setenv("CC", compiler(tmp_path, "old", body))
    assert hatch_build.compile_engine(target)
    assert supports(target)[0] == 1
    assert supports(target)[2] == 0
    assert "the avx512 engine is left out: error: bad value" in capfd.readouterr().err


@x86
def test_a_library_that_cannot_be_loaded_is_no_success(tmp_path, monkeypatch, capfd):
    """A compiler that leaves a builtin undefined links a library that nobody can load."""
    target = quick(monkeypatch, tmp_path)
    body = 'exec $CC "-D__builtin_cpu_init()=qsnn_nowhere()" "$@"'
    monkeypatch.setenv("CC", compiler(tmp_path, "tiny", body))
    built = hatch_build.compile_engine(target)
    assert "a library that does not load" in capfd.readouterr().err
    assert built
    assert supports(target) == [1, 0, 0]  # plain code needs no builtin


def test_no_compiler_that_works(tmp_path, monkeypatch, capfd):
    target = quick(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)  # the second writes a file named like its last option, -lm
    target.write_bytes(b"before")
    for body in ("exit 1", 'for o; do :; done; : > "$o"; echo ok', "kill -SEGV $$"):
        monkeypatch.setenv("CC", compiler(tmp_path, "broken", body))
        assert not hatch_build.compile_engine(target)
        assert "NumPy will run programs" in capfd.readouterr().err
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    assert not hatch_build.compile_engine(target)
    assert target.read_bytes() == b"before"


def test_the_next_compiler_is_tried(tmp_path, monkeypatch):
    target = quick(monkeypatch, tmp_path)
    compiler(tmp_path, "cc", "exit 1")
    compiler(tmp_path, "gcc", 'exec $CC "$@"')
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert hatch_build.compile_engine(target)
    assert supports(target)[0] == 1


@pytest.mark.skipif(shutil.which("tcc") is None, reason="tcc is not installed: apt-get install tcc")
def test_tcc(tmp_path, monkeypatch):
    """It takes every flag and knows no builtin; what it makes answers, or there is no engine."""
    target = tmp_path / "_qsnn.so"
    monkeypatch.setenv("CC", "tcc")
    if hatch_build.compile_engine(target):
        assert supports(target)[0] == 1
    else:
        assert not target.exists()


@pytest.mark.slow
def test_another_processor(tmp_path, monkeypatch):
    """Compiled and tagged for the platform that is named, where it cannot be loaded."""
    pytest.importorskip("ziglang")
    target = quick(monkeypatch, tmp_path)
    monkeypatch.setenv("CC", f"{sys.executable} -m ziglang cc -target aarch64-linux-gnu.2.17")
    monkeypatch.setenv("_PYTHON_HOST_PLATFORM", "linux-aarch64")
    assert hatch_build.compile_engine(target)
    assert target.read_bytes()[:4] == b"\x7fELF"
    assert int.from_bytes(target.read_bytes()[18:20], "little") == 183  # EM_AARCH64
    assert hatch_build.wheel_tag() == "py3-none-linux_aarch64"


def test_build_tools_run_the_hook_without_naming_its_module():
    """As hatchling does: the module is not in ``sys.modules`` while it runs."""
    spec = importlib.util.spec_from_file_location("a_build_hook", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert [library.what for library in module.LIBRARIES] == ["engine", "kernels"]
