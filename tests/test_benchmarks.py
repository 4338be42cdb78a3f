"""Benchmarks that cannot be run where the tests are: that they are ready to run."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_rehearsed_on_the_cpu():
    """Every section, in its process, with tiny sizes; nothing is written."""
    pytest.importorskip("spikingjelly")
    before = sorted((ROOT / "benchmarks" / "results").iterdir())
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--rehearse"], cwd=ROOT, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of 5 sections failed" in done.stdout
    for section in ("first call", "tests", "neuron, triton", "train step"):
        assert f"== {section}: ended well" in done.stdout
    assert sorted((ROOT / "benchmarks" / "results").iterdir()) == before
