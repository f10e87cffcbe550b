"""Files whose speed is measured: kind, runtime, size on the disk, and whether memory holds them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from grail.errors import InputError, ModelError, OutOfMemoryError
from grail.files.provenance import weight_files
from grail.report.formatting import format_bytes
from grail.runtime.memory import available

# By kind of a file: the runtime, the module that is imported, and how it is installed.
_RUNTIMES = {
    "transformers": ("transformers", "transformers", "pip install 'grail-kernels[llm]'"),
    "gguf": ("llama.cpp", "llama_cpp", "pip install llama-cpp-python"),
    "onnx": ("ONNX Runtime", "onnxruntime", "pip install onnxruntime"),
}
_PROCESS = 400 << 20  # bytes of a worker without its model: Python, torch, buffers
_SHARE = 1.25  # of the file's size that a model takes: repacked weights, keys and values
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class Measured:
    """A file, folder or hub name, and the runtime that it is measured in."""

    name: str  # as the user gave it
    kind: str  # transformers, gguf or onnx

    @property
    def runtime(self) -> str:
        """The name of the runtime."""
        return _RUNTIMES[self.kind][0]

    @property
    def label(self) -> str:
        """The name without the folders before it."""
        return Path(self.name).absolute().name

    @property
    def where(self) -> str:
        """The name as another process finds it, from whichever folder."""
        return str(Path(self.name).absolute()) if Path(self.name).exists() else self.name

    @property
    def bytes(self) -> int:
        """Bytes of the weights on the disk; 0 if they are not on this machine yet."""
        path = Path(self.name)
        files = weight_files(self.name) if self.kind == "transformers" else [path]
        if shard := _SHARD.search(path.name):
            files = list(path.parent.glob(f"{path.name[: shard.start()]}-*-of-{shard[2]}.gguf"))
        if self.kind == "onnx":  # weights beyond 2 GB stand beside it
            files += path.parent.glob(f"{path.name}.data")
        return sum(file.stat().st_size for file in files)


def recognise(name: str) -> Measured:
    """Returns a file with its kind.

    Raises:
        InputError: it is missing, or of no known kind.
        ModelError: its runtime is not installed.
    """
    found = Measured(name, _kind(name))
    runtime, module, install = _RUNTIMES[found.kind]
    if find_spec(module) is None:
        raise ModelError(
            f"measuring {name} needs {runtime}, which is not installed: {install}",
            page="docs/serving/speed.md",
        )
    return found


def _kind(name: str) -> str:
    path = Path(name)
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) == b"GGUF":  # files of Ollama have no suffix
                return "gguf"
        if path.suffix == ".gguf":
            raise InputError(f"{name} is not a GGUF file: it does not begin with GGUF")
        if path.suffix == ".onnx":
            return "onnx"
        raise InputError(
            f"{name} is of no kind whose speed is measured; give a transformers folder, a GGUF "
            "file or an ONNX file"
        )
    if path.is_dir():
        if (path / "config.json").is_file():
            return "transformers"
        raise InputError(
            f"{name} is not a model: the folder has no config.json; give a folder that grail "
            "compress or save_pretrained wrote"
        )
    if _may_be_on_hub(path) or weight_files(name):
        return "transformers"
    raise InputError(
        f"{name}: no such file or folder; models of the hub are named like owner/model"
    )


def _may_be_on_hub(path: Path) -> bool:
    """Returns whether a path is a name with one slash whose first part is no folder here.

    The hub client takes a minute or more to give up on a mistyped path.
    """
    ours = path.suffix in (".gguf", ".onnx") or path.parent.is_dir()
    return not ours and len(path.parts) == 2 and not path.is_absolute()


def require_one_kind(files: Sequence[Measured]) -> None:
    """Raises InputError if vision networks stand beside language models."""
    vision = [file.name for file in files if file.kind == "onnx"]
    if vision and len(vision) < len(files):
        other = next(file.name for file in files if file.kind != "onnx")
        raise InputError(
            f"{vision[0]} is measured as a vision network, and {other} is a language model; "
            "measure them apart"
        )


def require_memory(files: Sequence[Measured], one_by_one: bool) -> None:
    """Raises OutOfMemoryError if the models need more memory than is free.

    Args:
        files: to measure.
        one_by_one: one is loaded at a time, so that the largest decides.
    """
    needed = [_SHARE * file.bytes + _PROCESS for file in files]
    total, free = (max if one_by_one else sum)(needed), available()
    if free is None or total <= free:
        return
    room = f"about {format_bytes(total)} of memory, and {format_bytes(free)} are free"
    if one_by_one:
        raise OutOfMemoryError(f"the largest of the models needs {room}; give a smaller one")
    raise OutOfMemoryError(
        f"{len(files)} models together need {room}; give fewer files, or hold one at a time by "
        "--one-by-one (one_by_one=True)"
    )
