"""Every mistake a user can make, as one exception class each.

The message says what is wrong, with the offending value, and what to do about it. Whatever raises one of these has
changed nothing. All derive from :class:`MSTError`, and from the builtin that fits, so that ``except ValueError`` works.
"""

from __future__ import annotations


class MSTError(Exception):
    """Base class of all errors raised by mst_compile."""


class ArgumentError(MSTError, ValueError):
    """An argument is of the wrong type or out of range, and no other error is nearer."""


class ScheduleError(MSTError, ValueError):
    """A schedule's parameters are out of range, contradict each other, or the object is not a schedule."""


class BlockSizeError(MSTError, ValueError):
    """The block size is no power of two, is not supported, or is larger than every eligible weight."""


class SelectionError(MSTError, ValueError):
    """``include``/``exclude`` patterns match nothing, or the model has no weight that can be sparsified."""


class ModelError(SelectionError, TypeError):
    """A function that takes a model got something else."""


class WeightError(MSTError, ValueError):
    """A weight that was selected cannot be sparsified: on the meta device, of integer or quantised dtype, ..."""


class AlreadySparseError(MSTError, RuntimeError):
    """``sparsify`` was called on a model that is sparse already."""


class NotSparseError(MSTError, RuntimeError):
    """A function that needs a sparsified model got one that is not."""


class SeveralSparsifiersError(MSTError, RuntimeError):
    """Parts of the model were sparsified separately, and a function that serves one of them got the whole."""


class TopologyChangedError(MSTError, RuntimeError):
    """The topology changed between a forward pass and its backward pass."""


class GradientError(MSTError, RuntimeError):
    """A gradient was asked of a model that was packed for inference."""


class CheckpointError(MSTError, ValueError):
    """A state dict does not fit the model that it is loaded into."""


class MaskError(CheckpointError):
    """A mask does not fit the weight that it is meant for."""


class OptimizerError(MSTError, RuntimeError):
    """An optimizer keeps state of a sparse weight in which dropped blocks cannot be made 0, or would take elements of
    the weight from wrong places."""


class ParallelismError(MSTError, RuntimeError):
    """A weight is distributed over ranks in a way that sparse training does not support, as FSDP1's; the message names
    those that it does."""


class RankMismatchError(MSTError, RuntimeError):
    """Ranks of one run were given different options, hold different masks, or have taken different numbers of steps."""


class ForecastError(MSTError, ValueError):
    """A forecast was asked of quantities that make no sense, or of a model and schedule that do not go together."""


class BackendOptionError(MSTError, ValueError):
    """``torch.compile(backend="mst", options=...)`` got an option that does not exist or has a bad value."""


class RecordError(MSTError, ValueError):
    """A folder does not hold the records of a run, or those of another one."""


class DataError(MSTError, ValueError):
    """Text to train on is missing, empty, no text, or too short."""


class WriteError(MSTError, OSError):
    """A file that was asked for cannot be written, as on a disk that is full; what was there before is as it was.

    ``errno`` is the system's.
    """


class MissingPackageError(MSTError, ImportError):
    """Something was asked for that needs a package which is not installed."""


class MSTWarning(UserWarning):
    """Category of every warning that mst_compile issues; each is issued once."""
