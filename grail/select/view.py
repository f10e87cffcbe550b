"""The input of a selector: one site's weights, statistics and width."""

from dataclasses import dataclass

import torch
from torch import Tensor

from grail.algebra.gram import Gram
from grail.algebra.width import Width


@dataclass(frozen=True)
class View:
    """One site: weights, statistics and target width.

    Args:
        producers: weights [H, ...] whose row h writes channel h (for grouped attention, keys and
            values repeated to their query heads).
        consumer: [O, H]; of several consumers, or of taps, all rows stacked along O.
        gram: of the consumer's input.
        width: the number of channels to keep.
        generator: seeded by run and site, for selectors that draw.
        gradient: [O, H] fp32, root mean square over calibration sequences of the gradient of the
            block output's L2 norm with respect to the consumer's weight; only for selectors that
            need it.
        drift_correction: the share β in [0, 1] of the recorded drift (`grail.algebra.drift`) that
            the consumer is expected to correct.
        consumers: the number of consumers whose inputs the Gram sums.
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
        """C = Σ δ·xᵀ [O, H] fp32, of which the consumer corrects a share β; None without drift."""
        return self.gram.drift.cross if self.gram.drift and self.drift_correction else None

    @property
    def rows(self) -> Tensor:
        """The weights that write each channel, all producers side by side: [H, D] fp32."""
        return torch.cat([p.float().reshape(len(p), -1) for p in self.producers], dim=1)
