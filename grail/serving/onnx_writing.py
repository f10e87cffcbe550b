"""Writes a vision network as an ONNX file that ONNX Runtime and OpenVINO load."""

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grail.arguments import as_path, require_switches
from grail.calibrate.batches import Batch
from grail.errors import ExportError, InputError, ModelError, one_line
from grail.runtime.folder import complete_file, require_new_file
from grail.serving.onnx_check import Comparison, compare, computed
from grail.serving.onnx_network import (
    Factory,
    example_of,
    load_network,
    random_batch,
    refuse_language_model,
)
from grail.serving.onnx_tracing import AXIS, call_of, silent, traced
from grail_kernels import check_kind

_PAGE = "docs/serving/onnx.md#what-is-refused"  # of errors

OPSET = 20  # of ONNX 1.15
# Batches that are compared; the network is traced with the last of them.
_SIZES = (1, 2, 5)
_MOST = (2 << 30) - (16 << 20)  # bytes of weights: a file of protobuf has at most 2 GiB
_NEEDED = ("onnx", "onnxscript")


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file that was written."""

    path: Path
    inputs: dict[str, tuple[int | str, ...]]  # by name its shape; "batch" is any number
    outputs: dict[str, tuple[int | str, ...]]
    opset: int
    bytes: int
    comparisons: tuple[Comparison, ...]  # one a runtime; empty if none was asked or is installed


def export_onnx(
    model: nn.Module | str | Path,
    output: str | Path,
    example: Batch | None = None,
    *,
    factory: Factory | None = None,
    verify: bool = True,
) -> OnnxFile:
    """Writes a network as an ONNX file for batches of any size.

    The network is traced by `torch.export` and written by `torch.onnx`. The file gets its name only
    once ONNX's checker accepts it and, in each runtime that is installed (ONNX Runtime, OpenVINO),
    its outputs for batches of 1, 2 and 5 differ from the network's by at most 1e-4 of the largest
    value.

    Args:
        model: a network in fp32; or a folder, of `grail.save`, or of `save_pretrained` with a stock
            class of transformers. Not a causal language model.
        output: file to create.
        example: a batch as `grail.compress` takes it, with samples along the first axis; all other
            sizes are those of the file. None: random images of the size that a network of
            transformers or timm names.
        factory: makes the dense network, for a folder of `grail.save`.
        verify: compare outputs in the runtimes that are installed, in processes of their own.

    Returns:
        Path and contents of the file, and the comparisons.

    Raises:
        InputError: `output` exists, the folder, the factory or the example does not fit, or the
            network names no size of images.
        ModelError: a causal language model, a network that torch cannot trace for batches of any
            size or that has no ONNX form, a package that is missing.
        ExportError: the file could not be written, or a runtime does not load it or computes other
            outputs.
    """
    output = as_path("output", output)
    require_switches(verify=verify)
    check_factory(factory)
    require_new_file(output)
    network = as_network(model, factory)
    batch = example_of(network) if example is None else example
    calls = [call_of(network, batch, samples) for samples in _SIZES]
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    if size > _MOST:
        raise ModelError(
            f"an ONNX file holds at most {_MOST / 2**30:.1f} GiB of weights, and "
            f"{type(network).__name__} has {size / 2**30:.1f} GiB",
            page=_PAGE,
        )
    require_packages()
    outputs = [computed(network, call) for call in calls][-1]
    program = traced(network, calls[-1])
    with complete_file(output, ExportError, size=size) as partial:
        _write(program, list(calls[-1].inputs), list(outputs), partial)
        inputs, given = _checked(partial)
        comparisons = compare(network, partial, calls) if verify else ()
        for comparison in comparisons:
            comparison.require_close(output)
    return OnnxFile(output.resolve(), inputs, given, OPSET, output.stat().st_size, comparisons)


def as_network(model: object, factory: Factory | None) -> nn.Module:
    """Returns a network that was given, or the one of a folder.

    Raises:
        InputError, ModelError, ExportError: see `export_onnx`.
    """
    if not isinstance(model, nn.Module):
        check_kind("model", model, (str, Path), "a torch.nn.Module, or a folder")
        return load_network(as_path("model", model), factory)
    if factory is not None:
        raise InputError("factory is for a folder of grail.save; model is a network: leave it out")
    refuse_language_model(type(model).__name__, "model")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ModelError(
                f"an ONNX file is written in float32, and {name} is {tensor.dtype}; give "
                "copy.deepcopy(model).float()",
                page=_PAGE,
            )
    return model


def check_factory(factory: object) -> None:
    """Raises InputError for a factory that is no function."""
    if factory is not None and not callable(factory):
        raise InputError(
            f"factory must be a function that makes the dense network; got {type(factory).__name__}"
        )


def require_packages() -> None:
    """Raises ModelError unless the packages are installed that write ONNX."""
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ModelError(
            f"writing ONNX needs {' and '.join(missing)}: pip install 'grail-kernels[onnx]'",
            page="docs/index.md#install",
        )


def _write(
    program: torch.export.ExportedProgram, inputs: list[str], outputs: list[str], path: Path
) -> None:
    """Converts a traced network, and writes it without what torch notes on each operation.

    The notes hold paths of source files on this machine.
    """
    import onnx

    try:
        with silent():
            found: Any = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=OPSET,
                input_names=inputs,
                output_names=outputs,
                verbose=False,
                external_data=False,
            )
            proto = found.model_proto
    except Exception as error:  # the exporter raises errors of many classes
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ModelError(
            f"torch has no ONNX form of this network: {one_line(cause)}",
            page=_PAGE,
        ) from error
    _strip(proto)
    _name_axis(proto.graph)
    onnx.save_model(proto, path)


def _strip(proto: Any) -> None:
    """Removes the notes of torch from a model, its functions and graph."""
    graph = proto.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
    for function in proto.functions:
        for node in function.node:
            del node.metadata_props[:]
        del function.metadata_props[:]
    del graph.metadata_props[:]


def _name_axis(graph: Any) -> None:
    """Gives the axis of samples its name, which is a symbol of the trace, wherever it stands."""
    axes = [given.type.tensor_type.shape.dim[:1] for given in graph.input]
    symbols = {axis.dim_param for first in axes for axis in first if axis.dim_param}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            for symbol in symbols if size.dim_param else ():
                size.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", AXIS, size.dim_param)


Shapes = dict[str, tuple[int | str, ...]]


def _checked(path: Path) -> tuple[Shapes, Shapes]:
    """Returns the shapes of a file's inputs and outputs, once ONNX's checker accepts the file."""
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # of several classes
        raise ExportError(
            f"the checker of ONNX refuses the file: {one_line(error)}; please report it"
        ) from error
    return read_shapes(path)


def read_shapes(path: Path) -> tuple[Shapes, Shapes]:
    """Returns the shapes of the inputs and of the outputs of a file, by name.

    Raises:
        InputError: no such file, or none of ONNX.
    """
    graph = _read(path).graph
    return {v.name: _shape(v) for v in _inputs(graph)}, {v.name: _shape(v) for v in graph.output}


def _inputs(graph: Any) -> list[Any]:
    """Returns the inputs of a graph that are no weights."""
    held = {tensor.name for tensor in graph.initializer}
    return [given for given in graph.input if given.name not in held]


def _read(path: Path) -> Any:
    import onnx

    if not path.is_file():
        raise InputError(f"{path}: no such ONNX file; give the path of a .onnx file")
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # of protobuf
        raise InputError(f"{path} is not an ONNX file: {one_line(error)}") from error


def _shape(value: Any) -> tuple[int | str, ...]:
    sizes = value.type.tensor_type.shape.dim
    return tuple(
        size.dim_value if size.HasField("dim_value") else size.dim_param or "?" for size in sizes
    )


def check_onnx(
    model: nn.Module | str | Path,
    path: str | Path,
    example: Batch | None = None,
    *,
    factory: Factory | None = None,
) -> tuple[Comparison, ...]:
    """Compares an ONNX file with its network, in the runtimes that are installed.

    Args:
        model: a network or a folder, as `export_onnx` takes it.
        path: an ONNX file, of grail or of any other exporter.
        example: a batch; None: random numbers of the shapes that the file names.
        factory: see `export_onnx`.

    Returns:
        A comparison for each runtime; none if none is installed.

    Raises:
        InputError: no such file, or the network does not take the file's inputs or has other
            outputs.
        ModelError: a causal language model, or a package that is missing.
        ExportError: a runtime does not load the file, or computes other outputs.
    """
    path = as_path("path", path)
    check_factory(factory)
    network = as_network(model, factory)
    require_packages()
    inputs, _ = read_shapes(path)
    batch = _batch_for(path) if example is None else example
    first = next(iter(inputs.values()), ())[:1]
    sizes = [size for size in first if isinstance(size, int)] or _SIZES
    try:
        calls = [call_of(network, batch, samples) for samples in sizes]
        for call in calls:
            computed(network, call)
    except (InputError, ModelError) as error:
        raise InputError(f"{path} is of another network: {error}") from error
    if len(calls[0].inputs) != len(inputs):
        raise InputError(
            f"{path} has {len(inputs)} inputs, and the batch {len(calls[0].inputs)} tensors"
        )
    comparisons = compare(network, path, calls)
    for comparison in comparisons:
        comparison.require_close(path)
    return comparisons


def _batch_for(path: Path) -> Batch:
    """Returns random tensors of the shapes that a file names."""
    import onnx

    found = []
    for given in _inputs(_read(path).graph):
        shape = _shape(given)
        real = given.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        if not (real and shape and all(isinstance(size, int) for size in shape[1:])):
            raise InputError(
                f"{path} reads {given.name} {list(shape)}, which are no images of one size: give a "
                "batch in Python, grail.serving.onnx_writing.check_onnx(model, path, example)"
            )
        found.append(random_batch(tuple(map(int, shape[1:]))))
    return found[0] if len(found) == 1 else tuple(found)
