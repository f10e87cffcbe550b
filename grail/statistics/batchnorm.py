"""Batch norm's statistics, made anew for a network that was changed: the reset of REPAIR.

Averages of filters have less variance than filters, so behind a folded layer the statistics that
batch norm remembers are too wide, and the signal fades from layer to layer.

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
    """Sets the running mean and variance of a batch norm to those of its inputs [N, C, ...].

    As torch does, the variance is the unbiased one. Two reads, for a variance without cancellation.
    `total` adds the sums of other processes, which read other inputs.
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
