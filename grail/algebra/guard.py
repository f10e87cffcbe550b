"""Tokens that are never fitted, and on which a fit is not worse than plain pruning.

A fit whose α and β were chosen on tokens held out changes once more when those join it and when its
weights are rounded. So the error on the guard is measured on the final weights. Between plain
pruning and the fit it is a parabola of the share s of the change that stays,

    e(s) = e(0) − 2·b·s + c·s²,   which is at most e(0) up to s = 2·b/c.
"""

import torch
from torch import Tensor

from grail.algebra.problem import Consumers, Moments, Problem, Solution, Sums

# A shortened change stays so much below its bound, so that rounding the weights does not exceed it.
MARGIN = 1 / 64


class Guard:
    """The guard's tokens of E sites.

    Args:
        consumers: W₀ and V.
        sums: of the guard's tokens.
        own: the problem of the tokens that are fitted.

    `share` [E]: of the change that stays; see `shortened`.
    """

    def __init__(self, consumers: Consumers, sums: Sums, own: Problem):
        self._own, self._problem = own, Problem(consumers, Moments(consumers, sums), sums)
        self.share = torch.ones_like(sums.tokens)

    def shortened(self, solution: Solution) -> Solution:
        """Returns the share of a solution with which no error exceeds that of plain reduction.

        That is on the guard's tokens and on those that were fitted.
        """
        change = self._own.complete(solution.change, solution)
        share = torch.minimum(*(p.share_within(change) for p in (self._own, self._problem)))
        # NaN, where a factorisation failed, stays.
        self.share = torch.where(share < 1, share * (1 - MARGIN), share)
        return self._own.shortened(solution, self.share)

    def errors(self, change: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns ‖T − W'·R·X‖², that of W₀, and ‖T‖², and `share`.

        Args:
            change: Δ̂ [E, O, K+], of the rounded weights.
        """
        problem = self._problem
        return problem.error_of(change), problem.before, problem.total, self.share
