"""Magnitude: the L2 norm of everything that writes a channel. Needs no data.

Source: He et al., "Soft filter pruning" (IJCAI 2018), after Li et al., "Pruning filters for
efficient ConvNets" (ICLR 2017).
"""

import torch
from torch import Tensor

from grail.select import View, register


@register("magnitude")
def magnitude(view: View) -> Tensor:
    """Returns ‖producer row h‖₂ [H]."""
    return torch.linalg.vector_norm(view.rows, dim=1)
