"""Writes a compressed language model as a GGUF file that stock llama.cpp loads."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from grail.algebra.grids import format_of
from grail.arguments import as_path, require_switches
from grail.errors import ExportError, InputError, ModelError, one_line
from grail.files.load import load_model
from grail.files.mixture import AnyText
from grail.files.provenance import require_unedited
from grail.files.text import Text
from grail.recipe import Quantize
from grail.runtime.folder import complete_file, require_new_file
from grail.serving.gguf_check import Comparison, compare
from grail.serving.gguf_layout import (
    Entry,
    Shape,
    choose_architecture,
    entries,
    file_names,
    measure,
    stored_tensors,
)
from grail.serving.gguf_quantizing import Rounding, Texts, grids_for
from grail.serving.gguf_template import Template, find_template, require_same_model
from grail.serving.gguf_types import FileDtype, FileType

PADS = (32, 256)  # channels: of the blocks of Q4_0, Q4_1 and Q8_0, and of K-quants


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file that was written."""

    path: Path
    architecture: str  # of llama.cpp
    widths: tuple[int, ...]  # of the blocks' MLPs in the file
    heads: tuple[int, ...]  # query heads of the blocks
    channels_added: int  # of value zero, in all blocks together
    dtype: str  # of matrices, or their format; vectors are float32
    bytes: int
    template: Path
    comparison: Comparison | None  # with the folder's logits in llama.cpp; None: not verified
    rounding: Rounding | None = None  # of a file whose matrices are quantised


def export_gguf(
    folder: str | Path,
    output: str | Path,
    like: str | Path | None = None,
    *,
    pad: int = 32,
    dtype: FileDtype = "float32",
    quantize: Quantize | None = None,
    calibration: AnyText | None = None,
    evaluate: str | Path | Text | None = None,
    verify: bool = True,
    progress: bool = True,
) -> GgufFile:
    """Writes a compressed model as a GGUF file that stock llama.cpp loads.

    Models of types llama, mistral, qwen2 and qwen3 are written. The architecture is that of the
    dense model if all blocks have one width, else `deci`, which computes what Llama does with sizes
    per block (`openelm` for Qwen3 with tied embeddings). Keys, tokenizer and chat template are
    copied from the GGUF file of the dense model.

    A folder whose model was quantised (`grail.compress(…, quantize=…)`) is written with its codes.
    With `quantize` another folder is quantised now, as `grail.quantize` does; the folder stays as
    it is.

    The file gets its name only once it was read again and holds the folder's weights bit by bit,
    and, if llama-cpp-python is installed, gives the folder's logits.

    Args:
        folder: written by `grail.export` or the command line.
        output: file to create.
        like: GGUF file of the dense model, of any quantisation; None takes the one that the report
            in `folder` names.
        pad: each MLP is widened by zero channels to a multiple of this, 32 or 256. Quantised
            formats store blocks of so many: 32 for Q4_0, Q4_1 and Q8_0, 256 for K-quants.
        dtype: dtype of matrices that are not quantised: float32, float16 or bfloat16.
        quantize: "q4_1" or "q8_0"; None writes the folder's weights as they are.
        calibration: text to quantise with, or a list or `grail.Mixture` of several; None takes
            what the report in `folder` names.
        evaluate: held-out text, on which the model is compared before and after quantising, by GPTQ
            and by rounding to nearest.
        verify: compare logits in llama.cpp, in a process of its own, if llama-cpp-python is
            installed. Holds the model once more in memory, in float32.
        progress: shows a progress bar of quantising.

    Returns:
        Path and contents of the file, and what llama.cpp made of it.

    Raises:
        InputError: `output` exists, `like` is missing or of another model, `folder` was edited or
            is quantised in another format, or there is no text to quantise with.
        ModelError: llama.cpp has no architecture for the model, `folder` cannot be read, or its
            matrices have no grid.
        ExportError: the file could not be written, does not hold the folder's weights, or
            llama.cpp does not load it or computes other logits.
    """
    folder, output = as_path("folder", folder), as_path("output", output)
    like = None if like is None else as_path("like", like)
    if isinstance(pad, bool) or pad not in PADS:
        raise InputError(f"pad must be 32 or 256; got {pad!r}")
    if dtype not in get_args(FileDtype):
        raise InputError(f"dtype must be one of {', '.join(get_args(FileDtype))}; got {dtype!r}")
    require_switches(verify=verify, progress=progress)
    texts = Texts(calibration, evaluate)
    if quantize is None:
        texts.refuse("give quantize (--quantize)")
    else:
        quantize = format_of(quantize).name  # type: ignore[assignment]
    require_new_file(output)
    if find_spec("gguf") is None:
        raise ModelError(
            "writing GGUF needs the package gguf: pip install 'grail-kernels[llm]'",
            page="docs/index.md#install",
        )
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give a folder that grail wrote")
    template = Template(find_template(folder) if like is None else like)
    texts = texts.checked(folder) if quantize is not None else texts
    model, tokenizer = load_folder(folder)
    names, own = file_names(model), measure(model)
    shape = own.padded(pad)
    architecture = choose_architecture(model, shape, list(names.values()))
    require_same_model(template, model, tokenizer, own)
    grids, rounding = grids_for(folder, model, tokenizer, quantize, texts, progress)
    content = _Content(
        entries(names, shape, architecture), stored_tensors(model), FileType(dtype, grids)
    )
    with complete_file(output, ExportError, size=content.bytes) as partial:
        _write(partial, template, architecture, shape, content)
        _verify(partial, content)
        comparison = compare(model, partial, content.type.name) if verify else None
        if comparison is not None:
            comparison.require_close(output)
    return GgufFile(
        path=output.resolve(),
        architecture=architecture,
        widths=shape.widths,
        heads=shape.heads,
        channels_added=sum(shape.widths) - sum(own.widths),
        dtype=content.type.name,
        bytes=output.stat().st_size,
        template=template.path,
        comparison=comparison,
        rounding=rounding,
    )


def load_folder(folder: Path) -> tuple[Any, Any]:
    """Loads model and tokenizer from a folder that grail wrote.

    Raises:
        InputError: the weights are not those of the folder's report.
        ModelError, ExportError: the folder cannot be read, or a file was changed.
    """
    require_unedited(folder)
    model, tokenizer = load_model(folder)
    known = None
    with suppress(OSError, ValueError, KeyError, TypeError):
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        known = report["model"]["parameters"]["after"]
    found = sum(parameter.numel() for parameter in model.parameters())
    if known is not None and known != found:
        raise InputError(
            f"{folder} was edited: its report gives {known:,} parameters, and its weights have "
            f"{found:,}; compress the model again"
        )
    return model, tokenizer


@dataclass(frozen=True)
class _Content:
    """The tensors of a file: entries, the values of the model, and how they are stored."""

    entries: Sequence[Entry]
    state: dict[str, Tensor]
    type: FileType

    @property
    def shapes(self) -> Iterator[tuple[Entry, torch.Size]]:
        """Entries with their shapes in the file."""
        without_values = {name: tensor.to("meta") for name, tensor in self.state.items()}
        return ((entry, entry.pack(without_values).shape) for entry in self.entries)

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(self.type.bytes(entry, shape) for entry, shape in self.shapes)


def _write(
    path: Path, template: Template, architecture: str, shape: Shape, content: _Content
) -> None:
    """Writes keys and tensors, one tensor at a time in memory."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    for name, value, kind, of in template.copied(architecture):
        writer.add_key_value(name, value, kind, sub_type=of)
    writer.add_file_type(content.type.number)
    if content.type.grids:
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_feed_forward_length(_alike(shape.widths))
    writer.add_head_count(_alike(shape.heads))
    writer.add_head_count_kv(_alike(shape.kv_heads))
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    frequencies = template.tensor("rope_freqs.weight")
    for entry, dimensions in content.shapes:
        kind, size = content.type.kind(entry, dimensions), content.type.bytes(entry, dimensions)
        # Of a type that is not uint8 the shape is that of the values.
        writer.add_tensor_info(entry.name, dimensions, np.dtype(np.uint16), size, kind)
    if frequencies is not None:
        writer.add_tensor_info(
            "rope_freqs.weight", frequencies.shape, frequencies.dtype, frequencies.nbytes
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in content.entries:
            writer.write_tensor_data(content.type.stored(entry, content.state))
        if frequencies is not None:
            writer.write_tensor_data(frequencies)
    finally:
        writer.close()


def _alike(sizes: Sequence[int]) -> int | list[int]:
    """Returns a size that all blocks have, else the list of sizes."""
    return sizes[0] if len(set(sizes)) == 1 else list(sizes)


def _verify(path: Path, content: _Content) -> None:
    """Raises ExportError unless a file, read again, holds all tensors of a model bit by bit."""
    import gguf

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    missing, state = set(content.state), content.state
    for entry in content.entries:
        tensor = stored.pop(entry.name)
        values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        for name, found in _unpacked(entry, values, state):
            if not content.type.holds(found, name, state[name]):
                raise ExportError(f"the file does not hold the values of {name}; please report it")
            missing.discard(name)
    extra = set(stored) - {"rope_freqs.weight"}
    if missing or extra:
        raise ExportError(
            f"the file lacks or adds tensors, such as {min(missing | extra)}; please report it"
        )


def _unpacked(entry: Entry, values: Tensor, state: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    try:
        return list(entry.unpack(values, state))
    except (ValueError, RuntimeError) as error:
        raise ExportError(
            f"the file does not hold {entry.name} as it should: {one_line(error)}; please report it"
        ) from error


def check_gguf(folder: str | Path, path: str | Path) -> Comparison | None:
    """Compares a GGUF file with the folder it was made of: the logits on random tokens.

    Args:
        folder: written by `grail.export` or the command line.
        path: a GGUF file, quantised or not.

    Returns:
        The comparison; None if llama-cpp-python is not installed.

    Raises:
        InputError: no such folder or file, or a file of another vocabulary.
        ExportError: llama.cpp does not load the file, or a file that is not quantised gives other
            logits.
    """
    folder, path = as_path("folder", folder), as_path("path", path)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give a folder that grail wrote")
    file = Template(path)
    model, _ = load_folder(folder)
    rows = model.get_input_embeddings().weight.shape[0]
    if (tokens := len(file.value("tokenizer.ggml.tokens"))) != rows:
        raise InputError(f"{path} has {tokens} tokens, and the model of {folder} {rows}")
    comparison = compare(model, path.absolute(), _dtype_of(file))
    if comparison is not None:
        comparison.require_close(path)
    return comparison


def _dtype_of(file: Template) -> str:
    """Returns the dtype of a file's matrices, "quantised" if one is."""
    kinds = {tensor.tensor_type.name for tensor in file.reader.tensors if len(tensor.shape) > 1}
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    found = {names.get(kind, "quantised") for kind in kinds}
    return next((name for name in ("quantised", "bfloat16", "float16") if name in found), "float32")
