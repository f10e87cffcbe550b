"""Output-aware backward elimination: drops the channel of least cost to the output, repeatedly.

The search of `greedy` in the other direction, with as little damping as an fp32 Gram allows; see
`grail.select.elimination`.

Source: Hassibi, Stork, "Second order derivatives for network pruning: optimal brain surgeon"
(NeurIPS 1992), with whole columns, or heads, of the consumer.
"""

from grail.algebra.reduction import Reduction
from grail.select import View, register
from grail.select.elimination import DAMPING, eliminate, exact_cost


@register("backward")
def backward(view: View) -> Reduction:
    """Drops the cheapest channels, or heads, one after another."""
    return eliminate(view, DAMPING, exact_cost)
