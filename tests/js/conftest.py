from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest

JS = Path(__file__).parents[2] / "js"


def load_module(path: Path):
    """A script beside the package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def built():
    """The npm package's generated parts, built where they are missing or old."""
    build = load_module(JS / "build.py")
    if build.compiler() is None:
        pytest.skip(
            "no compiler for WebAssembly: pip install ziglang, or apt-get install clang lld"
        )
    build.build()
    return JS


@pytest.fixture
def node(built, tmp_path):
    """Runs tasks (see js/test/run.mjs) in node and returns what it answers to each."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed: apt-get install nodejs")

    def run(tasks: list[dict]) -> list[dict]:
        (tmp_path / "tasks.json").write_text(json.dumps(tasks))
        done = subprocess.run(
            ["node", str(built / "test" / "run.mjs"), str(tmp_path)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run
