"""The refit of layers to other inputs: what they read, what they should return, new weights.

With the kept channels X of a layer's input, its outputs T without bias and the weight W₀ [O, K] of
plain pruning,

    W' = W₀ + (T Xᵀ − W₀ X Xᵀ)(X Xᵀ + λI)⁻¹,   λ = α · mean diagonal of X Xᵀ

which is `grail.fit` with the recorded target T. Sums are of fp32, the solve is of fp64. There are
two forms:

    by column    X are the columns of the weight: every tap of a convolution and every position of
                 a flattened map is a column of its own. It restores more.
    by channel   one map M [H, K] of channels serves all taps or positions: T are all channels of
                 the dense input, and W' = W M. It needs fewer tokens and less memory.

Source: the ridge fit of `grail.algebra.problem` at β = 1; by channel as GRAIL's section 3 (arXiv
2602.23795).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from grail.algebra._fit import Fit, Toward, fit
from grail.algebra.gram import Gram
from grail.algebra.kinds import CONVOLUTIONS, MAPS, as_matrix, as_stored, tokens_read
from grail.algebra.reduction import Selection
from grail.algebra.sums import as_activations
from grail.errors import ModelError
from grail.runtime.hooks import Stop, input_of

Auto = Literal["auto"]

MOST_COLUMNS = 4096  # by column, where the form is chosen; their Gram takes 32 MiB, the fit 0.5 GiB
CHUNK = 2**24  # values of unfolded inputs at a time


@dataclass(frozen=True)
class Settings:
    """How layers are refitted; see `grail.fit`.

    `per_tap`: by column, by channel, or as `Layer.form` chooses.
    """

    alpha: float | Auto = "auto"
    toward: Toward = "baseline"
    fit_bias: bool = True
    per_tap: bool | Auto = "auto"


@dataclass(frozen=True, eq=False)
class Layer:
    """A Linear or convolution whose weight is refitted.

    Args:
        kept: of the H columns of `reference`, or its input channels, those that stay, sorted.
        reference: the layer with all of them, whose outputs are restored. It is `module` itself
            before that is narrowed.
        rows: the outputs of `reference` that `module` still has; None are all.
        norm: the batch norm directly after it, which can hold a bias for a layer without one.
    """

    name: str
    module: Any
    kept: Tensor
    reference: Any
    rows: Tensor | None = None
    norm: Any = None

    @property
    def is_narrow(self) -> bool:
        """Whether the module is narrow already, with the kept columns only."""
        return self.module is not self.reference

    @property
    def fits(self) -> bool:
        """Whether the sizes of a narrow module are those of the kept columns and rows."""
        outputs = len(as_matrix(self.module, self.module.weight))
        right_rows = self.rows is None or len(self.rows) == outputs
        return right_rows and len(self.kept) == width_of(self.module, "in")

    @property
    def inputs(self) -> int:
        """The channels H of the dense input."""
        return width_of(self.reference, "in")

    @property
    def positions(self) -> int:
        """The adjacent columns that stay or go together: those of a channel after a flatten."""
        if isinstance(self.module, MAPS):
            return 1
        stays = torch.zeros(self.inputs, dtype=torch.bool)
        stays[self.kept] = True
        changes = (stays[1:] != stays[:-1]).nonzero().flatten() + 1
        return math.gcd(self.inputs, *changes.tolist())

    @property
    def taps(self) -> int:
        """The columns of each channel."""
        return math.prod(getattr(self.module, "kernel_size", ())) * self.positions

    @property
    def columns(self) -> int:
        """The columns of the narrow weight, of one group."""
        spatial = math.prod(getattr(self.module, "kernel_size", ()))
        return len(self.kept) // self.groups * spatial

    @property
    def groups(self) -> int:
        """The groups of a convolution; 1 for a linear layer."""
        return getattr(self.module, "groups", 1)

    @property
    def local(self) -> Tensor:
        """The kept channels as columns of the weight: those of each group are the same."""
        return self.kept[: len(self.kept) // self.groups]

    def require_regular(self) -> None:
        """Raises ModelError for a grouped convolution that loses other channels in each group."""
        size, count = self.inputs // self.groups, self.groups
        if len(self.kept) % count or not torch.equal(
            self.kept.view(count, -1), self.local + size * torch.arange(count)[:, None]
        ):
            raise ModelError(
                f"{self.name} reads its channels in {count} groups and loses other channels in "
                "each, where Torch-Pruning keeps the first group's in all"
            )

    def by_column(self, per_tap: bool | Auto, tokens: int, axes: int) -> bool:
        """Returns the form for so many tokens of calibration, and inputs of so many axes."""
        flattened = isinstance(self.module, MAPS) or axes == 2
        if self.groups > 1 or self.taps == 1 or not flattened:
            return True
        if per_tap != "auto":
            return per_tap
        return self.columns <= min(MOST_COLUMNS, tokens)

    @property
    def holds_bias(self) -> bool:
        """Whether the layer, or the batch norm after it, has a bias that can be changed."""
        own = getattr(self.module, "bias", None) is not None
        return own or getattr(self.norm, "running_mean", None) is not None

    @property
    def pads(self) -> bool:
        """Whether padding lets some outputs read fewer taps than others."""
        if not isinstance(self.module, MAPS):
            return False
        zero = self.module.padding == "valid" or set(self.module.padding) == {0}
        return not (isinstance(self.module, CONVOLUTIONS) and zero)

    def narrowed(self, x: Tensor) -> Tensor:
        """Returns the kept channels of a dense input."""
        return x.index_select(1 if isinstance(self.module, MAPS) else -1, self.kept.to(x.device))

    def target(self, y: Tensor) -> Tensor:
        """Returns the outputs [..., O] of `reference` that remain, without the bias of `module`."""
        y = y.flatten(2).movedim(1, -1) if isinstance(self.module, MAPS) else y
        if self.rows is not None:
            y = y.index_select(-1, self.rows.to(y.device))
        bias = self.module.bias
        return y.float() if bias is None else y.float() - bias.detach().float()

    def baseline(self) -> Tensor:
        """Returns W₀ [O, columns], the weight of plain pruning."""
        weight = as_matrix(self.module, self.module.weight.detach())
        return (weight if self.is_narrow else weight[:, self.local]).flatten(1)

    def shift(self, shift: Tensor) -> None:
        """Adds [O] to its outputs."""
        bias = self.module.bias
        if bias is not None:
            bias.copy_(bias.double() + shift.to(bias.device))
        else:
            mean = self.norm.running_mean
            mean.copy_(mean.double() - shift.to(mean.device))

    def write(self, narrow: Tensor) -> None:
        """Writes the kept columns [O, columns], in place."""
        weight = self.module.weight
        matrix = as_matrix(self.module, weight.detach().clone())
        kept = slice(None) if self.is_narrow else self.local.to(weight.device)
        shape = matrix[:, kept].shape
        matrix[:, kept] = narrow.to(matrix).view(shape)
        weight.copy_(as_stored(self.module, matrix))


def width_of(module: Any, side: Literal["in", "out"]) -> int:
    """Returns the number of inputs or outputs of a layer."""
    name = "channels" if isinstance(module, MAPS) else "features"
    width: int = getattr(module, f"{side}_{name}")
    return width


@dataclass(eq=False)
class Reading:
    """Layers that read one input together, and the sums of their refit.

    Args:
        layers: a grouped convolution is alone.
        by_column: the form, see above.
    """

    layers: list[Layer]
    by_column: bool
    _sums: list[tuple[Gram, Gram]] = field(default_factory=list)

    @property
    def first(self) -> Layer:
        """The layer that runs first."""
        return self.layers[0]

    def add(self, x: Tensor, target: Tensor | Sequence[Tensor], held_out: bool) -> None:
        """Adds one call.

        Args:
            x: what the narrow layers read, their kept channels.
            target: the dense input by channel, else the dense outputs of each layer.
            held_out: adds to the sums for the choice of α.
        """
        if isinstance(target, Tensor):
            tokens, wanted = _channels(self.first, x), _channels(self.first, target)
            self._update(0, tokens, wanted.float(), held_out, len(x))
            return
        joined = torch.cat(
            [layer.target(y) for layer, y in zip(self.layers, target, strict=True)], -1
        )
        if not isinstance(self.first.module, MAPS):
            self._update(0, as_activations(x), joined, held_out, None)
            return
        one = joined[0].numel() // joined.shape[-1] * self.first.columns * self.first.groups
        for rows in torch.arange(len(x)).split(max(1, CHUNK // max(1, one))):
            low, high = int(rows[0]), int(rows[-1]) + 1
            tokens = as_activations(tokens_read(self.first.module, x[low:high]))
            if self.first.groups == 1:
                self._update(0, tokens, joined[low:high], held_out, high - low)
                continue
            for group, part in enumerate(joined[low:high].chunk(self.first.groups, -1)):
                self._update(group, tokens[..., group, :], part, held_out, high - low)

    def _update(
        self, group: int, tokens: Tensor, target: Tensor, held_out: bool, samples: int | None
    ) -> None:
        while len(self._sums) <= group:
            name = ", ".join(layer.name for layer in self.layers)
            gram = Gram(tokens.shape[-1], name=f"the input of {name}")
            self._sums.append((gram, Gram(tokens.shape[-1], name=gram.name)))
        self._sums[group][held_out].update(tokens, target=target, samples=samples)

    def fit(self, settings: Settings) -> "Refitted":
        """Returns the new weights; nothing is written.

        Raises:
            EmptyCalibrationError, NonFiniteError, SolveError: see `grail.fit`.
        """
        shifts = settings.fit_bias and all(layer.holds_bias for layer in self.layers)
        if not self.by_column:
            shifts = shifts and not any(layer.pads for layer in self.layers)
        fits = [
            _fitted(gram, held_out, weights, settings, shifts)
            for (gram, held_out), weights in zip(self._sums, self._baselines(), strict=True)
        ]
        self._sums.clear()
        return Refitted(self, fits)

    def _baselines(self) -> Iterator[list[Tensor]]:
        if self.by_column:
            for group in range(self.first.groups):
                yield [
                    layer.baseline().chunk(layer.groups)[group].contiguous()
                    for layer in self.layers
                ]
        else:
            positions = self.first.positions
            kept = self.first.kept[::positions] // positions
            device = self.first.module.weight.device
            every = torch.eye(self.first.inputs // positions, dtype=torch.float32, device=device)
            yield [every[:, kept.to(device)]]


@dataclass(frozen=True, eq=False)
class Refitted:
    """New weights of the layers of a `Reading`, not yet written.

    `fits`: of each group of a convolution; one for other layers.
    """

    reading: Reading
    fits: list[Fit]

    @property
    def errors(self) -> dict[str, tuple[float, float]]:
        """‖T − W'X‖/‖T‖ by layer, of plain pruning and restored, over all layers of the reading."""
        squares = [
            math.sqrt(sum(e**2 for e in each) / len(self.fits))
            for each in ([f.baseline_error for f in self.fits], [f.error for f in self.fits])
        ]
        return {layer.name: (squares[0], squares[1]) for layer in self.reading.layers}

    @torch.no_grad()
    def write(self) -> None:
        """Writes weights and shifts into the layers, in place."""
        if not self.reading.by_column:
            self._write_map(self.fits[0])
            return
        for number, layer in enumerate(self.reading.layers):
            layer.write(torch.cat([fit.weights[number] for fit in self.fits]))
            shifts = [fit.shifts[number] for fit in self.fits if fit.shifts is not None]
            if shifts:
                layer.shift(torch.cat(shifts))

    def _write_map(self, found: Fit) -> None:
        """Writes W·M for the map M [H, K] of channels."""
        for layer in self.reading.layers:
            weight = as_matrix(layer.reference, layer.reference.weight.detach()).double()
            if layer.rows is not None:
                weight = weight[layer.rows.to(weight.device)]
            if layer.positions > 1:
                weight = weight.unflatten(1, (-1, layer.positions))
            by_channel = weight.flatten(2) if weight.dim() > 2 else weight[..., None]
            mapped = torch.einsum("oht,hk->okt", by_channel, found.weights[0].double())
            layer.write(mapped.flatten(1))
            if found.shifts is not None:
                layer.shift(by_channel.sum(-1) @ found.shifts[0].to(weight.device))


def _fitted(
    gram: Gram, held_out: Gram, weights: list[Tensor], settings: Settings, shifts: bool
) -> Fit:
    every = Selection(range(gram.channels), gram.channels)
    return fit(
        gram,
        every,
        weights,
        fit_bias=shifts,
        alpha=settings.alpha,
        toward=settings.toward,
        drift_correction=1.0,
        held_out=held_out if held_out.tokens else None,
    )


def _channels(layer: Layer, x: Tensor) -> Tensor:
    """Returns an input as tokens of one value for each channel."""
    if isinstance(layer.module, MAPS):
        return as_activations(x.movedim(1, -1))
    return as_activations(x.unflatten(-1, (-1, layer.positions)).movedim(-2, -1))


@dataclass(eq=False)
class Call:
    """One joint call of layers that read the same input.

    `x`: the input. `outputs`: of each layer, by its number.
    """

    x: Tensor
    outputs: dict[int, Tensor] = field(default_factory=dict)

    @property
    def in_order(self) -> list[Tensor]:
        """The outputs in the order of the layers."""
        return [self.outputs[number] for number in range(len(self.outputs))]


Taken = Callable[[Call], None]


@contextmanager
def watching(modules: Sequence[nn.Module], taken: Taken, outputs: bool = True) -> Iterator[None]:
    """Calls `taken` after each joint call of modules; before it, where outputs are not needed.

    Raises:
        ModelError: in the forward, where they do not read one tensor.
    """
    begun: list[Call] = []  # at most one

    def reads(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = input_of("a layer", args, kwargs)
        if not outputs:
            taken(Call(x))
        elif not begun:
            begun.append(Call(x))
        elif begun[0].x is not x:
            raise ModelError(
                "layers that read one tensor in the first batch read others in a later one; give "
                "batches for which the model computes the same"
            )

    def returns(number: int, y: Tensor) -> None:
        begun[0].outputs[number] = y
        if len(begun[0].outputs) == len(modules):
            taken(begun.pop())

    with ExitStack() as hooks:
        for number, module in enumerate(modules if outputs else modules[:1]):
            hooks.callback(module.register_forward_pre_hook(reads, with_kwargs=True).remove)
            if outputs:
                hook = module.register_forward_hook(lambda _, args, y, n=number: returns(n, y))
                hooks.callback(hook.remove)
        yield


def run_until_stopped(run: Callable[[], Any]) -> None:
    """Runs a forward that a hook may end."""
    with suppress(Stop):
        run()
