"""Narrowing of each kind of layer: rows that write channels, columns that read them.

    Producer    rows of a layer's weight (and its bias) write the channels of a site
    along       a layer between producer and consumer that treats every channel separately
    Consumer    columns of a layer's weight read the channels

Of a layer that several sites share, such as one that reads a concatenation, each site has ranges of
rows or columns (`Places`).

The kinds of layers and their storage of weights are in `grail.algebra.kinds`. Another kind is
refused by name.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
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
    tokens_read,
    windows,
)
from grail.algebra.reduction import Reduction
from grail.errors import InputError, ModelError
from grail.runtime.transaction import Transaction

Range = tuple[int, int]  # from the first row or column to before the last


class Axis:
    """The rows or the columns of one layer, ranges of which belong to different sites.

    Attributes:
        removed: by range of the dense layer, the number of rows or columns that it lost.
    """

    def __init__(self, removed: Mapping[Range, int] = MappingProxyType({})) -> None:
        self.removed = removed

    def now(self, part: Range) -> Range:
        """Returns where a range of the dense layer lies now."""
        start, stop = part
        before = sum(count for (first, _), count in self.removed.items() if first < start)
        return start - before, stop - before - self.removed.get(part, 0)


@dataclass(frozen=True, eq=False)
class Places:
    """The ranges of a layer's rows or columns that belong to a site; each holds all its channels.

    Args:
        axis: the layer's, shared by all sites that have ranges of it.
        ranges: of the dense layer, in order.
    """

    axis: Axis
    ranges: tuple[Range, ...]

    def now(self) -> list[Range]:
        """Returns where the ranges lie now."""
        return list(map(self.axis.now, self.ranges))

    def check(self, name: str, size: int) -> None:
        """Raises ModelError for ranges that a layer of so many rows or columns does not have."""
        lengths = {stop - start for start, stop in self.now()}
        if self.now()[-1][1] > size or len(lengths) > 1:
            found = ", ".join(f"{start} to {stop}" for start, stop in self.now())
            raise ModelError(
                f"{name} has {size} channels on that side; its parts {found} must lie in them and "
                "be of one length"
            )

    def pieces(self, tensor: Tensor, axis: int = 0) -> list[Tensor]:
        """Returns the part of a tensor in each range, along an axis of the layer's size."""
        return [tensor.narrow(axis, start, stop - start) for start, stop in self.now()]

    def replaced(self, tensor: Tensor, pieces: Sequence[Tensor], axis: int = 0) -> Tensor:
        """Returns a tensor with other parts in the ranges, along an axis of the layer's size."""
        parts, end = [], 0
        for (start, stop), piece in zip(self.now(), pieces, strict=True):
            parts += [tensor.narrow(axis, end, start - end), piece]
            end = stop
        return torch.cat([*parts, tensor.narrow(axis, end, tensor.shape[axis] - end)], axis)

    def shrink(self, size: int, change: Transaction) -> None:
        """Records that each range has so many rows or columns from now on."""
        lost = {part: part[1] - part[0] - size for part in self.ranges}
        change.set_attribute(self.axis, "removed", {**self.axis.removed, **lost})


@dataclass(frozen=True, eq=False)
class Producer:
    """A layer whose rows write a site's channels.

    Args:
        parts: the roles of its rows, in order, as (role, rows): fused query, key and value rows are
            (("channels", H), ("groups", G), ("groups", G)). None: all are the site's channels.
        turn: the number of rows after which parts of equal size alternate; None: each part is
            contiguous.
        places: the rows that write the site's channels, where others belong to other sites.
    """

    name: str
    module: nn.Module
    parts: tuple[tuple[str, int], ...] | None = None
    turn: int | None = field(default=None, kw_only=True)
    places: Places | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        require_plain(self.name, self.module)
        if self.places is not None:
            self.places.check(self.name, len(self._rows()))
            if (groups := getattr(self.module, "groups", 1)) != 1:
                raise ModelError(
                    f"{self.name} writes its channels in {groups} groups; a site can have all of "
                    "them, not a part"
                )
        if self.parts is not None and sum(n for _, n in self.parts) != len(self._rows()):
            raise ModelError(
                f"{self.name} has {len(self._rows())} rows, where its site expects "
                f"{' + '.join(str(n) for _, n in self.parts)}"
            )

    def rows(self, role: str = "channels") -> list[Tensor]:
        """Returns the weights [H, ...] of that role, one for each part."""
        weight = self._rows()
        if self.places is not None:
            return self.places.pieces(weight) if role == "channels" else []
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
        if self.places is not None:
            self.places.shrink(reductions["channels"].kept, transaction)

    def spans(self) -> list[Range]:
        """Returns where the rows that write the site's channels lie now, a range for each part.

        There is none where rows of several parts alternate, or have another role.
        """
        if self.places is not None:
            return self.places.now()
        if self.parts is None:
            return [(0, len(self._rows()))]
        if self.turn is not None or any(role != "channels" for role, _ in self.parts):
            return []
        count = len(_matrix(self.module)) // len(self.parts)
        return [(part * count, (part + 1) * count) for part in range(len(self.parts))]

    def at(self, span: Range) -> Tensor:
        """Returns the rows of one of `spans`, [K, ...]."""
        return _matrix(self.module)[slice(*span)]

    def rewrite(self, span: Range, rows: Tensor, change: Transaction) -> None:
        """Replaces the rows of one of `spans`, [K, ...]; the bias stays."""
        module: Any = self.module
        weight = _matrix(module).clone()
        weight[slice(*span)] = rows.to(weight)
        change.set_parameter(module, "weight", as_stored(module, weight))

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
        if self.places is not None:
            pieces = self.places.pieces(rows)
            return self.places.replaced(rows, list(map(reductions["channels"].narrow, pieces)))
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
        places: the columns that read the site's channels, where others read those of other sites.
            Several ranges are taps, too.
    """

    name: str
    module: nn.Module
    norm: nn.Module | None = None
    positions: int = field(default=1, kw_only=True)
    places: Places | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        require_plain(self.name, self.module)
        if self.groups > 1 and self.places is not None:
            raise ModelError(
                f"{self.name} reads its channels in {self.groups} groups; a site must have all of "
                "them, not a part"
            )
        if self.places is not None:
            self.places.check(self.name, _matrix(self.module).shape[1])

    def reading(self, channels: int) -> "Consumer":
        """Returns the consumer as the reader of a flattened map of so many channels."""
        columns = self._pieces(_matrix(self.module), 1)[0].shape[1]
        flattened = isinstance(self.module, nn.Linear) and columns % channels == 0
        return replace(self, positions=columns // channels) if flattened else self

    @property
    def channels(self) -> int:
        """The number of channels H."""
        return self._own().shape[1] * self.groups

    @property
    def groups(self) -> int:
        """The number of groups in which a convolution reads its channels.

        Its weight is then a block-diagonal matrix, in every form.
        """
        return getattr(self.module, "groups", 1)

    @property
    def outputs(self) -> int:
        """The number of outputs O."""
        return self._own().shape[0]

    @property
    def taps(self) -> int:
        """The positions at which each channel is read; 1 for a linear layer without a flatten."""
        return math.prod(self._own().shape[2:])

    @property
    def weights_per_channel(self) -> int:
        """The number of weights that read one channel."""
        return self.outputs * self.taps // self.groups

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
        own = self._spread(self._by_place(as_matrix(self.module, weight), 1))
        return own.movedim(1, -1).flatten(0, -2)

    def pixels(self, x: Tensor) -> Tensor:
        """Returns its input as tokens [..., H], one for each position of a map.

        A convolution with one tap gets only the positions that it reads. Each of several ranges of
        columns gives tokens.
        """
        if not isinstance(self.module, MAPS):
            own = self._by_place(x, x.dim() - 1)
            return own if self._places_each == 1 else own.movedim(-2, -1)
        one_tap = self.taps == self._places_each
        found = [
            windows(self.module, piece) if one_tap else piece.movedim(1, -1)
            for piece in self._pieces(x, 1)
        ]
        return found[0] if len(found) == 1 else torch.stack(found, 1)

    def patches(self, x: Tensor) -> Tensor:
        """Returns its input as tokens [N, positions, H·taps], one for each output position.

        The input of a linear layer is returned unchanged, but for columns of other sites.
        """
        if self.places is not None:
            axis = 1 if isinstance(self.module, MAPS) else x.dim() - 1
            x = self._by_place(x, axis)
            x = x if self._places_each == 1 else x.flatten(axis, axis + 1)
        if self.groups > 1:  # the columns of all groups, one after the other
            return windows(self.module, x).flatten(1, -2)
        return tokens_read(self.module, x)

    @property
    def reads_all(self) -> bool:
        """Whether it reads the site's channels alone."""
        return self.places is None

    def others(self, x: Tensor) -> Tensor:
        """Returns the part of its input that other sites' columns read."""
        axis = 1 if isinstance(self.module, MAPS) else x.dim() - 1
        if self.places is None:
            return x.narrow(axis, 0, 0)
        none = [piece.narrow(axis, 0, 0) for piece in self.places.pieces(x, axis)]
        return self.places.replaced(x, none, axis)

    def once_narrow(self, kept: int) -> "Consumer":
        """Returns the consumer as it reads an input in which the site has so many channels."""
        if self.places is None:
            return self
        places = Places(Axis(self.places.axis.removed), self.places.ranges)
        places.shrink(kept * self.positions, Transaction())
        return replace(self, places=places)

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
        old, module = self._own(), self.module
        if per_tap:
            new = weight.view(old.shape[0], kept, *old.shape[2:])
        else:
            new = weight.view(old.shape[0], *old.shape[2:], kept).movedim(-1, 1)
        new = self._in_places(self._blocks(new))
        change.set_parameter(module, "weight", as_stored(module, new))
        set_sizes(module, change)
        if self.places is not None:
            self.places.shrink(kept * self.positions, change)
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
        return self._spread(self._own())

    def _own(self) -> Tensor:
        """Returns the weight of the site's channels as [O, channels of a group, ...]."""
        return self._by_place(_matrix(self.module), 1)

    def _spread(self, own: Tensor) -> Tensor:
        """Returns the weight [O, H, ...] of all groups, zero where one does not read another's."""
        if self.groups == 1:
            return own
        apart = own.unflatten(0, (self.groups, -1))
        whole = apart.new_zeros(*apart.shape[:2], self.groups, *apart.shape[2:])
        every = torch.arange(self.groups, device=own.device)
        whole[every, :, every] = apart
        return whole.flatten(0, 1).flatten(1, 2)

    def _blocks(self, whole: Tensor) -> Tensor:
        """Returns the weight [O, channels of a group, ...] of `_spread`."""
        if self.groups == 1:
            return whole
        apart = whole.unflatten(1, (self.groups, -1)).unflatten(0, (self.groups, -1))
        every = torch.arange(self.groups, device=whole.device)
        return apart[every, :, every].flatten(0, 1)

    @property
    def _places_each(self) -> int:
        """The number of columns, each with all its taps, that read one channel."""
        return self.positions * (1 if self.places is None else len(self.places.ranges))

    def _pieces(self, columns: Tensor, axis: int) -> list[Tensor]:
        return [columns] if self.places is None else self.places.pieces(columns, axis)

    def _by_place(self, columns: Tensor, axis: int) -> Tensor:
        """Returns the site's columns; as [channels, places] where each is read at several."""
        pieces = self._pieces(columns, axis)
        if self._places_each == 1:
            return pieces[0]
        return torch.cat([p.unflatten(axis, (-1, self.positions)) for p in pieces], axis + 1)

    def _in_places(self, new: Tensor) -> Tensor:
        """Returns the whole weight, with [O, channels, places, …] as the site's columns."""
        pieces = [new]
        if self._places_each > 1:
            pieces = [piece.flatten(1, 2) for piece in new.split(self.positions, 2)]
        if self.places is None:
            return pieces[0]
        return self.places.replaced(_matrix(self.module), pieces, 1)


@dataclass(frozen=True, eq=False)
class Along:
    """A layer that treats every channel separately, or a bare parameter with values for each.

    Args:
        name: of the layer, or of the parameter or buffer.
        module: the layer, or the module that has the parameter.
        key: the parameter's name there; "" for a layer.
        axis: of the parameter, along which the channels lie.
        places: the channels that are the site's, where others belong to other sites.
    """

    name: str
    module: nn.Module
    key: str = field(default="", kw_only=True)
    axis: int = field(default=0, kw_only=True)
    places: Places | None = field(default=None, kw_only=True)

    def check(self, channels: int) -> None:
        """Raises ModelError for a layer not known to treat each of H channels separately."""
        if not self.key:
            _require_separate(self.name, self.module)
        size = self._size
        if size is None:
            return
        found = {size}
        if self.places is not None:
            self.places.check(self.name, size)
            found = {stop - start for start, stop in self.places.now()}
        for own in found - {channels}:
            raise ModelError(f"{self.name} has {own} channels, where its site has {channels}")

    def narrow(self, reduction: Reduction, change: Transaction) -> None:
        """Narrows the site's channels."""
        module: Any = self.module
        sizes, size = _sizes_along(module), self._size  # of one channel it is not depthwise
        own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers("", False))
        for key in [self.key] if self.key else own:
            old = getattr(module, key)
            if not old.dim() or old.shape[self.axis] != size:
                continue  # of all channels alike
            set_value = change.set_parameter if isinstance(old, nn.Parameter) else change.set_buffer
            set_value(module, key, self._narrowed(old.detach(), reduction))
        parts = 1 if self.places is None else len(self.places.ranges)
        for key in () if self.key else sizes:
            lost = parts * (reduction.channels - reduction.kept)
            change.set_attribute(module, key, getattr(module, key) - lost)
        if self.places is not None:
            self.places.shrink(reduction.kept, change)

    def values_per_channel(self) -> int:
        """Returns the number of parameters of one of the site's channels."""
        size, parts = self._size, 1 if self.places is None else len(self.places.ranges)
        own = dict(self.module.named_parameters(recurse=False))
        kept = [p for key, p in own.items() if key == self.key or not self.key]
        return parts * sum(p.numel() // size for p in kept if size and p.numel() >= size)

    @property
    def _size(self) -> int | None:
        """The number of channels of all sites; None for one parameter for all channels."""
        if self.key:
            return int(getattr(self.module, self.key).shape[self.axis])
        sizes = _sizes_along(self.module)
        return getattr(self.module, sizes[0]) if sizes else None

    def _narrowed(self, tensor: Tensor, reduction: Reduction) -> Tensor:
        channels = tensor.movedim(self.axis, 0)
        if self.places is None:
            channels = reduction.narrow(channels)
        else:
            narrow = map(reduction.narrow, self.places.pieces(channels))
            channels = self.places.replaced(channels, list(narrow))
        return channels.movedim(0, self.axis)


def _require_separate(name: str, module: Any) -> None:
    """Raises ModelError for a layer not known to treat each channel separately."""
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


def _sizes_along(module: Any) -> tuple[str, ...]:
    """Returns the attributes that hold the number of channels of a layer along a site."""
    if isinstance(module, (*NORMS, *INSTANCE_NORMS)):
        return ("num_features",)
    if isinstance(module, nn.PReLU):
        return ("num_parameters",) if module.num_parameters > 1 else ()
    if isinstance(module, nn.GroupNorm):
        return ("num_channels", "num_groups") if module.num_groups == module.num_channels else ()
    return ("in_channels", "out_channels", "groups") if is_depthwise(module) else ()


def _matrix(module: Any) -> Tensor:
    """Returns a layer's weight as [outputs, inputs, ...]."""
    return as_matrix(module, module.weight.detach())


def stacked(consumers: Sequence[Consumer]) -> Tensor:
    """Returns the weights of several consumers by channel, stacked: [ΣO·taps, H]."""
    return torch.cat([consumer.by_channel for consumer in consumers])
