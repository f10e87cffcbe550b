"""What a selector sees of one site."""

from dataclasses import dataclass

import torch
from torch import Tensor

from grail.gram import Gram
from grail.width import Width


@dataclass(frozen=True)
class View:
    """One site: weights, statistics, and the width that it must come to.

    `producers`: weights [H, ...] whose row h writes channel h (of grouped attention, keys and
    values repeated to their query heads). `consumer`: [O, H]. `gram`: of the consumer's input.
    `generator`: seeded by run and site, for selectors that draw.
    """

    producers: tuple[Tensor, ...]
    consumer: Tensor
    gram: Gram
    width: Width
    generator: torch.Generator
