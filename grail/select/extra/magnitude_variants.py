"""Magnitude by another norm, or by what reads a channel. Needs no data.

"magnitude-l1" is the L1 norm of the producers' rows, "magnitude-consumers" the L2 norm of the
consumer's columns, "magnitude-both" that of rows and columns together.

Source: Li et al., "Pruning filters for efficient ConvNets" (ICLR 2017): the L1 norm of the filters
that write a channel.
"""

import torch
from torch import Tensor

from grail.select import View, register


@register("magnitude-l1")
def magnitude_l1(view: View) -> Tensor:
    """Returns ‖producer row h‖₁ [H]."""
    return torch.linalg.vector_norm(view.rows, ord=1, dim=1)


@register("magnitude-consumers")
def magnitude_consumers(view: View) -> Tensor:
    """Returns ‖consumer column h‖₂ [H]."""
    return torch.linalg.vector_norm(view.consumer.float().T, dim=1)


@register("magnitude-both")
def magnitude_both(view: View) -> Tensor:
    """Returns ‖producer row h, consumer column h‖₂ [H]."""
    return torch.linalg.vector_norm(torch.cat([view.rows, view.consumer.float().T], 1), dim=1)
