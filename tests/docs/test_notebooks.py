"""The notebooks: their scripts run, and the notebooks are what the scripts say."""

import ast
import contextlib
import html
import importlib
import importlib.util
import io
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"


@pytest.mark.slow
@pytest.mark.parametrize("host", ["spikingjelly", "snntorch"])
def test_runs(host, tmp_path, monkeypatch):
    for package in (host, "sklearn", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "curves", raising=False)
    path = FOLDER / f"{host}_notebook.py"
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
    build = importlib.import_module("build")
    try:
        script = (FOLDER / f"{host}_notebook.py").read_text(encoding="utf-8")
        written = (FOLDER / f"{host}.ipynb").read_text(encoding="utf-8")
        assert build.notebook(script) == written, "run python docs/notebooks/build.py"
    finally:
        sys.modules.pop("build", None)
    cells = json.loads(written)["cells"]
    assert {cell["cell_type"] for cell in cells} == {"markdown", "code"}
    for cell in cells:
        if cell["cell_type"] == "code":
            ast.parse("".join(cell["source"]))


@pytest.mark.parametrize("host", ["spikingjelly", "snntorch"])
def test_imports_what_is_installed(host):
    """A notebook looks in its own folder first."""
    cells = json.loads((FOLDER / f"{host}.ipynb").read_text(encoding="utf-8"))["cells"]
    imported = set()
    for cell in cells:
        if cell["cell_type"] == "code":
            for node in ast.walk(ast.parse("".join(cell["source"]))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                imported |= {name.partition(".")[0] for name in names}
    assert host in imported
    assert imported & {path.stem for path in FOLDER.glob("*.py")} == {"curves"}


@pytest.fixture
def displayed(monkeypatch):
    """A notebook, played: the list of what it shows."""
    pytest.importorskip("matplotlib")
    shown = []

    def show(what, **options):
        shown.append(what)
        return SimpleNamespace(update=shown.append)

    display = SimpleNamespace(display=show, Image=lambda data: data, HTML=lambda text: text)
    played = SimpleNamespace(display=display, get_ipython=object, version_info=(9, 0))
    monkeypatch.setitem(sys.modules, "IPython", played)
    return shown


def test_a_curve_grows_in_its_place(displayed):
    curve = curves().Curve("loss", every=2)
    for step in range(4):
        curve.add(step, 1 / (step + 1))
    assert len(displayed) == 2
    assert all(picture[:4] == b"\x89PNG" for picture in displayed)


def test_the_demo_is_embedded_whole(displayed, tmp_path, monkeypatch, capsys):
    """A notebook's server hands out no file by its path."""
    module = curves()
    monkeypatch.setattr(module, "__file__", str(tmp_path / "notebooks" / "curves.py"))
    (tmp_path / "demo").mkdir()
    page = (FOLDER.parent / "demo" / "index.html").read_text(encoding="utf-8")
    (tmp_path / "demo" / "index.html").write_text(page, encoding="utf-8")
    built = {"bundle.js", "pictures.js"}  # by docs/demo/build.py, in no clone
    for source in (FOLDER.parent / "demo").glob("*.*s"):
        if source.name not in built:
            shutil.copy(source, tmp_path / "demo")
    (tmp_path / "demo" / "pictures.js").write_text("", encoding="utf-8")
    module.show_page("demo/index.html")
    assert not displayed
    assert "run python docs/demo/build.py" in capsys.readouterr().out
    (tmp_path / "demo" / "bundle.js").write_text("const a = '</script>';", encoding="utf-8")
    module.show_page("demo/index.html")
    (shown,) = displayed
    frame = html.unescape(re.search(r'srcdoc="([^"]*)"', shown)[1])
    assert r"const a = '<\/script>';" in frame
    assert not re.search(r'(src|href)="[\w.]+\.(js|css)"', frame)


def curves():
    spec = importlib.util.spec_from_file_location("curves", FOLDER / "curves.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
