"""Batch norm statistics of a changed network, measured again: the reset of REPAIR.

Averages of filters have less variance than filters. After a folded layer the running statistics of
batch norm are therefore too wide, and the signal fades from layer to layer.

Source: Jordan et al., "REPAIR: renormalizing permuted activations for interpolation repair" (ICLR
2023); without labels or gradients, from the calibration's own forward passes.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from grail.runtime.transaction import Transaction


def reset_norm(
    norm: Any,
    inputs: Callable[[], Iterable[Tensor]],
    change: Transaction,
    total: Callable[[Tensor], Tensor],
) -> None:
    """Sets the running mean and variance of a batch norm to those of its inputs.

    The variance is the unbiased one, as in torch.

    Args:
        norm: a batch norm with running statistics.
        inputs: yields its inputs [N, C, ...]; called twice, for a variance without cancellation.
        change: through which the norm is changed.
        total: adds the sums of other processes, which read other inputs.
    """
    mean = torch.zeros_like(norm.running_mean, dtype=torch.float64)
    squares, seen = torch.zeros_like(mean), 0
    for x in inputs():
        mean += _by_channel(x).sum(1)
        seen += x.numel() // x.shape[1]
    count = int(total(torch.tensor(seen, dtype=torch.int64)))
    mean = total(mean) / count
    for x in inputs():
        squares += (_by_channel(x) - mean[:, None]).square().sum(1)
    change.set_buffer(norm, "running_mean", mean)
    change.set_buffer(norm, "running_var", total(squares) / max(count - 1, 1))


def _by_channel(x: Tensor) -> Tensor:
    return x.double().transpose(0, 1).flatten(1)
