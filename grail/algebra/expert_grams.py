"""Grams of the experts of one layer, whose tokens wait together for one launch on a GPU.

A router gives an expert a few of a batch's tokens. Multiplied at once, each expert would read and
write H²/2 sums for a handful of tokens. So tokens wait until there are many, and are then sorted by
expert.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import grail_kernels as gk
from grail.algebra.gram import Gram, NonFinite, check_buffer
from grail.algebra.sums import Buffer, Sums, zeros
from grail.errors import InputError

# Tokens that wait, for each expert on average: of 128 experts of 768 channels 0.2 GB in bf16.
WAITING_TOKENS = 1024


class RaggedGrams:
    """A `Gram` for each expert; their sums are the rows of tensors that one call adds to.

    Args:
        names: of the experts' sites, for error messages.
        channels: H.
        device: of the sums.
        buffer: how many tokens wait, of all experts together. Default 1024 for each expert on a
            GPU; 0, none, on a CPU, which multiplies expert by expert anyway.
        non_finite: see `Gram`.

    `grams`: one for each name, updated and read like any other. A read adds all tokens that wait.

    Memory: 2·H·(H + 256) bytes an expert, and until a Gram is read buffer·H values, twice while
    they are sorted.
    """

    torn = False  # whether tokens that waited were lost

    def __init__(
        self,
        names: Sequence[str],
        channels: int,
        device: torch.device | str = "cpu",
        buffer: int | None = None,
        non_finite: NonFinite = "refuse",
    ):
        if not names:
            raise InputError("names is empty; give one for each expert")
        check_buffer(buffer)
        device, count = torch.device(device), len(names)
        if buffer is None:
            buffer = 0 if device.type == "cpu" else WAITING_TOKENS * count
        self._capacity = buffer
        self.packed, self.sum, self.nonfinite = zeros((count,), channels, device)
        self._waiting: Buffer | None = None
        self._owners: list[tuple[int, int]] = []  # expert and number of tokens, as they came
        self.grams: tuple[Gram, ...] = tuple(
            Gram.over(_ExpertSums(self, number), channels, name, non_finite)
            for number, name in enumerate(names)
        )

    def take(self) -> tuple[Gram, ...]:
        """Returns the Grams and forgets them: the sums of all are freed with the last one."""
        grams, self.grams = self.grams, ()
        return grams

    @property
    def waits(self) -> bool:
        """Whether tokens wait at all."""
        return self._capacity > 0

    def add(self, number: int, x: Tensor) -> None:
        """Adds the tokens `x` [T, H] of one expert, now or when there are enough."""
        if not len(x):
            return
        if len(x) > self._capacity:
            self._multiply([number], [x])
            return
        if self._waiting is not None and not self._waiting.accepts(x):
            self.flush()
        if self._waiting is None:
            self._waiting = Buffer(self._capacity, x)
        self._waiting.append(x, None)
        self._owners.append((number, len(x)))

    def flush(self) -> None:
        """Multiplies the tokens that wait; if that fails, all Grams are torn."""
        if self._waiting is None:
            return
        tokens, _ = self._waiting.content()
        numbers, counts = zip(*self._owners, strict=True)
        pairs = sorted(zip(numbers, tokens.split(counts), strict=True), key=lambda pair: pair[0])
        self._waiting, self._owners, self.torn = None, [], True
        self._multiply([number for number, _ in pairs], [part for _, part in pairs])
        self.torn = False

    def _multiply(self, numbers: Sequence[int], parts: Sequence[Tensor]) -> None:
        """Adds parts [T, H] of experts whose numbers never decrease."""
        tokens = torch.zeros(len(self.packed) + 1, dtype=torch.int64)
        experts = torch.tensor(numbers, dtype=torch.int64)
        counts = torch.tensor([len(part) for part in parts], dtype=torch.int64)
        tokens.index_add_(0, experts + 1, counts)
        x = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        # On a CPU every Gram has added its own sums, and looked for NaN and Inf before.
        own = self.packed.device.type == "cpu"
        gk.gram_ragged_(
            self.packed,
            x,
            tokens.cumsum(0),
            sums=None if own else self.sum,
            nonfinite=None if own else self.nonfinite,
        )


class _ExpertSums(Sums):
    """The sums of one expert: a row of those of all."""

    def __init__(self, together: RaggedGrams, number: int):
        super().__init__(together.packed[number], together.sum[number], together.nonfinite[number])
        self._together, self._number = together, number

    @property
    def torn(self) -> bool:
        return self._together.torn

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        tokens = (x if mask is None else x[mask]).reshape(-1, x.shape[-1])
        if self._together.waits:
            self._together.add(self._number, tokens)
        else:
            super().add(tokens, None)

    def flush(self) -> None:
        self._together.flush()
