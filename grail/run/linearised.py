"""The layers of a narrow site, linear in a change of one of its producers, over a calibration set.

    OfTokens   linear layers, channel by channel a function between: the slope of each (T·K values)
    OfMaps     convolutions: the derivative of the block itself, computed again for each product

Both give the moments and products that `grail.algebra.producer_fit` needs.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from grail.algebra.kinds import MAPS
from grail.algebra.producer_fit import Chunk, Moments, Product, TokenProduct, add_tokens
from grail.calibrate.hidden_states import HiddenStates, OutputCache
from grail.calibrate.stream import Role, Stream
from grail.networks import BoundSite
from grail.run.site_check import explain_failure
from grail.statistics.collector import Advance
from grail.statistics.derivative import (
    Derivative,
    as_output,
    as_tokens,
    differentiate,
    reason_against,
    signs,
)
from grail.statistics.site_statistics import SiteStatistics
from grail.statistics.slopes import Part, Reading, parts_in_order, read
from grail_kernels import add_products, full_fp32


@dataclass(frozen=True)
class Linearised(ABC):
    """The reading of a site for a refit, and the computation with a part of its producers.

    Args:
        stream: at the entry of the site's block.
        site: narrow.
        statistics: empty, of the consumer: they give the tokens of each role.
        roles: of the sets of tokens, in their order.
        batches: that are fitted or judge.
    """

    stream: Stream
    site: BoundSite
    statistics: SiteStatistics
    roles: Sequence[Role]
    batches: Sequence[int]

    @abstractmethod
    def reading(self, batch: int, part: Part | None, probes: bool) -> Reading:
        """Runs one batch, with what is linear in a part of a producer; None for nothing of it.

        Args:
            probes: whether the pass reaches the site's probe.
        """

    @abstractmethod
    def add(self, batch: int, found: Reading, missing: Tensor, sets: Sequence[Moments]) -> None:
        """Adds one batch to the moments of each set.

        Args:
            found: of the batch.
            missing: [..., O] fp32, what the consumer's output lacks, as tokens.
            sets: in the order of `roles`.
        """

    @abstractmethod
    def product(self, part: Part, cache: OutputCache, advance: Advance) -> Product:
        """Returns the product of the fit of a part, once all batches are added.

        Args:
            cache: outputs of the modules before the site.
            advance: called with the tokens of each batch.
        """

    def moments(self, part: Part) -> list[Moments]:
        """Returns empty moments of each set."""
        rows = part.rows.flatten(1)
        channels, inputs = rows.shape
        return [Moments(channels, inputs, rows.device) for _ in self.roles]

    def rows(self, batch: int, *tensors: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
        """Yields the number of a set and its rows of tokens, see `SiteStatistics.rows`."""
        for role, found in self.statistics.rows(batch, *tensors):
            if role in self.roles:
                yield self.roles.index(role), found


@dataclass(frozen=True)
class OfTokens(Linearised):
    """Linear layers, with slopes between: those of all batches are kept.

    Args:
        inputs, slopes: where what the producer reads and the slopes wait.
    """

    inputs: HiddenStates
    slopes: HiddenStates

    def reading(self, batch: int, part: Part | None, probes: bool) -> Reading:
        return read(self.stream, self.site, batch, part, probes=probes)

    def add(self, batch: int, found: Reading, missing: Tensor, sets: Sequence[Moments]) -> None:
        assert found.x is not None
        assert found.slope is not None
        self.inputs.put(batch, found.x)
        self.slopes.put(batch, found.slope)
        for number, rows in self.rows(batch, found.x, found.slope, missing):
            add_tokens(sets[number], self.site.consumers[0].by_channel, *rows)

    def product(self, part: Part, cache: OutputCache, advance: Advance) -> Product:
        weight, total = self.site.consumers[0].by_channel, self.stream.processes.total
        return TokenProduct(weight, len(self.roles), partial(self._chunks, advance), total)

    def _chunks(self, advance: Advance) -> Iterator[Chunk]:
        """Yields what was kept of each batch."""
        for batch in self.batches:
            kept = (states[batch].to(self.stream.device) for states in (self.inputs, self.slopes))
            for number, (x, slope) in self.rows(batch, *kept):
                yield number, x, slope
            advance(self.stream.tokens_of(batch))


@dataclass(frozen=True)
class OfMaps(Linearised):
    """Convolutions, or other layers that are one of maps: nothing is kept."""

    def reading(self, batch: int, part: Part | None, probes: bool) -> Reading:
        if part is None:
            return read(self.stream, self.site, batch, probes=probes)
        return differentiate(self.stream, self.site, batch, part, signs(batch), probes)

    def add(self, batch: int, found: Reading, missing: Tensor, sets: Sequence[Moments]) -> None:
        assert isinstance(found, Derivative)
        assert found.x is not None
        assert found.returned is not None
        assert found.slope is not None
        module = self.site.consumers[0].module
        back = found.back(as_output(module, missing, found.returned))
        for number, (x, of_x) in self.rows(batch, found.x, back):
            sets[number].add(x.float(), of_x)
        slopes = as_tokens(module, found.slope)
        # How many outputs there are for each position that the consumer reads.
        weight = missing[..., 0].numel() / slopes[..., 0].numel()
        for number, (slope,) in self.rows(batch, slopes):
            sets[number].add_slopes(slope.float(), weight)
        for number, (lacking,) in self.rows(batch, missing):
            sets[number].add_missing(lacking)

    def product(self, part: Part, cache: OutputCache, advance: Advance) -> Product:
        return partial(self._product, part, cache, advance)

    def _product(
        self, part: Part, cache: OutputCache, advance: Advance, change: Tensor
    ) -> list[Tensor]:
        """Returns N X [K, D] fp32 of each set, by a pass over all batches."""

        def tangent(x: Tensor, _: Tensor) -> Tensor:
            with full_fp32(x.device):
                return x.float() @ change.mT

        sums = [torch.zeros_like(change) for _ in self.roles]
        with cache.replaying(self.batches):
            for batch in self.batches:
                with explain_failure():
                    found = differentiate(self.stream, self.site, batch, part, tangent)
                assert found.x is not None
                assert found.along is not None
                for number, (x, back) in self.rows(batch, found.x, found.back(found.along)):
                    add_products(sums[number], back, x.float())
                advance(self.stream.tokens_of(batch))
        return [self.stream.processes.total(each) for each in sums]


def has_maps(site: BoundSite) -> bool:
    """Returns whether a producer or consumer of a site reads or writes maps."""
    modules = [each.module for each in site.producers] + [each.module for each in site.consumers]
    return any(isinstance(module, MAPS) for module in modules)


def parts_of(stream: Stream, site: BoundSite) -> tuple[list[tuple[int, int]], str]:
    """Returns the parts of a site's producers in the order of their fits.

    Tried on the first batch, while nothing of the site is narrow.

    Returns:
        The number of each part's producer, and that of its span; and, where there is none, a reason
        in words.
    """
    if not has_maps(site):
        return parts_in_order(stream, site)
    if stream.is_masked:
        return [], "its layers are convolutions, and the batches have masks"
    spans = [len(producer.spans()) for producer in site.producers]
    parts = [(number, place) for number, count in enumerate(spans) for place in range(count)]
    reason = reason_against(stream, site)
    return ([], reason) if reason else (parts, "")


def energies(site: BoundSite) -> Tensor:
    """Returns ‖W_k‖² [K] fp64 of a site's only consumer, over its outputs and taps."""
    return site.consumers[0].by_channel.double().square().sum(0)
