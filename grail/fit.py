"""Absorb, then solve: the ridge regression of GRAIL, written straight into the consumer's weight.

With A = R G Rᵀ, λ = α·mean(diag A) and W₀ the consumer of plain pruning or folding,

    C  = W G Rᵀ − W₀ A                       what W₀ leaves unexplained
    W' = W₀ + C (A + λI)⁻¹                   toward the baseline: λ→∞ is W₀
    W' = W₀ + (C − λ W₀)(A + λI)⁻¹            toward zero, the paper's W G Rᵀ (A + λI)⁻¹

The solve has O right-hand sides, not H. Both errors come from the same products, before a weight is
touched:

    ‖(W − W₀R)X‖² = tr(W G Wᵀ) − 2 tr(W₀ (W G Rᵀ)ᵀ) + tr(W₀ A W₀ᵀ)
    ‖(W − W'R)X‖² = ‖(W − W₀R)X‖² − 2 tr(Δ Cᵀ) + tr(Δ A Δᵀ),   Δ = W' − W₀

Source: GRAIL (arXiv 2602.23795), equations of section 3; identities in fp64 throughout, one
rounding into the weight's dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from grail import ridge
from grail.errors import InputError, NonFiniteError
from grail.gram import Gram
from grail.reduction import Reduction

Toward = Literal["zero", "baseline"]


@dataclass(frozen=True)
class Fit:
    """A site's rewritten consumers and how well they rebuild the dense output.

    `weights`: one [O, K] per consumer given. `error` and `baseline_error`: ‖WX − W'RX‖/‖WX‖ with
    and without compensation, over all consumers, measured on the rounded weights. `damping`: the λ
    used. `retries`: how often it had to grow.
    """

    weights: tuple[Tensor, ...]
    error: float
    baseline_error: float
    damping: float
    retries: int

    @property
    def weight(self) -> Tensor:
        """The rewritten weight [O, K] of the only consumer."""
        if len(self.weights) != 1:
            raise InputError(f"this fit has {len(self.weights)} consumers; read .weights")
        return self.weights[0]


def fit(
    gram: Gram,
    reduction: Reduction,
    weight: Tensor | Sequence[Tensor],
    *,
    alpha: float = 1e-3,
    toward: Toward = "zero",
    compensate: bool = True,
) -> Fit:
    """Rebuilds a consumer's output from the channels that `reduction` keeps.

    Args:
        gram: the Gram of the consumer's input, H channels.
        reduction: a `Selection` or `Folding` of the same H channels.
        weight: the consumer [O, H], or several that read the same channels: one factorisation
            serves all.
        alpha: ridge strength, relative to the mean diagonal of R G Rᵀ; ≥ 0.
        toward: what a strong ridge shrinks to: "zero" (the paper) or "baseline" (plain pruning or
            folding).
        compensate: False returns the baseline itself, with its error.

    Raises:
        InputError: shapes that do not fit, or an alpha or toward that is not allowed.
        NonFiniteError: NaN or Inf in a weight or in the Gram.
        SolveError: see `grail.ridge.solve`.
    """
    weights = (weight,) if isinstance(weight, Tensor) else tuple(weight)
    _check(gram, reduction, weights, alpha, toward)
    if reduction.is_identity:
        return Fit(tuple(w.detach().clone() for w in weights), 0.0, 0.0, 0.0, 0)

    matrix = gram.matrix().double()
    dense = torch.cat([w.detach().double().to(matrix.device) for w in weights])
    seen = dense @ matrix
    target, normal = reduction.restrict(seen), reduction.normal(matrix)
    baseline = reduction.absorb(dense)
    unexplained = target - baseline @ normal

    damping, retries, fitted = 0.0, 0, baseline
    if compensate:
        strength = alpha * normal.diagonal().mean()
        right = unexplained - strength * baseline if toward == "zero" else unexplained
        solution = ridge.solve(normal, right, strength)
        fitted = baseline + solution.x
        damping, retries = solution.damping.item(), int(solution.retries)

    rounded = [
        part.to(w.dtype)
        for part, w in zip(fitted.split([w.shape[0] for w in weights]), weights, strict=True)
    ]
    change = torch.cat([part.double() for part in rounded]) - baseline
    total = (seen * dense).sum()
    before = total - 2 * (baseline * target).sum() + ((baseline @ normal) * baseline).sum()
    after = before - 2 * (change * unexplained).sum() + ((change @ normal) * change).sum()
    return Fit(
        tuple(part.to(w.device) for part, w in zip(rounded, weights, strict=True)),
        _relative(after, total),
        _relative(before, total),
        damping,
        retries,
    )


def _relative(squared: Tensor, total: Tensor) -> float:
    # Rounding can leave a perfect fit a little below 0; a dead site (total 0) is rebuilt exactly.
    return (squared.clamp_min(0) / total).sqrt().item() if total > 0 else 0.0


def _check(
    gram: Gram,
    reduction: Reduction,
    weights: tuple[Tensor, ...],
    alpha: float,
    toward: str,
) -> None:
    if reduction.channels != gram.channels:
        raise InputError(
            f"the reduction has {reduction.channels} channels, the Gram {gram.channels}: "
            "both must describe one site"
        )
    if not weights:
        raise InputError("at least one consumer weight is needed")
    for w in weights:
        if w.dim() != 2 or w.shape[1] != gram.channels:
            raise InputError(f"a consumer must be [O, {gram.channels}]; got {tuple(w.shape)}")
        bad = ~w.isfinite()
        if bool(bad.any()):
            channels = bad.any(0).nonzero().flatten().tolist()
            raise NonFiniteError(
                f"consumer weight of {gram.name or 'a site'}", channels, int(bad.sum())
            )
    check_ridge(alpha, toward)


def check_ridge(alpha: float, toward: str) -> None:
    """Raises InputError unless `alpha` is a finite number ≥ 0 and `toward` is known."""
    if not 0 <= alpha < float("inf"):
        raise InputError(f"alpha must be a finite number ≥ 0; got {alpha}")
    if toward not in get_args(Toward):
        raise InputError(f"toward must be one of {', '.join(get_args(Toward))}; got {toward!r}")
