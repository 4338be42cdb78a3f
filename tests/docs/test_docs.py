"""The documentation tells the truth: its code runs, and what is generated is up to date.

Blocks of one page share a namespace and run in order, in an empty folder. A block that cannot run
says why in a comment right above it: ``<!-- not run: needs several GPUs -->``.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from types import ModuleType

import pytest

import qsnn_ext
from qsnn_ext import errors
from tests.js.browser import Browser, chromium

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")])
#: What code on a page imports, and what that needs to be installed.
NEEDS = {
    "spikingjelly": ["spikingjelly"],
    "snntorch": ["snntorch"],
    "sklearn": ["sklearn"],
    "neurobench": ["neurobench"],
    "lightning": ["lightning"],
    "qsnn_ext.spikingjelly": ["spikingjelly"],
    "qsnn_ext.models": ["spikingjelly"],  # their default host
    "recipes": ["sklearn", "torchvision", "tonic"],
}

#: Pages whose code trains several networks.
LONG = ("docs/start/snntorch.md", "docs/start/spikingjelly.md")

_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+?) -->\s*\n)?^```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^```",
    re.M | re.S,
)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Line number and text of each block of the language that is to be tested."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, found.start("code")), found["code"])
        for found in _BLOCK.finditer(text)
        if found["language"] == language and not found["reason"]
    ]


def with_blocks(language: str) -> list[object]:
    return [
        pytest.param(page, id=name(page), marks=[pytest.mark.slow] * (name(page) in LONG))
        for page in PAGES
        if blocks(page, language)
    ]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", with_blocks("python"))
def test_code_on_the_page_runs(page: Path) -> None:
    found = blocks(page, "python")
    for imported, needed in NEEDS.items():
        if any(re.search(rf"^\s*(import|from) {imported}\b", code, re.M) for _, code in found):
            for package in needed:
                pytest.importorskip(package)
    printed = load(DOCS / "printed.py")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = printed.run(page)
    for said, out, _ in results:
        assert not printed.differences(said, out), f"run python docs/printed.py {name(page)}"
    for warning in caught:
        if Path(warning.filename) == page:
            assert is_answered(str(warning.message), page), f"line {warning.lineno}: {warning}"


def is_answered(message: str, page: Path) -> bool:
    """Whether the page shows what a warning of the package's advises, or speaks of the warning."""
    text, remedies = page.read_text("utf-8"), re.findall(r"qsnn_ext\.(\w+)", message)
    return all(f"{r}(" in text for r in remedies) if remedies else "warns" in text


@pytest.mark.parametrize(
    ("said", "printed", "alike"),
    [
        ("fc1  0.18  -\n", "fc1   0.19   -\n", True),
        ("fc1  0.18\n", "fc1  0.00\n", False),
        ("fc1  0.01\n", "fc1  0.0\n", False),
        ("fc1  120\n", "fc1  160\n", False),
        ("fc1  1\n", "fc2  1\n", False),
        ("1,200\n", "1,201\n", True),
        ("1 nJ\n", "1 mJ\n", False),
        ("a\n", "a\nb\n", False),
    ],
)
def test_printed_blocks_are_compared(said: str, printed: str, alike: bool) -> None:
    assert (not load(DOCS / "printed.py").differences(said, printed)) == alike


@pytest.mark.parametrize(
    "page", ["README.md", "docs/start/spikingjelly.md", "docs/start/snntorch.md"]
)
def test_first_networks_fire(page: str) -> None:
    """What is shown to newcomers is a network that does something."""
    table = re.findall(
        r"<!-- printed -->\s*```text\n(layer.*?)```", (ROOT / page).read_text(), re.S
    )
    assert table, "no report of a network is shown"
    for text in table:
        head, _, *rows = text.splitlines()
        column = head.split().index("p_s")
        rates = [float(r.split()[column]) for r in rows if re.match(r"\S+ +Q\w*(Node|eaky) ", r)]
        assert rates
        assert min(rates) > 0.01, rates


#: What distributions are imported as, where it is not their name.
IMPORTED_AS = {"scikit_learn": "sklearn"}


def installs(line: str) -> set[str]:
    """Names that can be imported after the line and not without it, but for what they bring."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = list(project["dependencies"])
    for word in shlex.split(line.partition("#")[0])[2:]:
        if word.startswith(".["):
            for extra in word[2:-1].split(","):
                requirements += project["optional-dependencies"][extra]
        else:
            requirements.append(word)
    names = [re.match(r"[\w-]+", text)[0].replace("-", "_") for text in requirements if text != "."]  # type: ignore[index]
    return {IMPORTED_AS.get(name, name) for name in names}


@pytest.mark.parametrize(
    "page",
    [page for page in with_blocks("python") if "pip install '.[" in page.values[0].read_text()],
)
def test_what_the_page_installs_is_what_it_imports(page: Path) -> None:
    """Somebody who begins on this page types its first line and no other page's."""
    line = re.search(r"pip install '\.\[.*", page.read_text(encoding="utf-8"))
    assert line is not None
    there = installs(line[0]) | set(sys.stdlib_module_names)
    for _, code in blocks(page, "python"):
        for module in re.findall(r"^(?:import|from) ([\w.]+)", code, re.M):
            for needed in NEEDS.get(module, [module.partition(".")[0]]):
                assert needed in there | {"qsnn_ext"}, f"{module} is not brought by: {line[0]}"


@pytest.mark.parametrize("page", with_blocks("toml"))
def test_config_files_on_the_page_are_accepted(page: Path) -> None:
    for _, text in blocks(page, "toml"):
        config = qsnn_ext.QuantConfig.from_dict(tomllib.loads(text))
        assert qsnn_ext.QuantConfig.from_dict(config.to_dict()) == config


def commands() -> list[object]:
    found = []
    for page in PAGES:
        lines = [line for k in ("bash", "console") for _, code in blocks(page, k)
                 for line in code.replace("\\\n", " ").splitlines()]  # fmt: skip
        for line in dict.fromkeys(line.removeprefix("$ ").split("#")[0].strip() for line in lines):
            if line:
                found.append(pytest.param(line, id=f"{name(page)}: {line}"))
    return found


@pytest.mark.parametrize("line", commands())
def test_command_on_the_page_exists(line: str) -> None:
    """Commands are not run, but what they call exists and recipes take their options."""
    words = shlex.split(line)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M)
        assert words[1] in targets
    elif "-m" in words:
        module, options = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
        if module.split(".")[0] in ("qsnn_ext", "recipes", "benchmarks"):
            assert importlib.util.find_spec(module), f"there is no {module}"
        if module.startswith("recipes.") and "--help" not in options:
            pytest.importorskip("jsonargparse")
            recipe = importlib.import_module(module)
            if hasattr(recipe, "config"):
                importlib.import_module("recipes.engine.cli").parse(recipe.config, options)
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()


def test_generated_parts_are_up_to_date() -> None:
    pytest.importorskip("spikingjelly")  # sizes are those of models built with it
    generate = load(DOCS / "generate.py")
    for page in generate.PAGES:
        text = (DOCS / page).read_text(encoding="utf-8")
        assert generate.fill(text) == text, f"{page}: run python docs/generate.py"


def test_errors_page_lists_every_error_class() -> None:
    listed = set(re.findall(r"^\| `(\w+)`", (DOCS / "errors.md").read_text(), re.M))
    defined = {n for n, c in vars(errors).items()
               if inspect.isclass(c) and issubclass(c, errors.QSNNError)}  # fmt: skip
    assert listed == defined


def test_every_deliberate_error_of_the_package_is_one_of_them() -> None:
    for file in (ROOT / "qsnn_ext").rglob("*.py"):
        for error in re.findall(r"^class (\w+)\([^)]*Error[^)]*\)", file.read_text(), re.M):
            assert hasattr(errors, error), f"{file}: {error} is not in qsnn_ext/errors.py"


def imported(name: str) -> object:
    """The module; none where the library it is made for is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def test_api_reference_names_all_that_is_public() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    # A module given with a list of members shows these, one without shows all that is public.
    whole: set[str] = set()
    shown: set[str] = set()
    for module, options in re.findall(r"^::: (\S+)\n((?: +.*\n|\n(?= ))*)", text, re.M):
        members = re.findall(r"^ +- (\w+)$", options, re.M)
        shown |= {f"{module}.{member}" for member in members}
        whole |= set() if members else {module}
    missing = []
    for public in qsnn_ext.__all__:
        value = getattr(qsnn_ext, public)
        if inspect.ismodule(value):
            continue  # its members are public by their own names
        homes = [m for m in whole | {s.rpartition(".")[0] for s in shown}
                 if getattr(imported(m), public, None) is value]  # fmt: skip
        if not any(m in whole or f"{m}.{public}" in shown for m in homes):
            missing.append(public)
    # The errors have a page of their own.
    assert missing == ["QSNNError"]


def test_pages_load_nothing_from_elsewhere() -> None:
    """No script, style, font or picture of the site comes from another server."""
    settings = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in settings
    assert "extra_javascript" not in settings
    (styles,) = re.findall(r"^extra_css:\n((?:  - .+\n)+)", settings, re.M)
    assert all((ROOT / "docs" / style).is_file() for style in re.findall("- (.+)", styles))
    for page in PAGES:
        assert not re.search(r"(<script|<link|!\[[^\]]*\]\(https?:)", page.read_text()), page


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    for package in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("built") / "site"
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    assert 'not included in the "nav"' not in built.stderr
    return folder


@pytest.mark.slow
def test_site_builds_strictly(site: Path) -> None:
    """No broken link, missing page, docstring that cannot be shown, or file that is no page."""
    neuron = (site / "explanation" / "neuron.html").read_text(encoding="utf-8")
    assert "<math" in neuron
    assert "arithmatex" not in neuron
    assert "qsnn_ext.conversion.quantize_" in (site / "api/conversion.html").read_text()
    assert not list(site.rglob("__pycache__"))
    link = 'href="../index.html"'  # of the demo page; beside docs/demo there is no such page
    assert link in (site / "demo" / "index.html").read_text(encoding="utf-8")
    assert link not in (DOCS / "demo" / "index.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_list_of_pages_says_what_each_holds(site: Path) -> None:
    lines = (site / "llms.txt").read_text(encoding="utf-8").splitlines()
    said = {target: text for line in lines if (found := re.fullmatch(
        r"- \[[^]]+\]\(([^)]+)\): (.+)", line)) for target, text in [found.groups()]}  # fmt: skip
    # The page of the demo and the one for missing pages are no pages of mkdocs.
    pages = {p.relative_to(site).as_posix() for p in site.rglob("*.html")} - {"demo/index.html"}
    assert said.keys() == pages - {"404.html"}
    assert not [text for text in said.values() if len(text) < 10 or text.endswith("(Eq.")]
    first = [said[f"start/{host}.html"] for host in ("spikingjelly", "snntorch")]
    assert all("deploy" in text for text in first), first  # not of the line that installs


@pytest.mark.slow
def test_site_is_read_from_a_folder_and_on_a_phone(site: Path) -> None:
    """Search needs no server, pages ask for nothing, and equations do not widen them."""
    program = chromium()
    if program is None:
        pytest.skip("Chromium is not installed (Debian: chromium)")
    page = Browser(program)
    try:
        page.window(390, 800, dark=False, phone=True)
        for path in sorted((site / "explanation").glob("*.html")):
            page.open(path.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, path.name
        page.open((site / "neurons.html").as_uri())
        broken = "[...document.querySelectorAll('td code')].filter(c => !/[^A-Za-z]/.test("
        broken += "c.textContent) && c.getClientRects().length > 1).map(c => c.textContent)"
        assert page.evaluate(broken) == []
        for dark in (False, True, False):  # as the system has it, also when that changes
            page.window(1280, 800, dark=dark)
            page.open((site / "howto" / "lightning.html").as_uri())
            wanted = "slate" if dark else "default"
            page.wait(f"document.body.dataset.mdColorScheme === '{wanted}'")
        taken = "(document.querySelector('textarea') || {}).value"
        page.evaluate(f"document.execCommand = () => {{ window.copied = {taken}; return true; }}")
        page.evaluate("document.querySelector('[data-clipboard-target]').click()")
        page.wait("window.copied")
        assert page.evaluate("window.copied").startswith("pip install ")  # and no prompt
        page.window(1280, 800, dark=False)
        page.open((site / "howto" / "bits.html").as_uri())
        page.wait("document.querySelector('.md-search__input').offsetWidth > 0")
        page.evaluate("document.querySelector('.md-search__input').focus()")
        for letter in "calibrate":
            page.key(letter)
        page.wait("document.querySelectorAll('.md-search-result__link').length > 2")
        first = page.evaluate("document.querySelector('.md-search-result__link').href")
        assert first.startswith((site / "howto" / "calibrate.html").as_uri())
        assert not page.problems
    finally:
        page.close()


def test_links_of_the_readme_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)#]+)", page.read_text()):
            assert (ROOT / target).exists(), f"{page.name}: {target}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "host", "steps"),
    [("zoo_spikingjelly", "spikingjelly", 20), ("tutorial_snntorch", "snntorch", 150)],
)
def test_example_runs_to_the_end(script: str, host: str, steps: int, tmp_path: Path) -> None:
    pytest.importorskip(host)
    for package in NEEDS["recipes"]:
        pytest.importorskip(package)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        result = load(DOCS / "examples" / f"{script}.py").main(tmp_path, steps=steps)
    assert "predictions agree" in printed.getvalue()
    assert (tmp_path / f"{script}.qsnn").stat().st_size == result["bytes"]
    # The file is smaller than the float parameters it stands for.
    assert result["bytes"] < result["float_bytes"] / 3
    assert result["agreement"] >= 0.99
    if script == "tutorial_snntorch":
        assert result["trained"] > 0.7
        assert result["deployed"] > 0.7


def load(path: Path) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module
