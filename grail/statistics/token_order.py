"""The order of the tokens that layers of a network of unknown origin read."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from grail.calibrate.samples import (
    Change,
    Order,
    change_decoder_inputs,
    decoder_of,
    find_orders,
    first_tensor,
)
from grail.calibrate.stream import Stream
from grail.errors import ModelError
from grail.networks.layers import Consumer, Routed

# What a layer reads, by consumer; what the block returns, by None.
Tokens = dict[Consumer | None, Tensor]


def token_orders(
    stream: Stream, block: int, consumers: Sequence[Consumer], needs_gradient: bool
) -> dict[Consumer, Order]:
    """Returns the order of the tokens in what each consumer of a block reads.

    Args:
        stream: at the entry of the block.
        block: its number.
        consumers: of the block.
        needs_gradient: whether samples must come first, also in what the block returns.

    Raises:
        ModelError: an order that cannot be found out, or that gradients do not allow.
    """
    sizes = [len(hidden) for hidden in stream.hidden]
    batch = next((number for number, size in enumerate(sizes) if size > 1), None)
    first: dict[Consumer | None, bool | None] = dict.fromkeys(consumers, True)
    if batch is not None:  # else size 1 shows the axis of samples
        observe = partial(_observed, stream, block, batch, consumers, needs_gradient)
        first = find_orders(observe, sizes[batch])
    if first.get(None) is False:
        raise ModelError(
            "the selector takes gradients sample by sample, and samples are not the first "
            "axis of what the network returns; choose another selector"
        )
    for consumer in consumers:
        _require_order(consumer, first.get(consumer), sizes[batch or 0], needs_gradient)
    decoding = _decoding(stream, block, consumers)
    return {c: Order(bool(first[c]), c in decoding) for c in consumers}


def _require_order(
    consumer: Consumer, samples_first: bool | None, samples: int, needs_gradient: bool
) -> None:
    if samples_first is None or (consumer.reads_maps and not samples_first):
        raise ModelError(
            f"{consumer.name}: which sample each of its tokens belongs to could not be found out "
            f"by replacing samples in a batch of {samples}, along the first axis; give alpha, "
            "drift_correction=0 and no attention_mask, or batches of one sample"
        )
    if needs_gradient and not samples_first:
        raise ModelError(
            "the selector takes gradients sample by sample, and samples are not the first axis of "
            f"what {consumer.name} reads; choose another selector"
        )


def _decoding(stream: Stream, block: int, consumers: Sequence[Consumer]) -> set[Consumer]:
    """Returns the consumers that read tokens of a decoder: those that its inputs change.

    Where a model makes its decoder's inputs itself, the layers of its decoder.
    """
    decoder = decoder_of(stream.blocks[block])
    if decoder is None:
        return set()
    observe = partial(_observed, stream, block, 0, consumers, False)
    plain, changed = observe(lambda name, tensor: tensor), observe(change_decoder_inputs)
    found = {c for c in consumers if c in plain and not torch.equal(plain[c], changed[c])}
    inside = set(decoder.modules())
    return found or {c for c in consumers if c.module in inside}


def _observed(
    stream: Stream,
    block: int,
    batch: int,
    consumers: Sequence[Consumer],
    with_output: bool,
    change: Change,
) -> Tokens:
    """Returns the inputs [..., H] of consumers for one batch with changed arguments."""
    found: Tokens = {}

    def read(consumer: Consumer, x: Tensor, _: Routed | None) -> None:
        # Convolutions read samples along the first axis, whatever else they read.
        found.setdefault(consumer, x.flatten(1) if consumer.reads_maps else x)

    with ExitStack() as hooks:
        for consumer in consumers:
            hooks.enter_context(consumer.watch(partial(read, consumer)))
        output = stream.run_changed(block, batch, change)
    returned = first_tensor(output) if with_output else None
    if returned is not None:
        found[None] = returned
    return found
