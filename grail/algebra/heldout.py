"""Choice of the ridge strength and the drift correction on held-out tokens, and on guard text.

Two disjoint sets of tokens suffice. For each α one factorisation of the first gives Δ as a function
of the drift correction β, Δ = U + β·D. The second gives its error in closed form, a parabola in β,
whose minimum in [0, 1] is taken:

    e(β) = ‖T − W₀RX‖² − 2 tr(Q₁ Δᵀ) + tr(Δ A Δᵀ)

No forward pass is repeated, and the first term, the same for all, is left out. An infinite α, plain
pruning or folding, is 0 without any product.

**Sketch.** The outputs enter as Ω W, Ω C: S sums of all outputs with random signs, a row of Ω
[S, O] each. E‖Ω Y‖² = S·‖Y‖² for any Y, and all candidates are compared on the same Ω, so that
errors of different α differ by their difference on all outputs up to a relative noise of about
√(2/S) of that difference. A pair of solve and error takes 4·S·K² FLOPs instead of 4·O·K². With
few outputs, O ≤ 2·S, the choice is made on all of them.

**Search.** In log α the error falls to a minimum and rises after it. The middle of the grid comes
first; its ends are only looked at where the best lies at that side.

**Guard.** With tokens of a second kind of text, which are never fitted, e is the mean of both
errors, each relative to plain pruning's on the same tokens. Candidates that are worse than plain
pruning (α = ∞, β = 0) on either are left out, and β is taken from the interval in which both
parabolas stay below plain pruning's error.

Source: signs as in Achlioptas, J. Comput. Syst. Sci. 66 (2003).
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grail.algebra.problem import Consumers, Moments, Sums, Terms, plain_error
from grail.algebra.reductions import inner

# Little data needs a stronger ridge, much data a weaker one. Of 14 MLPs of SmolLM2 (Brown, 4k and
# 16k tokens) 6 have their minimum at 1, 5 at 0.3, 2 at 0.1 and 1 at 0.01, none a second one. In
# closed loops 3 and 10 are best in none of 30 (Brown, 4k) and 17 MLPs (documentation, 16k), and an
# α of its own for D saves 0.27 and 0.46% of the error, in the median 0.2% and less than 0.01%.
LOW, MIDDLE, HIGH = (1e-5, 1e-4, 1e-3), (1e-2, 1e-1, 0.3), (1.0,)
ALPHAS = (*LOW, *MIDDLE, *HIGH)
# With a guard (documentation 4k, guard Brown 2k) 3 is best in 2 of 30, which lose 1.8 and 0.6% less
# and of which one is else only pruned.
GUARDED = (3.0, 10.0)
# On the same 14, with three draws of signs each, the choice by 32 combinations has a held-out error
# at most 0.013% above the best of the grid, by 16 0.035%, by 64 0.016%.
SKETCH = 32
# Relative to plain pruning's error: an excess below it is fp64's rounding.
_ROUNDING = 1e-9


def mixing(outputs: int, device: torch.device) -> Tensor | None:
    """Returns Ω [S, O] of ±1 in fp64, the same for each number of outputs; None for few."""
    if outputs <= 2 * SKETCH:
        return None
    generator = torch.Generator().manual_seed(outputs)
    signs = torch.randint(2, (SKETCH, outputs), generator=generator, dtype=torch.float64)
    return (2 * signs - 1).to(device)


class Choice:
    """The choice of α and β of E sites: the error on some tokens of what is fitted to others.

    Args:
        consumers: W₀ and V.
        moments, sums: of the tokens that are fitted and, second, of those on which errors are
            compared; a third, if there is one, is the guard (see above).
        toward: see `grail.fit`.
        correction: a fixed β; None for the best.
    """

    def __init__(
        self,
        consumers: Consumers,
        moments: Sequence[Moments],
        sums: Sequence[Sums],
        toward: str,
        correction: float | None,
    ):
        judged = list(zip(moments[1:], sums[1:], strict=True))
        self._weights = consumers.baseline.new_ones(1, len(consumers.baseline))
        if len(judged) > 1:
            plain = torch.stack([plain_error(consumers, *of_set) for of_set in judged])
            self._weights = torch.where(plain > 0, 1 / (len(judged) * plain), 0)
        outputs = mixing(consumers.baseline.shape[1], consumers.baseline.device)
        if outputs is not None:
            consumers = consumers.mixed(outputs)
            self._weights = self._weights / (SKETCH if len(judged) > 1 else 1)
        self._plain, self._toward, self._correction = consumers.baseline, toward, correction
        self._train, self._fitted = moments[0], Terms(consumers, moments[0], sums[0], outputs)
        self._judges = [
            _Judge(of_set, Terms(consumers, of_set, of_tokens, outputs))
            for of_set, of_tokens in judged
        ]
        self._guarded = len(judged) > 1

    def best(self, alpha: float | None) -> list[tuple[float, float]]:
        """Returns α and β of least error for each site; a given `alpha` is kept.

        At most two reads of the device; one more where `alpha` is given.
        """
        every = range(len(self._plain))
        found: list[list[_Price]] = [[] for _ in every]
        if alpha is not None:
            self._add_prices(found, {alpha: every})
            return [(price.alpha, price.correction) for (price,) in found]
        self._add_prices(found, dict.fromkeys((math.inf, *MIDDLE), every))
        low, high = (
            [site for site in every if _nearest(found[site][1:]) == edge]
            for edge in (MIDDLE[0], MIDDLE[-1])
        )
        strong = (*HIGH, *GUARDED) if self._guarded else HIGH
        self._add_prices(found, dict.fromkeys(LOW, low) | dict.fromkeys(strong, high))
        best = [min(prices) for prices in found]
        return [(price.alpha, price.correction) for price in best]

    def _add_prices(
        self, found: Sequence[list["_Price"]], candidates: Mapping[float, Sequence[int]]
    ) -> None:
        """Prices each α for some sites and adds them to those of the site; one read."""
        asked = {alpha: sites for alpha, sites in candidates.items() if sites}
        if not asked:
            return
        alone = len(candidates) == 1
        table = [self._price(alpha, sites, alone) for alpha, sites in asked.items()]
        rows = iter(torch.cat(table).tolist())
        for alpha, sites in asked.items():
            for site in sites:
                error, correction = next(rows)
                # Of equals the first: the one that changes nothing.
                error = math.inf if math.isnan(error) else error
                found[site].append(_Price(error, len(found[site]), alpha, correction))

    def _price(self, alpha: float, sites: Sequence[int], retry: bool) -> Tensor:
        """Returns the held-out error for an α, and its β, [n, 2].

        Args:
            retry: whether λ grows where a factorisation fails; else the error is NaN there.
        """
        part = None
        if len(sites) < len(self._plain):
            part = torch.tensor(sites, dtype=torch.int64, device=self._plain.device)
        own, drifted, good = self._changes(alpha, part, retry)
        each = [judge.part(part).errors(own, drifted) for judge in self._judges]
        error, slope, curvature = (torch.stack(terms) for terms in zip(*each, strict=True))
        weights = self._weights if part is None else self._weights[:, part]
        correction = torch.full_like(error[0], self._correction or 0.0)
        if drifted is not None:
            if self._correction is None:
                correction = _best_correction(error, slope, curvature, weights, self._guarded)
            error = error - 2 * correction * slope + correction.square() * curvature
        price = (weights * error).sum(0)
        if self._guarded:  # plain pruning's is 0
            worse = (weights * error > _ROUNDING).any(0)
            price = torch.where(worse, math.inf, price)
        return torch.stack([torch.where(good, price, math.nan), correction], 1)

    def _changes(
        self, alpha: float, part: Tensor | None, retry: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Returns U and D [n, S, K+] of Δ = U + β·D, no D without drift, and where they hold."""
        terms, train = self._fitted.part(part), self._train.part(part)
        rights = [terms.own] if terms.drifted is None else [terms.own, terms.drifted]
        wanted = [train.centre(right) for right in rights]
        good = torch.ones(len(terms.own), dtype=torch.bool, device=terms.own.device)
        if math.isinf(alpha):
            changes = [torch.zeros_like(right) for right in wanted]
        else:
            damping = train.damping(alpha)
            if self._toward == "zero":
                plain = self._plain if part is None else self._plain[part]
                wanted[0].addcmul_(damping[:, None, None], plain, value=-1)
            stacked = torch.cat(wanted, 1)
            if retry:
                found = train.solve(stacked, damping).x
            else:
                found, good = train.attempt(stacked, damping)
            changes = list(found.chunk(len(rights), 1))
        own, *drifted = (
            train.complete(change, right[..., -1])
            for change, right in zip(changes, rights, strict=True)
        )
        return own, drifted[0] if drifted else None, good


class _Judge(NamedTuple):
    """Tokens on which candidates are compared."""

    moments: Moments
    terms: Terms

    def part(self, sites: Tensor | None) -> "_Judge":
        """Returns the judge of some of the sites, by number; None is all."""
        return _Judge(self.moments.part(sites), self.terms.part(sites))

    def errors(self, own: Tensor, drifted: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns a, b and c [E] of the error a − 2·b·β + c·β² of U + β·D."""
        target, seen = self.terms.target, self.moments.times(own)
        error = inner(seen, own) - 2 * inner(target, own)
        if drifted is None:
            return error, torch.zeros_like(error), torch.zeros_like(error)
        slope = inner(target - seen, drifted)
        return error, slope, inner(self.moments.times(drifted), drifted)


def _best_correction(
    error: Tensor, slope: Tensor, curvature: Tensor, weights: Tensor, guarded: bool
) -> Tensor:
    """Returns the β [E] in [0, 1] of the least weighted error of J parabolas [J, E].

    Args:
        guarded: whether β is from the interval in which no parabola is above 0.
    """
    total = (weights * curvature).sum(0)
    best = torch.where(total > 0, ((weights * slope).sum(0) / total).clamp(0, 1), 0)
    if not guarded:
        return best
    centre = slope / curvature
    width = (centre.square() - error / curvature).clamp(min=0).sqrt()
    low = torch.where(curvature > 0, centre - width, 0).amax(0)
    high = torch.where(curvature > 0, centre + width, 1).amin(0)
    return best.maximum(low).minimum(high).clamp(0, 1)


class _Price(NamedTuple):
    """The held-out error of a site for an α; the preferred one sorts first."""

    error: float
    order: int
    alpha: float
    correction: float


def _nearest(prices: Sequence[_Price]) -> float:
    """Returns the α of least error; where none is allowed, the one that changes least."""
    return min(prices, key=lambda price: (price.error, -price.alpha)).alpha
