"""Fused operations, each beside the eager code it replaces.

Modules pick them by themselves; :func:`use_backend` forces a choice. What each costs, saves for
backward and was measured to take is in ``docs/performance.md``.
"""

from qsnn_ext.kernels.backend import current_backend, use_backend
from qsnn_ext.kernels.layer import rounding, run_layer, spike_count
from qsnn_ext.kernels.lif import LIFResult, lif_multi_step
from qsnn_ext.kernels.options import LIFOptions
from qsnn_ext.kernels.surrogates import RECOGNIZERS, Surrogate, recognize
from qsnn_ext.kernels.watching import COUNTERS, is_watched, uncounted

__all__ = [
    "COUNTERS",
    "RECOGNIZERS",
    "LIFOptions",
    "LIFResult",
    "Surrogate",
    "current_backend",
    "is_watched",
    "lif_multi_step",
    "recognize",
    "rounding",
    "run_layer",
    "spike_count",
    "uncounted",
    "use_backend",
]
