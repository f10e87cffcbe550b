"""The state of a measurement of sensitivity in a folder, after each block."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from grail.errors import StateError
from grail.run.fingerprint import require_same_run
from grail.run.resume_folder import SENSITIVITY
from grail.runtime import state


class Measurement:
    """The losses that `grail.sensitivity` has measured so far.

    Args:
        folder: locked for this measurement (`grail.run.resume_folder.opened`).
        run: its fingerprint.
    """

    def __init__(self, folder: Path, run: Mapping[str, str]):
        self._path, self._run = folder / f"{SENSITIVITY}.state", run

    def read(self) -> state.State | None:
        """Returns what was written last; None if nothing was.

        Raises:
            InputError: state of another model, calibration or setting.
            StateError: a damaged file.
        """
        if not self._path.exists():
            return None
        try:
            found = state.read(self._path, SENSITIVITY)
        except StateError as error:
            raise StateError(f"{error}; delete it to measure anew") from error
        require_same_run(self._path.parent, found.content["run"], self._run)
        return found

    def write(self, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Replaces the state.

        Raises:
            StateError: the disk is full, or cannot be written.
        """
        state.write(self._path, SENSITIVITY, {"run": self._run, **content}, tensors)
