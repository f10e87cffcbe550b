"""The peak memory of a run, predicted before it starts.

The blocks are rehearsed: the loop of the run itself compresses them on two of its batches, then
everything is taken back. Measured so, by a meter on torch's allocations: activations, statistics,
hidden states that wait, narrowed layers. Two steps would take as long as in the run. They are left
out: the search of a selector (`peak_bytes` of its registration) and the fit (`grail.algebra._fit`).
Each adds the peak that it states next to its own code to the memory in use when it starts.

Blocks of the same shapes are rehearsed once, the widest after narrowing. What waits grows with the
number of tokens, narrowed layers with the number of blocks.

Not counted: scratch memory inside of one operation on a CPU (see `grail.runtime.memory.Meter`); on
a GPU, what more tokens wait for a Gram in the run than two batches have.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from grail import select
from grail.algebra._fit import Fit, FitSite, batch_bytes
from grail.algebra.reduction import Folding
from grail.algebra.width import ChannelWidth
from grail.calibrate.hidden_states import created_hidden_states
from grail.calibrate.stream import Role, Stream
from grail.errors import GrailError
from grail.networks import Architecture
from grail.recipe import Recipe
from grail.run.block import BlockCompressor
from grail.run.blocks import Blocks
from grail.runtime import memory
from grail.runtime.clock import Clock
from grail.runtime.onload import Onloader, largest_block
from grail.runtime.transaction import Transaction
from grail.statistics.collector import ignore
from grail.statistics.site_statistics import SiteStatistics

Parts = dict[str, int]

# Share of a GPU's free memory that a run may be predicted to take with its hidden states there: the
# prediction is good to a tenth, and an allocator's memory comes in pieces.
GPU_SHARE = 0.8


@dataclass(frozen=True)
class _Stage:
    """Bytes during the blocks of one shape.

    `waiting`: hidden states. `inputs`: those among them that are inputs of consumers, kept so that
    blocks need not run again. `narrowed`: layers of the other blocks that are narrow by the last of
    them. In addition, `held`: the most in use when a site is decided; `peak`: at any time.
    """

    waiting: int
    inputs: int
    narrowed: int
    held: int
    peak: int


@dataclass(frozen=True)
class PeakMemory:
    """The bytes that a run adds where its blocks run.

    `blocks`: those of two blocks, the largest, where blocks are brought from the host.
    """

    blocks: int
    _stages: tuple[_Stage, ...]

    def parts(self, hidden_states: bool, inputs: bool = True) -> Parts:
        """Returns the peak by part; the parts add up to it.

        Args:
            hidden_states: whether they wait where the blocks run.
            inputs: whether inputs of consumers are kept among them (`Stream.keeps_inputs`).

        "hidden states"   of all batches, with what is kept of them within a block
        "blocks"          see `blocks`
        "weights"         the narrowed layers of other blocks, kept beside the dense weights until
                          the run succeeds (for rollback)
        "statistics"      the most that a block holds when a site is decided
        "working set"     the rest: activations, a search or a fit
        """

        def waiting(stage: _Stage) -> int:
            return (stage.waiting - stage.inputs * (not inputs)) * hidden_states

        stage = max(self._stages, key=lambda stage: waiting(stage) + stage.narrowed + stage.peak)
        return {
            "hidden states": waiting(stage),
            "blocks": self.blocks,
            "weights": stage.narrowed,
            "statistics": stage.held,
            "working set": stage.peak - stage.held,
        }

    def total(self, hidden_states: bool, inputs: bool = True) -> int:
        """Returns the peak; the arguments are those of `parts`."""
        return sum(self.parts(hidden_states, inputs).values())


def predict(
    architecture: Architecture,
    recipe: Recipe,
    stream: Stream,
    clock: Clock,
    *,
    onloads: bool = False,
    growth: float = 1.0,
    known: Callable[[Any], list[SiteStatistics]] | None = None,
) -> PeakMemory | None:
    """Rehearses a run and returns its peak; None where the rehearsal is refused.

    Args:
        architecture: dense, in evaluation mode; it is as it was afterwards.
        stream: calibration batches at the entry of the first block; not changed.
        clock: counts the rehearsal among its phases.
        onloads: whether blocks are brought to the device of the stream one at a time.
        growth: the run's tokens relative to those of `stream`.
        known: see `grail.run.blocks.Blocks`.
    """
    try:
        return _Rehearsal(architecture, recipe, stream, clock, onloads).predict(growth, known)
    except GrailError:  # the run itself meets it again, and reports it
        return None


def waiting_place(
    predicted: PeakMemory | None, device: torch.device, held: int
) -> tuple[torch.device, bool]:
    """Returns the device where hidden states wait, and whether inputs of consumers wait there, too.

    It is the model's GPU if the run fits there as well; else, or without a prediction, the host. A
    run copies them eight times a block; from pageable host memory that takes longer than an H100
    takes for the block.

    Args:
        held: bytes of what is predicted that are on the device already.
    """
    host = torch.device("cpu")
    if device.type != "cuda" or predicted is None:
        return host, device == host
    room = GPU_SHARE * memory.free(device) + held
    keeps_inputs, fits = (predicted.total(True, inputs) <= room for inputs in (True, False))
    return device if fits else host, keeps_inputs


class _Rehearsal:
    """Runs the loop over blocks without search and fit, and records the memory in use."""

    def __init__(
        self,
        architecture: Architecture,
        recipe: Recipe,
        stream: Stream,
        clock: Clock,
        onloads: bool,
    ):
        self._architecture, self._recipe, self._clock = architecture, recipe, clock
        self._whole, self._meter = stream, memory.Meter(stream.device)
        self._brought_to = stream.device if onloads else None
        self._waits_here = stream.storage.type == stream.device.type
        widths = recipe.widths(architecture)
        blocks = [recipe.active(sites, widths) for sites in recipe.sites_of(architecture)]
        self._held = self._due = self._waiting = self._highest = 0
        self._grown = 0.0  # what waits in the run, as `_waiting` in the rehearsal
        self._compressor: BlockCompressor | None = None
        # Of the weights of a block, all are new where they are quantised.
        least = int(recipe.quantize is not None)
        self._kept = [sum(widths[site.name].kept for site in sites) or least for sites in blocks]

    def predict(
        self, growth: float, known: Callable[[Any], list[SiteStatistics]] | None
    ) -> PeakMemory:
        """Returns the peak of the run; see the function of this name."""
        entry = growth * sum(hidden.nbytes for hidden in self._whole.hidden)
        if not any(self._kept):  # such a run ends at once
            return PeakMemory(0, (_Stage(int(entry), 0, 0, 0, 0),))
        with ExitStack() as stack:
            self._created = stack.enter_context(created_hidden_states())
            stack.enter_context(self._meter)
            with self._clock("forward"):  # what smaller batches make smaller
                stream = self._whole.part(_sample(self._whole)) if len(self._whole) else self._whole
            own = sum(hidden.nbytes for hidden in stream.hidden)
            self._growth = entry / own if own else 0.0
            self._dense_growth = _share_held(self._whole, self._recipe.dense_share)
            transaction = stack.enter_context(Transaction())
            stack.callback(transaction.undo)
            recipe = dataclasses.replace(self._recipe, selector=_Search(self, self._recipe))
            blocks = Blocks(self._architecture, recipe, stream, self._clock, known=known)
            # A block may be rehearsed for others, which have drift, and a batch likewise.
            blocks.first_active, blocks.dense_share = -1, 1.0
            blocks.learn_orders()
            compressor = BlockCompressor(blocks, transaction, self._fit_each)
            self._compressor = compressor
            # Else a cycle would keep its hidden states.
            stack.callback(setattr, self, "_compressor", None)
            stages = self._stages(compressor, transaction)
            # The rehearsal's own peak, which is higher only where a run has few batches.
            stages.append(_Stage(int(entry), 0, 0, 0, self._highest))
        largest = 2 * largest_block(self._architecture.blocks) if self._brought_to else 0
        return PeakMemory(largest, tuple(stages))

    def _stages(self, compressor: BlockCompressor, transaction: Transaction) -> list[_Stage]:
        """Rehearses one block of each shape, in order."""
        blocks, stream = self._architecture.blocks, compressor.blocks.stream
        forms = [_form(block) for block in blocks]
        narrowed = [0.0] * len(blocks)
        rehearsed: dict[Any, _Stage] = {}
        last: dict[Any, int] = {}
        same: dict[Any, bool] = {}
        for number, form in enumerate(forms):
            shapes = tuple(hidden.shape for hidden in stream.hidden)
            key = form, shapes
            if key not in rehearsed:
                alike = [n for n in range(len(blocks)) if forms[n] == form]
                widest = max(alike, key=lambda n: (self._kept[n], 0 < n < len(blocks) - 1))
                rehearsed[key], own = self._rehearse(compressor, transaction, widest)
                same[key] = shapes == tuple(hidden.shape for hidden in stream.hidden)
                for n in alike:
                    narrowed[n] = own * self._kept[n] / max(1, self._kept[widest])
            elif not same[key]:
                with Onloader(blocks[: number + 1], self._brought_to)(number):
                    for batch in range(len(stream)):
                        stream.store(batch, stream.run(number, batch))
            last[key] = number
        if self._brought_to:  # what is narrow is on the host again
            narrowed = [0.0] * len(blocks)
        return [
            dataclasses.replace(stage, narrowed=int(sum(narrowed[: last[key]])) if last[key] else 0)
            for key, stage in rehearsed.items()
        ]

    def _rehearse(
        self, compressor: BlockCompressor, transaction: Transaction, number: int
    ) -> tuple[_Stage, int]:
        """Compresses one block; returns its bytes, and those of its narrowed layers."""
        brought = Onloader(self._architecture.blocks[: number + 1], self._brought_to)
        with brought(number):
            before = self._in_use()
            self._meter.restart()
            self._held = self._due = self._waiting = 0
            self._grown = 0.0
            compressor.compress(number, ignore)
            highest, after = self._meter.peak, self._in_use()
            transaction.undo()
            narrowed = after - self._in_use()  # not what stays, scratch that the next block uses
        self._highest = max(self._highest, highest)
        peak = max(highest - self._waiting * self._waits_here, self._due)
        inputs = int(compressor.input_bytes * self._growth)
        return _Stage(int(self._grown), inputs, 0, self._held - before, peak - before), narrowed

    def _fit_each(self, sites: Sequence[FitSite], *, fit_bias: bool, **_: Any) -> list[Fit]:
        """Returns plain fits instead of `fit_each`, and records what that would take.

        Of the tokens of two batches an expert may get too few, of those of the run enough.
        """
        for site in sites:
            for each in site.grams:
                each.parts()  # adds the tokens that wait on a GPU, as a fit does first
        alike = {
            "compensate": self._recipe.compensate,
            "held_out": self._recipe.holds_out and self._whole.holds_out,
            "fit_bias": fit_bias,
            "guard": Role.GUARD in self._whole.others,
        }
        if sites:
            self._record(batch_bytes(sites, **alike))
        return [self._plain_fit(site, fit_bias) for site in sites]

    def _plain_fit(self, site: FitSite, fit_bias: bool) -> Fit:
        (weight,) = site.weights
        shift = weight.new_zeros(len(weight), dtype=torch.float64)
        plain = site.reduction.absorb(weight)
        return Fit((plain,), math.nan, math.nan, 1.0, 1.0, 0.0, 0, (shift,) if fit_bias else None)

    def _record(self, due: int) -> None:
        """Notes what is in use, and would be at the peak of what is due."""
        held = self._in_use()
        self._held, self._due = max(self._held, held), max(self._due, held + due)

    def _in_use(self) -> int:
        """Returns the bytes in use without hidden states; notes the most of those."""
        waiting = sum(states.nbytes for states in self._created)
        self._waiting = max(self._waiting, waiting)
        dense = None if self._compressor is None else self._compressor.dense
        of_dense = 0 if dense is None else sum(states.nbytes for states in dense.held)
        grown = self._growth * (waiting + (self._dense_growth - 1) * of_dense)
        self._grown = max(self._grown, grown)
        return self._meter.use - waiting * self._waits_here


class _Search:
    """A selector that searches for nothing, and records what the recipe's own would take."""

    def __init__(self, rehearsal: "_Rehearsal", recipe: Recipe):
        self._record, self._selector = rehearsal._record, select.get(recipe.selector)
        self._known = isinstance(recipe.selector, str)
        self.needs_gradient = recipe.needs_gradient
        self.folds = getattr(self._selector, "folds", False)

    def __call__(self, view: select.View) -> Any:
        peak = getattr(self._selector, "peak_bytes", None)
        if peak is None and self._known:
            return self._selector(view)
        view.gram.parts()  # adds the tokens that wait on a GPU, as a search does first
        self._record(0 if peak is None else peak(view))
        channels, kept = view.width.channels, view.width.kept
        if self.folds and isinstance(view.width, ChannelWidth):
            return Folding([channel % kept for channel in range(channels)])
        return torch.arange(channels, 0, -1, dtype=torch.float32)


def _sample(stream: Stream) -> list[int]:
    """Returns the largest batch, and before it one for each role that it lacks, by number.

    So the last pass finds all statistics in use.
    """
    sizes = [hidden.nbytes for hidden in stream.hidden]
    largest = sizes.index(max(sizes))
    first: dict[Role, int] = {}
    for batch in range(len(sizes)):
        for role in stream.by_role(batch, holds_out=True):
            first.setdefault(role, batch)
    found = stream.by_role(largest, holds_out=True)
    others = [batch for role, batch in first.items() if role not in found]
    return [*(others or [largest]), largest]


def _share_held(stream: Stream, share: float) -> float:
    """Returns the share of a stream's bytes that a fork for a share of the batches holds."""
    sizes = [hidden.nbytes for hidden in stream.hidden]
    if share == 1 or not sizes:
        return 1.0
    return sum(sizes[batch] for batch in stream.spread(share)) / sum(sizes)


def _form(block: nn.Module) -> tuple[Any, ...]:
    """Returns the shapes and dtypes of a block's parameters."""
    return type(block), tuple((name, p.shape, p.dtype) for name, p in block.named_parameters())
