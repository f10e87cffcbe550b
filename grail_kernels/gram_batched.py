"""Gram matrices of a batch: out[e] += sum over the tokens of w x[e] x[e]^T, one e a head or expert.

One matrix of 64 to 256 channels is a few tiles, which leave a GPU idle; a batch of them is one
launch. The heads of [tokens, heads, head_dim] are batched where they lie, by `x.transpose(0, 1)`.
Their tokens are the same, and so mask and weights are shared by the batch.
"""

from __future__ import annotations

from torch import Tensor

from grail_kernels import checks
from grail_kernels.arguments import check_optional, check_tensors
from grail_kernels.backend import check_backend, resolve_backend
from grail_kernels.errors import InputError
from grail_kernels.gram import add_gram, check_gram
from grail_kernels.operators import operator


def gram_batched_(
    out: Tensor,
    x: Tensor,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    sums: Tensor | None = None,
    nonfinite: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Add the Gram matrix of each x[e] to its packed accumulator out[e], in place.

    Args:
        out: [E, packed_numel(H)] fp32, contiguous.
        x: [E, ..., H] bf16, fp16 or fp32, any strides; never copied as a whole.
        mask: [...] bool, True where the token counts in every matrix. All count if None.
        weights: [...] floating point, the weight of each token in every matrix. 1 if None.
        sums: [E, H] fp32, += sum of w x.
        nonfinite: [E, H] int64, += number of NaN or infinite values over the tokens that take part.
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
    _gram_batched_op(out, x.detach(), mask, weights, sums, nonfinite, backend)
    return out


@operator(
    "grail::gram_batched_",
    mutates_args=("out", "sums", "nonfinite"),
    schema="(Tensor(a!) out, Tensor x, Tensor? mask, Tensor? weights, "
    'Tensor(b!)? sums, Tensor(c!)? nonfinite, str backend="auto") -> ()',
)
def _gram_batched_op(
    out: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    sums: Tensor | None,
    nonfinite: Tensor | None,
    backend: str = "auto",
) -> None:
    _check(out, x, mask, weights, sums, nonfinite)
    checks.check_no_overlap(
        written={"out": out, "sums": sums, "nonfinite": nonfinite},
        read={"x": x, "mask": mask, "weights": weights},
    )
    if resolve_backend(x, backend) == "triton":
        from grail_kernels.gram_triton import launch_gram

        launch_gram(out, x, mask, weights, sums, nonfinite)
        return
    # Matrix by matrix: one torch.bmm takes 1.0 to 1.5 times the processor time of this.
    for matrix in range(out.shape[0]):
        add_gram(
            out[matrix],
            x[matrix],
            mask,
            weights,
            None if sums is None else sums[matrix],
            None if nonfinite is None else nonfinite[matrix],
            "torch",
        )


@_gram_batched_op.register_fake
def _(
    out: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    sums: Tensor | None,
    nonfinite: Tensor | None,
    backend: str = "auto",
) -> None:
    _check(out, x, mask, weights, sums, nonfinite)


def _check(
    out: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    sums: Tensor | None,
    nonfinite: Tensor | None,
) -> None:
    if x.dim() < 2:
        raise InputError(f"x must be [matrices, ..., channels]; got {tuple(x.shape)}")
    check_gram(out, x, mask, weights, sums, nonfinite, x.shape[:1])
