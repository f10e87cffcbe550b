"""Files that the pages name, small: `MODEL`, `text.txt`, `dense.gguf`, `out/`, `net/` and others.

Each is made once in a test run, when a block first names it, and copied into that block's folder.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grail
from tests.commands.test_cli import grail as command
from tests.commands.test_cli import words
from tests.commands.test_export import write_whole
from tests.convnets import images, network

# A model under the names that pages use; those of the hub are folders in folders.
MODELS = ("MODEL", "HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct")
_WORDS = 2000  # of a text; 5700 tokens, five sequences of the usual length
_NETWORKS = """
from tests.convnets import network

def make():
    return network("torchvision-basic")
"""


class _File(NamedTuple):
    """How a file is made, in the current folder, and the files that must lie beside it."""

    make: Callable[["Prepared", str], Any]
    beside: tuple[str, ...] = ()


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Makes a folder the current one for a while."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


class Prepared:
    """The files, made in `folder` as far as they were asked for.

    Args:
        folder: keeps them.
        tiny_model: the fixture of that name, which makes random models.
    """

    def __init__(self, folder: Path, tiny_model: Callable[..., Any]):
        self._folder, self.tiny_model = folder, tiny_model

    def place(self, names: Iterable[str], folder: Path) -> None:
        """Copies those of `names` that are known into a folder, with what they need beside them."""
        for name in sorted(names):
            source, target = self._folder / name, folder / name
            file = _known(name)
            if file is None or target.exists():
                continue
            self.make(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target)
            else:
                shutil.copy(source, target)
            self.place(file.beside, folder)

    def make(self, name: str) -> None:
        """Makes a file of a known name, once."""
        file = _known(name)
        if file is None or (self._folder / name).exists():
            return
        for needed in file.beside:
            self.make(needed)
        with inside(self._folder):
            file.make(self, name)


def _known(name: str) -> _File | None:
    if name in _FILES or "/" in name:
        return _FILES.get(name)
    return {".txt": _File(_text), ".jsonl": _File(_documents)}.get(Path(name).suffix)


def _run(line: str) -> None:
    done = command(*line.split()[1:])
    assert done.exit_code == 0, done.output


def _text(files: Prepared, name: str) -> None:
    Path(name).write_text(words(_WORDS, sum(map(ord, name))), encoding="utf-8")


def _documents(files: Prepared, name: str) -> None:
    said = words(_WORDS, sum(map(ord, name)))
    Path(name).write_text(json.dumps({"text": said, "body": said}) + "\n", encoding="utf-8")


def _llama(files: Prepared, channels: int) -> Any:
    """A Llama of two blocks, whose sizes 32 divides, as GGUF's formats need it."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64}
    sizes = {"intermediate_size": channels, "max_position_embeddings": 2048}
    return files.tiny_model("llama", tie_word_embeddings=True, **heads, **sizes)


def _gguf(files: Prepared, name: str) -> None:
    """1024 channels, whose widths are multiples of 32 by default; a tokenizer of characters."""
    write_whole(_llama(files, 1024), Path(name))


def _dense(files: Prepared, name: str) -> None:
    for part in grail.load_model("dense.gguf"):
        part.save_pretrained(name)


def _model(files: Prepared, name: str) -> None:
    """A folder of fewer channels, with the tokenizer of `dense.gguf`."""
    files.make("dense.gguf")
    _llama(files, 256).save_pretrained(name)
    grail.load_model("dense.gguf")[1].save_pretrained(name)


def _compressed(files: Prepared, name: str) -> None:
    _run(f"grail compress dense.gguf --keep 0.5 --calibration text.txt --output {name}")


def _statistics(files: Prepared, name: str) -> None:
    _run(f"grail stats collect MODEL --calibration text.txt --output {name}")


def _network(files: Prepared, name: str) -> None:
    net = network("torchvision-basic")
    grail.compress(net, images(size=32), 0.5, multiple=1, progress=False)
    grail.save(net, name)


def _vit(files: Prepared, name: str) -> None:
    model = files.tiny_model("vit")
    grail.compress(model, images(size=16), 0.5, multiple=1, progress=False)
    model.save_pretrained(name)


_FILES = {
    **dict.fromkeys(MODELS, _File(_model)),
    "dense": _File(_dense, ("dense.gguf",)),
    **dict.fromkeys("abc", _File(_statistics, ("MODEL", "text.txt"))),
    "dense.gguf": _File(_gguf),
    "out": _File(_compressed, ("dense.gguf", "text.txt")),
    "small.gguf": _File(lambda _, name: _run(f"grail export out --gguf {name}"), ("out",)),
    "small-q8_0.gguf": _File(lambda _, name: shutil.copy("small.gguf", name), ("small.gguf",)),
    "my_networks.py": _File(lambda _, name: Path(name).write_text(_NETWORKS, encoding="utf-8")),
    "net": _File(_network, ("my_networks.py",)),
    "net.onnx": _File(
        lambda _, name: _run(
            f"grail export net --onnx {name} --network my_networks:make --input 3,32,32"
        ),
        ("net",),
    ),
    "vit": _File(_vit),
}
