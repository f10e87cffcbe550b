"""Named errors, all of class `GrailError`; the command line exits with code 2 for them.

Each has `page`, the page of the documentation that helps, which the command line prints.
"""

from collections.abc import Sequence

from grail_kernels import BackendError, GrailError, InputError

__all__ = [
    "AdapterError",
    "BackendError",
    "EmptyCalibrationError",
    "ExportError",
    "GrailError",
    "InputError",
    "ModelError",
    "NonFiniteError",
    "OutOfMemoryError",
    "RankError",
    "SolveError",
    "StateError",
    "one_line",
]


class ModelError(GrailError):
    """A model that cannot be read, or whose architecture has no known sites."""

    page = "docs/networks.md#where-sites-come-from"


class AdapterError(GrailError):
    """Another library that is not installed, or that lacks what an adapter attaches to."""

    page = "docs/adapters/index.md"


class EmptyCalibrationError(InputError):
    """Calibration without tokens, or with less text than one sequence."""

    page = "docs/texts.md"


class ExportError(GrailError):
    """An output that could not be written, or that did not reload to the same logits."""

    page = "docs/serving/index.md#verify"


class OutOfMemoryError(GrailError, MemoryError):
    """The device or the host has too little memory; the message names remedies."""

    page = "docs/scale.md#memory"


class RankError(GrailError):
    """Another of several processes failed or was lost."""

    page = "docs/scale.md#many-processes"


class SolveError(GrailError):
    """A ridge system that stayed indefinite after every permitted damping."""

    page = "docs/promises.md#the-fit"


class StateError(GrailError):
    """A file of state that is damaged, of another version, or could not be written."""

    page = "docs/scale.md#interrupted-runs"


class NonFiniteError(GrailError):
    """NaN or Inf in weights or activations, located.

    Args:
        what: the tensor, in words ("activations of model.layers.3.mlp").
        channels: the channels with a non-finite value.
        count: the number of such values.
    """

    page = "docs/promises.md#bad-data"

    def __init__(self, what: str, channels: Sequence[int], count: int):
        self.what, self.channels, self.count = what, tuple(channels), count
        shown = ", ".join(map(str, self.channels[:8])) + (", …" if len(self.channels) > 8 else "")
        super().__init__(
            f"{what}: {count} value(s) are NaN or Inf, in channel(s) {shown}; "
            "nothing was changed; check weights and calibration batches, or use a wider dtype"
        )


def one_line(error: BaseException) -> str:
    """Returns the message of another library's error on one line, or the error's class."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
