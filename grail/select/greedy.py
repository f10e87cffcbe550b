"""Output-aware greedy: keep next what lowers the compensated output error ‖W X − W'R X‖ most.

With P kept, the error of the best W' is tr(W S Wᵀ), S = G − G_:P G_PP⁻¹ G_P: (a Schur complement:
what P cannot say of X). Keeping channel j as well lowers it by

    ‖W S_:j‖² / S_jj        and then        S ← S − S_:j S_j: / S_jj

Neither S nor its square is ever formed: a pivoted partial Cholesky G ≈ V Vᵀ gives the columns of S
that are asked for, S_:j = G_:j − V V_jᵀ, and W S [O, H] is corrected by the outer products of V. To
work with matrices, not vectors, the order is exact among the candidates only, those of largest
gain, and all channels are looked at again after a block of choices. With p candidates for a block
of b: 2·H·K²·p/b + 2·K·O·H FLOPs in matrix products, and K passes over [H, p].

Attention heads come in groups of equal size, where a greedy order could leave the feasible set. A
head's score is what its removal alone costs after compensation, tr(W_g ((G⁻¹)_gg)⁻¹ W_gᵀ).

Source: orthogonal least squares (Chen, Billings, Luo, Int. J. Control 1989) with W X as the target;
for heads optimal brain surgeon (Hassibi, Stork, NeurIPS 1992) with blocks of channels.
"""

import torch
from torch import Tensor

from grail import ridge
from grail.reduction import Reduction, Selection
from grail.select import View, reduces
from grail.width import HeadWidth

# What the kept channels leave of a channel's energy below this share is an fp32 Gram's rounding.
NOISE = 1e-6

# Of the mean diagonal, for the inverse: with fewer tokens than channels an fp32 Gram has
# eigenvalues of some -1e-5 of it.
DAMPING = 3e-5

# Channels that are chosen between two looks at all of them, and how many times as many of the best
# are candidates for that.
BLOCK, POOL = 16, 8


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
    energy = gram.diagonal()
    left = energy.clone()  # diag S
    seen = weight @ gram  # W S
    factor = gram.new_zeros(gram.shape[0], kept)  # V
    chosen = torch.zeros_like(energy, dtype=torch.bool)
    order: list[int] = []
    while len(order) < kept:
        first = len(order)
        pool = _gain(seen, left, energy, chosen).topk(min(POOL * block, len(energy))).indices
        columns = gram[:, pool] - factor[:, :first] @ factor[pool, :first].T  # S_:pool
        candidates, outputs = seen[:, pool], []
        while len(order) < min(first + block, kept):
            gain = _gain(candidates, left[pool], energy[pool], chosen[pool])
            best = int(gain.argmax())
            if gain[best] <= 0:
                break
            j = int(pool[best])
            column, output = (t[:, best] / left[j].sqrt() for t in (columns, candidates))
            columns -= torch.outer(column, column[pool])
            candidates -= torch.outer(output, column[pool])
            left = (left - column.square()).clamp_min(0)
            factor[:, len(order)] = column
            outputs.append(output)
            chosen[j] = True
            order.append(j)
        if not outputs:  # nothing is left to gain: the loudest of the rest fill up
            rest = energy.where(~chosen, -1).topk(kept - first).indices
            return torch.tensor(order + rest.tolist())
        seen -= torch.stack(outputs, 1) @ factor[:, first : len(order)].T
    return torch.tensor(order)


def _gain(seen: Tensor, left: Tensor, energy: Tensor, chosen: Tensor) -> Tensor:
    """‖W S_:j‖² / S_jj by channel; 0 where a channel was chosen or has nothing of its own left."""
    gain = seen.square().sum(0) / left
    return gain.where((left > NOISE * energy) & ~chosen, 0)


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
