"""Deployment: integer programs, the packed ``.qsnn`` file, and engines that run it.

``save(model, path, sample)`` and ``load(path)(x)`` are the short way through all of it.
Loading and running need NumPy only; lowering a model needs torch and is imported when used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qsnn_ext.errors import MissingDependencyError

#: Public name -> the module it lives in.
_HOMES = {
    "Program": "program",
    "ReferenceSession": "reference",
    "EngineSession": "engine",
    "backends": "engine",
    "open_session": "engine",
    "DeployedModel": "model",
    "load": "model",
    "load_program": "fileformat",
    "save_program": "fileformat",
    "lower": "lowering",
    "save": "saving",
    "compare": "comparison",
    "Comparison": "comparison",
    "export_c": "export",
    "resident_size": "export",
    "pixel_table": "pixels",
    "to_nir": "nir",
    "from_nir": "nir",
}

__all__ = [*_HOMES]

if TYPE_CHECKING:
    from qsnn_ext.deploy.comparison import Comparison as Comparison
    from qsnn_ext.deploy.comparison import compare as compare
    from qsnn_ext.deploy.engine import EngineSession as EngineSession
    from qsnn_ext.deploy.engine import backends as backends
    from qsnn_ext.deploy.engine import open_session as open_session
    from qsnn_ext.deploy.export import export_c as export_c
    from qsnn_ext.deploy.export import resident_size as resident_size
    from qsnn_ext.deploy.fileformat import load_program as load_program
    from qsnn_ext.deploy.fileformat import save_program as save_program
    from qsnn_ext.deploy.lowering import lower as lower
    from qsnn_ext.deploy.model import DeployedModel as DeployedModel
    from qsnn_ext.deploy.model import load as load
    from qsnn_ext.deploy.nir import from_nir as from_nir
    from qsnn_ext.deploy.nir import to_nir as to_nir
    from qsnn_ext.deploy.pixels import pixel_table as pixel_table
    from qsnn_ext.deploy.program import Program as Program
    from qsnn_ext.deploy.reference import ReferenceSession as ReferenceSession
    from qsnn_ext.deploy.saving import save as save


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        try:
            module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise MissingDependencyError(
                f"deploy.{name} needs torch, which is not installed; without it deployed networks "
                "are read and run. Install it with: pip install torch"
            ) from error
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
