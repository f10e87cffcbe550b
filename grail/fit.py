"""The ridge regression of GRAIL, written straight into the consumer's weight.

With A = R G Rᵀ, λ = α·mean(diag A), W₀ the consumer of plain pruning or folding, and V = W − W₀R
what that leaves out (for a selection: the dropped columns of W, nothing else),

    C  = V G Rᵀ                              what the kept channels can still say about V
    W' = W₀ + C (A + λI)⁻¹                   toward the baseline: λ→∞ is W₀
    W' = W₀ + (C − λ W₀)(A + λI)⁻¹            toward zero, the paper's W G Rᵀ (A + λI)⁻¹

The errors come from the same products, before a weight is touched:

    ‖(W − W₀R)X‖² = tr(V G Vᵀ)               ‖WX‖² = tr(V G Vᵀ) + 2 tr(C W₀ᵀ) + tr(W₀ A W₀ᵀ)
    ‖(W − W'R)X‖² = tr(V G Vᵀ) − 2 tr(C Δᵀ) + tr(Δ A Δᵀ),   Δ = W' − W₀

FLOPs for O outputs and D channels in V: 2·O·D·H for V G, K³/3 + 2·O·K² for the solve, 4·O·K² for
the errors. Identities in fp64 throughout, one rounding into the weight's dtype.

Source: GRAIL (arXiv 2602.23795), equations of section 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from grail import ridge
from grail.errors import InputError, NonFiniteError
from grail.gram import Gram
from grail.reduction import Folding, Reduction, Selection

Toward = Literal["zero", "baseline"]

# Rows of G that are held in fp64 at a time: enough for the GEMM.
ROWS = 1024


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

    Memory: `peak_bytes`.
    """
    weights = (weight,) if isinstance(weight, Tensor) else tuple(weight)
    _check(gram, reduction, weights, alpha, toward)
    if reduction.is_identity:
        return Fit(tuple(w.detach().clone() for w in weights), 0.0, 0.0, 0.0, 0)

    matrix = gram.matrix()
    dense = torch.cat([w.detach().to(matrix.device, torch.float64) for w in weights])
    problem = _Problem(matrix, reduction, dense)
    del dense  # large, and no longer needed
    damping, retries, fitted = 0.0, 0, problem.baseline
    if compensate:
        fitted, damping, retries = problem.solve(alpha, toward)
    rounded = [
        part.to(w.dtype)
        for part, w in zip(fitted.split([w.shape[0] for w in weights]), weights, strict=True)
    ]
    fitted = torch.cat([part.double() for part in rounded])
    error, baseline_error = problem.errors(fitted.sub_(problem.baseline))
    return Fit(
        tuple(part.to(w.device) for part, w in zip(rounded, weights, strict=True)),
        error,
        baseline_error,
        damping,
        retries,
    )


def peak_bytes(channels: int, kept: int, outputs: int, folding: bool = False) -> int:
    """The most memory that `fit` takes beside its arguments, where `grail.ridge` solves in fp64.

    Args:
        channels, kept, outputs: H, K, and O of all consumers, with weights of 4 bytes.
        folding: whether clusters are averaged, for which G is held in fp64.
    """
    h, k, o = channels, kept, outputs
    if folding:
        products = 8 * o * (3 * h + k) + max(12 * min(h, ROWS) * h, 8 * o * (h + k))
        narrowing = 8 * (h * h + h * k + k * max(h, 2 * k))
        errors = 8 * o * (h + 3 * k) + 4 * o * k
        return 4 * h * h + max(products, errors + narrowing)
    products = 24 * o * h + max(12 * min(h - k, ROWS) * h, 8 * o * h)
    narrowing = 8 * o * (h + k) + 4 * k * (h + k)
    errors = 8 * o * (h + 2 * k) + 4 * o * k + 4 * k * max(3 * k, 2 * (k + o), 4 * o)
    return 4 * h * h + max(products, narrowing, errors)


class _Problem:
    """The terms of the equations above for one site, in fp64.

    Args:
        matrix: G [H, H] fp32.
        reduction: R.
        dense: W [O, H].
    """

    def __init__(self, matrix: Tensor, reduction: Reduction, dense: Tensor):
        self._matrix, self._reduction = matrix, reduction
        self.baseline = reduction.absorb(dense)
        self._lost, self._left_out = _left_out(dense, reduction, self.baseline)  # V: [D], [O, D]
        seen = torch.zeros_like(dense)  # V G
        for rows, part in zip(self._lost.split(ROWS), self._left_out.split(ROWS, 1), strict=True):
            seen.addmm_(part, matrix[rows].double())
        self._unexplained = reduction.restrict(seen)  # C
        self._baseline_squared = _inner(seen[:, self._lost], self._left_out)  # tr(V G Vᵀ)

    def solve(self, alpha: float, toward: str) -> tuple[Tensor, float, int]:
        """W' [O, K], the damping that held, and how often it had to grow."""
        outputs, kept = self.baseline.shape
        damping = alpha * self._normal().diagonal().mean()
        if toward == "zero":
            right = self._unexplained - damping * self.baseline
            solution = ridge.solve(self._normal, right, damping)
            change = solution.x
        # 2·D·K² FLOPs to solve for the D lost channels and 2·O·D·K to absorb them, or 2·O·K².
        elif self._lost.numel() * (kept + outputs) < outputs * kept:
            coupling = self._reduction.restrict(self._matrix[self._lost])
            solution = ridge.solve(self._normal, coupling, damping)
            change = self._left_out @ solution.x
        else:
            solution = ridge.solve(self._normal, self._unexplained, damping)
            change = solution.x
        return change.add_(self.baseline), solution.damping.item(), int(solution.retries)

    def errors(self, change: Tensor) -> tuple[float, float]:
        """‖WX − W'RX‖/‖WX‖ for Δ = `change` [O, K], and for none."""
        a, before, c = self._normal(), self._baseline_squared, self._unexplained
        total = before + 2 * _inner(c, self.baseline) + _inner(self.baseline @ a, self.baseline)
        after = before - 2 * _inner(c, change) + _inner(change @ a, change)
        return _relative(after, total), _relative(before, total)

    def _normal(self) -> Tensor:
        """A [K, K], made anew. A selection only picks, so that G need not be held in fp64."""
        if isinstance(self._reduction, Selection):
            return self._reduction.normal(self._matrix).double()
        return self._reduction.normal(self._matrix.double())


def _left_out(dense: Tensor, reduction: Reduction, baseline: Tensor) -> tuple[Tensor, Tensor]:
    """V = W − W₀R: the channels [D] where it is not zero by construction, and its columns there."""
    if isinstance(reduction, Selection):
        dropped = torch.ones(reduction.channels, dtype=torch.bool)
        dropped[reduction.index] = False
        lost = dropped.nonzero().flatten().to(dense.device)
        return lost, dense[:, lost]
    if isinstance(reduction, Folding):
        labels, sizes = reduction.labels.to(dense.device), reduction.sizes.to(dense.device)
        members = (baseline / sizes).index_select(1, labels)
        return torch.arange(reduction.channels, device=dense.device), dense - members
    raise InputError(f"a reduction is a Selection or a Folding; got {type(reduction).__name__}")


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.flatten(), b.flatten())


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
