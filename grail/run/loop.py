"""The loop over blocks: calibrate (`grail.passes`) → select, solve (`grail.decide`) → absorb.

Closed loop: a block's Grams are collected with its inputs coming from the already compressed blocks
before it, and the Gram of its MLP after its own heads were narrowed. Open loop: all Grams of a
block come from one pass of the dense model. One block's statistics live at a time.

Where drift is to be corrected, the dense network's stream goes along: what a block's dense form
holds after each site is taken before anything in it is narrowed (see `grail.drift`). What is left
of drift meets the attention behind, which was made for the dense network's x and reads x̃. It can
be corrected, too: with the best linear guess of x, M x̃, the weights of queries, keys and values
become W M,

    M = I + β C (G + λI)⁻¹,   G = Σ x̃ x̃ᵀ,  C = Σ (x − x̃) x̃ᵀ

which at β = 1 minimises Σ‖x − M x̃‖² + λ‖M − I‖², and is a site's own problem with W = I and
nothing lost (`grail.problem`); λ and β are chosen likewise. In quantisation it is error propagation
(Arai, Ichikawa, NeurIPS 2025, arXiv 2504.09629).
An MLP's first layers stay as they are: it can undo only such drift as its hidden channels show.

Folding is fitted exactly: a folded producer writes φ(R W x), not R φ(W x), so the block runs once
more with its producers folded, and the fit sees what the narrow network computes.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grail import select
from grail.algebra._fit import Auto, Fit
from grail.algebra.kinds import plain_output
from grail.algebra.reduction import Folding, Reduction, Selection
from grail.calibrate.hidden_states import HiddenStates, OutputCache
from grail.calibrate.stream import Stream
from grail.errors import GrailError, ModelError
from grail.networks import (
    AnyPoint,
    Architecture,
    AttentionInput,
    BoundSite,
    CalibrationPoint,
    ResidualProbe,
    grouped,
)
from grail.networks.layers import Consumer
from grail.recipe import Recipe
from grail.report.report import InputReport, SiteReport
from grail.run.checkpoint import Checkpoint, Position
from grail.run.solver import SiteSolver
from grail.runtime.clock import Clock
from grail.runtime.memory import ran_out
from grail.runtime.onload import Onloader
from grail.runtime.processes import Decision
from grail.runtime.progress import Progress
from grail.runtime.transaction import Transaction
from grail.statistics.batchnorm import reset_norm
from grail.statistics.collector import Advance, Calls, Collector, ignore
from grail.statistics.gradient import regional_gradient
from grail.statistics.site_statistics import SiteStatistics

ROUNDING = 1e-4  # of its norm: what a narrow site's activation may be off in fp32
Rows = dict[str, list[SiteReport]]  # by name of site, one for each of its consumers
# Sites that run side by side, and what narrows them.
Apart = tuple[dict[BoundSite, select.View], Callable[[], Rows]]


class Run:
    """One compression under way.

    Args:
        architecture, options: what to narrow, and how.
        stream: the calibration set at the entry of the first block; moved along by each block.
        transaction: through which the model is changed.
        clock: phases "forward" (blocks, without the statistics), "gram", "select", "solve",
            "absorb", "checkpoint".
        checkpoint: where to go on from, and what to keep after each block.
        onload: brings each block to where it runs; none is needed where it is there already.
        known: the statistics of sites that were collected before, where the stream is empty.
    """

    def __init__(
        self,
        architecture: Architecture,
        recipe: Recipe,
        stream: Stream,
        transaction: Transaction,
        clock: Clock,
        checkpoint: Checkpoint | None = None,
        onload: Onloader | None = None,
        known: Callable[[Any], list[SiteStatistics]] | None = None,
    ):
        self.architecture, self.recipe, self.stream = architecture, recipe, stream
        self.transaction, self.clock, self._checkpoint = transaction, clock, checkpoint
        self.widths = recipe.widths(architecture)
        self._onload = onload or Onloader(stream.blocks, None)
        self._dense = stream.fork() if recipe.follows_drift else None
        self._passes = Collector(recipe, stream, clock, known)
        self._memo = OutputCache(stream.device, stream.storage)
        self._processes = stream.processes
        self.notes: list[str] = []  # what a person should know
        self.inputs: list[InputReport] = []
        # Consumers of a residual stream that read what others of its consumers write.
        self._downstream: set[Consumer] = set()
        self.resumed: dict[str, float] = {}  # see `Report`; empty: from the first block on
        # Bound, and told apart, while nothing is narrow: a resumed run soon is.
        self.sites = recipe.sites_of(architecture)
        self._active = [recipe.active(sites, self.widths) for sites in self.sites]
        self._decider = SiteSolver(recipe, list(itertools.chain(*self.sites)), self.widths, clock)
        # The first block in which anything becomes narrower: before it nothing drifts.
        self._first = next((number for number, sites in enumerate(self._active) if sites), 0)

    def all_blocks(self, progress: bool) -> list[SiteReport]:
        """Compresses every block in order; returns a row for each consumer of each site."""
        if not any(self._active):
            return [row for sites in self.sites for site in sites for row in self._untouched(site)]
        self._learn_orders()
        position = Position(0, [], self.inputs, self.notes, self.clock.seconds)
        if self._checkpoint is not None:
            with self.clock("checkpoint"):
                begun = sum(self.clock.seconds.values())
                self._checkpoint.resume(position, self._streams())
                spent = sum(self.clock.seconds.values()) - begun
            if position.done:
                self.resumed = {"after": position.done, "of": len(self.sites), "seconds": spent}
        self._decider.done = position.rows
        passes = [self._passes_through(number) for number in range(len(self.sites))]
        with self._progress(sum(passes[position.done :]), progress) as bar:
            if position.done:
                bar.say(f"resumed after block {position.done} of {len(self.sites)}")
            for number in range(position.done, len(self.sites)):
                bar.start(number, passes[number])
                position.rows += self.block(number, bar.advance)
                position.done = number + 1
                self._keep(position)
        return position.rows

    def _passes_through(self, block: int) -> int:
        """How many passes over the calibration set a block takes."""
        if not self.recipe.closed_loop:
            return 1
        sites = len(grouped(self._active[block])) + bool(self._attention_inputs(block))
        return sites + (self._dense is not None) + self._goes_on(block)

    def _progress(self, passes: int, shown: bool, label: str = "block") -> Progress:
        return Progress(
            len(self.sites),
            self.stream.own_tokens,
            passes,
            lambda: self.clock.phase,
            shown and self._processes.number == 0,
            label,
        )

    def _learn_orders(self) -> None:
        """Finds out how tokens are ordered, in a network of which nothing is known."""
        if not self.architecture.trusted and len(self.stream):
            self._passes.learn_orders(list(itertools.chain(*self.sites)))

    def _keep(self, position: Position) -> None:
        if self._checkpoint is not None:
            left = position.done < len(self.architecture.blocks)
            position.seconds = self.clock.seconds
            with self.clock("checkpoint"):
                self._checkpoint.save(position, self._streams() if left else ())

    def _streams(self) -> list[Stream]:
        return [stream for stream in (self.stream, self._dense) if stream is not None]

    def statistics(self, progress: bool) -> Iterator[tuple[BoundSite, list[SiteStatistics]]]:
        """What the consumers of each site read in the dense network, site by site."""
        self._learn_orders()
        with self._progress(len(self.sites), progress) as bar:
            for number, sites in enumerate(self.sites):
                bar.start(number, 1)
                with self._onload(number):
                    yield from self._passes.collect(
                        number, sites, {}, bar.advance, finish=True
                    ).items()

    def narrow_each(self, progress: bool, done: int = 0) -> Iterator[Iterator[Apart]]:
        """By block, sites that run side by side, and what narrows them.

        Only until the next ones are asked for: each is narrow in a network that is otherwise dense.
        The first `done` blocks are passed by.
        """
        self._learn_orders()
        with self._progress(len(self.sites), progress, "sensitivity of block") as bar:
            if done:
                bar.say(f"resumed after block {done} of {len(self.sites)}")
            for number, sites in enumerate(self.sites):
                bar.start(number, 1)
                if number < done:
                    self._passes.collect(number, [], {}, bar.advance, finish=True)
                else:
                    yield self._apart(number, sites, bar.advance)

    def _apart(self, block: int, sites: Sequence[BoundSite], advance: Advance) -> Iterator[Apart]:
        gradients = self._gradients(sites)
        collected = self._passes.collect(block, sites, {}, advance, self._goes_on(block))
        for step in grouped(sites):
            of_step = {site: collected[site] for site in step}
            views = {site: self._decider.view(site, parts, None) for site, parts in of_step.items()}
            yield views, functools.partial(self._narrowed, of_step, gradients)
            self.transaction.undo()

    def block(self, number: int, advance: Advance) -> list[SiteReport]:
        """Compresses one block and moves the stream past it; `advance` hears of tokens done."""
        run = self._closed if self.recipe.closed_loop else self._open
        rows = {site.name: self._untouched(site) for site in self.sites[number]}
        with self._onload(number):
            self._require_repeatable(number)
            rows |= run(number, self._active[number], advance)
        return [row for of_site in rows.values() for row in of_site]

    def _require_repeatable(self, block: int) -> None:
        """Runs a block twice, if it is not a library's own: it may keep a state, or draw.

        Raises:
            ModelError: the passes differ, so no two of a run would see the same.
        """
        libraries = {type(m).__module__.split(".")[0] for m in self.stream.blocks[block].modules()}
        stock = libraries <= {"torch", "transformers"}
        if stock or not self.architecture.trusted or not (self._active[block] and len(self.stream)):
            return
        with self.clock("forward"):
            once, again = (self.stream.run(block, 0) for _ in range(2))
        if isinstance(once, Tensor) and not _is_alike(once, again):
            raise ModelError(
                f"block {block} returns something else when it runs again: it keeps a state, or "
                "depends on chance, so no two passes would see the same; switch that off"
            )

    def _closed(self, block: int, sites: Sequence[BoundSite], advance: Advance) -> Rows:
        rows = {}
        gradient = self._gradient if self.recipe.needs_gradient else ignore
        entries = self._attention_inputs(block)
        if self._corrects(block) and not entries:
            self.notes.append(
                f"the attention of block {block + 1} was not corrected: its projections to "
                "queries, keys and values are no plain layers"
            )
        targets: dict[CalibrationPoint, HiddenStates] = {}
        if self._dense is not None:
            held = self._passes.follow(self._dense, block, [*entries, *sites], advance)
            targets = {p: target for p, target in held.items() if p.can_aim(self.recipe.per_tap)}
        for entry in entries:
            self._correct(entry, targets, advance)
        for step in grouped(sites):
            # The block is finished from the last site on: what ran before it need not run again.
            upstream = step[0].upstream if step[-1] is sites[-1] else ()
            undone = {site: targets[site] for site in step if site in targets}
            with self._memo.recording(upstream):
                collected = self._passes.collect(block, step, undone, advance, finish=False)
            for site, decision in self._decided(collected, self._decider.decide, gradient):
                rows[site.name] = self._compress(site, decision, undone.get(site))
        if self.recipe.repair and sites:
            for norm in self._passes.in_order(self.architecture.norms(block), block):
                inputs = functools.partial(self._passes.inputs_of, norm, block)
                reset_norm(norm, inputs, self.transaction, self._processes.total)
        with self._memo.replaying():
            if self._goes_on(block):
                self._passes.collect(block, [], {}, advance, finish=True)
            elif sites:
                self._try(block)
        return rows

    def _attention_inputs(self, block: int) -> list[AttentionInput]:
        """Where the attention of a block reads a stream that has drifted."""
        return self.architecture.attention_inputs(block) if self._corrects(block) else []

    def _corrects(self, block: int) -> bool:
        return self.recipe.correct_attention and block > self._first

    def _correct(
        self,
        entry: AttentionInput,
        targets: Mapping[CalibrationPoint, HiddenStates],
        advance: Advance,
    ) -> None:
        """Rewrites layers that read the stream; W becomes W M."""
        target = {entry: targets[entry]}
        try:
            collected = self._passes.collect(entry.block, [entry], target, advance, finish=False)
        except ModelError as error:  # it runs more than once, or on what a mask says nothing of
            self.notes.append(f"{entry.name} was not corrected: {error}")
            return
        ((_, decision),) = self._decided(
            collected, lambda _, parts, __: self._decider.corrected(*parts), ignore
        )
        ((fitted,), (tokens,)) = decision.fits, decision.tokens
        self.inputs.append(
            InputReport(
                name=entry.name,
                block=entry.block,
                layers=[layer.name for layer in entry.layers],
                tokens=tokens,
                alpha=None if math.isinf(fitted.alpha) else fitted.alpha,
                drift_correction=fitted.drift_correction,
                error=fitted.error,
                baseline_error=fitted.baseline_error,
            )
        )
        if math.isinf(fitted.alpha) or not fitted.drift_correction:
            return
        with self.clock("absorb"):
            for layer in entry.layers:
                new = layer.by_channel.to(fitted.weight) @ fitted.weight
                layer.rewrite(new, layer.channels, False, None, self.transaction)

    def _try(self, block: int) -> None:
        """Runs a block that is done, which shows whether all that had to be narrowed was."""
        with self._explained(), self.clock("forward"):
            self.stream.run(block, 0)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Says what it means where a network that was narrowed does not run."""
        try:
            yield
        except (RuntimeError, ValueError, IndexError) as error:
            if ran_out(error) or isinstance(error, GrailError):
                raise
            raise ModelError(
                f"the network does not run once it is narrow: {error}. If its sites were named, "
                "name every layer with weights between producers and consumers: "
                "grail.Site(…, along=[…])"
            ) from error

    def _open(self, block: int, sites: Sequence[BoundSite], advance: Advance) -> Rows:
        gradients = self._gradients(sites)
        collected = self._passes.collect(block, sites, {}, advance, self._goes_on(block))
        return self._narrowed(collected, gradients)

    def _goes_on(self, block: int) -> bool:
        """Whether a block's output is another's input."""
        return block + 1 < len(self.architecture.blocks)

    def _gradients(self, sites: Sequence[BoundSite]) -> dict[BoundSite, Tensor]:
        """While the stream is at the block's entry, and nothing of the block is narrow."""
        if not self.recipe.needs_gradient:
            return {}
        return {site: self._gradient(site) for site in sites}

    def _narrowed(
        self,
        collected: Mapping[BoundSite, Sequence[SiteStatistics]],
        gradients: Mapping[BoundSite, Tensor],
    ) -> Rows:
        decided = self._decided(collected, self._decider.decide, gradients.get)
        return {site.name: self._compress(site, decision) for site, decision in decided}

    def _decided(
        self,
        collected: Mapping[AnyPoint, Sequence[SiteStatistics]],
        decide: Callable[[AnyPoint, Sequence[SiteStatistics], Tensor | None], Decision],
        gradient: Callable[[AnyPoint], Tensor | None],
    ) -> Iterator[tuple[AnyPoint, Decision]]:
        """What becomes of each place, by the tokens of all processes; made when it is asked for."""
        return self._processes.decided(
            list(collected),
            grams=lambda point: [gram for part in collected[point] for gram in part.grams],
            decide=lambda point, gradient: decide(point, collected[point], gradient),
            prepare=gradient,
            cost=lambda point: point.channels**3,
        )

    def _compress(
        self, site: BoundSite, decision: Decision, target: HiddenStates | None = None
    ) -> list[SiteReport]:
        channels, reduction = site.channels, decision.reduction
        if not self.architecture.trusted and len(self.stream):
            self._check(site, reduction)
        if isinstance(reduction, Folding) and not decision.fits:
            return self._fold_exactly(site, reduction, target)
        with self.clock("absorb"):
            if not reduction.is_identity:
                site.narrow(reduction, self.widths[site.name], self.transaction)
        return self._absorbed(site, decision, channels)

    def _check(self, site: BoundSite, reduction: Reduction) -> None:
        """Refuses a site with a consumer that reads something else than R x once it is narrow.

        Tried with a selection, whatever the reduction: φ(R W x) is not R φ(W x) for a folding.
        """
        if not isinstance(reduction, Selection):
            every, draw = reduction.channels, torch.Generator().manual_seed(0)
            drawn = torch.randperm(every, generator=draw, dtype=torch.int64)
            reduction = Selection(drawn[: reduction.kept].sort().values, every)
        for batch in sorted({0, len(self.stream) - 1}):
            before = self._passes.calls(site, batch)
            _require_plain_outputs(before)
            with self._explained(), Transaction() as trial:
                site.narrow(reduction, self.widths[site.name], trial)
                try:
                    reads = self._passes.reads_again(site, batch, before)
                finally:
                    trial.undo()
            self._require_reads(site, reduction, before, reads)
        if len(site.consumers) > 1:
            changed = self._passes.reads_again(site, batch, before, silent=True)
            self._downstream |= {
                consumer
                for consumer, seen in changed.items()
                if not all(
                    torch.equal(x, old) for x, (old, _) in zip(seen, before[consumer], strict=False)
                )
            }

    @staticmethod
    def _require_reads(
        site: BoundSite,
        reduction: Reduction,
        before: Calls,
        reads: Mapping[Consumer, Sequence[Tensor]],
    ) -> None:
        """Raises ModelError unless every consumer reads R x of the x that it read before."""
        for consumer in site.consumers:
            expected = [reduction.restrict(consumer.pixels(x)) for x, _ in before[consumer]]
            read = [consumer.pixels(x) for x in reads[consumer]]
            if len(read) != len(expected) or not all(map(_is_alike, expected, read)):
                raise ModelError(
                    f"{site.name}: once narrow, {consumer.name} does not read the channels that "
                    "were kept. Something between producers and consumers mixes channels (a "
                    "softmax or a norm over them, a shuffle, heads, a map flattened position by "
                    "position where flatten(1) keeps channels together), or depends on chance; it "
                    "is no site"
                )

    def _absorbed(self, site: BoundSite, decision: Decision, channels: int) -> list[SiteReport]:
        """Rewrites the consumers of a narrowed site; returns their rows."""
        kept = decision.reduction.kept
        self.notes += decision.notes
        with self.clock("absorb"):
            self._rewrite(site, decision.fits, kept)
        return [
            _row(site, consumer, channels, kept, tokens, self._measured(consumer, decision, result))
            for consumer, tokens, result in zip(
                site.consumers, decision.tokens, decision.fits, strict=True
            )
        ]

    def _measured(self, consumer: Consumer, decision: Decision, result: Fit) -> Fit:
        """A fit without its errors where they are not the network's."""
        reason = ""
        if isinstance(decision.reduction, Folding):
            reason = "a folding that is not fitted to what the folded layers write"
        elif consumer in self._downstream:
            reason = "it reads what other consumers of the site write"
        if not reason:
            return result
        self.notes.append(f"{consumer.name}: its error is not measured: {reason}")
        return replace(result, error=math.nan, baseline_error=math.nan)

    def _fold_exactly(
        self, site: BoundSite, reduction: Folding, target: HiddenStates | None
    ) -> list[SiteReport]:
        """Folds, runs the folded block, and fits the plainly folded consumer to what is amiss.

        That is a drift: from what the block itself held before it was folded, and from the dense
        network's stream as far as drift is to be corrected.
        """
        channels, (consumer,) = site.channels, site.consumers
        if site.probe is None:  # what folding takes shows at the consumer's own output
            site = replace(site, probe=ResidualProbe(consumer.module, output=True))
        target, correction, share = self._aim_of_folded(site, target)
        with self.clock("absorb"):
            plain = reduction.absorb(consumer.by_channel)
            site.narrow(reduction, self.widths[site.name], self.transaction)
            consumer.rewrite(plain, reduction.kept, False, None, self.transaction)
        with self._explained(), self._memo.replaying():
            collected = self._passes.collect(
                site.block, [site], {site: target}, ignore, finish=False
            )
        everything = Selection(range(reduction.kept), reduction.kept)
        ((_, decision),) = self._decided(
            collected,
            lambda site, parts, _: self._decider.fitted(site, parts, everything, correction),
            ignore,
        )
        if share is not None:
            fits = tuple(replace(result, drift_correction=share) for result in decision.fits)
            decision = replace(decision, fits=fits)
        return self._absorbed(site, decision, channels)

    def _aim_of_folded(
        self, site: BoundSite, target: HiddenStates | None
    ) -> tuple[HiddenStates, float | Auto, float | None]:
        """What a folded block is to hold, how much of what it lacks is fitted, the share of drift.

        Held-out tokens choose one share of both, of drift and of what folding took: None.
        """
        share = self.recipe.drift_correction
        if share == "auto":
            if target is not None and self.stream.holds_out:
                return target, share, None
            share = 0.0
        if target is not None and share == 1:
            return target, 1.0, share
        with self._memo.replaying():
            own = self._passes.follow(self.stream.fork(), site.block, [site], ignore)[site]
        if target is not None and share > 0:
            for batch, dense in enumerate(target):
                # Where it runs, so that the bits do not hang on where hidden states wait.
                mixed = own[batch].to(self.stream.device).lerp(dense.to(self.stream.device), share)
                own.put(batch, mixed)
        return own, 1.0, share

    def _gradient(self, site: BoundSite) -> Tensor:
        with self.clock("forward"):
            drops, holds_out = self.recipe.non_finite == "drop", self.recipe.holds_out
            return regional_gradient(self.stream, site, drops, holds_out)

    def _rewrite(self, site: BoundSite, fits: Sequence[Fit], kept: int) -> None:
        for consumer, result in zip(site.consumers, fits, strict=True):
            shift = None
            if result.shifts is not None:
                shift = result.shifts[0].view(consumer.outputs, -1).sum(1)  # over the taps
            consumer.rewrite(result.weight, kept, self.recipe.per_tap, shift, self.transaction)

    def _untouched(self, site: BoundSite) -> list[SiteReport]:
        nothing = Fit((), 0.0, 0.0, alpha=0.0, drift_correction=0.0, damping=0.0, retries=0)
        channels, tokens = site.channels, self.stream.tokens
        return [_row(site, c, channels, channels, tokens, nothing) for c in site.consumers]


def _require_plain_outputs(calls: Calls) -> None:
    """Raises ModelError for a consumer that returns something else than its weight says."""
    for consumer, of_consumer in calls.items():
        for x, output in of_consumer:
            if not _is_alike(plain_output(consumer.module, x), output):
                raise ModelError(
                    f"{consumer.name} returns something else than its weight and bias make of its "
                    "input: a hook or a forward of its own changes it; remove that"
                )


def _is_alike(expected: Tensor, read: Tensor) -> bool:
    """Compares tensors up to the rounding of narrower layers before them."""
    if expected.shape != read.shape:
        return False
    rounding = max(ROUNDING, 2 * torch.finfo(read.dtype).eps)
    expected, read = (x.float().nan_to_num(0, 0, 0) for x in (expected, read))
    return bool((read - expected).norm() <= rounding * expected.norm())


def _known(error: float) -> float | None:
    return None if math.isnan(error) else error


def _row(
    site: BoundSite, consumer: Consumer, channels: int, kept: int, tokens: int, result: Fit
) -> SiteReport:
    return SiteReport(
        name=site.name if len(site.consumers) == 1 else f"{site.name} → {consumer.name}",
        kind=site.kind,
        block=site.block,
        channels=channels,
        kept=kept,
        tokens=tokens,
        alpha=None if math.isinf(result.alpha) else result.alpha,
        drift_correction=result.drift_correction,
        damping=result.damping,
        retries=result.retries,
        error=_known(result.error),
        baseline_error=_known(result.baseline_error),
    )
