"""Reductions: the linear map R [K, H] from a site's H channels to the K that stay.

A selection keeps rows of the identity; a folding averages clusters. Each is stored as an
index or as labels, never as a dense R, and computes the products that the fit is built from.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from grail.errors import InputError
from grail_kernels import as_vector, check_count


class Reduction(ABC):
    """A map R [K, H] that narrows `channels` = H channels to `kept` = K."""

    channels: int
    kept: int

    @abstractmethod
    def narrow(self, weight: Tensor) -> Tensor:
        """Returns R·weight: a producer's weight [H, ...] or bias [H], narrowed to K rows."""

    @abstractmethod
    def restrict(self, columns: Tensor) -> Tensor:
        """Returns columns·Rᵀ: [..., H] → [..., K]."""

    @abstractmethod
    def absorb(self, weight: Tensor) -> Tensor:
        """Returns the consumer [O, K] of plain pruning or folding, from dense `weight` [O, H]."""

    @abstractmethod
    def lift(self, columns: Tensor) -> Tensor:
        """Returns columns·R: [..., K] → [..., H]."""

    def left_out(self, weight: Tensor, baseline: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the part of a consumer that plain reduction omits, V = W − W₀·R.

        Returns:
            The channels [D] outside of which V is zero by construction, and V there, [O, D].
        """
        every = torch.arange(self.channels, device=weight.device)
        return every, weight - self.lift(baseline)

    def normal(self, gram: Tensor) -> Tensor:
        """Returns R·G·Rᵀ [K, K] in fp64 for a Gram matrix [H, H]."""
        return self.restrict(self.narrow(gram.double()))

    @abstractmethod
    def repeat(self, times: int) -> "Reduction":
        """Returns the same map for channels of `times` adjacent columns each, such as taps."""

    @property
    def is_identity(self) -> bool:
        """Returns whether every channel keeps its place."""
        return False

    def _check(self, size: int) -> None:
        if size != self.channels:
            raise InputError(
                f"a reduction of {self.channels} channels met a tensor of {size} channels; "
                "build it with the site's own channel count"
            )


class Selection(Reduction):
    """Keeps the channels in `index`, in that order.

    Args:
        index: [K] integers in [0, channels), each at most once; or a mask [channels] of bool, True
            where a channel stays. A tensor, numpy array, list, tuple or range.
        channels: H.

    Raises:
        InputError: an index that is empty, repeated, out of range or not an integer; a mask of
            another length.
    """

    def __init__(self, index: Tensor | Sequence[int], channels: int):
        check_count("channels", channels)
        self.channels = int(channels)
        self.index = _integers(index, "index", self.channels)
        self.kept = self.index.numel()
        if self.kept == 0:
            raise InputError("a selection must keep at least one channel; the index is empty")
        if int(self.index.min()) < 0 or int(self.index.max()) >= self.channels:
            raise InputError(
                f"channel indices must lie in [0, {self.channels}); got "
                f"{int(self.index.min())} … {int(self.index.max())}"
            )
        if self.index.unique().numel() != self.kept:
            raise InputError(
                "a selection names each channel at most once; the index repeats some (labels of "
                "clusters are for grail.Folding)"
            )

    def narrow(self, weight: Tensor) -> Tensor:
        self._check(weight.shape[0])
        return weight.index_select(0, self.index.to(weight.device))

    def restrict(self, columns: Tensor) -> Tensor:
        self._check(columns.shape[-1])
        return columns.index_select(-1, self.index.to(columns.device))

    def absorb(self, weight: Tensor) -> Tensor:
        return self.restrict(weight)

    def lift(self, columns: Tensor) -> Tensor:
        every = columns.new_zeros((*columns.shape[:-1], self.channels))
        return every.index_copy_(-1, self.index.to(columns.device), columns)

    def left_out(self, weight: Tensor, baseline: Tensor) -> tuple[Tensor, Tensor]:
        dropped = torch.ones(self.channels, dtype=torch.bool)
        dropped[self.index] = False
        lost = dropped.nonzero().flatten().to(weight.device)
        return lost, weight[:, lost]

    def normal(self, gram: Tensor) -> Tensor:
        # Picks before it widens, so that G need not be held in fp64.
        return self.restrict(self.narrow(gram)).double()

    def repeat(self, times: int) -> "Selection":
        if times == 1:
            return self
        return Selection(_repeated(self.index, times), self.channels * times)

    @property
    def is_identity(self) -> bool:
        whole = self.kept == self.channels
        return whole and torch.equal(self.index, torch.arange(self.channels))

    def __repr__(self) -> str:
        return f"Selection({self.kept} of {self.channels} channels)"


class Folding(Reduction):
    """Replaces each cluster of channels by its mean.

    Args:
        labels: [H] integers; channel h belongs to cluster labels[h]; every cluster of 0 … K-1 has a
            member.

    Raises:
        InputError: labels that are empty, negative, not integers, or leave a cluster empty.
    """

    def __init__(self, labels: Tensor | Sequence[int]):
        self.labels = _integers(labels, "labels")
        self.channels = self.labels.numel()
        if self.channels == 0 or int(self.labels.min()) < 0:
            raise InputError("labels must be a non-empty vector of cluster numbers from 0")
        self.sizes = torch.bincount(self.labels)
        self.kept = self.sizes.numel()
        if int(self.sizes.min()) == 0:
            empty = int((self.sizes == 0).nonzero()[0])
            raise InputError(
                f"cluster {empty} of {self.kept} has no channel; number clusters without gaps"
            )

    def narrow(self, weight: Tensor) -> Tensor:
        self._check(weight.shape[0])
        total = weight.new_zeros((self.kept, *weight.shape[1:]), dtype=_accumulator(weight))
        total.index_add_(0, self.labels.to(weight.device), weight.to(total.dtype))
        sizes = self.sizes.to(total).view(-1, *(1,) * (weight.dim() - 1))
        return (total / sizes).to(weight.dtype)

    def restrict(self, columns: Tensor) -> Tensor:
        total = self._sum_columns(columns)
        return (total / self.sizes.to(total)).to(columns.dtype)

    def absorb(self, weight: Tensor) -> Tensor:
        # Every member of a cluster is replaced by the mean, so the consumer's columns add up.
        return self._sum_columns(weight).to(weight.dtype)

    def lift(self, columns: Tensor) -> Tensor:
        means = columns / self.sizes.to(columns)
        return means.index_select(-1, self.labels.to(columns.device))

    def _sum_columns(self, columns: Tensor) -> Tensor:
        self._check(columns.shape[-1])
        total = columns.new_zeros((*columns.shape[:-1], self.kept), dtype=_accumulator(columns))
        return total.index_add_(-1, self.labels.to(columns.device), columns.to(total.dtype))

    def repeat(self, times: int) -> "Folding":
        if times == 1:
            return self
        return Folding(_repeated(self.labels, times))

    @property
    def is_identity(self) -> bool:
        whole = self.kept == self.channels
        return whole and torch.equal(self.labels, torch.arange(self.channels))

    def __repr__(self) -> str:
        return f"Folding({self.channels} channels into {self.kept} clusters)"


def _repeated(numbers: Tensor, times: int) -> Tensor:
    return (numbers[:, None] * times + torch.arange(times)).flatten()


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def as_reduction(given: object, channels: int) -> Reduction:
    """Returns a reduction unchanged, an index [K] or mask [channels] to keep as a `Selection`.

    Raises:
        InputError: neither, or one that does not fit.
    """
    if isinstance(given, Reduction):
        return given
    return Selection(as_vector("reduction", given), channels)


def _integers(values: object, name: str, channels: int | None = None) -> Tensor:
    """Returns integers [K] on the CPU; for a mask of `channels` the indices that are True."""
    vector = as_vector(name, values).cpu()
    if vector.dim() != 1:
        raise InputError(f"{name} must be a vector of channels; got shape {tuple(vector.shape)}")
    if vector.dtype == torch.bool and channels is not None:
        if len(vector) != channels:
            raise InputError(
                f"a mask must have an entry for each of {channels} channels; got {len(vector)}"
            )
        return vector.nonzero().flatten()
    if vector.numel() and (vector.is_floating_point() or vector.dtype == torch.bool):
        raise InputError(f"{name} must be integers; got {vector.dtype}")
    return vector.to(torch.int64)
