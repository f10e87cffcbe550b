"""Output-aware greedy: keep next what lowers the compensated output error ‖T − W'R X‖ most.

T is what the consumer is to say, W X and a share β of the drift δ of the network before it (see
`grail.drift`). With P kept and S = G − G_:P G_PP⁻¹ G_P: (a Schur complement: what P cannot say of
X), keeping channel j as well lowers the error of the best W' by

    ‖A_:j‖² / S_jj        and then        A ← A − A_:j S_j: / S_jj,    S ← S − S_:j S_j: / S_jj

where A = W G + β C at first, C = Σ δ xᵀ: what the channels can say of T. Without drift A is W S.
The search is in `grail.select.pivots`: H·K² + 2·K·O·H FLOPs and 2·O·H² for W G. Where most channels
stay the others are dropped, `grail.select.elimination`: from K = 0.57·H on if O = 0.375·H, 0.62·H
if O is small. On real MLPs (SmolLM2, three layers, keep 0.5 to 0.9) the errors of the two differ by
less than 0.3% on held-out tokens, in either direction.

What is dropped is dropped for W X alone. There less drifts, and what a channel says of it is more
often noise: aiming at T took SmolLM2's perplexity at 0.65 from 16.40 to 16.41 or more (16k tokens),
at 0.75 from 14.93 to 14.94 (64k), where at 0.5 the search above takes it from 17.35 to 17.25.

Attention heads come in groups of equal size, where a forward order could leave the feasible set:
they are always dropped.

Source: orthogonal least squares (Chen, Billings, Luo, Int. J. Control 1989) with T as the target.
"""

import math

import torch
from torch import Tensor

from grail.algebra.reduction import Reduction, Selection
from grail.algebra.width import HeadWidth
from grail.select import View, elimination, pivots, reduces

# What the kept channels leave of a channel's energy below this share is an fp32 Gram's rounding.
NOISE = 1e-6


def peak_bytes(view: View) -> int:
    """Returns the most memory that the choice takes."""
    channels, kept, outputs = view.width.channels, view.width.kept, len(view.consumer)
    if isinstance(view.width, HeadWidth) or _runs_backward(channels, kept, outputs):
        return elimination.peak_bytes(view)
    held = channels * (channels + kept + 2 * outputs)  # G, V, W and A
    return 8 * (held + pivots.working_numbers(channels, kept, outputs))


@reduces("greedy", peak_bytes=peak_bytes)
def greedy(view: View) -> Reduction:
    """The channels whose keeping gains most, or what is left without those that cost least."""
    channels, kept, outputs = view.width.channels, view.width.kept, len(view.consumer)
    heads = isinstance(view.width, HeadWidth)
    if heads or _runs_backward(channels, kept, outputs):
        return elimination.eliminate(view, elimination.DAMPING, elimination.exact_cost)
    gram = view.gram.matrix().double()
    weight = view.consumer.double().to(gram.device)
    seen = gram @ weight.mT
    if view.drifted is not None:
        seen.add_(view.drifted.mT, alpha=view.drift_correction)
    return Selection(forward(gram, seen, kept).sort().values, channels)


def _runs_backward(channels: int, kept: int, outputs: int) -> bool:
    """Whether the others are dropped, instead.

    That was the cheaper of the two while a search computed the columns of every candidate. It no
    longer does, but what is chosen shall not change with how fast either has become.
    """

    def search(count: int) -> int:
        return channels * count * (pivots.POOL * count + 2 * outputs)

    forward = 2 * outputs * channels**2 + search(kept)  # W G comes first
    return 2 * channels**3 + search(channels - kept) < forward


def forward(gram: Tensor, seen: Tensor, kept: int, block: int = pivots.BLOCK) -> Tensor:
    """The `kept` channels of largest gain, in the order of their choice.

    Args:
        gram: G [H, H] fp64.
        seen: Aᵀ [H, O] fp64, G Wᵀ where nothing drifts; overwritten.
        block: how many are chosen between two looks at all channels; 1 is the exact greedy order.
    """
    order = pivots.pivots(gram, seen, kept, _gain, block)
    energy = gram.diagonal().clone()
    energy[order] = -1  # nothing is left to gain: the loudest of the rest fill up
    rest = energy.argsort(descending=True, stable=True)[: kept - len(order)]
    return torch.tensor(order + rest.tolist(), dtype=torch.int64)


def errors(gram: Tensor, weight: Tensor) -> Tensor:
    """‖W X − W'R X‖² of the best W', by how many channels stay, in the order of the search.

    With the channels in that order and G = L Lᵀ it is Σ_j>k ‖(W L)_:j‖²: what the first k leave of
    each later channel is its column of L. G is damped as where channels are dropped, or as much
    more as its rounding wants.

    Args:
        gram: G [H, H] fp64.
        weight: W [O, H] fp64.

    Returns:
        [H + 1] fp64; the first, where none stays, is ‖W X‖², the last 0.
    """
    channels = len(gram)
    order = forward(gram, gram @ weight.mT, channels).to(gram.device)
    ordered = gram[order[:, None], order]
    damping = elimination.DAMPING * gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
    identity = torch.eye(channels, dtype=gram.dtype, device=gram.device)
    failed = True
    while failed:  # more than once for an fp32 Gram of loud channels that say the same
        factor, info = torch.linalg.cholesky_ex(ordered + damping * identity)
        failed, damping = bool(info), 10 * damping
    lost = (weight[:, order] @ factor).square().sum(0)
    return torch.cat([lost.flip(0).cumsum(0).flip(0), lost.new_zeros(1)])


def _gain(squares: Tensor, left: Tensor, energy: Tensor) -> Tensor:
    """‖A_:j‖² / S_jj by channel; -inf where it is 0 or a channel has nothing of its own left."""
    gain = squares / left
    return gain.where((gain > 0) & (left > NOISE * energy), -math.inf)
