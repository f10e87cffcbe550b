"""What a selector sees of one site."""

from dataclasses import dataclass

import torch
from torch import Tensor

from grail.algebra.gram import Gram
from grail.algebra.width import Width


@dataclass(frozen=True)
class View:
    """One site: weights, statistics, and the width that it must come to.

    `producers`: weights [H, ...] whose row h writes channel h (of grouped attention, keys and
    values repeated to their query heads). `consumer`: [O, H]; of several consumers, or of a
    convolution's taps, all rows stacked along O. `gram`: of the consumer's input. `generator`:
    seeded by run and site, for selectors that draw. `gradient`: [O, H] fp32, root mean square over
    calibration sequences of the gradient of the block output's L2 norm with respect to the
    consumer's weight; only for selectors that `select.needs_gradient`. `drift_correction`: the
    share β in [0, 1] of the drift that the Gram recorded (`grail.drift`) which the consumer is
    expected to undo; a Gram that is beside one of a convolution's taps records none. `consumers`:
    whose inputs the Gram adds up.
    """

    producers: tuple[Tensor, ...]
    consumer: Tensor
    gram: Gram
    width: Width
    generator: torch.Generator
    gradient: Tensor | None = None
    drift_correction: float = 0.0
    consumers: int = 1

    @property
    def drifted(self) -> Tensor | None:
        """C = Σ δ xᵀ [O, H] fp32, of which the consumer is to say β; None if there is none."""
        return self.gram.drift.cross if self.gram.drift and self.drift_correction else None

    @property
    def rows(self) -> Tensor:
        """What writes each channel, all producers side by side: [H, D] fp32."""
        return torch.cat([p.float().reshape(len(p), -1) for p in self.producers], dim=1)
