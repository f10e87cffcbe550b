"""How a GGUF file stores its tensors: the type of each, its bytes, and values read back."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from grail.algebra.grids import BLOCK, Format, Grid, pack
from grail.errors import ExportError, ModelError
from grail.files.grids import formats
from grail.serving.gguf_layout import Entry, Part

FileDtype = Literal["float32", "float16", "bfloat16"]
# llama.cpp's general.file_type.
_NUMBERS = {"float32": 0, "float16": 1, "bfloat16": 32, "q4_1": 3, "q8_0": 7}
_KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class FileType:
    """The types of a file's tensors: vectors are float32.

    `dtype`: of matrices without a grid. `grids`: of the others, by the name in the model.
    """

    dtype: FileDtype
    grids: Mapping[str, Grid]

    @property
    def name(self) -> str:
        """The dtype, or the format of most weights, of the matrices."""
        return formats(dict(self.grids))[0] if self.grids else self.dtype

    @property
    def number(self) -> int:
        """llama.cpp's number of the type of the whole file."""
        return _NUMBERS[self.name]

    def kind(self, entry: Entry, shape: torch.Size) -> Any:
        """Returns GGUF's type of a tensor of the file."""
        import gguf

        grid = self._format(entry)
        name = _KINDS[self._dtype(shape)] if grid is None else grid.name.upper()
        return gguf.GGMLQuantizationType[name]

    def bytes(self, entry: Entry, shape: torch.Size) -> int:
        """Returns the bytes of a tensor of the file."""
        grid = self._format(entry)
        if grid is None:
            return shape.numel() * getattr(torch, self._dtype(shape)).itemsize
        return shape.numel() // BLOCK * grid.bytes

    def stored(self, entry: Entry, state: Mapping[str, Tensor]) -> np.ndarray:
        """Returns what is written of a tensor, of the values of the model.

        Raises:
            ExportError: a value beyond the range of the dtype.
            ModelError: a value that is not on its grid.
        """
        if self._format(entry) is not None:
            return self._packed(entry, state).numpy()
        values = self._rounded(entry.pack(dict(state)))
        if values.dtype == torch.bfloat16:  # which numpy has not
            return values.view(torch.int16).numpy()
        return values.numpy()

    def holds(self, found: Tensor, name: str, expected: Tensor) -> bool:
        """Returns whether values that were read are those of a tensor of the model, bit by bit.

        Quantised ones are compared in the dtype of the model.
        """
        if name in self.grids:
            return torch.equal(found.to(expected.dtype), expected.cpu())
        return torch.equal(found, self._rounded(expected).float())

    def _packed(self, entry: Entry, state: Mapping[str, Tensor]) -> Tensor:
        """Returns the bytes of a quantised tensor [rows, bytes of a row].

        Channels that are added have scale, minimum and code 0, which stand for 0.
        """
        codes, tables = [], []
        for part in entry.parts:
            grid = self.grids[part.name]
            codes.append(part.pack(grid.codes(state[part.name].cpu())))
            tables.append(torch.stack([_of_blocks(part).pack(rows) for rows in grid.table.cpu()]))
        return pack(Grid(torch.cat(tables, 1)), torch.cat(codes))

    def _format(self, entry: Entry) -> Format | None:
        """Returns the grid's format of a tensor of the file; None for one without a grid."""
        named = [self.grids[part.name].format for part in entry.parts if part.name in self.grids]
        if len(set(named)) > 1 or len(named) not in (0, len(entry.parts)):
            raise ModelError(f"{entry.name} holds matrices of different formats; please report it")
        return named[0] if named else None

    def _dtype(self, shape: torch.Size) -> str:
        return self.dtype if len(shape) > 1 else "float32"

    def _rounded(self, tensor: Tensor) -> Tensor:
        """Returns a tensor on the CPU in the dtype of the file.

        Raises:
            ExportError: a finite value is beyond the range of the dtype.
        """
        tensor = tensor.detach().cpu()
        rounded = tensor.to(getattr(torch, self._dtype(tensor.shape)))
        if not torch.equal(rounded.isfinite(), tensor.isfinite()):
            raise ExportError(f"a weight is beyond the range of {self.dtype}; choose another dtype")
        return rounded


def _of_blocks(part: Part) -> Part:
    """Returns the part for a table that has one column for each block of 32."""
    return replace(part, size=part.size // BLOCK) if part.axis == 1 else part
