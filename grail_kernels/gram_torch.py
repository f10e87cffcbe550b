"""The torch twin of the Gram kernels: a library's GEMMs, strip by strip or tile by tile."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from grail_kernels import cpu_blas
from grail_kernels.gram_call import GramCall
from grail_kernels.precision import full_fp32
from grail_kernels.tiles import strips

# Activations copied at a time where they must be upcast, gathered or weighted: 32 MB of fp32 stay
# near the cache. The bounds limit the accumulator's traffic (4·H² bytes a block) and the number of
# GEMMs.
_BLOCK_ELEMENTS = 2**23
_FEWEST_TOKENS, _MOST_TOKENS = 1024, 8192

# With fewer rows than this a GEMM adds all tokens in one chain (MKL: an error of 35 eps at 4097
# tokens, 800 at 200k, instead of 3 and 13): so few rows are summed in fp64.
_GEMM_ROWS = 16


@torch.no_grad()
def add_gram(call: GramCall) -> None:
    """Adds the Gram matrices of a checked call.

    Matrix by matrix: one torch.bmm takes 1.0 to 1.5 times the processor time of this.
    """
    with full_fp32(call.x.device):
        for single in call.single_matrices():
            for ungated in ungated_blocks(single):
                _add_single(ungated)


def ungated_blocks(call: GramCall) -> Iterator[GramCall]:
    """The call of one matrix with silu(gate)·x formed, a block of tokens at a time."""
    if call.gate is None:
        yield call
        return
    for index in _block_indices(call.x.shape[:-1], block_tokens(call.x.shape[-1])):
        hidden = F.silu(call.gate[index]) * call.x[index]
        yield call.at(index, *call.per_token)._replace(x=hidden, gate=None)


def _add_single(call: GramCall) -> None:
    """Adds the Gram matrix of `x`, which no gate multiplies."""
    for tokens, scales in _token_blocks(call.x, call.mask, call.weights):
        weighted = tokens if scales is None else tokens * scales[:, None]
        if call.sums is not None or call.nonfinite is not None:
            _collect(tokens, weighted.sum(0), call.sums, call.nonfinite)
        if cpu_blas.takes(tokens):
            cpu_blas.add_gram(call.out, weighted, tokens)
            continue
        for strip in strips(call.x.shape[-1]):
            rows = weighted[:, strip.low : strip.high]
            _add_products(strip.view(call.out), rows, tokens[:, : strip.high])


def _collect(
    tokens: Tensor, token_sums: Tensor, sums: Tensor | None, nonfinite: Tensor | None
) -> None:
    """Adds the sums [H] of a block of tokens [t, H], and count its non-finite values."""
    if sums is not None:
        sums += token_sums
    # A NaN or an infinity always shows in the sum of its channel, so a clean block is not searched.
    if nonfinite is not None and not torch.isfinite(token_sums).all():
        nonfinite += (~torch.isfinite(tokens)).sum(0)


def _add_products(target: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Adds rowsᵀ [R, T] @ columns [T, C] to target [R, C]."""
    if rows.shape[1] >= _GEMM_ROWS:
        target.addmm_(rows.T, columns)
        return
    tokens = block_tokens(columns.shape[1])
    for block_rows, block_columns in zip(rows.split(tokens), columns.split(tokens), strict=True):
        target += block_rows.T.double() @ block_columns.double()


def _token_blocks(
    x: Tensor, mask: Tensor | None, weights: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The tokens that take part, as GEMM operands [t, H] fp32, with their weights [t] fp32.

    Activations that a GEMM can read where they lie come whole; others are copied block by block.
    """
    x = _merge_tokens(x)
    takes_part = None if mask is None else mask.reshape(x.shape[:-1])
    if weights is not None:
        weights = weights.reshape(x.shape[:-1])
        takes_part = (weights != 0) if takes_part is None else takes_part & (weights != 0)
    elif takes_part is None and _is_gemm_operand(x):
        yield x, None
        return
    most = block_tokens(x.shape[-1])
    buffer = x.new_empty(min(math.prod(x.shape[:-1]), most), x.shape[-1], dtype=torch.float32)
    for index in _block_indices(x.shape[:-1], most):
        part = x[index].reshape(-1, x.shape[-1])
        scales = None if weights is None else weights[index].flatten().float()
        if takes_part is not None:
            kept = takes_part[index].flatten().nonzero().flatten()
            part = part.index_select(0, kept)
            scales = None if scales is None else scales.index_select(0, kept)
        yield buffer[: part.shape[0]].copy_(part), scales


def _merge_tokens(x: Tensor) -> Tensor:
    """`x` [..., H] as a view [T, H] where its strides allow it, else with its own dimensions."""
    try:
        return x.view(-1, x.shape[-1])
    except RuntimeError:
        return x


def _is_gemm_operand(x: Tensor) -> bool:
    """Returns whether a GEMM reads `x` without a copy: fp32 with contiguous rows or columns."""
    if x.dtype != torch.float32 or x.dim() != 2:
        return False
    (tokens, channels), (token_stride, channel_stride) = x.shape, x.stride()
    by_rows = channel_stride == 1 and token_stride >= channels
    by_columns = token_stride == 1 and channel_stride >= tokens
    return by_rows or by_columns


def block_tokens(channels: int) -> int:
    """The number of tokens that are copied at a time: whole chunks of a product."""
    most = max(_FEWEST_TOKENS, min(_BLOCK_ELEMENTS // channels, _MOST_TOKENS))
    return most - most % cpu_blas.CHUNK_TOKENS


def _block_indices(shape: torch.Size, most: int) -> Iterator[tuple[int | slice, ...]]:
    """Indices that cut leading dimensions of `shape` into blocks of at most `most` tokens."""
    if not shape:  # one token
        yield ()
        return
    each = math.prod(shape[1:])
    if each > most:
        for position in range(shape[0]):
            for rest in _block_indices(shape[1:], most):
                yield (position, *rest)
        return
    step = most // max(each, 1)
    for start in range(0, shape[0], step):
        yield (slice(start, start + step),)
