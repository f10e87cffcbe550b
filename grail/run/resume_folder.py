"""The folder of a run that can be resumed.

d/block-0003.state      the changes of the model in block 3 (`grail.run.checkpoint`)
d/position-0004.state   the position of the run before block 4 (`grail.run.checkpoint`)
d/sensitivity.state     the loss of each site measured so far (`grail.run.measurement`)
d/command.state         the command line that is about to write its output
d/process-0-of-4/       the same files of each of several processes
d/lock                  locked by the run that uses the folder
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from grail.arguments import as_path
from grail.errors import InputError
from grail.recipe import Recipe
from grail.runtime import state
from grail.runtime.lock import LOCK, locked
from grail.runtime.processes import Processes

BLOCK, POSITION, SENSITIVITY = "block", "position", "sensitivity"
_COMMAND, _PROCESS = "command", "process"


@contextmanager
def opened(
    folder: str | Path | None, recipe: Recipe, processes: Processes
) -> Iterator[Path | None]:
    """Locks the folder of a run; None without one. Of several processes each has its own in it.

    Raises:
        InputError: not a folder; one in use; a selector that is a function, which has no name to
            compare with that of another process.
        StateError: a folder that cannot be written.
    """
    if folder is None:
        yield None
        return
    path = as_path("resume_dir", folder)
    if not isinstance(recipe.selector, str):
        raise InputError("a run can be resumed only with a selector that is given by its name")
    if processes.count > 1:
        path /= f"{_PROCESS}-{processes.number}-of-{processes.count}"
    with locked(path):
        state.discard_unfinished(path)
        yield path


def files(folder: Path) -> list[Path]:
    """Returns the state files in an order in which they may be deleted.

    No file that is left then needs one that is gone.
    """
    names = (f"{POSITION}-*", f"{BLOCK}-*", SENSITIVITY, _COMMAND)
    return [p for name in names for p in sorted(folder.glob(f"{name}.state"), reverse=True)]


def announce(folder: str | Path, command: Mapping[str, str]) -> None:
    """Notes that a command is about to write its output, the last step before `clear`."""
    state.write(Path(folder) / f"{_COMMAND}.state", _COMMAND, command, {})


def announced(folder: str | Path, command: Mapping[str, str]) -> bool:
    """Returns whether the same command was announced."""
    path = Path(folder) / f"{_COMMAND}.state"
    return path.exists() and state.read(path, _COMMAND).content == command


def clear(folder: str | Path) -> None:
    """Deletes the state of a run, and its folder if nothing else is in it."""
    folder = as_path("resume_dir", folder)
    for of_process in folder.glob(f"{_PROCESS}-*-of-*"):
        clear(of_process)
    for path in (*files(folder), folder / LOCK):
        path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
