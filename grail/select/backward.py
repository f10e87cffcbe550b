"""Output-aware backward elimination: drop next what costs the compensated output least.

`greedy` from the other end, with as little damping as an fp32 Gram allows; see
`grail.select.elimination`.

Source: Hassibi, Stork, "Second order derivatives for network pruning: optimal brain surgeon"
(NeurIPS 1992), with whole columns, or heads, of the consumer.
"""

from grail.algebra.reduction import Reduction
from grail.select import View, reduces
from grail.select.elimination import DAMPING, eliminate, exact_cost, peak_bytes


@reduces("backward", peak_bytes=peak_bytes)
def backward(view: View) -> Reduction:
    """What is left once the cheapest channels, or heads, are dropped one after another."""
    return eliminate(view, DAMPING, exact_cost)
