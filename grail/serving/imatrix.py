"""Writes llama.cpp's importance matrix of a compressed model, for stock `llama-quantize`.

The importance of a channel is the mean of its square in the input of a matrix, which is the
diagonal of that input's Gram matrix divided by the tokens. `llama-quantize --imatrix` weights the
rounding error of a column by it. Form: that of llama.cpp's `tools/imatrix`, in GGUF.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad as padded
from tqdm import tqdm

from grail.arguments import as_path, require_switches
from grail.errors import ExportError, InputError, ModelError, NonFiniteError
from grail.files.mixture import AnyText
from grail.files.pretrained import Pretrained
from grail.runtime.folder import complete_file, require_new_file
from grail.runtime.hooks import input_of
from grail.runtime.transaction import eval_no_grad
from grail.serving.calibration import read_calibration, text_of_folder
from grail.serving.gguf_layout import (
    Entry,
    choose_architecture,
    entries,
    file_names,
    measure,
    stored_tensors,
)
from grail.serving.gguf_writing import PADS, load_folder

_SUMS, _COUNTS = "in_sum2", "counts"  # llama.cpp's names of the two tensors of a matrix


@dataclass(frozen=True)
class ImatrixFile:
    """An importance matrix that was written."""

    path: Path
    matrices: int
    tokens: int
    calibration: dict[str, Any]  # source and hashes of the text
    bytes: int


def export_imatrix(
    folder: str | Path,
    output: str | Path,
    calibration: AnyText | None = None,
    *,
    pad: int = 32,
    device: str = "auto",
    progress: bool = True,
) -> ImatrixFile:
    """Writes the importance matrix of a compressed model, which stock `llama-quantize` reads.

    It holds, for each linear layer of the blocks, the sums of squares of its input's channels over
    the tokens of a text. It belongs to the file that `grail.export_gguf` writes of the same folder
    with the same `pad`. Channels that `pad` adds have importance zero, as in `llama-imatrix`.

    Args:
        folder: written by `grail.export` or the command line.
        output: file to create, in GGUF.
        calibration: the text, or a list or `grail.Mixture` of several; None takes what the report
            in `folder` names.
        pad: see `grail.export_gguf`.
        device: device that runs the model; "auto" is a GPU if there is one.
        progress: shows a progress bar.

    Returns:
        Path and contents of the file.

    Raises:
        InputError: `output` exists, `folder` was edited, or there is no text.
        ModelError: llama.cpp has no architecture for the model, or `folder` cannot be read.
        NonFiniteError: a layer reads NaN or Inf.
        ExportError: the file could not be written.

    Numerics: squares in float32, sums of each batch in float32, their sum in float64.
    """
    folder, output = as_path("folder", folder), as_path("output", output)
    if isinstance(pad, bool) or pad not in PADS:
        raise InputError(f"pad must be 32 or 256; got {pad!r}")
    require_switches(progress=progress)
    computing = Pretrained(str(folder), device=device).computing
    require_imatrix_output(folder, output, calibration)
    model, tokenizer = load_folder(folder)
    shape = measure(model).padded(pad)
    names = file_names(model)
    architecture = choose_architecture(model, shape, list(names.values()))
    matrices = _matrices(model, entries(names, shape, architecture))
    batches, origin = read_calibration(folder, calibration, model, tokenizer)
    squares = _squares(model.to(computing), matrices, batches, progress)
    for name, (layer, width) in matrices.items():
        found = squares[layer]
        squares[name] = padded(found, (0, width - len(found)))
    values = {name: squares[name].float().numpy() for name in matrices}
    with complete_file(output, ExportError, size=sum(v.nbytes for v in values.values())) as partial:
        _write(partial, values, batches, origin["source"])
        _verify(partial, values, origin["tokens"])
    return ImatrixFile(
        path=output.resolve(),
        matrices=len(values),
        tokens=origin["tokens"],
        calibration=origin,
        bytes=output.stat().st_size,
    )


def require_imatrix_output(folder: Path, output: Path, calibration: AnyText | None) -> None:
    """Checks what shows before a model is loaded.

    Raises:
        InputError, ModelError: see `export_imatrix`.
    """
    require_new_file(output)
    if find_spec("gguf") is None:
        raise ModelError(
            "writing GGUF needs the package gguf: pip install 'grail-kernels[llm]'",
            page="docs/index.md#install",
        )
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give a folder that grail wrote")
    text_of_folder(folder, calibration)


def _matrices(model: Any, file_entries: Sequence[Entry]) -> dict[str, tuple[str, int]]:
    """Returns, by the name of a matrix in the file, a layer that reads its input, and its columns.

    Those of the blocks alone: as `llama-imatrix` does by default, the output matrix is left out.
    """
    without_values = {name: tensor.to("meta") for name, tensor in stored_tensors(model).items()}
    modules = dict(model.named_modules())
    found = {}
    for entry in file_entries:
        layer = entry.parts[0].name.removesuffix(".weight")  # fused parts read the same input
        if entry.name.startswith("blk.") and isinstance(modules.get(layer), nn.Linear):
            found[entry.name] = layer, int(entry.pack(without_values).shape[1])
    return found


def _squares(
    model: Any,
    matrices: Mapping[str, tuple[str, int]],
    batches: Sequence[Tensor],
    progress: bool,
) -> dict[str, Tensor]:
    """Returns the sum of squares of each channel of the layers' inputs [channels], in float64."""
    sums: dict[str, Tensor] = {}
    layers = {layer: model.get_submodule(layer) for layer, _ in matrices.values()}
    with eval_no_grad(model), torch.inference_mode(), _observed(layers, sums):
        for batch in tqdm(batches, "importance", unit="batch", disable=not progress, leave=False):
            model.base_model(batch.to(model.device), use_cache=False)
    for layer, values in sums.items():
        if len(channels := (~values.isfinite()).nonzero().flatten().tolist()):
            raise NonFiniteError(f"the input of {layer}", channels, len(channels))
    return {layer: values.cpu() for layer, values in sums.items()}


@contextmanager
def _observed(layers: Mapping[str, nn.Module], sums: dict[str, Tensor]) -> Iterator[None]:
    """Adds the squares of what layers read to `sums`."""

    def add(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = input_of(name, args, kwargs).flatten(0, -2).float()
        found = torch.linalg.vecdot(x, x, dim=0).double()
        sums[name] = found + sums[name] if name in sums else found

    with ExitStack() as hooks:
        for name, module in layers.items():
            hook = partial(add, name)
            hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield


def _write(
    path: Path, values: Mapping[str, np.ndarray], batches: Sequence[Tensor], source: str
) -> None:
    """Writes the keys and tensors of llama.cpp's importance matrix."""
    import gguf

    tokens = sum(batch.numel() for batch in batches)
    length = batches[0].shape[1]
    writer = gguf.GGUFWriter(path, "")  # without an architecture, as llama.cpp's
    writer.add_type("imatrix")
    writer.add_array(gguf.Keys.IMatrix.DATASETS, [source])
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_COUNT, tokens // length)
    writer.add_uint32(gguf.Keys.IMatrix.CHUNK_SIZE, length)
    for name in sorted(values):
        writer.add_tensor(f"{name}.{_SUMS}", values[name])
        writer.add_tensor(f"{name}.{_COUNTS}", np.array([tokens], dtype=np.float32))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _verify(path: Path, values: Mapping[str, np.ndarray], tokens: int) -> None:
    """Raises ExportError unless a file, read again, holds these sums."""
    import gguf

    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    expected = {f"{name}.{_SUMS}": sums for name, sums in values.items()}
    expected |= {f"{name}.{_COUNTS}": np.array([tokens], dtype=np.float32) for name in values}
    same = stored.keys() == expected.keys() and all(
        np.array_equal(stored[name].reshape(-1), expected[name]) for name in expected
    )
    if not same:
        raise ExportError(f"{path.name} does not hold the sums that were written; please report it")
