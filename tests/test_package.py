"""The package from outside: what importing brings, and what is said when a host is missing."""

import subprocess
import sys
import textwrap

import pytest

import qsnn_ext


def _run(code):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )


def test_importing_the_core_imports_no_host():
    done = _run(
        """
        import sys
        import qsnn_ext, qsnn_ext.functional, qsnn_ext.quantizers, qsnn_ext.layers
        import qsnn_ext.regularizers, qsnn_ext.models
        hosts = {"spikingjelly", "snntorch", "tonic", "lightning"} & set(sys.modules)
        assert not hosts, hosts
        """
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("host", "statement"),
    [
        ("spikingjelly", "from qsnn_ext.spikingjelly import QuantLIFNode"),
        ("spikingjelly", "import qsnn_ext; qsnn_ext.QuantLIFNode"),
        ("spikingjelly", "import qsnn_ext.models as m; m.resnet19(width=0.0625)"),
        ("snntorch", "from qsnn_ext.snntorch import QLeaky"),
        ("snntorch", "import qsnn_ext; qsnn_ext.QLeaky"),
        ("snntorch", "import qsnn_ext.models as m; m.vgg16(width=0.0625, host='snntorch')"),
    ],
)
def test_missing_host_names_the_extra(host, statement):
    """A finder that refuses the host stands in for an environment without it."""
    done = _run(
        f"""
        import sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "{host}":
                    raise ModuleNotFoundError(f"No module named '{{name}}'", name=name)

        sys.meta_path.insert(0, Absent())
        from qsnn_ext.errors import MissingDependencyError
        try:
            {statement}
        except MissingDependencyError as error:
            assert isinstance(error, ImportError)
            print(error)
        else:
            raise SystemExit("no error")
        """
    )
    assert done.returncode == 0, done.stderr
    assert f"qsnn_ext[{host}]" in done.stdout


def test_one_host_is_enough():
    """With only one library installed the other adapter is not asked for."""
    for absent, use in [
        ("snntorch", "from qsnn_ext.spikingjelly import QuantLIFNode as N; n = N(bits=2)"),
        ("spikingjelly", "from qsnn_ext.snntorch import QLeaky as N; n = N(0.5, bits=2)"),
    ]:
        done = _run(
            f"""
            import sys
            sys.modules["{absent}"] = None
            import torch, qsnn_ext
            {use}
            n(torch.randn(2, 3))
            """
        )
        assert done.returncode == 0, done.stderr


def test_public_names_resolve():
    assert qsnn_ext.__all__
    for name in qsnn_ext.__all__:
        assert getattr(qsnn_ext, name) is not None
    assert set(qsnn_ext.__all__) <= set(dir(qsnn_ext))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = qsnn_ext.nonsense


def test_every_error_has_one_base():
    from qsnn_ext import errors

    found = [
        e for e in vars(errors).values()
        if isinstance(e, type) and issubclass(e, Exception) and e.__module__ == errors.__name__
    ]  # fmt: skip
    assert len(found) > 5
    assert all(issubclass(e, errors.QSNNError) for e in found)
