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

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

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


class _Part(NamedTuple):
    """Tokens of one launch, as the kernel walks them."""

    x: Tensor  # [E, outer, inner, H]
    gate: Tensor | None  # as x
    mask: Tensor | None  # [outer * inner] uint8
    weights: Tensor | None  # [outer * inner] fp32


def launch_gram(call: GramCall) -> None:
    """Add the Gram matrices of a checked call."""
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
            for part in _parts(batch.x, None, batch.mask, None):
                gram_tma.add_tokens(launch, part.x, part.mask)
        elif batch.offsets is not None:
            batch = batch._replace(offsets=batch.offsets.to(batch.x.device))
            _add_parts(batch, [_ragged_part(batch)])
        else:
            _add_parts(batch, list(_parts(batch.x, batch.gate, batch.mask, batch.weights)))


def _add_parts(batch: GramCall, parts: list[_Part]) -> None:
    """Launch the pointer kernel for each part of a call, all in the way that suits the first."""
    dtype, is_weighted = batch.x.dtype, batch.weights is not None
    first = parts[0].x
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
        read = {f"{name}_ptr": tensor for name, tensor in part._asdict().items()}
        read |= dict(zip(strides, part.x.stride(), strict=True))
        launch.add(
            outer * inner,
            outer * math.ceil(inner / config.block_tokens),
            offsets_ptr=batch.offsets,
            outer=outer,
            inner=inner,
            **read,
        )


def _parts(
    x: Tensor,  # [E, ..., H]
    gate: Tensor | None,  # as x
    mask: Tensor | None,  # [...]
    weights: Tensor | None,  # [...]
) -> Iterator[_Part]:
    """The tokens of a call, in views that the kernel can walk and in numbers that suit a launch."""
    shape = _mergeable_shape(x)
    if shape is None:
        for index in range(x.shape[1]):
            own_mask, own_weights = (None if t is None else t[index] for t in (mask, weights))
            own_gate = None if gate is None else gate[:, index]
            yield from _parts(x[:, index], own_gate, own_mask, own_weights)
        return
    x = x.view(shape)
    gate = None if gate is None else gate.view(shape)
    per_token = _flat(mask, weights)
    for part, tokens in _launches(x):
        own_mask, own_weights = (None if t is None else t[tokens] for t in per_token)
        yield _Part(x[part], None if gate is None else gate[part], own_mask, own_weights)


def _ragged_part(batch: GramCall) -> _Part:
    """All tokens of a call with offsets: each matrix sees them all, and takes its own."""
    experts = batch.out.shape[0]
    x, gate = (None if t is None else t.expand(experts, 1, -1, -1) for t in (batch.x, batch.gate))
    assert x is not None
    return _Part(x, gate, *_flat(batch.mask, batch.weights))


def _flat(mask: Tensor | None, weights: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Mask and weights [T] in the dtypes that the kernel reads."""
    return (
        None if mask is None else mask.reshape(-1).view(torch.uint8),
        None if weights is None else weights.reshape(-1).float(),
    )


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
    """The compile-time arguments of the kernel; `bench/aot.py` compiles with the same."""
    parts = 1 if tuning.multiplies_natively(dtype, weighted) else 3
    return gram_blocks.constants(config, parts, dtype) | {"REPEATS": repeats}


def _is_aligned(x: Tensor) -> bool:
    """Whether the kernel can read 16 bytes of `x` [E, outer, inner, H] at once."""
    _, _, inner, channels = x.shape
    run = channels if x.stride(3) == 1 else inner if x.stride(2) == 1 else 1
    lengths = (run, *(stride for stride in x.stride() if stride != 1))
    return x.data_ptr() % 16 == 0 and all(length % 16 == 0 for length in lengths)
