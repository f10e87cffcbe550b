"""Output-aware backward elimination: drops the channel of least cost to the output, repeatedly.

The search of `greedy` in the other direction, with as little damping as an fp32 Gram allows; see
`grail.select.elimination`.

Source: Hassibi, Stork, "Second order derivatives for network pruning: optimal brain surgeon"
(NeurIPS 1992), with whole columns, or heads, of the consumer.
"""

from collections.abc import Sequence

from grail.algebra.reduction import Reduction
from grail.select import View, register
from grail.select.elimination import DAMPING, eliminate, exact_cost, peak_bytes


def choose_batch(views: Sequence[View]) -> list[Reduction]:
    """Returns the choices of several sites of equal sizes."""
    return eliminate(views, DAMPING, exact_cost)


@register("backward", peak_bytes=peak_bytes, choose_batch=choose_batch)
def backward(view: View) -> Reduction:
    """Drops the cheapest channels, or heads, one after another."""
    return choose_batch([view])[0]
