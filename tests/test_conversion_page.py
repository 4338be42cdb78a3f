"""The code blocks of the page on conversion run as they stand, one after the other."""

import re
import tomllib
from pathlib import Path

from qsnn_ext import QuantConfig

PAGE = Path(__file__).parents[1] / "docs" / "conversion.md"


def _blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(_blocks("python")), str(PAGE), "exec"), {})


def test_the_toml_block_is_a_configuration():
    (text,) = _blocks("toml")
    config = QuantConfig.from_dict(tomllib.loads(text))
    assert [rule.selector for rule in config.rules] == ["'layer4.*.conv?'", "type Linear"]
