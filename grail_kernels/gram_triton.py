"""The Triton kernel of `grail_kernels.gram`.

One program owns one square tile of the lower triangle, so every element has one writer: no atomics,
the same bits every time, and a mirrored copy that is bitwise symmetric. Square tiles, because the
triangle of T*H*(H + BLOCK) executed FLOPs is then the tightest. Neighbouring programs walk a group
of tile rows, so that one wave reads a square patch of channels and its tokens meet in L2.

Accumulation is fp32: chains of a few steps on the tensor cores, which truncate, are added up by
ordinary additions, which do not. A batch of matrices is one launch. Where it has too few tiles to
fill the GPU, the tokens of each tile are split over programs that write to a workspace, which is
added up in a fixed order.

On GPUs with a tensor memory accelerator this kernel is for experts, gates and weights, and
`gram_tma` has the rest.

fp32 activations, and weighted ones, become three bf16 parts each (8 + 8 + 8 bits, exact), and the
six products above 2^-24 are taken. Two parts would leave 2^-17, a hundred times fp32's rounding.

Bytes: each tile row reads T*H*itemsize once per tile in it, from L2; the matrix moves 4*H^2 a
launch. Bound by the tensor cores from about 500 channels on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grail_kernels import gram_tma, tiles, tuning
from grail_kernels.backend import interpreting
from grail_kernels.gram_blocks import (
    add_collected,
    add_tile,
    gpu_of,
    in_splits,
    products_of_parts,
    program_of,
    tile_of,
    tiles_of,
)


@triton.jit
def _load_activations(x_ptr, gate_ptr, offsets, mask):
    """A block of activations; with a gate, silu(gate) * x rounded as the model rounds it."""
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        gate = (gate / (1.0 + tl.exp(-gate))).to(x.dtype)
        x = (gate.to(tl.float32) * x.to(tl.float32)).to(x.dtype)
    return x


@triton.jit
def _step_tokens(
    step,
    mask_ptr,
    weights_ptr,
    inner,
    first_token,
    end_token,
    steps_each,
    stride_xo,
    stride_xt,
    BLOCK_T: tl.constexpr,
    REPEATS: tl.constexpr,
):
    """The offsets of a step's tokens, whether each takes part, and its weight; [BLOCK_T]."""
    repeat = step // steps_each if REPEATS else 0
    tokens = first_token + (step - repeat * steps_each) * BLOCK_T + tl.arange(0, BLOCK_T)
    takes_part = tokens < end_token
    weights = tl.full([BLOCK_T], 1.0, tl.float32)
    if mask_ptr is not None:
        flags = tl.load(mask_ptr + repeat * inner + tokens, mask=takes_part, other=0)
        takes_part = takes_part & (flags != 0)
    if weights_ptr is not None:
        weights = tl.load(weights_ptr + repeat * inner + tokens, mask=takes_part, other=0.0)
        takes_part = takes_part & (weights != 0.0)
    return repeat * stride_xo + tokens * stride_xt, takes_part, weights


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
    REPEATS: tl.constexpr,
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
        first_token = tl.zeros([], tl.int64)
        end_token = tl.zeros([], tl.int64) + inner
        steps_each = tl.cdiv(end_token, BLOCK_T)
        first_step = split * span
        end_step = tl.minimum(first_step + span, outer * steps_each)
    else:
        first_token = tl.load(offsets_ptr + matrix)
        end_token = tl.load(offsets_ptr + matrix + 1)
        steps_each = tl.cdiv(end_token - first_token, BLOCK_T)
        first_step = tl.zeros([], tl.int64)
        end_step = steps_each

    if program < collectors:
        rows = program * BLOCK_H + tl.arange(0, BLOCK_H)
        row_mask = rows < H
        row_sums = tl.zeros([BLOCK_H], tl.float32)
        row_counts = tl.zeros([BLOCK_H], tl.int32)
        for step in range(first_step, end_step):
            offsets, takes_part, weights = _step_tokens(
                step,
                mask_ptr,
                weights_ptr,
                inner,
                first_token,
                end_token,
                steps_each,
                stride_xo,
                stride_xt,
                BLOCK_T,
                REPEATS,
            )
            x = _load_activations(
                x_ptr,
                gate_ptr,
                offsets[:, None] + rows[None, :] * stride_xc,
                takes_part[:, None] & row_mask[None, :],
            ).to(tl.float32)
            is_finite = tl.abs(x) < float("inf")
            row_counts += tl.sum((~is_finite).to(tl.int32), axis=0)
            row_sums += tl.sum(x * weights[:, None], axis=0)
        add_collected(sums_ptr, nonfinite_ptr, target * H, row_sums, row_counts, rows, row_mask)
    else:
        tile_row, tile_column = tile_of(program - collectors, tile_rows, GROUP)
        rows = tile_row * BLOCK_H + tl.arange(0, BLOCK_H)
        cols = tile_column * BLOCK_H + tl.arange(0, BLOCK_H)
        row_mask = rows < H
        col_mask = cols < H
        total = tl.zeros([BLOCK_H, BLOCK_H], tl.float32)
        chain = tl.zeros([BLOCK_H, BLOCK_H], tl.float32)
        for step in range(first_step, end_step):
            offsets, takes_part, weights = _step_tokens(
                step,
                mask_ptr,
                weights_ptr,
                inner,
                first_token,
                end_token,
                steps_each,
                stride_xo,
                stride_xt,
                BLOCK_T,
                REPEATS,
            )
            row_x = _load_activations(
                x_ptr,
                gate_ptr,
                rows[:, None] * stride_xc + offsets[None, :],
                row_mask[:, None] & takes_part[None, :],
            )
            # On the diagonal this is the same block; one load for both operands would be
            # transposed element by element.
            col_x = _load_activations(
                x_ptr,
                gate_ptr,
                offsets[:, None] + cols[None, :] * stride_xc,
                takes_part[:, None] & col_mask[None, :],
            )
            if PARTS == 1:
                link = (step - first_step) % CHAIN
                if link == 0:
                    chain = tl.zeros([BLOCK_H, BLOCK_H], tl.float32)
                row_x = row_x.to(OPERAND)
                chain = tl.dot(row_x, col_x.to(OPERAND), chain, input_precision="ieee")
                if (link == CHAIN - 1) | (step == end_step - 1):
                    total += chain
            else:
                if weights_ptr is not None:
                    row_x = row_x.to(tl.float32) * weights[None, :]
                # Summed apart, so that the long chain of additions gets one a step, not six.
                total += products_of_parts(row_x.to(tl.float32), col_x.to(tl.float32), OPERAND)
        add_tile(out_ptr + target * out_stride, total, tile_row, tile_column, H, STRIP, BLOCK_H)


def launch_gram(
    out: Tensor,  # [E, P]
    x: Tensor,  # [E, ..., H]
    mask: Tensor | None,  # [...]
    weights: Tensor | None,  # [...]
    sums: Tensor | None,  # [E, H]
    nonfinite: Tensor | None,  # [E, H]
    gate: Tensor | None = None,  # as x, with the same strides
) -> None:
    """Add the Gram matrix of each x of a batch, with a gate that of silu(gate) * x.

    Everything was checked. The targets of a batch of one need not have its dimension.
    """
    if not x.numel():
        return
    shape = _mergeable_shape(x)
    if shape is None:
        for index in range(x.shape[1]):
            part_mask, part_weights = (None if t is None else t[index] for t in (mask, weights))
            part_gate = None if gate is None else gate[:, index]
            launch_gram(out, x[:, index], part_mask, part_weights, sums, nonfinite, part_gate)
        return
    x = x.view(shape)
    gate = None if gate is None else gate.view(shape)
    mask = None if mask is None else mask.reshape(-1).view(torch.uint8)
    weights = None if weights is None else weights.reshape(-1).float()
    reads_by_tma = weights is None and gate is None and gram_tma.runs_on(x.device)
    with torch.cuda.device_of(x):
        for part, tokens in _launches(x):
            part_mask, part_weights = (None if t is None else t[tokens] for t in (mask, weights))
            if reads_by_tma:
                gram_tma.launch_gram_tma(out, x[part], part_mask, sums, nonfinite)
                continue
            part_gate = None if gate is None else gate[part]
            _launch_split(out, x[part], part_mask, part_weights, sums, nonfinite, part_gate)


def _launches(x: Tensor) -> Iterator[tuple[tuple[slice, ...], slice]]:
    """Where the part of each launch lies in `x` [E, outer, inner, H], and which tokens it has."""
    _, outer, inner, _ = x.shape
    most = tuning.LAUNCHED_TOKENS
    each = max(1, most // inner)
    for first in range(0, outer, each):
        of_outer = slice(first, min(first + each, outer))
        for start in range(0, inner, most):  # more than one only where `each` is 1
            of_inner = slice(start, min(start + most, inner))
            end = (of_outer.stop - 1) * inner + of_inner.stop
            yield (slice(None), of_outer, of_inner), slice(first * inner + start, end)


def launch_gram_ragged(
    out: Tensor,  # [E, P]
    x: Tensor,  # [T, H]
    offsets: Tensor,  # [E + 1]
    sums: Tensor | None,  # [E, H]
    nonfinite: Tensor | None,  # [E, H]
) -> None:
    """Add the Gram matrix of each expert; the checked arguments of `gram_ragged_`."""
    if not x.numel() or not out.numel():
        return
    x = x.expand(out.shape[0], 1, -1, -1)
    config = tuning.gram_config(
        x.dtype,
        x.shape[-1],
        aligned=_is_aligned(x),
        architecture=gpu_of(x.device).architecture,
    )
    with torch.cuda.device_of(x):
        _launch(config, out, x, None, None, sums, nonfinite, offsets=offsets)


def _mergeable_shape(x: Tensor) -> tuple[int, int, int, int] | None:
    """[E, outer, inner, H] such that `x` [E, ..., H] has that view; None if more are needed."""
    matrices, channels = x.shape[0], x.shape[-1]
    tokens = x.numel() // (matrices * channels)
    for outer in (1, x.shape[1]):
        shape = (matrices, outer, tokens // outer, channels)
        try:
            x.view(shape)
        except RuntimeError:
            continue
        return shape
    return None


def _launch_split(
    out: Tensor,  # [E, P]
    x: Tensor,  # [E, outer, inner, H]
    mask: Tensor | None,
    weights: Tensor | None,
    sums: Tensor | None,
    nonfinite: Tensor | None,
    gate: Tensor | None,
) -> None:
    """Split the tokens into as many partial batches as fill the GPU, and add those up in order."""
    matrices, outer, inner, channels = x.shape
    config = tuning.gram_config(
        x.dtype,
        channels,
        weighted=weights is not None,
        gated=gate is not None,
        aligned=_is_aligned(x),
        architecture=gpu_of(x.device).architecture,
    )
    steps = outer * math.ceil(inner / config.block_tokens)
    tiles_of_all = matrices * tiles_of(channels, config.block_channels)
    splits = tuning.token_splits(tiles_of_all, outer * inner, gpu_of(x.device).processors)
    span = math.ceil(steps / splits)

    def launch(out: Tensor, sums: Tensor | None, nonfinite: Tensor | None) -> None:
        _launch(config, out, x, mask, weights, sums, nonfinite, gate=gate, span=span, splits=splits)

    in_splits(splits, out, sums, nonfinite, launch)


def _launch(
    config: tuning.GramConfig,
    out: Tensor,  # [splits, E, P]
    x: Tensor,  # [E, outer, inner, H]
    mask: Tensor | None,  # [outer * inner]
    weights: Tensor | None,  # [outer * inner]
    sums: Tensor | None,  # [splits, E, H]
    nonfinite: Tensor | None,  # [splits, E, H]
    *,
    offsets: Tensor | None = None,  # [E + 1]
    gate: Tensor | None = None,  # as x
    span: int = 0,
    splits: int = 1,
) -> None:
    """Launch a program for each tile of each matrix, and for each block of channels to collect."""
    matrices, outer, inner, channels = x.shape
    collects = sums is not None or nonfinite is not None
    programs = tiles_of(channels, config.block_channels)
    programs += math.ceil(channels / config.block_channels) if collects else 0
    _gram_kernel[(programs * matrices, splits)](
        out,
        x,
        gate,
        mask,
        weights,
        sums,
        nonfinite,
        offsets,
        channels,
        inner,
        outer,
        matrices,
        span,
        out.shape[-1],
        *x.stride(),
        **constants(config, x.dtype, weights is not None, outer > 1),
        num_warps=config.warps,
        num_stages=config.stages,
    )


def constants(
    config: tuning.GramConfig, dtype: torch.dtype, weighted: bool, repeats: bool
) -> dict[str, Any]:
    """The compile-time arguments of the kernel; `bench/aot.py` compiles with the same."""
    native = tuning.multiplies_natively(dtype, weighted)
    operand = tl.float16 if native and dtype == torch.float16 else tl.bfloat16
    return {
        "STRIP": tiles.STRIP_ROWS,
        "BLOCK_T": config.block_tokens,
        "BLOCK_H": config.block_channels,
        "GROUP": config.group,
        "CHAIN": max(1, tuning.CHAIN_TOKENS // config.block_tokens),
        "PARTS": 1 if native else 3,
        # The interpreter gets products of bf16 wrong.
        "OPERAND": tl.float32 if interpreting() else operand,
        "REPEATS": repeats,
    }


def _is_aligned(x: Tensor) -> bool:
    """Whether the kernel can read 16 bytes of `x` [E, outer, inner, H] at once."""
    _, _, inner, channels = x.shape
    run = channels if x.stride(3) == 1 else inner if x.stride(2) == 1 else 1
    lengths = (run, *(stride for stride in x.stride() if stride != 1))
    return x.data_ptr() % 16 == 0 and all(length % 16 == 0 for length in lengths)
