"""Fixtures of the fault tests: a training run that many compare with, and a deployed model."""

import time

import pytest
import torch

import qsnn_ext
from qsnn_ext import deploy

from .runs import live, tiny


@pytest.fixture(scope="session")
def timed(tmp_path_factory):
    """The folder of a run that nothing interrupted, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    started = time.monotonic()
    life = live(tiny(folder))
    assert life.wait() == 0, life.said()
    return folder, time.monotonic() - started


@pytest.fixture(scope="session")
def unbroken(timed):
    """The folder of a run that nothing interrupted."""
    return timed[0]


@pytest.fixture(scope="session")
def deployed(tmp_path_factory):
    """The file of a packed model."""
    from .test_corrupt_files import network

    torch.manual_seed(0)
    model = network().eval()
    qsnn_ext.quantize_(model, "1w-2u", torch.rand(1, 1, 8, 8))
    qsnn_ext.calibrate(model, [torch.rand(4, 1, 8, 8)])
    path = tmp_path_factory.mktemp("deployed") / "net.qsnn"
    deploy.save(model, path, torch.rand(4, 1, 8, 8))
    return path
