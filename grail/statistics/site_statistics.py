"""What a run collects of one consumer: the Gram of most samples, and the Gram of those held out."""

from collections.abc import Mapping
from functools import partial as bind

import torch
from torch import Tensor

from grail.algebra.gram import Gram, NonFinite
from grail.calibrate.samples import Order
from grail.calibrate.stream import Stream
from grail.errors import ModelError
from grail.networks.layers import Consumer, Routed

# Beside each Gram of most samples the one of those that were held out.
SAMPLES_FIRST = Order()
HELD_OUT = {"train": "held_out", "channels": "held_out_channels"}


class Statistics:
    """The Grams of what one consumer reads, fed batch by batch.

    Args:
        name: the site, for error messages.
        consumer: whose input is summed up.
        stream: the calibration set.
        holds_out: whether every fifth sample goes to a Gram of its own.
        per_tap: whether a convolution's taps are columns of their own (see `Consumer.by_tap`).
        partial: whether the consumer gets only some of the tokens.
        non_finite: what becomes of tokens with NaN or Inf (see `Gram`).
        grams: by name, where there are some already: what was collected before, or the places
            of this consumer among those of a layer's experts.
        order: of the tokens in what the consumer reads.

    `train`: for the fit. `held_out`: for what is chosen; None if it has no token. `channels`: of
    the channels alone, for selection; the same as `train` unless taps are columns, where those of
    held-out samples are summed beside it.
    """

    def __init__(
        self,
        name: str,
        consumer: Consumer,
        stream: Stream,
        holds_out: bool,
        per_tap: bool,
        partial: bool = False,
        non_finite: NonFinite = "refuse",
        grams: Mapping[str, Gram] | None = None,
        order: Order = SAMPLES_FIRST,
    ):
        self._order = order
        self._consumer, self._stream, self._holds_out = consumer, stream, holds_out
        self.name, self.per_tap, self._partial = name, per_tap, partial
        columns = consumer.channels * (consumer.taps if per_tap else 1)
        make = bind(Gram, device=stream.device, name=name, non_finite=non_finite)
        sizes = {"train": columns, "held_out": columns}
        if columns > consumer.channels:
            sizes |= dict.fromkeys(("channels", "held_out_channels"), consumer.channels)
        self._grams = grams or {key: make(size) for key, size in sizes.items()}
        self.train, self._held_out = self._grams["train"], self._grams["held_out"]
        self.channels = self._grams.get("channels", self.train)
        self._held_out_channels = self._grams.get("held_out_channels", self._held_out)

    def update(
        self,
        batch: int,
        x: Tensor,
        drift: Tensor | None = None,
        routed: Routed | None = None,
        scale: Tensor | None = None,
    ) -> None:
        """Adds the consumer's input of one batch, and what its output lacks.

        Args:
            x: as the consumer gets it.
            drift: [..., O], of the tokens that it makes of its input; of all the batch's tokens
                where it gets only some.
            routed: where it gets only some of the batch's tokens.
            scale: [...], what each of the batch's tokens is multiplied by, its drift as well.
        """
        tokens = self._consumer.patches(x) if self.per_tap else self._consumer.pixels(x)
        ordered = tokens is x and routed is None  # a convolution reads samples first
        if drift is not None:
            drift = drift if routed is None else routed.drift(drift)
            # Some modules see all tokens of a batch in one row.
            drift = drift.reshape(*tokens.shape[:-1], drift.shape[-1])
            if scale is not None:
                scale = scale.flatten() if routed is None else scale.flatten()[routed.places]
                scale = scale.reshape(*tokens.shape[:-1], 1)
                # Of the tokens' dtype, but for fp16, beyond which a product can go.
                scale = scale.to(torch.promote_types(tokens.dtype, torch.bfloat16))
                x = tokens = tokens * scale
                drift = drift * scale
        if ordered:
            samples = len(self._stream.hidden[batch])
            x = tokens = self._order.by_sample(tokens, samples)
            drift = None if drift is None else self._order.by_sample(drift, samples)
        mask, held = self._flags(batch, tokens, routed)
        if held is None:
            self._add(False, x, tokens, mask, drift)
        elif bool(held.all()):
            self._add(True, x, tokens, mask, drift)
        else:
            for is_held, rows in ((False, ~held), (True, held)):
                parts = (None if t is None else t[rows] for t in (mask, drift))
                self._add(is_held, x[rows], tokens[rows], *parts)

    def _add(
        self,
        held: bool,
        x: Tensor,
        tokens: Tensor,
        mask: Tensor | None,
        drift: Tensor | None,
    ) -> None:
        gram = self._held_out if held else self.train
        channels = self._held_out_channels if held else self.channels
        gram.update(tokens, mask, drift)
        if channels is not gram:
            channels.update(self._consumer.pixels(x))

    def _flags(
        self, batch: int, tokens: Tensor, routed: Routed | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Which tokens count, and which rows of the first axis are held out.

        The second is on the CPU, where looking at it stalls no GPU, but for a layer that gets only
        some of the tokens.
        """
        length = tokens.shape[1] if tokens.dim() == 3 else None
        mask = self._stream.mask(batch, self._order.decoder, length)
        held = self._stream.held_out(batch) if self._holds_out else None
        if routed is not None:
            length = self._stream.hidden[batch].shape[1]
            mask = None if mask is None else mask.flatten()[routed.places]
            samples_of = routed.places // length
            return mask, None if held is None else held.to(samples_of.device)[samples_of]
        samples = self._stream.hidden[batch].shape[0]
        shape = tokens.shape[:-1]
        if mask is not None and mask.shape != shape:
            # Some modules see all tokens of a batch in one row, or one of each sample.
            if shape != (samples,) and shape != (mask.numel(),):
                raise ModelError(
                    f"{self.name} reads tokens {list(shape)}, and an attention_mask "
                    f"{list(mask.shape)} does not say which of them count: give batches without "
                    "padding, and without a mask"
                )
            mask = None if shape == (samples,) else mask.flatten()
        if held is not None and shape[0] != samples:
            if shape[0] % samples:
                raise ModelError(
                    f"{self.name} reads tokens {list(shape)} of {samples} samples, which do not "
                    "lie along the first axis, so none can be held out: give alpha, and "
                    "drift_correction=0"
                )
            held = held.repeat_interleave(shape[0] // samples)
        return mask, held

    def named_grams(self) -> Mapping[str, Gram]:
        """All of them, each once, those without tokens too."""
        return self._grams

    def underdetermined(self, kept: int) -> bool:
        """Whether a layer that gets only some tokens got too few of them for `kept` channels."""
        return self._partial and self.train.tokens < kept

    @property
    def grams(self) -> list[Gram]:
        """All of them, each once."""
        return list(self.named_grams().values())

    @property
    def held_out(self) -> Gram | None:
        return self._held_out if self._held_out.tokens and self.train.tokens else None

    @property
    def dropped(self) -> int:
        """How many tokens did not count, because they or their drift hold NaN or Inf."""
        return self.train.dropped + self._held_out.dropped

    @property
    def tokens(self) -> int:
        """Tokens of both."""
        return self.train.tokens + self._held_out.tokens
