"""Selects the channels of a site and solves for its consumers' weights, by its statistics."""

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
from grail.recipe import Recipe
from grail.report.report import SiteReport
from grail.run.exchange import Decision
from grail.runtime.clock import Clock
from grail.statistics.site_statistics import SiteStatistics
from grail_kernels import as_vector


class SiteSolver:
    """Decides on the sites of one run.

    Args:
        recipe: the selector and the settings of the fits.
        sites: all sites of the run, none of them narrow yet.
        widths: of the sites, by name.
        clock: phases "select" and "solve".
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
        self._done: list[SiteReport] = []

    def remember(self, rows: Sequence[SiteReport]) -> None:
        """Adds the rows of blocks that are done, on whose shares of drift selection depends."""
        self._done += rows

    def decide(
        self, site: BoundSite, collected: Sequence[SiteStatistics], gradient: Tensor | None
    ) -> Decision:
        """Returns the reduction of a site and its fits.

        A folding that is fitted exactly has no fits yet: its block must run folded first.

        Args:
            collected: of each of its consumers.
            gradient: the site's, if the selector needs it.
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
        """Returns the fits of a site whose reduction is known.

        Args:
            correction: replaces the recipe's `drift_correction`.
        """
        pairs = zip(collected, site.consumers, strict=True)
        fits = tuple(self._fit_consumer(part, c, reduction, correction) for part, c in pairs)
        few = tuple(
            f"{part.name}: {part.train.tokens} tokens are too few to fit {reduction.kept} "
            "channels, so it was only pruned"
            for part in collected
            if self._recipe.compensate and part.underdetermined(reduction.kept)
        )
        dropped = tuple(
            f"{part.name}: {part.dropped} tokens with NaN or Inf were dropped, "
            f"{part.tokens} counted"
            for part in collected
            if part.dropped
        )
        return Decision(reduction, fits, tuple(part.tokens for part in collected), few + dropped)

    def corrected(self, collected: SiteStatistics) -> Decision:
        """Returns M of layers that read a stream with drift (see `grail.run.attention`)."""
        channels = collected.train.channels
        everything = Selection(range(channels), channels)
        identity = torch.eye(channels, dtype=torch.float64, device=collected.train.device)
        fitted = self._fit(collected, identity, everything, toward="baseline", fit_bias=False)
        return Decision(everything, (fitted,), (collected.tokens,))

    def view(
        self, site: BoundSite, collected: Sequence[SiteStatistics], gradient: Tensor | None
    ) -> select.View:
        """Returns the view of a site for a selector."""
        # Seeded by the site as well, so that the draws of a block depend on no other block.
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
        toward, fit_bias = self._recipe.toward, self._recipe.fit_bias
        return self._fit(statistics, weight, reduction, toward, fit_bias, correction)

    def _fit(
        self,
        statistics: SiteStatistics,
        weight: Tensor,
        reduction: Reduction,
        toward: Toward,
        fit_bias: bool,
        correction: float | Auto | None = None,
    ) -> Fit:
        recipe = self._recipe
        if statistics.underdetermined(1):  # an expert without a token
            plain = reduction.absorb(weight)
            return Fit((plain,), math.nan, math.nan, math.inf, 0.0, 0.0, retries=0)
        with self._clock("solve"):
            return fit(
                statistics.train,
                reduction,
                weight,
                compensate=recipe.compensate and not statistics.underdetermined(reduction.kept),
                fit_bias=fit_bias,
                alpha=recipe.alpha,
                toward=toward,
                drift_correction=recipe.drift_correction if correction is None else correction,
                held_out=statistics.held_out,
            )

    def _reduction(
        self, site: BoundSite, collected: Sequence[SiteStatistics], gradient: Tensor | None
    ) -> Reduction:
        width = self._widths[site.name]
        if width.kept == site.channels:
            return Selection(range(site.channels), site.channels)
        view = self.view(site, collected, gradient)
        # Of an expert without a token only the weights are known.
        unseen = site.group is not None and not view.gram.tokens
        answer = (select.get("magnitude") if unseen else self._select)(view)
        reduction = _as_reduction(answer, width, f"the selector's answer at {site.name}")
        if (reduction.channels, reduction.kept) != (width.channels, width.kept):
            raise InputError(
                f"the selector answered {reduction!r} at {site.name}, where {width} must stay"
            )
        return reduction

    def _expected_share(self, site: BoundSite, collected: Sequence[SiteStatistics]) -> float:
        """Returns the share of drift that a selector assumes the fit to correct.

        If held-out tokens choose it, after the selection, it is the share of the block before. With
        few tokens most of the measured drift is noise, which a selector cannot distinguish.

        The share is 0 if a consumer is only pruned; if there are several consumers, because each
        has its own drift; and if sites of several kinds are narrowed. With heads and MLPs of
        SmolLM2 both at half width, perplexity rose from 125 to 134 with such a share (Brown, 32k
        tokens); with MLPs alone it fell.
        """
        alone = len(collected) == 1 and not collected[0].underdetermined(
            self._widths[site.name].kept
        )
        if self._several_kinds or not alone:
            return 0.0
        share = self._recipe.drift_correction
        return last_share(self._done, site.kind) if share == "auto" else share


def _as_reduction(answer: object, width: Width, what: str) -> Reduction:
    """Returns a selector's answer as a reduction; of scores [H] the highest are selected."""
    if isinstance(answer, Reduction):
        return answer
    answer = as_vector(what, answer)
    if answer.is_floating_point():
        return select.highest(answer, width, what)
    return as_reduction(answer, width.channels)


def last_share(rows: Sequence[SiteReport], kind: str) -> float:
    """Returns the mean share of drift, by token, that sites of a kind corrected in the last block.

    The last block is the last one in which a site of that kind became narrower.
    """
    narrowed = (row for row in reversed(rows) if row.kind == kind and row.kept < row.channels)
    _, block = next(itertools.groupby(narrowed, key=lambda row: row.block), (None, ()))
    last = list(block)
    tokens = sum(row.tokens for row in last)
    return sum(row.tokens * row.drift_correction for row in last) / tokens if tokens else 0.0
