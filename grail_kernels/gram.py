"""Streaming symmetric Gram accumulation: G += sum over tokens of w x x^T, lower triangle only.

With X [T, H] the update is the BLAS routine syrk, G += X^T diag(w) X. Only the strips of
`grail_kernels.tiles` are touched: T*H*(H + BLOCK) FLOPs of a full product's 2*T*H^2, and half of
its accumulator traffic. Products of 16-bit inputs are exact in fp32; the sums are fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from grail_kernels import checks, cpu_blas
from grail_kernels.arguments import check_optional, check_tensors
from grail_kernels.backend import check_backend, resolve_backend
from grail_kernels.operators import operator
from grail_kernels.precision import full_fp32
from grail_kernels.tiles import strips

# Activations that are copied at a time where they must be upcast, gathered or weighted: 32 MB of
# fp32 stay near the cache; the bounds keep the accumulator's traffic (4*H^2 bytes a block) and the
# number of GEMMs small.
_BLOCK_ELEMENTS = 2**23
_FEWEST_TOKENS, _MOST_TOKENS = 1024, 8192

# With fewer rows than this a GEMM adds all tokens in one chain (MKL: an error of 35 eps at 4097
# tokens, 800 at 200k, against 3 and 13): such few rows are summed in fp64 instead.
_GEMM_ROWS = 16


def gram_(
    out: Tensor,
    x: Tensor,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    sums: Tensor | None = None,
    nonfinite: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Add the Gram matrix of `x` to a packed accumulator, in place.

    A token whose mask is False or whose weight is 0 does not take part, whatever it holds.

    Args:
        out: [packed_numel(H)] fp32, contiguous; see `grail_kernels.tiles`.
        x: [..., H] bf16, fp16 or fp32 activations, any strides; never copied as a whole.
        mask: [...] bool, True where the token counts. All count if None.
        weights: [...] floating point, the weight of each token. 1 if None.
        sums: [H] fp32, += sum of w x.
        nonfinite: [H] int64, += number of NaN or infinite values of each channel, over the tokens
            that take part. They still enter `out` and `sums`: it is for the caller to refuse.
        backend: "auto", "torch" or "triton"; see `resolve_backend`.

    Returns:
        `out`.

    Raises:
        InputError: a dtype, shape or device does not fit, or a written tensor overlaps another
            argument. Nothing was changed.
        BackendError: the backend asked for cannot run. Nothing was changed.
    """
    check_tensors(out=out, x=x)
    check_optional(mask=mask, weights=weights, sums=sums, nonfinite=nonfinite)
    check_backend(backend)
    _gram_op(out, x.detach(), mask, weights, sums, nonfinite, backend)
    return out


@operator(
    "grail::gram_",
    mutates_args=("out", "sums", "nonfinite"),
    schema="(Tensor(a!) out, Tensor x, Tensor? mask, Tensor? weights, "
    'Tensor(b!)? sums, Tensor(c!)? nonfinite, str backend="auto") -> ()',
)
def _gram_op(
    out: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    sums: Tensor | None,
    nonfinite: Tensor | None,
    backend: str = "auto",
) -> None:
    """`torch.ops.grail.gram_`: opaque to torch.compile, which only sees what it mutates."""
    check_gram(out, x, mask, weights, sums, nonfinite)
    checks.check_no_overlap(
        written={"out": out, "sums": sums, "nonfinite": nonfinite},
        read={"x": x, "mask": mask, "weights": weights},
    )
    add_gram(out, x, mask, weights, sums, nonfinite, resolve_backend(x, backend))


@_gram_op.register_fake
def _(
    out: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    sums: Tensor | None,
    nonfinite: Tensor | None,
    backend: str = "auto",
) -> None:
    check_gram(out, x, mask, weights, sums, nonfinite)


def add_gram(
    out: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    sums: Tensor | None,
    nonfinite: Tensor | None,
    backend: str,
) -> None:
    """`gram_` on arguments that were checked and a backend that was resolved."""
    if backend == "triton":
        from grail_kernels.gram_triton import launch_gram

        launch_gram(out, x[None], mask, weights, sums, nonfinite)
    else:
        with full_fp32(x.device):
            _gram_torch(out, x, mask, weights, sums, nonfinite)


def check_gram(
    out: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    sums: Tensor | None,
    nonfinite: Tensor | None,
    batch: tuple[int, ...] = (),
) -> None:
    """Refuse arguments by what their shapes, dtypes and devices tell.

    `batch`, the leading dimensions of the targets, leads those of `x` as well if it has any mask
    or weights.
    """
    checks.check_activations("x", x)
    channels = x.shape[-1]
    checks.check_accumulator(out, channels, batch)
    checks.check_per_token(x.shape[len(batch) : -1], mask, weights)
    if sums is not None:
        checks.check_vector("sums", sums, (*batch, channels), torch.float32)
    if nonfinite is not None:
        checks.check_vector("nonfinite", nonfinite, (*batch, channels), torch.int64)
    checks.check_devices(out=out, x=x, mask=mask, weights=weights, sums=sums, nonfinite=nonfinite)


@torch.no_grad()
def _gram_torch(
    out: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    sums: Tensor | None,
    nonfinite: Tensor | None,
) -> None:
    """The torch twin."""
    for tokens, scales in _token_blocks(x, mask, weights):
        weighted = tokens if scales is None else tokens * scales[:, None]
        if sums is not None or nonfinite is not None:
            _collect(tokens, weighted.sum(0), sums, nonfinite)
        if cpu_blas.takes(tokens):
            cpu_blas.add_gram(out, weighted, tokens)
            continue
        for strip in strips(x.shape[-1]):
            rows = weighted[:, strip.low : strip.high]
            _add_products(strip.view(out), rows, tokens[:, : strip.high])


def _collect(
    tokens: Tensor, token_sums: Tensor, sums: Tensor | None, nonfinite: Tensor | None
) -> None:
    """Add the sums [H] of a block of tokens [t, H], and count its non-finite values."""
    if sums is not None:
        sums += token_sums
    # A NaN or an infinity always shows in the sum of its channel, so a clean block is not searched.
    if nonfinite is not None and not torch.isfinite(token_sums).all():
        nonfinite += (~torch.isfinite(tokens)).sum(0)


def _add_products(target: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Add rows^T [R, T] @ columns [T, C] to target [R, C]."""
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
    for index in block_indices(x.shape[:-1], most):
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
    """Whether a library GEMM reads `x` without copying it: fp32 with rows or columns contiguous."""
    if x.dtype != torch.float32 or x.dim() != 2:
        return False
    (tokens, channels), (token_stride, channel_stride) = x.shape, x.stride()
    by_rows = channel_stride == 1 and token_stride >= channels
    by_columns = token_stride == 1 and channel_stride >= tokens
    return by_rows or by_columns


def block_tokens(channels: int) -> int:
    """How many tokens of `channels` channels are copied at a time: whole chunks of a product."""
    most = max(_FEWEST_TOKENS, min(_BLOCK_ELEMENTS // channels, _MOST_TOKENS))
    return most - most % cpu_blas.CHUNK_TOKENS


def block_indices(shape: torch.Size, most: int) -> Iterator[tuple[int | slice, ...]]:
    """Indices that cut leading dimensions of `shape` into blocks of at most `most` tokens."""
    each = math.prod(shape[1:])
    if each > most:
        for position in range(shape[0]):
            for rest in block_indices(shape[1:], most):
                yield (position, *rest)
        return
    step = most // max(each, 1)
    for start in range(0, shape[0], step):
        yield (slice(start, start + step),)
