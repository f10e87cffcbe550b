"""Refits the producers of a narrow site, through what is between them and its consumer.

After a site is narrowed, its consumer is fitted to the channels that stay, but its producers still
write what they wrote. Here they are fitted too, one after the other, each to what the consumer's
output lacks of its target (`grail.algebra.producer_fit`); then the consumer is fitted again to what
it reads by then. Slopes come from the block itself (`grail.statistics.slopes`). Producers in which
the consumer's input is linear come first.

The target is the output of the dense site and, of the drift, the share that the first fit of the
consumer chose. A refitted producer stays if the error of the network on held-out sequences has
fallen, and on guard text (without either, on all); else half of its change is tried, then none.

Producers are fitted to `TOKENS` of the calibration at most, spread evenly over its batches, and to
all guard text; the consumer is fitted to everything.

Memory: for those tokens what a producer reads and the slope of each channel that stays, D + K
values a token, and for all T tokens the dense site's output, T·O values.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from grail.algebra.drift import Drift
from grail.algebra.kinds import MAPS, plain_output
from grail.algebra.producer_fit import Chunk, Moments, conjugate_gradients, error_of
from grail.algebra.reduction import Folding, Reduction, Selection
from grail.calibrate.hidden_states import HiddenStates, OutputCache
from grail.calibrate.stream import Role, Stream
from grail.errors import InputError
from grail.networks import BoundSite
from grail.run.blocks import Blocks
from grail.run.exchange import Decision, Exchange
from grail.run.narrower import BlockReport, SiteNarrower
from grail.run.site_check import explain_failure
from grail.run.solver import SiteSolver
from grail.runtime.hooks import input_of
from grail.runtime.transaction import Transaction
from grail.statistics.collector import Advance
from grail.statistics.residual_split import ResidualSplit
from grail.statistics.site_statistics import SiteStatistics
from grail.statistics.slopes import Part, Reading, parts_in_order, read

DAMPING = 1e-2  # α of `grail.algebra.producer_fit`
# Of the calibration, to which producers are fitted: each step is a pass over them.
TOKENS = 16 * 1024
HALVINGS = 1  # of a change that raised the error, before it is taken back


@dataclass(frozen=True)
class RefitJob:
    """A site that is narrow, whose producers are refitted.

    `share`: of the drift that is corrected. `target`: the dense network's hidden states at the
    probe, if drift is corrected. `split`: keeps the block's output in two parts. `cache`: outputs
    of the modules before the site.
    """

    site: BoundSite
    share: float
    target: HiddenStates | None
    split: ResidualSplit | None
    cache: OutputCache
    advance: Advance


class ProducerRefit:
    """Refits the producers of one run's sites.

    Args:
        blocks: whose sites are narrowed.
        solver, narrower, exchange: of the run.
        transaction: through which the model is changed.

    Phases of the clock: "forward" (passes through the block), "refit".
    """

    def __init__(
        self,
        blocks: Blocks,
        solver: SiteSolver,
        narrower: SiteNarrower,
        exchange: Exchange,
        transaction: Transaction,
    ):
        self._steps, self._stream = blocks.recipe.refit_producers, blocks.stream
        # Those that are fitted come first, those that judge after them.
        self._roles = [Role.TRAIN]
        self._roles += [Role.HELD_OUT] * (blocks.recipe.holds_out and blocks.stream.holds_out)
        self._roles += [Role.GUARD] * (Role.GUARD in blocks.stream.others)
        self._batches = _fitted(blocks.stream)
        self._clock, self._collector, self._widths = blocks.clock, blocks.collector, blocks.widths
        self._trusted = blocks.architecture.trusted
        self._solver, self._narrower, self._exchange = solver, narrower, exchange
        self._transaction = transaction
        states = [HiddenStates(blocks.stream.storage) for _ in range(3)]
        self._own, self._inputs, self._slopes = states
        self._tried: dict[Any, tuple[list[tuple[int, int]], str]] = {}

    @property
    def kept_bytes(self) -> int:
        """The bytes that are kept of all batches while a site is refitted."""
        return sum(states.nbytes for states in (self._own, self._inputs, self._slopes))

    def passes(self, site: BoundSite) -> float:
        """Returns the number of passes over all tokens for a site, if no change fails."""
        if not self._steps or refusal(site) or not self._narrows(site):
            return 0
        parts = sum(len(producer.spans()) for producer in site.producers)
        fitted = sum(map(self._stream.tokens_of, self._batches)) / max(self._stream.own_tokens, 1)
        return parts * (1 + self._steps) * fitted + 1

    def applies_to(self, step: Sequence[BoundSite], report: BlockReport) -> bool:
        """Returns whether the producers of a site are refitted; the report notes why not.

        Args:
            step: sites that run together, none of them narrow yet. Tried once for each class of
                blocks, and of an unknown network for each site.
        """
        site = step[0]
        if not self._steps or not any(map(self._narrows, step)):
            return False
        key = self._key(site)
        if key not in self._tried:
            reason = refusal(site)
            order: list[tuple[int, int]] = []
            if not reason:
                with self._clock("forward"):
                    order, reason = parts_in_order(self._stream, site)
            # Of several processes one may see less.
            reasons = self._stream.processes.gather(reason)
            reason = next(filter(None, reasons), "")
            self._tried[key] = order, reason
            if reason:
                report.notes.append(f"{site.name}: its producers were not refitted: {reason}")
        return not self._tried[key][1]

    @contextmanager
    def recording(self, site: BoundSite) -> Iterator[None]:
        """Keeps what the consumer of a site that is still dense returns, of every batch."""
        (consumer,), batches = site.consumers, itertools.count()

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = input_of(consumer.name, args, kwargs)
            self._own.put(next(batches), plain_output(module, x))

        with consumer.module.register_forward_pre_hook(keep, with_kwargs=True):
            yield

    def refit(
        self, job: RefitJob, decision: Decision, reduction: Reduction, report: BlockReport
    ) -> Reduction:
        """Refits the producers of a site that is narrow, and then its consumer.

        Args:
            decision: by which the consumer has been rewritten.
            reduction: by which the site was narrowed.

        Returns:
            The reduction that makes the consumer's input of what `job.split` keeps.

        Raises:
            InputError: the site was folded.
        """
        site = job.site
        if isinstance(reduction, Folding):
            raise InputError(
                f"refit_producers is for selectors that keep channels; that of {site.name} folded "
                "them: choose another selector, or refit_producers=0"
            )
        order, _ = self._tried[self._key(site)]
        trial, changed = None, False
        for number, place in order:
            part = Part(site.producers[number], place)
            seen, held = self._settled(job, part, trial)
            changed |= held
            trial = self._trial(job, part, seen)
        if not (changed or trial):
            return reduction
        seen, held = self._settled(job, None, trial)
        if not (changed or held):
            return reduction
        self._narrower.absorb(site, self._decided(job, seen, decision), report)
        return Selection(range(reduction.kept), reduction.channels)

    def _settled(
        self, job: RefitJob, part: Part | None, trial: "_Trial | None"
    ) -> tuple["_Pass", bool]:
        """Returns a pass after the last change has lowered the error, or was taken back.

        The second value says whether it stays.
        """
        seen = self._pass(job, part)
        while trial is not None and not trial.lowers(seen.errors):
            trial = trial.smaller()
            seen = self._pass(job, part)
        return seen, trial is not None

    def _pass(self, job: RefitJob, part: Part | None) -> "_Pass":
        return self._collect(job) if part is None else self._linearise(job, part)

    def _trial(self, job: RefitJob, part: Part, seen: "_Pass") -> "_Trial | None":
        """Fits a part and gives its producer the new rows; None where no step lowers the error."""
        with self._clock("refit"):
            found = conjugate_gradients(
                job.site.consumers[0].by_channel,
                seen.sets,
                lambda: self._chunks(job),
                steps=self._steps,
                alpha=DAMPING,
                total=self._stream.processes.total,
            )
            if not found.steps:
                return None
            return _Trial(part, found.change, seen.errors, self._transaction)

    def _chunks(self, job: RefitJob) -> Iterator[Chunk]:
        """Yields what the last pass for a part has kept."""
        statistics, device = self._collector.empty(job.site), self._stream.device
        for batch in self._batches:
            kept = (states[batch].to(device) for states in (self._inputs, self._slopes))
            for role, (x, slope) in statistics.rows(batch, *kept):
                if role in self._roles:
                    yield self._roles.index(role), x, slope
            job.advance(self._stream.tokens_of(batch))

    def _reads(
        self, job: RefitJob, part: Part | None, batches: Sequence[int]
    ) -> Iterator[tuple[int, Reading, Tensor, Tensor]]:
        """Yields each of some batches, what is read of it, and what the consumer's output lacks.

        That is, [..., O] in fp32, of the target and of the dense network's output.
        """
        (consumer,), device = job.site.consumers, self._stream.device
        with self._clock("forward"), job.cache.replaying(batches):
            for batch in batches:
                target = None if job.target is None else job.target[batch]
                with explain_failure():
                    found = read(self._stream, job.site, batch, part, probes=target is not None)
                assert found.hidden is not None
                returned = plain_output(consumer.module, found.hidden)
                own = self._own[batch].to(device).float() - returned.float()
                lacking = own
                if target is not None:
                    assert found.landed is not None
                    drift = job.site.drift(target.to(device).float(), found.landed.float())
                    lacking = drift.reshape(own.shape)
                yield batch, found, own.lerp(lacking, job.share), lacking
                job.advance(self._stream.tokens_of(batch))

    def _linearise(self, job: RefitJob, part: Part) -> "_Pass":
        """Runs fitted batches through the narrow block, and keeps what the fit of a part needs."""
        statistics, total = self._collector.empty(job.site), self._stream.processes.total
        weight = job.site.consumers[0].by_channel
        inputs = part.rows.shape[1]
        sets = {role: Moments(weight, inputs) for role in self._roles}
        for batch, found, missing, _ in self._reads(job, part, self._batches):
            assert found.x is not None
            assert found.slope is not None
            self._inputs.put(batch, found.x)
            self._slopes.put(batch, found.slope)
            with self._clock("refit"):
                for role, rows in statistics.rows(batch, found.x, found.slope, missing):
                    if role in sets:
                        sets[role].add(*rows)
        for tensor in itertools.chain(*(each.sums() for each in sets.values())):
            tensor.copy_(total(tensor))
        return _Pass([each.energy.item() for each in sets.values()], list(sets.values()))

    def _collect(self, job: RefitJob) -> "_Pass":
        """Runs all batches through the narrow block, and collects what the consumer's fit needs."""
        (consumer,), device = job.site.consumers, self._stream.device
        statistics, total = self._collector.empty(job.site), self._stream.processes.total
        landed: dict[Role, Drift] = {
            role: Drift(consumer.outputs, consumer.channels, device)
            for role in self._roles
            if role is not Role.HELD_OUT  # is reported with those that are fitted
        }
        energies = torch.zeros(len(self._roles), dtype=torch.float64, device=device)
        everything, judging = range(len(self._stream)), frozenset(self._batches)
        for batch, found, missing, lacking in self._reads(job, None, everything):
            hidden = found.hidden
            assert hidden is not None
            if job.split is not None:  # what the block ends with
                job.split.inputs[batch][..., : consumer.channels] = hidden
            with self._clock("gram"):
                statistics.update(batch, hidden, missing)
                for role, (x, of_target, of_dense) in statistics.rows(
                    batch, hidden, missing, lacking
                ):
                    if role in self._roles:
                        if batch in judging:  # as in the passes for parts
                            energy = of_target.square().sum(dtype=torch.float64)
                            energies[self._roles.index(role)] += energy
                        landed[role if role in landed else Role.TRAIN].update(of_dense, x, None)
        for tensor in itertools.chain(*(drift.parts().values() for drift in landed.values())):
            tensor.copy_(total(tensor))
        return _Pass(total(energies).tolist(), [], statistics, landed)

    def _decided(self, job: RefitJob, seen: "_Pass", first: Decision) -> Decision:
        """Returns the fit of the consumer to what it reads, with the error of the network.

        Args:
            first: the decision before the refit, whose share of drift and error without
                compensation are reported.
        """
        statistics, landed, (consumer,) = seen.statistics, seen.landed, job.site.consumers
        assert statistics is not None
        assert landed is not None
        everything = Selection(range(consumer.channels), consumer.channels)

        def fit(
            sites: Sequence[BoundSite], parts: Sequence[Sequence[SiteStatistics]]
        ) -> Sequence[Decision]:
            (decision,) = self._solver.fitted(sites, parts, [everything], 1.0)
            ((found,), (before,)) = decision.fits, first.fits
            ((of_site,),) = parts
            grams = {
                Role.TRAIN: [of_site.train, of_site.held_out],
                Role.GUARD: [of_site.guard],
            }
            errors: dict[Role, float] = {}
            for role, drift in landed.items():
                normal = [gram.matrix() for gram in grams[role] if gram is not None]
                if normal:
                    weights = consumer.by_channel, found.weight
                    errors[role] = error_of(drift, torch.stack(normal).sum(0), *weights)
            fitted = replace(
                found,
                alpha=before.alpha if math.isinf(found.alpha) else found.alpha,
                error=errors[Role.TRAIN],
                baseline_error=before.baseline_error,
                drift_correction=before.drift_correction,
                guard_error=errors.get(Role.GUARD),
                guard_baseline_error=before.guard_baseline_error,
                guard_share=before.guard_share,
            )
            return [replace(decision, fits=(fitted,), notes=())]

        collected = {job.site: [statistics]}
        ((_, decision),) = self._exchange.decided(collected, fit)
        return decision

    def _narrows(self, site: BoundSite) -> bool:
        return self._widths[site.name].kept < site.channels

    def _key(self, site: BoundSite) -> Any:
        return (type(self._stream.blocks[site.block]), site.kind) if self._trusted else site


@dataclass
class _Pass:
    """The result of a pass over the calibration set.

    `errors`: the squared error of the fitted tokens, then of those held out and of guard text, if
    there are any. `sets`: their moments, for the fit of a part. For that of the consumer
    `statistics`, and `landed`: of what its output lacks of the dense network's, for the report, for
    the calibration and for guard text.
    """

    errors: list[float]
    sets: list[Moments]
    statistics: SiteStatistics | None = None
    landed: dict[Role, Drift] | None = None


class _Trial:
    """New rows of a producer, which stay if they lower the network's error.

    Args:
        part: the rows, old ones so far.
        change: that is added to them.
        errors: of each set before.
        transaction: through which the model is changed.
    """

    def __init__(
        self, part: Part, change: Tensor, errors: Sequence[float], transaction: Transaction
    ):
        self._part, self._change, self._transaction = part, change, transaction
        self._old = part.rows.clone()
        self._errors, self._halvings = errors, 0
        self._write(change)

    def lowers(self, errors: Sequence[float]) -> bool:
        """Returns whether errors of all sets that judge are lower than before.

        The first set, which was fitted, judges only where there is no other.
        """
        pairs = list(zip(errors, self._errors, strict=True))
        return all(now < before for now, before in pairs[1:] or pairs)

    def smaller(self) -> "_Trial | None":
        """Halves the change, or takes it back and returns None."""
        if self._halvings == HALVINGS:
            self._part.rewrite(self._old, self._transaction)
            return None
        self._halvings += 1
        self._write(self._change / 2**self._halvings)
        return self

    def _write(self, change: Tensor) -> None:
        rows = self._old.double() + change
        self._part.rewrite(rows, self._transaction)


def _fitted(stream: Stream) -> tuple[int, ...]:
    """Returns the numbers of the batches to which producers are fitted, and that judge them."""
    share = min(1.0, TOKENS / max(stream.tokens, 1))
    chosen = set(stream.spread(share))
    chosen.update(batch for batch in stream.batches if Role.GUARD in stream.by_role(batch, True))
    return tuple(sorted(chosen))


def refusal(site: BoundSite) -> str:
    """Returns a reason why the producers of a site cannot be refitted; "" for none."""
    if site.group is not None:
        return "its tokens are those that a router chose"
    if len(site.consumers) > 1:
        return "it has several consumers"
    modules = [each.module for each in site.producers] + [each.module for each in site.consumers]
    if any(isinstance(module, MAPS) for module in modules):
        return "its layers are convolutions"
    if site.consumers[0].taps > 1 or not site.consumers[0].reads_all:
        return f"{site.consumers[0].name} reads more than its channels, once each"
    if type(site) is not BoundSite or not all(p.spans() for p in site.producers):
        return f"its {site.kind} are no single channels"
    return ""
