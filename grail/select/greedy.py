"""Output-aware greedy: keep next what lowers the compensated output error ‖W X − W'R X‖ most.

With P kept, the error of the best W' is tr(W S Wᵀ), S = G − G_:P G_PP⁻¹ G_P: (a Schur complement:
what P cannot say of X). Keeping channel j as well lowers it by

    ‖W S_:j‖² / S_jj        and then        S ← S − S_:j S_j: / S_jj

The search is in `grail.select.pivots`: of K channels 2·H·K²·p/(2b) + 2·K·O·H FLOPs, with p = 128
and b = 16. `grail.select.backward` finds as good a set from the other end in H − K steps and an
inverse, 2·H³.

Attention heads come in groups of equal size, where a greedy order could leave the feasible set. A
head's score is what its removal alone costs after compensation, tr(W_g ((G⁻¹)_gg)⁻¹ W_gᵀ).

Source: orthogonal least squares (Chen, Billings, Luo, Int. J. Control 1989) with W X as the target;
for heads optimal brain surgeon (Hassibi, Stork, NeurIPS 1992) with blocks of channels.
"""

import math

import torch
from torch import Tensor

from grail import ridge
from grail.reduction import Reduction, Selection
from grail.select import View, reduces
from grail.select.pivots import BLOCK, POOL, pivots
from grail.width import HeadWidth

# What the kept channels leave of a channel's energy below this share is an fp32 Gram's rounding.
NOISE = 1e-6

# Of the mean diagonal, for the inverse: with fewer tokens than channels an fp32 Gram has
# eigenvalues of some -1e-5 of it.
DAMPING = 3e-5


@reduces("greedy")
def greedy(view: View) -> Reduction:
    """Forward selection of channels by their gain; of heads by the cost of losing them."""
    gram = view.gram.matrix().double()
    weight = view.consumer.double().to(gram.device)
    if isinstance(view.width, HeadWidth):
        cost = removal_costs(gram, weight, view.width.head_dim)
        return view.width.best(cost.repeat_interleave(view.width.head_dim) / view.width.head_dim)
    return Selection(forward(gram, weight, view.width.kept).sort().values, view.width.channels)


def peak_bytes(channels: int, kept: int, outputs: int) -> int:
    """The most memory that the choice of `kept` of H channels for O outputs takes."""
    h, k, o = channels, kept, outputs
    pool = min(POOL * BLOCK, h)
    held = h * (h + k + 2 * o)  # G, V, W and W S
    # Candidates are gathered while those of the block before are still there, or W S is corrected.
    return 8 * (held + max(pool * (4 * h + o), h * o + pool * (h + o) + 2 * BLOCK * o))


def forward(gram: Tensor, weight: Tensor, kept: int, block: int = BLOCK) -> Tensor:
    """The `kept` channels of largest gain, in the order of their choice.

    Args:
        gram: G [H, H] fp64.
        weight: W [O, H] fp64.
        block: how many are chosen between two looks at all channels; 1 is the exact greedy order.
    """
    order = pivots(gram, weight @ gram, kept, _gain, block)
    energy = gram.diagonal().clone()
    energy[order] = -1  # nothing is left to gain: the loudest of the rest fill up
    rest = energy.argsort(descending=True, stable=True)[: kept - len(order)]
    return torch.tensor(order + rest.tolist())


def _gain(seen: Tensor, left: Tensor, energy: Tensor) -> Tensor:
    """‖W S_:j‖² / S_jj by channel; -inf where it is 0 or a channel has nothing of its own left."""
    gain = seen.square().sum(0) / left
    return gain.where((gain > 0) & (left > NOISE * energy), -math.inf)


def removal_costs(gram: Tensor, weight: Tensor, head_dim: int) -> Tensor:
    """What losing each head costs in squared output error, the others compensating; [heads].

    Args:
        gram: G [H, H] fp64.
        weight: W [O, H] fp64.
        head_dim: channels of a head.
    """
    heads = range(0, gram.shape[0], head_dim)
    if not gram.diagonal().any():
        return gram.new_zeros(len(heads))
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    inverse = ridge.solve(gram, identity, DAMPING * gram.diagonal().mean()).x
    own = torch.stack([inverse[h : h + head_dim, h : h + head_dim] for h in heads])
    columns = torch.stack([weight[:, h : h + head_dim] for h in heads])
    return (columns @ torch.linalg.inv(own) * columns).sum((1, 2))
