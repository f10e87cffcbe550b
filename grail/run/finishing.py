"""The end of a block: the calibration set moves to the entry of the next one.

Where the block's output is r + c(x) for its last consumer c (`grail.statistics.residual_split`),
the pass that collects the statistics of c keeps x and r, and the block ends without running again:
no attention, no norm, no producer, and c only on the channels that stay. Otherwise the narrowed
block runs again on all batches.

Nothing of this depends on the architecture's name. Before the pass, one batch shows whether the
block's output is that sum. After the fit, the narrowed block runs on the first batch: if its
consumer does not read x[…, P], or it does not return r + c(x[…, P]), it runs on all.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from grail import select
from grail.algebra.reduction import Reduction, Selection
from grail.calibrate.hidden_states import HiddenStates, OutputCache
from grail.calibrate.stream import Stream
from grail.networks import BoundSite
from grail.networks.layers import Consumer
from grail.run.blocks import Blocks
from grail.run.site_check import explain_failure, is_same_activation
from grail.statistics.collector import Advance
from grail.statistics.residual_split import ResidualSplit


class BlockFinisher:
    """Moves the calibration set past narrowed blocks.

    `cache`: outputs of modules before the last sites of a block that runs again.

    Memory, used by every block: T·(H + O) values where blocks end without running again; else those
    of the cache.
    """

    def __init__(self, blocks: Blocks):
        self._blocks, self._stream, self._clock = blocks, blocks.stream, blocks.clock
        device, storage = blocks.stream.device, blocks.stream.storage
        self.cache, self._first = OutputCache(device, storage), OutputCache(device, storage, 1)
        self._inputs, self._rests = HiddenStates(storage), HiddenStates(storage)
        folds = getattr(select.get(blocks.recipe.selector), "folds", False)
        # What a folded producer writes is not a part of x; new batch norms change r and x, and
        # rounded weights all of the block.
        self._applies = not folds and not blocks.recipe.repair and not blocks.recipe.quantize
        self._additive: dict[Any, bool] = {}  # by class of block and kind of site

    def split(self, step: Sequence[BoundSite]) -> ResidualSplit | None:
        """Returns a place for the output of a block in two parts, before its last sites are narrow.

        Args:
            step: the last sites of the block, which run together.

        Returns:
            None where the block must run again after the fit.
        """
        site, consumer = step[0], step[0].consumers[0]
        alone = len(step) == len(site.consumers) == 1 and site.group is None
        if not (self._applies and alone and _is_linear(consumer) and self._is_additive(site)):
            return None
        return ResidualSplit(consumer, self._inputs, self._rests)

    @property
    def input_bytes(self) -> int:
        """The bytes of x, of all batches."""
        return self._inputs.nbytes

    @contextmanager
    def keeping(
        self, modules: Sequence[nn.Module], split: ResidualSplit | None, again: bool = False
    ) -> Iterator[None]:
        """Keeps what modules return that need not run again, with a split only for one batch.

        Args:
            again: whether all batches run through the block again, also with a split.
        """
        of_all = modules if split is None or again else ()
        of_first = () if split is None else modules
        with self.cache.recording(of_all), self._first.recording(of_first):
            yield

    def _is_additive(self, site: BoundSite) -> bool:
        """Returns whether the block's output is r + c(x) and both can be kept, in all processes.

        Tried once for each class of blocks; of an unknown network for each block.
        """
        block, trusted = self._stream.blocks[site.block], self._blocks.architecture.trusted
        key = (type(block), site.kind) if trusted else block
        if key not in self._additive:
            with self._clock("forward"):
                found = self._stream.keeps_inputs and self._adds(site.block, site.consumers[0])
            self._additive[key] = all(self._stream.processes.gather(found))
        return self._additive[key]

    def _adds(self, block: int, consumer: Consumer) -> bool:
        """Returns whether one batch's output of a block is r + c(x)."""
        outputs: list[Any] = []

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            outputs.append(output.clone())  # the block may add to it in place

        handle = consumer.module.register_forward_hook(keep)
        try:
            whole = self._stream.run(block, 0)
        finally:
            handle.remove()
        with ResidualSplit(consumer, self._inputs, self._rests).silenced():
            rest = self._stream.run(block, 0)
        if len(outputs) != 1 or not (isinstance(rest, Tensor) and isinstance(whole, Tensor)):
            return False
        (own,) = outputs
        if not own.numel() == rest.numel() == whole.numel():
            return False
        own = own.reshape(rest.shape)
        # Relative to c(x), which can be much smaller than the stream.
        return is_same_activation(own + (whole - (rest + own)), own)

    def move(self, dense: Stream, split: ResidualSplit, advance: Advance) -> None:
        """Moves a stream past a block that is still dense, from what was kept of it."""
        with self._clock("forward"):
            for batch in range(len(dense)):
                if batch in dense.hidden:
                    dense.store(batch, split.whole(batch, split.rests[batch]))
                advance(self._stream.tokens_of(batch))

    def finish(
        self,
        block: int,
        advance: Advance,
        split: ResidualSplit | None = None,
        reduction: Reduction | None = None,
    ) -> None:
        """Moves the stream past a block; past the last one, only checks that it runs.

        Args:
            split: what was kept of the block while it was dense.
            reduction: of the channels that its last consumer reads.
        """
        with explain_failure():
            if (
                split is not None
                and isinstance(reduction, Selection)
                and self._finish_split(block, advance, split, reduction)
            ):
                return
            with self.cache.replaying():
                if self._blocks.has_next(block):
                    self._blocks.collector.collect(block, [], {}, advance, finish=True)
                elif self._blocks.active[block]:
                    with self._clock("forward"):
                        self._stream.run(block, 0)

    @torch.no_grad()
    def _finish_split(
        self, block: int, advance: Advance, split: ResidualSplit, selection: Selection
    ) -> bool:
        """Finishes a block from what was kept; returns False if the narrowed block contradicts."""
        stream, kept = self._stream, selection.index.to(self._stream.device)
        reads: list[Tensor] = []
        with self._clock("forward"):
            with self._first.replaying(), split.consumer.watch(lambda x, _: reads.append(x)):
                first = stream.run(block, 0)
            self._first.forget()
            same = len(reads) == 1 and is_same_activation(reads[0], split.read(0, kept))
            if not (same and is_same_activation(first, split.output(0, kept))):
                return False
            for batch in range(len(stream) if self._blocks.has_next(block) else 0):
                stream.store(batch, split.output(batch, kept) if batch else first)
                advance(stream.tokens_of(batch))
        return True


def _is_linear(consumer: Consumer) -> bool:
    """Returns whether all that a consumer reads are channels along the last axis, one a column."""
    return consumer.taps == 1 and not consumer.reads_maps and consumer.reads_all
