"""Progress is shown on a terminal and nowhere else, and changes nothing about the items."""

import io
import sys

import pytest
import torch
from torch import nn

from qsnn_ext import calibrate, progress, quantize_

rich = pytest.importorskip("rich")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def a_terminal(monkeypatch):
    """Called by the test itself: pytest puts its own stream back before a test begins."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    return sys.stderr


def test_shown_on_a_terminal(monkeypatch):
    terminal = a_terminal(monkeypatch)
    with progress.tracking(iter([1, 2, 3]), "calibrate") as items:
        assert list(items) == [1, 2, 3]
    assert "calibrate" in terminal.getvalue()


def test_silent_elsewhere(capsys):
    items = [1, 2, 3]
    with progress.tracking(items, "calibrate") as shown:
        assert shown is items
    with progress.working("summarize"):
        pass
    said = capsys.readouterr()
    assert said.out + said.err == ""


def test_without_standard_error(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with progress.tracking([1], "calibrate") as shown:
        assert list(shown) == [1]


def test_inside_another_display_and_after_an_error(monkeypatch):
    terminal = a_terminal(monkeypatch)
    with progress.tracking([1], "outer") as outer:
        for _ in outer:
            with progress.tracking([2], "inner") as inner:
                assert list(inner) == [2]
    with pytest.raises(KeyError), progress.working("summarize"):
        raise KeyError
    with progress.tracking([3], "again") as again:
        assert list(again) == [3]
    assert "again" in terminal.getvalue()


def test_calibrate_shows_itself(monkeypatch):
    terminal = a_terminal(monkeypatch)
    snn = pytest.importorskip("snntorch")
    net = nn.Sequential(nn.Linear(4, 4), snn.Leaky(beta=0.9, init_hidden=True))
    quantize_(net, "8w-4u")
    calibrate(net, [torch.rand(2, 4) for _ in range(3)])
    assert "calibrate" in terminal.getvalue()
