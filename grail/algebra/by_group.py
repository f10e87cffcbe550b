"""The fit of a grouped convolution, whose outputs of one group read that group's channels alone.

Its weight is a block-diagonal matrix. Each block is a problem of its own, over the block of the
Gram that its channels have.
"""

import statistics
from collections.abc import Sequence
from dataclasses import replace

import torch

from grail.algebra._fit import Fit, FitSite
from grail.algebra.gram import Gram
from grail.algebra.reduction import Reduction, Selection
from grail.errors import InputError
from grail_kernels import gather, pack


def split(site: FitSite, groups: int) -> list[FitSite]:
    """Returns the problem of each group.

    Args:
        site: of one consumer, a block-diagonal matrix [O, H]; its drift is left alone.

    Raises:
        InputError: a reduction that is no selection of equally many channels of each group.
    """
    (weight,) = site.weights
    inputs, outputs = site.gram.channels // groups, len(weight) // groups
    return [
        FitSite(
            _block(site.gram, number * inputs, inputs),
            _of_group(site.reduction, number * inputs, inputs, site.reduction.kept // groups),
            (weight[number * outputs :, number * inputs :][:outputs, :inputs],),
            None if site.held_out is None else _block(site.held_out, number * inputs, inputs),
            site.compensate,
            None if site.guard is None else _block(site.guard, number * inputs, inputs),
        )
        for number in range(groups)
    ]


def joined(parts: Sequence[FitSite], fits: Sequence[Fit]) -> Fit:
    """Returns the fit of all groups: a block-diagonal weight, and errors over all their outputs.

    `alpha` is the median of the groups', `damping` the largest, `guard_share` the least.
    """
    first = fits[0]
    fitted = [_energy(part, [g for g in (part.gram, part.held_out) if g]) for part in parts]
    guards = [_energy(part, [part.guard] if part.guard else []) for part in parts]

    def over_all(errors: Sequence[float], energies: Sequence[float]) -> float:
        squares = (error**2 * own for error, own in zip(errors, energies, strict=True) if own)
        total = sum(energies)
        return (sum(squares) / total) ** 0.5 if total else 0.0

    def on_guard(errors: Sequence[float | None]) -> float | None:
        known = [error for error in errors if error is not None]
        return over_all(known, guards) if len(known) == len(guards) else None

    return replace(
        first,
        weights=(torch.block_diag(*(fit.weight for fit in fits)),),
        error=over_all([fit.error for fit in fits], fitted),
        baseline_error=over_all([fit.baseline_error for fit in fits], fitted),
        guard_error=on_guard([fit.guard_error for fit in fits]),
        guard_baseline_error=on_guard([fit.guard_baseline_error for fit in fits]),
        guard_share=min(fit.guard_share for fit in fits),
        alpha=statistics.median_low(fit.alpha for fit in fits),
        damping=max(fit.damping for fit in fits),
        retries=sum(fit.retries for fit in fits),
        shifts=None
        if first.shifts is None
        else (torch.cat([fit.shifts[0] for fit in fits if fit.shifts is not None]),),
    )


def _block(gram: Gram, start: int, size: int) -> Gram:
    """Returns the Gram of a range of channels, without the drift."""
    sums = gram.readable()
    index = torch.arange(start, start + size, device=sums.packed.device)
    block = Gram(size, gram.device, gram.name)
    own = block.parts()
    own["packed"].copy_(pack(gather(sums.packed, gram.channels, index, index)))
    for name, tensor in gram.parts().items():
        if name in ("sum", "nonfinite"):
            own[name].copy_(tensor[start : start + size])
        elif name in ("tokens", "samples", "dropped"):
            own[name].copy_(tensor)
    return block


def _of_group(reduction: Reduction, start: int, size: int, kept: int) -> Selection:
    """Returns the part of a selection in one group."""
    if not isinstance(reduction, Selection):
        raise InputError("the channels of a grouped convolution are selected, not folded")
    own = reduction.index[(reduction.index >= start) & (reduction.index < start + size)] - start
    if len(own) != kept:
        raise InputError(
            "equally many channels must stay in each group of a grouped convolution, as "
            "view.width.best(scores) gives them; the selector answered others"
        )
    return Selection(own, size)


def _energy(part: FitSite, grams: Sequence[Gram]) -> float:
    """Returns the sum of squares of a group's outputs, ‖W X‖², over the tokens of some Grams."""
    weight = part.weights[0].double()
    dense = (gram.matrix().double() for gram in grams)
    return sum(float((weight @ gram).mul(weight).sum()) for gram in dense)
