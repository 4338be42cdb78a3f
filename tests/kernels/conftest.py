import pytest

from qsnn_ext import kernels


@pytest.fixture(autouse=True)
def _no_compilation(request):
    """Only slow tests compile; the others run the same code as it stands."""
    if request.node.get_closest_marker("slow"):
        yield
    else:
        with kernels.use_backend("function"):
            yield
