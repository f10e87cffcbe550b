"""The Triton kernel of `grail_kernels.absorb`: result [O, K] = W_D [O, D] @ G_DP [D, K].

G_DP is gathered inside the loop, straight from the packed lower triangle: the element of a dropped
channel d and a kept one p is in the row of the later of the two. With both in ascending order,
the blocks of dropped channels of a tile fall into three runs: before its kept channels (mirrored,
in the rows of the kept), across them, and after them (in their own rows). Each outer run reads
along rows of the triangle, as densely as channels were selected; only the few blocks in between
choose by element. A dense G has the last run alone, with any strides.

The dropped columns of W are gathered once, before: in the loop they would be loads of 2 bytes,
repeated for every tile column. Padded with columns of zeros to whole blocks, they need no mask and
are aligned for every H and D.

A program owns one tile, an element has one writer: no atomics, the same bits every time. G is the
left operand, [K, D] @ [D, O], because it is split into parts in registers and tensor cores take
the left one from there. Neighbours walk a group of tile rows, so that they find W and G in L2.

fp32 quality on tensor cores: G is the sum of three bf16 (8 + 8 + 8 bits, exact from 2⁻¹¹⁰ up). A
bf16 W is exact as it is, which makes three products; fp16 and fp32 take the Gram kernel's six. A
step's products are summed first and added to the tile by ordinary additions, which round to
nearest; tensor cores truncate. The result is fp32: the ridge solve comes before W's own rounding.

FLOPs: 2·O·D·K of the answer, three or six times that in bf16. Bytes: W read once and W_D written,
O·(H + D)·itemsize; of the triangle at most 2·H², for channels between the gathered ones share
their sectors; the result 4·O·K. From L2: W_D once per tile column, G_DP and the gaps once per tile
row, about D·K·O·(itemsize / BLOCK_K + 4·H / (K·BLOCK_O)). At O = 4096, H = 11008, K = H/2 and bf16
that is 745 GFLOP and 10 GB: bound by tensor cores and L2 alike.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grail_kernels import tiles, tuning
from grail_kernels.backend import interpreting
from grail_kernels.gram_blocks import products_of_parts


@triton.jit
def _products_with_exact(gram, weights, OPERAND: tl.constexpr):
    """Gram [K, D], the sum of three bf16, @ weights [D, O] of bf16; small products first."""
    weights = weights.to(OPERAND)
    high = gram.to(tl.bfloat16)
    gram -= high.to(tl.float32)
    middle = gram.to(tl.bfloat16)
    low = (gram - middle.to(tl.float32)).to(tl.bfloat16)
    product = tl.dot(low.to(OPERAND), weights, input_precision="ieee")
    product = tl.dot(middle.to(OPERAND), weights, product, input_precision="ieee")
    return tl.dot(high.to(OPERAND), weights, product, input_precision="ieee")


@triton.jit(do_not_specialize=["O", "K"])
def _absorb_kernel(
    out_ptr,  # [O, K]
    weight_ptr,  # [O, D], the dropped columns
    gram_ptr,  # packed or dense
    dropped_rows_ptr,  # [D], where in gram the row of a dropped channel begins
    dropped_cols_ptr,  # [D], how far into a row its column is
    kept_rows_ptr,  # [K]
    kept_cols_ptr,  # [K]
    mirrored_ptr,  # [K], how many of the dropped channels have their element in the kept one's row
    order_ptr,  # [K], the column of the result
    O,
    K,
    D,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """One tile of the result over all dropped channels; D is a multiple of BLOCK_D."""
    program = tl.program_id(0).to(tl.int64)
    tile_rows = tl.cdiv(O, BLOCK_O)
    tile_columns = tl.cdiv(K, BLOCK_K)
    tile_row, tile_column = tl.swizzle2d(
        program // tile_columns, program % tile_columns, tile_rows, tile_columns, GROUP
    )
    rows = tile_row * BLOCK_O + tl.arange(0, BLOCK_O)
    row_mask = rows < O
    cols = tile_column * BLOCK_K + tl.arange(0, BLOCK_K)
    col_mask = cols < K
    # Columns beyond the last compute it again and are not stored.
    last_col = tl.minimum((tile_column + 1) * BLOCK_K, K) - 1
    cols = tl.minimum(cols, last_col)
    kept_rows = tl.load(kept_rows_ptr + cols)
    kept_cols = tl.load(kept_cols_ptr + cols)
    first_across = tl.load(mirrored_ptr + tile_column * BLOCK_K) // BLOCK_D
    end_across = tl.cdiv(tl.load(mirrored_ptr + last_col), BLOCK_D)

    total = tl.zeros([BLOCK_K, BLOCK_O], tl.float32)
    for run in tl.static_range(3):
        first_step = 0 if run == 0 else first_across if run == 1 else end_across
        end_step = first_across if run == 0 else end_across if run == 1 else D // BLOCK_D
        for step in range(first_step, end_step):
            dropped = step * BLOCK_D + tl.arange(0, BLOCK_D)
            dropped_rows = tl.load(dropped_rows_ptr + dropped)
            dropped_cols = tl.load(dropped_cols_ptr + dropped)
            weight_ptrs = weight_ptr + (rows[:, None] * D + dropped[None, :])
            weights = tl.load(weight_ptrs, mask=row_mask[:, None], other=0.0)
            if run == 0:
                gram = tl.load(gram_ptr + (kept_rows[:, None] + dropped_cols[None, :]))
            elif run == 1:
                in_row_of_kept = dropped_cols[None, :] < kept_cols[:, None]
                offsets = tl.where(
                    in_row_of_kept,
                    kept_rows[:, None] + dropped_cols[None, :],
                    dropped_rows[None, :] + kept_cols[:, None],
                )
                gram = tl.load(gram_ptr + offsets)
            else:
                # Loaded as it lies, so that neighbouring threads read along the row.
                gram = tl.load(gram_ptr + (dropped_rows[:, None] + kept_cols[None, :]))
                gram = tl.trans(gram)
            if PARTS == 1:
                total += _products_with_exact(gram, tl.trans(weights), OPERAND)
            else:
                total += products_of_parts(gram, tl.trans(weights).to(tl.float32), OPERAND)

    out_cols = tl.load(order_ptr + cols)
    out_offsets = rows[:, None] * K + out_cols[None, :]
    out_mask = row_mask[:, None] & col_mask[None, :]
    tl.store(out_ptr + out_offsets, tl.trans(total), mask=out_mask)


def launch_absorb(
    weight: Tensor,  # [O, D] bf16, fp16 or fp32
    gram: Tensor,  # [P] or [H, H] fp32
    keep: Tensor,  # [K]
    drop: Tensor,  # [D]
) -> Tensor:
    """W_D G_DP [O, K] of the checked arguments of `absorb`."""
    outputs = weight.shape[0]
    channels = tiles.channels_of(gram) if gram.dim() == 1 else gram.shape[0]
    config = tuning.absorb_config(weight.dtype, channels, tuning.architecture_of(weight.device))
    result = gram.new_empty(outputs, keep.numel())
    if not outputs or not drop.numel():
        return result.zero_()
    kept, order = keep.sort()
    dropped, columns = drop.sort()
    padding = -drop.numel() % config.block_dropped
    padded = torch.cat([dropped, dropped[-1:].expand(padding)])
    of_dropped = weight.index_select(1, torch.cat([columns, columns[-1:].expand(padding)]))
    of_dropped[:, drop.numel() :] = 0.0
    mirrored = torch.searchsorted(dropped, kept)
    mirrored = mirrored if gram.dim() == 1 else torch.zeros_like(kept)
    tile_rows = math.ceil(outputs / config.block_outputs)
    tile_columns = math.ceil(kept.numel() / config.block_kept)
    places = (*_places(gram, padded, channels), *_places(gram, kept, channels))
    with torch.cuda.device_of(weight):
        _absorb_kernel[(tile_rows * tile_columns,)](
            *(result, of_dropped, gram, *places, mirrored, order),
            *(outputs, kept.numel(), padded.numel()),
            **constants(config, weight.dtype),
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return result


def _places(gram: Tensor, selected: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """For each selected channel the start of its row in `gram` and its column's offset in any row.

    In elements, int64.
    """
    if gram.dim() == 2:
        return selected * gram.stride(0), selected * gram.stride(1)
    strip = selected // tiles.STRIP_ROWS
    low = strip * tiles.STRIP_ROWS
    width = (low + tiles.STRIP_ROWS).clamp(max=channels)
    rows = tiles.STRIP_ROWS**2 * strip * (strip + 1) // 2 + (selected - low) * width
    return rows * gram.stride(0), selected * gram.stride(0)


def constants(config: tuning.AbsorbConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The compile-time arguments of the kernel; `bench/tools/aot.py` compiles with the same."""
    return {
        "BLOCK_O": config.block_outputs,
        "BLOCK_K": config.block_kept,
        "BLOCK_D": config.block_dropped,
        "GROUP": config.group,
        "PARTS": 1 if dtype == torch.bfloat16 else 3,
        # The interpreter gets products of bf16 wrong.
        "OPERAND": tl.float32 if interpreting() else tl.bfloat16,
    }
