"""The loss of the network for each narrow site, and the uneven widths with the least total loss.

For each site there are two measurements. The first is its own error by width, E(k), in closed form
from its Gram (`grail.select.greedy.errors`; of attention heads, at their few widths,
`grail.select.elimination.errors_of_heads`). The second is the network's loss L at width k₀ while
only that site is narrow and compensated, from forward passes over a few batches (see
`grail.run.network_loss`). To first order a loss that is quadratic in small errors is proportional
to E, so

    L(k) = L(k₀) · E(k) / E(k₀)

and the widths of the least total loss, for a given number of parameters in sites of all kinds, are
`budget.least_loss`. Sites that correct drift recover a part u of the loss of those before them:
with n of them after it, the loss of a site counts (1 − u)ⁿ.

Measured losses of layers instead of fixed schedules: as in AMC (He et al., ECCV 2018) and ZipLM
(Kurtic, Frantar, Alistarh, NeurIPS 2023), which search where this divides in closed form.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from grail import select
from grail.algebra.width import GroupWidth, HeadWidth, Width, check_keep
from grail.arguments import require_batches, require_model, require_number, require_whole
from grail.calibrate.batches import Batch
from grail.calibrate.stream import Stream
from grail.errors import InputError, ModelError
from grail.networks import Architecture, BoundSite, find, grouped
from grail.recipe import AnyRecipe, Recipe, Sites, merged
from grail.run import resume_folder
from grail.run.block import BlockCompressor
from grail.run.blocks import Blocks
from grail.run.budget import least_loss
from grail.run.fingerprint import HashedBatches, run_fingerprint, with_calibration
from grail.run.measurement import Measurement
from grail.run.narrower import BlockReport
from grail.run.network_loss import NetworkLoss
from grail.runtime import memory
from grail.runtime.clock import Clock
from grail.runtime.processes import Processes, refuse_sharded
from grail.runtime.settings import Runtime
from grail.runtime.transaction import Transaction, eval_no_grad
from grail.select import View, greedy
from grail.select.elimination import errors_of_heads
from grail.statistics.collector import Advance, ignore
from grail.statistics.site_statistics import SiteStatistics

# The network's loss is measured on one batch in so many; sites are fitted to the others.
PROBES = 16

# A site keeps at least this part of the share of all sites together. Losses are measured at that
# share; the proportion by which they grow from there is valid for small errors only.
SMALLEST_SHARE = 0.5

# The part of the loss of each site before it that a site with drift correction recovers. On SmolLM2
# (30 sites) half of the first site's loss is the better estimate; with six or eight sites it hardly
# matters.
UNDONE = 0.025

# Settings of a recipe that a measurement reads.
READ = ("keep", "sites", "selector", "multiple", "seed", "non_finite")

# Widths between 0 and all channels that a site may get.
STEPS = 128

# How to need less memory, by phase.
REMEDIES = {
    "forward": memory.REMEDIES["forward"],
    "gram": memory.REMEDIES["gram"],
    "probe": "give smaller batches, or fewer of them as probes",
}


@dataclass(frozen=True)
class Part:
    """Sites that get one width: one, or the experts of a layer.

    `loss`: the network's, while they keep `kept` of `channels`. `widths`: those that they may get,
    in ascending order. At each of these, `errors` [widths] fp64: their own squared error, and
    `parameters`: how many they have, all together.
    """

    names: tuple[str, ...]
    channels: int
    kept: int
    loss: float
    widths: tuple[int, ...] = field(repr=False)
    errors: Tensor = field(repr=False)
    parameters: tuple[int, ...] = field(repr=False)

    def loss_at(self, kept: int) -> float:
        """Returns the network's expected loss at one of the widths."""
        here, there = (self.errors[self.widths.index(width)].item() for width in (self.kept, kept))
        return self.loss * there / here if here > 0 else 0.0


@dataclass(frozen=True, repr=False)
class Sensitivity:
    """The network's loss for each of its sites, measured at a share `keep` of their channels."""

    keep: float
    parts: tuple[Part, ...]

    def __repr__(self) -> str:
        losses = self.losses
        span = (
            f", losses {min(losses.values()):.3g} to {max(losses.values()):.3g}" if losses else ""
        )
        return f"Sensitivity(keep {self.keep:g}, {len(losses)} sites{span})"

    @property
    def losses(self) -> dict[str, float]:
        """By name of site, the network's loss while it alone is narrow; experts are together."""
        return {name: part.loss for part in self.parts for name in part.names}

    def shares(self, keep: float | None = None, undone: float = UNDONE) -> dict[str, float]:
        """Returns the shares of the least total loss, for `grail.compress(…, keep=…)`.

        Args:
            keep: the share of the sites' parameters that stays at most; default that of the
                measurement. The further from that, the rougher the estimate.
            undone: u, the part of the loss of the sites before it that each site recovers; 0 for
                runs that correct no drift.

        Raises:
            InputError: keep outside (0, 1], or undone outside [0, 1).
        """
        keep = self.keep if keep is None else keep
        check_keep(keep)
        require_number("undone", undone)
        if not 0 <= undone < 1:
            raise InputError(f"undone must be in [0, 1); got {undone:g}")
        losses: list[dict[int, float]] = []
        parameters: list[dict[int, float]] = []
        for after, part in zip(reversed(range(len(self.parts))), self.parts, strict=True):
            left = (1 - undone) ** after
            floor = SMALLEST_SHARE * keep * part.channels
            costs = zip(part.widths, part.parameters, strict=True)
            parameters.append({k: cost for k, cost in costs if k >= floor})
            losses.append({k: left * part.loss_at(k) for k in parameters[-1]})
        # If no width is narrow enough, the smallest ones are the nearest.
        least = sum(min(site.values()) for site in parameters)
        least /= sum(part.parameters[-1] for part in self.parts)
        widths = least_loss(losses, min(1.0, max(keep, least)), parameters)
        return {
            name: width / part.channels
            for part, width in zip(self.parts, widths, strict=True)
            for name in part.names
        }


@torch.inference_mode(False)  # what is made in it could never be trained
def sensitivity(
    model: nn.Module,
    batches: Iterable[Batch],
    keep: float | None = None,
    sites: Sites = None,
    selector: str | select.Selector | None = None,
    *,
    probes: int | None = None,
    guard: Iterable[Batch] | None = None,
    recipe: AnyRecipe = "default",
    runtime: Runtime | None = None,
    **overrides: Any,
) -> Sensitivity:
    """Narrows each site alone, compensated, and measures what that does to the network's output.

    Costs one pass over the dense network with its Grams, a search to full width and the solves of a
    run, and for each site a forward pass over `probes` batches, whose dense outputs are held. The
    model ends as it was.

    Args:
        model, sites, selector, recipe, runtime, overrides: see `grail.compress`. Of the recipe
            `keep`, `sites`, `selector`, `multiple`, `seed` and `non_finite` are read. Sites of
            several kinds, such as ("mlp", "heads"), share one budget. Not grouped convolutions. A
            `grail.compress` may use the same `resume_dir` afterwards.
        batches: as for `grail.compress`; all of them are held at once.
        keep: the share at which each site is tried, in (0, 1), one for all.
        probes: the number of batches, the first ones, on which the network's loss is measured;
            sites are fitted to the others. Default one in sixteen. Of a single batch both are done.
        guard: batches of a second kind of text. The loss is then the mean of that on the probes and
            that on as many of these, so that widths suit both texts; no site is fitted to them.

    Raises:
        InputError: sites of grouped convolutions, keep outside (0, 1), probes that leave no batch
            or hold no token that counts, guard without a batch; a resume_dir that holds the state
            of another measurement.
        ModelError: outputs that are not finite, of no known kind, or that no site changes.
        StateError: a resume_dir whose state is damaged, or that cannot be written.
        EmptyCalibrationError, NonFiniteError, SolveError, OutOfMemoryError: as `grail.compress`.
    """
    require_model(model)
    require_batches(batches)
    asked, runtime = merged(
        recipe, runtime, overrides, reads=READ, keep=keep, sites=sites, selector=selector
    )
    if isinstance(asked.keep, Mapping):
        raise InputError(f"keep must be one share for all sites; got {asked.keep!r}")
    refuse_sharded(model)
    batches = list(batches)
    probes = max(1, len(batches) // PROBES) if probes is None else probes
    require_whole("probes", probes, 0)
    if not 0 < probes < max(len(batches), 2):
        raise InputError(f"probes must be some of {len(batches)} batches, not all; got {probes}")
    probed = _probes_of_guard(guard, probes)
    recipe = Recipe(
        drift_correction=0, closed_loop=False, **{name: getattr(asked, name) for name in READ}
    )
    if asked.keep == 1:
        raise InputError("keep=1 narrows nothing whose loss could be measured")
    architecture = find(model, recipe.sites)
    require_measurable(architecture, recipe)
    clock = Clock(architecture.device)
    with (
        memory.explain_oom(architecture.device, lambda: clock.failed, False, REMEDIES),
        Transaction() as transaction,
        eval_no_grad(model),
        resume_folder.opened(runtime.resume_dir, recipe, Processes()) as folder,
    ):
        measurement = None
        if folder is not None:
            measurement = Measurement(folder, _fingerprint(model, recipe, batches, probes, probed))
        by_block = _read(measurement)
        if len(by_block) < len(architecture.blocks):
            texts = [text for text in (batches[:probes], probed) if text]
            losses = [NetworkLoss(model, text, clock, architecture.trusted) for text in texts]
            with clock("forward"):
                stream = Stream(model, architecture.blocks, batches[probes:] or batches)
            compressor = BlockCompressor(Blocks(architecture, recipe, stream, clock), transaction)
            measure = _Measure(compressor, transaction, losses)
            for parts_of_block in measure.blocks(len(by_block), runtime.progress):
                by_block.append(parts_of_block)
                if measurement is not None:
                    _write(by_block, measurement)
    parts = [part for block in by_block for part in block]
    if not any(part.loss for part in parts) and any(part.kept < part.channels for part in parts):
        raise ModelError("the network's output does not change, whichever site is narrow")
    return Sensitivity(asked.keep, tuple(parts))


def require_measurable(architecture: Architecture, recipe: Recipe) -> None:
    """Raises InputError for sites whose loss is not measured."""
    for site in recipe.all_sites(architecture):
        if isinstance(site.width(1.0, recipe.multiple), GroupWidth):
            raise InputError(
                f"{site.name} keeps equally many channels of each group of a convolution, and what "
                f"that loses by width is not measured; narrow {site.kind} in a run with one share "
                "for all of them"
            )


def _probes_of_guard(guard: Iterable[Batch] | None, probes: int) -> list[Batch]:
    """Returns the batches of guard text on which losses are measured; none without such text."""
    if guard is None:
        return []
    require_batches(guard)
    found = list(islice(guard, probes))
    if not found:
        raise InputError("guard holds no batch to measure losses on; give some, or leave it out")
    return found


class _Measure:
    """Narrows each site alone and measures the network's loss, the mean of that on each text."""

    def __init__(
        self,
        compressor: BlockCompressor,
        transaction: Transaction,
        losses: Sequence[NetworkLoss],
    ):
        self._blocks, self._compressor = compressor.blocks, compressor
        self._transaction, self._losses = transaction, losses

    def blocks(self, done: int, progress: bool) -> Iterator[list[Part]]:
        """Yields the parts of each block after the first `done`, and moves past those."""
        blocks = self._blocks
        blocks.learn_orders()
        with blocks.progress(len(blocks), progress, "sensitivity of block") as bar:
            if done:
                bar.say(f"resumed after block {done} of {len(blocks)}")
            for block in range(len(blocks)):
                bar.start(block, 1)
                if block < done:
                    self._pass(block, bar.advance)
                else:
                    yield self._block(block, bar.advance)

    def _pass(self, block: int, advance: Advance) -> None:
        """Moves past a block that was measured before, and rounds as it did then.

        Experts that are watched run one by one.
        """
        with ExitStack() as hooks:
            for site in self._blocks.sites[block]:
                for consumer in site.consumers:
                    hooks.enter_context(consumer.watch(ignore))
            self._blocks.collector.collect(block, [], {}, advance, finish=True)

    def _block(self, block: int, advance: Advance) -> list[Part]:
        blocks, sites = self._blocks, self._blocks.sites[block]
        gradients = blocks.gradients(sites)
        finish = blocks.has_next(block)
        collected = blocks.collector.collect(block, sites, {}, advance, finish)
        parts = []
        for step in grouped(sites):
            of_step = {site: collected[site] for site in step}
            part = self._part(of_step)
            self._compressor.narrow(of_step, gradients, {}, BlockReport())
            loss = sum(of_text.measure() for of_text in self._losses) / len(self._losses)
            parts.append(replace(part, loss=loss))
            self._transaction.undo()
        return parts

    def _part(self, step: Mapping[BoundSite, Sequence[SiteStatistics]]) -> Part:
        """Returns the part of sites that are narrowed together, without its loss."""
        site = next(iter(step))
        width = self._blocks.widths[site.name]
        widths = {width.kept: width}
        if width.kept < width.channels:  # else its loss is not known
            for number in range(1, STEPS + 1):
                with suppress(InputError):  # a width of 0
                    found = site.width(number / STEPS, self._blocks.recipe.multiple)
                    widths[found.kept] = found
        allowed = [widths[kept] for kept in sorted(widths)]
        errors = torch.zeros(len(allowed), dtype=torch.float64)
        for member, statistics in step.items():
            view = self._compressor.solver.view(member, statistics, None)
            if view.gram.tokens:  # an expert may have no token
                with self._blocks.clock("search"):
                    errors += _errors(view, allowed)
        everything = sum(member.parameters_saved(_nothing(width)) for member in step)
        saved = (sum(member.parameters_saved(each) for member in step) for each in allowed)
        return Part(
            names=tuple(member.name for member in step),
            channels=width.channels,
            kept=width.kept,
            loss=math.nan,
            widths=tuple(each.kept for each in allowed),
            errors=errors,
            parameters=tuple(everything - each for each in saved),
        )


def _errors(view: View, widths: Sequence[Width]) -> Tensor:
    """Returns the squared error [widths] fp64 of a site that keeps what greedy selects."""
    heads = [width for width in widths if isinstance(width, HeadWidth)]
    if heads:
        return torch.tensor(errors_of_heads(view, heads), dtype=torch.float64)
    gram = view.gram.matrix().double()
    by_width = greedy.errors(gram, view.consumer.double().to(gram.device)).cpu()
    return by_width[[width.kept for width in widths]]


def _nothing(width: Width) -> Width:
    """Returns the width at which no channel stays."""
    if isinstance(width, HeadWidth):
        return replace(width, kept_groups=0, kept_queries=0)
    return replace(width, kept=0)


def _fingerprint(
    model: nn.Module,
    recipe: Recipe,
    batches: Sequence[Batch],
    probes: int,
    guard: Sequence[Batch],
) -> dict[str, str]:
    calibration, of_guard = HashedBatches(batches), HashedBatches(guard)
    for _ in chain(calibration, of_guard):
        pass
    others = {"guard text": of_guard} if guard else {}
    run = {**run_fingerprint(model, recipe), "probes": str(probes)}
    return with_calibration(run, calibration, others)


def _read(measurement: Measurement | None) -> list[list[Part]]:
    """Returns the parts by block that an earlier call measured."""
    found = measurement.read() if measurement is not None else None
    if found is None:
        return []
    return [
        [_part_of(part, found.tensors[f"{number}.{place}"]) for place, part in enumerate(block)]
        for number, block in enumerate(found.content["blocks"])
    ]


def _part_of(content: dict[str, Any], errors: Tensor) -> Part:
    lists = {name: tuple(content[name]) for name in ("names", "widths", "parameters")}
    return Part(**content | lists, errors=errors)


def _write(by_block: Sequence[Sequence[Part]], measurement: Measurement) -> None:
    tensors = {
        f"{number}.{place}": part.errors
        for number, block in enumerate(by_block)
        for place, part in enumerate(block)
    }
    blocks = [
        [{name: value for name, value in vars(part).items() if name != "errors"} for part in block]
        for block in by_block
    ]
    measurement.write({"blocks": blocks}, tensors)
