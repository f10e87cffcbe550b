"""The loop over blocks: calibrate → select → solve → absorb.

Closed loop: a block's Grams are collected with its inputs coming from the already compressed blocks
before it, and the Gram of its MLP after its own heads were narrowed. Open loop: all Grams of a
block come from one pass of the dense model. One block's statistics live at a time.

Where drift is to be corrected, the dense network's stream goes along: what a block's dense form
holds after each site is taken before anything in it is narrowed (see `grail.drift`). What is left
of drift meets the attention behind, which was made for the dense network's x and reads x̃. It can
be corrected, too: with the best linear guess of x, M x̃, the weights of queries, keys and values
become W M,

    M = argmin ‖x − M x̃‖² + λ‖M − I‖² = I + β C (G + λI)⁻¹,   G = Σ x̃ x̃ᵀ,  C = Σ (x − x̃) x̃ᵀ

which is a site's own problem with W = I and nothing lost (`grail.problem`); λ and β are chosen
likewise. In quantisation it is error propagation (Arai, Ichikawa, NeurIPS 2025, arXiv 2504.09629).
An MLP's first layers stay as they are: it can undo only such drift as its hidden channels show.

Folding is fitted exactly: a folded producer writes φ(R W x), not R φ(W x), so the block runs once
more with its producers folded, and the fit sees what the narrow network computes.
"""

import functools
import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from statistics import fmean
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from grail import select
from grail.batchnorm import reset_norm
from grail.checkpoint import Checkpoint, Position
from grail.clock import Clock
from grail.distributed import Decision
from grail.errors import InputError, ModelError
from grail.fit import Auto, Fit, Toward, fit
from grail.gradient import regional_gradient
from grail.gram import Gram
from grail.gram_ragged import RaggedGrams
from grail.layers import Consumer, Reader, Routed, stacked
from grail.memory import ran_out
from grail.onload import Onloader
from grail.options import ALPHA, Options
from grail.reduction import Folding, Reduction, Selection
from grail.report import InputReport, SiteReport
from grail.sites import Architecture, BoundSite, Entry, Place
from grail.statistics import Statistics
from grail.stream import Memo, Shelf, Stop, Stream
from grail.transaction import Transaction

Advance = Callable[[int], object]  # hears of so many tokens done
# As a `Reader` of each consumer.
Read = Callable[[Consumer, Tensor, Routed | None], None]
Rows = dict[str, list[SiteReport]]  # by name of site, one for each of its consumers
# Sites that run side by side, and what narrows them.
Apart = tuple[dict[BoundSite, select.View], Callable[[], Rows]]
AnyPlace = TypeVar("AnyPlace", bound=Place)


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
        options: Options,
        stream: Stream,
        transaction: Transaction,
        clock: Clock,
        checkpoint: Checkpoint | None = None,
        onload: Onloader | None = None,
        known: Callable[[Any], list[Statistics]] | None = None,
    ):
        self.architecture, self.options, self.stream = architecture, options, stream
        self.transaction, self.clock, self._checkpoint = transaction, clock, checkpoint
        self.widths = options.widths(architecture)
        self._onload = onload or Onloader(stream.blocks, None)
        self._dense = stream.fork() if options.follows_drift else None
        self._known = known
        self._memo = Memo((), stream)
        self._ranks = stream.ranks
        # What the dense network holds where sites land within a block; every block uses the memory
        # again.
        self._shelves: list[Shelf] = []
        self._select = select.get(options.selector)
        self.notes: list[str] = []  # what a person should know
        self.inputs: list[InputReport] = []
        self._rows: list[SiteReport] = []  # of the blocks that are done
        # Bound, and told apart, while nothing is narrow: a resumed run soon is.
        self.sites = options.sites_of(architecture)
        self._active = [options.active(sites, self.widths) for sites in self.sites]
        narrowed = (
            site.kind
            for site in itertools.chain(*self.sites)
            if self.widths[site.name].kept < site.channels
        )
        self._several_kinds = len(set(narrowed)) > 1
        # The first block in which anything becomes narrower: before it nothing drifts.
        self._first = next((number for number, sites in enumerate(self._active) if sites), 0)

    def all_blocks(self, progress: bool) -> list[SiteReport]:
        """Compresses every block in order; returns a row for each consumer of each site."""
        if not any(self._active):
            return [row for sites in self.sites for site in sites for row in self._untouched(site)]
        position = Position(0, [], self.inputs, self.notes, self.clock.seconds)
        if self._checkpoint is not None:
            with self.clock("checkpoint"):
                self._checkpoint.resume(position, self._streams())
        self._rows = position.rows
        left = list(enumerate(self._active))[position.done :]
        passes = (1 + (self._dense is not None)) * len(left)
        if self.options.closed_loop:
            passes += sum(len(steps(sites)) + bool(self._entries(n)) for n, sites in left)
        with tqdm(
            total=self.stream.own_tokens * passes,
            unit="tok",
            unit_scale=True,
            disable=not progress or self._ranks.number > 0,
        ) as bar:
            for number, _ in left:
                bar.set_description(f"block {number + 1}/{len(self.sites)}")
                position.rows += self.block(number, bar.update)
                position.done = number + 1
                self._keep(position)
        return position.rows

    def _keep(self, position: Position) -> None:
        if self._checkpoint is not None:
            left = position.done < len(self.architecture.blocks)
            position.seconds = self.clock.seconds
            with self.clock("checkpoint"):
                self._checkpoint.save(position, self._streams() if left else ())

    def _streams(self) -> list[Stream]:
        return [stream for stream in (self.stream, self._dense) if stream is not None]

    def statistics(self, progress: bool) -> Iterator[tuple[BoundSite, list[Statistics]]]:
        """What the consumers of each site read in the dense network, site by site."""
        total = self.stream.tokens * len(self.sites)
        with tqdm(total=total, unit="tok", unit_scale=True, disable=not progress) as bar:
            for number, sites in enumerate(self.sites):
                with self._onload(number):
                    yield from self._collect(number, sites, {}, bar.update, finish=True).items()

    def apart(self, progress: bool, done: int = 0) -> Iterator[Iterator[Apart]]:
        """By block, sites that run side by side, and what narrows them.

        Only until the next ones are asked for: each is narrow in a network that is otherwise dense.
        The first `done` blocks are passed by.
        """
        total = self.stream.tokens * len(self.sites)
        with tqdm(total=total, unit="tok", unit_scale=True, disable=not progress) as bar:
            for number, sites in enumerate(self.sites):
                bar.set_description(f"sensitivity of block {number + 1}/{len(self.sites)}")
                if number < done:
                    self._collect(number, [], {}, bar.update, finish=True)
                else:
                    yield self._apart(number, sites, bar.update)

    def _apart(self, block: int, sites: Sequence[BoundSite], advance: Advance) -> Iterator[Apart]:
        gradients = self._gradients(sites)
        collected = self._collect(block, sites, {}, advance, finish=True)
        for step in steps(sites):
            of_step = {site: collected[site] for site in step}
            views = {site: self._view(site, parts, None) for site, parts in of_step.items()}
            yield views, functools.partial(self._narrowed, of_step, gradients)
            self.transaction.undo()

    def block(self, number: int, advance: Advance) -> list[SiteReport]:
        """Compresses one block and moves the stream past it; `advance` hears of tokens done."""
        run = self._closed if self.options.closed_loop else self._open
        rows = {site.name: self._untouched(site) for site in self.sites[number]}
        with self._onload(number):
            rows |= run(number, self._active[number], advance)
        return [row for of_site in rows.values() for row in of_site]

    def _closed(self, block: int, sites: Sequence[BoundSite], advance: Advance) -> Rows:
        rows = {}
        gradient = self._gradient if select.needs_gradient(self._select) else _ignore
        entries = self._entries(block)
        if self._corrects(block) and not entries:
            self.notes.append(
                f"the attention of block {block + 1} was not corrected: its projections to "
                "queries, keys and values are no plain layers"
            )
        aims: dict[Place, Shelf] = {}
        if self._dense is not None:
            held = self._follow(self._dense, block, [*entries, *sites], self._shelves, advance)
            aims = {p: aim for p, aim in held.items() if p.can_aim(self.options.per_tap)}
        for entry in entries:
            self._correct(entry, aims, advance)
        for step in steps(sites):
            # The block is finished from the last site on: what ran before it need not run again.
            upstream = step[0].upstream if step[-1] is sites[-1] else ()
            self._memo = Memo(upstream, self.stream, self._memo.shelves)
            undone = {site: aims[site] for site in step if site in aims}
            with self._memo.recording():
                collected = self._collect(block, step, undone, advance, finish=False)
            for site, decision in self._decided(collected, self._decide, gradient):
                rows[site.name] = self._compress(site, decision, undone.get(site))
        if self.options.repair and sites:
            for norm in self._norms(block):
                inputs = functools.partial(self._inputs_of, norm, block)
                reset_norm(norm, inputs, self.transaction, self._ranks.total)
        with self._memo.replaying():
            if block + 1 < len(self.architecture.blocks):
                self._collect(block, [], {}, advance, finish=True)
            elif sites:
                self._try(block)
        return rows

    def _entries(self, block: int) -> list[Entry]:
        """Where the attention of a block reads a stream that has drifted."""
        return self.architecture.entries(block) if self._corrects(block) else []

    def _corrects(self, block: int) -> bool:
        return self.options.correct_attention and block > self._first

    def _correct(self, entry: Entry, aims: Mapping[Place, Shelf], advance: Advance) -> None:
        """Rewrites layers that read the stream; W becomes W M."""
        aim = {entry: aims[entry]}
        try:
            collected = self._collect(entry.block, [entry], aim, advance, finish=False)
        except ModelError as error:  # it runs more than once, or on what a mask says nothing of
            self.notes.append(f"{entry.name} was not corrected: {error}")
            return
        ((_, decision),) = self._decided(
            collected, lambda _, parts, __: self._decide_entry(*parts), _ignore
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

    def _decide_entry(self, collected: Statistics) -> Decision:
        channels = collected.train.channels
        everything = Selection(range(channels), channels)
        identity = torch.eye(channels, dtype=torch.float64, device=collected.train.device)
        fitted = self._fit(collected, identity, everything, toward="baseline", affine=False)
        return Decision(everything, (fitted,), (collected.tokens,))

    def _try(self, block: int) -> None:
        """Runs a block that is done, which shows whether all that had to be narrowed was."""
        try:
            with self.clock("forward"):
                self.stream.run(block, 0)
        except (RuntimeError, ValueError) as error:
            if ran_out(error):
                raise
            raise ModelError(
                f"the network does not run once it is narrow: {error}. If its sites were named, "
                "name every layer with weights between producers and consumers: "
                "grail.Site(…, along=[…])"
            ) from error

    def _open(self, block: int, sites: Sequence[BoundSite], advance: Advance) -> Rows:
        gradients = self._gradients(sites)
        return self._narrowed(self._collect(block, sites, {}, advance, finish=True), gradients)

    def _gradients(self, sites: Sequence[BoundSite]) -> dict[BoundSite, Tensor]:
        """While the stream is at the block's entry, and nothing of the block is narrow."""
        if not select.needs_gradient(self._select):
            return {}
        return {site: self._gradient(site) for site in sites}

    def _narrowed(
        self,
        collected: Mapping[BoundSite, Sequence[Statistics]],
        gradients: Mapping[BoundSite, Tensor],
    ) -> Rows:
        decided = self._decided(collected, self._decide, gradients.get)
        return {site.name: self._compress(site, decision) for site, decision in decided}

    def _norms(self, block: int) -> list[nn.Module]:
        """The batch norms of a block that run, in that order."""
        ran: dict[nn.Module, None] = {}
        with ExitStack() as hooks, self.clock("forward"):
            for norm in self.architecture.norms(block):
                handle = norm.register_forward_pre_hook(lambda norm, _: ran.setdefault(norm))
                hooks.callback(handle.remove)
            self.stream.run(block, 0)
        return list(ran)

    def _follow(
        self,
        stream: Stream,
        block: int,
        places: Sequence[Place],
        shelves: list[Shelf],
        advance: Advance,
    ) -> dict[Place, Shelf]:
        """Moves a stream past a block; what it held where each place lands, kept on `shelves`."""
        batch = 0
        shelves += [Shelf(stream.storage) for _ in places[len(shelves) :]]
        # A block's output is kept by the stream itself.
        held = {
            place: stream.hidden if place.lands_at_output else shelf
            for place, shelf in zip(places, shelves, strict=False)
        }

        def keeping(shelf: Shelf) -> Callable[[Tensor], None]:
            return lambda landed: shelf.put(batch, landed)

        with ExitStack() as hooks, self.clock("forward"):
            for place, shelf in held.items():
                if place.can_aim(self.options.per_tap) and not place.lands_at_output:
                    watched = _watch(place, stream.blocks[block], _ignore, keeping(shelf))
                    hooks.enter_context(watched)
            for batch in range(len(stream)):
                output = stream.run(block, batch)
                if isinstance(output, Tensor):
                    stream.store(batch, output)
                advance(stream.tokens_of(batch))
        return held

    def _inputs_of(self, module: nn.Module, block: int) -> Iterator[Tensor]:
        """What a module of a block reads, batch by batch."""
        seen: list[Tensor] = []

        def read(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])
            raise Stop

        with ExitStack() as hooks, self.clock("forward"):
            hooks.callback(module.register_forward_pre_hook(read).remove)
            for batch in range(len(self.stream)):
                with suppress(Stop):
                    self.stream.run(block, batch)
                yield seen.pop()

    def _collect(
        self,
        block: int,
        places: Sequence[AnyPlace],
        aims: Mapping[Any, Shelf],
        advance: Advance,
        finish: bool,
    ) -> dict[AnyPlace, list[Statistics]]:
        """Runs every batch through a block, collecting what the consumers of `places` read.

        Args:
            aims: what those places aim at that undo drift.
            finish: whether the stream moves to the block's output; without, a batch ends where
                all has been seen.
        """
        collected: dict[AnyPlace, list[Statistics]] = {}
        for step in steps(places):
            if self._known is None:
                collected |= self._statistics(step)
            else:
                collected |= {place: self._known(place) for place in step}
        batch = 0
        inputs: dict[Consumer, tuple[Tensor, Routed | None]] = {}
        # A batch's drift, and what its tokens count by, by what lands together.
        missing: dict[Any, tuple[Tensor, Tensor | None]] = {}
        waiting: set[Consumer] = set()
        heard: set[Consumer] = set()

        def add(
            place: AnyPlace,
            consumer: Consumer,
            drift: Tensor | None = None,
            scale: Tensor | None = None,
        ) -> None:
            with self.clock("gram"):
                statistics = collected[place][place.consumers.index(consumer)]
                x, routed = inputs.pop(consumer)
                statistics.update(batch, x, drift, routed, scale)
            waiting.discard(consumer)
            # The first batch goes on to its end, for layers that run again.
            if not waiting and not finish and batch > 0:
                raise Stop

        def reading(place: AnyPlace) -> Read:
            def read(consumer: Consumer, x: Tensor, routed: Routed | None) -> None:
                if consumer in heard:
                    raise ModelError(
                        f"{consumer.name} runs more than once for a batch, in chunks or for "
                        "several inputs; it is narrowed only where it runs once"
                    )
                heard.add(consumer)
                inputs[consumer] = x, routed
                if place not in aims:
                    add(place, consumer)

            return read

        def landing(place: AnyPlace) -> Callable[[Tensor], None]:
            def land(landed: Tensor) -> None:
                together = place.beside or place
                if together not in missing:
                    with self.clock("gram"):
                        missing[together] = self._missing(place, aims[place][batch], landed)
                add(place, place.consumers[0], *missing[together])

            return land

        with ExitStack() as hooks, self.clock("forward"):
            for place in places:
                land = landing(place) if place in aims else None
                hooks.enter_context(_watch(place, self.stream.blocks[block], reading(place), land))
            for batch in range(len(self.stream)):
                waiting.update(c for place in places for c in place.consumers)
                heard.clear()
                missing.clear()
                with suppress(Stop):
                    output = self.stream.run(block, batch)
                    if finish and isinstance(output, Tensor):
                        self.stream.store(batch, output)
                advance(self.stream.tokens_of(batch))
        return collected

    def _missing(self, place: Place, aim: Tensor, landed: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the network lacks of `aim` where a place lands, and what each token counts by."""
        # Widened where it runs: on its way from a host it would be widened there, and sent as fp32.
        aim = aim.to(landed.device).float()
        scale = place.token_scale(aim) if self.options.token_weights else None
        return place.drift(aim, landed), scale

    def _statistics(self, step: Sequence[AnyPlace]) -> dict[AnyPlace, list[Statistics]]:
        """Empty ones for places that run side by side; experts' Grams share their launches."""
        together: dict[str, RaggedGrams] = {}
        if step[0].beside is not None:
            together = {
                name: RaggedGrams(
                    [place.name for place in step],
                    step[0].channels,
                    self.stream.device,
                    non_finite=self.options.non_finite,
                )
                for name in ("train", "held_out")
            }
        return {
            place: [
                Statistics(
                    place.name,
                    consumer,
                    self.stream,
                    self.options.holds_out,
                    self.options.per_tap,
                    partial=place.beside is not None,
                    non_finite=self.options.non_finite,
                    grams={name: ragged.grams[number] for name, ragged in together.items()},
                )
                for consumer in place.consumers
            ]
            for number, place in enumerate(step)
        }

    def _decided(
        self,
        collected: Mapping[AnyPlace, Sequence[Statistics]],
        decide: Callable[[AnyPlace, Sequence[Statistics], Tensor | None], Decision],
        gradient: Callable[[AnyPlace], Tensor | None],
    ) -> Iterator[tuple[AnyPlace, Decision]]:
        """What becomes of each place, by the tokens of all processes; made when it is asked for."""
        return self._ranks.decided(
            list(collected),
            grams=lambda place: [gram for part in collected[place] for gram in part.grams],
            decide=lambda place, gradient: decide(place, collected[place], gradient),
            prepare=gradient,
            cost=lambda place: place.channels**3,
        )

    def _decide(
        self, site: BoundSite, collected: Sequence[Statistics], gradient: Tensor | None
    ) -> Decision:
        with self.clock("select"):
            reduction = self._reduction(site, collected, gradient)
        if isinstance(reduction, Folding) and self._folds_exactly(site):
            return Decision(reduction, (), ())
        return self._fitted(site, collected, reduction)

    def _fitted(
        self,
        site: BoundSite,
        collected: Sequence[Statistics],
        reduction: Reduction,
        correction: float | Auto | None = None,
    ) -> Decision:
        pairs = zip(collected, site.consumers, strict=True)
        return Decision(
            reduction,
            tuple(self._fit_consumer(part, c, reduction, correction) for part, c in pairs),
            tuple(part.tokens for part in collected),
            tuple(
                f"{part.name}: {part.train.tokens} tokens are too few to fit {reduction.kept} "
                "channels, so it was only pruned"
                for part in collected
                if self.options.fits_weights and part.scarce(reduction.kept)
            )
            + tuple(
                f"{part.name}: {part.dropped} tokens with NaN or Inf were dropped, "
                f"{part.tokens} counted"
                for part in collected
                if part.dropped
            ),
        )

    def _compress(
        self, site: BoundSite, decision: Decision, aim: Shelf | None = None
    ) -> list[SiteReport]:
        channels, reduction = site.channels, decision.reduction
        if isinstance(reduction, Folding) and not decision.fits:
            return self._fold_exactly(site, reduction, aim)
        with self.clock("absorb"):
            if not reduction.is_identity:
                site.narrow(reduction, self.widths[site.name], self.transaction)
        return self._absorbed(site, decision, channels)

    def _absorbed(self, site: BoundSite, decision: Decision, channels: int) -> list[SiteReport]:
        """Rewrites the consumers of a narrowed site; returns their rows."""
        kept = decision.reduction.kept
        self.notes += decision.notes
        with self.clock("absorb"):
            self._rewrite(site, decision.fits, kept)
        return [
            _row(site, consumer, channels, kept, tokens, result)
            for consumer, tokens, result in zip(
                site.consumers, decision.tokens, decision.fits, strict=True
            )
        ]

    def _folds_exactly(self, site: BoundSite) -> bool:
        alone = site.beside is None  # experts are narrowed together
        return self.options.folds_exactly and alone and site.can_aim(self.options.per_tap)

    def _fold_exactly(
        self, site: BoundSite, reduction: Folding, aim: Shelf | None
    ) -> list[SiteReport]:
        """Folds, runs the folded block, and fits the plainly folded consumer to what is amiss.

        That is a drift: from what the block itself held before it was folded, and from the dense
        network's stream as far as drift is to be corrected.
        """
        channels, (consumer,) = site.channels, site.consumers
        aim, correction, share = self._aim_of_folded(site, aim)
        with self.clock("absorb"):
            plain = reduction.absorb(consumer.by_channel)
            site.narrow(reduction, self.widths[site.name], self.transaction)
            consumer.rewrite(plain, reduction.kept, False, None, self.transaction)
        with self._memo.replaying():
            collected = self._collect(site.block, [site], {site: aim}, _ignore, finish=False)
        everything = Selection(range(reduction.kept), reduction.kept)
        ((_, decision),) = self._decided(
            collected,
            lambda site, parts, _: self._fitted(site, parts, everything, correction),
            _ignore,
        )
        if share is not None:
            fits = tuple(replace(result, drift_correction=share) for result in decision.fits)
            decision = replace(decision, fits=fits)
        return self._absorbed(site, decision, channels)

    def _aim_of_folded(
        self, site: BoundSite, aim: Shelf | None
    ) -> tuple[Shelf, float | Auto, float | None]:
        """What a folded block is to hold, how much of what it lacks is fitted, the share of drift.

        Held-out tokens choose one share of both, of drift and of what folding took: None.
        """
        share = self.options.drift_correction
        if share == "auto":
            if aim is not None and self.stream.holds_out:
                return aim, share, None
            share = 0.0
        if aim is not None and share == 1:
            return aim, 1.0, share
        with self._memo.replaying():
            own = self._follow(self.stream.fork(), site.block, [site], [], _ignore)[site]
        if aim is not None and share > 0:
            for batch, dense in enumerate(aim):
                # Where it runs, so that the bits do not hang on where hidden states wait.
                mixed = own[batch].to(self.stream.device).lerp(dense.to(self.stream.device), share)
                own.put(batch, mixed)
        return own, 1.0, share

    def _gradient(self, site: BoundSite) -> Tensor:
        with self.clock("forward"):
            return regional_gradient(self.stream, site, self.options.non_finite == "drop")

    def _fit_consumer(
        self,
        statistics: Statistics,
        consumer: Consumer,
        reduction: Reduction,
        correction: float | Auto | None,
    ) -> Fit:
        weight = consumer.by_channel
        if self.options.per_tap:
            weight, reduction = consumer.by_tap, reduction.repeat(consumer.taps)
        toward, affine = self.options.toward, self.options.shifts_bias
        return self._fit(statistics, weight, reduction, toward, affine, correction)

    def _fit(
        self,
        statistics: Statistics,
        weight: Tensor,
        reduction: Reduction,
        toward: Toward,
        affine: bool,
        correction: float | Auto | None = None,
    ) -> Fit:
        options = self.options
        alpha, compensate = options.alpha, options.fits_weights
        correction = options.drift_correction if correction is None else correction
        if statistics.held_out is None:  # nothing to choose by
            alpha = ALPHA if alpha == "auto" else alpha
            correction = 0.0 if correction == "auto" else correction
        if compensate and statistics.scarce(reduction.kept):
            compensate = False
        if statistics.scarce(1):  # an expert that was never asked
            plain = reduction.absorb(weight)
            return Fit((plain,), math.nan, math.nan, math.inf, 0.0, 0.0, retries=0)
        with self.clock("solve"):
            return fit(
                statistics.train,
                reduction,
                weight,
                alpha=alpha,
                toward=toward,
                damping=options.damping,
                affine=affine,
                compensate=compensate,
                drift_correction=correction,
                held_out=statistics.held_out,
            )

    def _rewrite(self, site: BoundSite, fits: Sequence[Fit], kept: int) -> None:
        for consumer, result in zip(site.consumers, fits, strict=True):
            shift = None
            if result.shifts is not None:
                shift = result.shifts[0].view(consumer.outputs, -1).sum(1)  # over the taps
            consumer.rewrite(result.weight, kept, self.options.per_tap, shift, self.transaction)

    def _untouched(self, site: BoundSite) -> list[SiteReport]:
        nothing = Fit((), 0.0, 0.0, alpha=0.0, drift_correction=0.0, damping=0.0, retries=0)
        channels, tokens = site.channels, self.stream.tokens
        return [_row(site, c, channels, channels, tokens, nothing) for c in site.consumers]

    def _reduction(
        self, site: BoundSite, collected: Sequence[Statistics], gradient: Tensor | None
    ) -> Reduction:
        width = self.widths[site.name]
        if width.kept == site.channels:
            return Selection(range(site.channels), site.channels)
        view = self._view(site, collected, gradient)
        # Of an expert that was never asked only its weights are known.
        unseen = site.beside is not None and not view.gram.tokens
        reduction = (select.get("magnitude") if unseen else self._select)(view)
        if (reduction.channels, reduction.kept) != (width.channels, width.kept):
            raise InputError(
                f"the selector answered {reduction!r} at {site.name}, where {width} must stay"
            )
        return reduction

    def _view(
        self, site: BoundSite, collected: Sequence[Statistics], gradient: Tensor | None
    ) -> select.View:
        # Seeded by the site as well, so that a block's draw depends on no other block.
        generator = torch.Generator().manual_seed(
            self.options.seed ^ zlib.crc32(site.name.encode())
        )
        gram = collected[0].channels
        if len(collected) > 1:
            gram = Gram(site.channels, name=site.name)
            for statistics in collected:
                gram.merge(statistics.channels)
        weight, width = stacked(site.consumers), self.widths[site.name]
        share = self._expected_share(site, collected)
        return select.View(site.weights(), weight, gram, width, generator, gradient, share)

    def _expected_share(self, site: BoundSite, collected: Sequence[Statistics]) -> float:
        """The share of drift that a choice of channels is to reckon with.

        Where held-out tokens choose it, after the channels, it is what they chose a block earlier:
        of few tokens most of what seems to drift is noise, which a choice of channels cannot tell.
        None where sites of several kinds are narrowed: with SmolLM2's heads and MLPs, both at half,
        perplexity rose from 125 to 134 (Brown, 32k tokens), with its MLPs alone it fell.
        """
        # Each of several consumers drifts on its own, and one that is only pruned undoes nothing.
        alone = len(collected) == 1 and not collected[0].scarce(self.widths[site.name].kept)
        if self._several_kinds or not alone:
            return 0.0
        share = self.options.drift_correction
        return _last_share(self._rows, site.kind) if share == "auto" else share


def _ignore(*_: object) -> None:
    """Hears and does nothing."""


def steps(places: Sequence[AnyPlace]) -> list[list[AnyPlace]]:
    """Places in order, those that run side by side in one step."""
    apart = itertools.groupby(places, lambda place: place.beside or place)
    return [list(step) for _, step in apart]


@contextmanager
def _watch(
    place: Place,
    block: nn.Module,
    read: Read,
    landed: Callable[[Tensor], None] | None,
) -> Iterator[None]:
    """Reports what each consumer of a place reads, then what the network holds where it lands."""
    reading = False

    def reader(consumer: Consumer) -> Reader:
        def heard(x: Tensor, routed: Routed | None) -> None:
            nonlocal reading
            reading = True
            read(consumer, x, routed)

        return heard

    def land(module: nn.Module, args: Any, output: Any = None) -> None:
        nonlocal reading
        seen = args if output is None else output
        if reading and landed is not None:  # a module may run before the consumer, too
            reading = False
            landed(seen[0] if isinstance(seen, tuple) else seen)

    with ExitStack() as hooks:
        for consumer in place.consumers:
            hooks.enter_context(consumer.watch(reader(consumer)))
        if landed is not None and place.landing is not None:
            module = place.landing.module or block
            if place.lands_at_output or place.landing.output:
                hooks.callback(module.register_forward_hook(land).remove)
            else:
                hooks.callback(module.register_forward_pre_hook(land).remove)
        yield


def _known(error: float) -> float | None:
    return None if math.isnan(error) else error


def _last_share(rows: Sequence[SiteReport], kind: str) -> float:
    """The mean share of drift that sites of a kind undo, in the last block that narrows any."""
    narrowed = (row for row in reversed(rows) if row.kind == kind and row.kept < row.channels)
    _, block = next(itertools.groupby(narrowed, key=lambda row: row.block), (None, ()))
    shares = [row.drift_correction for row in block]
    return fmean(shares) if shares else 0.0


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
