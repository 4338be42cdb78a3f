"""The notebooks: their scripts run, and the notebooks are what the scripts say."""

import ast
import contextlib
import io
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"


@pytest.mark.parametrize("host", ["spikingjelly", "snntorch"])
def test_runs(host, tmp_path, monkeypatch):
    for package in (host, "sklearn", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "curves", raising=False)
    path = FOLDER / f"{host}.py"
    namespace = {"__name__": "notebook"}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), namespace)
    sys.modules.pop("curves", None)
    assert namespace["accuracy"] > 0.7
    curve = namespace["curve"].values
    assert sum(curve[-20:]) < 0.85 * sum(curve[:20])
    for file in ("net.qsnn", "summary.png", "comparison.png"):
        assert (tmp_path / file).stat().st_size > 1000
    assert "predictions agree on 100" in printed.getvalue()


@pytest.mark.parametrize("host", ["spikingjelly", "snntorch"])
def test_is_built_from_its_script(host, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import importlib

    build = importlib.import_module("build")
    try:
        script = (FOLDER / f"{host}.py").read_text(encoding="utf-8")
        written = (FOLDER / f"{host}.ipynb").read_text(encoding="utf-8")
        assert build.notebook(script) == written, "run python docs/notebooks/build.py"
    finally:
        sys.modules.pop("build", None)
    cells = json.loads(written)["cells"]
    assert {cell["cell_type"] for cell in cells} == {"markdown", "code"}
    for cell in cells:
        if cell["cell_type"] == "code":
            ast.parse("".join(cell["source"]))
