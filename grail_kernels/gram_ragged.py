"""Gram matrices of many experts at once: out[e] += sum of x x^T over the tokens of expert e.

The tokens [T, H] are sorted by expert, expert e owning rows offsets[e] to offsets[e + 1]. One
launch serves all of them, so experts of a few tokens do not leave the GPU idle one after another.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from grail_kernels import checks
from grail_kernels.arguments import check_optional, check_tensors
from grail_kernels.backend import check_backend, resolve_backend
from grail_kernels.errors import InputError
from grail_kernels.gram import add_gram, check_gram
from grail_kernels.operators import operator


def gram_ragged_(
    out: Tensor,
    x: Tensor,
    offsets: Tensor,
    sums: Tensor | None = None,
    nonfinite: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Add the Gram matrix of every expert's tokens to its packed accumulator, in place.

    Args:
        out: [E, packed_numel(H)] fp32, contiguous.
        x: [T, H] bf16, fp16 or fp32, any strides.
        offsets: [E + 1] int64, never decreasing, from 0 to at most T. They are checked on the host:
            pass them on the CPU, or the call waits for the GPU.
        sums: [E, H] fp32, += sum of x.
        nonfinite: [E, H] int64, += number of NaN or infinite values.
        backend: "auto", "torch" or "triton"; see `resolve_backend`.

    Returns:
        `out`. The accumulator of an expert without tokens is left as it is.

    Raises:
        InputError: a dtype, shape or device does not fit, the offsets decrease or leave [0, T], or
            a written tensor overlaps another argument. Nothing was changed.
        BackendError: the backend asked for cannot run. Nothing was changed.
    """
    check_tensors(out=out, x=x, offsets=offsets)
    check_optional(sums=sums, nonfinite=nonfinite)
    check_backend(backend)
    _gram_ragged_op(out, x.detach(), offsets, sums, nonfinite, backend)
    return out


@operator(
    "grail::gram_ragged_",
    mutates_args=("out", "sums", "nonfinite"),
    schema="(Tensor(a!) out, Tensor x, Tensor offsets, Tensor(b!)? sums, "
    'Tensor(c!)? nonfinite, str backend="auto") -> ()',
)
def _gram_ragged_op(
    out: Tensor,
    x: Tensor,
    offsets: Tensor,
    sums: Tensor | None,
    nonfinite: Tensor | None,
    backend: str = "auto",
) -> None:
    _check(out, x, offsets, sums, nonfinite)
    checks.check_no_overlap(
        written={"out": out, "sums": sums, "nonfinite": nonfinite},
        read={"x": x, "offsets": offsets},
    )
    bounds = offsets.tolist()
    _check_bounds(bounds, x.shape[0])
    if resolve_backend(x, backend) == "triton":
        from grail_kernels.gram_triton import launch_gram_ragged

        launch_gram_ragged(out, x, offsets.to(x.device), sums, nonfinite)
        return
    for expert in range(out.shape[0]):
        add_gram(
            out[expert],
            x[bounds[expert] : bounds[expert + 1]],
            None,
            None,
            None if sums is None else sums[expert],
            None if nonfinite is None else nonfinite[expert],
            "torch",
        )


@_gram_ragged_op.register_fake
def _(
    out: Tensor,
    x: Tensor,
    offsets: Tensor,
    sums: Tensor | None,
    nonfinite: Tensor | None,
    backend: str = "auto",
) -> None:
    _check(out, x, offsets, sums, nonfinite)


def _check(
    out: Tensor, x: Tensor, offsets: Tensor, sums: Tensor | None, nonfinite: Tensor | None
) -> None:
    if x.dim() != 2:
        raise InputError(f"x must be [tokens, channels] sorted by expert; got {tuple(x.shape)}")
    if out.dim() != 2:
        raise InputError(f"out must be [experts, packed_numel(channels)]; got {tuple(out.shape)}")
    experts = out.shape[0]
    check_gram(out, x, None, None, sums, nonfinite, (experts,))
    checks.check_vector("offsets", offsets, (experts + 1,), torch.int64)


def _check_bounds(bounds: list[int], tokens: int) -> None:
    for expert, (begin, end) in enumerate(pairwise(bounds)):
        if end < begin:
            raise InputError(
                f"offsets must never decrease; got {begin} then {end} for expert {expert}"
            )
    if bounds[0] != 0 or bounds[-1] > tokens:
        raise InputError(
            f"offsets must go from 0 to at most the {tokens} tokens of x; "
            f"got {bounds[0]} to {bounds[-1]}"
        )
