"""fp64 oracles for tests and benches, and the ratio by which a result is judged.

They share nothing with the kernels: dense matrices, no packing, no blocks.
"""

import torch
from torch import Tensor

# A result passes below this many eps: the threshold of the test program of Reference BLAS.
ERROR_LIMIT = 16.0


def gram(x: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
    """Σ w x xᵀ in fp64, as a dense [H, H], for x [..., H] and mask, weights [...]."""
    rows, scales = _taking_part(x, mask, weights)
    return rows.T @ (rows * scales[:, None])


def channel_sums(x: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
    """Σ w x in fp64, [H]."""
    rows, scales = _taking_part(x, mask, weights)
    return scales @ rows


def nonfinite_counts(
    x: Tensor, mask: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Number of NaN and infinite values of each channel over the tokens that take part, [H]."""
    rows, _ = _taking_part(x, mask, weights)
    return (~torch.isfinite(rows)).sum(0)


def absorb(weight: Tensor, gram: Tensor, keep: Tensor) -> Tensor:
    """W_D G_DP in fp64 as [O, K], for weight [O, H], a dense gram [H, H] and kept channels [K]."""
    of_dropped = weight.double().index_fill(1, keep, 0.0)
    return of_dropped @ gram.double()[:, keep]


def error_ratio(result: Tensor, exact: Tensor, magnitude: Tensor) -> float:
    """The largest |result - exact| / (eps * magnitude) of any component; NaN counts as infinite.

    Args:
        result: fp32.
        exact: fp64, the same shape.
        magnitude: fp64, the exact sum of the absolute values of what was added; |X|ᵀ|X| for a
            Gram matrix. Where it is 0 the result has to be 0.

    Returns:
        Units of eps = 2⁻²³. (Dongarra et al., the error test of sblat3, SMMCH.)
    """
    if not exact.numel():
        return 0.0
    difference = (result.double() - exact).abs()
    bound = torch.finfo(torch.float32).eps * magnitude
    ratio = torch.where(difference == 0, difference, difference / bound)
    return torch.nan_to_num(ratio, nan=torch.inf).max().item()


def _taking_part(x: Tensor, mask: Tensor | None, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """The rows [T, H] and weights [T] in fp64 of the tokens with a true mask and weight not 0."""
    rows = x.reshape(-1, x.shape[-1]).double()
    scales = rows.new_ones(rows.shape[0])
    if weights is not None:
        scales = scales * weights.reshape(-1).double()
    if mask is not None:
        scales = scales * mask.reshape(-1)
    taking_part = scales != 0
    return rows[taking_part], scales[taking_part]
