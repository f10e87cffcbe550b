"""The loop over blocks: calibrate → select → solve → absorb.

Closed loop: a block's Grams are collected with its inputs coming from the already compressed blocks
before it, and the Gram of its MLP after its own heads were narrowed. Open loop: all Grams of a
block come from one pass of the dense model. One block's statistics live at a time.

Where drift is to be corrected, the dense network's stream goes along: a block's dense output is
taken before anything in it is narrowed (see `grail.drift`).
"""

import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch import Tensor, nn
from tqdm import tqdm

from grail import select
from grail.errors import InputError
from grail.fit import Fit, fit
from grail.gram import Gram
from grail.options import ALPHA, Options
from grail.reduction import Reduction, Selection
from grail.report import SiteReport
from grail.sites import Architecture, Site
from grail.statistics import Statistics
from grail.stream import Memo, Shelf, Stop, Stream
from grail.transaction import Transaction

Advance = Callable[[int], object]  # hears of so many tokens done


class Clock:
    """Wall seconds by phase: `with clock("gram")`. An inner phase stops the one around it."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stack: list[str] = []
        self._since = 0.0
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._settle()
        self._stack.append(phase)
        try:
            yield
        finally:
            self._settle()
            self._stack.pop()

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._stack:
            phase = self._stack[-1]
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now


class Run:
    """One compression under way.

    Args:
        architecture, options: what to narrow, and how.
        stream: the calibration set at the entry of the first block; moved along by each block.
        transaction: through which the model is changed.
        clock: phases "forward" (blocks, without the statistics), "gram", "select", "solve",
            "absorb".
    """

    def __init__(
        self,
        architecture: Architecture,
        options: Options,
        stream: Stream,
        transaction: Transaction,
        clock: Clock,
    ):
        self.architecture, self.options, self.stream = architecture, options, stream
        self.transaction, self.clock = transaction, clock
        self.widths = options.widths(architecture)
        self._dense = stream.fork() if options.follows_drift else None
        self._memo = Memo((), stream)
        self._dense_after: dict[str, Shelf] = {}  # by kind of site
        self._select = select.get(options.selector)

    def all_blocks(self, progress: bool) -> list[SiteReport]:
        """Compresses every block in order; returns a row for each site."""
        blocks = self.architecture.sites(self.options.sites)
        active = self.options.active(blocks[0], self.widths)
        if not active:
            return [self._untouched(site) for sites in blocks for site in sites]
        passes = 1 + (len(active) if self.options.closed_loop else 0)
        passes += self._dense is not None
        total = self.stream.tokens * passes * len(blocks)
        rows: list[SiteReport] = []
        with tqdm(total=total, unit="tok", unit_scale=True, disable=not progress) as bar:
            for number, sites in enumerate(blocks):
                bar.set_description(f"block {number + 1}/{len(blocks)}")
                rows += self.block(sites, bar.update)
        return rows

    def block(self, sites: Sequence[Site], advance: Advance) -> list[SiteReport]:
        """Compresses one block and moves the stream past it; `advance` hears of tokens done."""
        run = self._closed if self.options.closed_loop else self._open
        rows = {site.kind: self._untouched(site) for site in sites}
        if active := self.options.active(sites, self.widths):
            rows |= {row.kind: row for row in run(active, advance)}
        return list(rows.values())

    def _closed(self, sites: Sequence[Site], advance: Advance) -> Iterator[SiteReport]:
        if self._dense is not None:
            self._follow_dense(self._dense, sites, advance)
        for site in sites:
            statistics = self._statistics(site)
            # The block is finished from the last site on: what ran before it need not run again.
            upstream = site.upstream if site is sites[-1] else ()
            self._memo = Memo(upstream, self.stream, self._memo.shelves)
            with self._memo.recording():
                self._pass(site.block, {site: statistics}, advance, finish=False)
            yield self._compress(site, statistics)
        with self._memo.replaying():
            self._pass(sites[0].block, {}, advance, finish=True)

    def _open(self, sites: Sequence[Site], advance: Advance) -> Iterator[SiteReport]:
        collected = {site: self._statistics(site) for site in sites}
        self._pass(sites[0].block, collected, advance, finish=True)
        for site, statistics in collected.items():
            yield self._compress(site, statistics)

    def _statistics(self, site: Site) -> Statistics:
        return Statistics(site, self.stream, self.options.holds_out)

    def _follow_dense(self, dense: Stream, sites: Sequence[Site], advance: Advance) -> None:
        """Moves the dense stream past a block; keeps what it held after each site."""
        batch = 0

        def keeping(shelf: Shelf) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda _, args: shelf.put(batch, args[0])

        with ExitStack() as hooks, self.clock("forward"):
            for site in sites:
                if site.after is None:
                    self._dense_after[site.kind] = dense.hidden
                    continue
                shelf = self._dense_after.setdefault(site.kind, Shelf(dense.storage))
                hooks.callback(site.after.register_forward_pre_hook(keeping(shelf)).remove)
            for batch in range(len(dense)):
                dense.store(batch, dense.run(sites[0].block, batch))
                advance(dense.tokens_of(batch))

    def _pass(
        self, block: int, collected: dict[Site, Statistics], advance: Advance, finish: bool
    ) -> None:
        """Runs every batch through a block, feeding the statistics.

        With `finish` the stream moves to the block's output; without, a batch ends where the only
        site has been seen.
        """
        batch = 0
        inputs: dict[Site, Tensor] = {}

        def feed(site: Site, after: Tensor | None) -> None:
            with self.clock("gram"):
                drift = None
                if after is not None:
                    drift = (
                        self._dense_after[site.kind][batch].to(after.device, torch.float32) - after
                    )
                collected[site].update(batch, inputs.pop(site), drift)

        def reading(site: Site) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                inputs[site] = args[0]
                if self._dense is None:
                    feed(site, None)
                    if not finish:
                        raise Stop

            return hook

        def landing(site: Site) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                feed(site, args[0])
                raise Stop

            return hook

        with ExitStack() as hooks, self.clock("forward"):
            for site in collected:
                hooks.callback(site.consumer.register_forward_pre_hook(reading(site)).remove)
                if self._dense is not None and site.after is not None:
                    hooks.callback(site.after.register_forward_pre_hook(landing(site)).remove)
            for batch in range(len(self.stream)):
                with suppress(Stop):
                    output = self.stream.run(block, batch)
                    for site in list(inputs):
                        feed(site, output)
                    if finish:
                        self.stream.store(batch, output)
                advance(self.stream.tokens_of(batch))

    def _compress(self, site: Site, statistics: Statistics) -> SiteReport:
        width, channels = self.widths[site.kind], site.channels
        alpha, correction = self.options.alpha, self.options.drift_correction
        if statistics.held_out is None:  # nothing to choose by
            alpha = ALPHA if alpha == "auto" else alpha
            correction = 0.0 if correction == "auto" else correction
        with self.clock("select"):
            reduction = self._reduction(site, statistics.train)
        with self.clock("solve"):
            result = fit(
                statistics.train,
                reduction,
                site.consumer.weight,
                alpha=alpha,
                toward=self.options.toward,
                compensate=self.options.compensate,
                drift_correction=correction,
                held_out=statistics.held_out,
            )
        with self.clock("absorb"):
            if not reduction.is_identity:
                site.narrow(reduction, width, self.transaction)
            self.transaction.set_linear(site.consumer, result.weight, None)
        return _row(site, channels, reduction.kept, statistics.tokens, result)

    def _untouched(self, site: Site) -> SiteReport:
        nothing = Fit((), 0.0, 0.0, alpha=0.0, drift_correction=0.0, damping=0.0, retries=0)
        return _row(site, site.channels, site.channels, self.stream.tokens, nothing)

    def _reduction(self, site: Site, gram: Gram) -> Reduction:
        # Seeded by the site as well, so that a block's draw depends on no other block.
        generator = torch.Generator().manual_seed(
            self.options.seed ^ zlib.crc32(site.name.encode())
        )
        width, weight = self.widths[site.kind], site.consumer.weight.detach()
        if width.kept == site.channels:
            return Selection(range(site.channels), site.channels)
        reduction = self._select(select.View(site.producers(), weight, gram, width, generator))
        if (reduction.channels, reduction.kept) != (width.channels, width.kept):
            raise InputError(
                f"the selector answered {reduction!r} at {site.name}, where {width} must stay"
            )
        return reduction


def _row(site: Site, channels: int, kept: int, tokens: int, result: Fit) -> SiteReport:
    return SiteReport(
        name=site.name,
        kind=site.kind,
        block=site.block,
        channels=channels,
        kept=kept,
        tokens=tokens,
        alpha=None if math.isinf(result.alpha) else result.alpha,
        drift_correction=result.drift_correction,
        damping=result.damping,
        retries=result.retries,
        error=result.error,
        baseline_error=result.baseline_error,
    )
