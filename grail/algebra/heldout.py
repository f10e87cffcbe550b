"""Choice of the ridge strength and the drift correction on held-out tokens.

Two disjoint sets of tokens suffice. For each α one factorisation of the first gives Δ as a function
of the drift correction β, Δ = U + β·D. The second gives its error in closed form, a parabola in β,
whose minimum in [0, 1] is taken:

    e(β) = ‖T − W₀RX‖² − 2 tr(Q₁ Δᵀ) + tr(Δ A Δᵀ)

No forward pass is repeated, and the first term, the same for all, is left out. An infinite α, plain
pruning or folding, is 0 without any product.

**Sketch.** The outputs enter as Ω W, Ω C: S sums of all outputs with random signs, a row of Ω
[S, O] each. E‖Ω Y‖² = S·‖Y‖² for any Y, and all candidates are compared on the same Ω, so that
errors of different α differ by their difference on all outputs up to a relative noise of about
√(2/S) of that difference. A pair of solve and error takes 4·S·K² FLOPs in the place of 4·O·K². With
few outputs, O ≤ 2·S, the choice is made on all of them.

**Search.** In log α the error falls to a minimum and rises after it. The middle of the grid comes
first; its ends are only looked at where the best lies at that side.

Source: signs as in Achlioptas, J. Comput. Syst. Sci. 66 (2003).
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grail.algebra.problem import Consumers, Moments, Sums, Terms
from grail.algebra.reductions import inner

# Little data needs a stronger ridge, much data a weaker one. Of 14 MLPs of SmolLM2 (Brown, 4k and
# 16k tokens) 6 have their minimum at 1, 5 at 0.3, 2 at 0.1 and 1 at 0.01, none a second one.
LOW, MIDDLE, HIGH = (1e-5, 1e-4, 1e-3), (1e-2, 1e-1, 0.3), (1.0,)
ALPHAS = (*LOW, *MIDDLE, *HIGH)
# On the same 14, with three draws of signs each, the choice by 32 combinations has a held-out error
# at most 0.013% above the best of the grid, by 16 0.035%, by 64 0.016%.
SKETCH = 32


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
        moments, sums: of the tokens that are fitted and, second, of those held out.
        toward: see `grail.fit`.
        correction: a fixed β; None for the best.
    """

    def __init__(
        self,
        consumers: Consumers,
        moments: tuple[Moments, Moments],
        sums: tuple[Sums, Sums],
        toward: str,
        correction: float | None,
    ):
        outputs = mixing(consumers.baseline.shape[1], consumers.baseline.device)
        if outputs is not None:
            consumers = consumers.mixed(outputs)
        self._plain, self._toward, self._correction = consumers.baseline, toward, correction
        self._train, self._held_out = moments
        self._fitted, self._judged = (
            Terms(consumers, of_set, of_tokens, outputs)
            for of_set, of_tokens in zip(moments, sums, strict=True)
        )

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
            [site for site in every if min(found[site][1:]).alpha == edge]
            for edge in (MIDDLE[0], MIDDLE[-1])
        )
        self._add_prices(found, dict.fromkeys(LOW, low) | dict.fromkeys(HIGH, high))
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
        judged, held_out = self._judged.part(part), self._held_out.part(part)
        target, seen = judged.target, held_out.times(own)
        error = inner(seen, own) - 2 * inner(target, own)
        correction = torch.full_like(error, self._correction or 0.0)
        if drifted is not None:
            slope = inner(target - seen, drifted)
            curvature = inner(held_out.times(drifted), drifted)
            if self._correction is None:
                best = (slope / curvature).clamp(0, 1)
                correction = torch.where(curvature > 0, best, 0)
            error = error - 2 * correction * slope + correction.square() * curvature
        return torch.stack([torch.where(good, error, math.nan), correction], 1)

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


class _Price(NamedTuple):
    """The held-out error of a site for an α; the preferred one sorts first."""

    error: float
    order: int
    alpha: float
    correction: float
