"""The exported PlatformIO project, built by PlatformIO itself.

Its registry of platforms and compilers is elsewhere; here a platform of the same name stands in for
``ststm32``, with the compiler of this machine and a stub of Arduino's functions. The project is as
exported: what is tested is that PlatformIO finds the library, and builds all of it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.devices import samples
from qsnn_ext.deploy import export_c
from tests.deploy.test_boards import STUB

BUILDER = """\
from SCons.Script import AlwaysBuild, Default, DefaultEnvironment
env = DefaultEnvironment()
env.Replace(CC="gcc", CXX="g++", LINK="g++", AR="ar", RANLIB="ranlib", PROGSUFFIX="")
env.Append(CFLAGS=["-std=c99"], CXXFLAGS=["-std=c++11"])
Default(AlwaysBuild(env.Alias("program", env.BuildProgram())))
"""
FRAMEWORK = """\
from SCons.Script import DefaultEnvironment
env = DefaultEnvironment()
core = env.PioPlatform().get_dir() + "/core"
env.Append(CPPPATH=[core])
env.BuildSources("$BUILD_DIR/core", core)
"""
MAIN = "void setup();\nvoid loop();\nint main() { setup(); for (;;) loop(); }\n"


def install(folder: Path, kind: str, name: str, version: str, **manifest) -> None:
    """What PlatformIO's package manager leaves of an installed package."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = {"owner": "platformio", "id": None, "name": name, "requirements": None, "uri": None}
    installed = {"type": kind, "name": name, "version": version, "spec": spec}
    (folder / ".piopm").write_text(json.dumps(installed))
    content = {"name": name, "version": version, "description": name, "title": name, **manifest}
    file = "platform.json" if kind == "platform" else "package.json"
    (folder / file).write_text(json.dumps(content))


def stand_in(core: Path) -> None:
    """A platform ``ststm32`` with one board and one framework, and SCons for PlatformIO."""
    from platformio.dependencies import get_core_dependencies

    scons = core / "packages" / "tool-scons"
    install(scons, "tool", "tool-scons", get_core_dependencies()["tool-scons"].lstrip("~"))
    (scons / "scons.py").write_text("import SCons.Script\nSCons.Script.main()\n")
    platform = core / "platforms" / "ststm32"
    script = "builder/frameworks/arduino.py"
    install(platform, "platform", "ststm32", "1.0.0", frameworks={"arduino": {"script": script}},
            packages={})  # fmt: skip
    board = {"name": "board", "vendor": "-", "url": "", "frameworks": ["arduino"],
             "build": {"cpu": "cortex-m4", "mcu": "stm32f446ret6", "f_cpu": "180000000L"},
             "upload": {"maximum_ram_size": 131072, "maximum_size": 524288}}  # fmt: skip
    for path, text in {
        "platform.py": "from platformio.public import PlatformBase\n"
                       "class Ststm32Platform(PlatformBase):\n    pass\n",
        "boards/nucleo_f446re.json": json.dumps(board),
        "builder/main.py": BUILDER, script: FRAMEWORK,
        "core/Arduino.h": STUB, "core/main.cpp": MAIN,
    }.items():  # fmt: skip
        (platform / path).parent.mkdir(parents=True, exist_ok=True)
        (platform / path).write_text(text)


def test_platformio_builds_the_project(tmp_path):
    for module in ("platformio", "SCons"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install platformio scons")
    for tool in ("gcc", "g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed: apt-get install gcc g++")
    core, project = tmp_path / "core", tmp_path / "project"
    stand_in(core)
    program, codes, sums = samples("digits")
    export_c(program, project, "platformio", name="digits", samples=codes, verbose=False)
    environment = os.environ | {
        "PLATFORMIO_CORE_DIR": str(core),
        "PLATFORMIO_SETTING_ENABLE_TELEMETRY": "no",
        "PLATFORMIO_SETTING_CHECK_PLATFORMIO_INTERVAL": "9999",
    }
    done = subprocess.run(
        [sys.executable, "-m", "platformio", "run", "-d", str(project)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "|-- digits @ 1.0.0" in done.stdout
    (binary,) = project.glob(".pio/build/*/program")
    printed = subprocess.run([binary], capture_output=True, text=True, check=True).stdout
    classes = re.findall(r"sample (\d): class (\d), microseconds \d+", printed)
    assert classes == [(str(i), str(s.argmax())) for i, s in enumerate(sums)]
