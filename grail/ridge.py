"""The ridge solve: X (A + λI) = C by a batched Cholesky, with bounded, reported damping.

    A [.., K, K] symmetric positive semi-definite, C [.., O, K]  →  X = C (A + λI)⁻¹ [.., O, K]

Cost: K³/3 + 2·O·K² multiply-adds a problem. fp64 because a Gram's condition number is its data
    matrix's squared:
fp32 loses half of what the fp32 Gram still knows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from grail.errors import InputError, NonFiniteError, SolveError

GROWTH = 10.0
ATTEMPTS = 12
# Rounding of an fp32 Gram can push an eigenvalue of a singular A this far (relative to the mean
# diagonal) below 0; a first retry below it would be wasted.
FLOOR = 1e-10


@dataclass(frozen=True)
class Solution:
    """`x` [.., O, K]; `damping` [..], the λ that held; `retries` [..], how often λ had to grow."""

    x: Tensor
    damping: Tensor
    retries: Tensor


def solve(normal: Tensor, right: Tensor, damping: Tensor | float) -> Solution:
    """Solves X (A + λI) = C for a batch of problems.

    A factorisation that fails is repeated with λ ten times larger (at least 1e-10 of the mean
    diagonal), at most 12 times. A problem whose A is zero has nothing to explain and gives X = 0.

    Args:
        normal: A [.., K, K], symmetric.
        right: C [.., O, K].
        damping: λ ≥ 0, a number or [..].

    Returns:
        A `Solution` in fp64.

    Raises:
        InputError: shapes that do not fit, or a negative λ.
        NonFiniteError: NaN or Inf in A or C.
        SolveError: still indefinite after the last retry.
    """
    if normal.shape[-1] != normal.shape[-2] or right.shape[-1] != normal.shape[-1]:
        raise InputError(
            f"normal must be [.., K, K] and right [.., O, K]; got {tuple(normal.shape)} "
            f"and {tuple(right.shape)}"
        )
    batch = normal.shape[:-2]
    a = normal.double().reshape(-1, *normal.shape[-2:])
    c = right.double().reshape(-1, *right.shape[-2:])
    # cholesky_ex may report success on NaN, so finiteness is tested first.
    _require_finite(a, "the normal matrix of a ridge")
    _require_finite(c, "the right-hand side of a ridge")
    lam = torch.as_tensor(damping, dtype=torch.float64, device=a.device)
    lam = lam.expand(batch).reshape(-1).clone()
    if bool((lam < 0).any()):
        raise InputError(f"damping must not be negative; got {lam.min().item():g}")

    retries = torch.zeros_like(lam, dtype=torch.int64)
    scale = a.diagonal(dim1=-2, dim2=-1).mean(-1)
    x = torch.zeros_like(c)
    todo = (scale > 0).nonzero().flatten()
    for _ in range(ATTEMPTS + 1):
        if todo.numel() == 0:
            break
        damped = a[todo]
        damped.diagonal(dim1=-2, dim2=-1).add_(lam[todo, None])
        factor, info = torch.linalg.cholesky_ex(damped)
        solved = torch.cholesky_solve(c[todo].mT, factor).mT
        good = (info == 0) & solved.isfinite().all(-1).all(-1)
        x[todo[good]] = solved[good]
        todo = todo[~good]
        lam[todo] = torch.maximum(lam[todo] * GROWTH, FLOOR * scale[todo])
        retries[todo] += 1
    if todo.numel():
        raise SolveError(
            f"{todo.numel()} ridge problem(s) stayed indefinite after {ATTEMPTS} dampings up to "
            f"{(lam[todo] / GROWTH).max().item():g}: no Gram matrix, or its sums overflowed"
        )
    return Solution(x.reshape(right.shape), lam.reshape(batch), retries.reshape(batch))


def _require_finite(values: Tensor, what: str) -> None:
    bad = ~values.isfinite()
    if bool(bad.any()):
        channels = bad.flatten(0, -2).any(0).nonzero().flatten().tolist()
        raise NonFiniteError(what, channels, int(bad.sum()))
