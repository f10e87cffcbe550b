"""The Triton kernel for GPUs with a tensor memory accelerator (TMA): sm_90.

Tiles are those of `gram_triton`, but a program names the blocks of activations and the copy engine
brings them into shared memory, with zeros where the activations end. That leaves registers for
twice the tokens a step, and the loop computes no address.

The engine reads bf16 or fp16 [matrices, tokens, channels] in rows of 16 aligned bytes. Activations
stored so are read in place. Others are first laid out so, a block of tokens at a time: those with
other strides, those with a mask, which leaves zeros, and fp32, which becomes three bf16 parts
(or by `gram_halves` two fp16 parts of scaled channels).

Bytes: each tile reads 2·T·BLOCK_H·itemsize from L2, which at 128 × 128 bounds it as much as the
tensor cores do; the matrix moves 4·H² a launch. Laying out reads and writes the activations once.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from grail_kernels import tuning
from grail_kernels.backend import interpreting
from grail_kernels.gram_blocks import (
    Launch,
    add_collected,
    add_tile,
    constants,
    program_of,
    six_products,
    three_products,
    tile_of,
)
from grail_kernels.gram_call import GramCall
from grail_kernels.gram_plan import Plan

# A descriptor's addresses and strides are multiples of so many bytes; and its range in bytes.
_ALIGNMENT = 16
_REACH = 2**40


@triton.jit
def _load_block(
    x, matrix, token, channel, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, OPERAND: tl.constexpr
):
    """A block [BLOCK_T, BLOCK_H] of one matrix as OPERAND, zeros beyond its end."""
    return x.load([matrix, token, channel]).reshape(BLOCK_T, BLOCK_H).to(OPERAND)


@triton.jit(do_not_specialize=["matrices", "span"])
def _gram_tma_kernel(
    out_ptr,  # [splits, matrices, P]
    x_desc,  # [matrices * PARTS, tokens, H]
    sums_ptr,  # [splits, matrices, H], or None
    nonfinite_ptr,  # [splits, matrices, H], or None
    inverse_ptr,  # [matrices, H], factors of the channels with two parts, else None
    H,
    tokens,
    matrices,
    span,
    out_stride,
    STRIP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
    CHAIN: tl.constexpr,
    PARTS: tl.constexpr,
    OPERAND: tl.constexpr,
    STORES: tl.constexpr,
):
    """One tile of one matrix over `span` steps; with sums or counts, first a block of channels."""
    collects: tl.constexpr = sums_ptr is not None or nonfinite_ptr is not None
    matrix, program, collectors, tile_rows = program_of(H, collects, BLOCK_H)
    split = tl.program_id(1).to(tl.int64)
    target = split * matrices + matrix
    first = matrix.to(tl.int32) * PARTS
    first_step = split.to(tl.int32) * span
    end_step = tl.minimum(first_step + span, tl.cdiv(tokens, BLOCK_T))

    if program < collectors:
        channel = (program * BLOCK_H).to(tl.int32)
        sums = tl.zeros([BLOCK_H], tl.float32)
        counts = tl.zeros([BLOCK_H], tl.int32)
        for step in range(first_step, end_step):
            x = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
            for part in tl.static_range(PARTS - 1, -1, -1):
                token = step * BLOCK_T
                x += _load_block(x_desc, first + part, token, channel, BLOCK_T, BLOCK_H, tl.float32)
            is_finite = tl.abs(x) < float("inf")
            counts += tl.sum((~is_finite).to(tl.int32), axis=0)
            sums += tl.sum(x, axis=0)
        channels = channel + tl.arange(0, BLOCK_H)
        if inverse_ptr is not None:
            sums *= tl.load(inverse_ptr + matrix * H + channels, mask=channels < H, other=0.0)
        add_collected(
            sums_ptr, nonfinite_ptr, target * H, sums, counts, channels, channels < H, STORES
        )
    else:
        tile_row, tile_column = tile_of(program - collectors, tile_rows, GROUP)
        row = (tile_row * BLOCK_H).to(tl.int32)
        column = (tile_column * BLOCK_H).to(tl.int32)
        total = tl.zeros([BLOCK_H, BLOCK_H], tl.float32)
        chain = tl.zeros([BLOCK_H, BLOCK_H], tl.float32)
        for step in range(first_step, end_step):
            token = step * BLOCK_T
            if PARTS == 1:
                rows = _load_block(x_desc, first, token, row, BLOCK_T, BLOCK_H, OPERAND)
                cols = _load_block(x_desc, first, token, column, BLOCK_T, BLOCK_H, OPERAND)
                link = (step - first_step) % CHAIN
                if link == 0:
                    chain = tl.zeros([BLOCK_H, BLOCK_H], tl.float32)
                chain = tl.dot(rows.T, cols, chain, input_precision="ieee")
                if (link == CHAIN - 1) | (step == end_step - 1):
                    total += chain
            elif PARTS == 2:
                high = _load_block(x_desc, first, token, row, BLOCK_T, BLOCK_H, OPERAND).T
                col_high = _load_block(x_desc, first, token, column, BLOCK_T, BLOCK_H, OPERAND)
                low = _load_block(x_desc, first + 1, token, row, BLOCK_T, BLOCK_H, OPERAND).T
                col_low = _load_block(x_desc, first + 1, token, column, BLOCK_T, BLOCK_H, OPERAND)
                total += three_products(high, low, col_high, col_low)
            else:
                high = _load_block(x_desc, first, token, row, BLOCK_T, BLOCK_H, OPERAND).T
                col_high = _load_block(x_desc, first, token, column, BLOCK_T, BLOCK_H, OPERAND)
                mid = _load_block(x_desc, first + 1, token, row, BLOCK_T, BLOCK_H, OPERAND).T
                col_mid = _load_block(x_desc, first + 1, token, column, BLOCK_T, BLOCK_H, OPERAND)
                low = _load_block(x_desc, first + 2, token, row, BLOCK_T, BLOCK_H, OPERAND).T
                col_low = _load_block(x_desc, first + 2, token, column, BLOCK_T, BLOCK_H, OPERAND)
                # A step's products are summed before they join the long chain.
                total += six_products(high, mid, low, col_high, col_mid, col_low)
        if inverse_ptr is not None:
            within = tl.arange(0, BLOCK_H)
            inverse_ptr += matrix * H
            rows = tl.load(inverse_ptr + row + within, mask=row + within < H, other=0.0)
            cols = tl.load(inverse_ptr + column + within, mask=column + within < H, other=0.0)
            total = total * rows[:, None] * cols[None, :]
        out_ptr += target * out_stride
        add_tile(out_ptr, total, tile_row, tile_column, H, STRIP, BLOCK_H, STORES)


@triton.jit
def load_tokens(
    x_ptr,
    mask_ptr,
    own,
    channels,
    H,
    inner,
    first_token,
    tokens,
    matrix,
    stride_xm,
    stride_xo,
    stride_xt,
    stride_xc,
):
    """Tokens [BLOCK_T] of a block of `tokens` from `first_token` on; zeros where the mask is."""
    token = first_token + own
    takes_part = own < tokens
    if mask_ptr is not None:
        takes_part &= tl.load(mask_ptr + token, mask=takes_part, other=0) != 0
    places = matrix * stride_xm + token // inner * stride_xo + token % inner * stride_xt
    return tl.load(
        x_ptr + (places[:, None] + channels[None, :] * stride_xc),
        mask=takes_part[:, None] & (channels < H)[None, :],
        other=0.0,
    )


@triton.jit(do_not_specialize=["inner", "first_token", "tokens"])
def _lay_kernel(
    laid_ptr,  # [matrices * PARTS, tokens, width]
    x_ptr,  # [matrices, outer, inner, H]
    mask_ptr,  # [outer * inner], or None
    H,
    width,
    inner,
    first_token,
    tokens,
    stride_xm,
    stride_xo,
    stride_xt,
    stride_xc,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Lays out a block of `tokens` tokens from `first_token` on, zeros where the mask is."""
    # The matrices share the first axis of the grid: the others end at 65,535.
    blocks = tl.cdiv(tokens, BLOCK_T)
    matrix = (tl.program_id(0) // blocks).to(tl.int64)
    own = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    channels = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    x = load_tokens(
        x_ptr,
        mask_ptr,
        own,
        channels,
        H,
        inner,
        first_token,
        tokens,
        matrix,
        stride_xm,
        stride_xo,
        stride_xt,
        stride_xc,
    )
    laid_ptr += matrix * PARTS * tokens * width
    part_stride = (tl.zeros([], tl.int64) + tokens) * width
    offsets = own[:, None] * width + channels[None, :]
    mask = (own < tokens)[:, None] & (channels < width)[None, :]
    for part in tl.static_range(PARTS):
        high = x.to(laid_ptr.dtype.element_ty)
        tl.store(laid_ptr + part * part_stride + offsets, high, mask=mask)
        if PARTS > 1:
            x -= high.to(tl.float32)


def runs_on(device: torch.device) -> bool:
    """Returns whether this kernel is for the GPU `device`: sm_90.

    Triton 3.6 fails to compile for sm_100 what reads through the engine here.
    """
    return interpreting() if device.type != "cuda" else tuning.architecture_of(device) == "sm_90"


def takes(part: GramCall) -> bool:
    """Returns whether this kernel is for the call: its GPU, and no weights, gate or offsets."""
    plain = part.weights is None and part.gate is None and part.offsets is None
    return plain and runs_on(part.out.device)


def add(plan: Plan, parts: list[GramCall], config: tuning.GramConfig) -> None:
    """Adds launches of the kernel for each part of a call."""
    count, dtype = _laid_form(parts[0].x.dtype)
    launch = Launch(plan, _gram_tma_kernel, config, constants(config, count, dtype), parts[0])
    for part in parts:
        add_tokens(launch, part.x, part.mask)


def add_tokens(
    launch: Launch,
    x: Tensor,  # [E, outer, inner, H]
    mask: Tensor | None,  # [outer * inner] uint8
) -> None:
    """Adds tokens of the launch's call."""
    for laid in laid_out(launch.plan, x, mask):
        add_laid(launch, laid)


def laid_out(plan: Plan, x: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
    """Tokens of `x` [E, outer, inner, H] as the engine reads them, [E * parts, T, H or more].

    What it can read in place is not copied; else the tokens are laid out in blocks.
    """
    _, outer, inner, _ = x.shape
    if mask is None and outer == 1 and _is_laid(x):
        yield x[:, 0]
        return
    at_once = tuning.BUFFER_TOKENS  # enough to make up for reading G again
    for first in range(0, outer * inner, at_once):
        tokens = min(at_once, outer * inner - first)
        yield _lay(plan, x, mask, first, tokens)


def _is_laid(x: Tensor) -> bool:
    """Returns whether the engine can read `x` [E, 1, T, H] in place."""
    steps = [stride * x.element_size() for stride in (x.stride(0), x.stride(2))]
    return (
        x.dtype != torch.float32
        and x.stride(3) == 1
        and x.data_ptr() % _ALIGNMENT == 0
        and all(0 < step < _REACH and step % _ALIGNMENT == 0 for step in steps)
    )


def _lay(plan: Plan, x: Tensor, mask: Tensor | None, first: int, tokens: int) -> Tensor:
    """Those tokens of `x` [E, outer, inner, H] as [E * parts, tokens, H or a little more]."""
    matrices, _, inner, channels = x.shape
    parts, dtype = _laid_form(x.dtype)
    width = math.ceil(channels * dtype.itemsize / _ALIGNMENT) * _ALIGNMENT // dtype.itemsize
    laid = plan.scratch("laid", (matrices * parts, tokens, width), dtype)
    block = {"BLOCK_T": 32, "BLOCK_H": 128}  # that one program lays out
    grid = (matrices * math.ceil(tokens / block["BLOCK_T"]), math.ceil(width / block["BLOCK_H"]))
    sizes = {"H": channels, "width": width, "inner": inner, "first_token": first, "tokens": tokens}
    strides = dict(
        zip(("stride_xm", "stride_xo", "stride_xt", "stride_xc"), x.stride(), strict=True)
    )
    tensors = {"laid_ptr": laid, "x_ptr": x, "mask_ptr": mask}
    plan.launch(_lay_kernel, grid, **tensors, **sizes, **strides, **block, PARTS=parts)
    return laid


def add_laid(launch: Launch, laid: Tensor, inverse: Tensor | None = None) -> None:
    """Adds tokens laid out as [E * parts, T, H or more]; `inverse` [E, H] scales channels."""
    block = [1, launch.config.block_tokens, launch.config.block_channels]
    shape = [*laid.shape[:2], launch.batch.x.shape[-1]]
    descriptor = TensorDescriptor(laid, shape, list(laid.stride()), block)
    tokens = laid.shape[1]
    steps = math.ceil(tokens / launch.config.block_tokens)
    launch.add(tokens, steps, x_desc=descriptor, inverse_ptr=inverse, tokens=tokens)


def _laid_form(dtype: torch.dtype) -> tuple[int, torch.dtype]:
    """The number and the dtype of the parts that activations are laid out in."""
    return (3, torch.bfloat16) if dtype == torch.float32 else (1, dtype)
