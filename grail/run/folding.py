"""Exact folding: a folded producer writes φ(R W x), not R φ(W x).

The block therefore runs once more with the site folded, and the consumer is fitted to the output
that is missing then.
"""

from collections.abc import Sequence
from dataclasses import replace

from grail.algebra._fit import Auto
from grail.algebra.reduction import Folding, Selection
from grail.calibrate.hidden_states import HiddenStates, OutputCache
from grail.networks import BoundSite, ResidualProbe
from grail.run.blocks import Blocks
from grail.run.exchange import Decision, Exchange
from grail.run.narrower import SiteNarrower
from grail.run.site_check import explain_failure
from grail.run.solver import SiteSolver
from grail.statistics.collector import ignore
from grail.statistics.site_statistics import SiteStatistics


class ExactFolding:
    """Folds sites and fits their consumers to the folded block."""

    def __init__(
        self, blocks: Blocks, narrower: SiteNarrower, solver: SiteSolver, exchange: Exchange
    ):
        self._recipe, self._stream, self._collector = blocks.recipe, blocks.stream, blocks.collector
        self._narrower, self._solver, self._exchange = narrower, solver, exchange

    def decide(
        self, site: BoundSite, reduction: Folding, target: HiddenStates | None, cache: OutputCache
    ) -> Decision:
        """Folds a site and returns the fit of its consumer.

        The fit corrects the drift from the block's hidden states before the site was folded and, if
        drift is corrected, from those of the dense network.

        Args:
            target: the dense network's hidden states at the site's probe, if it corrects drift; of
                some batches or all.
            cache: outputs of the modules before the site.
        """
        if site.probe is None:  # the effect of folding shows at the consumer's own output
            site = replace(site, probe=ResidualProbe(site.consumers[0].module, output=True))
        target, correction, share = self._target(site, target, cache)
        self._narrower.fold(site, reduction)
        with explain_failure(), cache.replaying():
            targets = {site: target}
            collected = self._collector.collect(site.block, [site], targets, ignore, finish=False)
        everything = Selection(range(reduction.kept), reduction.kept)

        def fit(
            sites: Sequence[BoundSite], parts: Sequence[Sequence[SiteStatistics]]
        ) -> Sequence[Decision]:
            return self._solver.fitted(sites, parts, [everything], correction)

        ((_, decision),) = self._exchange.decided(collected, fit)
        if share is None:
            return decision
        fits = tuple(replace(found, drift_correction=share) for found in decision.fits)
        return replace(decision, fits=fits)

    def _target(
        self, site: BoundSite, target: HiddenStates | None, cache: OutputCache
    ) -> tuple[HiddenStates, float | Auto, float | None]:
        """Returns the target of the folded block, the correction of its fit, the share of drift.

        The share is None where held-out tokens choose one share for drift and folding together.
        """
        share = self._recipe.drift_correction
        if share == "auto":
            if target is not None and self._stream.chooses:
                return target, share, None
            share = 0.0
        if target is not None and share == 1:
            return target, 1.0, share
        with cache.replaying():
            follow = self._collector.follow
            own = follow(self._stream.fork(), site.block, [site], ignore)[site]
        if target is not None and share > 0:
            for batch in target.batches:
                dense = target[batch]
                # On the computing device, so that the bits do not depend on the storage.
                mixed = (
                    own[batch].to(self._stream.device).lerp(dense.to(self._stream.device), share)
                )
                own.put(batch, mixed)
            own = own.part(target.batches)
        return own, 1.0, share
