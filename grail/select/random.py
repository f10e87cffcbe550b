"""Random: the floor that every selector has to beat. Seeded by run and site."""

import torch
from torch import Tensor

from grail.select import View, scores


@scores("random")
def random(view: View) -> Tensor:
    """Independent uniform scores [H]; whole heads get one score."""
    width = view.width
    block = getattr(width, "head_dim", 1)
    drawn = torch.rand(width.channels // block, generator=view.generator, dtype=torch.float32)
    return drawn.repeat_interleave(block)
