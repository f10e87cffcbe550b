"""Slopes: how the input of a site's consumer changes with what one of its producers writes.

Nothing is known of the function between them. Forward-mode differentiation of the block's own
forward shows it: the producer returns dual numbers, z + ε v, and its consumer reads h + ε ∂h. Where
every channel of h is a function of that channel of z alone, ∂h = J ∘ v, and v = 1 gives J for all
channels and tokens in one pass.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from grail.algebra.rounding import is_close
from grail.calibrate.stream import Stream
from grail.networks import BoundSite
from grail.networks.layers import Producer, Range
from grail.runtime.hooks import Stop, input_of
from grail.runtime.memory import ran_out
from grail.runtime.transaction import Transaction
from grail.statistics.observing import watch

# Of its norm, what two slopes in fp32 may differ by rounding.
SLOPE_RTOL = 1e-4


@dataclass(frozen=True)
class Part:
    """Some rows of a producer, which write each channel of a site once.

    Args:
        producer: the layer.
        number: of its spans.
    """

    producer: Producer
    number: int = 0

    @property
    def span(self) -> Range:
        """The place of the rows now."""
        return self.producer.spans()[self.number]

    @property
    def rows(self) -> Tensor:
        """The rows [K, D]."""
        return self.producer.at(self.span)

    def rewrite(self, rows: Tensor, transaction: Transaction) -> None:
        """Replaces the rows."""
        self.producer.rewrite(self.span, rows, transaction)


@dataclass
class Reading:
    """One batch at a site.

    `x` [..., D]: what the producer reads. `hidden` [..., K]: what the consumer reads. `slope`
    [..., K]: J, or J ∘ v. `landed`: what the network holds at the site's probe.
    """

    x: Tensor | None = None
    hidden: Tensor | None = None
    slope: Tensor | None = None
    landed: Tensor | None = None


# From what the rows of a part write to the values of the dual numbers and their v.
Duals = Callable[[Tensor], tuple[Tensor, Tensor]]


def ones(written: Tensor) -> tuple[Tensor, Tensor]:
    """Returns dual numbers whose result has the slope J."""
    return written, torch.ones_like(written)


def read(
    stream: Stream,
    site: BoundSite,
    batch: int,
    part: Part | None = None,
    duals: Duals = ones,
    probes: bool = False,
) -> Reading:
    """Runs one batch through the site's block, as far as needed.

    Args:
        stream: at the entry of that block.
        part: the rows of the producer whose slope is read; None for no slope.
        duals: the dual numbers that it returns.
        probes: whether the pass reaches the site's probe; else it ends at the consumer.
    """
    found = Reading()
    (consumer,) = site.consumers
    with suppress(Stop), ExitStack() as hooks:
        if part is not None:
            hooks.enter_context(forward_ad.dual_level())
            write = partial(_write, found, part, duals)
            module = part.producer.module
            hooks.enter_context(module.register_forward_hook(write, with_kwargs=True))
        unpack = partial(_unpack, found)
        hooks.enter_context(consumer.module.register_forward_pre_hook(unpack, with_kwargs=True))
        hooks.enter_context(stopping(found, stream, site, probes))
        stream.run(site.block, batch)
    return found


def stopping(
    found: Reading, stream: Stream, site: BoundSite, probes: bool
) -> AbstractContextManager[None]:
    """Ends a pass at the site's consumer, or at its probe, whose value is then put into `found`."""

    def take(*_: Any) -> None:
        if not probes:
            raise Stop

    def land(landed: Tensor) -> None:
        found.landed = landed
        raise Stop

    return watch(site, stream.blocks[site.block], take, land if probes else None)


def _write(
    found: Reading,
    part: Part,
    duals: Duals,
    _: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Tensor,
) -> Tensor:
    """Replaces what a producer writes by dual numbers; a hook."""
    found.x = input_of(part.producer.name, args, kwargs)
    start, stop = part.span
    values, tangents = output.clone(), torch.zeros_like(output)
    values[..., start:stop], tangents[..., start:stop] = duals(output[..., start:stop])
    return forward_ad.make_dual(values, tangents)


def _unpack(
    found: Reading, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Lets a consumer read plain numbers; a hook."""

    def plain(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        primal, tangent = forward_ad.unpack_dual(value)
        found.hidden = primal
        found.slope = torch.zeros_like(primal) if tangent is None else tangent
        return primal

    return tuple(map(plain, args)), {name: plain(value) for name, value in kwargs.items()}


def parts_in_order(stream: Stream, site: BoundSite) -> tuple[list[tuple[int, int]], str]:
    """Returns the parts of a site's producers, those first that the consumer's input is linear in.

    Tried on the first batch.

    Returns:
        The number of each part's producer, and that of its span; and, where there is none, a reason
        in words.
    """
    exact: dict[tuple[int, int], bool] = {}
    for number, producer in enumerate(site.producers):
        for place in range(len(producer.spans())):
            try:
                linear = _is_linear(stream, site, Part(producer, place))
            except (RuntimeError, NotImplementedError) as error:
                if ran_out(error):
                    raise
                return [], f"{producer.name} has no slope: {error}"
            if linear is None:
                return [], (
                    f"what {site.consumers[0].name} reads is not, channel by channel, a function "
                    f"of what {producer.name} writes"
                )
            exact[number, place] = linear
    return sorted(exact, key=lambda part: not exact[part]), ""


def _is_linear(stream: Stream, site: BoundSite, part: Part) -> bool | None:
    """Returns whether a slope is the same at other values; None where it is none of a channel."""
    generator = torch.Generator().manual_seed(0)

    def signed(written: Tensor) -> tuple[Tensor, Tensor]:
        signs = torch.randint(2, written.shape, generator=generator, dtype=torch.int64)
        return written, (2 * signs - 1).to(written)

    def moved(written: Tensor) -> tuple[Tensor, Tensor]:
        return 0.5 - 1.5 * written, torch.ones_like(written)

    plain = read(stream, site, 0, part)
    one, x, hidden = plain.slope, plain.x, plain.hidden
    if one is None or x is None or hidden is None or hidden.shape[:-1] != x.shape[:-1]:
        return None
    generator.manual_seed(0)
    mixed = read(stream, site, 0, part, signed).slope
    start, stop = part.span
    generator.manual_seed(0)
    _, signs = signed(hidden.new_empty(*hidden.shape[:-1], stop - start))
    other = read(stream, site, 0, part, moved).slope
    if mixed is None or other is None or signs.shape != one.shape:
        return None
    tolerance = max(SLOPE_RTOL, 2 * torch.finfo(one.dtype).eps)
    if not is_close(mixed, one * signs, tolerance):
        return None
    return is_close(other, one, tolerance)
