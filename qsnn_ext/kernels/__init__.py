"""Fused operations: one file per operation, each beside the eager code it replaces.

Modules pick them by themselves; :func:`use_backend` forces a choice. What each costs, saves for
backward and was measured to take is in ``docs/performance.md``.
"""

from qsnn_ext.kernels.backend import current_backend, use_backend
from qsnn_ext.kernels.lif import LIFOptions, LIFResult, lif_multi_step, lif_multi_step_eager
from qsnn_ext.kernels.neuron import covers, run_delayed_step, run_layer, spike_count
from qsnn_ext.kernels.surrogates import Surrogate, recognise
from qsnn_ext.kernels.watching import COUNTERS, is_watched, uncounted

__all__ = [
    "COUNTERS",
    "LIFOptions",
    "LIFResult",
    "Surrogate",
    "covers",
    "current_backend",
    "is_watched",
    "lif_multi_step",
    "lif_multi_step_eager",
    "recognise",
    "run_delayed_step",
    "run_layer",
    "spike_count",
    "uncounted",
    "use_backend",
]
