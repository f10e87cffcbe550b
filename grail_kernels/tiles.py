"""The packed accumulator: a symmetric matrix stored as the strips of its lower triangle.

With S = STRIP_ROWS, strip i contains rows [i·S, high) and columns [0, high), high =
min((i + 1)·S, H), row-major. The strips follow one another in one flat tensor. A strip is one
contiguous target of a library GEMM, and a tile of a strip is a plain strided block for a GPU
kernel. The whole takes (H + S) / 2H of the dense matrix. Elements above the diagonal inside the
diagonal block of a strip are scratch: GEMMs write them, nothing reads them. All functions also take
leading batch dimensions.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from grail_kernels.arguments import check_count, check_tensors
from grail_kernels.errors import InputError

# Rows of a strip: enough to fill a CPU's GEMM, few enough for 0.55× of dense at H = 2560.
STRIP_ROWS = 256


class Strip(NamedTuple):
    """Rows [low, high) of the lower triangle, at `offset` elements into the packed tensor."""

    low: int
    high: int
    offset: int

    def view(self, packed: Tensor) -> Tensor:
        """The strip as [..., high - low, high], sharing memory with `packed` [..., P]."""
        rows = self.high - self.low
        flat = packed[..., self.offset : self.offset + rows * self.high]
        return flat.unflatten(-1, (rows, self.high))


def strips(channels: int) -> Iterator[Strip]:
    """The strips of a `channels` wide accumulator, in the order they are stored."""
    offset = 0
    for low in range(0, channels, STRIP_ROWS):
        high = min(low + STRIP_ROWS, channels)
        yield Strip(low, high, offset)
        offset += (high - low) * high


def packed_numel(channels: int) -> int:
    """Returns the number of fp32 elements that the packed accumulator of `channels` channels takes.

    Raises:
        InputError: `channels` is below 1.
    """
    check_count("channels", channels)
    if channels < 1:
        raise InputError(f"a Gram matrix needs at least 1 channel; got {channels}")
    full, rest = channels // STRIP_ROWS, channels % STRIP_ROWS  # divmod does not take traced sizes
    return STRIP_ROWS * STRIP_ROWS * full * (full + 1) // 2 + rest * channels


def channels_of(packed: Tensor) -> int:
    """Returns H of a packed accumulator [..., packed_numel(H)].

    Raises:
        InputError: no number of channels has so many elements.
    """
    elements = packed.shape[-1]
    full = (math.isqrt(8 * (elements // STRIP_ROWS**2) + 1) - 1) // 2
    wide = STRIP_ROWS * full
    rest = elements - STRIP_ROWS * wide * (full + 1) // 2  # r·(wide + r) in the last strip
    channels = wide + (math.isqrt(wide**2 + 4 * rest) - wide) // 2
    if not channels or packed_numel(channels) != elements:
        raise InputError(
            f"a packed accumulator has packed_numel(channels) elements in its last dimension; "
            f"{elements} is no such number; allocate it with torch.zeros(packed_numel(channels))"
        )
    return channels


def check_packed(packed: Tensor, channels: int) -> None:
    """Refuses a packed tensor whose last dimension is not `packed_numel(channels)`."""
    check_tensors(packed=packed)
    expected = packed_numel(channels)
    if packed.dim() < 1 or packed.shape[-1] != expected:
        raise InputError(
            f"a packed accumulator of {channels} channels has {expected} elements in its last "
            f"dimension; got shape {tuple(packed.shape)}; allocate it with "
            f"torch.zeros(packed_numel({channels}), dtype=torch.float32)"
        )


def pack(matrix: Tensor) -> Tensor:
    """Returns the packed accumulator [..., P] of a symmetric matrix [..., H, H].

    Only the lower triangle is read; values above the diagonal are 0.

    Raises:
        InputError: `matrix` is not square.
    """
    check_tensors(matrix=matrix)
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise InputError(f"pack needs a square matrix [..., H, H]; got {tuple(matrix.shape)}")
    channels = matrix.shape[-1]
    packed = matrix.new_empty(*matrix.shape[:-2], packed_numel(channels))
    for strip in strips(channels):
        rows = matrix[..., strip.low : strip.high, : strip.high]
        strip.view(packed).copy_(rows.tril(strip.low))
    return packed


def diagonal(packed: Tensor, channels: int) -> Tensor:
    """Returns the diagonal [..., H] of a packed accumulator, without unpacking it.

    Raises:
        InputError: `packed` belongs to another number of channels.
    """
    check_packed(packed, channels)
    parts = [strip.view(packed).diagonal(strip.low, dim1=-2, dim2=-1) for strip in strips(channels)]
    return torch.cat(parts, dim=-1)
