"""A model somebody else wrote becomes a Q-SNN.

``config`` says what is wanted, ``flow`` what a run on a sample shows of the model, ``plan`` decides
about every module without touching one, ``change`` makes the changes, all or none, and ``report``
says what came of it.
"""

from qsnn_ext.conversion.config import MembraneConfig, QuantConfig, Rule, WeightConfig
from qsnn_ext.conversion.quantize import quantize_
from qsnn_ext.conversion.report import ConversionReport, ModuleReport, Shares, conversion_report

__all__ = [
    "ConversionReport",
    "MembraneConfig",
    "ModuleReport",
    "QuantConfig",
    "Rule",
    "Shares",
    "WeightConfig",
    "conversion_report",
    "quantize_",
]
