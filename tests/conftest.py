"""Shared fixtures: every test starts from the same seed and leaves no neuron behind."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import settings

# A test that shares its machine must not fail for being slow, and must repeat exactly. `make
# test-all` asks for the thorough profile.
settings.register_profile(
    "qsnn_ext", deadline=None, derandomize=True, print_blob=True, max_examples=25
)
settings.register_profile("thorough", settings.get_profile("qsnn_ext"), max_examples=400)
settings.load_profile("qsnn_ext")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="module", autouse=True)
def _no_neuron_left():
    """snnTorch resets every neuron of the process, those of other files' tests too."""
    yield
    if "snntorch" in sys.modules:
        sys.modules["snntorch"].SpikingNeuron.instances.clear()


@pytest.fixture(autouse=True)
def _no_compilation(request):
    """Kernels run as users' do, but uncompiled where the package was built without a C compiler.

    Compiling takes longer than most tests; slow ones may.
    """
    from qsnn_ext import kernels
    from qsnn_ext.kernels import _native

    quick = request.node.get_closest_marker("slow") or _native.library() is not None
    with kernels.use_backend("auto" if quick else "function"):
        yield


@pytest.fixture
def pictures():
    """For a test that looks at the picture of a run."""


@pytest.fixture(autouse=True)
def _no_picture(request, monkeypatch):
    """Runs draw no picture, which takes as long as the rest of a small one, unless asked to.

    What is drawn once for many tests, in a fixture of a module or a session, is drawn.
    """
    run = sys.modules.get("recipes.engine.run")
    if run is not None and "pictures" not in request.fixturenames:
        monkeypatch.setattr(run, "plot_run", lambda result, path: None)


@pytest.fixture
def rng():
    return np.random.default_rng(0)
