"""What becomes of a site, by its statistics: the channels that stay, its consumers' weights."""

import itertools
import math
import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from grail import select
from grail.algebra._fit import Auto, Fit, Toward, fit
from grail.algebra.gram import Gram
from grail.algebra.reduction import Folding, Reduction, Selection, as_reduction
from grail.algebra.width import Width
from grail.errors import InputError
from grail.networks import BoundSite
from grail.networks.layers import Consumer, stacked
from grail.recipe import ALPHA, Recipe
from grail.report.report import SiteReport
from grail.runtime.clock import Clock
from grail.runtime.processes import Decision
from grail.statistics.site_statistics import SiteStatistics
from grail_kernels.arguments import as_vector


class SiteSolver:
    """Decides for one run.

    Args:
        options: how to decide.
        sites: all that the run may narrow, while nothing is narrow yet.
        widths: what each of them is to get, by name.
        clock: phases "select" and "solve".

    `done`: the rows of the blocks that are done, of which a choice may learn.
    """

    def __init__(
        self,
        recipe: Recipe,
        sites: Sequence[BoundSite],
        widths: Mapping[str, Width],
        clock: Clock,
    ):
        self._recipe, self._widths, self._clock = recipe, widths, clock
        narrowed = (site.kind for site in sites if widths[site.name].kept < site.channels)
        self._several_kinds = len(set(narrowed)) > 1
        self._select = select.get(recipe.selector)
        self.done: Sequence[SiteReport] = ()

    def decide(
        self, site: BoundSite, collected: Sequence[SiteStatistics], gradient: Tensor | None
    ) -> Decision:
        """What becomes of a site, by what each of its consumers reads.

        A folding that is to be fitted exactly has no fits yet: its block must run folded first.
        """
        with self._clock("select"):
            reduction = self._reduction(site, collected, gradient)
        if isinstance(reduction, Folding) and self._folds_exactly(site):
            return Decision(reduction, (), ())
        return self.fitted(site, collected, reduction)

    def fitted(
        self,
        site: BoundSite,
        collected: Sequence[SiteStatistics],
        reduction: Reduction,
        correction: float | Auto | None = None,
    ) -> Decision:
        """The fits of a site whose reduction is known; `correction` in place of the options'."""
        pairs = zip(collected, site.consumers, strict=True)
        return Decision(
            reduction,
            tuple(self._fit_consumer(part, c, reduction, correction) for part, c in pairs),
            tuple(part.tokens for part in collected),
            tuple(
                f"{part.name}: {part.train.tokens} tokens are too few to fit {reduction.kept} "
                "channels, so it was only pruned"
                for part in collected
                if self._recipe.fits_weights and part.underdetermined(reduction.kept)
            )
            + tuple(
                f"{part.name}: {part.dropped} tokens with NaN or Inf were dropped, "
                f"{part.tokens} counted"
                for part in collected
                if part.dropped
            ),
        )

    def corrected(self, collected: SiteStatistics) -> Decision:
        """The M of layers that read the stream, by what they read and its drift (`grail.loop`)."""
        channels = collected.train.channels
        everything = Selection(range(channels), channels)
        identity = torch.eye(channels, dtype=torch.float64, device=collected.train.device)
        fitted = self._fit(collected, identity, everything, toward="baseline", affine=False)
        return Decision(everything, (fitted,), (collected.tokens,))

    def view(
        self, site: BoundSite, collected: Sequence[SiteStatistics], gradient: Tensor | None
    ) -> select.View:
        """What a selector is shown of a site."""
        # Seeded by the site as well, so that a block's draw depends on no other block.
        generator = torch.Generator().manual_seed(
            self._recipe.seed ^ zlib.crc32(site.name.encode())
        )
        gram = collected[0].channels
        if len(collected) > 1:
            gram = Gram(site.channels, name=site.name)
            for statistics in collected:
                gram.merge(statistics.channels)
        weight, width = stacked(site.consumers), self._widths[site.name]
        share = self._expected_share(site, collected)
        return select.View(
            site.weights(), weight, gram, width, generator, gradient, share, len(collected)
        )

    def _folds_exactly(self, site: BoundSite) -> bool:
        alone = site.group is None  # experts are narrowed together
        return self._recipe.folds_exactly and alone and site.fits_outputs(self._recipe.per_tap)

    def _fit_consumer(
        self,
        statistics: SiteStatistics,
        consumer: Consumer,
        reduction: Reduction,
        correction: float | Auto | None,
    ) -> Fit:
        weight = consumer.by_channel
        if self._recipe.per_tap:
            weight, reduction = consumer.by_tap, reduction.repeat(consumer.taps)
        toward, affine = self._recipe.toward, self._recipe.shifts_bias
        return self._fit(statistics, weight, reduction, toward, affine, correction)

    def _fit(
        self,
        statistics: SiteStatistics,
        weight: Tensor,
        reduction: Reduction,
        toward: Toward,
        affine: bool,
        correction: float | Auto | None = None,
    ) -> Fit:
        recipe = self._recipe
        alpha, compensate = recipe.alpha, recipe.fits_weights
        correction = recipe.drift_correction if correction is None else correction
        if statistics.held_out is None:  # nothing to choose by
            alpha = ALPHA if alpha == "auto" else alpha
            correction = 0.0 if correction == "auto" else correction
        if compensate and statistics.underdetermined(reduction.kept):
            compensate = False
        if statistics.underdetermined(1):  # an expert that was never asked
            plain = reduction.absorb(weight)
            return Fit((plain,), math.nan, math.nan, math.inf, 0.0, 0.0, retries=0)
        with self._clock("solve"):
            return fit(
                statistics.train,
                reduction,
                weight,
                alpha=alpha,
                toward=toward,
                damping=recipe.damping,
                affine=affine,
                compensate=compensate,
                drift_correction=correction,
                held_out=statistics.held_out,
            )

    def _reduction(
        self, site: BoundSite, collected: Sequence[SiteStatistics], gradient: Tensor | None
    ) -> Reduction:
        width = self._widths[site.name]
        if width.kept == site.channels:
            return Selection(range(site.channels), site.channels)
        view = self.view(site, collected, gradient)
        # Of an expert that was never asked only its weights are known.
        unseen = site.group is not None and not view.gram.tokens
        answer = (select.get("magnitude") if unseen else self._select)(view)
        reduction = _as_reduction(answer, width, f"the selector's answer at {site.name}")
        if (reduction.channels, reduction.kept) != (width.channels, width.kept):
            raise InputError(
                f"the selector answered {reduction!r} at {site.name}, where {width} must stay"
            )
        return reduction

    def _expected_share(self, site: BoundSite, collected: Sequence[SiteStatistics]) -> float:
        """The share of drift that a choice of channels is to reckon with.

        Where held-out tokens choose it, after the channels, it is what they chose a block earlier:
        of few tokens most of what seems to drift is noise, which a choice of channels cannot tell.
        It is 0 where a consumer is only pruned, where there are several, for each drifts on its
        own, and where sites of several kinds are narrowed: with SmolLM2's heads and MLPs, both at
        half, perplexity rose from 125 to 134 (Brown, 32k tokens), with its MLPs alone it fell.
        """
        alone = len(collected) == 1 and not collected[0].underdetermined(
            self._widths[site.name].kept
        )
        if self._several_kinds or not alone:
            return 0.0
        share = self._recipe.drift_correction
        return _last_share(self.done, site.kind) if share == "auto" else share


def _as_reduction(answer: object, width: Width, what: str) -> Reduction:
    """Returns the reduction that a selector gave; scores [H] select the highest."""
    if isinstance(answer, Reduction):
        return answer
    answer = as_vector(what, answer)
    if answer.is_floating_point():
        return select.highest(answer, width, what)
    return as_reduction(answer, width.channels)


def _last_share(rows: Sequence[SiteReport], kind: str) -> float:
    """The share of drift that sites of a kind undo in the last block that narrows any, by token."""
    narrowed = (row for row in reversed(rows) if row.kind == kind and row.kept < row.channels)
    _, block = next(itertools.groupby(narrowed, key=lambda row: row.block), (None, ()))
    last = list(block)
    tokens = sum(row.tokens for row in last)
    return sum(row.tokens * row.drift_correction for row in last) / tokens if tokens else 0.0
