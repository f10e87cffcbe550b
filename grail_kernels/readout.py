"""Reads the dense symmetric matrix out of a packed accumulator, into memory that is there.

On a CPU the accumulator is read once and the matrix written once, a strip by a block of columns at
a time, with the transposed copies of NumPy's OpenBLAS: 5 times as fast as torch's at 4096 channels.
"""

import functools
import itertools
import math
import numbers
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grail_kernels import cpu_blas
from grail_kernels.arguments import check_tensors, kind_of
from grail_kernels.checks import check_devices, check_no_overlap
from grail_kernels.cpu_threads import own_memory, share
from grail_kernels.errors import InputError
from grail_kernels.operators import mark_written, needs_operator
from grail_kernels.tiles import STRIP_ROWS, Strip, check_packed, strips

# Columns of a strip that are copied at a time: 512 kB and their transposed copy stay in the cache.
_COLUMNS = 512

# Rows that are added at a time where beta is not 0.
_ROWS = 16

# Elements of a matrix below which another thread comes too late.
_SHARED_ELEMENTS = 2**20


def unpack(
    packed: Tensor,
    channels: int,
    out: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
) -> Tensor:
    """Returns the dense matrix of a packed accumulator: alpha·G, or beta·out + alpha·G in `out`.

    Args:
        packed: [..., packed_numel(H)].
        channels: H.
        out: [..., H, H] fp32 or fp64, on the device of `packed`, with rows of adjacent elements; it
            is written in place, without a temporary matrix. A new matrix of the dtype of `packed`
            if None.
        alpha: factor of G, such as 2 / samples.
        beta: factor of what `out` contains, which is not read where this is 0.

    Returns:
        [..., H, H], bitwise symmetric where `beta` is 0 or `out` was symmetric.

    Raises:
        InputError: `packed` belongs to another number of channels; `out` has another shape, device
            or dtype, columns that are not adjacent, or overlaps `packed`; a beta without `out`.
            Nothing was changed.
    """
    check_packed(packed, channels)
    shape = (*packed.shape[:-1], channels, channels)
    _check_factor("alpha", alpha)
    _check_factor("beta", beta)
    if out is not None:
        _check_out(out, packed, shape)
    elif beta != 0:
        raise InputError(f"beta scales what out contains; got beta={beta} and no out: give it")
    matrix = packed.new_empty(shape) if out is None else out
    if not _is_fast(packed, matrix):
        _unpack_strips(packed, matrix, alpha, beta)
        return matrix
    for index in itertools.product(*map(range, packed.shape[:-1])):
        _Readout(packed[index].numpy(), matrix[index].numpy(), float(alpha), float(beta)).run()
    mark_written([matrix])
    return matrix


def _check_factor(name: str, factor: object) -> None:
    if not isinstance(factor, numbers.Real) or isinstance(factor, bool):
        raise InputError(f"{name} must be a number; got {kind_of(factor)}")
    if not math.isfinite(factor):
        raise InputError(f"{name} must be finite; got {factor}")


def _check_out(out: Tensor, packed: Tensor, shape: tuple[int, ...]) -> None:
    check_tensors(out=out)
    if tuple(out.shape) != shape:
        raise InputError(f"out must have shape {shape}; got {tuple(out.shape)}")
    if out.dtype not in (torch.float32, torch.float64):
        raise InputError(f"out must be torch.float32 or torch.float64; got {out.dtype}")
    if out.layout != torch.strided or out.stride(-1) != 1 or out.stride(-2) < shape[-1]:
        raise InputError(
            "out must be a dense tensor with rows of adjacent elements; got strides "
            f"{tuple(out.stride()) if out.layout == torch.strided else out.layout}; pass a "
            "contiguous one"
        )
    check_devices(out=out, packed=packed)
    check_no_overlap(written={"out": out}, read={"packed": packed})


def _unpack_strips(packed: Tensor, matrix: Tensor, alpha: float, beta: float) -> None:
    """Writes the matrix by torch's operations, on any device."""
    for strip in strips(matrix.shape[-1]):
        rows = slice(strip.low, strip.high)
        stored = strip.view(packed)
        below, block = stored[..., : strip.low], stored[..., strip.low :]
        before = slice(0, strip.low)
        parts = (
            ((rows, before), below),
            ((before, rows), below.mT),
            ((rows, rows), block.tril() + block.tril(-1).mT),
        )
        for place, source in parts:
            target = matrix[(..., *place)]
            if beta == 0:
                target.copy_(source)
                if alpha != 1:
                    target.mul_(alpha)
            else:
                target.mul_(beta).add_(source, alpha=alpha)


def _is_fast(packed: Tensor, matrix: Tensor) -> bool:
    """Returns whether OpenBLAS makes the copies: plain CPU tensors that torch does not trace."""
    return (
        packed.device.type == "cpu"
        and packed.dtype == torch.float32
        and matrix.dtype in (torch.float32, torch.float64)
        and packed.stride(-1) == 1
        and not needs_operator((packed, matrix), (packed, matrix))
        and cpu_blas.openblas() is not None
    )


class _Block(NamedTuple):
    """Columns [left, right) of a strip; those of its diagonal block, or some before them."""

    strip: Strip
    left: int
    right: int


class _Readout(NamedTuple):
    """matrix [H, H] = beta·matrix + alpha·G, from packed [P] fp32."""

    packed: NDArray[np.float32]
    matrix: NDArray[np.floating]
    alpha: float
    beta: float

    def run(self) -> None:
        """Writes the whole matrix."""
        channels = len(self.matrix)
        threads = torch.get_num_threads() if channels**2 >= _SHARED_ELEMENTS else 1
        share(self._write, _blocks(channels), threads)

    def _write(self, block: _Block) -> None:
        """Writes a block and its mirror image."""
        (low, high, offset), left, right = block
        stored = self.packed[offset : offset + (high - low) * high].reshape(high - low, high)
        source = stored[:, left:right]
        below, above = self.matrix[low:high, left:right], self.matrix[left:right, low:high]
        if left < low and self.beta == 0 and above.dtype == np.float32:
            self._combine(below, source)
            _transpose(source, above, self.alpha)
            return
        mirrored = own_memory(source.size).reshape(source.T.shape)
        _transpose(source, mirrored)
        if left == low:
            np.copyto(mirrored, source, where=_lower()[: high - low, : high - low])
        else:
            self._combine(below, source)
        self._combine(above, mirrored)

    def _combine(self, target: NDArray[np.floating], source: NDArray[np.float32]) -> None:
        with np.errstate(all="ignore"):  # products beyond the range are infinite, as torch's
            if self.beta == 0 and self.alpha == 1:
                np.copyto(target, source)
            elif self.beta == 0:
                np.multiply(source, self.alpha, out=target, dtype=target.dtype)
            else:
                for first in range(0, len(target), _ROWS):  # keeps the products small
                    rows = target[first : first + _ROWS]
                    rows *= self.beta
                    rows += np.multiply(source[first : first + _ROWS], self.alpha, dtype=rows.dtype)


@functools.lru_cache(maxsize=64)
def _blocks(channels: int) -> tuple[_Block, ...]:
    return tuple(
        _Block(strip, left, min(left + _COLUMNS, strip.low))
        for strip in strips(channels)
        for left in range(0, strip.low, _COLUMNS)
    ) + tuple(_Block(strip, strip.low, strip.high) for strip in strips(channels))


@functools.cache
def _lower() -> NDArray[np.bool_]:
    """The lower triangle of a diagonal block."""
    return np.tri(STRIP_ROWS, dtype=np.bool_)


def _transpose(source: NDArray[np.float32], target: NDArray[np.floating], alpha: float = 1) -> None:
    """Writes alpha·sourceᵀ into `target`; both are fp32 with adjacent elements in rows."""
    library = cpu_blas.openblas()
    assert library is not None
    given, written = ((m.ctypes.data, m.strides[0] // m.itemsize) for m in (source, target))
    library.transpose(
        cpu_blas.ROW_MAJOR, cpu_blas.TRANSPOSED, *source.shape, alpha, *given, *written
    )
