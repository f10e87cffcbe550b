"""Choice of the ridge strength and the drift correction on held-out tokens.

Two disjoint Grams suffice. For each α one factorisation of the first gives W' as a function of the
drift correction β. The second gives its error in closed form, a parabola in β, whose minimum in
[0, 1] is taken. No forward pass is repeated.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from grail.algebra.problem import Problem

# Decades around 1e-3: little data needs a stronger ridge, much data a weaker one.
ALPHAS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Choice:
    """The `alpha` and `correction` of least held-out error ‖T − W'·R·X‖², and that error.

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
    """Returns the best of `alphas`, each with its best correction.

    Args:
        train, held_out: one site's problem over two disjoint sets of tokens.
        toward: see `grail.fit`.
        alphas: an infinite one is plain pruning or folding.
        correction: a fixed β instead of the best one.
    """
    choices = [
        Choice(alpha, *held_out.price(*train.parts(alpha, toward), correction)) for alpha in alphas
    ]
    return min(choices, key=lambda choice: choice.squared_error)
