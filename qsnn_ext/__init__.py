"""Quantized spiking neural networks for SpikingJelly and snnTorch.

1-bit synaptic weights, 2- to 8-bit membrane potentials, trained with Weight-Spike Dual Regulation
(Wei et al., "Q-SNNs: Quantized Spiking Neural Networks", ACM MM 2024).

Importing this package imports neither host: names load on first use.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: Public name -> the module it lives in.
_HOMES = {
    "QSNNError": "errors",
    "BinaryWeight": "quantizers",
    "IntWeight": "quantizers",
    "MembraneQuantizer": "quantizers",
    "PRESETS": "quantizers",
    "BinaryConv1d": "layers",
    "BinaryConv2d": "layers",
    "BinaryConv3d": "layers",
    "BinaryLinear": "layers",
    "QuantConv1d": "layers",
    "QuantConv2d": "layers",
    "QuantConv3d": "layers",
    "QuantLinear": "layers",
    "QuantLIFNode": "spikingjelly",
    "QuantIFNode": "spikingjelly",
    "QuantParametricLIFNode": "spikingjelly",
    "QLeaky": "snntorch",
    "WSDRRegularizer": "regularizers",
    "SignGradientSchedule": "regularizers",
    "summarize": "report",
    "Summary": "report",
    "footprint": "footprint",
    "Footprint": "footprint",
    "EnergyTable": "energy",
    "QuantConfig": "config",
    "WeightConfig": "config",
    "MembraneConfig": "config",
    "Rule": "config",
    "quantize_": "convert",
    "ConversionReport": "convert",
    "conversion_report": "convert",
    "save_checkpoint": "checkpoint",
    "load_checkpoint": "checkpoint",
    "calibrate": "calibration",
    "fold_batchnorm_": "folding",
}

_SUBMODULES = (
    "functional",
    "models",
    "quantizers",
    "layers",
    "regularizers",
    "errors",
    "report",
    "energy",
)

__all__ = [*_HOMES, *_SUBMODULES]

if TYPE_CHECKING:
    from qsnn_ext.calibration import calibrate as calibrate
    from qsnn_ext.checkpoint import load_checkpoint as load_checkpoint
    from qsnn_ext.checkpoint import save_checkpoint as save_checkpoint
    from qsnn_ext.config import MembraneConfig as MembraneConfig
    from qsnn_ext.config import QuantConfig as QuantConfig
    from qsnn_ext.config import Rule as Rule
    from qsnn_ext.config import WeightConfig as WeightConfig
    from qsnn_ext.convert import ConversionReport as ConversionReport
    from qsnn_ext.convert import conversion_report as conversion_report
    from qsnn_ext.convert import quantize_ as quantize_
    from qsnn_ext.energy import EnergyTable as EnergyTable
    from qsnn_ext.errors import QSNNError as QSNNError
    from qsnn_ext.folding import fold_batchnorm_ as fold_batchnorm_
    from qsnn_ext.footprint import Footprint as Footprint
    from qsnn_ext.footprint import footprint as footprint
    from qsnn_ext.layers import BinaryConv1d as BinaryConv1d
    from qsnn_ext.layers import BinaryConv2d as BinaryConv2d
    from qsnn_ext.layers import BinaryConv3d as BinaryConv3d
    from qsnn_ext.layers import BinaryLinear as BinaryLinear
    from qsnn_ext.layers import QuantConv1d as QuantConv1d
    from qsnn_ext.layers import QuantConv2d as QuantConv2d
    from qsnn_ext.layers import QuantConv3d as QuantConv3d
    from qsnn_ext.layers import QuantLinear as QuantLinear
    from qsnn_ext.quantizers import PRESETS as PRESETS
    from qsnn_ext.quantizers import BinaryWeight as BinaryWeight
    from qsnn_ext.quantizers import IntWeight as IntWeight
    from qsnn_ext.quantizers import MembraneQuantizer as MembraneQuantizer
    from qsnn_ext.regularizers import SignGradientSchedule as SignGradientSchedule
    from qsnn_ext.regularizers import WSDRRegularizer as WSDRRegularizer
    from qsnn_ext.report import Summary as Summary
    from qsnn_ext.report import summarize as summarize
    from qsnn_ext.snntorch import QLeaky as QLeaky
    from qsnn_ext.spikingjelly import QuantIFNode as QuantIFNode
    from qsnn_ext.spikingjelly import QuantLIFNode as QuantLIFNode
    from qsnn_ext.spikingjelly import QuantParametricLIFNode as QuantParametricLIFNode


class _Package(types.ModuleType):
    """A package in which importing the file ``footprint`` does not hide the function of that name.

    Python sets a submodule as an attribute of its package; for public names that is left out.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
