"""The Triton kernel of `grail_kernels.gather`: elements of packed triangles, as values or as parts.

A program owns one tile of the result of one matrix. It computes the place of each element from its
two channels and reads it: 4 bytes used of a transaction of 32 for channels far apart, most of them
for channels in order. It can write an element as three bf16 that add up to it, from which library
products of bf16 have fp32 quality (`_absorb`); the fp32 value then never reaches memory.

Bytes: those transactions, at most 2·H² of a triangle that is read once, and the result, 4 or 6 an
element. FLOPs: none worth counting.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from grail_kernels.tiles import STRIP_ROWS

_BLOCK_ROWS, _BLOCK_COLUMNS, _WARPS = 32, 64, 4


@triton.jit(do_not_specialize=["R", "C"])
def _gather_kernel(
    out_ptr,  # [matrices, PARTS, R, C], the smallest part first
    packed_ptr,  # [matrices, packed_numel(H)]
    rows_ptr,  # [matrices, R]
    columns_ptr,  # [matrices, C]
    packed_stride,
    R,
    C,
    H,
    STRIP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PARTS: tl.constexpr,
):
    matrix = tl.program_id(1).to(tl.int64)
    tile_columns = tl.cdiv(C, BLOCK_C)
    r = tl.program_id(0).to(tl.int64) // tile_columns * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(0) % tile_columns * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.load(rows_ptr + matrix * R + r, mask=r < R, other=0)[:, None]
    column = tl.load(columns_ptr + matrix * C + c, mask=c < C, other=0)[None, :]
    later, earlier = tl.maximum(row, column), tl.minimum(row, column)
    strip = later // STRIP
    width = tl.minimum((strip + 1) * STRIP, H)
    place = STRIP * STRIP * (strip * (strip + 1) // 2) + (later - strip * STRIP) * width + earlier
    in_result = (r < R)[:, None] & (c < C)[None, :]
    in_matrix = (earlier >= 0) & (later < H)
    packed_ptr += matrix * packed_stride
    value = tl.load(packed_ptr + place, mask=in_result & in_matrix, other=float("nan"))
    out_ptrs = out_ptr + matrix * PARTS * R * C + r[:, None] * C + c[None, :]
    if PARTS == 1:
        tl.store(out_ptrs, value.to(out_ptr.dtype.element_ty), mask=in_result)
    else:
        rest = value.to(tl.float32)
        for part in tl.static_range(PARTS):
            rounded = rest.to(tl.bfloat16)
            rest -= rounded.to(tl.float32)
            size = PARTS - 1 - part
            tl.store(out_ptrs + size * R.to(tl.int64) * C, rounded, mask=in_result)


def launch_gather(
    out: Tensor, packed: Tensor, channels: int, rows: Tensor, columns: Tensor
) -> None:
    """Fills `out` with the elements of rows and columns of packed matrices.

    Args:
        out: [..., 1, R, C] fp32 or fp64, or [..., 3, R, C] bf16, the smallest part first;
            contiguous.
        packed: [..., packed_numel(H)]; `channels`: H.
        rows, columns: [..., R], [..., C] int64.
    """
    parts, height, width = out.shape[-3:]
    matrices = packed.contiguous().view(-1, packed.shape[-1])
    tiles = triton.cdiv(height, _BLOCK_ROWS) * triton.cdiv(width, _BLOCK_COLUMNS)
    with torch.cuda.device_of(packed):
        _gather_kernel[tiles, len(matrices)](
            *(out, matrices, rows.contiguous(), columns.contiguous()),
            *(matrices.stride(0), height, width, channels),
            STRIP=STRIP_ROWS,
            BLOCK_R=_BLOCK_ROWS,
            BLOCK_C=_BLOCK_COLUMNS,
            PARTS=parts,
            num_warps=_WARPS,
        )
