"""Quantized spiking neural networks for SpikingJelly and snnTorch.

1-bit synaptic weights, 2- to 8-bit membrane potentials, trained with Weight-Spike Dual Regulation
(Wei et al., "Q-SNNs: Quantized Spiking Neural Networks", ACM MM 2024).

Importing this package imports neither host: what extends one loads on first use. Without torch,
:mod:`qsnn_ext.deploy` still runs deployed networks.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

from qsnn_ext import errors
from qsnn_ext.errors import QSNNError

_MODULES = ["deploy"]
# A machine that only runs deployed networks may lack torch; there is `deploy` then, and no more.
if importlib.util.find_spec("torch") is not None:
    from qsnn_ext import (
        config,
        conversion,
        counterparts,
        energy,
        functional,
        hosts,
        kernels,
        layers,
        models,
        neuron,
        quantizers,
        regularizers,
        report,
    )
    from qsnn_ext.calibration import calibrate
    from qsnn_ext.checkpoint import load_checkpoint, save_checkpoint
    from qsnn_ext.config import MembraneConfig, QuantConfig, Rule, WeightConfig
    from qsnn_ext.convert import ConversionReport, conversion_report, quantize_
    from qsnn_ext.energy import EnergyTable
    from qsnn_ext.folding import fold_batchnorm_

    # The functions have the names of their files, which they hide as attributes of this package.
    from qsnn_ext.footprint import Footprint, footprint
    from qsnn_ext.layers import (
        BinaryConv1d,
        BinaryConv2d,
        BinaryConv3d,
        BinaryConvTranspose1d,
        BinaryConvTranspose2d,
        BinaryConvTranspose3d,
        BinaryLinear,
        QuantConv1d,
        QuantConv2d,
        QuantConv3d,
        QuantConvTranspose1d,
        QuantConvTranspose2d,
        QuantConvTranspose3d,
        QuantLinear,
    )
    from qsnn_ext.quantizers import (
        PRESETS,
        BinaryWeight,
        IntWeight,
        LearnedMembraneQuantizer,
        MembraneQuantizer,
    )
    from qsnn_ext.registered import register_neuron
    from qsnn_ext.regularizers import SignGradientSchedule, WSDRRegularizer
    from qsnn_ext.report import Summary, summarize
    from qsnn_ext.scaling import calibrate_scales

    _MODULES += hosts.HOSTS

if TYPE_CHECKING:
    from qsnn_ext import deploy as deploy
    from qsnn_ext import sinabs as sinabs
    from qsnn_ext import snntorch as snntorch
    from qsnn_ext import spikingjelly as spikingjelly
    from qsnn_ext.snntorch import QSLSTM as QSLSTM
    from qsnn_ext.snntorch import QAlpha as QAlpha
    from qsnn_ext.snntorch import QLapicque as QLapicque
    from qsnn_ext.snntorch import QLeaky as QLeaky
    from qsnn_ext.snntorch import QRLeaky as QRLeaky
    from qsnn_ext.snntorch import QRSynaptic as QRSynaptic
    from qsnn_ext.snntorch import QSConv2dLSTM as QSConv2dLSTM
    from qsnn_ext.snntorch import QSynaptic as QSynaptic
    from qsnn_ext.spikingjelly import QuantIFNode as QuantIFNode
    from qsnn_ext.spikingjelly import QuantLIFNode as QuantLIFNode
    from qsnn_ext.spikingjelly import QuantParametricLIFNode as QuantParametricLIFNode

#: Names that load on first use -> their module; the modules themselves likewise.
_LATER = {
    "QuantLIFNode": "spikingjelly",
    "QuantIFNode": "spikingjelly",
    "QuantParametricLIFNode": "spikingjelly",
    **dict.fromkeys(
        (
            "QAlpha",
            "QLapicque",
            "QLeaky",
            "QRLeaky",
            "QRSynaptic",
            "QSConv2dLSTM",
            "QSLSTM",
            "QSynaptic",
        ),
        "snntorch",
    ),
}

__all__ = [
    "PRESETS",
    "QSLSTM",
    "BinaryConv1d",
    "BinaryConv2d",
    "BinaryConv3d",
    "BinaryConvTranspose1d",
    "BinaryConvTranspose2d",
    "BinaryConvTranspose3d",
    "BinaryLinear",
    "BinaryWeight",
    "ConversionReport",
    "EnergyTable",
    "Footprint",
    "IntWeight",
    "LearnedMembraneQuantizer",
    "MembraneConfig",
    "MembraneQuantizer",
    "QAlpha",
    "QLapicque",
    "QLeaky",
    "QRLeaky",
    "QRSynaptic",
    "QSConv2dLSTM",
    "QSNNError",
    "QSynaptic",
    "QuantConfig",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "QuantIFNode",
    "QuantLIFNode",
    "QuantLinear",
    "QuantParametricLIFNode",
    "Rule",
    "SignGradientSchedule",
    "Summary",
    "WSDRRegularizer",
    "WeightConfig",
    "calibrate",
    "calibrate_scales",
    "config",
    "conversion",
    "conversion_report",
    "counterparts",
    "deploy",
    "energy",
    "errors",
    "fold_batchnorm_",
    "footprint",
    "functional",
    "hosts",
    "kernels",
    "layers",
    "load_checkpoint",
    "models",
    "neuron",
    "quantize_",
    "quantizers",
    "register_neuron",
    "regularizers",
    "report",
    "save_checkpoint",
    "snntorch",
    "spikingjelly",
    "summarize",
]


def __getattr__(name: str) -> Any:
    if name in __all__ and name != "deploy" and importlib.util.find_spec("torch") is None:
        raise errors.MissingDependencyError(
            f"qsnn_ext.{name} needs torch, which is not installed; without it there is "
            "qsnn_ext.deploy.load, which runs deployed networks. Install it with: pip install torch"
        )
    if name in _LATER:
        return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({"__version__", *__all__, *_MODULES})
