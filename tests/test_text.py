"""What comes from a file is shown so that neither a terminal nor a reader is deceived."""

from __future__ import annotations

import pytest

from qsnn_ext.deploy import DeployedModel
from qsnn_ext.errors import FormatError, QSNNError
from qsnn_ext.text import printable
from tests.deploy.random_programs import random_program

EVIL = ["\x1b[2J", "\x9b31m", "a\rb", "a\nb", "\u202eevil", "\x00", "\x07", "\ud83d", "\u2028"]


@pytest.mark.parametrize("text", EVIL)
def test_printable(text):
    shown = printable(f"layer{text}end")
    assert shown.isprintable()
    shown.encode("utf-8")
    assert shown.startswith("layer")
    assert shown.endswith("end")
    assert "\\" in shown


def test_what_is_printable_stays():
    for text in ("features.0.conv", "Größe μ 数", "a b", ""):
        assert printable(text) == text
    assert len(printable("x" * 1000)) == 200
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"


@pytest.mark.parametrize("text", EVIL)
def test_names_from_a_file_in_messages(text):
    program = random_program(3)
    program.ops[0].name = f"op{text}"
    program.ops[0].source = 99
    with pytest.raises(FormatError) as caught:
        DeployedModel(program)
    message = str(caught.value)
    assert message.replace("\n", "").isprintable()
    assert "op" in message
    message.encode("utf-8")
    assert str(QSNNError("two\nlines\tare fine")) == "two\nlines\tare fine"
