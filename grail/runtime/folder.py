"""An output folder or file that is complete, or is not there at all.

Files are written into a hidden sibling folder ending in `.partial`. It, or the one file in it, gets
the output's name once everything is on the disk. If anything interrupts this, the output does not
exist.
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from grail.arguments import as_path
from grail.errors import ExportError, GrailError, InputError, one_line

PARTIAL = ".partial"  # ends the name of unfinished files and folders
_MARGIN = 32 << 20  # bytes for tokenizer, configuration and report
_PAGE = 1 << 16  # bytes; a write that fails with less left failed for want of room


@contextmanager
def complete(output: str | Path, failure: type[GrailError], *, size: int = 0) -> Iterator[Path]:
    """Yields a folder to write into, which becomes `output` at the end of the `with`.

    Args:
        output, size: see `check_output`.
        failure: raised for errors of the disk; other errors pass unchanged.

    Raises:
        InputError, ExportError: see `check_output`; nothing was written.
    """
    final = check_output(output, size)
    with _unfinished(final, failure) as partial:
        yield partial
        _finish(partial, partial, final)


@contextmanager
def complete_file(output: Path, failure: type[GrailError], *, size: int) -> Iterator[Path]:
    """Yields a path to write to, which becomes the file `output` at the end of the `with`.

    Args:
        output: see `require_new_file`.
        failure: see `complete`.
        size: bytes that will be written.

    Raises:
        InputError: `output` exists, or was made meanwhile by another process.
        ExportError: the disk has less space than `size` and a margin of 32 MiB.
    """
    final = output.absolute()
    with _unfinished(final, failure) as partial:
        _require_space(str(final), final.parent, size)
        yield partial / final.name
        require_new_file(final)
        _finish(partial, partial / final.name, final)


@contextmanager
def _unfinished(final: Path, failure: type[GrailError]) -> Iterator[Path]:
    """Yields a new hidden folder beside an output; what is left of it at the end is removed."""
    partial = _partial(final)
    try:
        partial.mkdir(parents=True)
        yield partial
    except OSError as error:
        reason = f"{error}; the disk is full" if _is_full(final.parent) else str(error)
        raise failure(f"{final} could not be written: {reason}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already after the rename


def _finish(partial: Path, written: Path, final: Path) -> None:
    """Gives what was written its name, once all of it is on the disk."""
    usual_modes(partial)
    flush(partial)
    if written.is_dir():
        written.rename(final)
    else:
        _name_file(written, final)
    flush(final.parent, contents=False)


def _name_file(written: Path, final: Path) -> None:
    """Gives a file its name, of which there is none; renaming would replace one."""
    try:
        os.link(written, final)
    except FileExistsError as error:
        raise InputError(f"{final} exists already; name a new file") from error
    except OSError:  # a disk without hard links
        require_new_file(final)
        written.rename(final)


def require_new_file(output: Path) -> None:
    """Raises InputError unless a file of that name can be made; call it before any work."""
    if os.path.lexists(output):
        raise InputError(f"{output} exists already; name a new file")
    if not output.parent.is_dir():
        raise InputError(f"{output.parent} is no folder; make it first, or name another file")
    try:
        probe = _partial(output.absolute())
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise InputError(
            f"{output} cannot be written: {one_line(error)}; name a file elsewhere"
        ) from error


def usual_modes(folder: Path) -> None:
    """Gives every file below the mode of a new file: some libraries make theirs private."""
    probe = folder / f".{uuid.uuid4().hex}"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def check_output(output: str | Path, size: int = 0, apart: Path | None = None) -> Path:
    """Checks that an output folder can be written; call it before any work.

    Args:
        output: the folder to be created.
        size: bytes of the weights that will be written there.
        apart: a folder that is written during the run, which must not lie inside nor around it.

    Returns:
        The absolute path of the folder.

    Raises:
        InputError: `output` is a file, a folder that is not empty, or one that cannot be made.
        ExportError: the disk has less space than `size` and a margin of 32 MiB.
    """
    try:
        return _check_output(as_path("output", output), size, apart)
    except (OSError, RuntimeError) as error:  # of links that lead to themselves
        if isinstance(error, GrailError):
            raise
        raise InputError(
            f"the output {output} cannot be written: {one_line(error)}; name a folder elsewhere"
        ) from error


def _check_output(output: Path, size: int, apart: Path | None) -> Path:
    final = output.resolve()  # renaming onto a link would fail at the very end
    if apart is not None and _overlap(final, apart.resolve()):
        raise InputError(
            f"the output {output} and the folder {apart} of the run's state lie inside one "
            "another; name two separate ones"
        )
    if final.is_mount():
        raise InputError(f"the output {output} is a mount point; name a folder inside it")
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        kind = "is not empty" if final.is_dir() else "is a file"
        raise InputError(f"the output {output} {kind}; name a new or an empty folder")
    existing = next(folder for folder in (final, *final.parents) if folder.exists())
    if not existing.is_dir():
        raise InputError(
            f"the output {output} lies under {existing}, which is a file; name a folder elsewhere"
        )
    _try_to_write(final, existing)
    if size:
        _require_space(f"the output {output}", existing, size)
    return final


def _require_space(what: str, folder: Path, size: int) -> None:
    """Raises ExportError unless the disk of a folder has room for so many bytes and a margin."""
    needed, free = size + _MARGIN, shutil.disk_usage(folder).free
    if free < needed:
        raise ExportError(
            f"{what} needs {needed / 2**20:,.0f} MiB and the disk has {free / 2**20:,.0f} MiB "
            "free; free some space or choose another disk"
        )


def _is_full(folder: Path) -> bool:
    """Returns whether a disk is full, which not every library that writes there says."""
    with suppress(OSError):
        return shutil.disk_usage(folder).free < _PAGE
    return False


def _overlap(one: Path, other: Path) -> bool:
    return one.is_relative_to(other) or other.is_relative_to(one)


def _partial(final: Path) -> Path:
    return final.parent / f".{final.name}.{uuid.uuid4().hex[:8]}{PARTIAL}"


def _try_to_write(final: Path, existing: Path) -> None:
    """Makes and removes a folder with the longest name, in the first folder that exists."""
    parent = final.parent if existing == final else existing
    longest = max((final, *final.parents), key=lambda path: len(os.fsencode(path.name))).name
    probe = _partial(parent / longest)
    probe.mkdir()
    probe.rmdir()


def flush(folder: Path, contents: bool = True) -> None:
    """Flushes a folder and its contents to the disk, so that no rename can outrun the data."""
    for path in (*(folder.rglob("*") if contents else ()), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def file_hash(path: Path) -> str:
    """Returns the SHA-256 of a file, as `sha256sum` prints it."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()
