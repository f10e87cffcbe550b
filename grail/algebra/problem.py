"""The ridge problem of one site: its terms, its solution and its errors, in fp64.

With A = R G Rᵀ, λ = α·mean(diag A), W₀ the consumer of plain pruning or folding, and V = W − W₀R
what that leaves out (for a selection: the dropped columns of W, nothing else),

    Q  = V G Rᵀ + β C Rᵀ                     the part that the kept channels can predict
    W' = W₀ + Q (A + λI)⁻¹                   toward the baseline: λ→∞ is W₀
    W' = W₀ + (Q − λ W₀)(A + λI)⁻¹            toward zero; the paper's W G Rᵀ (A + λI)⁻¹ at β = 0

C = Σ δ xᵀ is the drift's share (`grail.algebra.drift`). The target is W x + β δ; at β = 1 it is the
dense network's stream after the consumer. W' is linear in β.

The errors come from the same products, before a weight is touched. Their target is T = W x + δ,
or W x where no drift was recorded; Q₁ is Q at β = 1:

    ‖T − W₀RX‖² = tr(V G Vᵀ) + 2 tr(V Cᵀ) + Σ|δ|²
    ‖T‖²        = ‖T − W₀RX‖² + 2 tr(Q₁ W₀ᵀ) + tr(W₀ A W₀ᵀ)
    ‖T − W'RX‖² = ‖T − W₀RX‖² − 2 tr(Q₁ Δᵀ) + tr(Δ A Δᵀ),   Δ = W' − W₀

**Affine.** A consumer with a bias reads one more channel: the constant 1, which is always kept,
which plain reduction leaves alone, and which no ridge damps. It comes last, and all of the above
holds of K+1 channels as it stands, sums over different tokens included:

    A → [A  r; rᵀ N],   Q → [Q, V s + β d],   W₀ → [W₀, 0],   Δ → [Δ, b]

with r = R s, s = Σ x, d = Σ δ. The solve eliminates the constant first: it centres the sums
and takes λ from the centred A. The bias follows:

    A − r rᵀ/N,   Q − (V s + βd) rᵀ/N,   b = (V s + β d − Δ r)/N = ((W − W'R) s + β d)/N

With λ→∞ and β = 0 only b = V s/N is left: FLAP's bias compensation (An et al., AAAI 2024).

FLOPs for O outputs and D channels in V: 2·O·D·H for V G, K³/3 + 2·O·K² for the solve, 4·O·K² for
the errors.

Source: GRAIL (arXiv 2602.23795), equations of section 3; the drift's share and the affine form are
this project's.
"""

import math

import torch
from torch import Tensor

from grail.algebra import ridge
from grail.algebra.drift import Drift
from grail.algebra.gram import Gram
from grail.algebra.reduction import Reduction

# Rows of G that are converted to fp64 at a time: enough for the GEMM.
ROWS = 1024
# An fp32 Gram's rounding, relative to |X|ᵀ|X| (the bound of reference BLAS's syrk test): a centred
# energy below it is that of a constant.
EPS = torch.finfo(torch.float32).eps
ROUNDING = 16 * EPS


class Consumer:
    """The split W = W₀·R + V of a consumer into the part that plain reduction keeps and the rest.

    Args:
        dense: W [O, H] fp64.
        reduction: R.
        affine: whether the consumer reads a constant as well.

    `baseline`: W₀ [O, K], of an affine consumer [O, K+1]. `lost`: the channels [D] where V is not
    zero by construction, and `left_out`: V's columns [O, D] there.
    """

    def __init__(self, dense: Tensor, reduction: Reduction, affine: bool = False):
        self.reduction, self.affine = reduction, affine
        plain = reduction.absorb(dense)
        self.lost, self.left_out = reduction.left_out(dense, plain)
        self.baseline = _appended(plain, plain.new_zeros(len(plain))) if affine else plain


class Problem:
    """The terms above for one consumer over one set of tokens.

    Args:
        consumer: W₀ and V.
        gram: G; s and N; and C, d and Σ|δ|² if the consumer corrects drift.

    K+ in shapes: K, of an affine consumer K+1.
    """

    def __init__(self, consumer: Consumer, gram: Gram):
        self._reduction, self.baseline = consumer.reduction, consumer.baseline
        self._lost, self._left_out = consumer.lost, consumer.left_out
        self.name, self.affine = gram.name, consumer.affine
        self._matrix, self._sum, self._tokens = gram.matrix(), gram.sum.double(), gram.tokens
        self._own, self._squared = self._of_own_output()
        if self.affine:
            self._own = _appended(self._own, self._left_out @ self._sum[self._lost])
        self._energies = self._reduction.normal(self._matrix).diagonal().clone()
        self._drifted: Tensor | None = None
        if gram.drift is not None:
            self._drifted, squared = self._of_drift(gram.drift)
            self._squared += squared

    def _of_own_output(self) -> tuple[Tensor, Tensor]:
        """Returns V·G·Rᵀ and tr(V·G·Vᵀ)."""
        seen = self._left_out.new_zeros(len(self.baseline), len(self._matrix))  # V G
        for rows, part in zip(self._lost.split(ROWS), self._left_out.split(ROWS, 1), strict=True):
            seen.addmm_(part, self._matrix[rows].double())
        return self._reduction.restrict(seen), _inner(seen[:, self._lost], self._left_out)

    def _of_drift(self, drift: Drift) -> tuple[Tensor, Tensor]:
        """Returns C·Rᵀ [O, K+], d its last column, and 2·tr(V·Cᵀ) + Σ|δ|²."""
        drifted, squared = torch.empty_like(self._own), drift.energy.clone()
        for low in range(0, drift.outputs, ROWS):
            outputs = slice(low, low + ROWS)
            cross = drift.cross[outputs].double()
            drifted[outputs, : self._reduction.kept] = self._reduction.restrict(cross)
            squared += 2 * _inner(cross[:, self._lost], self._left_out[outputs])
        if self.affine:
            drifted[:, -1] = drift.sum
        return drifted, squared

    def add(self, other: "Problem") -> None:
        """Adds the tokens of `other`, a problem of the same consumer."""
        self._matrix += other._matrix
        self._sum += other._sum
        self._tokens += other._tokens
        self._own += other._own
        self._energies += other._energies
        self._squared += other._squared
        if self._drifted is None:
            self._drifted = other._drifted
        elif other._drifted is not None:
            self._drifted += other._drifted

    @property
    def plain(self) -> Tensor:
        """Returns W₀ [O, K], without the constant."""
        return self.baseline[:, : self._reduction.kept]

    def damping(self, alpha: float) -> Tensor:
        """Returns λ for a relative strength."""
        return alpha * self._fluctuations().mean()

    def solve(self, alpha: float, toward: str, correction: float) -> tuple[Tensor, float, int]:
        """Returns Δ [O, K] at β = `correction`, the final damping, and the number of retries.

        An infinite `alpha` gives 0, plain pruning or folding, whatever `toward` is.
        """
        outputs, kept = len(self.baseline), self._reduction.kept
        # 2·D·K² FLOPs to solve for the D lost channels and 2·O·D·K to absorb them, or 2·O·K².
        few_lost = 0 < self._lost.numel() * (kept + outputs) < outputs * kept
        if few_lost and toward == "baseline" and not (correction and self._drifted is not None):
            solution = self._ridge(self._coupling(), alpha)
            change = self._left_out @ solution.x
        else:
            solution = self._ridge(self._right(alpha, toward, correction), alpha)
            change = solution.x
        return change, solution.damping.item(), int(solution.retries)

    def complete(self, change: Tensor, correction: float) -> Tensor:
        """Returns Δ [O, K], for an affine consumer with the b of zero mean error: [O, K+]."""
        target = self._own[:, -1]
        if self._drifted is not None:
            target = target + correction * self._drifted[:, -1]
        return self._complete(change, target)

    def parts(self, alpha: float, toward: str) -> tuple[Tensor, Tensor | None]:
        """Returns U and D of Δ = U + β·D, [O, K+] from one factorisation; no D without drift."""
        own, drifted = self._own, self._drifted
        if drifted is None:
            change = self._ridge(self._right(alpha, toward, 0.0), alpha).x
            return self._complete(change, own[:, -1]), None
        changes = self._ridge(
            torch.cat([self._right(alpha, toward, 0.0), self._centred(drifted)]), alpha
        ).x.chunk(2)
        return self._complete(changes[0], own[:, -1]), self._complete(changes[1], drifted[:, -1])

    def price(
        self, own: Tensor, drifted: Tensor | None, correction: float | None = None
    ) -> tuple[float, float]:
        """Returns β and ‖T − (W₀ + U + β·D)·R·X‖²; the best β in [0, 1] if none is given."""
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

    def errors(self, change: Tensor) -> tuple[float, float]:
        """Returns ‖T − W'·R·X‖/‖T‖ for Δ = `change` [O, K+], and for Δ = 0."""
        normal, target, before = self._normal(), self._target(), self._squared
        kept = _inner(self.baseline @ normal, self.baseline)
        total = before + 2 * _inner(target, self.baseline) + kept
        after = before - 2 * _inner(target, change) + _inner(change @ normal, change)
        return _relative(after, total), _relative(before, total)

    def _right(self, alpha: float, toward: str, correction: float) -> Tensor:
        """Returns Q or Q − λ W₀ [O, K], centred."""
        right = self._own
        if correction and self._drifted is not None:
            right = right + correction * self._drifted
        right = self._centred(right)
        if toward == "baseline":
            return right
        return right - self.damping(alpha) * self.plain

    def _coupling(self) -> Tensor:
        """Returns G·Rᵀ of the lost channels [D, K], centred."""
        coupling = self._reduction.restrict(self._matrix[self._lost])
        if not self.affine:
            return coupling
        return self._centred(_appended(coupling.double(), self._sum[self._lost]))

    def _ridge(self, right: Tensor, alpha: float) -> ridge.Solution:
        """Returns X [.., K] of X (A + λI) = `right`, centred."""
        if math.isinf(alpha):
            zero = right.new_zeros(())
            return ridge.Solution(right.new_zeros(right.shape, dtype=torch.float64), zero, zero)
        # Centring cancels, so what rounding left on a centred diagonal is of the whole energy.
        rounding = EPS * self._energies * (self._fluctuations() > 0)
        return ridge.solve(self._centred_normal, right, self.damping(alpha), rounding=rounding)

    def _centred(self, right: Tensor) -> Tensor:
        """Eliminates the constant from a right-hand side [.., K+]: [.., K]."""
        if not self.affine:
            return right
        means = self._kept_sum() / self._tokens
        centred = torch.addmm(right[:, :-1], right[:, -1:], means[None], alpha=-1)
        return centred.mul_(self._fluctuations() > 0)

    def _centred_normal(self) -> Tensor:
        """Returns a new A [K, K], the constant eliminated."""
        normal = self._reduction.normal(self._matrix)
        if self.affine:
            sums, varies = self._kept_sum(), self._fluctuations() > 0
            normal.addmm_(sums[:, None], sums[None], alpha=-1 / self._tokens)
            normal.mul_(varies).mul_(varies[:, None])  # else rounding, and maybe not even positive
        return normal

    def _complete(self, change: Tensor, target: Tensor) -> Tensor:
        """Returns Δ and b [.., K+] for Δ [.., K] and the sums [..] of their target."""
        if not self.affine:
            return change
        return _appended(change, (target - change @ self._kept_sum()) / self._tokens)

    def _fluctuations(self) -> Tensor:
        """Returns the diagonal of A [K], centred; 0 where it is only rounding."""
        if not self.affine:
            return self._energies
        left = self._energies - self._kept_sum().square() / self._tokens
        return torch.where(left > ROUNDING * self._energies, left, 0)

    def _kept_sum(self) -> Tensor:
        """Returns the sums r [K] of the kept channels."""
        return self._reduction.restrict(self._sum)

    def _target(self) -> Tensor:
        """Returns Q₁ [O, K+]."""
        return self._own if self._drifted is None else self._own + self._drifted

    def _normal(self) -> Tensor:
        """Returns a new A [K+, K+]."""
        normal = self._reduction.normal(self._matrix)
        if not self.affine:
            return normal
        kept, sums = self._reduction.kept, self._kept_sum()
        bordered = normal.new_empty(kept + 1, kept + 1)
        bordered[:kept, :kept] = normal
        bordered[:kept, kept] = bordered[kept, :kept] = sums
        bordered[kept, kept] = self._tokens
        return bordered


def _appended(columns: Tensor, last: Tensor) -> Tensor:
    """Appends a column to [.., K]: [.., K+1]."""
    return torch.cat([columns, last[:, None]], 1)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.flatten(), b.flatten())


def _relative(squared: Tensor, total: Tensor) -> float:
    # Rounding can leave a perfect fit a little below 0; a dead site (total 0) is rebuilt exactly.
    return (squared.clamp_min(0) / total).sqrt().item() if total > 0 else 0.0
