"""Submatrices of a packed accumulator, read where they lie: no dense G is formed.

An element (r, c) is stored once, in the row of the later of its two channels. On a CPU the elements
of a strip are read together: those of its rows r for the columns before it, as they lie, and those
of its rows c for the rows r before it, mirrored. Both select along contiguous rows, by NumPy on one
thread: pieces are so small that a second one, of torch, waits longer for its turn on a busy machine
than it saves. A GPU reads element by element, in `gather_triton`.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grail_kernels import checks
from grail_kernels.arguments import check_tensors
from grail_kernels.backend import resolve_backend
from grail_kernels.errors import InputError
from grail_kernels.tiles import STRIP_ROWS, check_packed, strips

# Elements whose places are computed at a time: 8 bytes each.
_AT_ONCE = 2**22

# Rows that are mirrored at a time: a cache line of the target. All 128 of a strip took 4 times as
# long where the rows of the target lie a power of two apart.
_MIRRORED_ROWS = 16

Indices = NDArray[np.int64]
Floats = NDArray[Any]


@torch.no_grad()
def gather(
    packed: Tensor,
    channels: int,
    rows: Tensor,
    columns: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Returns the elements [..., R, C] of rows and columns of a packed symmetric matrix.

    Args:
        packed: [..., packed_numel(H)]; see `grail_kernels.tiles`.
        channels: H.
        rows: [..., R] int64, with the leading dimensions of `packed`, on its device, in any order;
            ascending is fastest. If `rows is columns`, a CPU reads half.
        columns: [..., C] int64, likewise.
        dtype: of the result, float32 or float64; elements are converted a strip at a time.

    Raises:
        InputError: `packed` belongs to another number of channels, a form does not fit, or, on a
            CPU, an index lies outside of [0, H). A GPU is not asked: there such an element is NaN
            by Triton's kernel, and a device assertion without Triton.

    Memory: the result. On a CPU also 256 rows of it in the dtype of `packed`, and a second result
    if an index is unsorted. On a GPU without Triton 8 bytes for each of up to 4 million elements.
    """
    check_packed(packed, channels)
    _check(packed, rows, columns, dtype)
    shape = (*packed.shape[:-1], rows.shape[-1], columns.shape[-1])
    result = packed.new_empty(shape, dtype=dtype)
    if not result.numel():
        return result
    if packed.device.type == "cpu":
        _fill_on_cpu(result, packed, channels, rows, columns)
    elif resolve_backend(packed) == "triton":
        from grail_kernels.gather_triton import launch_gather

        launch_gather(result[..., None, :, :], packed, channels, rows, columns)
    else:
        _fill_by_place(result, packed, channels, rows, columns)
    return result


def _check(packed: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> None:
    check_tensors(rows=rows, columns=columns)
    for name, found in (("packed", packed.dtype), ("dtype", dtype)):
        if found not in (torch.float32, torch.float64):
            raise InputError(f"{name} must be float32 or float64; got {found}")
    for name, index in (("rows", rows), ("columns", columns)):
        fits = index.dim() == packed.dim() and index.shape[:-1] == packed.shape[:-1]
        if index.dtype != torch.int64 or not fits:
            raise InputError(
                f"{name} must be int64 {[*packed.shape[:-1], 'channels']}, with the leading "
                f"dimensions of packed; got {index.dtype} {list(index.shape)}"
            )
    checks.check_devices(packed=packed, rows=rows, columns=columns)


def _fill_on_cpu(
    result: Tensor, packed: Tensor, channels: int, rows: Tensor, columns: Tensor
) -> None:
    """Fills the result [..., R, C] matrix by matrix."""
    for matrix, target, own_rows, own_columns in zip(
        packed.reshape(-1, packed.shape[-1]),
        result.view(-1, *result.shape[-2:]).numpy(),
        rows.reshape(-1, rows.shape[-1]).numpy(),
        columns.reshape(-1, columns.shape[-1]).numpy(),
        strict=True,
    ):
        row_order = _ascending(own_rows, channels)
        column_order = row_order if rows is columns else _ascending(own_columns, channels)
        if row_order is None and column_order is None:
            other = own_rows if rows is columns else own_columns
            _fill_ascending(target, matrix, channels, own_rows, other)
            continue
        row_order = np.arange(len(own_rows)) if row_order is None else row_order
        column_order = np.arange(len(own_columns)) if column_order is None else column_order
        ascending = own_rows[row_order]
        other = ascending if rows is columns else own_columns[column_order]
        ordered = np.empty_like(target)
        _fill_ascending(ordered, matrix, channels, ascending, other)
        back, across = row_order.argsort(), column_order.argsort()
        for low in range(0, len(back), STRIP_ROWS):
            part = slice(low, low + STRIP_ROWS)
            ordered[back[part]].take(across, axis=1, out=target[part], mode="clip")


def _ascending(index: Indices, channels: int) -> Indices | None:
    """Returns the order that sorts an index, None if it is sorted; refuses one out of range."""
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= channels:
        raise InputError(f"rows and columns must lie in [0, {channels}); got {low} to {high}")
    return None if bool((index[1:] >= index[:-1]).all()) else index.argsort(kind="stable")


def _fill_ascending(
    target: Floats,  # [R, C]
    packed: Tensor,  # [P]
    channels: int,
    rows: Indices,  # [R], ascending
    columns: Indices,  # [C], ascending
) -> None:
    """Fills [R, C] strip by strip; where `rows is columns`, mirrors what was read."""
    every = list(strips(channels))
    edges = [0, *(strip.high for strip in every)]
    row_edges, column_edges = (index.searchsorted(edges) for index in (rows, columns))
    for number, strip in enumerate(every):
        low, high = row_edges[number : number + 2]
        left, right = column_edges[number : number + 2]
        stored = strip.view(packed).numpy()
        own_rows, own_columns = rows[low:high] - strip.low, columns[left:right] - strip.low
        if high > low and left:
            target[low:high, :left] = _picked(stored, own_rows, columns[:left])
        if right > left and low:
            if rows is columns:
                _mirror(target[:low, left:right], target[low:high, :left])
            else:
                _mirror(target[:low, left:right], _picked(stored, own_columns, rows[:low]))
        if high > low and right > left:
            block = stored[:, strip.low :]
            below = _picked(block, own_rows, own_columns)
            above = _picked(block, own_columns, own_rows).T
            lies_below = own_rows[:, None] >= own_columns
            target[low:high, left:right] = np.where(lies_below, below, above)


def _picked(stored: Floats, rows: Indices, columns: Indices) -> Floats:
    """Returns rows [R] and ascending columns [C] of a matrix."""
    first, last = columns[0], columns[-1]
    return stored[rows, first : last + 1].take(columns - first, axis=1)


def _mirror(target: Floats, block: Floats) -> None:
    """Writes the transpose of a block [B, A] to a target [A, B]."""
    for low in range(0, len(block), _MIRRORED_ROWS):
        part = slice(low, low + _MIRRORED_ROWS)
        target[:, part] = block[part].T


def _fill_by_place(
    result: Tensor, packed: Tensor, channels: int, rows: Tensor, columns: Tensor
) -> None:
    """Fills the result [..., R, C] by the place of each element; nothing is read on the host."""
    starts = _starts(channels, packed.device)
    at_once = max(1, _AT_ONCE // result[..., :1, :].numel())
    for low in range(0, rows.shape[-1], at_once):
        part = rows[..., low : low + at_once, None]
        places = starts[torch.maximum(part, columns[..., None, :])]
        places += torch.minimum(part, columns[..., None, :])
        found = packed.gather(-1, places.flatten(-2)).view(places.shape)
        result[..., low : low + at_once, :] = found


@lru_cache(maxsize=32)
def _starts(channels: int, device: torch.device) -> Tensor:
    """Returns where in a packed accumulator the row of each channel [H] begins."""
    rows = [
        strip.offset + row * strip.high
        for strip in strips(channels)
        for row in range(strip.high - strip.low)
    ]
    return torch.tensor(rows, dtype=torch.int64, device=device)
