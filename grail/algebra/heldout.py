"""Choosing the ridge strength and the drift correction by tokens that were held out.

Two disjoint Grams are enough. For each α one factorisation of the first gives W' as a function of
the drift correction β, and the second prices it in closed form: a parabola in β, whose lowest point
in [0, 1] is taken. No forward pass is repeated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from grail.algebra.problem import Problem

# Decades around 1e-3: little data wants a stronger ridge, much data a weaker one.
ALPHAS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Choice:
    """`alpha` and `correction` of least held-out error, and that error, ‖T − W'RX‖².

    An infinite `alpha` is plain pruning or folding.
    """

    alpha: float
    correction: float
    squared_error: float


def choose(
    train: Problem,
    held_out: Problem,
    toward: str,
    alphas: Sequence[float] = ALPHAS,
    correction: float | None = None,
) -> Choice:
    """The best of `alphas`, each with its best correction.

    Args:
        train, held_out: one site's problem over two disjoint sets of tokens.
        toward: see `grail.fit`.
        alphas: an infinite one is plain pruning or folding.
        correction: β, if it is not to be chosen.
    """
    choices = [
        Choice(alpha, *held_out.price(*train.parts(alpha, toward), correction)) for alpha in alphas
    ]
    return min(choices, key=lambda choice: choice.squared_error)
