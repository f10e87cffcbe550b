"""The sizes and stride patterns that every Gram kernel has to get right."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grail_kernels.backend import interpreting

# Several chains of short sums, and more tokens than one block; in the interpreter no more than so,
# and of sizes on the same side of a tile one.
MANY = 641 if interpreting() else 4097
TOKENS = (0, 1, 63, 65, MANY) if interpreting() else (0, 1, 2, 63, 64, 65, MANY)
CHANNELS = (1, 15, 16, 128, 129, 257) if interpreting() else (1, 2, 15, 16, 17, 127, 128, 129, 257)


def positive(*shape: int) -> Tensor:
    """Activations with a mean: sums that only grow show a biased adder, cancelling ones hide it."""
    return torch.randn(*shape) + 0.5


def _poisoned(*shape: int) -> Tensor:
    return torch.full(shape, torch.nan)


def _sliced(tokens: int, channels: int) -> Tensor:
    whole = _poisoned(2 * tokens, channels + 3)
    whole[::2, 1 : channels + 1] = positive(tokens, channels)
    return whole[::2, 1 : channels + 1]


def _stepped(tokens: int, channels: int) -> Tensor:
    whole = _poisoned(tokens, 2 * channels)
    whole[:, ::2] = positive(tokens, channels)
    return whole[:, ::2]


def _padded_batch(tokens: int, channels: int) -> Tensor:
    whole = _poisoned(3, tokens + 5, channels)
    whole[:, :tokens] = positive(3, tokens, channels)
    return whole[:, :tokens]


def _unaligned(tokens: int, channels: int) -> Tensor:
    return positive(tokens * channels + 1)[1:].view(tokens, channels)


def _pixels(tokens: int, channels: int) -> Tensor:
    return positive(3, channels, tokens // 4, 4).permute(0, 2, 3, 1)


# Each takes tokens and channels; what lies between the elements of a view is NaN.
LAYOUTS: dict[str, Callable[[int, int], Tensor]] = {
    "rows": positive,
    "transposed": lambda tokens, channels: positive(channels, tokens).T,
    "sliced": _sliced,
    "every other channel": _stepped,
    "one batch repeated": lambda tokens, channels: positive(20, channels).expand(
        tokens // 20, -1, -1
    ),
    "one channel repeated": lambda tokens, channels: positive(tokens, 1).expand(-1, channels),
    "padded batch": _padded_batch,
    "unaligned": _unaligned,
    "pixels": _pixels,
    "single token": lambda tokens, channels: positive(channels),
}
