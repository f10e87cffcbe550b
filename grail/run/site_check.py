"""Trials of sites in a network of which nothing is known: consumers must read their channels."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from grail.algebra.kinds import plain_output
from grail.algebra.reduction import Reduction, Selection
from grail.algebra.rounding import is_close
from grail.errors import GrailError, ModelError
from grail.networks import BoundSite
from grail.networks.layers import Consumer
from grail.run.blocks import Blocks
from grail.runtime.memory import ran_out
from grail.runtime.transaction import Transaction
from grail.statistics.collector import Calls

# Of its norm, what a narrow site's activation in fp32 may be off by rounding.
ACTIVATION_RTOL = 1e-4


class SiteCheck:
    """Narrows each site for a trial, and compares what its consumers read before and after.

    `downstream`: the consumers of a residual stream that read the output of its other consumers.
    """

    def __init__(self, blocks: Blocks):
        self._stream, self._collector, self._widths = blocks.stream, blocks.collector, blocks.widths
        self.downstream: set[Consumer] = set()

    def __call__(self, site: BoundSite, reduction: Reduction) -> None:
        """Tries a site on the first and the last batch.

        A selection is tried for a folding too: φ(R W x) is not R φ(W x) there.

        Raises:
            ModelError: a consumer that does not read R x once the site is narrow, or whose output
                is not that of its weight and bias; a network that does not run then.
        """
        selection = reduction if isinstance(reduction, Selection) else _drawn(reduction)
        before: Calls = {}
        last = len(self._stream) - 1
        for batch in sorted({0, last}):
            before = self._collector.calls(site, batch)
            _require_plain_outputs(before)
            _require_reads(
                site, selection, before, self._narrow_reads(site, selection, before, batch)
            )
        if len(site.consumers) > 1:
            silent = self._collector.reads_again(site, last, before, silent=True)
            self.downstream |= {c for c, reads in silent.items() if _differ(reads, before[c])}

    def _narrow_reads(
        self, site: BoundSite, selection: Selection, before: Calls, batch: int
    ) -> Mapping[Consumer, Sequence[Tensor]]:
        """Returns the inputs of a site's consumers while it is narrow."""
        with explain_failure(), Transaction() as trial:
            site.narrow(selection, self._widths[site.name], trial)
            try:
                return self._collector.reads_again(site, batch, before)
            finally:
                trial.undo()


@contextmanager
def explain_failure() -> Iterator[None]:
    """Re-raises a failed forward of the narrowed network as ModelError."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        if ran_out(error) or isinstance(error, GrailError):
            raise
        raise ModelError(
            f"the network does not run once it is narrow: {error}; if its sites were named, "
            "name every layer with weights between producers and consumers: "
            "grail.Site(…, along=[…])"
        ) from error


def _drawn(reduction: Reduction) -> Selection:
    """Returns a random selection as narrow as a reduction."""
    draw = torch.Generator().manual_seed(0)
    drawn = torch.randperm(reduction.channels, generator=draw, dtype=torch.int64)
    return Selection(drawn[: reduction.kept].sort().values, reduction.channels)


def _differ(reads: Sequence[Tensor], before: Sequence[tuple[Tensor, object]]) -> bool:
    pairs = zip(reads, before, strict=False)
    return not all(torch.equal(x, old) for x, (old, _) in pairs)


def _require_plain_outputs(calls: Calls) -> None:
    for consumer, of_consumer in calls.items():
        for x, output in of_consumer:
            if not is_same_activation(output, plain_output(consumer.module, x)):
                raise ModelError(
                    f"{consumer.name} returns something else than its weight and bias make of its "
                    "input: a hook or a forward of its own changes it; remove that"
                )


def _require_reads(
    site: BoundSite, reduction: Reduction, before: Calls, reads: Mapping[Consumer, Sequence[Tensor]]
) -> None:
    """Raises ModelError unless every consumer reads R x of the x that it read before."""
    for consumer in site.consumers:
        narrow = consumer.once_narrow(reduction.kept)
        expected = [reduction.restrict(consumer.pixels(x)) for x, _ in before[consumer]]
        read = [narrow.pixels(x) for x in reads[consumer]]
        if not consumer.reads_all:  # what others write, too
            expected += [consumer.others(x) for x, _ in before[consumer]]
            read += [narrow.others(x) for x in reads[consumer]]
        if len(read) != len(expected) or not all(map(is_same_activation, read, expected)):
            raise ModelError(
                f"{site.name}: once narrow, {consumer.name} does not read the channels that "
                "were kept; something between producers and consumers mixes channels (a "
                "softmax or a norm over them, a shuffle, heads, a map flattened position by "
                "position where flatten(1) keeps channels together), or depends on chance; it "
                "is no site"
            )


def is_same_activation(found: object, expected: Tensor) -> bool:
    """Returns whether an activation is the expected one up to the rounding of its dtype."""
    if not isinstance(found, Tensor):
        return False
    return is_close(found, expected, max(ACTIVATION_RTOL, 2 * torch.finfo(found.dtype).eps))
