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
        """C = Σ δ·xᵀ [O, H] fp32, of which the consumer corrects a share β; None without drift.

        Of a recorded target it costs a product of 2·O·H² FLOPs; `add_drift` needs none.
        """
        drift = self.gram.drift
        if drift is None or not self.drift_correction:
            return None
        if not drift.of_target:
            return drift.cross * self.gram.drift_scale
        return torch.addmm(drift.cross, self.consumer.to(drift.cross), self.gram.matrix(), alpha=-1)

    def add_drift(self, seen: Tensor) -> Tensor:
        """Adds the drift's expected share to G·Wᵀ [H, O], in place; returns it.

        The result is the correlation of the channels with the target W·X + β·δ.
        """
        drift, share = self.gram.drift, self.drift_correction
        if drift is None or not share:
            return seen
        if drift.of_target:  # (1 − β) W x + β t
            return seen.mul_(1 - share).add_(drift.cross.mT, alpha=share)
        return seen.add_(drift.cross.mT, alpha=share * self.gram.drift_scale)

    @property
    def rows(self) -> Tensor:
        """The weights that write each channel, all producers side by side: [H, D] fp32."""
        return torch.cat([p.float().reshape(len(p), -1) for p in self.producers], dim=1)
