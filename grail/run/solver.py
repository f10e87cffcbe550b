"""Selects the channels of a site and solves for its consumers' weights, by its statistics."""

import itertools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grail import select
from grail.algebra import by_group
from grail.algebra._fit import Auto, Fit, FitSite, Toward, fit_each
from grail.algebra.gram import Gram, read_together
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
        fit: replaces `grail.algebra._fit.fit_each`.
    """

    def __init__(
        self,
        recipe: Recipe,
        sites: Sequence[BoundSite],
        widths: Mapping[str, Width],
        clock: Clock,
        fit: Callable[..., Sequence[Fit]] = fit_each,
    ):
        self._recipe, self._widths, self._clock, self._solve = recipe, widths, clock, fit
        narrowed = (site.kind for site in sites if widths[site.name].kept < site.channels)
        self._several_kinds = len(set(narrowed)) > 1
        self._select = select.get(recipe.selector)
        self._done: list[SiteReport] = []

    def remember(self, rows: Sequence[SiteReport]) -> None:
        """Adds the rows of blocks that are done, on whose shares of drift selection depends."""
        self._done += rows

    def decide(
        self,
        sites: Sequence[BoundSite],
        collected: Sequence[Sequence[SiteStatistics]],
        gradients: Sequence[Tensor | None],
    ) -> list[Decision]:
        """Returns the reduction of each site of a group, such as a layer's experts, and its fits.

        A folding that is fitted exactly has no fits yet: its block must run folded first.

        Args:
            collected: of each site's consumers.
            gradients: the sites', if the selector needs them.
        """
        # One read for all that is asked of them below.
        read_together([gram for parts in collected for part in parts for gram in part.grams])
        with self._clock("select"):
            reductions = self._reductions(sites, collected, gradients)
        if isinstance(reductions[0], Folding) and self._folds_exactly(sites[0]):
            return [Decision(reduction, (), ()) for reduction in reductions]
        return self.fitted(sites, collected, reductions)

    def fitted(
        self,
        sites: Sequence[BoundSite],
        collected: Sequence[Sequence[SiteStatistics]],
        reductions: Sequence[Reduction],
        correction: float | Auto | None = None,
    ) -> list[Decision]:
        """Returns the fits of sites whose reductions are known.

        Args:
            correction: replaces the recipe's `drift_correction`.
        """
        recipe, known = self._recipe, zip(sites, collected, reductions, strict=True)
        todo = [
            (part, consumer, reduction)
            for site, parts, reduction in known
            for part, consumer in zip(parts, site.consumers, strict=True)
        ]
        fits = iter(self._fits(todo, recipe.toward, recipe.fit_bias, correction))
        return [
            self._decision(reduction, parts, tuple(itertools.islice(fits, len(parts))))
            for parts, reduction in zip(collected, reductions, strict=True)
        ]

    def _decision(
        self, reduction: Reduction, collected: Sequence[SiteStatistics], fits: tuple[Fit, ...]
    ) -> Decision:
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
        site = self._fit_site(collected, identity, everything)
        return Decision(everything, self._solved([site], "baseline", False), (collected.tokens,))

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

    def _fits(
        self,
        todo: Sequence[tuple[SiteStatistics, Consumer, Reduction]],
        toward: Toward,
        fit_bias: bool,
        correction: float | Auto | None,
    ) -> list[Fit]:
        """Returns the fit of each consumer of each site."""
        fits: list[Fit | None] = []
        sites: list[list[FitSite]] = []  # of a grouped convolution, each group's
        for statistics, consumer, reduction in todo:
            weight = consumer.by_channel
            if self._recipe.per_tap:
                weight, reduction = consumer.by_tap, reduction.repeat(consumer.taps)
            if statistics.underdetermined(1):  # an expert without a token
                plain = reduction.absorb(weight)
                fits.append(Fit((plain,), math.nan, math.nan, math.inf, 0.0, 0.0, retries=0))
                continue
            fits.append(None)
            site = self._fit_site(statistics, weight, reduction)
            sites.append([site] if consumer.groups == 1 else by_group.split(site, consumer.groups))
        each = iter(self._solved(list(itertools.chain(*sites)), toward, fit_bias, correction))
        own = [list(itertools.islice(each, len(parts))) for parts in sites]
        solved = (
            found[0] if len(parts) == 1 else by_group.joined(parts, found)
            for parts, found in zip(sites, own, strict=True)
        )
        return [next(solved) if fit is None else fit for fit in fits]

    def _fit_site(
        self, statistics: SiteStatistics, weight: Tensor, reduction: Reduction
    ) -> FitSite:
        compensate = self._recipe.compensate and not statistics.underdetermined(reduction.kept)
        guard = statistics.guard if compensate else None
        of_tokens = (statistics.held_out, compensate, guard)
        return FitSite(statistics.train, reduction, (weight,), *of_tokens)

    def _solved(
        self,
        sites: Sequence[FitSite],
        toward: Toward,
        fit_bias: bool,
        correction: float | Auto | None = None,
    ) -> tuple[Fit, ...]:
        recipe = self._recipe
        with self._clock("solve"):
            found = self._solve(
                sites,
                fit_bias=fit_bias,
                alpha=recipe.alpha,
                toward=toward,
                drift_correction=recipe.drift_correction if correction is None else correction,
            )
        return tuple(found)

    def _reductions(
        self,
        sites: Sequence[BoundSite],
        collected: Sequence[Sequence[SiteStatistics]],
        gradients: Sequence[Tensor | None],
    ) -> list[Reduction]:
        """Returns each site's reduction; those of equal sizes are chosen as one batch."""
        found: dict[int, Reduction] = {}
        batches: dict[tuple[Any, ...], list[tuple[int, select.View]]] = {}
        for number, (site, parts) in enumerate(zip(sites, collected, strict=True)):
            width = self._widths[site.name]
            if width.kept == site.channels:
                found[number] = Selection(range(site.channels), site.channels)
                continue
            view = self.view(site, parts, gradients[number])
            # Of an expert without a token only the weights are known.
            unseen = site.group is not None and not view.gram.tokens
            sizes = (unseen, width.channels, width.kept, view.consumer.shape)
            batches.setdefault(sizes, []).append((number, view))
        for (unseen, *_), members in batches.items():
            selector = select.get("magnitude") if unseen else self._select
            answers = select.answers(selector, [view for _, view in members])
            for (number, view), answer in zip(members, answers, strict=True):
                found[number] = _checked(answer, view.width, sites[number].name)
        return [found[number] for number in range(len(sites))]

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


def _checked(answer: object, width: Width, name: str) -> Reduction:
    """Returns a selector's answer as a reduction; of scores [H] the highest are selected.

    Raises:
        InputError: it is of another width.
    """
    what = f"the selector's answer at {name}"
    if isinstance(answer, Reduction):
        reduction = answer
    else:
        scores = as_vector(what, answer)
        if scores.is_floating_point():
            reduction = select.highest(scores, width, what)
        else:
            reduction = as_reduction(scores, width.channels)
    if (reduction.channels, reduction.kept) != (width.channels, width.kept):
        raise InputError(f"the selector answered {reduction!r} at {name}, where {width} must stay")
    return reduction


def last_share(rows: Sequence[SiteReport], kind: str) -> float:
    """Returns the mean share of drift, by token, that sites of a kind corrected in the last block.

    The last block is the last one in which a site of that kind became narrower.
    """
    narrowed = (row for row in reversed(rows) if row.kind == kind and row.kept < row.channels)
    _, block = next(itertools.groupby(narrowed, key=lambda row: row.block), (None, ()))
    last = list(block)
    tokens = sum(row.tokens for row in last)
    if not tokens:
        return 0.0
    first = last[0].drift_correction  # of one site the mean is exactly its share
    return first + sum(row.tokens * (row.drift_correction - first) for row in last) / tokens
