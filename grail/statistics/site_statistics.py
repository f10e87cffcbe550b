"""Statistics of what one consumer of a site reads: a Gram for each role of samples.

train               for the fit
held_out            for what is chosen
guard               for what is chosen, of text that is never fitted; only where there is some
select              for selection alone, where other text selects than is fitted
channels            for selection, where taps of a convolution are columns of `train`; else
`train` serves that, too
held_out_channels   the same of held-out samples
"""

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from grail.algebra.gram import Gram
from grail.calibrate.samples import Order
from grail.calibrate.stream import Role, Stream
from grail.errors import ModelError
from grail.networks import CalibrationPoint
from grail.networks.layers import Consumer, Routed
from grail.recipe import Recipe

SAMPLES_FIRST = Order()
_HELD_OUT_OF = {"train": "held_out", "channels": "held_out_channels"}
_CHANNELS_OF = {Role.TRAIN: "channels", Role.HELD_OUT: "held_out_channels"}


class SiteStatistics:
    """The Grams of what one consumer of a site reads, fed batch by batch.

    Args:
        point: the site, or another point at which a run collects.
        consumer: one of the point's.
        stream: the calibration set.
        recipe: whether every fifth sample is held out, whether a convolution's taps are columns
            (see `Consumer.by_tap`), and what becomes of tokens with NaN or Inf.
        grams: by name, if there are some already: collected before, or shared by the experts of a
            layer.
        order: of the tokens in what the consumer reads.
    """

    def __init__(
        self,
        point: CalibrationPoint,
        consumer: Consumer,
        stream: Stream,
        recipe: Recipe,
        grams: Mapping[str, Gram] | None = None,
        order: Order = SAMPLES_FIRST,
    ):
        self.name, self._consumer, self._stream, self._order = point.name, consumer, stream, order
        self._per_tap, self._holds_out = recipe.per_tap, recipe.holds_out
        self._partial = point.group is not None  # the consumer gets only some of the tokens
        self._grams = grams or self._empty(recipe)
        self.train, self._held_out = self._grams["train"], self._grams["held_out"]
        self._channels = self._grams.get("channels", self.train)
        self._guard, self._select = self._grams.get("guard"), self._grams.get("select")

    def _empty(self, recipe: Recipe) -> dict[str, Gram]:
        make = partial(
            Gram, device=self._stream.device, name=self.name, non_finite=recipe.non_finite
        )
        channels, taps = self._consumer.channels, self._consumer.taps
        sizes = [channels * taps, channels] if self._per_tap and taps > 1 else [channels]
        grams = {
            name: make(size)
            for size, names in zip(sizes, _HELD_OUT_OF.items(), strict=False)
            for name in names
        }
        size_of = {Role.GUARD: sizes[0], Role.SELECT: channels}
        others = {role.value: make(size) for role, size in size_of.items() if self._has(role)}
        return grams | others

    def _has(self, role: Role) -> bool:
        return role in self._stream.others

    def update(
        self,
        batch: int,
        x: Tensor,
        drift: Tensor | None = None,
        routed: Routed | None = None,
        scale: Tensor | None = None,
        of_target: bool = False,
    ) -> None:
        """Adds what the consumer reads of one batch, and what its output lacks.

        Args:
            batch: its number.
            x: the consumer's input.
            drift: [..., O], of the tokens that the consumer makes of its input; of all the batch's
                tokens where it gets only some.
            routed: which of the batch's tokens it gets, if not all.
            scale: [...], a factor of each of the batch's tokens and of its drift.
            of_target: whether `drift` is all that the consumer's weight should return, not only
                what it lacks (see `Gram.update`).
        """
        tokens = self._consumer.patches(x) if self._per_tap else self._consumer.pixels(x)
        by_sample = routed is not None or self._consumer.reads_maps  # samples come first there
        by_sample |= tokens.dim() != x.dim()
        if drift is not None:
            drift = drift if routed is None else routed.drift(drift)
            # Some modules see all tokens of a batch in one row.
            drift = drift.reshape(*tokens.shape[:-1], drift.shape[-1])
        if scale is not None:
            factor = _factor(scale, tokens, routed)
            x = tokens = tokens * factor
            drift = None if drift is None else drift * factor
        if not by_sample:
            samples = len(self._stream.hidden[batch])
            whole = tokens is x
            tokens = self._order.by_sample(tokens, samples)
            x = tokens if whole else self._order.by_sample(x, samples)
            drift = None if drift is None else self._order.by_sample(drift, samples)
        mask, by_role = self._flags(batch, tokens, routed)
        for role, rows in by_role.items():
            if rows is None:
                self._add(role, of_target, x, tokens, mask, drift)
            else:
                parts = (None if t is None else t[rows] for t in (mask, drift))
                self._add(role, of_target, x[rows], tokens[rows], *parts)

    def rows(self, batch: int, *tensors: Tensor) -> Iterator[tuple[Role, list[Tensor]]]:
        """Yields the tokens of one batch that count, by the role of their samples.

        Args:
            batch: its number.
            tensors: [..., n] of the tokens that the consumer reads, in their order.

        Yields:
            The role, and each tensor's rows [N, n]; nothing where there are none.
        """
        samples = len(self._stream.hidden[batch])
        ordered = [self._order.by_sample(tensor, samples) for tensor in tensors]
        mask, by_role = self._flags(batch, ordered[0], None)
        for role, chosen in by_role.items():
            rows = [t if chosen is None else t[chosen] for t in ordered]
            rows = [tensor.reshape(-1, tensor.shape[-1]) for tensor in rows]
            if mask is not None:
                counts = (mask if chosen is None else mask[chosen]).flatten()
                rows = [tensor[counts] for tensor in rows]
            if len(rows[0]):
                yield role, rows

    def _add(
        self,
        role: Role,
        of_target: bool,
        x: Tensor,
        tokens: Tensor,
        mask: Tensor | None,
        drift: Tensor | None,
    ) -> None:
        """Adds tokens to the Gram of their role, and what selects channels to its own."""
        gram = self._grams[role.value]
        if gram.channels != tokens.shape[-1]:  # taps are columns only where weights are fitted
            gram.update(self._consumer.pixels(x))
            return
        if of_target:
            gram.update(tokens, mask, target=drift)
        else:
            gram.update(tokens, mask, drift)
        channels = self._grams.get(_CHANNELS_OF.get(role, ""))
        if channels is not None:
            channels.update(self._consumer.pixels(x))

    def _flags(
        self, batch: int, tokens: Tensor, routed: Routed | None
    ) -> tuple[Tensor | None, dict[Role, Tensor | None]]:
        """Returns which tokens count, and the rows of the first axis of each role; None is all.

        The second are on the CPU, where reading them stalls no GPU, except for routed tokens.
        """
        length = tokens.shape[1] if tokens.dim() == 3 else None
        mask = self._stream.mask(batch, self._order.decoder, length)
        roles = self._stream.by_role(batch, self._holds_out)
        hidden = self._stream.hidden[batch]
        if routed is None:
            shape, samples = tokens.shape[:-1], len(hidden)
            by_role = {role: self._rows_of(shape, rows, samples) for role, rows in roles.items()}
            return self._mask_of(shape, mask, samples), by_role
        mask = None if mask is None else mask.flatten()[routed.places]
        samples_of = routed.places // hidden.shape[1]
        return mask, {
            role: None if rows is None else rows.to(samples_of.device)[samples_of]
            for role, rows in roles.items()
        }

    def _mask_of(self, shape: torch.Size, mask: Tensor | None, samples: int) -> Tensor | None:
        """Returns the mask of tokens that may lie in one row, or be one of each sample."""
        if mask is None or mask.shape == shape:
            return mask
        if shape == (samples,):
            return None
        if shape != (mask.numel(),):
            raise ModelError(
                f"{self.name} reads tokens {list(shape)}, and an attention_mask "
                f"{list(mask.shape)} does not say which of them count: give batches without "
                "padding, and without a mask"
            )
        return mask.flatten()

    def _rows_of(self, shape: torch.Size, rows: Tensor | None, samples: int) -> Tensor | None:
        """Returns the rows of tokens that belong to some samples."""
        if rows is None or shape[0] == samples:
            return rows
        if shape[0] % samples:
            raise ModelError(
                f"{self.name} reads tokens {list(shape)} of {samples} samples, which do not "
                "lie along the first axis, so none can be held out: give alpha, and "
                "drift_correction=0"
            )
        return rows.repeat_interleave(shape[0] // samples)

    def named_grams(self) -> Mapping[str, Gram]:
        """Returns every Gram once, by name, those without tokens too."""
        return self._grams

    @property
    def grams(self) -> list[Gram]:
        """Every Gram once."""
        return list(self._grams.values())

    @property
    def channels(self) -> Gram:
        """The Gram by which channels are selected."""
        # An expert may get tokens of the calibration and none that select.
        return self._select if self._select is not None and self._select.tokens else self._channels

    def underdetermined(self, kept: int) -> bool:
        """Returns True if a layer that gets only some tokens got too few to fit `kept` channels."""
        return self._partial and self.train.tokens < kept

    @property
    def held_out(self) -> Gram | None:
        """The Gram of held-out samples; None if there is nothing to choose by."""
        return self._held_out if self._held_out.tokens and self.train.tokens else None

    @property
    def guard(self) -> Gram | None:
        """The Gram of guard text; None if there is none, or nothing is fitted."""
        has_some = self._guard is not None and self._guard.tokens and self.train.tokens
        return self._guard if has_some else None

    @property
    def dropped(self) -> int:
        """The number of tokens that do not count, because they or their drift hold NaN or Inf."""
        return sum(self._grams[role.value].dropped for role in Role if role.value in self._grams)

    @property
    def tokens(self) -> int:
        """The number of tokens of the calibration that count, held out or not."""
        return self.train.tokens + self._held_out.tokens


def without_held_out(grams: Mapping[str, Gram], name: str) -> dict[str, Gram]:
    """Returns the Grams of a consumer with the held-out samples among the others."""
    joined = dict(grams)
    for part, held_out in _HELD_OUT_OF.items():
        if part in grams:
            grams[part].merge(grams[held_out])
            joined[held_out] = Gram(grams[part].channels, grams[part].device, name)
    return joined


def _factor(scale: Tensor, tokens: Tensor, routed: Routed | None) -> Tensor:
    """Returns the scale [..., 1] of tokens [..., H], in their dtype, without overflow in fp16."""
    scale = scale.flatten() if routed is None else scale.flatten()[routed.places]
    scale = scale.reshape(*tokens.shape[:-1], 1)
    return scale.to(torch.promote_types(tokens.dtype, torch.bfloat16))
