"""A lock on a folder, which one process has at a time."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grail.errors import InputError, StateError

LOCK = "lock"  # the name of the file


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Creates a folder if need be, and locks it; the system unlocks it when the process ends.

    Raises:
        InputError: not a folder; one that another process has locked.
        StateError: a folder that cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder for the state of the run")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise StateError(f"{folder} cannot be used: {error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{folder} is in use by another run") from error
        yield
