"""The part of `grail export` that writes and compares ONNX files."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grail.commands.options import Given
from grail.report.formatting import format_bytes
from grail.runtime.settings import setting
from grail.serving.onnx_check import Comparison
from grail.serving.onnx_network import Factory, random_batch, read_factory, read_shape
from grail.serving.onnx_writing import OnnxFile, check_onnx, export_onnx

SUFFIX = ".onnx"  # of a file that --check compares as ONNX


@dataclass(frozen=True)
class OnnxOptions:
    """The options of `grail export` for ONNX."""

    onnx: Path | None = setting(
        None,
        "ONNX file to create from a vision network, for batches of any size: ONNX Runtime and "
        "OpenVINO load it.",
        metavar="FILE",
    )
    network: str | None = setting(
        None,
        "The function that makes the dense network, for a FOLDER of grail.save, which stores no "
        "code: torchvision.models:resnet18, or 'timm:create_model(\"resnet18\", num_classes=10)'. "
        "Modules of the current folder are found, too; the function is run.",
        metavar="MODULE:FUNCTION",
    )
    input_shape: str | None = setting(
        None,
        "Shape of one image, such as 3,224,224.",
        flag="--input",
        shown="what a network of transformers or timm names",
        metavar="SHAPE",
    )


def write(given: Given, folder: Path, verify: bool) -> tuple[dict[str, Any], list[str]]:
    """Writes the file; returns facts for JSON, and lines for people."""
    asked = given.make(OnnxOptions)
    assert asked.onnx is not None
    shape = None if asked.input_shape is None else read_shape(asked.input_shape)
    factory = _factory(asked)
    file = export_onnx(
        folder,
        asked.onnx,
        None if shape is None else random_batch(shape),
        factory=factory,
        verify=verify,
    )
    facts = asdict(file) | {"path": str(file.path), "comparisons": _numbers(file.comparisons)}
    lines = [
        f"onnx    {asked.onnx} ({format_bytes(file.bytes)}, float32, opset {file.opset})",
        f"form    {_form(file)}",
        *_lines(file.comparisons),
    ]
    return facts, lines


def compare(given: Given, folder: Path, path: Path) -> tuple[dict[str, Any], list[str]]:
    """Compares a file; returns facts for JSON, and lines for people."""
    factory = _factory(given.make(OnnxOptions))
    found = check_onnx(folder, path, factory=factory)
    return {"check": str(path), "comparisons": _numbers(found)}, _lines(found)


def _factory(asked: OnnxOptions) -> Factory | None:
    return None if asked.network is None else read_factory(asked.network)


def _form(file: OnnxFile) -> str:
    """Returns inputs and outputs in words."""
    given, made = (
        ", ".join(f"{name} [{', '.join(map(str, shape))}]" for name, shape in shapes.items())
        for shapes in (file.inputs, file.outputs)
    )
    return f"{given} to {made}"


def _numbers(comparisons: tuple[Comparison, ...]) -> list[dict[str, Any]]:
    return [asdict(found) | {"share": found.share} for found in comparisons]


def _lines(comparisons: tuple[Comparison, ...]) -> list[str]:
    lines = [f"check   {found}" for found in comparisons]
    return lines or [
        "check   not verified: no runtime was run; pip install onnxruntime, then grail export "
        f"FOLDER --check FILE{SUFFIX}"
    ]
