"""An export takes the place of an earlier one, and of nothing that is its owner's."""

from __future__ import annotations

import json
import shutil
import subprocess
import warnings

import pytest

from benchmarks.devices import samples
from qsnn_ext.deploy import export_c
from qsnn_ext.errors import ConfigError, FormatError, InputTypeError
from tests.deploy.random_programs import random_program

GCC = shutil.which("gcc")


@pytest.fixture(scope="module")
def digits():
    return samples("digits")[:2]


def contents(folder):
    """Every file below a folder: path -> bytes."""
    found = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found}


@pytest.mark.parametrize("target", ["library", "stdio", "arduino", "platformio", "mps2-an386"])
def test_another_export_takes_the_place_of_the_first(digits, tmp_path, target):
    program, codes = digits
    given = {} if target in ("library", "stdio") else {"samples": codes[:1]}
    other = {} if target in ("library", "stdio") else {"samples": codes[1:]}
    export_c(program, tmp_path / "fresh", target, verbose=False, **given)
    export_c(program, tmp_path / "again", target, mean=0.3, std=0.3, verbose=False, **other)
    assert contents(tmp_path / "again") != contents(tmp_path / "fresh")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_c(program, tmp_path / "again", target, verbose=False, **given)
    assert contents(tmp_path / "again") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("path", ["LICENSE", "model.c", "model.h", "qsnn.h", "Makefile", "main.c",
                                  "samples.h"])  # fmt: skip
def test_what_is_not_of_an_export_stays(digits, tmp_path, path):
    program, codes = digits
    (tmp_path / path).write_text("MIT License\n\nCopyright (c) somebody else\n")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=f"holds {path}, which is not of such an export"):
        export_c(program, tmp_path, "mps2-an386", samples=codes)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("path", ["LICENSE", "model.h"])
def test_a_folder_in_the_place_of_a_file(tmp_path, path):
    (tmp_path / path).mkdir()
    with pytest.raises(ConfigError, match=f"holds {path}, which"):
        export_c(random_program(3), tmp_path)
    assert contents(tmp_path) == {}


def test_edited_files_of_a_project_are_kept(digits, tmp_path):
    """The how-to says which: the linker script, the Makefile, start-up, main."""
    program, codes = digits
    export_c(program, tmp_path, "mps2-an386", samples=codes[:1], verbose=False)
    fresh = contents(tmp_path)
    for path in ("mps2-an386.ld", "cortex_m.c", "samples.h", "model.c"):
        file = tmp_path / path
        file.write_text(file.read_text() + "/* mine */\n")
    with pytest.warns(UserWarning, match=r"kept cortex_m\.c, mps2-an386\.ld, which differs"):
        export_c(program, tmp_path, "mps2-an386", samples=codes[:1], verbose=False)
    changed = {path for path, text in contents(tmp_path).items() if text != fresh[path]}
    assert changed == {"cortex_m.c", "mps2-an386.ld"}


@pytest.mark.parametrize("target", ["stdio", "arduino", "mps2-an386"])
def test_a_project_is_of_one_model(digits, tmp_path, target):
    """Its Makefile and main.c go on naming the model that they were written for."""
    program, codes = digits
    given = {} if target == "stdio" else {"samples": codes[:1]}
    export_c(program, tmp_path, target, name="first", verbose=False, **given)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="holds a project around the model 'first'"):
        export_c(program, tmp_path, target, name="second", **given)
    assert contents(tmp_path) == before


def test_other_files_do_not_matter(tmp_path):
    (tmp_path / "own.c").write_text("int own;\n")
    export_c(random_program(3), tmp_path, verbose=False)
    assert (tmp_path / "own.c").read_text() == "int own;\n"


@pytest.mark.parametrize("bad", [{"compiler": "no-such-compiler"}, {"compiler": "cc '"},
                                 {"compiler": ""}, {"compiler": 3}, {"memory_limit": 10},
                                 {"classes": "ab"}, {"classes": 2}, {"classes": [None, None]},
                                 {"classes": ["a\0b", "c"]}, {"name": None}, {"name": 5},
                                 {"name": "con"}, {"name": "lpt1"}, {"name": "unistd"},
                                 {"mean": "x", "std": 1.0}, {"mean": {}, "std": 1.0},
                                 {"mean": [[1], [1, 2]], "std": 1.0}],
                         ids=json.dumps)  # fmt: skip
def test_refused_before_anything_is_written(tmp_path, bad):
    with pytest.raises((ConfigError, FormatError, InputTypeError)):
        export_c(random_program(3), tmp_path / "no", **bad)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("folder", [None, 7, b"bytes", "", "a\0b"])
def test_what_is_no_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigError, InputTypeError)):
        export_c(random_program(3), folder)
    assert contents(tmp_path) == {}


def test_a_board_must_hold_it(digits, tmp_path):
    program, codes = digits
    many = codes[:1].repeat(9_000, 0)  # of 512 bytes each
    with pytest.raises(FormatError, match=r"mps2-an386 has 4,194,304 bytes of FLASH and the netw"):
        export_c(program, tmp_path / "no", "mps2-an386", samples=many)
    assert not (tmp_path / "no").exists()
    export_c(program, tmp_path / "yes", "mps3-an547", samples=many[:800], verbose=False)


@pytest.mark.skipif(GCC is None, reason="needs gcc")
def test_names_of_classes_reach_the_program(digits, tmp_path):
    """Quotes, ends of lines, trigraphs, other alphabets: as UTF-8."""
    program, _ = digits
    names = ['"\\', "a\nb", "??/", "%s%n", "\u4e03", "\U0001f600", "*/", "1\x01", "model_a", ""]
    export_c(program, tmp_path, name="odd", classes=names, verbose=False)
    main = tmp_path / "main.c"
    main.write_text(
        '#include "odd.h"\n#include <stdio.h>\nint main(void) {\n    int i;\n'
        "    for (i = 0; i < ODD_CLASSES; i++) printf(\"%s%c\", odd_class_names[i], 0);\n"
        "    return 0;\n}\n"
    )  # fmt: skip
    sources = [str(p) for p in sorted(tmp_path.glob("*.c"))]
    strict = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]  # c99: with trigraphs
    subprocess.run([GCC, *strict, *sources, "-o", str(tmp_path / "net")], check=True)
    printed = subprocess.run([str(tmp_path / "net")], capture_output=True, check=True).stdout
    assert printed.decode().split("\0")[:-1] == names
