"""Narrows sites, rewrites their consumers and reports both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from grail.algebra._fit import Fit
from grail.algebra.reduction import Folding, Reduction
from grail.networks import BoundSite
from grail.networks.layers import Consumer
from grail.report.report import InputReport, LayerReport, SiteReport
from grail.run.blocks import Blocks
from grail.run.exchange import Decision
from grail.run.site_check import SiteCheck
from grail.runtime.transaction import Transaction


@dataclass
class BlockReport:
    """The report on one block: rows by name of site, inputs of its attention, matrices, notes."""

    sites: dict[str, list[SiteReport]] = field(default_factory=dict)
    inputs: list[InputReport] = field(default_factory=list)
    quantized: list[LayerReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[SiteReport]:
        """One row for each consumer of each site."""
        return [row for rows in self.sites.values() for row in rows]


class SiteNarrower:
    """Carries decisions out.

    Args:
        blocks: whose sites are narrowed.
        transaction: through which the model is changed.
    """

    def __init__(self, blocks: Blocks, transaction: Transaction):
        self._recipe, self._stream, self._clock = blocks.recipe, blocks.stream, blocks.clock
        self._widths, self._transaction = blocks.widths, transaction
        self._check = SiteCheck(blocks) if blocks.tries_sites else None

    def check(self, site: BoundSite, reduction: Reduction) -> None:
        """Raises ModelError for a site of an untrusted network that cannot be narrowed."""
        if self._check is not None:
            self._check(site, reduction)

    def narrow(self, site: BoundSite, reduction: Reduction) -> None:
        """Narrows the producers of a site, and all else of its width but the consumers."""
        with self._clock("absorb"):
            if not reduction.is_identity:
                site.narrow(reduction, self._widths[site.name], self._transaction)

    def fold(self, site: BoundSite, reduction: Folding) -> None:
        """Folds a site; its consumer gets the plainly folded weight."""
        (consumer,) = site.consumers
        with self._clock("absorb"):
            plain = reduction.absorb(consumer.by_channel)
            site.narrow(reduction, self._widths[site.name], self._transaction)
            consumer.rewrite(plain, reduction.kept, False, None, self._transaction)

    def absorb(self, site: BoundSite, decision: Decision, report: BlockReport) -> None:
        """Rewrites the consumers of a site that is narrow, and reports on them."""
        report.notes += decision.notes
        with self._clock("absorb"):
            self._rewrite(site, decision.fits, decision.reduction.kept)
        fits = [
            self._measured(consumer, decision, fit, report)
            for consumer, fit in zip(site.consumers, decision.fits, strict=True)
        ]
        width = self._widths[site.name]
        report.sites[site.name] = _rows(site, width.channels, width.kept, decision.tokens, fits)

    def untouched(self, site: BoundSite) -> list[SiteReport]:
        """Returns the rows of a site that stays as it is."""
        nothing = Fit((), 0.0, 0.0, alpha=0.0, drift_correction=0.0, damping=0.0, retries=0)
        channels, consumers = self._widths[site.name].channels, len(site.consumers)
        tokens = (self._stream.tokens,) * consumers
        return _rows(site, channels, channels, tokens, [nothing] * consumers)

    def _rewrite(self, site: BoundSite, fits: Sequence[Fit], kept: int) -> None:
        for consumer, fit in zip(site.consumers, fits, strict=True):
            shift = None
            if fit.shifts is not None:
                shift = fit.shifts[0].view(consumer.outputs, -1).sum(1)  # over the taps
            consumer.rewrite(fit.weight, kept, self._recipe.per_tap, shift, self._transaction)

    def _measured(
        self, consumer: Consumer, decision: Decision, fit: Fit, report: BlockReport
    ) -> Fit:
        """Returns a fit without its errors if they are not those of the network."""
        if isinstance(decision.reduction, Folding):
            reason = "a folding that is not fitted to what the folded layers write"
        elif self._check is not None and consumer in self._check.downstream:
            reason = "it reads what other consumers of the site write"
        else:
            return fit
        report.notes.append(f"{consumer.name}: its error is not measured: {reason}")
        return replace(
            fit,
            error=math.nan,
            baseline_error=math.nan,
            guard_error=None,
            guard_baseline_error=None,
        )


def _rows(
    site: BoundSite, channels: int, kept: int, tokens: Sequence[int], fits: Sequence[Fit]
) -> list[SiteReport]:
    """Returns a row for each consumer of a site."""
    several = len(site.consumers) > 1
    return [
        SiteReport(
            name=f"{site.name} → {consumer.name}" if several else site.name,
            kind=site.kind,
            block=site.block,
            channels=channels,
            kept=kept,
            tokens=of_consumer,
            alpha=None if math.isinf(fit.alpha) else fit.alpha,
            drift_correction=fit.drift_correction,
            damping=fit.damping,
            retries=fit.retries,
            error=_finite(fit.error),
            baseline_error=_finite(fit.baseline_error),
            guard_error=fit.guard_error,
            guard_baseline_error=fit.guard_baseline_error,
            guard_share=None if fit.guard_error is None else fit.guard_share,
        )
        for consumer, of_consumer, fit in zip(site.consumers, tokens, fits, strict=True)
    ]


def _finite(error: float) -> float | None:
    return None if math.isnan(error) else error
