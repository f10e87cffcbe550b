"""Pivoted Cholesky of the Gram: repeatedly keeps the channel that the kept ones explain least.

The score of a channel is its unexplained energy, S_hh of the Schur complement, at the step at which
it is chosen. The largest is chosen first, so scores never rise. Reads the data and no weights.

Source: Higham, "Analysis of the Cholesky decomposition of a semi-definite matrix" (1990), complete
pivoting; as column selection, Harbrecht, Peters, Schneider (Appl. Numer. Math. 2012).
"""

import torch
from torch import Tensor

from grail.select import View, register


def peak_bytes(view: View) -> int:
    """Returns the peak memory of scoring H channels: G and its factor, in fp64."""
    return 16 * view.width.channels**2


@register("cholesky", peak_bytes=peak_bytes)
def pivoted_cholesky(view: View) -> Tensor:
    """Returns S_hh at the step at which channel h is chosen [H]."""
    gram = view.gram.matrix().double()
    left = gram.diagonal().clone()
    score = torch.zeros_like(left)
    factor = torch.zeros_like(gram)
    waiting = torch.ones_like(left, dtype=torch.bool)
    for step in range(len(left)):
        j = int(left.where(waiting, -1).argmax())
        if left[j] <= 0:  # the rest are combinations of those chosen
            break
        score[j], waiting[j] = left[j], False
        column = gram[:, j] - factor[:, :step] @ factor[j, :step]
        factor[:, step] = column / left[j].sqrt()
        left = (left - factor[:, step].square()).clamp_min(0)
    return score
