"""The package from outside: its public names, and what is said when a host is missing."""

import importlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import qsnn_ext
from qsnn_ext import hosts
from tests import fresh

ROOT = Path(__file__).parents[1]


ABSENT = {
    "spikingjelly": [
        "from qsnn_ext.spikingjelly import QuantLIFNode",
        "qsnn_ext.QuantLIFNode",
        "qsnn_ext.models.resnet19(width=0.0625)",
    ],
    "snntorch": [
        "from qsnn_ext.snntorch import QLeaky",
        "qsnn_ext.QLeaky",
        "qsnn_ext.models.vgg16(width=0.0625, host='snntorch')",
    ],
}
PRESENT = {
    "spikingjelly": "from qsnn_ext.snntorch import QLeaky; neuron = QLeaky(0.5, bits=2)",
    "snntorch": "from qsnn_ext.spikingjelly import QuantLIFNode; neuron = QuantLIFNode(bits=2)",
}


@pytest.mark.parametrize("host", ABSENT)
def test_missing_host_names_the_extra_and_the_other_works(host):
    """A finder that refuses one library stands in for an environment without it."""
    done = fresh.run(
        f"""
        import sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "{host}":
                    raise ModuleNotFoundError(f"No module named '{{name}}'", name=name)

        sys.meta_path.insert(0, Absent())
        import torch, qsnn_ext, qsnn_ext.models
        from qsnn_ext.errors import MissingDependencyError
        for statement in {ABSENT[host]!r}:
            try:
                exec(statement)
            except MissingDependencyError as error:
                assert isinstance(error, ImportError)
                assert "qsnn_ext[{host}]" in str(error), error
            else:
                raise SystemExit("no error from " + statement)
        {PRESENT[host]}
        neuron(torch.randn(2, 3))
        print("done")
        """
    )
    assert done.returncode == 0, done.stderr
    assert "done" in done.stdout


def test_public_names_resolve():
    assert qsnn_ext.__all__
    for name in qsnn_ext.__all__:
        assert getattr(qsnn_ext, name) is not None
    assert set(qsnn_ext.__all__) <= set(dir(qsnn_ext))


def test_modules_are_attributes_without_an_import_of_their_own():
    """Those of the hosts load when they are asked for."""
    done = fresh.run(
        """
        import sys, qsnn_ext
        for name in ("kernels", "config", "layers", "hosts", "neuron", "counterparts", "deploy"):
            assert getattr(qsnn_ext, name).__name__ == f"qsnn_ext.{name}"
        assert "spikingjelly" not in sys.modules and "snntorch" not in sys.modules
        assert qsnn_ext.spikingjelly.QuantLIFNode is qsnn_ext.QuantLIFNode
        assert qsnn_ext.snntorch.QLeaky is qsnn_ext.QLeaky
        print("done")
        """
    )
    assert "done" in done.stdout, done.stderr


def test_listings_hold_what_is_public_and_nothing_else():
    assert set(dir(qsnn_ext)) == {"__version__", *qsnn_ext.__all__, *hosts.HOSTS}
    assert all(not name.startswith("_") for name in qsnn_ext.__all__)
    for host in hosts.HOSTS:
        module = pytest.importorskip(f"qsnn_ext.{host}", exc_type=ImportError)
        own = sorted(n for n in module.__all__ if getattr(module, n).__module__ == module.__name__)
        assert own == sorted(module.__all__)
        page = (ROOT / "docs" / "api" / "neurons.md").read_text()
        block = page.partition(f"::: qsnn_ext.{host}\n")[2].partition("\n:::")[0]
        listed = [line.strip()[2:] for line in block.splitlines() if line.strip().startswith("- ")]
        assert sorted(listed) == own


def test_every_module_with_a_list_of_names_has_them():
    for file in (ROOT / "qsnn_ext").rglob("*.py"):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if "__all__" in file.read_text() and name.rpartition(".")[2] not in hosts.HOSTS:
            module = importlib.import_module(name)
            assert all(hasattr(module, public) for public in module.__all__)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = qsnn_ext.nonsense


def test_deployed_networks_run_without_torch():
    """What the pages say: reading and running need NumPy only."""
    # In an interpreter that has never had torch.
    code = textwrap.dedent(
        """
        import sys

        sys.modules["torch"] = None
        import numpy as np
        import qsnn_ext
        from qsnn_ext import deploy

        net = deploy.load("recipes/results/devices/digits.qsnn")
        assert net(np.zeros((2, *net.input_shape), np.float32)).shape[-1] == 10
        net.session().step(net.codes(np.zeros((1, *net.input_shape), np.float32)))
        for holder, name in ((qsnn_ext, "quantize_"), (deploy, "lower"), (deploy, "save")):
            try:
                getattr(holder, name)
            except qsnn_ext.errors.MissingDependencyError as error:
                assert f"{name} needs torch" in str(error), error
                assert "pip install torch" in str(error), error
            else:
                raise AssertionError(f"{name} without torch")
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
