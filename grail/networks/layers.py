"""Narrowing of each kind of layer: rows that write channels, columns that read them.

    Producer    rows of a layer's weight (and its bias) write the channels of a site
    along       a layer between producer and consumer that treats every channel separately
    Consumer    columns of a layer's weight read the channels

The kinds of layers and their storage of weights are in `grail.algebra.kinds`. Another kind is
refused by name.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from grail.algebra.kinds import (
    INSTANCE_NORMS,
    MAPS,
    NORMS,
    as_matrix,
    as_stored,
    is_depthwise,
    require_own,
    require_plain,
    set_sizes,
    windows,
)
from grail.algebra.reduction import Reduction
from grail.errors import InputError, ModelError
from grail.runtime.transaction import Transaction


@dataclass(frozen=True, eq=False)
class Producer:
    """A layer whose rows write a site's channels.

    Args:
        parts: the roles of its rows, in order, as (role, rows): fused query, key and value rows are
            (("channels", H), ("groups", G), ("groups", G)). None: all are the site's channels.
        turn: the number of rows after which parts of equal size alternate; None: each part is
            contiguous.
    """

    name: str
    module: nn.Module
    parts: tuple[tuple[str, int], ...] | None = None
    turn: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        require_plain(self.name, self.module)
        if self.parts is not None and sum(n for _, n in self.parts) != len(self._rows()):
            raise ModelError(
                f"{self.name} has {len(self._rows())} rows, where its site expects "
                f"{' + '.join(str(n) for _, n in self.parts)}"
            )

    def rows(self, role: str = "channels") -> list[Tensor]:
        """Returns the weights [H, ...] of that role, one for each part."""
        weight = self._rows()
        if self.parts is None:
            return [weight] if role == "channels" else []
        pieces = weight.split([n for _, n in self.parts])
        return [piece for (r, _), piece in zip(self.parts, pieces, strict=True) if r == role]

    def narrow(self, reductions: Mapping[str, Reduction], transaction: Transaction) -> None:
        """Narrows the rows of each role, weight and bias."""
        module: Any = self.module
        weight = self._narrowed(_matrix(module), reductions)
        bias = None if module.bias is None else self._narrowed(module.bias.detach(), reductions)
        transaction.set_parameter(module, "weight", as_stored(module, weight))
        if bias is not None:
            transaction.set_parameter(module, "bias", bias)
        set_sizes(module, transaction)

    def values_per_row(self) -> int:
        """Returns the parameters of one row, its bias included."""
        module: Any = self.module
        return self._rows()[0].numel() + (module.bias is not None)

    def _rows(self) -> Tensor:
        return self._in_parts(_matrix(self.module))

    def _in_parts(self, rows: Tensor) -> Tensor:
        """Returns the rows, part by part."""
        if self.turn is None or self.parts is None:
            return rows
        return rows.unflatten(0, (-1, len(self.parts), self.turn)).movedim(1, 0).flatten(0, 2)

    def _narrowed(self, rows: Tensor, reductions: Mapping[str, Reduction]) -> Tensor:
        if self.parts is None:
            return reductions["channels"].narrow(rows)
        pieces = self._in_parts(rows).split([n for _, n in self.parts])
        narrow = [reductions[r].narrow(p) for (r, _), p in zip(self.parts, pieces, strict=True)]
        if self.turn is None:
            return torch.cat(narrow)
        return torch.stack([p.unflatten(0, (-1, self.turn)) for p in narrow], 1).flatten(0, 2)


@dataclass(frozen=True, eq=False)
class Routed:
    """The tokens that a router gave to a layer, and the layer's shares of their drift.

    Args:
        places: [N], indices into the flattened tokens of the batch.
        shares: [N], the part of a token's drift that this layer corrects. The sum of all layers'
            parts, weighted by the router, is the whole drift; of such shares these are the least
            squares, w/Σw².
    """

    places: Tensor
    shares: Tensor

    def drift(self, drift: Tensor) -> Tensor:
        """Returns this layer's part [N, O] of a drift [..., O] of the batch's tokens."""
        rows = drift.reshape(-1, drift.shape[-1])
        return rows[self.places] * self.shares[:, None]


# Called with a layer's input and, if it received only some of the batch's tokens, their routing.
Reader = Callable[[Tensor, Routed | None], None]


@dataclass(frozen=True, eq=False)
class Consumer:
    """A layer whose columns read a site's channels.

    Args:
        norm: the batch norm directly after it, which can hold a bias for a layer without one.
        positions: the number of positions at which a linear layer after a flatten reads each
            channel, in adjacent columns; they are its taps.
    """

    name: str
    module: nn.Module
    norm: nn.Module | None = None
    positions: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        require_plain(self.name, self.module)
        if getattr(self.module, "groups", 1) != 1:
            raise ModelError(
                f"{self.name} reads its channels in {self.module.groups} groups, so a map from all "
                "channels to all cannot be absorbed into it"
            )

    def reading(self, channels: int) -> "Consumer":
        """Returns the consumer as the reader of a flattened map of so many channels."""
        columns = self._weight()[0].numel()
        flattened = isinstance(self.module, nn.Linear) and columns % channels == 0
        return replace(self, positions=columns // channels) if flattened else self

    @property
    def channels(self) -> int:
        """The number of channels H."""
        return self._weight().shape[1]

    @property
    def outputs(self) -> int:
        """The number of outputs O."""
        return self._weight().shape[0]

    @property
    def taps(self) -> int:
        """The positions at which each channel is read; 1 for a linear layer without a flatten."""
        return math.prod(self._weight().shape[2:])

    @property
    def by_channel(self) -> Tensor:
        """The weight as [O·taps, H]: the same map of channels at every tap."""
        module: Any = self.module
        return self.as_rows(module.weight.detach())

    @property
    def by_tap(self) -> Tensor:
        """The weight as [O, H·taps]: every tap of every channel is a column of its own."""
        return self._weight().flatten(1)

    @property
    def reads_maps(self) -> bool:
        """Whether its input is [samples, channels, …], as a convolution's."""
        return isinstance(self.module, MAPS)

    def as_rows(self, weight: Tensor) -> Tensor:
        """Returns a tensor of the weight's shape in the form of `by_channel`."""
        return self._by_position(as_matrix(self.module, weight)).movedim(1, -1).flatten(0, -2)

    def pixels(self, x: Tensor) -> Tensor:
        """Returns its input as tokens [..., H], one for each position of a map.

        A convolution with one tap gets only the positions that it reads.
        """
        if not isinstance(self.module, MAPS):
            return self._by_position(x, -1).movedim(-2, -1) if self.positions > 1 else x
        return windows(self.module, x) if self.taps == 1 else x.movedim(1, -1)

    def patches(self, x: Tensor) -> Tensor:
        """Returns its input as tokens [N, positions, H·taps], one for each output position.

        The input of a linear layer is returned unchanged.
        """
        if not isinstance(self.module, MAPS):
            return x
        return windows(self.module, x).flatten(1, -2)

    def outputs_as_tokens(self, y: Tensor) -> Tensor:
        """Returns an output-shaped tensor as [N, positions, O], in the order of `patches`."""
        return y.flatten(2).movedim(1, -1) if isinstance(self.module, MAPS) else y

    @contextmanager
    def watch(self, read: Reader) -> Iterator[None]:
        """Calls `read` with the layer's input x, and its routing, whenever it runs."""

        def observe(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x, *others = args + tuple(kwargs.values())
            self._check_call(x, others)
            read(x, None)

        handle = self.module.register_forward_pre_hook(observe, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _check_call(self, x: Tensor, others: Sequence[Any]) -> None:
        """Raises ModelError for a call whose output does not follow from input and weight alone."""
        module: Any = self.module
        if any(value is not None for value in others):
            raise ModelError(
                f"{self.name} is called with more than its input, an output_size perhaps; it is "
                "narrowed only where its own settings determine what it computes"
            )
        if isinstance(module, MAPS) and x.dim() != module.weight.dim():
            raise ModelError(
                f"{self.name} reads {list(x.shape)}, which has no batch axis: samples must lie "
                "along the first one"
            )

    def rewrite(
        self, weight: Tensor, kept: int, per_tap: bool, shift: Tensor | None, change: Transaction
    ) -> None:
        """Sets a new weight for `kept` channels, in the form of `by_tap` or `by_channel`.

        Args:
            weight: [O, kept·taps] or [O·taps, kept].
            shift: [O] to be added to the bias.
        """
        old, module = self._weight(), self.module
        if per_tap:
            new = weight.view(old.shape[0], kept, *old.shape[2:])
        else:
            new = weight.view(old.shape[0], *old.shape[2:], kept).movedim(-1, 1)
        new = new.flatten(1) if self.positions > 1 else new
        change.set_parameter(module, "weight", as_stored(module, new))
        set_sizes(module, change)
        if shift is not None:
            self._shift(shift, change)

    @property
    def holds_bias(self) -> bool:
        """Whether its outputs can be shifted by a bias or a batch norm."""
        return getattr(self.module, "bias", None) is not None or self._running_mean() is not None

    def _shift(self, shift: Tensor, change: Transaction) -> None:
        bias = getattr(self.module, "bias", None)
        if bias is not None:
            change.set_parameter(self.module, "bias", bias.detach() + shift.to(bias))
            return
        mean = self._running_mean()
        if mean is None:
            raise InputError(f"{self.name} has no bias, nor a batch norm after it, for a shift")
        change.set_buffer(self.norm, "running_mean", mean - shift.to(mean))

    def _running_mean(self) -> Tensor | None:
        return getattr(self.norm, "running_mean", None)

    def _weight(self) -> Tensor:
        return self._by_position(_matrix(self.module))

    def _by_position(self, columns: Tensor, axis: int = 1) -> Tensor:
        """Returns the columns of a linear layer after a flatten as [channels, positions]."""
        return columns.unflatten(axis, (-1, self.positions)) if self.positions > 1 else columns


def narrow_along(module: Any, reduction: Reduction, change: Transaction) -> None:
    """Narrows a layer that treats every channel separately, see `check_along`."""
    sizes = _sizes_along(module)  # while it is whole: of one channel it is not depthwise
    for key, parameter in list(module.named_parameters(recurse=False)):
        if parameter.shape[0] != 1 or reduction.channels == 1:  # a PReLU of one slope for all
            change.set_parameter(module, key, reduction.narrow(parameter.detach()))
    for key, buffer in list(module.named_buffers(recurse=False)):
        if buffer.dim():
            change.set_buffer(module, key, reduction.narrow(buffer))
    for key in sizes:
        change.set_attribute(module, key, reduction.kept)


def check_along(name: str, module: Any, channels: int) -> None:
    """Raises ModelError for a layer not known to treat each of H channels separately."""
    require_own(name, module)
    if isinstance(module, (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)) and not _sizes_along(module):
        raise ModelError(
            f"{name} is a {type(module).__name__}, which scales each channel by what others hold: "
            "a site ends before it"
        )
    if not _sizes_along(module) and not isinstance(module, nn.PReLU):
        raise ModelError(
            f"{name} is a {type(module).__name__}; along a site run batch norm, instance norm, "
            "depthwise convolutions and PReLU; layers without parameters need not be named"
        )
    for own in {getattr(module, key) for key in _sizes_along(module)} - {channels}:
        raise ModelError(f"{name} has {own} channels, where its site has {channels}")


def _sizes_along(module: Any) -> tuple[str, ...]:
    """Returns the attributes that hold the number of channels of a layer along a site."""
    if isinstance(module, (*NORMS, *INSTANCE_NORMS)):
        return ("num_features",)
    if isinstance(module, nn.PReLU):
        return ("num_parameters",) if module.num_parameters > 1 else ()
    if isinstance(module, nn.GroupNorm):
        return ("num_channels", "num_groups") if module.num_groups == module.num_channels else ()
    return ("in_channels", "out_channels", "groups") if is_depthwise(module) else ()


def values_along(module: nn.Module, channels: int) -> int:
    """Returns the parameters of one of H channels in a layer along a site."""
    return sum(p.numel() // channels for p in module.parameters(recurse=False) if p.numel() > 1)


def _matrix(module: Any) -> Tensor:
    """Returns a layer's weight as [outputs, inputs, ...]."""
    return as_matrix(module, module.weight.detach())


def stacked(consumers: Sequence[Consumer]) -> Tensor:
    """Returns the weights of several consumers by channel, stacked: [ΣO·taps, H]."""
    return torch.cat([consumer.by_channel for consumer in consumers])
