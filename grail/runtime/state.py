"""State on disk: a file of tensors that is whole and undamaged, or is refused by name.

A file is a safetensors file, and any program that reads those reads it:

    8 bytes    N, the length of the header, little-endian
    N bytes    the header, JSON; it starts with the SHA-256 of these 8 + N bytes, the hash itself
               taken as zeros, and holds the SHA-256 of every tensor's dtype, shape and bytes
    the rest   the tensors, one right after the other

safetensors alone loads a flipped bit or a zeroed tail without a word. Here nothing is parsed before
its hash is right, and no memory is taken for what a header claims before the file's size agrees.

A file gets its name only after it was flushed to the disk, read back and found right.
"""

import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader, BufferedWriter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grail.errors import InputError, StateError
from grail.runtime.folder import PARTIAL, flush

SCHEMA = 1  # of the header
ALGORITHM = 2  # raised when sums or positions of an older version can no longer be continued

_MARGIN = 1 << 20  # bytes that stay free on the disk
_MAX_HEADER = 1 << 28
_START = b'{"__metadata__": {"sha256": "'
_NO_HASH = "0" * 64
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class State:
    """What a file holds: JSON-ready `content`, and tensors by name."""

    content: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class _Header:
    """What is known of a file before its tensors are read; `end`: where those begin."""

    content: dict[str, Any]
    hashes: dict[str, str]
    entries: dict[str, tuple[torch.dtype, list[int]]]  # in the order of the file
    end: int


def write(
    path: str | Path, kind: str, content: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Writes a file that replaces another of its name only once it is on the disk and right.

    Args:
        path: in a folder that exists.
        kind: what the file is; `read` asks for it.
        content: JSON-ready.
        tensors: on any device, of any strides.

    Raises:
        InputError: a dtype that has no place in such a file.
        StateError: too little disk, or a file that could not be written; what was there stays.
    """
    path = Path(path)
    unknown = {t.dtype for t in tensors.values()} - _NAMES.keys()
    if unknown:
        raise InputError(f"{path} cannot hold {unknown.pop()}; there are {', '.join(_DTYPES)}")
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    try:
        require_space(path.parent, sum(t.nbytes for t in tensors.values()))
        with partial.open("xb") as file:
            _put(file, kind, content, tensors)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # else memory is read below, not the disk
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        _verify(partial, kind)
        partial.replace(path)
        flush(path.parent, contents=False)
    except OSError as error:
        raise StateError(f"{path} could not be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def read(path: str | Path, kind: str) -> State:
    """The content of a file that `write` wrote, on the CPU, every byte of it checked.

    Raises:
        StateError: no such file; a damaged one; one of another kind, schema or algorithm.
    """
    with _opened(Path(path)) as file:
        header = _header(file, kind)
        return State(header.content, dict(_tensors(file, header)))


def digest(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's dtype, shape and values; strides and device do not count."""
    seen = hashlib.sha256(f"{_NAMES.get(tensor.dtype, tensor.dtype)}{list(tensor.shape)}".encode())
    seen.update(_bytes(tensor.detach().cpu().contiguous()))
    return seen.hexdigest()


def require_space(folder: Path, size: int) -> None:
    """Raises StateError unless the disk of a folder has so many bytes free, and a few more."""
    free = shutil.disk_usage(folder).free
    if free < size + _MARGIN:
        raise StateError(
            f"{folder} needs {size / 2**20:,.0f} MiB and its disk has {free / 2**20:,.0f} MiB "
            "free; free some space or choose another disk"
        )


def _verify(path: Path, kind: str) -> None:
    with _opened(path) as file:
        for _ in _tensors(file, _header(file, kind)):
            pass


def _put(
    file: BufferedWriter, kind: str, content: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    hashes = dict.fromkeys(tensors, _NO_HASH)
    file.write(_encoded(kind, content, tensors, hashes))
    for name, tensor in tensors.items():
        here = tensor.detach().cpu().contiguous()
        file.write(_bytes(here))
        hashes[name] = digest(here)
    file.seek(0)
    file.write(_encoded(kind, content, tensors, hashes))  # as long as before


def _encoded(
    kind: str, content: Mapping[str, Any], tensors: Mapping[str, Tensor], hashes: Mapping[str, str]
) -> bytes:
    """The header and its length."""
    description = {
        "schema": SCHEMA,
        "algorithm": ALGORITHM,
        "kind": kind,
        "content": content,
        "hashes": hashes,
    }
    metadata = {"sha256": _NO_HASH, "state": json.dumps(description)}
    entries: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        place = [offset, offset + tensor.nbytes]
        offset = place[1]
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": place,
        }
    header = json.dumps({"__metadata__": metadata, **entries}).encode()
    header += b" " * (-len(header) % 8)  # safetensors aligns the data so
    return _signed(len(header).to_bytes(8, "little") + header)


def _signed(header: bytes) -> bytes:
    """A header and its length with their hash in its place."""
    start = 8 + len(_START)
    before, after = header[:start], header[start + len(_NO_HASH) :]
    found = hashlib.sha256(before + _NO_HASH.encode() + after).hexdigest()
    return before + found.encode() + after


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    """A file; whatever is wrong with it becomes a StateError that names it."""
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise StateError(f"{path}: there is no such file") from error
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error}") from error
    except _Fault as error:
        raise StateError(f"{path} {error}") from error


class _Fault(Exception):  # noqa: N818
    """What is wrong with a file, without its name."""


def _header(file: BufferedReader, kind: str) -> _Header:
    size = os.fstat(file.fileno()).st_size
    length = file.read(8)
    count = int.from_bytes(length, "little")
    if len(length) < 8 or count > min(size - 8, _MAX_HEADER):
        raise _Fault(f"is cut off or damaged: its {size} bytes do not hold its header")
    header = length + file.read(count)
    if not header[8:].startswith(_START) or _signed(header) != header:
        raise _Fault("is damaged, or no state file of grail: its header does not match its hash")
    try:
        entries = json.loads(header[8:])
        description = json.loads(entries.pop("__metadata__")["state"])
        for name, ours in {"schema": SCHEMA, "algorithm": ALGORITHM, "kind": kind}.items():
            if description[name] != ours:
                raise _Fault(f"is of {name} {description[name]!r}; {ours!r} can be read here")
        return _Header(
            description["content"],
            description["hashes"],
            _checked(entries, description["hashes"], size - 8 - count),
            8 + count,
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _Fault(f"has a header that makes no sense: {error!r}") from error


def _checked(
    entries: Mapping[str, Any], hashes: Mapping[str, str], size: int
) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Dtype and shape of each tensor; they fill `size` bytes without gaps, in order."""
    if entries.keys() != hashes.keys():
        raise _Fault("has hashes of other tensors than those that it holds")
    end = 0
    checked = {}
    for name, entry in entries.items():
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
        if not all(type(n) is int and n >= 0 for n in shape):
            raise _Fault(f"has a tensor {name!r} of shape {shape}")
        place = [end, end + math.prod(shape) * dtype.itemsize]
        if entry["data_offsets"] != place:
            raise _Fault(f"has its tensor {name!r} in the wrong place")
        checked[name], end = (dtype, shape), place[1]
    if end != size:
        raise _Fault(f"is cut off or too long: {size} bytes of tensors where {end} belong")
    return checked


def _tensors(file: BufferedReader, header: _Header) -> Iterator[tuple[str, Tensor]]:
    file.seek(header.end)
    for name, (dtype, shape) in header.entries.items():
        tensor = torch.empty(shape, dtype=dtype)
        file.readinto(_bytes(tensor))
        if digest(tensor) != header.hashes[name]:
            raise _Fault(f"is damaged: its tensor {name!r} does not match its hash")
        yield name, tensor


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
