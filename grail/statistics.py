"""What a run collects of one site: the Gram of most sequences, and the Gram of those held out."""

from torch import Tensor

from grail.gram import Gram
from grail.sites import Site
from grail.stream import Stream


class Statistics:
    """The Grams of one site, fed batch by batch.

    Args:
        site: whose consumer's input is summed up.
        stream: the calibration set.
        holds_out: whether every fifth sequence goes to a Gram of its own.

    `train`: for selection and fit. `held_out`: for what is chosen; None if it has no token.
    """

    def __init__(self, site: Site, stream: Stream, holds_out: bool):
        self._stream = stream
        self.train = Gram(site.channels, device=stream.device, name=site.name)
        self._held_out = Gram(site.channels, device=stream.device, name=site.name)
        self._holds_out = holds_out

    def update(self, batch: int, x: Tensor, drift: Tensor | None = None) -> None:
        """Adds the consumer's input [B, L, H] of one batch, and the drift [B, L, O] after it."""
        mask = self._stream.mask(batch)
        held = self._stream.held_out(batch) if self._holds_out else None
        if held is None:
            self.train.update(x, mask, drift)
            return
        for gram, rows in ((self.train, ~held), (self._held_out, held)):
            if bool(rows.any()):
                parts = (None if t is None else t[rows] for t in (mask, drift))
                gram.update(x[rows], *parts)

    @property
    def held_out(self) -> Gram | None:
        return self._held_out if self._held_out.tokens and self.train.tokens else None

    @property
    def tokens(self) -> int:
        """Tokens of both."""
        return self.train.tokens + self._held_out.tokens
