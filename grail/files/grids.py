"""The grids of a quantised model: on its layers in memory, and beside its weights in a folder.

    gguf/grid.safetensors   by name of matrix, fp16 [G, O, C/32]: scales and, in Q4_1, minima

(vLLM reads every .safetensors of a folder as weights, but of no folder in it.)

The weights in the folder are the points of the grid, in the model's dtype, so that transformers
reads it as any other. Codes are found again from both (`grail.algebra.grids.Grid.codes`).
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from grail.algebra.grids import FORMATS, Grid
from grail.errors import ExportError, GrailError, InputError, one_line

FILE = Path("gguf") / "grid.safetensors"
ATTRIBUTE = "gguf_grid"  # of a layer: the table of the grid of its weight


def grid_of(module: nn.Module) -> Grid | None:
    """Returns the grid of a layer's weight; None if it was not quantised."""
    table = getattr(module, ATTRIBUTE, None)
    return Grid(table) if isinstance(table, Tensor) else None


def grids_of(model: nn.Module) -> dict[str, Grid]:
    """Returns the grid of each matrix of a model, by its name."""
    found = {f"{name}.weight": grid_of(module) for name, module in model.named_modules()}
    return {name: grid for name, grid in found.items() if grid is not None}


def write(model: nn.Module, folder: Path) -> None:
    """Writes the grids of a model into its folder; nothing for one that was not quantised.

    Raises:
        ExportError: weights changed after they were quantised.
    """
    grids = grids_of(model)
    try:
        require_on_grids(model, grids)
    except InputError as error:
        raise ExportError(
            f"{error}: they changed after the model was quantised; quantise it again"
        ) from error
    if grids:
        tables = {name: grid.table.cpu().contiguous() for name, grid in grids.items()}
        (folder / FILE).parent.mkdir()
        save_file(tables, folder / FILE)


def read(folder: Path, model: nn.Module) -> dict[str, Grid]:
    """Returns the grids in a folder, of the model that it holds; empty if there are none.

    Raises:
        InputError: the file is damaged, or the folder's weights are not on these grids.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        grids = {name: Grid(table) for name, table in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path} is damaged: {one_line(error)}; compress the model again"
        ) from error
    try:
        require_on_grids(model, grids)
    except InputError as error:
        raise InputError(
            f"{folder} was edited: {error}; compress the model again, or delete {FILE} if it is to "
            "be a model like any other"
        ) from error
    return grids


@torch.no_grad()
def require_on_grids(model: nn.Module, grids: dict[str, Grid]) -> None:
    """Raises InputError unless the weights of a model are points of their grids."""
    state = dict(model.state_dict())
    for name, grid in grids.items():
        if name not in state:
            raise InputError(f"the model has no {name}, of which there is a grid")
        try:
            grid.codes(state[name])
        except GrailError as error:
            raise InputError(f"{name}: {error}") from error


def stored_bytes(model: Any) -> int:
    """Returns the bytes of a model's tensors in a GGUF file: quantised, and the others in fp32."""
    grids, size, seen = grids_of(model), 0, set[int]()
    for name, parameter in model.named_parameters():
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        kind = grids[name].format if name in grids else None
        size += round(parameter.numel() * (32 if kind is None else kind.bits) / 8)
    return size


def formats(grids: dict[str, Grid]) -> list[str]:
    """Returns the names of the formats of some grids, the one of fewest bits first."""
    found = {grid.format.name for grid in grids.values()}
    return sorted(found, key=lambda name: FORMATS[name].bits)
