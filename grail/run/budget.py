"""Uneven budgets: how much each site, or block, keeps when all together keep a given share."""

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from grail.algebra.width import check_keep
from grail.errors import InputError


def flap(
    scores: Sequence[Tensor], keep: float, parameters: Sequence[float] | None = None
) -> list[float]:
    """The share of each site that lies above one threshold for all, in standardised scores.

    Scores are standardised within their site, (s − mean) / standard deviation of n − 1, so that a
    site loses more where its scores have a longer lower tail, not where they are small. The best
    unit of a site always stays.

    Args:
        scores: by site; [units] of channels, or [heads, head_dim] of heads, which are standardised
            by channel and then averaged.
        keep: the share of all parameters that stays, met to within one unit.
        parameters: by site, of one unit. LLaMA-7B's head has 512/3 times as many as its channel.
            By default each unit counts the same.

    Returns:
        By site, the share of its units that stays.

    Raises:
        InputError: keep outside (0, 1], no site, a site without scores, or other lengths.

    Source: An et al., "Fluctuation-based adaptive structured pruning for large language models"
    (AAAI 2024), section 3.2, and the released code, "AL-AM", for the weights.
    """
    check_keep(keep)
    parameters = [1.0] * len(scores) if parameters is None else parameters
    if not scores or len(parameters) != len(scores) or any(s.numel() == 0 for s in scores):
        raise InputError(
            f"a budget needs scores for every site and as many parameter counts; got "
            f"{[list(s.shape) for s in scores]} and {len(parameters)} counts"
        )
    standardised = [_standardised(s) for s in scores]
    for site in standardised:
        site[site.argmax()] = math.inf
    order = torch.cat(standardised).argsort(descending=True, stable=True)
    sites = torch.cat(
        [torch.full((len(s),), i, dtype=torch.int64) for i, s in enumerate(standardised)]
    )[order]
    spent = torch.tensor(parameters, dtype=torch.float64)[sites].cumsum(0)
    stay = max(len(scores), 1 + int((spent - keep * spent[-1]).abs().argmin()))
    counts = sites[:stay].bincount(minlength=len(scores))
    return [int(n) / len(s) for n, s in zip(counts, standardised, strict=True)]


def slimgpt(blocks: int, keep: float, first: float = 1 / 16) -> list[float]:
    """The share that each block keeps when its loss rises with the logarithm of its depth.

    Block i of n loses r_0 + (r_last − r_0)·log(i + 1)/log(n), for the errors of early blocks are
    handed on to all that follow; r_last is what brings the mean to `keep`.

    Args:
        blocks: n.
        keep: the mean share that stays.
        first: r_0, what the first block loses; if all together lose less, the loss is even. The
            authors take 1/16, and 1/4 for r_last, at 20% of LLaMA-7B's 32 blocks.

    Raises:
        InputError: keep outside (0, 1], blocks < 1, first outside [0, 1), or a last block that
            would keep nothing.

    Source: Ling, Wang, Yan, Liu, "SlimGPT: layer-wise structured pruning for large language models"
    (NeurIPS 2024), incremental pruning ratio, equation 6.
    """
    check_keep(keep)
    if blocks < 1 or not 0 <= first < 1:
        raise InputError(f"blocks must be ≥ 1 and first in [0, 1); got {blocks} and {first:g}")
    ramp = [math.log(i + 1) / math.log(max(blocks, 2)) for i in range(blocks)]
    mean = sum(ramp) / blocks
    lost = 1 - keep
    if blocks == 1 or lost <= first:
        return [keep] * blocks
    shares = [1 - first - (lost - first) * r / mean for r in ramp]
    if shares[-1] <= 0:
        raise InputError(
            f"keep={keep:g} over {blocks} blocks would leave {shares[-1]:.3g} of the last one; "
            f"let the first lose more than {first:g}"
        )
    return shares


def least_loss(
    losses: Sequence[Mapping[int, float]], keep: float, parameters: Sequence[float] | None = None
) -> list[int]:
    """How wide each site becomes, so that the sum of their losses is least.

    On the lower convex hull of each site's losses, the steps are taken that gain most for each
    parameter, until the next does not fit in; what is left goes to the first sites that it can
    widen. That is the least sum that the budget allows where the losses are convex and all steps
    cost the same, else near it.

    Args:
        losses: by site, what the network loses at each width that the site may have.
        keep: the share of all parameters that stays at most; a site at its greatest width has all.
        parameters: by site, of one unit of width. By default each counts the same.

    Returns:
        A width of each site, among those that it may have.

    Raises:
        InputError: keep outside (0, 1], no site, one without a width, other lengths, losses that
            are not finite, or a budget below the least widths.

    Source: separable convex allocation by marginal analysis (Fox, "Discrete optimization via
    marginal analysis", Management Science 1966).
    """
    check_keep(keep)
    parameters = [1.0] * len(losses) if parameters is None else parameters
    if not losses or len(parameters) != len(losses) or not all(losses):
        raise InputError(
            f"a budget needs losses of every site and as many parameter counts; got those of "
            f"{len(losses)} sites and {len(parameters)} counts"
        )
    if not all(math.isfinite(loss) for of_site in losses for loss in of_site.values()):
        raise InputError("a budget needs finite losses")
    sites = list(zip(losses, parameters, strict=True))
    total = sum(max(site) * each for site, each in sites)
    # Half of the parameters are to fit into half of the budget, whatever the product rounds to.
    left = (keep + 1e-9) * total - sum(min(site) * each for site, each in sites)
    if left < 0:
        raise InputError(f"keep={keep:g} is less than the least widths of all sites")
    steps = []
    for number, (site, each) in enumerate(sites):
        hull = _lower_hull(sorted(site.items()))
        for (narrow, more), (wide, less) in itertools.pairwise(hull):
            cost = (wide - narrow) * each
            steps.append(((more - less) / cost, number, wide, cost))
    widths = [min(site) for site in losses]
    full = set()  # a step that does not fit in ends a site's hull, for the next one builds on it
    for gain, number, wide, cost in sorted(steps, key=lambda step: (-step[0], *step[1:])):
        if gain < 0 or number in full:
            continue
        if cost <= left:
            # Steps of a straight hull may come in any order, by the rounding of their gains.
            widths[number], left = max(widths[number], wide), left - cost
        else:
            full.add(number)
    for number, (site, each) in enumerate(sites):  # widths between two of the hull
        now = widths[number]
        fitting = [k for k in site if (k - now) * each <= left and site[k] <= site[now]]
        widths[number] = max([now, *fitting])
        left -= (widths[number] - now) * each
    return widths


def _lower_hull(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Of points from left to right, those of the lower convex hull."""
    hull: list[tuple[int, float]] = []
    for x, y in points:
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x1) < (y - y1) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull


def _standardised(scores: Tensor) -> Tensor:
    """Units' scores [units] in fp64 with mean 0 and deviation 1; 0 where all are equal."""
    scores = scores.detach().cpu().double()
    deviation = scores.std() if scores.numel() > 1 else 0
    standard = ((scores - scores.mean()) / deviation).nan_to_num(0.0, 0.0, 0.0)
    return standard.mean(1) if standard.dim() == 2 else standard
