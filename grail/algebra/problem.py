"""The ridge problem of one site: its terms, its solution and its errors, in fp64.

With A = R G Rᵀ, λ = α·mean(diag A), W₀ the consumer of plain pruning or folding, and V = W − W₀R
what that leaves out (for a selection: the dropped columns of W, nothing else),

    Q  = V G Rᵀ + β C Rᵀ                     the part that the kept channels can predict
    Δ  = Q (A + λI)⁻¹,   W' = W₀ + Δ         toward the baseline: λ→∞ is W₀
    Δ  = (Q − λ W₀)(A + λI)⁻¹                toward zero; the paper's W G Rᵀ (A + λI)⁻¹ at β = 0

C = Σ δ xᵀ is the drift's share (`grail.algebra.drift`). The target is W x + β δ; at β = 1 it is the
dense network's stream after the consumer. Δ is linear in β. Where T = Σ t xᵀ was recorded instead
of C,

    C Rᵀ = T Rᵀ − W₀ A − V G Rᵀ

**Errors.** They come from the same products, before a weight is touched. Their target is
T = W x + δ, or W x where no drift was recorded; Q₁ is Q at β = 1:

    ‖T − W₀RX‖² = tr(V G Vᵀ) + 2 tr(V Cᵀ) + Σ|δ|²     or   Σ|t|² − 2 tr(T Rᵀ W₀ᵀ) + tr(W₀ A W₀ᵀ)
    ‖T‖²        = ‖T − W₀RX‖² + 2 tr(Q₁ W₀ᵀ) + tr(W₀ A W₀ᵀ)
    ‖T − W'RX‖² = ‖T − W₀RX‖² − 2 tr(Q₁ Δᵀ) + tr(Δ A Δᵀ)

The solve has given Δ A = B := Q − λΔ, toward zero Q − λ W₀ − λΔ, so that tr(Δ A Δᵀ) needs no
product. With the rounding ε of the weights, Δ̂ = Δ + ε,

    tr(Δ̂ A Δ̂ᵀ) = tr(B Δᵀ) + 2 tr(ε Bᵀ) + tr(ε A εᵀ)

The last term is a product in fp32 for weights of 16 bits; of fp32 weights it is 1e-14 of ‖W'RX‖²,
below the rounding of an fp32 Gram.

**Affine.** A consumer with a bias reads one more channel: the constant 1, which is always kept,
which plain reduction leaves alone, and which no ridge damps. It comes last, and all of the above
holds of K+1 channels as it stands, sums over different tokens included:

    A → [A  r; rᵀ N],   Q → [Q, q],   W₀ → [W₀, 0],   Δ → [Δ, b],   q = V s + β d

with r = R s, s = Σ x, d = Σ δ = Σ t − W₀ r − V s. The solve eliminates the constant first: it
centres the sums and takes λ from the centred A. The bias follows:

    A − r rᵀ/N,   Q − q rᵀ/N,   b = (q − Δ r)/N = ((W − W'R) s + β d)/N

and tr([Δ b] A [Δ b]ᵀ) is that of the centred A and |q|²/N. With λ→∞ and β = 0 only b = V s/N is
left: FLAP's bias compensation (An et al., AAAI 2024).

**Batches.** Everything has a leading dimension E: the experts of a layer are fitted together, a
site alone is a batch of one.

FLOPs for O outputs and D channels in V: 2·O·D·K for V G Rᵀ, O·D² for tr(V G Vᵀ) unless a target was
recorded, O·K² to 2·O·K² for W₀ A, K³/3 + 2·O·K² for the solve.

Source: GRAIL (arXiv 2602.23795), equations of section 3; the drift's share, the affine form and
the errors are this project's.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from grail.algebra import ridge
from grail.algebra.gram import Gram
from grail.algebra.reductions import Reductions, inner, symmetric_energy
from grail.algebra.sums import rows_of
from grail_kernels import full_fp32

# An fp32 Gram's rounding, relative to |X|ᵀ|X| (the bound of reference BLAS's syrk test): a centred
# energy below it is that of a constant.
EPS = torch.finfo(torch.float32).eps
ROUNDING = 16 * EPS

_Batch = TypeVar("_Batch", bound="Moments | Terms")


@dataclass(frozen=True)
class Consumers:
    """The split W = W₀·R + V of E consumers into the part that plain reduction keeps and the rest.

    `baseline`: W₀ [E, O, K]. `left_out`: V [E, O, D], the columns `reductions.lost`. Both fp64.
    `affine`: whether they read a constant as well.
    """

    reductions: Reductions
    baseline: Tensor
    left_out: Tensor
    affine: bool = False

    @classmethod
    def of(cls, weight: Tensor, reductions: Reductions, affine: bool) -> "Consumers":
        """Returns the split of dense weights [E, O, H]."""
        return cls(reductions, *reductions.split(weight), affine)

    def mixed(self, mixing: Tensor) -> "Consumers":
        """Returns the consumers of the outputs' combinations, `mixing` [S, O]."""
        mixed = (mixing @ self.baseline, mixing @ self.left_out)
        return Consumers(self.reductions, *mixed, self.affine)


class Sums:
    """The sums of E sites over one set of tokens, as they lie in their Grams.

    `packed`: G [E, P] fp32. `total`: s [E, H] fp32. `tokens`: N [E] fp64. `recorded`: tokens with a
    drift, [E] fp64. `cross`: C, or T if `of_target`, [E, O, H] fp32, None without; its `drift_sum`
    [E, O] and `energy` [E], fp64. All but T are of the recorded tokens.
    """

    def __init__(self, grams: Sequence[Gram]):
        sums, drifts = zip(*((gram.readable(), gram.drift) for gram in grams), strict=True)
        self.packed = rows_of([each.packed for each in sums])
        self.total = rows_of([each.total for each in sums])
        counts = [[gram.tokens, gram.drift_tokens] for gram in grams]
        table = torch.tensor(counts, dtype=torch.float64, device=self.total.device)
        self.tokens, self.recorded = table.unbind(1)
        self.of_target, self.cross = False, None
        if drifts[0] is not None:
            self.of_target = drifts[0].of_target
            self.cross = rows_of([drift.cross for drift in drifts])
            self.drift_sum = rows_of([drift.sum for drift in drifts])
            self.energy = torch.stack([drift.energy for drift in drifts])

    def add(self, other: "Sums") -> None:
        """Adds the sums of other tokens; those of a Gram are not changed."""
        self.packed = self.packed + other.packed
        self.total = self.total + other.total
        self.tokens = self.tokens + other.tokens
        self.recorded = self.recorded + other.recorded
        if self.cross is None:
            self.of_target, self.cross = other.of_target, other.cross
            if self.cross is not None:
                self.drift_sum, self.energy = other.drift_sum, other.energy
        elif other.cross is not None:
            self.cross = self.cross + other.cross
            self.drift_sum = self.drift_sum + other.drift_sum
            self.energy = self.energy + other.energy

    @property
    def scale(self) -> Tensor:
        """Returns the factor [E] that scales the sums of a drift to all tokens."""
        return torch.where(self.recorded > 0, self.tokens / self.recorded, 0)


class Moments:
    """A [E, K, K], r [E, K] and N [E] of the kept channels over one set of tokens.

    Args:
        consumers: whose reductions, and whether they read a constant.
        sums: of the tokens.
    """

    def __init__(self, consumers: Consumers, sums: Sums):
        reductions, self._affine = consumers.reductions, consumers.affine
        self.normal = reductions.normal(sums.packed)
        self.sum = reductions.restrict(sums.total.double()[:, None])[:, 0]
        self.tokens = sums.tokens

    def add(self, other: "Moments") -> None:
        """Adds the moments of other tokens."""
        self.normal += other.normal
        self.sum = self.sum + other.sum
        self.tokens = self.tokens + other.tokens

    def part(self, sites: Tensor | None) -> "Moments":
        """Returns the moments of some of the sites, by number; None is all."""
        return self if sites is None else _of_sites(self, sites)

    def damping(self, alpha: Tensor | float) -> Tensor:
        """Returns λ [E] for relative strengths."""
        return alpha * self._fluctuations().mean(-1)

    def attempt(self, right: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
        """Returns X [E, O, K] of X (A + λI) = `right`, centred, and the mask [E] of success.

        Nothing is read from the device.
        """
        return ridge.attempt(self.centred(), right, damping, rounding=self.rounding())

    def solve(self, right: Tensor, damping: Tensor) -> ridge.Solution:
        """Returns X as `attempt`, with a larger λ where a factorisation fails."""
        return ridge.solve(self.centred, right, damping, rounding=self.rounding())

    def rounding(self) -> Tensor:
        """Returns what rounding may have left on the diagonal of the centred A [E, K]."""
        # Centring cancels, so that is of the whole energy.
        return EPS * self._energies() * (self._fluctuations() > 0)

    def centred(self) -> Tensor:
        """Returns a new A [E, K, K], the constant eliminated."""
        normal = self.normal.clone()
        if self._affine:
            varies = self._fluctuations() > 0
            outer = self.sum[:, :, None] * (self.sum / self.tokens[:, None])[:, None]
            normal.sub_(outer)
            # Else rounding, and maybe not even positive.
            normal.mul_(varies[:, :, None]).mul_(varies[:, None])
        return normal

    def centre(self, right: Tensor) -> Tensor:
        """Eliminates the constant from a right-hand side [E, O, K+]: a new [E, O, K]."""
        if not self._affine:
            return right.clone()
        means = self.sum / self.tokens[:, None]
        centred = torch.baddbmm(right[..., :-1], right[..., -1:], means[:, None], alpha=-1)
        return centred.mul_((self._fluctuations() > 0)[:, None])

    def complete(self, change: Tensor, last: Tensor) -> Tensor:
        """Returns [Δ, b] [E, O, K+] for Δ [E, O, K] and the last column of its right-hand side."""
        if not self._affine:
            return change
        rest = last[..., None] - change @ self.sum[:, :, None]
        return torch.cat([change, rest / self.tokens[:, None, None]], -1)

    def times(self, change: Tensor) -> Tensor:
        """Returns Δ·A [E, O, K+] for Δ [E, O, K+], the constant included."""
        if not self._affine:
            return change @ self.normal
        change, bias = change[..., :-1], change[..., -1:]
        product = torch.baddbmm(bias * self.sum[:, None], change, self.normal)
        last = change @ self.sum[:, :, None] + bias * self.tokens[:, None, None]
        return torch.cat([product, last], -1)

    def normalised(self) -> tuple[Tensor, Tensor]:
        """Returns the centred A/m [E, K, K] in fp32, and m [E], the mean of A's diagonal."""
        mean = self._energies().mean(-1)
        inverse = torch.where(mean > 0, 1 / mean, 0)[:, None, None]
        return self.centred().mul_(inverse).float(), mean

    def _energies(self) -> Tensor:
        return self.normal.diagonal(dim1=-2, dim2=-1)

    def _fluctuations(self) -> Tensor:
        """Returns the diagonal of A [E, K], centred; 0 where it is only rounding."""
        energies = self._energies()
        if not self._affine:
            return energies
        left = energies - self.sum.square() / self.tokens[:, None]
        return torch.where(left > ROUNDING * energies, left, 0)


class Terms:
    """V·G·Rᵀ and C·Rᵀ of consumers, with the constant's column [E, O, K+] in fp64.

    Args:
        consumers: W₀ and V of the outputs, or of combinations of them.
        moments, sums: of the same tokens.
        mixing: the combinations [S, O]; None are the outputs.

    `own`: V G Rᵀ. `drifted`: C Rᵀ, or None. `kept`: W₀ A, only for a target.
    """

    def __init__(
        self, consumers: Consumers, moments: Moments, sums: Sums, mixing: Tensor | None = None
    ):
        reductions = consumers.reductions
        self.own = reductions.absorb(consumers.left_out, sums.packed)
        if consumers.affine:
            lost = sums.total.double().gather(1, reductions.lost)
            self.own = torch.cat([self.own, consumers.left_out @ lost[:, :, None]], -1)
        self.drifted: Tensor | None = None
        self.kept: Tensor | None = None
        if sums.cross is None:
            return
        cross, drift_sum = sums.cross, sums.drift_sum
        if mixing is not None:
            with full_fp32(cross.device):
                cross = mixing.float() @ cross
            drift_sum = drift_sum @ mixing.mT
        self.drifted = reductions.restrict(cross)
        if consumers.affine:
            self.drifted = torch.cat([self.drifted, drift_sum[:, :, None]], -1)
        if sums.of_target:
            baseline = consumers.baseline
            if consumers.affine:
                baseline = torch.cat([baseline, torch.zeros_like(baseline[..., :1])], -1)
            self.kept = moments.times(baseline)
            self.drifted.sub_(self.kept).sub_(self.own)
        else:
            self.drifted.mul_(sums.scale[:, None, None])

    def part(self, sites: Tensor | None) -> "Terms":
        """Returns the terms of some of the sites, by number; None is all."""
        return self if sites is None else _of_sites(self, sites)

    @property
    def target(self) -> Tensor:
        """Q₁ [E, O, K+]."""
        return self.own if self.drifted is None else self.own + self.drifted

    def with_baseline(self, plain: Tensor) -> Tensor:
        """Returns tr(Q₁·W₀ᵀ) [E]."""
        parts = [self.own] if self.drifted is None else [self.own, self.drifted]
        return torch.stack([inner(part[..., : plain.shape[2]], plain) for part in parts]).sum(0)

    def right(self, correction: Tensor) -> Tensor:
        """Returns Q [E, O, K+] for β [E]."""
        if self.drifted is None:
            return self.own
        return torch.addcmul(self.own, correction[:, None, None], self.drifted)


@dataclass(frozen=True)
class Solution:
    """Δ [E, O, K] for E sites, and what their errors need.

    `change`: Δ. `seen`: Δ·A. `last`: the last column of Q [E, O, K+]. `damping`, `retries` [E]: see
    `ridge.solve`. `good` [E]: whether the factorisation held.
    """

    change: Tensor
    seen: Tensor
    last: Tensor
    damping: Tensor
    retries: Tensor
    good: Tensor


class Problem:
    """The problems of E consumers over one set of tokens, to be solved and measured.

    Args:
        consumers: W₀ and V.
        moments, sums: of the same tokens.
    """

    def __init__(self, consumers: Consumers, moments: Moments, sums: Sums):
        self._consumers, self._moments, self._sums = consumers, moments, sums
        self._terms = Terms(consumers, moments, sums)
        self._before, self._total = self._baseline_errors()
        self._terms.kept = None  # large

    @property
    def baseline(self) -> Tensor:
        """W₀ [E, O, K]."""
        return self._consumers.baseline

    @property
    def before(self) -> Tensor:
        """‖T − W₀·R·X‖² [E]."""
        return self._before

    @property
    def total(self) -> Tensor:
        """‖T‖² [E]."""
        return self._total

    def _baseline_errors(self) -> tuple[Tensor, Tensor]:
        """Returns ‖T − W₀·R·X‖² and ‖T‖², [E] each."""
        consumers, sums, terms = self._consumers, self._sums, self._terms
        plain = consumers.baseline
        wanted = terms.with_baseline(plain)
        if terms.kept is not None:  # Q₁ is T Rᵀ − W₀ A
            energy = inner(terms.kept[..., : plain.shape[2]], plain)
            return sums.energy - 2 * wanted - energy, sums.energy
        energy = symmetric_energy(plain, self._moments.normal)
        before = plain_error(consumers, self._moments, sums)
        return before, before + 2 * wanted + energy

    def solve(
        self,
        alpha: Sequence[float],
        correction: Sequence[float],
        toward: str,
        retry: bool = False,
    ) -> Solution:
        """Returns Δ for an α and a β of each site. An infinite α gives 0, whatever `toward` is.

        Args:
            retry: whether λ grows where a factorisation fails, for which the device is read; and
                whether values that are not finite raise.

        Raises:
            NonFiniteError, SolveError: see `ridge.solve`.
        """
        like = self.baseline
        finite = torch.tensor(
            [math.isfinite(a) for a in alpha], dtype=torch.bool, device=like.device
        )
        right = self._terms.right(like.new_tensor(correction))
        last = right[..., -1].clone()
        none = torch.zeros_like(finite, dtype=torch.float64)
        if not any(map(math.isfinite, alpha)):
            zero = torch.zeros_like(self.baseline)
            return Solution(zero, zero, last, none, none, torch.ones_like(finite))
        alphas = like.new_tensor([a if math.isfinite(a) else 1.0 for a in alpha])
        damping = self._moments.damping(alphas)
        drifts = self._terms.drifted is not None and any(correction)
        wanted = self._moments.centre(right)
        del right  # large
        if toward == "zero":
            wanted.addcmul_(damping[:, None, None], self.baseline, value=-1)
        few = self._loses_few() and toward == "baseline" and not drifts
        against = self._coupling() if few else wanted
        if retry:
            found = self._moments.solve(against, damping)
            x, damping, retries = found.x, found.damping, found.retries
            good = torch.ones_like(finite, dtype=torch.bool)
        else:
            x, good = self._moments.attempt(against, damping)
            retries = none
        change = self._consumers.left_out @ x if few else x
        seen = wanted.addcmul_(damping[:, None, None], change, value=-1)
        if not all(map(math.isfinite, alpha)):
            change, seen = (torch.where(finite[:, None, None], t, 0) for t in (change, seen))
            damping, good = torch.where(finite, damping, 0), good | ~finite
        return Solution(change, seen, last, damping, retries, good)

    def complete(self, change: Tensor, solution: Solution) -> Tensor:
        """Returns Δ [E, O, K], for an affine consumer with the b of zero mean error: [E, O, K+]."""
        return self._moments.complete(change, solution.last)

    def error_of(self, change: Tensor) -> Tensor:
        """Returns ‖T − W'·R·X‖² [E] for any Δ [E, O, K+]; one product."""
        gain, curvature = self._along(change)
        return self._before - gain + curvature

    def share_within(self, change: Tensor) -> Tensor:
        """Returns the largest share [E] in [0, 1] of a Δ [E, O, K+] that makes no error larger."""
        gain, curvature = self._along(change)
        return torch.where(gain >= curvature, 1.0, gain / curvature).clamp(0, 1)

    def _along(self, change: Tensor) -> tuple[Tensor, Tensor]:
        """Returns 2 tr(Q₁ Δᵀ) and tr(Δ A Δᵀ) [E] for Δ [E, O, K+]."""
        gain = 2 * inner(self._terms.own, change)
        if self._terms.drifted is not None:
            gain += 2 * inner(self._terms.drifted, change)
        return gain, inner(self._moments.times(change), change)

    @staticmethod
    def shortened(solution: Solution, share: Tensor) -> Solution:
        """Returns a share [E] of a solution, of its biases, too."""
        part, last = share[:, None, None], solution.last * share[:, None]
        change, seen = solution.change * part, solution.seen * part
        return replace(solution, change=change, seen=seen, last=last)

    def errors(
        self, solution: Solution, change: Tensor, coarse: Sequence[slice] = ()
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns ‖T − W'·R·X‖², that of W₀, and ‖T‖², [E] each.

        Args:
            change: Δ̂ [E, O, K+], of the rounded weights and `complete`.
            coarse: the outputs whose weights have 16 bits.
        """
        terms, own = self._terms, change[..., : self.baseline.shape[2]]
        after = self._before - 2 * inner(terms.own, change)
        if terms.drifted is not None:
            after -= 2 * inner(terms.drifted, change)
        after += 2 * inner(solution.seen, own) - inner(solution.seen, solution.change)
        if self._consumers.affine:
            after += solution.last.square().sum(-1) / self._moments.tokens
        if coarse:
            normal, scale = self._moments.normalised()
            for rows in coarse:
                rounding = own[:, rows] - solution.change[:, rows]
                after += scale * _energy_of_rounding(rounding, normal)
        return after, self._before, self._total

    def _loses_few(self) -> bool:
        """Returns whether to solve for the lost channels and absorb them, not for the outputs.

        2·D·K² FLOPs and 2·O·D·K, or 2·O·K².
        """
        _, outputs, kept = self.baseline.shape
        return 0 < self._consumers.left_out.shape[2] * (kept + outputs) < outputs * kept

    def _coupling(self) -> Tensor:
        """Returns G·Rᵀ of the lost channels [E, D, K], centred."""
        reductions = self._consumers.reductions
        lost = self._consumers.left_out.shape[2]
        every = torch.eye(lost, dtype=torch.float64, device=self.baseline.device)
        coupling = reductions.absorb(every.expand(len(self.baseline), -1, -1), self._sums.packed)
        if self._consumers.affine:
            sums = self._sums.total.double().gather(1, reductions.lost)
            coupling = torch.cat([coupling, sums[:, :, None]], -1)
        return self._moments.centre(coupling)


def plain_error(consumers: Consumers, moments: Moments, sums: Sums) -> Tensor:
    """Returns ‖T − W₀·R·X‖² [E], the error of plain pruning or folding, over some tokens.

    Args:
        moments, sums: of the same tokens.
    """
    reductions, plain = consumers.reductions, consumers.baseline
    if sums.cross is not None and sums.of_target:
        kept = symmetric_energy(plain, moments.normal)
        return sums.energy - 2 * inner(reductions.restrict(sums.cross), plain) + kept
    before = reductions.energy(consumers.left_out, sums.packed)
    if sums.cross is not None:
        lost = reductions.columns_of_lost(sums.cross)
        drift = sums.energy + 2 * inner(lost.double(), consumers.left_out)
        before = before + sums.scale * drift
    return before


def _energy_of_rounding(rounding: Tensor, normal: Tensor) -> Tensor:
    """Returns tr(ε·A·εᵀ) [E] for ε [E, O, K] fp64, overwritten, and A [E, K, K] fp32."""
    size = torch.linalg.vector_norm(rounding, math.inf, dim=(1, 2))
    rounding.mul_(torch.where(size > 0, 1 / size, 0)[:, None, None])
    narrow = rounding.float()
    with full_fp32(narrow.device):
        return inner(narrow @ normal, narrow).double() * size.square()


def _of_sites(batch: _Batch, sites: Tensor) -> _Batch:
    """Returns a copy of an object whose tensors are those of some sites."""
    part = copy.copy(batch)
    for name, value in vars(batch).items():
        if isinstance(value, Tensor):
            setattr(part, name, value[sites])
    return part
