"""Experts whose weights lie in one tensor of a layer, as transformers 5 keeps them.

    gate_up_proj [experts, 2·H, hidden] ─► act(gate)·up [H] ─► down_proj [experts, hidden, H]

Without a gate the first tensor is up_proj [experts, H, hidden]. Rows of gate and up are contiguous
or alternate; tensors may be transposed, and have biases, as the layer's attributes say (`has_gate`,
`is_concatenated`, `is_transposed`, `has_bias`).

Each expert is a site. It is bound to two linear layers that represent its slices; after all experts
of a layer are rewritten, the slices are stacked again.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from grail.algebra.reduction import Reduction
from grail.algebra.targets import Multiple
from grail.algebra.width import ChannelWidth, usual_multiple
from grail.errors import InputError, ModelError
from grail.networks.layers import Consumer, Producer, Reader, Routed
from grail.networks.site import BoundSite, ResidualProbe
from grail.runtime.hooks import replaced_forward
from grail.runtime.transaction import Transaction

# torch's grouped_mm requires rows of multiples of 16 bytes: 8 channels of 16 bits. Experts of 32
# bits would need 4, but can be loaded in 16.
MULTIPLE = 8


class Experts:
    """The experts of one layer.

    Args:
        name, module: the layer that holds `gate_up_proj` (or `up_proj`) and `down_proj`.
    """

    def __init__(self, name: str, module: Any):
        self.name, self.module = name, module
        self._first = "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj"
        self._transposed = getattr(module, "is_transposed", False)
        self.gates = self._layers(self._first, bias=True)
        self.downs = self._layers("down_proj", bias=False)
        self._readers: dict[int, Reader] = {}
        self._rewritten: set[int] = set()

    def sites(
        self, block: int, upstream: Sequence[nn.Module], probe: ResidualProbe | None
    ) -> list[BoundSite]:
        """Returns a site for each expert, all with one probe."""
        channels = self.downs[0].in_features
        together = not hasattr(self.module, "gate_up_proj")
        concatenated = getattr(self.module, "is_concatenated", True)
        kind = Producer if together or concatenated else InTurns
        parts = (("channels", channels),) * (1 if together else 2)
        return [
            ExpertSite(
                name=f"{self.name}.{number}",
                kind="experts",
                block=block,
                producers=(kind(f"{self.name}.{number}.gate_up", gate, parts),),
                consumers=(ExpertConsumer(f"{self.name}.{number}.down", down, None, self, number),),
                upstream=tuple(upstream),
                probe=probe,
                group=self,
            )
            for number, (gate, down) in enumerate(zip(self.gates, self.downs, strict=True))
        ]

    @contextmanager
    def watch(self, number: int, read: Reader) -> Iterator[None]:
        """Calls `read` with the input of one expert's second matrix, and its routing."""
        self._readers[number] = read
        outermost = len(self._readers) == 1
        try:
            if outermost:
                with self._listening():
                    yield
            else:
                yield
        finally:
            del self._readers[number]

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Runs the layer expert by expert, and observes each one's second matrix."""
        config, forward = self.module.config, self.module.forward
        chosen = config._experts_implementation

        def run(hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
            config._experts_implementation = "eager"
            observed: set[int] = set()
            weights32 = weights.float()
            shares = weights32 / weights32.square().sum(-1, keepdim=True)

            def observe(number: int, x: Tensor) -> None:
                observed.add(number)
                if number in self._readers:
                    choices, places = torch.where((experts == number).T)
                    self._readers[number](x, Routed(places, shares[places, choices]))

            try:
                with _Observed(self.module.down_proj, observe):
                    output: Tensor = forward(hidden, experts, weights)
            finally:
                config._experts_implementation = chosen
            if observed != set(experts.unique().tolist()):
                raise ModelError(
                    f"{self.name}: its experts do not run one after the other as slices of "
                    "down_proj, so what each reads cannot be seen"
                )
            return output

        with replaced_forward(self.module, run):
            yield

    def rewritten(self, number: int, transaction: Transaction) -> None:
        """Marks one expert as rewritten; after the last one the layer gets the new tensors."""
        self._rewritten.add(number)
        if len(self._rewritten) < len(self.downs):
            return
        self._rewritten.clear()
        widths = {down.weight.shape[1] for down in self.downs}
        if len(widths) > 1:
            raise InputError(f"{self.name}: its experts share a tensor, so they need one width")
        for name, layers in ((self._first, self.gates), ("down_proj", self.downs)):
            together = torch.stack([layer.weight.detach() for layer in layers])
            together = together.mT if self._transposed else together
            transaction.set_parameter(self.module, name, together)
        biases = [layer.bias.detach() for layer in self.gates if layer.bias is not None]
        if biases:
            transaction.set_parameter(self.module, f"{self._first}_bias", torch.stack(biases))
        (width,) = widths
        for size in ("intermediate_dim", "intermediate_size"):
            if hasattr(self.module, size):
                transaction.set_attribute(self.module, size, width)

    def _layers(self, name: str, bias: bool) -> list[nn.Linear]:
        """Returns layers that represent the slices of a tensor, and of its bias."""
        weights = getattr(self.module, name).detach()
        weights = weights.mT if self._transposed else weights
        biases = getattr(self.module, f"{name}_bias", None) if bias else None
        found = itertools.repeat(None) if biases is None else iter(biases.detach())
        return [_linear(*pair) for pair in zip(weights, found, strict=False)]


@dataclass(frozen=True, eq=False)
class InTurns(Producer):
    """A producer whose gate and up rows alternate, channel by channel."""

    def rows(self, role: str = "channels") -> list[Tensor]:
        return list(self._rows().unflatten(0, (-1, 2)).unbind(1)) if role == "channels" else []

    def _narrowed(self, rows: Tensor, reductions: Mapping[str, Reduction]) -> Tensor:
        apart = rows.unflatten(0, (-1, 2)).unbind(1)
        return torch.stack([reductions["channels"].narrow(piece) for piece in apart], 1).flatten(
            0, 1
        )


@dataclass(frozen=True, eq=False)
class ExpertConsumer(Consumer):
    """The second matrix of one expert."""

    experts: Any = None
    number: int = 0

    @contextmanager
    def watch(self, read: Reader) -> Iterator[None]:
        with self.experts.watch(self.number, read):
            yield

    def rewrite(
        self, weight: Tensor, kept: int, per_tap: bool, shift: Tensor | None, change: Transaction
    ) -> None:
        super().rewrite(weight, kept, per_tap, shift, change)
        self.experts.rewritten(self.number, change)


class ExpertSite(BoundSite):
    """The intermediate channels of one expert."""

    def width(self, keep: float, multiple: Multiple | None) -> ChannelWidth:
        """Returns the nearest width that the kernels of grouped products accept.

        Raises:
            InputError: a `multiple` that leads to another.
        """
        if multiple is None:
            multiple = max(MULTIPLE, usual_multiple(self.channels))
        width = ChannelWidth.nearest(self.channels, keep, multiple)
        if width.kept < width.channels and width.kept % MULTIPLE:
            raise InputError(
                f"{self.name}: {width}, in multiples of {multiple}, is a width that grouped "
                f"products of experts do not take: their rows are multiples of 16 bytes; choose a "
                f"multiple of {MULTIPLE}",
                page="docs/serving/index.md#which-widths-run-fast",
            )
        return width

    def add_biases(self, transaction: Transaction) -> None:
        """Adds none: the layer of experts cannot hold biases."""


_PRODUCTS = {nn.functional.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm}
_PRODUCTS |= {Tensor.__matmul__}


class _Observed(TorchFunctionMode):
    """A mode that calls `observe` before each product with a slice of `weights` [experts, _, _]."""

    def __init__(self, weights: Tensor, observe: Callable[[int, Tensor], None]):
        super().__init__()
        self._weights, self._observe = weights, observe

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function in _PRODUCTS and len(args) > 1:
            number = self._number(args[1])
            if number is not None:
                self._observe(number, args[0])
        return function(*args, **(kwargs or {}))

    def _number(self, weight: Tensor) -> int | None:
        """Returns the number of the slice that `weight` is, by its address; None for no slice."""
        whole = self._weights
        if not isinstance(weight, Tensor) or weight.shape != whole.shape[1:]:
            return None
        number, rest = divmod(weight.data_ptr() - whole.data_ptr(), whole[0].nbytes)
        return number if rest == 0 and 0 <= number < len(whole) else None


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Returns a layer that represents a slice [O, H] and its bias, sharing their memory."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer
