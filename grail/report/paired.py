"""Standard errors over sequences: of means, and of comparisons of models on the same sequences.

Losses of different texts differ far more than those of two models on one text, so each comparison
pairs the models by sequence: a sequence, not a token, is what was drawn, since the tokens of a
sequence depend on each other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from grail.errors import InputError

BEYOND = 2.0  # standard errors beyond which a difference counts

Losses = Sequence[float]  # mean −log p of each sequence, in the text's order
Counts = Sequence[int] | None  # predicted tokens of each sequence


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error over sequences; None: it cannot be estimated."""

    value: float
    error: float | None

    def __str__(self) -> str:
        return f"{self.value:.4g}" + ("" if self.error is None else f" ± {self.error:.2g}")


def weighted(values: Sequence[float], counts: Sequence[int]) -> Estimate:
    """Estimates the mean over tokens of what is known as a mean of each sequence.

    It is a ratio of sums over sequences, Σ nᵢ vᵢ / Σ nᵢ, so its standard error is the jackknife's,
    see `share`. Of sequences of one length it is s / √n.

    Args:
        values: mean of each sequence, such as its KL to the dense model in nats.
        counts: predicted tokens of each, positive.

    Returns:
        The mean; its error is None of one sequence and where a value is not finite.

    Raises:
        InputError: the lists differ in length or are empty.
    """
    means, tokens = _paired(values, counts)
    sums = means * tokens
    whole, number = sums.sum(), tokens.sum()
    value = float(whole / number)
    if len(means) < 2 or not math.isfinite(value):
        return Estimate(value, None)
    return Estimate(value, _jackknife((whole - sums) / (number - tokens)))


def difference(losses: Losses, others: Losses, counts: Counts = None) -> Estimate:
    """Estimates how much larger the mean of `losses` is than that of `others`, in nats a token.

    The standard error is that of the mean of the paired differences, see `weighted`.

    Args:
        losses, others: mean −log p of each sequence.
        counts: predicted tokens of each sequence; None counts all sequences alike.

    Raises:
        InputError: the lists differ in length or are empty.
    """
    one, other = _paired(losses, others)
    return weighted((one - other).tolist(), counts or [1] * len(one))


def share(
    dense: Losses, pruned: Losses, restored: Losses, counts: Counts = None
) -> Estimate | None:
    """Estimates the share of the log-perplexity lost by pruning that the restored model recovers.

    It is a ratio of sums over predicted tokens, Σ (pruned − restored) / Σ (pruned − dense), so its
    standard error is the jackknife's over sequences: √((n − 1)/n Σ (θᵢ − θ̄)²), θᵢ without
    sequence i.

    Args:
        dense, pruned, restored: mean −log p of each sequence.
        counts: predicted tokens of each sequence; None counts all sequences alike.

    Returns:
        The share, 1 as good as dense, 0 as bad as pruned. Its error is None of one sequence, and
        where pruning loses nothing once a sequence is left out. None where pruning lost nothing.

    Raises:
        InputError: the lists differ in length or are empty.

    Source: B. Efron and R. Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 11.
    """
    base, narrow, own, tokens = _paired(dense, pruned, restored, counts or [1] * len(dense))
    gains, losses = tokens * (narrow - own), tokens * (narrow - base)
    gained, lost = gains.sum(), losses.sum()
    if not lost > 0:
        return None
    value, left = float(gained / lost), lost - losses
    if len(gains) < 2 or not (left > 0).all():
        return Estimate(value, None)
    return Estimate(value, _jackknife((gained - gains) / left))


def _jackknife(without: npt.NDArray[np.float64]) -> float:
    """Returns the standard error from the estimates that leave out each sequence."""
    count, spread = len(without), np.square(without - without.mean()).sum()
    return math.sqrt((count - 1) / count * spread)


def is_worse(losses: Losses, others: Losses, errors: float = BEYOND, counts: Counts = None) -> bool:
    """Returns True if `losses` exceed `others` by more than `errors` standard errors.

    Two lists of one sequence are never told apart. `counts` are as for `difference`.
    """
    found = difference(losses, others, counts)
    return found.error is not None and found.value > errors * found.error


def _paired(*columns: Losses) -> list[npt.NDArray[np.float64]]:
    counts = [len(column) for column in columns]
    if len(set(counts)) > 1 or not counts[0]:
        raise InputError(
            f"values are paired by sequence; got lists of {', '.join(map(str, counts))}: evaluate "
            "all models on the same sequences"
        )
    return [np.asarray(column, dtype=np.float64) for column in columns]
