"""The drift of a compressed network from the dense one, for a consumer: C = Σ δ·xᵀ.

In a closed loop a block's inputs contain the errors of the blocks before it. With the dense
consumer W, the compressed network's stream is r + W·x after the site, the dense network's is h.
Their difference is the drift

    δ = h − (r + W·x)   [O]

and a consumer with the target W·x + β·δ, not W·x, corrects a share β of it. A fit needs its cross
moment with the consumer's input, a product of 2·T·O·H FLOPs, which runs on tensor cores for inputs
of 16 bits (`grail_kernels.Products`). A fit of biases also needs the sum d = Σ δ. There are two
forms.

**Drift.** δ is formed in fp32 and C summed. It may be recorded for a part of the tokens: C, d and
Σ|δ|² are then scaled by tokens / drift tokens.

**Target.** The network need not run the consumer: with t = h − r, compared with W·x without a bias,

    T = Σ t·xᵀ,   C = T − W·G,   d = Σ t − W·Σ x

It needs t for every token. The difference loses what the rounding of T and of W·G, 1e-7 of either,
hides; a drift that is far smaller than W·x is recorded in the other form.

The outputs of a token's experts are summed by the router's weights w. The target of each contains
its share of the token's drift, δ·w/Σw² (`grail.networks.layers.Routed`), so that the sum is δ.
"""

import torch
from torch import Tensor

from grail.algebra.sums import channel_sums, serial_parts
from grail.errors import NonFiniteError
from grail_kernels import Products


class Drift:
    """Accumulates C = Σ δ xᵀ [O, H] in fp32, Σ δ [O] and Σ|δ|² in fp64, and the number of tokens.

    Args:
        outputs, channels: O and H.
        device: where the sums live.
        of_target: whether they are sums of the target t instead of δ.
    """

    @torch.inference_mode(False)  # so that it can be updated outside, too
    def __init__(self, outputs: int, channels: int, device: torch.device, of_target: bool = False):
        self.of_target = of_target
        self._cross = torch.zeros(outputs, channels, dtype=torch.float32, device=device)
        self._products = Products(self._cross)
        self.sum = torch.zeros(outputs, dtype=torch.float64, device=device)
        self.energy = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def form(self) -> tuple[int, bool]:
        """The number of outputs and `of_target`; sums of one form add up."""
        return self.outputs, self.of_target

    @property
    def outputs(self) -> int:
        """The number of outputs O."""
        return self._cross.shape[0]

    @property
    def cross(self) -> Tensor:
        """C or T [O, H], with the tokens that waited."""
        self._products.flush()
        return self._cross

    def update(
        self, drift: Tensor, x: Tensor, mask: Tensor | None, total: Tensor | None = None
    ) -> None:
        """Adds δ or t [..., O] of the tokens `x` [..., H] that `mask` [...] counts.

        `total`: the sum of `drift` over those tokens, [O] fp64, where it is known.
        """
        drift, x = (t.reshape(-1, t.shape[-1]) for t in (drift, x))
        self.tokens += len(x) if mask is None else mask.sum()
        if mask is not None:
            drift, x = (_counted(t, mask.flatten()) for t in (drift, x))
        drift = drift.float()
        self._products.add(drift, x)
        self.sum += channel_sums(drift, torch.float64) if total is None else total
        for part in serial_parts(drift):
            # Not from fp32 squares, which overflow where C does not.
            self.energy += torch.linalg.vector_norm(part, dtype=torch.float64).square()

    def merge(self, other: "Drift") -> None:
        """Adds the sums of `other`, of the same form."""
        own = self.parts()
        for name, tensor in other.parts().items():
            own[name].add_(tensor.to(self.cross.device))

    def parts(self) -> dict[str, Tensor]:
        """Returns all sums and counts, by name: they add up where drifts do."""
        return {
            "cross": self.cross,
            "sum": self.sum,
            "energy": self.energy,
            "tokens": self.tokens,
        }

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


def finite_sums(drift: Tensor, label: str) -> Tensor:
    """Returns the sum of a drift [..., O] over its tokens, [O] fp64.

    Raises:
        NonFiniteError: a value is NaN or infinite.
    """
    total = channel_sums(drift, torch.float64)
    if not bool(total.isfinite().all()):
        _refuse((~drift.isfinite()).reshape(-1, drift.shape[-1]).sum(0), label)
    return total


def _refuse(counts: Tensor, label: str) -> None:
    outputs = counts.nonzero().flatten().tolist()
    raise NonFiniteError(f"drift at {label}", outputs, int(counts.sum()))
