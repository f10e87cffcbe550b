"""State on disk: a file of tensors that is whole and undamaged, or is refused by name.

A file is one of safetensors, and any program that reads those reads it. safetensors checks that the
header fits the file's size, but loads a flipped bit or a zeroed page of data. The metadata of the
header therefore hold one string, `state`: a SHA-256 and the text that it is of, JSON with the
content and the SHA-256 of every tensor's dtype, shape and bytes. The same state gives the same
bytes.

A file gets its name only after it was flushed to the disk, read back and found right.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from torch import Tensor

from grail.errors import InputError, StateError, one_line
from grail.runtime.folder import PARTIAL, flush, usual_modes

SCHEMA = 2  # of the metadata
ALGORITHM = 3  # raised when sums or positions of an older version cannot be continued

_MARGIN = 1 << 20  # bytes that stay free on the disk


@dataclass(frozen=True)
class State:
    """The content of a file: JSON-ready `content`, and tensors by name."""

    content: dict[str, Any]
    tensors: dict[str, Tensor]


def write(
    path: str | Path, kind: str, content: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Writes a file that replaces another of its name only once it is on the disk and right.

    Tensors that are contiguous and on the CPU are written from where they are; others are copied
    there first, all of them before the first is written.

    Args:
        path: in a folder that exists.
        kind: name of the kind of file; `read` asks for it.
        content: JSON-ready.
        tensors: on any device, of any strides; several may share memory.

    Raises:
        InputError: a dtype that safetensors does not store.
        StateError: too little disk, or a file that could not be written; an older one stays.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    unnamed = partial / path.name
    try:
        require_space(path.parent, sum(tensor.nbytes for tensor in tensors.values()))
        partial.mkdir()  # for the library's temporary file as well, should this process be killed
        _put(unnamed, kind, content, tensors)
        usual_modes(partial)
        flush(partial)
        _forget(unnamed)
        with _opened(unnamed) as file:
            for _ in _tensors(file, _description(file, kind)[1]):
                pass
        unnamed.replace(path)
        flush(path.parent, contents=False)
    except (OSError, SafetensorError) as error:
        raise StateError(f"{path} could not be written: {one_line(error)}") from error
    finally:
        _remove(partial)


def read(path: str | Path, kind: str) -> State:
    """Reads a file that `write` wrote, to the CPU, and checks every byte of it.

    Raises:
        StateError: no such file; a damaged one; one of another kind, schema or algorithm.
    """
    with _opened(Path(path)) as file:
        content, hashes = _description(file, kind)
        # Copies start at an address for which kernels round as they did: see `files.alignment`.
        return State(content, {name: found.clone() for name, found in _tensors(file, hashes)})


def discard_unfinished(folder: Path) -> None:
    """Removes the unfinished files in a folder, of processes that were killed in `write`."""
    for partial in folder.glob(f".*.state.*{PARTIAL}"):
        _remove(partial)


def digest(tensor: Tensor) -> str:
    """Returns the SHA-256 of a tensor's dtype, shape and values; not of strides and device."""
    here = _here(tensor)
    found = hashlib.sha256(f"{here.dtype}{list(here.shape)}".encode())
    found.update(here.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _here(tensor: Tensor) -> Tensor:
    """Returns the values as they are written: contiguous, on the CPU."""
    return tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()


def require_space(folder: Path, size: int) -> None:
    """Raises StateError unless the disk of a folder has so many bytes free, and a few more."""
    free = shutil.disk_usage(folder).free
    if free < size + _MARGIN:
        raise StateError(
            f"{folder} needs {size / 2**20:,.0f} MiB and its disk has {free / 2**20:,.0f} MiB "
            "free; free some space or choose another disk"
        )


def _put(path: Path, kind: str, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    here = {name: _here(tensor) for name, tensor in tensors.items()}
    specs = {name: _spec(path, tensor) for name, tensor in here.items()}
    description = {
        "schema": SCHEMA,
        "algorithm": ALGORITHM,
        "kind": kind,
        "content": content,
        "hashes": {name: digest(tensor) for name, tensor in here.items()},
    }
    serialize_file(specs, path, metadata=signed(json.dumps(description)))


def _spec(path: Path, tensor: Tensor) -> TensorSpec:
    """Describes a contiguous tensor on the CPU, which must outlive the description."""
    name = str(tensor.dtype).removeprefix("torch.")
    try:
        return TensorSpec(
            dtype=name, shape=list(tensor.shape), data_ptr=tensor.data_ptr(), data_len=tensor.nbytes
        )
    except (SafetensorError, ValueError) as error:
        raise InputError(
            f"{path.name} cannot hold {tensor.dtype}; give a dtype that safetensors stores"
        ) from error


def signed(description: str) -> dict[str, str]:
    """Returns the metadata of a file with that description."""
    return {"state": f"{hashlib.sha256(description.encode()).hexdigest()} {description}"}


def _forget(path: Path) -> None:
    """Drops a file from the page cache, so that it is read back from the disk."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _remove(partial: Path) -> None:
    """Removes a folder that `write` made, or a file of that name."""
    if partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
    else:
        partial.unlink(missing_ok=True)


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    """Opens a file; any fault of it becomes a StateError with its name."""
    try:
        path.open("rb").close()  # its errors name a folder, or a file that may not be read
        # pread: a disk that fails raises an error; in mapped memory it would end the process
        with safe_open(path, "pt", backend="pread") as file:
            yield file
    except FileNotFoundError as error:
        raise StateError(f"{path}: there is no such file") from error
    except OSError as error:
        raise StateError(f"{path} cannot be read: {one_line(error)}") from error
    except SafetensorError as error:
        raise StateError(f"{path} is damaged or cut off: {one_line(error)}") from error
    except _Fault as error:
        raise StateError(f"{path} {error}") from error


class _Fault(Exception):  # noqa: N818
    """A fault of a file, without the file's name."""


def _description(file: safe_open, kind: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns content and hashes from a file's metadata, if they are whole and of that kind."""
    metadata = file.metadata() or {}
    if metadata.keys() == {"state", "sha256"}:
        raise _Fault(f"is of schema 1; {SCHEMA} can be read here")
    _, _, text = metadata.get("state", "").partition(" ")
    if metadata != signed(text):
        raise _Fault("is damaged, or no state file of grail: its metadata do not match their hash")
    try:
        description = json.loads(text)
        for name, ours in {"schema": SCHEMA, "algorithm": ALGORITHM, "kind": kind}.items():
            if description[name] != ours:
                raise _Fault(f"is of {name} {description[name]!r}; {ours!r} can be read here")
        content, hashes = description["content"], description["hashes"]
        if hashes.keys() != set(file.keys()):
            raise _Fault("is damaged: its hashes are of other tensors than are in it")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _Fault(f"has a header that makes no sense: {error!r}") from error
    return content, hashes


def _tensors(file: safe_open, hashes: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Reads tensor by tensor, and checks each."""
    for name, expected in hashes.items():
        try:
            tensor = file.get_tensor(name)
        except (RuntimeError, TypeError, ValueError) as error:  # of a dtype that torch lacks
            raise _Fault(f"has a tensor {name!r} that makes no sense: {one_line(error)}") from error
        if digest(tensor) != expected:
            raise _Fault(f"is damaged: its tensor {name!r} does not match its hash")
        yield name, tensor
