"""The Triton kernel of `grail_kernels.gram` that reads by pointers.

One program owns one square tile of the lower triangle, so every element has one writer: no atomics,
the same bits every time, and a mirrored copy that is bitwise symmetric. Square tiles execute the
fewest FLOPs, T·H·(H + BLOCK_H). Neighbouring programs walk a group of tile rows: one wave reads a
square patch of channels, whose tokens stay in L2.

Accumulation is fp32. Tensor cores, which truncate, sum chains of a few steps; ordinary additions,
which round to nearest, sum the chains. A batch of matrices is one launch.

fp32 activations, and weighted ones, become three bf16 parts each (8 + 8 + 8 bits, exact). Of
their products the six above 2⁻²⁴ are taken. Two parts would leave 2⁻¹⁷, a hundred times the
rounding of fp32. Weighted bf16 needs parts for w·x only: x is its own first part, and the other
three products are zero.

Bytes: each tile row reads T·H·itemsize once per tile in it, from L2; the matrix moves 4·H² a
launch. Bound by the tensor cores from about 500 channels on.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from grail_kernels import gram_blocks, tuning
from grail_kernels.gram_blocks import (
    Launch,
    add_collected,
    add_tile,
    products_of_parts,
    products_of_rows,
    program_of,
    tile_of,
)
from grail_kernels.gram_call import GramCall
from grail_kernels.gram_gate import silu_product
from grail_kernels.gram_plan import Plan


@triton.jit
def _load_activations(x_ptr, gate_ptr, offsets, mask):
    """A block of activations; with a gate, silu(gate) * x rounded as the model rounds it."""
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    if gate_ptr is not None:
        x = silu_product(tl.load(gate_ptr + offsets, mask=mask, other=0.0), x)
    return x


@triton.jit
def _step_tokens(
    step,
    mask_ptr,
    weights_ptr,
    inner,
    first,
    end,
    steps_each,
    BLOCK_T: tl.constexpr,
    REPEATS: tl.constexpr,
):
    """The run of a step; its tokens [BLOCK_T] in it, whether they take part, and their weights."""
    # As a constant, the run could not be returned by every version of Triton.
    repeat = step // steps_each if REPEATS else step * 0
    tokens = first + (step - repeat * steps_each) * BLOCK_T + tl.arange(0, BLOCK_T)
    takes_part = tokens < end
    weights = tl.full([BLOCK_T], 1.0, tl.float32)
    if mask_ptr is not None:
        flags = tl.load(mask_ptr + repeat * inner + tokens, mask=takes_part, other=0)
        takes_part = takes_part & (flags != 0)
    if weights_ptr is not None:
        weights = tl.load(weights_ptr + repeat * inner + tokens, mask=takes_part, other=0.0)
        takes_part = takes_part & (weights != 0.0)
    return repeat, tokens, takes_part, weights


@triton.jit(do_not_specialize=["matrices", "outer", "span"])
def _gram_kernel(
    out_ptr,  # [splits, matrices, P]
    x_ptr,  # [matrices, outer, inner, H]
    gate_ptr,  # as x_ptr, or None
    mask_ptr,  # [outer * inner], or None
    weights_ptr,  # [outer * inner], or None
    sums_ptr,  # [splits, matrices, H], or None
    nonfinite_ptr,  # [splits, matrices, H], or None
    offsets_ptr,  # [matrices + 1], or None
    H,
    inner,
    outer,
    matrices,
    span,
    out_stride,
    stride_xm,
    stride_xo,
    stride_xt,
    stride_xc,
    STRIP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
    CHAIN: tl.constexpr,
    PARTS: tl.constexpr,
    OPERAND: tl.constexpr,
    STORES: tl.constexpr,
    REPEATS: tl.constexpr,
    EXACT_COLUMNS: tl.constexpr,
):
    """One tile of one matrix over an expert's tokens (offsets), or `span` steps of them all."""
    collects: tl.constexpr = sums_ptr is not None or nonfinite_ptr is not None
    matrix, program, collectors, tile_rows = program_of(H, collects, BLOCK_H)
    split = tl.program_id(1).to(tl.int64)
    target = split * matrices + matrix
    x_ptr += matrix * stride_xm
    if gate_ptr is not None:
        gate_ptr += matrix * stride_xm

    if offsets_ptr is None:
        first = tl.zeros([], tl.int64)
        end = tl.zeros([], tl.int64) + inner
        steps_each = tl.cdiv(end, BLOCK_T)
        first_step = split * span
        end_step = tl.minimum(first_step + span, outer * steps_each)
    else:
        first = tl.load(offsets_ptr + matrix)
        end = tl.load(offsets_ptr + matrix + 1)
        steps_each = tl.cdiv(end - first, BLOCK_T)
        first_step = tl.zeros([], tl.int64)
        end_step = steps_each

    if program < collectors:
        rows = program * BLOCK_H + tl.arange(0, BLOCK_H)
        row_mask = rows < H
        row_sums = tl.zeros([BLOCK_H], tl.float32)
        row_counts = tl.zeros([BLOCK_H], tl.int32)
        for step in range(first_step, end_step):
            repeat, tokens, takes_part, weights = _step_tokens(
                step, mask_ptr, weights_ptr, inner, first, end, steps_each, BLOCK_T, REPEATS
            )
            offsets = repeat * stride_xo + tokens * stride_xt
            places = offsets[:, None] + rows[None, :] * stride_xc
            mask = takes_part[:, None] & row_mask[None, :]
            x = _load_activations(x_ptr, gate_ptr, places, mask).to(tl.float32)
            is_finite = tl.abs(x) < float("inf")
            row_counts += tl.sum((~is_finite).to(tl.int32), axis=0)
            row_sums += tl.sum(x * weights[:, None], axis=0)
        add_collected(
            sums_ptr, nonfinite_ptr, target * H, row_sums, row_counts, rows, row_mask, STORES
        )
    else:
        tile_row, tile_column = tile_of(program - collectors, tile_rows, GROUP)
        rows = tile_row * BLOCK_H + tl.arange(0, BLOCK_H)
        cols = tile_column * BLOCK_H + tl.arange(0, BLOCK_H)
        row_mask = rows < H
        col_mask = cols < H
        total = tl.zeros([BLOCK_H, BLOCK_H], tl.float32)
        chain = tl.zeros([BLOCK_H, BLOCK_H], tl.float32)
        for step in range(first_step, end_step):
            repeat, tokens, takes_part, weights = _step_tokens(
                step, mask_ptr, weights_ptr, inner, first, end, steps_each, BLOCK_T, REPEATS
            )
            offsets = repeat * stride_xo + tokens * stride_xt
            places = rows[:, None] * stride_xc + offsets[None, :]
            mask = row_mask[:, None] & takes_part[None, :]
            row_x = _load_activations(x_ptr, gate_ptr, places, mask)
            # On the diagonal this is the same block; one load for both operands would be
            # transposed element by element.
            places = offsets[:, None] + cols[None, :] * stride_xc
            mask = takes_part[:, None] & col_mask[None, :]
            col_x = _load_activations(x_ptr, gate_ptr, places, mask)
            if PARTS == 1:
                link = (step - first_step) % CHAIN
                if link == 0:
                    chain = tl.zeros([BLOCK_H, BLOCK_H], tl.float32)
                row_x = row_x.to(OPERAND)
                chain = tl.dot(row_x, col_x.to(OPERAND), chain, input_precision="ieee")
                if (link == CHAIN - 1) | (step == end_step - 1):
                    total += chain
            else:
                row_x = row_x.to(tl.float32)
                if weights_ptr is not None:
                    row_x *= weights[None, :]
                # Summed separately, so that the long chain of additions gets one a step, not six.
                if EXACT_COLUMNS:
                    total += products_of_rows(row_x, col_x.to(OPERAND), OPERAND)
                else:
                    total += products_of_parts(row_x, col_x.to(tl.float32), OPERAND)
        out_ptr += target * out_stride
        add_tile(out_ptr, total, tile_row, tile_column, H, STRIP, BLOCK_H, STORES)


def takes(part: GramCall) -> bool:
    """Returns True: this kernel serves every call whose gate, if any, has the strides of x."""
    return True


def add(plan: Plan, parts: list[GramCall], config: tuning.GramConfig) -> None:
    """Adds a launch of the kernel for each part of a call, all in the way that suits the first."""
    batch, first = parts[0], parts[0].x
    fixed = constants(config, first.dtype, batch.weights is not None, repeats=first.shape[1] > 1)
    launch = Launch(plan, _gram_kernel, config, fixed, batch, splits_tokens=batch.offsets is None)
    strides = ("stride_xm", "stride_xo", "stride_xt", "stride_xc")
    for part in parts:
        _, outer, inner, _ = part.x.shape
        launch.add(
            outer * inner,
            outer * math.ceil(inner / config.block_tokens),
            x_ptr=part.x,
            gate_ptr=part.gate,
            mask_ptr=part.mask,
            weights_ptr=part.weights,
            offsets_ptr=part.offsets,
            outer=outer,
            inner=inner,
            **dict(zip(strides, part.x.stride(), strict=True)),
        )


def constants(
    config: tuning.GramConfig, dtype: torch.dtype, weighted: bool, repeats: bool
) -> dict[str, Any]:
    """The compile-time arguments of the kernel; `bench/tools/aot.py` compiles with the same."""
    parts = 1 if tuning.multiplies_natively(dtype, weighted) else 3
    exact = weighted and dtype == torch.bfloat16
    fixed = {"REPEATS": repeats, "EXACT_COLUMNS": exact}
    return gram_blocks.constants(config, parts, dtype) | fixed
