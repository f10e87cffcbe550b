"""The ridge problem of one site: its terms, its solution and its errors, in fp64.

With A = R G Rᵀ, λ = α·mean(diag A), W₀ the consumer of plain pruning or folding, and V = W − W₀R
what that leaves out (for a selection: the dropped columns of W, nothing else),

    Q  = V G Rᵀ + β C Rᵀ                     what the kept channels can still say
    W' = W₀ + Q (A + λI)⁻¹                   toward the baseline: λ→∞ is W₀
    W' = W₀ + (Q − λ W₀)(A + λI)⁻¹            toward zero; the paper's W G Rᵀ (A + λI)⁻¹ at β = 0

C = Σ δ xᵀ is the drift's share (`grail.drift`): the consumer then aims at W x + β δ, at β = 1 at
what the dense network's stream holds after it. W' is linear in β.

The errors come from the same products, before a weight is touched. Their target is T = W x + δ,
or W x where no drift was recorded; Q₁ is Q at β = 1:

    ‖T − W₀RX‖² = tr(V G Vᵀ) + 2 tr(V Cᵀ) + Σ|δ|²
    ‖T‖²        = ‖T − W₀RX‖² + 2 tr(Q₁ W₀ᵀ) + tr(W₀ A W₀ᵀ)
    ‖T − W'RX‖² = ‖T − W₀RX‖² − 2 tr(Q₁ Δᵀ) + tr(Δ A Δᵀ),   Δ = W' − W₀

FLOPs for O outputs and D channels in V: 2·O·D·H for V G, K³/3 + 2·O·K² for the solve, 4·O·K² for
the errors.

Source: GRAIL (arXiv 2602.23795), equations of section 3; the drift's share is this project's.
"""

import torch
from torch import Tensor

from grail import ridge
from grail.drift import Drift
from grail.errors import InputError
from grail.reduction import Folding, Reduction, Selection

# Rows of G that are held in fp64 at a time: enough for the GEMM.
ROWS = 1024


class Consumer:
    """W = W₀R + V: what plain pruning or folding keeps of a consumer, and what it leaves out.

    Args:
        dense: W [O, H] fp64.
        reduction: R.

    `baseline`: W₀ [O, K]. `lost`: the channels [D] where V is not zero by construction, and
    `left_out`: V's columns [O, D] there.
    """

    def __init__(self, dense: Tensor, reduction: Reduction):
        self.reduction, self.baseline = reduction, reduction.absorb(dense)
        if isinstance(reduction, Selection):
            dropped = torch.ones(reduction.channels, dtype=torch.bool)
            dropped[reduction.index] = False
            self.lost = dropped.nonzero().flatten().to(dense.device)
            self.left_out = dense[:, self.lost]
        elif isinstance(reduction, Folding):
            labels, sizes = reduction.labels.to(dense.device), reduction.sizes.to(dense.device)
            members = (self.baseline / sizes).index_select(1, labels)
            self.lost = torch.arange(reduction.channels, device=dense.device)
            self.left_out = dense - members
        else:
            kind = type(reduction).__name__
            raise InputError(f"a reduction is a Selection or a Folding; got {kind}")


class Problem:
    """The terms above for one consumer over one set of tokens.

    Args:
        consumer: W₀ and V.
        matrix: G [H, H] fp32. `add` and nothing else changes it.
        drift: C and Σ|δ|², if the consumer is to undo some of it.
    """

    def __init__(self, consumer: Consumer, matrix: Tensor, drift: Drift | None = None):
        self._reduction, self.baseline = consumer.reduction, consumer.baseline
        self._lost, self._left_out = consumer.lost, consumer.left_out
        self._matrix = matrix
        self._own, self._squared = self._of_own_output()
        self._energy = self._normal().diagonal().mean()
        self._drifted: Tensor | None = None
        if drift is not None:
            self._drifted, squared = self._of_drift(drift)
            self._squared += squared

    def _of_own_output(self) -> tuple[Tensor, Tensor]:
        """V G Rᵀ and tr(V G Vᵀ)."""
        seen = self._left_out.new_zeros(self.baseline.shape[0], self._matrix.shape[0])  # V G
        for rows, part in zip(self._lost.split(ROWS), self._left_out.split(ROWS, 1), strict=True):
            seen.addmm_(part, self._matrix[rows].double())
        return self._reduction.restrict(seen), _inner(seen[:, self._lost], self._left_out)

    def _of_drift(self, drift: Drift) -> tuple[Tensor, Tensor]:
        """C Rᵀ and 2 tr(V Cᵀ) + Σ|δ|²."""
        drifted, squared = torch.empty_like(self._own), drift.energy.clone()
        for low in range(0, drift.outputs, ROWS):
            outputs = slice(low, low + ROWS)
            cross = drift.cross[outputs].double()
            drifted[outputs] = self._reduction.restrict(cross)
            squared += 2 * _inner(cross[:, self._lost], self._left_out[outputs])
        return drifted, squared

    def add(self, other: "Problem") -> None:
        """Joins the tokens of `other`, a problem of the same reduction and weight."""
        self._matrix += other._matrix
        self._own += other._own
        self._energy += other._energy
        self._squared += other._squared
        if self._drifted is None:
            self._drifted = other._drifted
        elif other._drifted is not None:
            self._drifted += other._drifted

    def damping(self, alpha: float) -> Tensor:
        """λ for a relative strength."""
        return alpha * self._energy

    def solve(self, alpha: float, toward: str, correction: float) -> tuple[Tensor, float, int]:
        """Δ [O, K] at β = `correction`, the damping that held, and how often it had to grow."""
        outputs, kept = self.baseline.shape
        # 2·D·K² FLOPs to solve for the D lost channels and 2·O·D·K to absorb them, or 2·O·K².
        few_lost = 0 < self._lost.numel() * (kept + outputs) < outputs * kept
        damping = self.damping(alpha)
        if few_lost and toward == "baseline" and not (correction and self._drifted is not None):
            coupling = self._reduction.restrict(self._matrix[self._lost])
            solution = ridge.solve(self._normal, coupling, damping)
            change = self._left_out @ solution.x
        else:
            solution = ridge.solve(self._normal, self._right(damping, toward, correction), damping)
            change = solution.x
        return change, solution.damping.item(), int(solution.retries)

    def parts(self, alpha: float, toward: str) -> tuple[Tensor, Tensor | None]:
        """Δ = U + β D: U and D, [O, K] each, from one factorisation; no D without a drift."""
        damping = self.damping(alpha)
        right = self._right(damping, toward, 0.0)
        if self._drifted is None:
            return ridge.solve(self._normal, right, damping).x, None
        both = ridge.solve(self._normal, torch.cat([right, self._drifted]), damping).x
        own, drifted = both.split(right.shape[0])
        return own, drifted

    def price(
        self, own: Tensor, drifted: Tensor | None, correction: float | None = None
    ) -> tuple[float, float]:
        """β and ‖T − (W₀ + U + βD)RX‖² here; the best β in [0, 1] if none is given."""
        normal, target = self._normal(), self._target()
        seen = own @ normal
        alone = self._squared - 2 * _inner(target, own) + _inner(seen, own)
        if drifted is None:
            return correction or 0.0, alone.item()
        slope = _inner(target - seen, drifted)
        curvature = _inner(drifted @ normal, drifted)
        if correction is None:
            correction = (slope / curvature).clamp(0, 1).item() if curvature > 0 else 0.0
        return correction, (alone - 2 * correction * slope + correction**2 * curvature).item()

    @property
    def baseline_squared(self) -> float:
        """‖T − W₀RX‖²."""
        return self._squared.item()

    def errors(self, change: Tensor) -> tuple[float, float]:
        """‖T − W'RX‖/‖T‖ for Δ = `change` [O, K], and for none."""
        normal, target, before = self._normal(), self._target(), self._squared
        kept = _inner(self.baseline @ normal, self.baseline)
        total = before + 2 * _inner(target, self.baseline) + kept
        after = before - 2 * _inner(target, change) + _inner(change @ normal, change)
        return _relative(after, total), _relative(before, total)

    def _right(self, damping: Tensor, toward: str, correction: float) -> Tensor:
        right = self._own
        if correction and self._drifted is not None:
            right = right + correction * self._drifted
        return right - damping * self.baseline if toward == "zero" else right

    def _target(self) -> Tensor:
        """Q₁ [O, K]."""
        return self._own if self._drifted is None else self._own + self._drifted

    def _normal(self) -> Tensor:
        """A [K, K], made anew. A selection only picks, so that G need not be held in fp64."""
        if isinstance(self._reduction, Selection):
            return self._reduction.normal(self._matrix).double()
        return self._reduction.normal(self._matrix.double())


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.flatten(), b.flatten())


def _relative(squared: Tensor, total: Tensor) -> float:
    # Rounding can leave a perfect fit a little below 0; a dead site (total 0) is rebuilt exactly.
    return (squared.clamp_min(0) / total).sqrt().item() if total > 0 else 0.0
