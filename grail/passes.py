"""Passes of a stream through a block: what consumers read, what the network holds where they land.

One pass serves all sites of a block that is still dense, or one step of it: one site, or the
experts of a layer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from grail.clock import Clock
from grail.errors import ModelError
from grail.gram_ragged import RaggedGrams
from grail.layers import Consumer, Reader, Routed
from grail.options import Options
from grail.sites import AnyPlace, BoundSite, Place, steps
from grail.statistics import Statistics
from grail.stream import Shelf, Stop, Stream

Advance = Callable[[int], object]  # hears of so many tokens done
# As a `Reader` of each consumer.
Read = Callable[[Consumer, Tensor, Routed | None], None]


def ignore(*_: object) -> None:
    """Hears and does nothing."""


class Passes:
    """The passes of one run.

    Args:
        options: what is collected, and of which tokens.
        stream: the calibration set, at a block's entry.
        clock: phases "forward" (blocks, without the statistics) and "gram".
        known: the statistics of places that were collected before, where the stream is empty.
    """

    def __init__(
        self,
        options: Options,
        stream: Stream,
        clock: Clock,
        known: Callable[[Any], list[Statistics]] | None = None,
    ):
        self._options, self._stream, self._clock, self._known = options, stream, clock, known

    def collect(
        self,
        block: int,
        places: Sequence[AnyPlace],
        aims: Mapping[Any, Shelf],
        advance: Advance,
        finish: bool,
    ) -> dict[AnyPlace, list[Statistics]]:
        """Runs every batch through a block, collecting what the consumers of `places` read.

        Args:
            aims: what those places aim at that undo drift.
            finish: whether the stream moves to the block's output; without, a batch ends where
                all has been seen.
        """
        collected: dict[AnyPlace, list[Statistics]] = {}
        for step in steps(places):
            if self._known is None:
                collected |= self._statistics(step)
            else:
                collected |= {place: self._known(place) for place in step}
        batch = 0
        inputs: dict[Consumer, tuple[Tensor, Routed | None]] = {}
        # A batch's drift, and what its tokens count by, by what lands together.
        missing: dict[Any, tuple[Tensor, Tensor | None]] = {}
        waiting: set[Consumer] = set()
        heard: set[Consumer] = set()

        def add(
            place: AnyPlace,
            consumer: Consumer,
            drift: Tensor | None = None,
            scale: Tensor | None = None,
        ) -> None:
            with self._clock("gram"):
                statistics = collected[place][place.consumers.index(consumer)]
                x, routed = inputs.pop(consumer)
                statistics.update(batch, x, drift, routed, scale)
            waiting.discard(consumer)
            # The first batch goes on to its end, for layers that run again.
            if not waiting and not finish and batch > 0:
                raise Stop

        def reading(place: AnyPlace) -> Read:
            def read(consumer: Consumer, x: Tensor, routed: Routed | None) -> None:
                if consumer in heard:
                    raise ModelError(
                        f"{consumer.name} runs more than once for a batch, in chunks or for "
                        "several inputs; it is narrowed only where it runs once"
                    )
                heard.add(consumer)
                inputs[consumer] = x, routed
                if place not in aims:
                    add(place, consumer)

            return read

        def landing(place: AnyPlace) -> Callable[[Tensor], None]:
            def land(landed: Tensor) -> None:
                together = place.beside or place
                if together not in missing:
                    with self._clock("gram"):
                        missing[together] = self._missing(place, aims[place][batch], landed)
                add(place, place.consumers[0], *missing[together])

            return land

        with ExitStack() as hooks, self._clock("forward"):
            for place in places:
                land = landing(place) if place in aims else None
                hooks.enter_context(watch(place, self._stream.blocks[block], reading(place), land))
            for batch in range(len(self._stream)):
                waiting.update(c for place in places for c in place.consumers)
                heard.clear()
                missing.clear()
                with suppress(Stop):
                    output = self._stream.run(block, batch)
                    if finish and isinstance(output, Tensor):
                        self._stream.store(batch, output)
                advance(self._stream.tokens_of(batch))
        return collected

    def _missing(self, place: Place, aim: Tensor, landed: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the network lacks of `aim` where a place lands, and what each token counts by."""
        # Widened where it runs: on its way from a host it would be widened there, and sent as fp32.
        aim = aim.to(landed.device).float()
        scale = place.token_scale(aim) if self._options.weighs_tokens else None
        return place.drift(aim, landed), scale

    def _statistics(self, step: Sequence[AnyPlace]) -> dict[AnyPlace, list[Statistics]]:
        """Empty ones for places that run side by side; experts' Grams share their launches."""
        together: dict[str, RaggedGrams] = {}
        if step[0].beside is not None:
            together = {
                name: RaggedGrams(
                    [place.name for place in step],
                    step[0].channels,
                    self._stream.device,
                    non_finite=self._options.non_finite,
                )
                for name in ("train", "held_out")
            }
        return {
            place: [
                Statistics(
                    place.name,
                    consumer,
                    self._stream,
                    self._options.holds_out,
                    self._options.per_tap,
                    partial=place.beside is not None,
                    non_finite=self._options.non_finite,
                    grams={name: ragged.grams[number] for name, ragged in together.items()},
                )
                for consumer in place.consumers
            ]
            for number, place in enumerate(step)
        }

    def follow(
        self,
        stream: Stream,
        block: int,
        places: Sequence[Place],
        shelves: list[Shelf],
        advance: Advance,
    ) -> dict[Place, Shelf]:
        """Moves a stream past a block; what it held where each place lands, kept on `shelves`."""
        batch = 0
        shelves += [Shelf(stream.storage) for _ in places[len(shelves) :]]
        # A block's output is kept by the stream itself.
        held = {
            place: stream.hidden if place.lands_at_output else shelf
            for place, shelf in zip(places, shelves, strict=False)
        }

        def keeping(shelf: Shelf) -> Callable[[Tensor], None]:
            return lambda landed: shelf.put(batch, landed)

        with ExitStack() as hooks, self._clock("forward"):
            for place, shelf in held.items():
                if place.can_aim(self._options.per_tap) and not place.lands_at_output:
                    watched = watch(place, stream.blocks[block], ignore, keeping(shelf))
                    hooks.enter_context(watched)
            for batch in range(len(stream)):
                output = stream.run(block, batch)
                if isinstance(output, Tensor):
                    stream.store(batch, output)
                advance(stream.tokens_of(batch))
        return held

    def first_read(self, site: BoundSite, whole: bool = False) -> Tensor:
        """What the first consumer to run reads of the first batch, [..., H] fp32.

        Args:
            whole: whether the block runs to its end.
        """
        seen: list[Tensor] = []

        def hear(consumer: Consumer) -> Reader:
            def heard(x: Tensor, _: Routed | None) -> None:
                if not seen:
                    seen.append(consumer.pixels(x).float())
                if not whole:
                    raise Stop

            return heard

        with ExitStack() as hooks, self._clock("forward"), suppress(Stop):
            for consumer in site.consumers:
                hooks.enter_context(consumer.watch(hear(consumer)))
            self._stream.run(site.block, 0)
        return seen[0]

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


@contextmanager
def watch(
    place: Place,
    block: nn.Module,
    read: Read,
    landed: Callable[[Tensor], None] | None,
) -> Iterator[None]:
    """Reports what each consumer of a place reads, then what the network holds where it lands."""
    reading = False

    def reader(consumer: Consumer) -> Reader:
        def heard(x: Tensor, routed: Routed | None) -> None:
            nonlocal reading
            reading = True
            read(consumer, x, routed)

        return heard

    def land(module: nn.Module, args: Any, output: Any = None) -> None:
        nonlocal reading
        seen = args if output is None else output
        if reading and landed is not None:  # a module may run before the consumer, too
            reading = False
            landed(seen[0] if isinstance(seen, tuple) else seen)

    with ExitStack() as hooks:
        for consumer in place.consumers:
            hooks.enter_context(consumer.watch(reader(consumer)))
        if landed is not None and place.landing is not None:
            module = place.landing.module or block
            if place.lands_at_output or place.landing.output:
                hooks.callback(module.register_forward_hook(land).remove)
            else:
                hooks.callback(module.register_forward_pre_hook(land).remove)
        yield
