"""Passes of the calibration through a block: statistics of what consumers read, and targets.

One pass serves all sites of a block that is still dense, or one step of it: a site alone, or the
experts of a layer.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

from torch import Tensor, nn, zeros_like
from torch.utils._pytree import tree_map_only

from grail.algebra.expert_grams import RaggedGrams
from grail.algebra.gram import Gram
from grail.calibrate.hidden_states import HiddenStates
from grail.calibrate.samples import Order
from grail.calibrate.stream import Stream
from grail.errors import ModelError
from grail.networks import AnyPoint, BoundSite, CalibrationPoint, grouped
from grail.networks.layers import Consumer, Routed
from grail.recipe import Recipe
from grail.runtime.clock import Clock
from grail.runtime.hooks import Stop, replaced_forward
from grail.statistics.observing import watch
from grail.statistics.residual_split import ResidualSplit
from grail.statistics.site_statistics import SAMPLES_FIRST, SiteStatistics
from grail.statistics.token_order import token_orders

Advance = Callable[[int], object]  # called with a number of tokens that are done

# Of each consumer, in order: what it reads, and what it returns.
Calls = dict[Consumer, list[tuple[Tensor, Any]]]


def ignore(*_: object) -> None:
    """Does nothing with its arguments."""


class Collector:
    """The passes of one run.

    Args:
        recipe: determines the statistics and their tokens.
        stream: the calibration set, at a block's entry.
        clock: phases "forward" (blocks, without the statistics) and "gram".
        known: the statistics of points that were collected before, where the stream is empty.
    """

    def __init__(
        self,
        recipe: Recipe,
        stream: Stream,
        clock: Clock,
        known: Callable[[Any], list[SiteStatistics]] | None = None,
    ):
        self._recipe, self._stream, self._clock, self._known = recipe, stream, clock, known
        self._orders: dict[Consumer, Order] = {}

    def learn_orders(self, sites: Sequence[BoundSite]) -> None:
        """Finds out the order of the tokens that layers of an unknown network read.

        Raises:
            ModelError: the order is needed, and cannot be found out.
        """
        if not self._recipe.holds_out and not self._stream.is_masked:
            return
        needs_gradient = self._recipe.needs_gradient
        with self._clock("forward"):
            for block, of_block in itertools.groupby(sites, lambda site: site.block):
                consumers = [consumer for site in of_block for consumer in site.consumers]
                self._orders |= token_orders(self._stream, block, consumers, needs_gradient)

    def collect(
        self,
        block: int,
        points: Sequence[AnyPoint],
        targets: Mapping[Any, HiddenStates],
        advance: Advance,
        finish: bool,
        split: ResidualSplit | None = None,
    ) -> dict[AnyPoint, list[SiteStatistics]]:
        """Runs every batch through a block; returns statistics for each consumer of the points.

        Args:
            block: where the stream is.
            points: of the block.
            targets: the dense hidden states at the probes of the points that correct drift.
            advance: called with the tokens of each batch.
            finish: whether the stream moves to the block's output; without, a batch ends as soon
                as all points are done.
            split: keeps the block's output in two parts; the only point's consumer returns zeros.
        """
        collected: dict[AnyPoint, list[SiteStatistics]] = {}
        for step in grouped(points):
            collected |= self._empty(step)
        stream = self._stream
        with self._clock("forward"):
            for batch in range(len(stream)):
                # The first batch runs to its end, for layers that run again.
                stops = not finish and split is None and batch > 0
                one = _BatchPass(batch, collected, targets, self._recipe, self._clock, stops, split)
                output = one.run(stream, block)
                if split is not None:
                    split.rests.put(batch, output)
                elif finish and isinstance(output, Tensor):
                    stream.store(batch, output)
                advance(stream.tokens_of(batch))
        return collected

    def _empty(self, step: Sequence[AnyPoint]) -> dict[AnyPoint, list[SiteStatistics]]:
        """Returns empty statistics of points that run together; experts' Grams share launches."""
        if self._known is not None:
            return {point: self._known(point) for point in step}
        shared: dict[str, tuple[Gram, ...]] = {}
        if step[0].group is not None:
            names, channels = [point.name for point in step], step[0].channels
            device, non_finite = self._stream.device, self._recipe.non_finite
            others = sorted(role.value for role in self._stream.others)
            for part in ("train", "held_out", *others):
                experts = RaggedGrams(names, channels, device, non_finite=non_finite)
                shared[part] = experts.take()
        return {
            point: [
                SiteStatistics(
                    point,
                    consumer,
                    self._stream,
                    self._recipe,
                    {part: grams[number] for part, grams in shared.items()},
                    self._orders.get(consumer, SAMPLES_FIRST),
                )
                for consumer in point.consumers
            ]
            for number, point in enumerate(step)
        }

    def empty(self, site: BoundSite) -> SiteStatistics:
        """Returns empty statistics of what the only consumer of a site reads."""
        (statistics,) = self._empty([site])[site]
        return statistics

    def follow(
        self, stream: Stream, block: int, points: Sequence[CalibrationPoint], advance: Advance
    ) -> dict[CalibrationPoint, HiddenStates]:
        """Moves a stream past a block; returns what it held at the probe of each point.

        The next block overwrites that.
        """
        held: dict[CalibrationPoint, HiddenStates] = {}
        for number, step in enumerate(grouped(points)):
            at_output = step[0].probes_output  # the stream itself keeps a block's output
            held |= dict.fromkeys(step, stream.hidden if at_output else stream.observed(number))
        probed = [
            step[0]
            for step in grouped(points)
            if step[0].corrects_drift(self._recipe.per_tap) and not step[0].probes_output
        ]
        with self._clock("forward"):
            for batch in range(len(stream)):
                if batch in stream.hidden:
                    with ExitStack() as hooks:
                        for point in probed:
                            keep = partial(held[point].put, batch)
                            hooks.enter_context(watch(point, stream.blocks[block], None, keep))
                        output = stream.run(block, batch)
                    if isinstance(output, Tensor):
                        stream.store(batch, output)
                advance(self._stream.tokens_of(batch))
        return held

    def calls(self, site: BoundSite, batch: int) -> Calls:
        """Returns the inputs and outputs of a site's consumers for a batch."""
        calls: Calls = {consumer: [] for consumer in site.consumers}
        with ExitStack() as hooks, self._clock("forward"):
            for consumer, of_consumer in calls.items():
                record = partial(_record_call, of_consumer)
                hook = consumer.module.register_forward_hook(record, with_kwargs=True)
                hooks.enter_context(hook)
            self._stream.run(site.block, batch)
        return calls

    def reads_again(
        self, site: BoundSite, batch: int, calls: Calls, silent: bool = False
    ) -> dict[Consumer, list[Tensor]]:
        """Returns the inputs of a site's consumers if each returns what it did before.

        Then nothing that they compute reaches what they read, through a residual stream either.
        With `silent` they return zeros.
        """
        reads: dict[Consumer, list[Tensor]] = {consumer: [] for consumer in site.consumers}
        with ExitStack() as replaced, self._clock("forward"):
            for consumer, of_consumer in reads.items():
                replay = partial(_replay_call, calls[consumer], of_consumer, silent)
                replaced.enter_context(replaced_forward(consumer.module, replay))
            self._stream.run(site.block, batch)
        return reads

    def in_order(self, modules: Sequence[nn.Module], block: int) -> list[nn.Module]:
        """Returns those of some modules that a block runs, in the order in which it does."""
        ran: dict[nn.Module, None] = {}
        with ExitStack() as hooks, self._clock("forward"):
            for module in modules:
                note = module.register_forward_pre_hook(lambda m, _: ran.setdefault(m))
                hooks.enter_context(note)
            self._stream.run(block, 0)
        return list(ran)

    def inputs_of(self, module: nn.Module, block: int) -> Iterator[Tensor]:
        """Yields what a module of a block reads, batch by batch of the calibration."""
        inputs: list[Tensor] = []

        def read(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs.append(args[0])
            raise Stop

        with module.register_forward_pre_hook(read), self._clock("forward"):
            for batch in filter(self._stream.fits, range(len(self._stream))):
                with suppress(Stop):
                    self._stream.run(block, batch)
                yield inputs.pop()


class _BatchPass:
    """One batch's pass through a block, which feeds the statistics of its points.

    A consumer's input is added when the consumer runs; at a point with a target, once the probe
    shows what its output lacks.

    Args:
        batch: its number.
        collected: the statistics of each point's consumers.
        targets: what the network should hold at the probe of a point, for some points and batches.
        recipe: whether tokens are weighted.
        clock: phase "gram".
        stops: whether the pass ends as soon as all is added.
        split: see `Collector.collect`.
    """

    def __init__(
        self,
        batch: int,
        collected: Mapping[Any, Sequence[SiteStatistics]],
        targets: Mapping[Any, HiddenStates],
        recipe: Recipe,
        clock: Clock,
        stops: bool,
        split: ResidualSplit | None,
    ):
        self._batch, self._collected, self._targets = batch, collected, targets
        self._weighs, self._clock, self._stops = recipe.weighs_tokens, clock, stops
        self._split, self._per_tap = split, recipe.per_tap
        self._of_target = split is not None and recipe.dense_share == 1
        self._waiting = {consumer for point in collected for consumer in point.consumers}
        self._inputs: dict[Consumer, tuple[Tensor, Routed | None]] = {}
        self._seen: set[Consumer] = set()
        # The drift and the token weights of points that share a probe, by their group.
        self._lacking: dict[Any, tuple[Tensor | None, Tensor | None]] = {}

    def run(self, stream: Stream, block: int) -> Any:
        """Returns the block's output; None if the pass ended before."""
        with suppress(Stop), ExitStack() as hooks:
            for point in self._collected:
                observe = partial(self._observe, point) if self._is_observed(point) else None
                read = partial(self._read, point)
                hooks.enter_context(watch(point, stream.blocks[block], read, observe))
            if self._split is not None:
                hooks.enter_context(self._split.silenced())
            return stream.run(block, self._batch)
        return None

    def _is_observed(self, point: CalibrationPoint) -> bool:
        """Returns whether a probe shows the drift of a point's tokens, or at least their size."""
        sizes = self._weighs and point.corrects_drift(self._per_tap)
        return self._has_target(point) or sizes

    def _has_target(self, point: CalibrationPoint) -> bool:
        return point in self._targets and self._batch in self._targets[point]

    def _read(
        self, point: CalibrationPoint, consumer: Consumer, x: Tensor, routed: Routed | None
    ) -> None:
        """Takes the input of a consumer; a hook."""
        if consumer in self._seen:
            raise ModelError(
                f"{consumer.name} runs more than once for a batch, in chunks or for several "
                "inputs; it is narrowed only where it runs once"
            )
        self._seen.add(consumer)
        self._inputs[consumer] = x, routed
        if self._split is not None:
            self._split.inputs.put(self._batch, x)
        if not self._is_observed(point):
            self._add(point, consumer)

    def _observe(self, point: CalibrationPoint, observed: Tensor) -> None:
        """Takes the hidden states at a probe; a hook."""
        key = point.group or point
        if key not in self._lacking:
            with self._clock("gram"):
                self._lacking[key] = self._compare(point, observed)
        self._add(point, point.consumers[0], *self._lacking[key])

    def _compare(
        self, point: CalibrationPoint, observed: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Returns what a point's output lacks of its target, and the weights of its tokens.

        Where a silent consumer has a target for every batch, that is all that it should return.
        """
        has_target = self._has_target(point)
        of_target = has_target and self._of_target
        if self._split is not None and not of_target:
            observed = self._split.whole(self._batch, observed)
        target = self._targets[point][self._batch] if has_target else observed
        # Widened where it runs: on its way from a host it would be widened there, and sent as fp32.
        target = target.to(observed.device).float()
        scale = point.token_scale(target) if self._weighs else None
        if not has_target:
            return None, scale
        lacking = point.drift(target, observed)
        if self._split is not None and of_target:
            lacking = self._split.without_bias(lacking)
        return lacking, scale

    def _add(
        self,
        point: CalibrationPoint,
        consumer: Consumer,
        drift: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        with self._clock("gram"):
            x, routed = self._inputs.pop(consumer)
            statistics = self._collected[point][point.consumers.index(consumer)]
            statistics.update(self._batch, x, drift, routed, scale, self._of_target)
        self._waiting.discard(consumer)
        if self._stops and not self._waiting:
            raise Stop


def _record_call(
    calls: list[tuple[Tensor, Any]], _: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any
) -> None:
    # Copies: what follows may write over them.
    output = tree_map_only(Tensor, Tensor.clone, output)
    calls.append((_first(args, kwargs).clone(), output))


def _replay_call(
    calls: Sequence[tuple[Tensor, Any]],
    reads: list[Tensor],
    silent: bool,
    *args: Any,
    **kwargs: Any,
) -> Any:
    _, output = calls[len(reads)]
    reads.append(_first(args, kwargs).clone())
    return tree_map_only(Tensor, zeros_like if silent else Tensor.clone, output)


def _first(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Returns the input among a layer's arguments."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x
