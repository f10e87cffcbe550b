"""Compression of one block: calibrate → select, solve → absorb.

Closed loop: the calibration set has passed the compressed blocks before this one. The sites of the
block are calibrated in the order in which they run, each after the sites before it are narrow.
Open loop: the statistics of all sites come from one pass of the dense network. Only one block's
statistics are in memory at a time.

Where drift is corrected, the dense network's hidden states are computed too. Those at each site's
probe are taken before anything in the block is narrowed (see `grail.algebra.drift`).
"""

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from grail.algebra.reduction import Folding
from grail.calibrate.hidden_states import HiddenStates, OutputCache
from grail.calibrate.stream import Stream
from grail.errors import ModelError
from grail.networks import AttentionInput, BoundSite, CalibrationPoint, grouped
from grail.run.attention import AttentionCorrection
from grail.run.blocks import Blocks
from grail.run.exchange import Decision, Exchange
from grail.run.folding import ExactFolding
from grail.run.narrower import BlockReport, SiteNarrower
from grail.run.site_check import explain_failure, is_same_activation
from grail.run.solver import SiteSolver
from grail.runtime.transaction import Transaction
from grail.statistics.batchnorm import reset_norm
from grail.statistics.collector import Advance
from grail.statistics.site_statistics import SiteStatistics


class BlockCompressor:
    """Compresses blocks, in order.

    Args:
        blocks: the network and its calibration set.
        transaction: through which the model is changed.

    Phases of the clock: "forward" (blocks, without the statistics), "gram", "select", "solve" and
    "absorb".
    """

    def __init__(self, blocks: Blocks, transaction: Transaction):
        self.blocks, self._transaction = blocks, transaction
        self._recipe, self._stream, self._collector = blocks.recipe, blocks.stream, blocks.collector
        self._dense = blocks.stream.fork() if blocks.recipe.follows_drift else None
        self.solver = SiteSolver(blocks.recipe, blocks.all_sites, blocks.widths, blocks.clock)
        exchange = Exchange(blocks.stream.processes)
        self._exchange, self._narrower = exchange, SiteNarrower(blocks, transaction)
        self._folding = ExactFolding(blocks, self._narrower, self.solver, exchange)
        self._attention = AttentionCorrection(blocks, self.solver, exchange, transaction)
        # Memory that every block uses again.
        self._cache = OutputCache(blocks.stream.device, blocks.stream.storage)

    @property
    def streams(self) -> list[Stream]:
        """The calibration set in the compressed network and, if drift is followed, in the dense."""
        return [stream for stream in (self._stream, self._dense) if stream is not None]

    def passes(self, block: int) -> int:
        """Returns the number of passes over the calibration set that a block takes."""
        if not self._recipe.closed_loop:
            return 1
        sites = len(grouped(self.blocks.active[block])) + bool(self._attention.inputs(block))
        return sites + (self._dense is not None) + self.blocks.has_next(block)

    def untouched(self, block: int) -> BlockReport:
        """Returns the report on a block in which nothing becomes narrower."""
        sites = self.blocks.sites[block]
        return BlockReport({site.name: self._narrower.untouched(site) for site in sites})

    def compress(self, block: int, advance: Advance) -> BlockReport:
        """Compresses a block and moves the calibration set to the next one.

        Args:
            advance: called with the number of tokens after each batch.
        """
        report = self.untouched(block)
        compress = self._closed if self._recipe.closed_loop else self._open
        with self.blocks.onload(block):
            self._require_repeatable(block)
            compress(block, self.blocks.active[block], advance, report)
        self.solver.remember(report.rows)
        return report

    def narrow(
        self,
        collected: Mapping[BoundSite, Sequence[SiteStatistics]],
        gradients: Mapping[BoundSite, Tensor],
        targets: Mapping[BoundSite, HiddenStates],
        report: BlockReport,
    ) -> None:
        """Decides on sites by their statistics, narrows them and rewrites their consumers.

        Args:
            gradients: of the sites, if the selector needs them.
            targets: the dense network's hidden states at the probes of sites that correct drift.
        """

        def decide(site: BoundSite, parts: Sequence[SiteStatistics]) -> Decision:
            return self.solver.decide(site, parts, gradients.get(site))

        for site, decision in self._exchange.decided(collected, decide):
            reduction = decision.reduction
            self._narrower.check(site, reduction)
            if decision.fits:
                self._narrower.narrow(site, reduction)
            else:  # a folding, whose fit needs the folded block
                assert isinstance(reduction, Folding)
                target = targets.get(site)
                decision = self._folding.decide(site, reduction, target, self._cache)
            self._narrower.absorb(site, decision, report)

    def _open(
        self, block: int, sites: Sequence[BoundSite], advance: Advance, report: BlockReport
    ) -> None:
        # While the calibration set is at the block's entry, and nothing of the block is narrow.
        gradients = self.blocks.gradients(sites)
        has_next = self.blocks.has_next(block)
        collected = self._collector.collect(block, sites, {}, advance, finish=has_next)
        self.narrow(collected, gradients, {}, report)

    def _closed(
        self, block: int, sites: Sequence[BoundSite], advance: Advance, report: BlockReport
    ) -> None:
        inputs = self._attention.inputs(block)
        if self._attention.applies_to(block) and not inputs:
            report.notes.append(
                f"the attention of block {block + 1} was not corrected: its projections to "
                "queries, keys and values are no plain layers"
            )
        targets = self._targets(block, [*inputs, *sites], advance)
        for point in inputs:
            self._attention.correct(point, targets[point], advance, report)
        for step in grouped(sites):
            # The block is finished from the last site on: what ran before it need not run again.
            upstream = step[0].upstream if step[-1] is sites[-1] else ()
            of_step = {site: targets[site] for site in step if site in targets}
            with self._cache.recording(upstream):
                collected = self._collector.collect(block, step, of_step, advance, finish=False)
            self.narrow(collected, self.blocks.gradients(step), of_step, report)
        if self._recipe.repair and sites:
            self._reset_norms(block)
        with self._cache.replaying():
            if self.blocks.has_next(block):
                self._collector.collect(block, [], {}, advance, finish=True)
            elif sites:  # shows whether everything that had to be narrowed was
                with explain_failure(), self.blocks.clock("forward"):
                    self._stream.run(block, 0)

    def _targets(
        self, block: int, points: Sequence[AttentionInput | BoundSite], advance: Advance
    ) -> dict[CalibrationPoint, HiddenStates]:
        """Moves the dense network's hidden states past a block; returns those at its points."""
        if self._dense is None:
            return {}
        held = self._collector.follow(self._dense, block, points, advance)
        return {point: h for point, h in held.items() if point.corrects_drift(self._recipe.per_tap)}

    def _reset_norms(self, block: int) -> None:
        """Resets the block's batch norms, in the order in which they run."""
        norms = self.blocks.architecture.norms(block)
        for norm in self._collector.in_order(norms, block):
            inputs = partial(self._collector.inputs_of, norm, block)
            reset_norm(norm, inputs, self._transaction, self._stream.processes.total)

    def _require_repeatable(self, block: int) -> None:
        """Runs a block twice unless its layers are torch's or transformers' own.

        Raises:
            ModelError: the outputs differ, because the block keeps a state or draws at random.
        """
        modules = self._stream.blocks[block].modules()
        libraries = {type(module).__module__.split(".")[0] for module in modules}
        trusted = self.blocks.architecture.trusted and self.blocks.active[block]
        if libraries <= {"torch", "transformers"} or not trusted or not len(self._stream):
            return
        with self.blocks.clock("forward"):
            once, again = (self._stream.run(block, 0) for _ in range(2))
        if isinstance(once, Tensor) and not is_same_activation(again, once):
            raise ModelError(
                f"block {block} returns something else when it runs again: it keeps a state, or "
                "depends on chance, so no two passes would see the same; switch that off"
            )
