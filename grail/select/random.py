"""Random: the lower bound for every selector. Seeded by run and site."""

import torch
from torch import Tensor

from grail.select import View, register


@register("random")
def random(view: View) -> Tensor:
    """Returns independent uniform scores [H]; whole heads get one score."""
    width = view.width
    block = getattr(width, "head_dim", 1)
    drawn = torch.rand(width.channels // block, generator=view.generator, dtype=torch.float32)
    return drawn.repeat_interleave(block)
