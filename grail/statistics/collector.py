"""Passes of a stream through a block: what consumers read, what the network holds where they land.

One pass serves all sites of a block that is still dense, or one step of it: one site, or the
experts of a layer.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from grail.algebra.expert_grams import RaggedGrams
from grail.algebra.gram import Gram
from grail.calibrate.samples import (
    Change,
    Order,
    change_decoder_inputs,
    decoder_of,
    find_orders,
    first_tensor,
)
from grail.calibrate.stream import HiddenStates, Stop, Stream, replaced_forward
from grail.errors import ModelError
from grail.networks import AnyPoint, BoundSite, CalibrationPoint, grouped
from grail.networks.layers import Consumer, Reader, Routed
from grail.recipe import Recipe
from grail.runtime.clock import Clock
from grail.statistics.site_statistics import Statistics

Advance = Callable[[int], object]  # hears of so many tokens done
# As a `Reader` of each consumer.
Read = Callable[[Consumer, Tensor, Routed | None], None]


# Of each consumer, in order: what it reads, and what it returns.
Calls = dict[Consumer, list[tuple[Tensor, Any]]]


def ignore(*_: object) -> None:
    """Hears and does nothing."""


class Collector:
    """The passes of one run.

    Args:
        options: what is collected, and of which tokens.
        stream: the calibration set, at a block's entry.
        clock: phases "forward" (blocks, without the statistics) and "gram".
        known: the statistics of places that were collected before, where the stream is empty.
    """

    def __init__(
        self,
        recipe: Recipe,
        stream: Stream,
        clock: Clock,
        known: Callable[[Any], list[Statistics]] | None = None,
    ):
        self._recipe, self._stream, self._clock, self._known = recipe, stream, clock, known
        self._orders: dict[Consumer, Order] = {}

    def learn_orders(self, sites: Sequence[BoundSite]) -> None:
        """Finds out the order of the tokens that layers of an unknown network read.

        Raises:
            ModelError: the order has to be known, and cannot be found out.
        """
        if not self._recipe.holds_out and not self._stream.is_masked:
            return
        sizes = [len(hidden) for hidden in self._stream.hidden]
        batch = next((number for number, size in enumerate(sizes) if size > 1), None)
        for block, of_block in itertools.groupby(sites, lambda site: site.block):
            consumers = [consumer for site in of_block for consumer in site.consumers]
            decodes = self._decodes(consumers, block)
            first: dict[Consumer | None, bool | None] = dict.fromkeys(consumers, True)
            if batch is not None:  # of one sample the size 1 tells
                observe = functools.partial(self._tokens, consumers, block, batch)
                with self._clock("forward"):
                    first = find_orders(observe, sizes[batch])
            if first.get(None) is False:
                raise ModelError(
                    "the selector takes gradients sample by sample, and samples are not the first "
                    "axis of what the network returns; choose another selector"
                )
            for consumer in consumers:
                samples_first = first.get(consumer)
                if samples_first is None or (consumer.reads_maps and not samples_first):
                    raise ModelError(
                        f"{consumer.name}: which sample each of its tokens belongs to could not be "
                        f"found out by replacing samples in a batch of {sizes[batch or 0]}, along "
                        "the first axis; give alpha, drift_correction=0 and no attention_mask, or "
                        "batches of one sample"
                    )
                if self._recipe.needs_gradient and not samples_first:
                    raise ModelError(
                        f"the selector takes gradients sample by sample, and samples are not the "
                        f"first axis of what {consumer.name} reads; choose another selector"
                    )
                self._orders[consumer] = Order(samples_first, consumer in decodes)

    def _decodes(self, consumers: Sequence[Consumer], block: int) -> set[Consumer]:
        """The consumers that read tokens of a decoder: those that its inputs change.

        Where a model makes its decoder's inputs itself, the layers of its decoder.
        """
        decoder = decoder_of(self._stream.blocks[block])
        if decoder is None:
            return set()
        plain = self._tokens(consumers, block, 0, lambda name, tensor: tensor)
        changed = self._tokens(consumers, block, 0, change_decoder_inputs)
        found = {
            consumer
            for consumer in consumers
            if consumer in plain and not torch.equal(plain[consumer], changed[consumer])
        }
        inside = set(decoder.modules())
        return found or {consumer for consumer in consumers if consumer.module in inside}

    def _tokens(
        self, consumers: Sequence[Consumer], block: int, batch: int, change: Change
    ) -> dict[Consumer | None, Tensor]:
        """Returns the inputs [..., H] of consumers for one batch with changed arguments.

        Where the selector takes gradients of it, what the block returns as well, under None.
        """
        found: dict[Consumer | None, Tensor] = {}

        def hearing(consumer: Consumer) -> Reader:
            def heard(x: Tensor, _: Routed | None) -> None:
                # Convolutions read samples along the first axis, whatever else they read.
                found.setdefault(consumer, x.flatten(1) if consumer.reads_maps else x)

            return heard

        with ExitStack() as hooks:
            for consumer in consumers:
                hooks.enter_context(consumer.watch(hearing(consumer)))
            output = self._stream.run_changed(block, batch, change)
        returned = first_tensor(output) if self._recipe.needs_gradient else None
        if returned is not None:
            found[None] = returned
        return found

    def collect(
        self,
        block: int,
        points: Sequence[AnyPoint],
        targets: Mapping[Any, HiddenStates],
        advance: Advance,
        finish: bool,
    ) -> dict[AnyPoint, list[Statistics]]:
        """Runs every batch through a block, collecting what the consumers of `places` read.

        Args:
            aims: what those places aim at that undo drift.
            finish: whether the stream moves to the block's output; without, a batch ends where
                all has been seen.
        """
        collected: dict[AnyPoint, list[Statistics]] = {}
        for step in grouped(points):
            if self._known is None:
                collected |= self._statistics(step)
            else:
                collected |= {point: self._known(point) for point in step}
        batch = 0
        inputs: dict[Consumer, tuple[Tensor, Routed | None]] = {}
        # A batch's drift, and what its tokens count by, by what lands together.
        missing: dict[Any, tuple[Tensor, Tensor | None]] = {}
        waiting: set[Consumer] = set()
        heard: set[Consumer] = set()

        def add(
            point: AnyPoint,
            consumer: Consumer,
            drift: Tensor | None = None,
            scale: Tensor | None = None,
        ) -> None:
            with self._clock("gram"):
                statistics = collected[point][point.consumers.index(consumer)]
                x, routed = inputs.pop(consumer)
                statistics.update(batch, x, drift, routed, scale)
            waiting.discard(consumer)
            # The first batch goes on to its end, for layers that run again.
            if not waiting and not finish and batch > 0:
                raise Stop

        def reading(point: AnyPoint) -> Read:
            def read(consumer: Consumer, x: Tensor, routed: Routed | None) -> None:
                if consumer in heard:
                    raise ModelError(
                        f"{consumer.name} runs more than once for a batch, in chunks or for "
                        "several inputs; it is narrowed only where it runs once"
                    )
                heard.add(consumer)
                inputs[consumer] = x, routed
                if point not in targets:
                    add(point, consumer)

            return read

        def probe(point: AnyPoint) -> Callable[[Tensor], None]:
            def land(observed: Tensor) -> None:
                together = point.group or point
                if together not in missing:
                    with self._clock("gram"):
                        missing[together] = self._missing(point, targets[point][batch], observed)
                add(point, point.consumers[0], *missing[together])

            return land

        with ExitStack() as hooks, self._clock("forward"):
            for point in points:
                land = probe(point) if point in targets else None
                hooks.enter_context(watch(point, self._stream.blocks[block], reading(point), land))
            for batch in range(len(self._stream)):
                waiting.update(c for point in points for c in point.consumers)
                heard.clear()
                missing.clear()
                with suppress(Stop):
                    output = self._stream.run(block, batch)
                    if finish and isinstance(output, Tensor):
                        self._stream.store(batch, output)
                advance(self._stream.tokens_of(batch))
        return collected

    def _missing(
        self, point: CalibrationPoint, target: Tensor, observed: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """What the network lacks of `aim` where a place lands, and what each token counts by."""
        # Widened where it runs: on its way from a host it would be widened there, and sent as fp32.
        target = target.to(observed.device).float()
        scale = point.token_scale(target) if self._recipe.weighs_tokens else None
        return point.drift(target, observed), scale

    def _statistics(self, step: Sequence[AnyPoint]) -> dict[AnyPoint, list[Statistics]]:
        """Empty ones for places that run side by side; experts' Grams share their launches."""
        together: dict[str, tuple[Gram, ...]] = {}
        if step[0].group is not None:
            together = {
                name: RaggedGrams(
                    [point.name for point in step],
                    step[0].channels,
                    self._stream.device,
                    non_finite=self._recipe.non_finite,
                ).take()
                for name in ("train", "held_out")
            }
        return {
            point: [
                Statistics(
                    point.name,
                    consumer,
                    self._stream,
                    self._recipe.holds_out,
                    self._recipe.per_tap,
                    partial=point.group is not None,
                    non_finite=self._recipe.non_finite,
                    grams={name: grams[number] for name, grams in together.items()},
                    order=self._orders.get(consumer, Order()),
                )
                for consumer in point.consumers
            ]
            for number, point in enumerate(step)
        }

    def follow(
        self,
        stream: Stream,
        block: int,
        points: Sequence[CalibrationPoint],
        shelves: list[HiddenStates],
        advance: Advance,
    ) -> dict[CalibrationPoint, HiddenStates]:
        """Moves a stream past a block; what it held where each place lands, kept on `shelves`."""
        batch = 0
        shelves += [HiddenStates(stream.storage) for _ in points[len(shelves) :]]
        # A block's output is kept by the stream itself; places side by side land together.
        held: dict[CalibrationPoint, HiddenStates] = {}
        first: dict[Any, CalibrationPoint] = {}
        for point, shelf in zip(points, shelves, strict=False):
            together = first.setdefault(point.group or point, point)
            own = stream.hidden if point.lands_at_output else shelf
            held[point] = held.get(together, own)

        def keeping(shelf: HiddenStates) -> Callable[[Tensor], None]:
            return lambda observed: shelf.put(batch, observed)

        with ExitStack() as hooks, self._clock("forward"):
            for point in first.values():
                if point.can_aim(self._recipe.per_tap) and not point.lands_at_output:
                    hooks.enter_context(
                        watch(point, stream.blocks[block], ignore, keeping(held[point]))
                    )
            for batch in range(len(stream)):
                output = stream.run(block, batch)
                if isinstance(output, Tensor):
                    stream.store(batch, output)
                advance(stream.tokens_of(batch))
        return held

    def calls(self, site: BoundSite, batch: int) -> Calls:
        """Returns the inputs and outputs of a site's consumers for a batch."""
        calls: Calls = {consumer: [] for consumer in site.consumers}

        def hearing(consumer: Consumer) -> Callable[..., None]:
            def heard(_: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
                # Copies: what follows may write over them.
                output = tree_map_only(Tensor, Tensor.clone, output)
                calls[consumer].append((_first(args, kwargs).clone(), output))

            return heard

        with ExitStack() as hooks, self._clock("forward"):
            for consumer in site.consumers:
                heard = hearing(consumer)
                handle = consumer.module.register_forward_hook(heard, with_kwargs=True)
                hooks.callback(handle.remove)
            self._stream.run(site.block, batch)
        return calls

    def reads_again(
        self, site: BoundSite, batch: int, calls: Calls, silent: bool = False
    ) -> dict[Consumer, list[Tensor]]:
        """Returns the inputs of a site's consumers if each returns what it did before.

        So nothing that they compute reaches what they read: of a residual stream either. With
        `silent` they return zeros.
        """
        reads: dict[Consumer, list[Tensor]] = {consumer: [] for consumer in site.consumers}

        def replaying(consumer: Consumer) -> Callable[..., Any]:
            def replay(*args: Any, **kwargs: Any) -> Any:
                _, output = calls[consumer][len(reads[consumer])]
                reads[consumer].append(_first(args, kwargs).clone())
                return tree_map_only(Tensor, torch.zeros_like if silent else Tensor.clone, output)

            return replay

        with ExitStack() as replaced, self._clock("forward"):
            for consumer in site.consumers:
                replaced.enter_context(replaced_forward(consumer.module, replaying(consumer)))
            self._stream.run(site.block, batch)
        return reads

    def in_order(self, modules: Sequence[nn.Module], block: int) -> list[nn.Module]:
        """Those of some modules that a block runs, in the order in which it does."""
        ran: dict[nn.Module, None] = {}
        with ExitStack() as hooks, self._clock("forward"):
            for module in modules:
                handle = module.register_forward_pre_hook(lambda m, _: ran.setdefault(m))
                hooks.callback(handle.remove)
            self._stream.run(block, 0)
        return list(ran)

    def inputs_of(self, module: nn.Module, block: int) -> Iterator[Tensor]:
        """What a module of a block reads, batch by batch."""
        seen: list[Tensor] = []

        def read(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0])
            raise Stop

        with ExitStack() as hooks, self._clock("forward"):
            hooks.callback(module.register_forward_pre_hook(read).remove)
            for batch in range(len(self._stream)):
                with suppress(Stop):
                    self._stream.run(block, batch)
                yield seen.pop()


def _first(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The input among a layer's arguments."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


@contextmanager
def watch(
    point: CalibrationPoint,
    block: nn.Module,
    read: Read,
    observed: Callable[[Tensor], None] | None,
) -> Iterator[None]:
    """Reports what each consumer of a place reads, then what the network holds where it lands."""
    # An expert may get no token, but its layer lands.
    always = point.group is not None and read is ignore
    reading = always

    def reader(consumer: Consumer) -> Reader:
        def heard(x: Tensor, routed: Routed | None) -> None:
            nonlocal reading
            reading = True
            read(consumer, x, routed)

        return heard

    def land(module: nn.Module, args: Any, output: Any = None) -> None:
        nonlocal reading
        seen = args if output is None else output
        if reading and observed is not None:  # a module may run before the consumer, too
            reading = always
            observed(seen[0] if isinstance(seen, tuple) else seen)

    with ExitStack() as hooks:
        for consumer in () if always else point.consumers:
            hooks.enter_context(consumer.watch(reader(consumer)))
        if observed is not None and point.probe is not None:
            module = point.probe.module or block
            if point.lands_at_output or point.probe.output:
                hooks.callback(module.register_forward_hook(land).remove)
            else:
                hooks.callback(module.register_forward_pre_hook(land).remove)
        yield
