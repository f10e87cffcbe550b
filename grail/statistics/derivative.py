"""The derivative of what a consumer returns by what a producer writes, where maps lie between.

A convolution reads neighbours, and so does a depthwise convolution before it: a position that a
producer writes acts on several of the consumer's output. The block's own forward is differentiated
at what it computes of a batch. Forward mode applies the derivative A to a tangent, reverse mode Aᵀ
to an output. Nothing need be known of the layers between, and no loss is involved.
"""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from grail.algebra.kinds import MAPS, plain_output, tokens_read
from grail.calibrate.stream import Stream
from grail.networks import BoundSite
from grail.networks.layers import Consumer
from grail.runtime.hooks import Stop, input_of
from grail.runtime.memory import ran_out
from grail.statistics.slopes import Part, Reading, stopping

# Of |A v||y|, what v·Aᵀy and A v·y may differ by rounding.
DOT_RTOL = 1e-3

# From the tokens [..., D] that a producer reads to those [..., K] that it writes, as a tangent.
Tangent = Callable[[Tensor], Tensor]


@dataclass
class Derivative(Reading):
    """One batch at a site, with the derivative there.

    `x` [..., D]: the tokens that the producer reads, patches of a convolution. `slope`: at the
    consumer's input, what the tangent became. `returned`: of the consumer, less its bias. `along`:
    A applied to the tangent, of the same shape.
    """

    returned: Tensor | None = None
    along: Tensor | None = None
    part: Part | None = None
    written: Tensor | None = None

    def back(self, output: Tensor) -> Tensor:
        """Returns Aᵀ y as tokens [..., K] fp32, of y in the shape of what the consumer returns."""
        assert self.returned is not None
        assert self.written is not None
        assert self.part is not None
        (found,) = torch.autograd.grad(
            self.returned, self.written, output.to(self.returned), allow_unused=True
        )
        if found is None:
            found = torch.zeros_like(self.written)
        return as_tokens(self.part.producer.module, _of_part(self.part, found)).float()


def as_tokens(module: nn.Module, output: Tensor) -> Tensor:
    """Returns what a layer writes as tokens [..., O]: of a map [N, positions, O]."""
    return output.flatten(2).movedim(1, -1) if isinstance(module, MAPS) else output


def as_output(module: nn.Module, tokens: Tensor, like: Tensor) -> Tensor:
    """Returns tokens in the form in which a layer writes them, that of `like`."""
    tokens = tokens.movedim(-1, 1) if isinstance(module, MAPS) else tokens
    return tokens.reshape(like.shape)


def differentiate(
    stream: Stream,
    site: BoundSite,
    batch: int,
    part: Part,
    tangent: Callable[[Tensor, Tensor], Tensor],
    probes: bool = False,
) -> Derivative:
    """Runs one batch through the site's block, as far as needed.

    Args:
        stream: at the entry of that block.
        part: the rows of the producer.
        tangent: from what the producer reads and writes, as tokens, to a tangent like the latter.
        probes: whether the pass reaches the site's probe; else it ends at the consumer.
    """
    found = Derivative(part=part)
    (consumer,) = site.consumers
    mode = torch.is_grad_enabled()

    with suppress(Stop), ExitStack() as hooks:
        hooks.callback(torch.set_grad_enabled, mode)
        hooks.enter_context(forward_ad.dual_level())
        write = partial(_write, found, part, tangent)
        module = part.producer.module
        hooks.enter_context(module.register_forward_hook(write, with_kwargs=True))
        end = partial(_end, found, consumer, mode)
        hooks.enter_context(consumer.module.register_forward_pre_hook(end, with_kwargs=True))
        hooks.enter_context(stopping(found, stream, site, probes))
        stream.run(site.block, batch)
    return found


def signs(batch: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns a tangent of random signs, the same for the same batch.

    The mean square of what it becomes is the sum of squares of a row of the derivative.
    """

    def drawn(_: Tensor, written: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(batch)
        found = torch.randint(2, written.shape, generator=generator, dtype=torch.int64)
        return (2 * found - 1).to(written)

    return drawn


def reason_against(stream: Stream, site: BoundSite) -> str:
    """Returns why a site has no derivative; "" where each of its producers has one.

    Tried on the first batch: v·Aᵀ(A v) must be |A v|².
    """
    (consumer,) = site.consumers
    for producer in site.producers:
        for number in range(len(producer.spans())):
            part = Part(producer, number)
            try:
                found = differentiate(stream, site, 0, part, signs(0))
                if found.along is None or found.x is None or found.written is None:
                    return f"what {consumer.name} reads does not depend on {producer.name}"
                back = found.back(found.along)
                own = as_tokens(producer.module, _of_part(part, found.written))
                written = signs(0)(found.x, own).double()
            except (RuntimeError, NotImplementedError) as error:
                if ran_out(error):
                    raise
                return f"{producer.name} has no derivative: {error}"
            norms = written.norm() * back.double().norm()
            gap = (written * back).sum() - found.along.double().square().sum()
            if not gap.abs() <= DOT_RTOL * norms:
                return f"the derivative by what {producer.name} writes is not finite or not linear"
    return ""


def _write(
    found: Derivative,
    part: Part,
    tangent: Callable[[Tensor, Tensor], Tensor],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Tensor,
) -> Tensor:
    """Replaces what a producer writes by dual numbers that are differentiated; a hook."""
    found.x = tokens_read(module, input_of(part.producer.name, args, kwargs))
    written = output.detach()
    tangents = torch.zeros_like(written)
    own = _of_part(part, written)
    along = tangent(found.x, as_tokens(module, own)).to(own)
    _of_part(part, tangents).copy_(as_output(module, along, own))
    torch.set_grad_enabled(True)  # until the consumer runs
    found.written = written.requires_grad_()
    # A copy: layers may write over it.
    return forward_ad.make_dual(found.written.clone(), tangents)


def _end(
    found: Derivative,
    consumer: Consumer,
    mode: bool,
    _: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Computes what a consumer returns, and lets it read plain numbers; a hook."""
    x = input_of(consumer.name, args, kwargs)
    hidden, slope = forward_ad.unpack_dual(x)
    if slope is not None:
        dual = forward_ad.make_dual(hidden, slope)
        output, along = forward_ad.unpack_dual(plain_output(consumer.module, dual))
        found.slope, found.along = slope.detach(), None if along is None else along.detach()
        found.returned = output
    found.hidden = hidden.detach()
    torch.set_grad_enabled(mode)

    def plain(value: Any) -> Any:
        return found.hidden if value is x else value

    return tuple(map(plain, args)), {name: plain(value) for name, value in kwargs.items()}


def _of_part(part: Part, output: Tensor) -> Tensor:
    """Returns the channels of a part in what its producer writes."""
    start, stop = part.span
    axis = 1 if isinstance(part.producer.module, MAPS) else output.dim() - 1
    return output.narrow(axis, start, stop - start)
