"""Every error this package raises on purpose.

All derive from :class:`QSNNError`, so one ``except`` catches them, and each also derives from the
built-in a Python programmer would expect. A message names the thing at fault and the remedy.
"""

from qsnn_ext.text import printable


class QSNNError(Exception):
    """Base class of all errors raised by ``qsnn_ext``.

    A message may quote names from a file; what a terminal would obey in them is spelled out.
    """

    def __str__(self) -> str:
        return printable(super().__str__(), keep="\n\t", most=100_000)


class ConfigError(QSNNError, ValueError):
    """A configuration value, name or combination that cannot be used (bits, presets, patterns)."""


class InputError(QSNNError, ValueError):
    """A tensor of the wrong rank, shape or content was given."""


class InputTypeError(QSNNError, TypeError):
    """A tensor of the wrong dtype, or an object of the wrong kind, was given."""


class StateError(QSNNError, RuntimeError):
    """Something was asked for before the work it depends on was done."""


class MissingDependencyError(QSNNError, ImportError):
    """An optional library is not installed; the message names the pip extra that brings it."""


class ConversionError(QSNNError):
    """A model cannot be quantized as asked; the model has been left as it was."""


class CheckpointError(QSNNError):
    """A checkpoint is damaged, or belongs to another architecture."""


class DataError(QSNNError):
    """A data set is absent, incomplete or damaged; the message says what to put where."""


class TrainingError(QSNNError, RuntimeError):
    """Training cannot start or go on (non-finite loss, unwritable directory, bad labels)."""


class DivergenceError(TrainingError):
    """Training led to a loss or to weights that are NaN or infinite."""


class LoweringError(QSNNError):
    """A model contains something that has no integer equivalent; the message names the module."""


class FormatError(QSNNError, ValueError):
    """A packed ``.qsnn`` file is damaged, hostile or of an unknown version."""
