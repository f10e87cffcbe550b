"""Uneven budgets: the share of each site, or block, for a given share of all together."""

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
    """Returns the share of each site above one threshold for all, in standardised scores.

    Scores are standardised within their site, (s − mean) / standard deviation of n − 1. So a site
    loses more if its scores have a longer lower tail, not if they are small. The best unit of a
    site always stays.

    Args:
        scores: by site; [units] of channels, or [heads, head_dim] of heads, which are standardised
            by channel and then averaged.
        keep: the share of all parameters that stays, to within one unit.
        parameters: by site, of one unit. A head of LLaMA-7B has 512/3 times as many as a channel.
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
    """Returns the share that each block keeps if its loss rises with the logarithm of its depth.

    Block i of n loses r_0 + (r_last − r_0)·log(i + 1)/log(n), because the errors of early blocks
    reach all later ones. r_last is such that the mean share is `keep`.

    Args:
        blocks: n.
        keep: the mean share that stays.
        first: r_0, the share that the first block loses; if the mean loss is smaller, all blocks
            lose the same. The authors take 1/16, and 1/4 for r_last, at 20% of LLaMA-7B's 32
            blocks.

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
    losses: Sequence[Mapping[int, float]],
    keep: float,
    parameters: Sequence[float | Mapping[int, float]] | None = None,
) -> list[int]:
    """Returns the widths of all sites with the least sum of losses.

    On the lower convex hull of each site's losses, the steps with the greatest gain a parameter are
    taken until the next does not fit into the budget. What is left goes to the first sites that it
    can widen. The sum is the least possible one if the losses are convex and all steps cost the
    same, else near it.

    Args:
        losses: by site, the network's loss at each width that the site may get.
        keep: the share of all parameters that stays at most; a site at its greatest width has all.
        parameters: by site, of one unit of width; or at each of its widths, where units share
            some, as query heads share keys and values. By default each unit counts the same.

    Returns:
        By site, one of its widths.

    Raises:
        InputError: keep outside (0, 1], no site, one without a width, other lengths or widths,
            losses that are not finite, or a budget below the least widths.

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
    costs = [
        each if isinstance(each, Mapping) else {width: width * each for width in site}
        for site, each in zip(losses, parameters, strict=True)
    ]
    if any(cost.keys() != site.keys() for site, cost in zip(losses, costs, strict=True)):
        raise InputError("a budget needs the parameters of each site at the widths of its losses")
    sites = list(zip(losses, costs, strict=True))
    total = sum(cost[max(cost)] for cost in costs)
    # The tolerance lets half of the parameters fit into half of the budget, however it is rounded.
    left = (keep + 1e-9) * total - sum(min(cost.values()) for cost in costs)
    if left < 0:
        raise InputError(f"keep={keep:g} is less than the least widths of all sites")
    widths, left = _on_hulls(sites, left)
    for number, (site, cost) in enumerate(sites):  # widths between two of the hull
        now = widths[number]
        fitting = [k for k in site if cost[now] < cost[k] <= cost[now] + left]
        widths[number] = min([now, *fitting], key=lambda k: (site[k], -k))
        left -= cost[widths[number]] - cost[now]
    return widths


def _on_hulls(
    sites: Sequence[tuple[Mapping[int, float], Mapping[int, float]]], left: float
) -> tuple[list[int], float]:
    """Widens sites along their hulls, the greatest gain a parameter first.

    Args:
        sites: losses and parameters by width.
        left: the parameters that may be added to the least widths.

    Returns:
        The widths, and the parameters that are left.
    """
    steps, widths = [], []
    for number, (site, cost) in enumerate(sites):
        # Of widths with equally many parameters the one of least loss.
        of_cost = {cost[k]: k for k in sorted(site, key=lambda k: -site[k])}
        hull = _lower_hull([(c, site[k]) for c, k in sorted(of_cost.items())])
        widths.append(of_cost[hull[0][0]])
        for (narrow, more), (wide, less) in itertools.pairwise(hull):
            steps.append(((more - less) / (wide - narrow), number, of_cost[wide], wide - narrow))
    full = set()  # a step that does not fit in ends its site's hull: the next one builds on it
    for gain, number, wide, added in sorted(steps, key=lambda step: (-step[0], *step[1:])):
        if gain < 0 or number in full:
            continue
        if added <= left:
            # By the rounding of their gains, steps of a straight hull may come in any order.
            widths[number] = max(widths[number], wide, key=sites[number][1].__getitem__)
            left -= added
        else:
            full.add(number)
    return widths, left


def _lower_hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the points, from left to right, of the lower convex hull."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x1) < (y - y1) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    return hull


def _standardised(scores: Tensor) -> Tensor:
    """Returns units' scores [units] in fp64 with mean 0 and deviation 1; 0 if all are equal."""
    scores = scores.detach().cpu().double()
    deviation = scores.std() if scores.numel() > 1 else 0
    standard = ((scores - scores.mean()) / deviation).nan_to_num(0.0, 0.0, 0.0)
    return standard.mean(1) if standard.dim() == 2 else standard
