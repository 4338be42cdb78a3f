"""Conversion, where it is documented to be; see :mod:`qsnn_ext.conversion`."""

from qsnn_ext.conversion.quantize import quantize_
from qsnn_ext.conversion.report import ConversionReport, ModuleReport, conversion_report

__all__ = ["ConversionReport", "ModuleReport", "conversion_report", "quantize_"]
