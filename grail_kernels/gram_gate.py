"""The hidden activation of a gated MLP, silu(gate)·up, stored for another Gram kernel to read.

`gram_triton` forms it while loading, which repeats the exponential in every tile that reads a block
and takes the registers of asynchronous loads: 16.4 ms on an H100 for 16,384 tokens of 11,008
channels (bench/results/gpu/tuning.csv). Stored once it costs 3·T·H·itemsize bytes of traffic and
T·H·itemsize of memory; with the kernel of `gram_tma` 4.7 ms are predicted, not measured.
"""

import math

import triton
import triton.language as tl

from grail_kernels import tuning
from grail_kernels.gram_call import GramCall
from grail_kernels.gram_plan import Plan


@triton.jit
def silu_product(gate, x):
    """silu(gate)·x in fp32, each rounded to the dtype of `x` as eager models round it."""
    gate = gate.to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(x.dtype)
    return (silu.to(tl.float32) * x.to(tl.float32)).to(x.dtype)


@triton.jit(do_not_specialize=["outer", "inner"])
def _form_kernel(
    hidden_ptr,  # [matrices, outer * inner, H]
    x_ptr,  # [matrices, outer, inner, H]
    gate_ptr,  # the same
    H,
    outer,
    inner,
    stride_xm,
    stride_xo,
    stride_xt,
    stride_xc,
    stride_gm,
    stride_go,
    stride_gt,
    stride_gc,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """A block of tokens and channels of one matrix."""
    tokens = outer * inner
    # The matrices share the first axis of the grid: the others end at 65,535.
    blocks = tl.cdiv(tokens, BLOCK_T)
    matrix = (tl.program_id(0) // blocks).to(tl.int64)
    token = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    channels = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = (token < tokens)[:, None] & (channels < H)[None, :]
    repeat, step = token // inner, token % inner
    places = (matrix * stride_xm + repeat * stride_xo + step * stride_xt)[:, None]
    x = tl.load(x_ptr + places + channels[None, :] * stride_xc, mask=mask)
    places = (matrix * stride_gm + repeat * stride_go + step * stride_gt)[:, None]
    gate = tl.load(gate_ptr + places + channels[None, :] * stride_gc, mask=mask)
    rows = (matrix * tokens + token)[:, None] * H
    tl.store(hidden_ptr + rows + channels[None, :], silu_product(gate, x), mask=mask)


def form(plan: Plan, part: GramCall, config: tuning.GramConfig) -> GramCall:
    """The part with its hidden activation in the plan's scratch, and no gate."""
    assert part.gate is not None
    # Experts share their tokens.
    x, gate = (t if part.offsets is None else t[:1] for t in (part.x, part.gate))
    matrices, outer, inner, channels = x.shape
    tokens = outer * inner
    hidden = plan.scratch("hidden", (matrices, 1, tokens, channels), x.dtype)
    names = ("m", "o", "t", "c")
    plan.launch(
        _form_kernel,
        (
            matrices * math.ceil(tokens / config.block_tokens),
            math.ceil(channels / config.block_channels),
        ),
        hidden_ptr=hidden,
        x_ptr=x,
        gate_ptr=gate,
        H=channels,
        outer=outer,
        inner=inner,
        **{f"stride_x{name}": step for name, step in zip(names, x.stride(), strict=True)},
        **{f"stride_g{name}": step for name, step in zip(names, gate.stride(), strict=True)},
        BLOCK_T=config.block_tokens,
        BLOCK_H=config.block_channels,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return part._replace(x=hidden.expand(part.x.shape[0], -1, -1, -1), gate=None)
