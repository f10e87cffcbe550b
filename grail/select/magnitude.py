"""Magnitude: the L2 norm of everything that writes a channel. Needs no data.

Source: Li et al., "Pruning filters for efficient ConvNets" (ICLR 2017), with the L2 norm, summed in
squares over a site's producers.
"""

import torch
from torch import Tensor

from grail.select import View, scores


@scores("magnitude")
def magnitude(view: View) -> Tensor:
    """‖producer rows of h‖₂ [H]."""
    squares = torch.stack([p.float().flatten(1).square().sum(1) for p in view.producers])
    return squares.sum(0).sqrt()
