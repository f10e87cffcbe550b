"""`grail export`."""

import json
from dataclasses import dataclass
from pathlib import Path

import typer

from grail.commands import export_gguf, export_onnx
from grail.commands.console import notes_said
from grail.commands.export_gguf import GgufOptions
from grail.commands.export_onnx import SUFFIX, OnnxOptions
from grail.commands.options import READING, Given, Printed, command, fields
from grail.commands.root import commands
from grail.errors import InputError
from grail.files.pretrained import Pretrained
from grail.runtime.settings import setting

# By option, those that make use of it.
_USED_BY = {
    **dict.fromkeys((field.name for field, _ in READING), ("calibration",)),
    "calibration": ("imatrix", "quantize"),
    "evaluate": ("quantize",),
    "device": ("imatrix",),
    "quantize": ("gguf",),
    "like": ("gguf",),
    "dtype": ("gguf",),
    "pad": ("gguf", "imatrix"),
    "network": ("onnx", "check"),
    "input_shape": ("onnx",),
    "verify": ("gguf", "onnx"),
}


@dataclass(frozen=True)
class ExportOptions:
    """The options of `grail export` for every runtime."""

    folder: Path = setting(
        ..., "A folder that grail compress, grail.export or grail.save wrote.", flag="FOLDER"
    )
    verify: bool = setting(
        True,
        "Compare the file's outputs with those of FOLDER before it gets its name, if its runtime "
        "is installed. A language model is held twice in memory, once in float32.",
    )
    check: Path | None = setting(
        None,
        "Write nothing, and compare this GGUF or ONNX file in its runtime with FOLDER; or FOLDER "
        "itself, given once more, in vLLM. Needs llama-cpp-python, onnxruntime or openvino, or "
        "vLLM.",
        metavar="PATH",
    )


app = commands()


@command(
    app, ExportOptions, GgufOptions, OnnxOptions, READING, fields(Pretrained, "device"), Printed
)
def export(given: Given) -> None:
    """Writes a compressed model as a GGUF or ONNX file that stock runtimes load.

    Examples: `grail export out/ --gguf small.gguf --like dense.gguf`,
    `grail export net/ --onnx net.onnx --network torchvision.models:resnet18 --input 3,224,224`

    The file is read again and compared before it gets its name, in its runtime as well if that is
    installed: llama.cpp (llama-cpp-python), ONNX Runtime, OpenVINO. `--imatrix FILE` writes what
    `llama-quantize --imatrix` reads.
    """
    asked = given.make(ExportOptions)
    of_gguf, of_onnx = given.options("gguf", "imatrix"), given.options("onnx")
    if sum(map(bool, (of_gguf, of_onnx, asked.check))) != 1:
        raise InputError(
            "give --gguf FILE, --imatrix FILE or --onnx FILE to write one, or --check FILE to "
            "compare one"
        )
    given.require_used(_USED_BY)
    is_onnx = asked.check is not None and asked.check.suffix == SUFFIX
    if asked.check is not None and not is_onnx and (idle := given.options("network")):
        raise InputError(f"{idle[0]} is used with ONNX files: leave it out")
    with notes_said():
        if asked.check is None:
            write = export_onnx.write if of_onnx else export_gguf.write
            facts, lines = write(given, asked.folder, asked.verify)
        elif is_onnx:
            facts, lines = export_onnx.compare(given, asked.folder, asked.check)
        else:
            facts, lines = export_gguf.compare(asked.folder, asked.check)
    typer.echo(json.dumps(facts, indent=2) if given.prints_json else "\n".join(lines))
