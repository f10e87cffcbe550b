"""The reductions of several sites of equal sizes, as one batch: what a fit needs of packed Grams.

E sites of H channels each, of which K stay. Those of a layer's experts are fitted together; a
single site is a batch of one. All products are in fp64, on operands that are gathered from the
packed sums: no dense G is formed for selections.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import grail_kernels as gk
from grail.algebra.reduction import Reduction, Selection

# Rows of an unpacked G that are converted to fp64 at a time.
ROWS = 1024
# Panels of a symmetric product's columns: with 4 it takes 5/8 of all FLOPs, and 0.75 of the time of
# a whole product of 768 channels; narrower ones make slower products.
PANELS = 4


class Reductions(ABC):
    """The maps R [E, K, H] of E sites.

    `lost` [E, D]: channels outside of which V = W − W₀R is zero by construction.
    """

    channels: int
    kept: int
    lost: Tensor

    @abstractmethod
    def split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns W₀ [E, O, K] and V [E, O, D] of consumers [E, O, H], in fp64."""

    @abstractmethod
    def restrict(self, columns: Tensor) -> Tensor:
        """Returns columns·Rᵀ: [E, O, H] → [E, O, K] in fp64."""

    @abstractmethod
    def columns_of_lost(self, columns: Tensor) -> Tensor:
        """Returns the columns `lost` [E, O, D] of matrices [E, O, H]."""

    @abstractmethod
    def normal(self, packed: Tensor) -> Tensor:
        """Returns R·G·Rᵀ [E, K, K] in fp64."""

    @abstractmethod
    def absorb(self, left_out: Tensor, packed: Tensor) -> Tensor:
        """Returns V·G·Rᵀ [E, O, K] for V [E, O, D]."""

    @abstractmethod
    def energy(self, left_out: Tensor, packed: Tensor) -> Tensor:
        """Returns tr(V·G·Vᵀ) [E] for V [E, O, D]."""


def together(reductions: Sequence[Reduction], device: torch.device) -> Reductions:
    """Returns reductions of equal sizes as one batch on a device."""
    selections = [each for each in reductions if isinstance(each, Selection)]
    if len(selections) == len(reductions):
        return _Selections(selections, device)
    return _Maps(reductions, device)


class _Selections(Reductions):
    """Selections: every term is a part of G."""

    def __init__(self, selections: Sequence[Selection], device: torch.device):
        self.channels, self.kept = selections[0].channels, selections[0].kept
        kept = torch.stack([selection.index for selection in selections])
        dropped = torch.ones(len(kept), self.channels, dtype=torch.bool).scatter_(1, kept, False)
        # Each row has equally many; in ascending order.
        lost = dropped.byte().argsort(dim=1, descending=True, stable=True)
        lost = lost[:, : self.channels - self.kept]
        self._kept, self.lost = kept.to(device), lost.to(device)

    def split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return self.restrict(weight), self.columns_of_lost(weight).double()

    def restrict(self, columns: Tensor) -> Tensor:
        return _columns(columns, self._kept).double()

    def columns_of_lost(self, columns: Tensor) -> Tensor:
        return _columns(columns, self.lost)

    def normal(self, packed: Tensor) -> Tensor:
        return self._part(packed, self._kept, self._kept)

    def absorb(self, left_out: Tensor, packed: Tensor) -> Tensor:
        return gk.absorb(left_out, packed, self._kept, drop=self.lost, dtype=torch.float64)

    def energy(self, left_out: Tensor, packed: Tensor) -> Tensor:
        total = left_out.new_zeros(len(left_out))
        for part in _panels(left_out.shape[2]):
            rows = self.lost[:, : part.stop]
            total += _panel_energy(left_out, self._part(packed, rows, self.lost[:, part]), part)
        return total

    def _part(self, packed: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return gk.gather(packed, self.channels, rows, columns, torch.float64)


class _Maps(Reductions):
    """Any reductions: G is unpacked, and each site's terms are formed by its own."""

    def __init__(self, reductions: Sequence[Reduction], device: torch.device):
        self._each = list(reductions)
        self.channels, self.kept = reductions[0].channels, reductions[0].kept
        every = torch.arange(self.channels, device=device)
        self.lost = every.expand(len(reductions), -1)

    def split(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        weight = weight.double()
        plain = self._over(weight, lambda reduction, of_site: reduction.absorb(of_site))
        lifted = self._over(plain, lambda reduction, of_site: reduction.lift(of_site))
        return plain, weight - lifted

    def restrict(self, columns: Tensor) -> Tensor:
        # Widened first: a mean would be rounded.
        return self._over(columns.double(), lambda reduction, of_site: reduction.restrict(of_site))

    def columns_of_lost(self, columns: Tensor) -> Tensor:
        return columns

    def normal(self, packed: Tensor) -> Tensor:
        dense = gk.unpack(packed, self.channels)
        return self._over(dense, lambda reduction, of_site: reduction.normal(of_site))

    def absorb(self, left_out: Tensor, packed: Tensor) -> Tensor:
        return self.restrict(self._products(left_out, packed))

    def energy(self, left_out: Tensor, packed: Tensor) -> Tensor:
        return inner(self._products(left_out, packed), left_out)

    def _products(self, left_out: Tensor, packed: Tensor) -> Tensor:
        """Returns V·G [E, O, H]."""
        total, dense = torch.zeros_like(left_out), gk.unpack(packed, self.channels)
        for low in range(0, self.channels, ROWS):
            part = slice(low, low + ROWS)
            total.baddbmm_(left_out[:, :, part], dense[:, part].double())
        return total

    def _over(self, batch: Tensor, form: Callable[[Reduction, Tensor], Tensor]) -> Tensor:
        return torch.stack([form(*pair) for pair in zip(self._each, batch, strict=True)])


def symmetric_energy(left: Tensor, normal: Tensor) -> Tensor:
    """Returns tr(L·A·Lᵀ) [E] for L [E, O, K] and a symmetric A [E, K, K], by half of A."""
    total = left.new_zeros(len(left))
    for part in _panels(left.shape[2]):
        total += _panel_energy(left, normal[:, : part.stop, part], part)
    return total


def _panels(columns: int) -> Iterator[slice]:
    width = max(1, -(-columns // PANELS))
    for low in range(0, columns, width):
        yield slice(low, min(low + width, columns))


def _panel_energy(left: Tensor, columns: Tensor, part: slice) -> Tensor:
    """Returns the share of tr(L·A·Lᵀ) of a panel of A's columns, from the first row to the last."""
    panel = left[:, :, part]
    above = left[:, :, : part.start] @ columns[:, : part.start]
    return 2 * inner(above, panel) + inner(panel @ columns[:, part.start :], panel)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Returns the sums of products [E] of two batches [E, ...]."""
    return torch.bmm(a.reshape(len(a), 1, -1), b.reshape(len(b), -1, 1)).view(-1)


def _columns(batch: Tensor, index: Tensor) -> Tensor:
    """Returns columns [E, O, N] of matrices [E, O, H] by numbers [E, N]."""
    if len(batch) == 1:  # a copy of rows instead of one look-up a value
        return batch.index_select(2, index[0])
    return batch.gather(2, index[:, None].expand(-1, batch.shape[1], -1))
