"""The Gram of fp32 activations by three products of fp16 parts, not six of bf16.

Each channel is multiplied by a power of two, s = 2ᵏ, that brings its largest value below 2¹⁵. Then

    s·x ≈ h + l,    h = fp16(s·x),  l = fp16(s·x − h)
    Gᵢⱼ ≈ (Σ h h + Σ h l + Σ l h) / (sᵢ sⱼ)

The division is exact. A product of two fp16 is exact in fp32. h and l have 22 bits, and l·l is left
out: an error of at most 2⁻²⁰ of a product, 0.4 eps of Σ|x||x| on normal values, 1.7 on
exp(2·normal). Values below 2⁻³² of their channel's largest lose bits: l is 2⁻²⁵ absolute there.

G is symmetric: its lower triangle is computed, and read as both. It is (H + L)ᵀ(H + L) − LᵀL up to
the rounding of sums, so that its smallest eigenvalue is above −‖L‖² ≥ −2⁻²² of the trace.

Blocks of activations are laid out for the engine and the kernel of `gram_tma`. The largest values
of the channels take one more read of the activations. Not measured on a GPU: half the products of
`gram_tma`, which took 12.6 ms for 65,536 tokens of 4096 channels on an H100.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from grail_kernels import gram_tma, tuning
from grail_kernels.gram_blocks import Launch, constants
from grail_kernels.gram_call import GramCall
from grail_kernels.gram_plan import Plan
from grail_kernels.gram_tma import load_tokens

# Programs that share the tokens of a channel when they look for its largest value; and what one
# program reads at a time.
_SEARCHERS, _BLOCK = 16, {"BLOCK_T": 32, "BLOCK_H": 128}


@triton.jit(do_not_specialize=["inner", "first_token", "tokens"])
def _largest_kernel(
    largest_ptr,  # [matrices, SEARCHERS, H]
    x_ptr,  # [matrices, outer, inner, H]
    mask_ptr,  # [outer * inner], or None
    H,
    inner,
    first_token,
    tokens,
    stride_xm,
    stride_xo,
    stride_xt,
    stride_xc,
    SEARCHERS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The largest finite magnitudes of a block of channels, in a share of the tokens."""
    matrix = (tl.program_id(0) // SEARCHERS).to(tl.int64)
    searcher = (tl.program_id(0) % SEARCHERS).to(tl.int64)
    channels = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    largest = tl.zeros([BLOCK_H], tl.float32)
    for step in range(searcher * BLOCK_T, tokens, SEARCHERS * BLOCK_T):
        own = step + tl.arange(0, BLOCK_T)
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
        size = tl.abs(x)
        largest = tl.maximum(largest, tl.max(tl.where(size < float("inf"), size, 0.0), axis=0))
    largest_ptr += (matrix * SEARCHERS + searcher) * H
    tl.store(largest_ptr + channels, largest, mask=channels < H)


@triton.jit(do_not_specialize=["inner", "first_token", "tokens"])
def _lay_halves_kernel(
    laid_ptr,  # [matrices * 2, tokens, width]
    inverse_ptr,  # [matrices, H]
    largest_ptr,  # [matrices, SEARCHERS, H]
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
    SEARCHERS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Lays out a block of tokens in two parts, and 1 / s of its channels."""
    blocks = tl.cdiv(tokens, BLOCK_T)
    matrix = (tl.program_id(0) // blocks).to(tl.int64)
    own = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    channels = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    searchers = tl.arange(0, SEARCHERS)[:, None]
    found = tl.load(
        largest_ptr + (matrix * SEARCHERS + searchers) * H + channels[None, :],
        mask=(searchers < SEARCHERS) & (channels < H)[None, :],
        other=0.0,
    )
    # The exponent's bits e of the largest value, which is below 2^(e - 126): s = 2^(141 - e). As
    # bits of fp32 that is 268 - e; 1 / s is e - 14, a normal number from e = 15 on.
    bits = tl.max(found, axis=0).to(tl.int32, bitcast=True) >> 23
    bits = tl.maximum(bits, 15)
    scale = ((268 - bits) << 23).to(tl.float32, bitcast=True)
    if tl.program_id(0) % blocks == 0:
        inverse = ((bits - 14) << 23).to(tl.float32, bitcast=True)
        tl.store(inverse_ptr + matrix * H + channels, inverse, mask=channels < H)
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
    x *= scale[None, :]
    laid_ptr += matrix * 2 * tokens * width
    part_stride = (tl.zeros([], tl.int64) + tokens) * width
    offsets = own[:, None] * width + channels[None, :]
    mask = (own < tokens)[:, None] & (channels < width)[None, :]
    high = x.to(tl.float16)
    tl.store(laid_ptr + offsets, high, mask=mask)
    tl.store(laid_ptr + part_stride + offsets, (x - high.to(tl.float32)).to(tl.float16), mask=mask)


def takes(part: GramCall) -> bool:
    """Returns whether this kernel is for the call: fp32, and otherwise as `gram_tma`."""
    return part.x.dtype == torch.float32 and gram_tma.takes(part)


def add(plan: Plan, parts: list[GramCall], config: tuning.GramConfig) -> None:
    """Adds launches of the kernels for each part of a call, in blocks of tokens."""
    fixed = constants(config, 2, torch.float16)
    launch = Launch(plan, gram_tma._gram_tma_kernel, config, fixed, parts[0])
    for part in parts:
        _, outer, inner, _ = part.x.shape
        for first in range(0, outer * inner, tuning.BUFFER_TOKENS):
            tokens = min(tuning.BUFFER_TOKENS, outer * inner - first)
            laid, inverse = _lay(plan, part.x, part.mask, first, tokens)
            gram_tma.add_laid(launch, laid, inverse)


def _lay(
    plan: Plan, x: Tensor, mask: Tensor | None, first: int, tokens: int
) -> tuple[Tensor, Tensor]:
    """Tokens of `x` [E, outer, inner, H] as [E * 2, tokens, H or more] fp16, and 1 / s [E, H]."""
    matrices, _, inner, channels = x.shape
    width = math.ceil(channels / 8) * 8  # rows of 16 bytes
    laid = plan.scratch("laid", (matrices * 2, tokens, width), torch.float16)
    inverse = plan.scratch("inverse", (matrices, channels), torch.float32)
    largest = plan.scratch("largest", (matrices, _SEARCHERS, channels), torch.float32)
    names = ("stride_xm", "stride_xo", "stride_xt", "stride_xc")
    read = {"largest_ptr": largest, "x_ptr": x, "mask_ptr": mask, "H": channels, "inner": inner}
    read |= {"first_token": first, "tokens": tokens, "SEARCHERS": _SEARCHERS, **_BLOCK}
    read |= dict(zip(names, x.stride(), strict=True))
    blocks = math.ceil(width / _BLOCK["BLOCK_H"])
    plan.launch(_largest_kernel, (matrices * _SEARCHERS, blocks), **read)
    grid = (matrices * math.ceil(tokens / _BLOCK["BLOCK_T"]), blocks)
    plan.launch(_lay_halves_kernel, grid, laid_ptr=laid, inverse_ptr=inverse, width=width, **read)
    return laid, inverse
