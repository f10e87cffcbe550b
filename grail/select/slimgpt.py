"""SlimGPT's batched greedy pruning: optimal brain surgeon by columns, with 1% of damping.

A channel costs Σ_o W_oj² / [H⁻¹]_jj, a head Σ_o Σ_j W_oj² / L_jj² with L Lᵀ = [H⁻¹]_gg (L_jj² is
[H⁻¹]_jj once the head's channels before j are dropped); see `grail.select.elimination`. The authors
drop channels in groups of 64 to 1024 before they update the costs, for speed. Here the costs of 128
candidates are updated after each dropped channel.

Their weight update is `grail.fit(..., alpha=0.01, toward="baseline")`, except that they take λ from
the mean diagonal of all channels, not of those kept. The layer ratios that they raise with depth
are `grail.run.budget.slimgpt`.

Source: Ling, Wang, Yan, Liu, "SlimGPT: layer-wise structured pruning for large language models"
(NeurIPS 2024), section 3.2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from grail.algebra.reduction import Reduction
from grail.select import View, register
from grail.select.elimination import eliminate, peak_bytes

DAMPING = 1e-2


def choose_batch(views: Sequence[View]) -> list[Reduction]:
    """Returns the choices of several sites of equal sizes."""
    return eliminate(views, DAMPING, grouped_cholesky_cost)


@register("slimgpt", peak_bytes=peak_bytes, choose_batch=choose_batch)
def slimgpt(view: View) -> Reduction:
    """Drops the cheapest channels, or heads, one after another."""
    return choose_batch([view])[0]


def grouped_cholesky_cost(columns: Tensor, inverse: Tensor) -> Tensor:
    """Returns Σ_o Σ_j W_oj² / L_jj² from a head's columns [O, d] and block of H⁻¹ [d, d]."""
    pivots = torch.linalg.cholesky(inverse).diagonal().square()
    return (columns.square().sum(0) / pivots).sum()
