"""Lets transformers read a GGUF file once for a load, however often it asks.

transformers 5 opens and parses the file for the tokenizer, the configuration and the weights, and
for the names of the weights it builds the same table of names for every module of the network. For
SmolLM2, of 135 million parameters, that was 9 of 13 seconds of one core.
"""

import copy
import functools
import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np

# One load at a time replaces what transformers calls, and puts it back.
_loading = threading.RLock()


@contextmanager
def read_once() -> Iterator[None]:
    """A context in which a GGUF file that does not change is opened once.

    It replaces three functions by ones that remember. A version of transformers or gguf that has
    another function, or calls it in another way, reads the file as often as it likes.
    """
    replacements = (
        ("gguf", "GGUFReader", _one_reader),
        ("gguf", "get_tensor_name_map", functools.cache),
        ("transformers.modeling_gguf_pytorch_utils", "load_gguf_checkpoint", _one_parsing),
    )
    with _loading, ExitStack() as stack:
        for module_name, name, remembering in replacements:
            try:
                module = importlib.import_module(module_name)
                original = getattr(module, name)
            except (ImportError, AttributeError):
                continue
            stack.callback(setattr, module, name, original)
            setattr(module, name, remembering(original))
        yield


def _one_reader(reader: Any) -> Callable[..., Any]:
    """Returns a constructor of readers that gives the same one for the same file."""
    if not isinstance(reader, type):  # a caller's `read_once` is at work
        return cast("Callable[..., Any]", reader)

    class Reader(reader):
        """A reader that cuts up a plain array: slices of a memmap take four times as long."""

        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = np.asarray(mapped)

    opened: dict[tuple[Any, ...], Any] = {}

    def construct(path: Any, *arguments: Any, **options: Any) -> Any:
        if arguments or options:  # a mode of writing, for instance
            return reader(path, *arguments, **options)
        key = _version(path)
        if key not in opened:
            opened[key] = Reader(path)
        return opened[key]

    return construct


def _one_parsing(load: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Returns `load_gguf_checkpoint` that parses what is no tensor once for the same file."""
    parsed: dict[tuple[Any, ...], dict[str, Any]] = {}

    @functools.wraps(load)
    def load_once(path: Any, return_tensors: bool = False, **options: Any) -> dict[str, Any]:
        if return_tensors or options:
            return load(path, return_tensors=return_tensors, **options)
        key = _version(path)
        if key not in parsed:
            parsed[key] = load(path)
        return copy.deepcopy(parsed[key])  # callers change theirs

    return load_once


def _version(path: Any) -> tuple[Any, ...]:
    """Returns what tells a file from another, and from itself before a change."""
    found = Path(path).stat()
    return Path(path).absolute(), found.st_size, found.st_mtime_ns
