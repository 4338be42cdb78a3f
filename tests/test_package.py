"""The package from outside: its public names, and what is said when a host is missing."""

import subprocess
import sys
import textwrap

import pytest

import qsnn_ext


def _run(code):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )


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
    done = _run(
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


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = qsnn_ext.nonsense
