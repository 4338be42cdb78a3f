"""Configurations, where they are documented to be; see :mod:`qsnn_ext.conversion.config`."""

from qsnn_ext.conversion.config import (
    SCHEMA,
    MembraneConfig,
    QuantConfig,
    Rule,
    WeightConfig,
)

__all__ = ["SCHEMA", "MembraneConfig", "QuantConfig", "Rule", "WeightConfig"]
