"""Compression of one block: calibrate → select, solve → absorb.

Closed loop: the calibration set has passed the compressed blocks before this one. The sites of the
block are calibrated in the order in which they run, each after the sites before it are narrow.
Open loop: the statistics of all sites come from one pass of the dense network. Only one block's
statistics are in memory at a time.

Where drift is corrected, the dense network's hidden states are computed too, from the first block
on in which something is narrowed: up to its entry both networks are the same. Those at each site's
probe are taken before anything in the block is narrowed (see `grail.algebra.drift`).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from torch import Tensor

from grail.algebra._fit import Fit, fit_each
from grail.algebra.reduction import Folding, Reduction
from grail.calibrate.hidden_states import HiddenStates
from grail.calibrate.stream import Stream
from grail.errors import ModelError
from grail.networks import AttentionInput, BoundSite, CalibrationPoint, grouped
from grail.run.attention import AttentionCorrection
from grail.run.blocks import Blocks
from grail.run.exchange import Decision, Exchange
from grail.run.finishing import BlockFinisher
from grail.run.folding import ExactFolding
from grail.run.narrower import BlockReport, SiteNarrower
from grail.run.producer_refit import ProducerRefit, RefitJob
from grail.run.quantizer import BlockQuantizer
from grail.run.site_check import explain_failure, is_same_activation
from grail.run.solver import SiteSolver
from grail.runtime.progress import Countdown
from grail.runtime.transaction import Transaction
from grail.statistics.batchnorm import reset_norm
from grail.statistics.collector import Advance
from grail.statistics.residual_split import ResidualSplit
from grail.statistics.site_statistics import SiteStatistics


class BlockCompressor:
    """Compresses blocks, in order.

    Args:
        blocks: the network and its calibration set.
        transaction: through which the model is changed.
        fit: replaces `grail.algebra._fit.fit_each`.

    Phases of the clock: "forward" (blocks, without the statistics), "gram", "select", "solve",
    "refit", "absorb" and "quantise".
    """

    def __init__(
        self,
        blocks: Blocks,
        transaction: Transaction,
        fit: Callable[..., Sequence[Fit]] = fit_each,
    ):
        self.blocks, self._transaction = blocks, transaction
        self._recipe, self._stream, self._collector = blocks.recipe, blocks.stream, blocks.collector
        self._dense: Stream | None = None  # until a block before has been narrowed
        self.solver = SiteSolver(blocks.recipe, blocks.all_sites, blocks.widths, blocks.clock, fit)
        exchange = Exchange(blocks.stream.processes)
        self._exchange, self._narrower = exchange, SiteNarrower(blocks, transaction)
        self._folding = ExactFolding(blocks, self._narrower, self.solver, exchange)
        self._attention = AttentionCorrection(blocks, self.solver, exchange, transaction)
        self._finisher = BlockFinisher(blocks)
        self._refit = ProducerRefit(blocks, self.solver, self._narrower, exchange, transaction)
        self._quantizer = BlockQuantizer(blocks, transaction) if blocks.recipe.quantize else None

    def streams(self, done: int) -> list[Stream]:
        """Returns the calibration set after so many blocks, in each network that it runs through.

        That is the compressed one and, where drift is followed, the dense one from the first
        narrowed block on.
        """
        if self._dense is None and self._recipe.follows_drift and done > self.blocks.first_active:
            self._dense = self._stream.fork(self.blocks.dense_share)
        return [stream for stream in (self._stream, self._dense) if stream is not None]

    @property
    def waiting_bytes(self) -> int:
        """The bytes of the hidden states that wait between two blocks, of both networks."""
        own = sum(hidden.nbytes for hidden in self._stream.hidden)
        return own * (1 + self._recipe.follows_drift)

    @property
    def dense(self) -> Stream | None:
        """The stream of the dense network, once there is one."""
        return self._dense

    @property
    def input_bytes(self) -> int:
        """The bytes of the inputs of consumers that are kept, so that blocks need not run again."""
        return self._finisher.input_bytes + self._refit.kept_bytes

    def passes(self, block: int) -> float:
        """Returns the number of passes over the calibration set that a block takes."""
        if not self._recipe.closed_loop:
            return 1
        active = self.blocks.active[block]
        sites = len(grouped(active)) + bool(self._attention.inputs(block))
        refits = sum(map(self._refit.passes, active))
        follows = self._recipe.follows_drift and block >= self.blocks.first_active
        quantises = self._quantizer is not None
        return sites + refits + follows + quantises + self.blocks.has_next(block)

    def untouched(self, block: int) -> BlockReport:
        """Returns the report on a block in which nothing changes."""
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
        refit: Callable[[Decision, Reduction], Reduction] | None = None,
    ) -> dict[BoundSite, Reduction]:
        """Decides on sites by their statistics, narrows them and rewrites their consumers.

        Args:
            gradients: of the sites, if the selector needs them.
            targets: the dense network's hidden states at the probes of sites that correct drift.
            refit: called for the only site once its consumer is rewritten; returns its reduction
                as of then.

        Returns:
            Their reductions.
        """
        reductions: dict[BoundSite, Reduction] = {}

        def decide(
            sites: Sequence[BoundSite], parts: Sequence[Sequence[SiteStatistics]]
        ) -> Sequence[Decision]:
            return self.solver.decide(sites, parts, [gradients.get(site) for site in sites])

        for site, decision in self._exchange.decided(collected, decide):
            reduction = reductions[site] = decision.reduction
            self._narrower.check(site, reduction)
            if decision.fits:
                self._narrower.narrow(site, reduction)
            else:  # a folding, whose fit needs the folded block
                assert isinstance(reduction, Folding)
                target = targets.get(site)
                decision = self._folding.decide(site, reduction, target, self._finisher.cache)
            self._narrower.absorb(site, decision, report)
            if refit is not None:
                reductions[site] = refit(decision, reduction)
        return reductions

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
        steps = grouped(sites)
        # The first narrowed block is the dense network's, too: the pass that collects moves both.
        both = block == self.blocks.first_active and len(steps) == 1 and self._recipe.follows_drift
        moves_both = both and self._finisher.split(steps[0]) is not None
        targets = {} if moves_both else self._targets(block, [*inputs, *sites], advance)
        for point in inputs:
            self._attention.correct(point, targets[point], advance, report)
        split, reduction, tokens = None, None, self._stream.own_tokens
        for step in steps:
            last = step[-1] is sites[-1]
            split = self._finisher.split(step) if last else None
            # The block is finished from the last site on: what ran before it need not run again.
            upstream = step[0].upstream if last and self._quantizer is None else ()
            of_step = {site: targets[site] for site in step if site in targets}
            refits = self._refit.applies_to(step, report)
            with ExitStack() as stack:
                stack.enter_context(self._finisher.keeping(upstream, split, again=refits))
                if refits:
                    stack.enter_context(self._refit.recording(step[0]))
                collected = self._collector.collect(
                    block, step, of_step, advance, finish=False, split=split
                )
            if split is not None and moves_both:
                self._finisher.move(self.streams(done=block + 1)[-1], split, advance)
            refit, counted = None, round(self._refit.passes(step[0]) * tokens)
            rest = Countdown(counted, advance)
            if refits:
                refit = self._refitting(step[0], of_step.get(step[0]), split, rest, report)
            gradients = self.blocks.gradients(step)
            reductions = self.narrow(collected, gradients, of_step, report, refit)
            rest.finish()
            reduction = reductions[step[-1]]
        if self._recipe.repair and sites:
            self._reset_norms(block)
        if self._quantizer is None:
            self._finisher.finish(block, advance, split, reduction)
        else:
            with explain_failure():
                report.quantized = self._quantizer.finish(block, advance)

    def _refitting(
        self,
        site: BoundSite,
        target: HiddenStates | None,
        split: ResidualSplit | None,
        advance: Advance,
        report: BlockReport,
    ) -> Callable[[Decision, Reduction], Reduction]:
        """Returns the refit of a site's producers, for `narrow`."""

        def refit(decision: Decision, reduction: Reduction) -> Reduction:
            share, cache = decision.fits[0].drift_correction, self._finisher.cache
            job = RefitJob(site, share, target, split, cache, advance)
            return self._refit.refit(job, decision, reduction, report)

        return refit

    def _targets(
        self, block: int, points: Sequence[AttentionInput | BoundSite], advance: Advance
    ) -> dict[CalibrationPoint, HiddenStates]:
        """Moves the dense network's hidden states past a block; returns those at its points.

        The first sites of the first narrowed block have no drift, so there is nothing for them.
        """
        if not self._recipe.follows_drift or block < self.blocks.first_active:
            return {}
        _, dense = self.streams(done=block + 1)
        held = self._collector.follow(dense, block, points, advance)
        equal = grouped(points)[0] if block == self.blocks.first_active else []
        return {
            point: hidden
            for point, hidden in held.items()
            if point not in equal and point.corrects_drift(self._recipe.per_tap)
        }

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
