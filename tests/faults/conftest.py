"""Fixtures of the fault tests: one whole training run that many tests compare with."""

import pytest

from .runs import live, tiny


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    life = live(tiny(folder))
    assert life.wait() == 0, life.said()
    return folder
