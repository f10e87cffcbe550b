"""The drift of a compressed network from the dense one, for a consumer: C = Σ δ·xᵀ.

In a closed loop a block's inputs contain the errors of the blocks before it. With the dense
consumer W, the compressed network's stream is r + W·x after the site, the dense network's is h.
Their difference is the drift

    δ = h − (r + W·x)   [O]

and a consumer with the target W·x + β·δ, not W·x, corrects a share β of it. A fit needs its cross
moment with the consumer's input, a product of 2·T·O·H FLOPs, which runs on tensor cores for inputs
of 16 bits (`grail_kernels.add_products`). A fit of biases also needs the sum d = Σ δ. δ itself is
formed in fp32: the difference of separate sums of h·xᵀ and (r + W·x)·xᵀ would be lost in their
rounding.

The outputs of a token's experts are summed by the router's weights w. The target of each contains
its share of the token's drift, δ·w/Σw² (`grail.networks.layers.Routed`), so that the sum is δ.
"""

import torch
from torch import Tensor

from grail.errors import NonFiniteError
from grail_kernels import add_products


class Drift:
    """Accumulates C = Σ δ xᵀ [O, H] in fp32, and Σ δ [O] and Σ|δ|² in fp64.

    Args:
        outputs, channels: O and H.
        device: where the sums live.
    """

    @torch.inference_mode(False)  # so that it can be updated outside, too
    def __init__(self, outputs: int, channels: int, device: torch.device):
        self.cross = torch.zeros(outputs, channels, dtype=torch.float32, device=device)
        self.sum = torch.zeros(outputs, dtype=torch.float64, device=device)
        self.energy = torch.zeros((), dtype=torch.float64, device=device)

    @property
    def outputs(self) -> int:
        """The number of outputs O."""
        return self.cross.shape[0]

    def update(self, drift: Tensor, x: Tensor, mask: Tensor | None) -> None:
        """Adds the drift [..., O] of the tokens `x` [..., H] that `mask` [...] counts."""
        drift, x = (t.reshape(-1, t.shape[-1]) for t in (drift, x))
        if mask is not None:
            drift, x = (_counted(t, mask.flatten()) for t in (drift, x))
        drift = drift.float()
        add_products(self.cross, drift, x)
        self.sum += drift.sum(0, dtype=torch.float64)
        # Not from fp32 squares, which overflow where C does not.
        self.energy += torch.linalg.vector_norm(drift, dtype=torch.float64).square()

    def merge(self, other: "Drift") -> None:
        """Adds the sums of `other`."""
        self.cross += other.cross.to(self.cross.device)
        self.sum += other.sum.to(self.sum.device)
        self.energy += other.energy.to(self.energy.device)

    def require_finite(self, label: str) -> None:
        """Raises NonFiniteError where a sum is NaN or infinite."""
        bad = ~(self.cross.isfinite().all(1) & self.sum.isfinite())
        if bool(bad.any()):
            _refuse(bad, label)


def _counted(tokens: Tensor, mask: Tensor) -> Tensor:
    """Returns the tokens [T, N] that a mask [T] counts; on a GPU all, the others as zeros."""
    if tokens.device.type == "cpu":
        return tokens[mask]
    # Their number is not read, which would stall the stream. Masked values may be NaN, so they are
    # replaced, not multiplied by 0.
    return tokens.where(mask[:, None], 0)


def require_finite(drift: Tensor, label: str) -> None:
    """Raises NonFiniteError where a drift [..., O] is NaN or infinite."""
    if not bool(drift.sum(dtype=torch.float64).isfinite()):
        _refuse((~drift.isfinite()).reshape(-1, drift.shape[-1]).sum(0), label)


def _refuse(counts: Tensor, label: str) -> None:
    outputs = counts.nonzero().flatten().tolist()
    raise NonFiniteError(f"drift at {label}", outputs, int(counts.sum()))
