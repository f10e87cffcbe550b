"""A site is one hidden activation: producers write its channels, a consumer reads them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grail.reduction import Reduction
from grail.transaction import Transaction
from grail.width import Width


@dataclass(frozen=True, eq=False)
class Site(ABC):
    """One hidden activation of one block.

    `name`: "model.layers.3.mlp"; `kind`: "mlp" or "heads"; `consumer`: the layer whose input is the
    activation; `upstream`: modules of the block that run before the site and that narrowing it does
    not touch; `after`: the module whose input is the residual stream right after the consumer was
    added to it, None if that is the block's output.
    """

    name: str
    kind: str
    block: int
    consumer: nn.Linear
    upstream: tuple[nn.Module, ...]
    after: nn.Module | None

    @property
    def channels(self) -> int:
        """H, the consumer's input width."""
        return self.consumer.in_features

    @abstractmethod
    def linears(self) -> dict[str, nn.Linear]:
        """Every layer that narrowing rewrites, by its name in the block."""

    @abstractmethod
    def producers(self) -> tuple[Tensor, ...]:
        """Weights [H, ...] whose row h writes channel h."""

    @abstractmethod
    def width(self, keep: float, multiple: int | None) -> Width:
        """The feasible width nearest to `keep`."""

    @abstractmethod
    def narrow(self, reduction: Reduction, width: Width, transaction: Transaction) -> None:
        """Narrows the producers, and the block's record of its sizes; not the consumer."""

    def parameters_saved(self, width: Width) -> int:
        """How many parameters fewer the block has at `width`."""
        before = sum(p.numel() for linear in self.linears().values() for p in linear.parameters())
        return before - self.parameters_at(width)

    @abstractmethod
    def parameters_at(self, width: Width) -> int:
        """Parameters of `linears()` at `width`."""


class Architecture(ABC):
    """A model as a chain of blocks, each with sites in the order in which they run.

    `name`: the model, for people. `hidden_size`: values of one token between blocks.
    `activations_per_token`: values of one token that live at once inside a block's forward, for
    the prediction of memory.
    """

    name: str
    kinds: tuple[str, ...]
    blocks: Sequence[nn.Module]
    hidden_size: int
    activations_per_token: int

    @property
    def device(self) -> torch.device:
        """Where the blocks are."""
        return next(self.blocks[0].parameters()).device

    @property
    def element_size(self) -> int:
        """Bytes of one weight."""
        return next(self.blocks[0].parameters()).element_size()

    @abstractmethod
    def sites(self, kinds: Sequence[str]) -> list[list[Site]]:
        """For each block its sites of those kinds."""

    @abstractmethod
    def settle(self, widths: dict[str, Width], transaction: Transaction) -> None:
        """Writes the new widths, one for each kind, into the model's configuration."""


def narrow_linear(linear: nn.Linear, reduction: Reduction, transaction: Transaction) -> None:
    """Narrows a producer's output channels: R·weight and R·bias."""
    bias = None if linear.bias is None else reduction.narrow(linear.bias.detach())
    transaction.set_linear(linear, reduction.narrow(linear.weight.detach()), bias)
