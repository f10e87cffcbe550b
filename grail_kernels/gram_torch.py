"""The torch twin of the Gram kernels: a library's GEMMs, strip by strip or tile by tile."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from grail_kernels import cpu_blas
from grail_kernels.cpu_blas import block_tokens
from grail_kernels.gram_call import GramCall
from grail_kernels.precision import full_fp32
from grail_kernels.tiles import strips

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
        if call.sums is not None or call.nonfinite is not None:
            weighted = tokens if scales is None else tokens * scales[:, None]
            sums = weighted.sum(0, dtype=torch.float32)
            _collect(tokens, sums, call.sums, call.nonfinite)
        if cpu_blas.takes(tokens):
            cpu_blas.add_gram(call.out, tokens, scales)
        else:
            _add_strips(call.out, tokens, scales)


def _collect(
    tokens: Tensor, token_sums: Tensor, sums: Tensor | None, nonfinite: Tensor | None
) -> None:
    """Adds the sums [H] of a block of tokens [t, H], and count its non-finite values."""
    if sums is not None:
        sums += token_sums
    # A NaN or an infinity always shows in the sum of its channel, so a clean block is not searched.
    if nonfinite is not None and not torch.isfinite(token_sums).all():
        nonfinite += (~torch.isfinite(tokens)).sum(0)


def _add_strips(out: Tensor, tokens: Tensor, scales: Tensor | None) -> None:
    """Adds tokensᵀ diag(scales) tokens to the packed `out` by a library's products."""
    channels = tokens.shape[1]
    step = tokens.shape[0] if tokens.dtype == torch.float32 else block_tokens(channels)
    for first in range(0, tokens.shape[0], max(step, 1)):
        columns = tokens[first : first + step].float()
        rows = columns if scales is None else columns * scales[first : first + step, None]
        for strip in strips(channels):
            part = rows[:, strip.low : strip.high]
            _add_products(strip.view(out), part, columns[:, : strip.high])


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
    """The tokens that take part [t, H], with their weights [t] fp32.

    Where all take part and `x` is a view of that shape they come whole, else block by block, each
    a copy.
    """
    x = _merge_tokens(x)
    takes_part = None if mask is None else mask.reshape(x.shape[:-1])
    if weights is not None:
        weights = weights.reshape(x.shape[:-1])
        takes_part = (weights != 0) if takes_part is None else takes_part & (weights != 0)
    elif takes_part is None and x.dim() == 2:
        yield x, None
        return
    for index in _block_indices(x.shape[:-1], block_tokens(x.shape[-1])):
        part = x[index].reshape(-1, x.shape[-1])
        scales = None if weights is None else weights[index].flatten().float()
        if takes_part is not None:
            kept = takes_part[index].flatten().nonzero().flatten()
            part = part.index_select(0, kept)
            scales = None if scales is None else scales.index_select(0, kept)
        yield part, scales


def _merge_tokens(x: Tensor) -> Tensor:
    """`x` [..., H] as a view [T, H] where its strides allow it, else with its own dimensions."""
    try:
        return x.view(-1, x.shape[-1])
    except RuntimeError:
        return x


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
