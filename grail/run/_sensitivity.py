"""What the network loses where one site is narrow, and the uneven widths that lose least.

Two things are known of a site: how its own error falls with its width, E(k) in closed form from
its Gram (`grail.select.greedy.errors`), and what the whole network loses when it alone is narrowed
and compensated, L at width k₀, from forward passes over a few batches. To first order a loss that
is quadratic in small errors is proportional to E, so that

    L(k) = L(k₀) · E(k) / E(k₀)

and the widths that lose least in sum, for a given number of parameters, are `budget.least_loss`.
Sites that undo drift make good a part of what those before them lose: with n of them behind it, a
site's loss counts (1 − u)ⁿ.

The loss is the Kullback-Leibler divergence of the dense network's predictions from the narrow
network's, where a model returns logits, else the squared error of its output relative to the
output's. No labels, no gradients.

Measured losses of layers in the place of fixed schedules: as in AMC (He et al., ECCV 2018) and
ZipLM (Kurtic, Frantar, Alistarh, NeurIPS 2023), which search where this divides in closed form.
"""

import functools
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grail import select
from grail.algebra.width import ChannelWidth, check_keep
from grail.arguments import require_batches, require_model, require_number, require_whole
from grail.calibrate.samples import (
    Change,
    Order,
    changed_arguments,
    find_orders,
    first_tensor,
    masks_of,
)
from grail.calibrate.stream import Batch, Stream, model_inputs
from grail.errors import InputError, ModelError
from grail.networks import Architecture, find
from grail.recipe import AnyRecipe, Recipe, Sites, merged
from grail.run import budget, checkpoint
from grail.run.loop import Apart, Run
from grail.runtime import memory
from grail.runtime.clock import Clock
from grail.runtime.processes import refuse_sharded
from grail.runtime.settings import Runtime
from grail.runtime.transaction import Transaction, eval_no_grad
from grail.select import greedy

# One batch in so many shows what the network loses; the others are what sites are fitted to.
PROBES = 16

# A site keeps at least this part of the share that all keep together: losses are known at that
# share, and the proportion with which they grow from there is one of small errors.
LEAST = 0.5

# What a site that corrects drift undoes of the loss of each site before it. On SmolLM2 (30 sites)
# half of the first one's loss is the better estimate; with six or eight sites it hardly matters.
UNDONE = 0.025

# Settings of a recipe that a measurement reads.
READ = ("keep", "sites", "selector", "multiple", "seed", "non_finite")

# Widths between nothing and all that a site may come to.
STEPS = 128

# Numbers of an output that are in fp32 at once: 64 MiB.
ROWS = 1 << 24


# What needs less memory, by phase.
REMEDIES = {
    "forward": memory.REMEDIES["forward"],
    "gram": memory.REMEDIES["gram"],
    "probe": "give smaller batches, or fewer of them as probes",
}


@dataclass(frozen=True)
class Part:
    """Sites that get one width: one, or the experts of a layer.

    `loss`: of the network where they are narrow at `kept` of `channels`; `errors`: [channels + 1]
    fp64, their own squared error by width; `parameters`: of one channel, in all of them; `widths`:
    what they may have.
    """

    names: tuple[str, ...]
    channels: int
    kept: int
    loss: float
    errors: Tensor = field(repr=False)
    parameters: float
    widths: tuple[int, ...] = field(repr=False)

    def loss_at(self, kept: int) -> float:
        """What the network is expected to lose where they are that wide."""
        here = self.errors[self.kept].item()
        return self.loss * self.errors[kept].item() / here if here > 0 else 0.0


@dataclass(frozen=True, repr=False)
class Sensitivity:
    """What a network loses by each of its sites, measured at a share `keep` of all."""

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
        """By name of site, what the network loses where it alone is narrow; experts together."""
        return {name: part.loss for part in self.parts for name in part.names}

    def shares(self, keep: float | None = None, undone: float = UNDONE) -> dict[str, float]:
        """The share of each site, for `grail.compress(…, keep=…)`, that loses least in sum.

        Args:
            keep: the share of the sites' parameters that stays at most; default that of the
                measurement. The further from that, the rougher the estimate.
            undone: u, what each site undoes of the loss of those before it; 0 for runs that
                correct no drift.

        Raises:
            InputError: keep outside (0, 1], or undone outside [0, 1).
        """
        keep = self.keep if keep is None else keep
        check_keep(keep)
        require_number("undone", undone)
        if not 0 <= undone < 1:
            raise InputError(f"undone must be in [0, 1); got {undone:g}")
        losses: list[dict[int, float]] = []
        for behind, part in zip(reversed(range(len(self.parts))), self.parts, strict=True):
            left = (1 - undone) ** behind
            floor = LEAST * keep * part.channels
            losses.append({k: left * part.loss_at(k) for k in part.widths if k >= floor})
        parameters = [part.parameters for part in self.parts]
        # Where no width is narrow enough, the least ones are the nearest.
        least = sum(min(site) * each for site, each in zip(losses, parameters, strict=True))
        least /= sum(part.channels * part.parameters for part in self.parts)
        widths = budget.least_loss(losses, min(1.0, max(keep, least)), parameters)
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
            single channels only: whole heads and groups lose in steps that no curve of channels
            knows. A `grail.compress` may use the same `resume_dir` afterwards.
        batches: as for `grail.compress`; all of them are held at once.
        keep: the share at which each site is tried, in (0, 1), one for all.
        probes: how many of the batches, the first ones, the network's loss is measured on; sites
            are fitted to the others. Default one in sixteen. Of a single batch both are done.

    Raises:
        InputError: sites of heads or groups, keep outside (0, 1), probes that leave no batch or
            hold no token that counts; a resume_dir that holds the state of another measurement.
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
    recipe = Recipe(
        drift_correction=0, closed_loop=False, **{name: getattr(asked, name) for name in READ}
    )
    if asked.keep == 1:
        raise InputError("keep=1 narrows nothing whose loss could be measured")
    architecture = find(model, recipe.sites)
    require_single_channels(architecture, recipe)
    clock = Clock(architecture.device)
    with (
        memory.explain_oom(architecture.device, lambda: clock.failed, False, REMEDIES),
        Transaction() as transaction,
        eval_no_grad(model),
        checkpoint.measuring(runtime.resume_dir, model, recipe, batches, probes) as kept,
    ):
        by_block = _known(kept)
        if len(by_block) < len(architecture.blocks):
            probe = _Probe(model, batches[:probes], clock, architecture.trusted)
            with clock("forward"):
                stream = Stream(model, architecture.blocks, batches[probes:] or batches)
            run = Run(architecture, recipe, stream, transaction, clock)
            for block in run.narrow_each(runtime.progress, len(by_block)):
                by_block.append([_part(apart, run, probe) for apart in block])
                if kept is not None:
                    _keep(by_block, kept)
    parts = [part for block in by_block for part in block]
    if not any(part.loss for part in parts) and any(part.kept < part.channels for part in parts):
        raise ModelError("the network's output does not change, whichever site is narrow")
    return Sensitivity(asked.keep, tuple(parts))


def require_single_channels(architecture: Architecture, recipe: Recipe) -> None:
    """Raises InputError for sites whose loss is not measured."""
    for site in recipe.all_sites(architecture):
        if not isinstance(site.width(1.0, recipe.multiple), ChannelWidth):
            raise InputError(
                f"{site.name} becomes narrower by whole groups of channels, whose loss is not "
                f"measured; narrow {site.kind} in a run with one share for all of them"
            )


def _known(kept: checkpoint.Measurement | None) -> list[list[Part]]:
    """By block, what an earlier call measured."""
    found = kept.read() if kept is not None else None
    if found is None:
        return []
    return [
        [_part_of(part, found.tensors[f"{number}.{place}"]) for place, part in enumerate(block)]
        for number, block in enumerate(found.content["blocks"])
    ]


def _part_of(content: dict[str, Any], errors: Tensor) -> Part:
    lists = {name: tuple(content[name]) for name in ("names", "widths")}
    return Part(**content | lists, errors=errors)


def _keep(by_block: Sequence[Sequence[Part]], kept: checkpoint.Measurement) -> None:
    tensors = {
        f"{number}.{place}": part.errors
        for number, block in enumerate(by_block)
        for place, part in enumerate(block)
    }
    blocks = [
        [{name: value for name, value in vars(part).items() if name != "errors"} for part in block]
        for block in by_block
    ]
    kept.write({"blocks": blocks}, tensors)


def _part(apart: Apart, run: Run, probe: "_Probe") -> Part:
    views, narrow = apart
    site, width = next((site, view.width) for site, view in views.items())
    errors = torch.zeros(width.channels + 1, dtype=torch.float64)
    for view in views.values():
        if view.gram.tokens:  # an expert may never have been asked
            gram = view.gram.matrix().double()
            with run.clock("search"):
                errors += greedy.errors(gram, view.consumer.double().to(gram.device)).cpu()
    widths = {width.channels}
    if width.kept < width.channels:  # else its loss is not known
        for step in range(1, STEPS):
            with suppress(InputError):  # a width of 0
                widths.add(site.width(step / STEPS, run.recipe.multiple).kept)
    one_less = ChannelWidth(width.channels, width.channels - 1)
    parameters = sum(site.parameters_saved(one_less) for site in views)
    narrow()
    return Part(
        names=tuple(site.name for site in views),
        channels=width.channels,
        kept=width.kept,
        loss=probe.loss(),
        errors=errors,
        parameters=parameters,
        widths=tuple(sorted(widths)),
    )


class _Probe:
    """What the dense network answers to a few batches, and how far from that it is later."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch], clock: Clock, known: bool):
        self._model, self._clock = model, clock
        device = next(model.parameters()).device
        with clock("probe"):
            self._inputs = [model_inputs(model, batch, device) for batch in batches]
            self._order = Order() if known else self._order_of_output()
            self._dense = [self._output(*inputs) for inputs in self._inputs]
        if not all(bool(dense.values.isfinite().all()) for dense in self._dense):
            raise ModelError("the dense network's output is not finite")
        if self._dense and not any(dense.values.numel() for dense in self._dense):
            raise InputError("the batches to probe with, the first ones, hold no token that counts")

    def loss(self) -> float:
        """The mean divergence of predictions, or the squared error relative to the output's."""
        found = size = 0.0
        with self._clock("probe"):
            for inputs, dense in zip(self._inputs, self._dense, strict=True):
                for expected, got in zip(dense.rows(), self._output(*inputs).rows(), strict=True):
                    if dense.logits:
                        found += _divergence(expected, got)
                        size += len(expected)
                    else:
                        found += _squares(got.float() - expected.float())
                        size += _squares(expected)
        if not math.isfinite(found):
            raise ModelError("the network's output is not finite where a site is narrow")
        # A divergence of nothing is negative by rounding.
        return max(0.0, found / size) if size else 0.0

    def _order_of_output(self) -> Order:
        """The order of the tokens that the network returns, where a mask needs it."""
        for args, kwargs in self._inputs:
            mask = masks_of(self._model, args, kwargs).of_output
            if mask is None or len(mask) < 2:
                continue
            observe = functools.partial(self._changed_output, args, kwargs)
            first = find_orders(observe, len(mask))["output"]
            if first is None:
                raise ModelError(
                    "which sample each token of the network's output belongs to could not be "
                    "found out by replacing samples along the first axis; give batches without "
                    "padding, and without a mask"
                )
            return Order(first)
        return Order()

    def _changed_output(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], change: Change
    ) -> dict[str, Tensor]:
        names = inspect.signature(self._model.forward).parameters
        args, kwargs = changed_arguments(names, args, kwargs, change)
        return {"output": self._compared(self._model(*args, **kwargs))[0]}

    def _output(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "_Output":
        tensor, classes = self._compared(self._model(*args, **kwargs))
        mask = masks_of(self._model, args, kwargs).of_output
        if mask is not None:
            tensor = self._order.by_sample(tensor, len(mask))
            if mask.shape == tensor.shape[:-1]:
                tensor = tensor[mask]
        return _Output(tensor.reshape(-1, tensor.shape[-1]), classes)

    def _compared(self, output: Any) -> tuple[Tensor, bool]:
        """The tensor of what the network returns that is compared, and whether it is of classes."""
        logits = getattr(output, "logits", None)
        tensor = first_tensor(output if logits is None else logits)
        if tensor is None:
            raise ModelError(f"{type(self._model).__name__} returns no tensor to compare")
        # One class is no prediction, and of maps of classes they are no last axis.
        return tensor, logits is not None and tensor.shape[-1] > 1 and tensor.dim() < 4


@dataclass(frozen=True)
class _Output:
    """[N, D], of samples or of tokens that count; `logits`: whether they are those of classes."""

    values: Tensor
    logits: bool

    def rows(self) -> Sequence[Tensor]:
        """A few at a time, so that little of them is in fp32 at once."""
        return self.values.split(max(1, ROWS // self.values.shape[-1]))


def _divergence(dense: Tensor, narrow: Tensor) -> float:
    """Σ KL(dense ‖ narrow) over rows of logits [N, D], in nats."""
    p, q = (logits.float().log_softmax(-1) for logits in (dense, narrow))
    return F.kl_div(q, p, reduction="sum", log_target=True).item()


def _squares(values: Tensor) -> float:
    return torch.linalg.vector_norm(values, dtype=torch.float64).square().item()
