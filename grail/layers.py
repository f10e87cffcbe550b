"""What narrowing means for each kind of layer: rows that write channels, columns that read them.

    Producer    rows of a layer's weight (and its bias) write the channels of a site
    along       a layer between producer and consumer that treats every channel by itself
    Consumer    columns of a layer's weight read the channels

Linear, transformers' Conv1D (weight [in, out]), convolutions of one to three dimensions, batch norm
and PReLU are known; another kind is refused by name.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from grail.errors import InputError, ModelError
from grail.reduction import Reduction
from grail.transaction import Transaction
from grail.weights import CONVOLUTIONS, is_plain, matrix, transposed

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True, eq=False)
class Producer:
    """A layer whose rows write a site's channels.

    `parts`: what its rows are, in order, as (role, rows): fused query, key and value rows are
    (("channels", H), ("groups", G), ("groups", G)). None: all of them are the site's channels.
    """

    name: str
    module: nn.Module
    parts: tuple[tuple[str, int], ...] | None = None

    def __post_init__(self) -> None:
        _require_plain(self.name, self.module)
        if self.parts is not None and sum(n for _, n in self.parts) != len(self._rows()):
            raise ModelError(
                f"{self.name} has {len(self._rows())} rows, where its site expects "
                f"{' + '.join(str(n) for _, n in self.parts)}"
            )

    def rows(self, role: str = "channels") -> list[Tensor]:
        """The weights [H, ...] of that role, one for each part."""
        weight = self._rows()
        if self.parts is None:
            return [weight] if role == "channels" else []
        pieces = weight.split([n for _, n in self.parts])
        return [piece for (r, _), piece in zip(self.parts, pieces, strict=True) if r == role]

    def narrow(self, reductions: Mapping[str, Reduction], transaction: Transaction) -> None:
        """Narrows the rows of each role, weight and bias."""
        weight = self._narrowed(self._rows(), reductions)
        module: Any = self.module
        bias = None if module.bias is None else self._narrowed(module.bias.detach(), reductions)
        transaction.set_parameter(module, "weight", weight.T if transposed(module) else weight)
        if bias is not None:
            transaction.set_parameter(module, "bias", bias)
        _set_sizes(module, transaction)

    def values_per_row(self) -> int:
        """Parameters of one row, its bias included."""
        module: Any = self.module
        return self._rows()[0].numel() + (module.bias is not None)

    def _rows(self) -> Tensor:
        return matrix(self.module)

    def _narrowed(self, rows: Tensor, reductions: Mapping[str, Reduction]) -> Tensor:
        if self.parts is None:
            return reductions["channels"].narrow(rows)
        pieces = rows.split([n for _, n in self.parts])
        return torch.cat(
            [reductions[r].narrow(p) for (r, _), p in zip(self.parts, pieces, strict=True)]
        )


@dataclass(frozen=True, eq=False)
class Routed:
    """Which tokens a router gave to a layer, and what each owes to it.

    `places`: [N] in the batch's tokens in one row. `shares`: [N], of what the token's layers miss
    together, how much this one is to add: what all add, weighted as the router weights them, is
    all of it. Of the shares that are, those of least squares, w/Σw².
    """

    places: Tensor
    shares: Tensor

    def drift(self, drift: Tensor) -> Tensor:
        """This layer's part [N, O] of a drift [..., O] of the batch's tokens."""
        rows = drift.reshape(-1, drift.shape[-1])
        return rows[self.places] * self.shares[:, None]


# Hears of a layer's input, and of the batch's tokens that it is of, if those are not all.
Reader = Callable[[Tensor, Routed | None], None]


@dataclass(frozen=True, eq=False)
class Consumer:
    """A layer whose columns read a site's channels.

    `norm`: the batch norm right behind it, which can hold a bias that the layer itself has not.
    """

    name: str
    module: nn.Module
    norm: nn.Module | None = None

    def __post_init__(self) -> None:
        _require_plain(self.name, self.module)
        if getattr(self.module, "groups", 1) != 1:
            raise ModelError(
                f"{self.name} reads its channels in {self.module.groups} groups, so a map from all "
                "channels to all cannot be absorbed into it"
            )

    @property
    def channels(self) -> int:
        """H."""
        return self._weight().shape[1]

    @property
    def outputs(self) -> int:
        """O."""
        return self._weight().shape[0]

    @property
    def taps(self) -> int:
        """Positions at which a convolution reads each channel; 1 for a linear layer."""
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

    def as_rows(self, weight: Tensor) -> Tensor:
        """A tensor of the layer's weight's shape, of the form of `by_channel`."""
        weight = weight.T if transposed(self.module) else weight
        return weight.movedim(1, -1).flatten(0, -2)

    def pixels(self, x: Tensor) -> Tensor:
        """Its input as tokens [..., H]; of a convolution with one tap, those that it reads."""
        module: Any = self.module
        if not isinstance(module, CONVOLUTIONS):
            return x
        if self.taps == 1:
            if not isinstance(module.padding, str):  # a name gives one tap no padding
                mode = module.padding_mode.replace("zeros", "constant")
                ring = [size for size in reversed(module.padding) for _ in range(2)]
                x = nn.functional.pad(x, ring, mode) if any(ring) else x
            read = (slice(None, None, step) for step in module.stride)
            x = x[(slice(None), slice(None), *read)]
        return x.movedim(1, -1)

    def patches(self, x: Tensor) -> Tensor:
        """Its input as tokens [N, positions, H·taps], one for each output position.

        A linear layer's, and those of a convolution with one tap, are its `pixels`.
        """
        module: Any = self.module
        if not isinstance(module, CONVOLUTIONS):
            return x
        if self.taps == 1:
            return self.pixels(x).flatten(1, -2)
        if isinstance(module.padding, str) or module.padding_mode != "zeros" or x.dim() != 4:
            raise ModelError(
                f"{self.name}: patches are taken of 2-d convolutions with zero padding given in "
                "numbers; choose per_tap=False"
            )
        unfolded = nn.functional.unfold(
            x, module.kernel_size, module.dilation, module.padding, module.stride
        )
        return unfolded.movedim(1, -1)

    def outputs_as_tokens(self, y: Tensor) -> Tensor:
        """What follows its output, [N, positions, O] beside `patches`."""
        return y.flatten(2).movedim(1, -1) if isinstance(self.module, CONVOLUTIONS) else y

    @contextmanager
    def watch(self, read: Reader) -> Iterator[None]:
        """Reports the layer's input x whenever it runs, and which of a batch's tokens those are."""

        def heard(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read(args[0] if args else next(iter(kwargs.values())), None)

        handle = self.module.register_forward_pre_hook(heard, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def rewrite(
        self, weight: Tensor, kept: int, per_tap: bool, shift: Tensor | None, change: Transaction
    ) -> None:
        """Takes a new weight for `kept` channels, of the form of `by_tap` or `by_channel`.

        Args:
            weight: [O, kept·taps] or [O·taps, kept].
            shift: [O] to be added to the bias.
        """
        old, module = self._weight(), self.module
        if per_tap:
            new = weight.view(old.shape[0], kept, *old.shape[2:])
        else:
            new = weight.view(old.shape[0], *old.shape[2:], kept).movedim(-1, 1)
        change.set_parameter(module, "weight", new.T if transposed(module) else new)
        _set_sizes(module, change)
        if shift is not None:
            self._shift(shift, change)

    @property
    def holds_bias(self) -> bool:
        """Whether there is a place for a shift of the outputs."""
        return getattr(self.module, "bias", None) is not None or self._running_mean() is not None

    def _shift(self, shift: Tensor, change: Transaction) -> None:
        bias = getattr(self.module, "bias", None)
        if bias is not None:
            change.set_parameter(self.module, "bias", bias.detach() + shift.to(bias))
            return
        mean = self._running_mean()
        if mean is None:
            raise InputError(f"{self.name} has no bias, nor a batch norm behind it, for a shift")
        change.set_buffer(self.norm, "running_mean", mean - shift.to(mean))

    def _running_mean(self) -> Tensor | None:
        return getattr(self.norm, "running_mean", None)

    def _weight(self) -> Tensor:
        return matrix(self.module)


def narrow_along(module: Any, reduction: Reduction, change: Transaction) -> None:
    """Narrows a layer that treats every channel by itself, see `check_along`."""
    if is_depthwise(module):
        change.set_attribute(module, "groups", reduction.kept)
    for key, parameter in list(module.named_parameters(recurse=False)):
        if parameter.shape[0] != 1 or reduction.channels == 1:  # a PReLU of one slope for all
            change.set_parameter(module, key, reduction.narrow(parameter.detach()))
    for key, buffer in list(module.named_buffers(recurse=False)):
        if buffer.dim():
            change.set_buffer(module, key, reduction.narrow(buffer))
    if isinstance(module, NORMS):
        change.set_attribute(module, "num_features", reduction.kept)
    elif isinstance(module, nn.PReLU):
        if module.num_parameters > 1:
            change.set_attribute(module, "num_parameters", reduction.kept)
    else:
        change.set_attribute(module, "in_channels", reduction.kept)
        change.set_attribute(module, "out_channels", reduction.kept)


def check_along(name: str, module: Any, channels: int) -> None:
    """Raises ModelError for a layer that is not known to treat each of H channels by itself."""
    if isinstance(module, NORMS):
        own = module.num_features
    elif isinstance(module, nn.PReLU):
        own = channels if module.num_parameters == 1 else module.num_parameters
    elif is_depthwise(module):
        own = module.in_channels
    else:
        raise ModelError(
            f"{name} is a {type(module).__name__}; along a site run batch norm, depthwise "
            "convolutions and PReLU. Layers without parameters need not be named"
        )
    _require_own(name, module)
    if own != channels:
        raise ModelError(f"{name} has {own} channels, where its site has {channels}")


def is_depthwise(module: Any) -> bool:
    """Whether a layer is a convolution with one filter for each channel."""
    if not isinstance(module, CONVOLUTIONS):
        return False
    return module.groups == module.in_channels == module.out_channels and module.groups > 1


def values_along(module: nn.Module, channels: int) -> int:
    """Parameters of one of H channels in a layer along a site."""
    return sum(p.numel() // channels for p in module.parameters(recurse=False) if p.numel() > 1)


def _require_plain(name: str, module: Any) -> None:
    _require_own(name, module)
    weight = getattr(module, "weight", None)
    known = is_plain(module)
    if not known or not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise ModelError(
            f"{name} is a {type(module).__name__}, not a plain floating-point "
            "Linear or convolution; load the model without quantisation or adapters"
        )


def _require_own(name: str, module: nn.Module) -> None:
    """Raises ModelError where a layer computes its weight or bias anew whenever it runs."""
    for key in ("weight", "bias"):
        if is_parametrized(module, key) or key in vars(module):
            raise ModelError(
                f"{name} computes its {key} whenever it runs, as torch.nn.utils.prune, weight_norm "
                "and spectral_norm make it do; make that permanent first (prune.remove, "
                "remove_weight_norm, remove_spectral_norm, remove_parametrizations)"
            )


def _set_sizes(module: Any, change: Transaction) -> None:
    """Brings a layer's record of its sizes in line with its weight."""
    if transposed(module):
        sizes = {"nx": module.weight.shape[0], "nf": module.weight.shape[1]}
    elif isinstance(module, nn.Linear):
        sizes = {"out_features": module.weight.shape[0], "in_features": module.weight.shape[1]}
    else:
        sizes = {
            "out_channels": module.weight.shape[0],
            "in_channels": module.weight.shape[1] * module.groups,
        }
    for key, value in sizes.items():
        if hasattr(module, key):
            change.set_attribute(module, key, value)


def stacked(consumers: Sequence[Consumer]) -> Tensor:
    """The weights of several consumers, by channel, one above the other: [ΣO·taps, H]."""
    return torch.cat([consumer.by_channel for consumer in consumers])
