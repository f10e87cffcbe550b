"""The Triton kernel of `grail_kernels.gram` that reads by pointers.

One program owns one square tile of the lower triangle, so every element has one writer: no atomics,
the same bits every time, and a mirrored copy that is bitwise symmetric. Square tiles execute the
fewest FLOPs, T·H·(H + BLOCK_H). Neighbouring programs walk a group of tile rows: one wave reads a
square patch of channels, whose tokens stay in L2.

Accumulation is fp32. Tensor cores, which truncate, sum chains of a few steps; ordinary additions,
which round to nearest, sum the chains. A batch of matrices is one launch.

fp32 activations, and weighted ones, become three bf16 parts each (8 + 8 + 8 bits, exact). Of
their products the six above 2⁻²⁴ are taken. Two parts would leave 2⁻¹⁷, a hundred times the
rounding of fp32.

Bytes: each tile row reads T·H·itemsize once per tile in it, from L2; the matrix moves 4·H² a
launch. Bound by the tensor cores from about 500 channels on. On GPUs with a tensor memory
accelerator `gram_tma` takes calls without offsets, gate and weights.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grail_kernels import gram_blocks, gram_tma, tuning
from grail_kernels.gram_blocks import (
    Launch,
    add_collected,
    add_tile,
    products_of_parts,
    program_of,
    tile_of,
)
from grail_kernels.gram_call import GramCall
from grail_kernels.gram_torch import ungated_blocks


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
                if weights_ptr is not None:
                    row_x = row_x.to(tl.float32) * weights[None, :]
                # Summed separately, so that the long chain of additions gets one a step, not six.
                total += products_of_parts(row_x.to(tl.float32), col_x.to(tl.float32), OPERAND)
        add_tile(out_ptr + target * out_stride, total, tile_row, tile_column, H, STRIP, BLOCK_H)


def launch_gram(call: GramCall) -> None:
    """Adds the Gram matrices of a checked call."""
    if not call.x.numel() or not call.out.numel():
        return
    if call.gate is not None and call.gate.stride() != call.x.stride():
        for single in call.single_matrices():
            for ungated in ungated_blocks(single):
                launch_gram(ungated)
        return
    batch = call.as_batch()
    with torch.cuda.device_of(batch.x):
        if gram_tma.takes(batch):
            launch = gram_tma.launch_of(batch)
            for part in _parts(batch):
                gram_tma.add_tokens(launch, part.x, part.mask)
        elif batch.offsets is not None:
            # Each expert sees all tokens and takes its own.
            batch = batch._replace(offsets=batch.offsets.to(batch.x.device))
            _add_parts([_flat(batch, lambda x: x.expand(batch.out.shape[0], 1, -1, -1))])
        else:
            _add_parts(list(_parts(batch)))


def _add_parts(parts: list[GramCall]) -> None:
    """Launches the pointer kernel for each part of a call, all in the way that suits the first."""
    batch, first = parts[0], parts[0].x
    dtype, is_weighted = first.dtype, batch.weights is not None
    config = tuning.gram_config(
        dtype,
        first.shape[-1],
        weighted=is_weighted,
        gated=batch.gate is not None,
        aligned=_is_aligned(first),
        architecture=tuning.architecture_of(first.device),
    )
    fixed = constants(config, dtype, is_weighted, repeats=first.shape[1] > 1)
    launch = Launch(_gram_kernel, config, fixed, batch, splits_tokens=batch.offsets is None)
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


def _parts(batch: GramCall) -> Iterator[GramCall]:
    """A flat call for each launch: views that a kernel can walk, of no more tokens than suit it."""
    shape = _mergeable_shape(batch.x)
    if shape is None:
        for index in range(batch.x.shape[1]):
            yield from _parts(
                batch.at((slice(None), index), "x", "gate").at(index, *batch.per_token)
            )
        return
    flat = _flat(batch, lambda x: x.view(shape))
    for part, tokens in _launches(flat.x):
        yield flat.at(part, "x", "gate").at(tokens, *flat.per_token)


def _flat(batch: GramCall, view: Callable[[Tensor], Tensor]) -> GramCall:
    """The call with x and gate as `view` makes them, [E, outer, inner, H], and flat tokens [T]."""
    return batch._replace(
        x=view(batch.x),
        gate=None if batch.gate is None else view(batch.gate),
        mask=None if batch.mask is None else batch.mask.reshape(-1).view(torch.uint8),
        weights=None if batch.weights is None else batch.weights.reshape(-1).float(),
    )


def _launches(x: Tensor) -> Iterator[tuple[tuple[slice, ...], slice]]:
    """The index into `x` [E, outer, inner, H] of each launch, and the slice of its tokens."""
    _, outer, inner, _ = x.shape
    most = tuning.LAUNCHED_TOKENS
    each = max(1, most // inner)
    for first in range(0, outer, each):
        of_outer = slice(first, min(first + each, outer))
        for start in range(0, inner, most):  # more than one only where `each` is 1
            of_inner = slice(start, min(start + most, inner))
            end = (of_outer.stop - 1) * inner + of_inner.stop
            yield (slice(None), of_outer, of_inner), slice(first * inner + start, end)


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


def constants(
    config: tuning.GramConfig, dtype: torch.dtype, weighted: bool, repeats: bool
) -> dict[str, Any]:
    """The compile-time arguments of the kernel; `bench/tools/aot.py` compiles with the same."""
    parts = 1 if tuning.multiplies_natively(dtype, weighted) else 3
    return gram_blocks.constants(config, parts, dtype) | {"REPEATS": repeats}


def _is_aligned(x: Tensor) -> bool:
    """Returns whether the kernel can read 16 bytes of `x` [E, outer, inner, H] at once."""
    _, _, inner, channels = x.shape
    run = channels if x.stride(3) == 1 else inner if x.stride(2) == 1 else 1
    lengths = (run, *(stride for stride in x.stride() if stride != 1))
    return x.data_ptr() % 16 == 0 and all(length % 16 == 0 for length in lengths)
