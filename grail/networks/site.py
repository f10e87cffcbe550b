"""A site is one hidden activation: producers write its channels, consumers read them."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from grail.algebra.kinds import MAPS, NORMS
from grail.algebra.reduction import Reduction, Selection
from grail.algebra.targets import Multiple
from grail.algebra.width import ChannelWidth, GroupWidth, Width
from grail.errors import InputError, ModelError
from grail.networks.layers import Along, Consumer, Producer
from grail.runtime.transaction import Transaction

LEAST_SLOPE = 1e-3  # of a batch norm's largest slope; below it no drift is corrected
NORM_EPS = 1e-6  # added to the mean square of a token, as in RMSNorm


@dataclass(frozen=True, eq=False)
class ResidualProbe:
    """The point where drift is measured: a consumer's output has joined the stream there.

    Args:
        module: the module whose input is read; None is the block's output.
        output: reads the module's output instead.
        scale: [O], the size there of a unit of the consumer's output (a batch norm's slope); None
            is 1.
        normalised: whether everything that reads it first normalises each token.
    """

    module: nn.Module | None = None
    output: bool = False
    scale: Tensor | None = None
    normalised: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class CalibrationPoint:
    """A place in a block whose inputs are collected: those of its consumers.

    Args:
        name: "model.layers.3.mlp".
        block: its number.
        consumers: the layers that read the input.
        upstream: modules of the block that run before and do not change with this point.
        probe: where drift is measured; None is nowhere.
        group: the same object for points that run side by side, each for a part of the tokens
            (experts).
    """

    name: str
    block: int
    consumers: tuple[Consumer, ...]
    upstream: tuple[nn.Module, ...] = ()
    probe: ResidualProbe | None = None
    group: Any = None

    @property
    def channels(self) -> int:
        """The number of channels H."""
        return self.consumers[0].channels

    @property
    def probes_output(self) -> bool:
        """Whether the probe is at the block's output."""
        return self.probe is not None and self.probe.module is None

    def corrects_drift(self, per_tap: bool) -> bool:
        """Returns whether the consumer can be fitted to a target at the probe.

        One map of channels for all taps of a convolution cannot be.
        """
        return self.probe is not None and self._is_one_map(per_tap)

    def fits_outputs(self, per_tap: bool) -> bool:
        """Returns whether the consumer can be fitted to arbitrary outputs."""
        return self._is_one_map(per_tap) and self.consumers[0].reads_all

    def _is_one_map(self, per_tap: bool) -> bool:
        (first, *others) = self.consumers
        return not others and first.groups == 1 and (per_tap or first.taps == 1)

    def drift(self, target: Tensor, observed: Tensor) -> Tensor:
        """Returns the output [..., O] that the consumer lacks, from fp32 target and observed."""
        assert self.probe is not None
        missing = self.consumers[0].outputs_as_tokens(target - observed)
        if self.probe.scale is None:
            return missing
        scale = self.probe.scale.to(missing)
        # Where the slope is nearly zero, no output of the consumer could correct the drift.
        seen = scale.abs() > LEAST_SLOPE * scale.abs().amax()
        return (missing / scale).where(seen, 0)

    def token_scale(self, target: Tensor) -> Tensor | None:
        """Returns the weight [...] of each token's error for a target [..., O] fp32.

        Where norms read the target it is their factor, 1/rms; None weights all tokens equally.
        """
        assert self.probe is not None
        if not self.probe.normalised:
            return None
        return (target.square().mean(-1) + NORM_EPS).rsqrt()


AnyPoint = TypeVar("AnyPoint", bound=CalibrationPoint)


def grouped(points: Sequence[AnyPoint]) -> list[list[AnyPoint]]:
    """Returns the points in order, those of one group together."""
    groups = itertools.groupby(points, lambda point: point.group or point)
    return [list(members) for _, members in groups]


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionInput(CalibrationPoint):
    """The input of an attention: layers query, key and value, which read the stream.

    Args:
        layers: all of them. The input of the first is collected, and drift is measured there: the
            stream keeps its width.
    """

    layers: tuple[Consumer, ...]

    @classmethod
    def of(
        cls, name: str, block: int, layers: tuple[Consumer, ...], **others: Any
    ) -> "AttentionInput":
        """Returns the attention input of these layers."""
        first, probe = layers[:1], ResidualProbe(layers[0].module)
        return cls(name=name, block=block, consumers=first, probe=probe, layers=layers, **others)


@dataclass(frozen=True, eq=False, kw_only=True)
class BoundSite(CalibrationPoint):
    """One hidden activation of one block, bound to the modules of a model.

    Args:
        kind: "mlp", "heads", "conv", ….
        producers: the layers that write its channels.
        along: layers and parameters in between that treat every channel separately.
        sizes: attributes that hold the width, as (owner, name).
    """

    kind: str
    producers: tuple[Producer, ...]
    along: tuple[Along, ...] = ()
    sizes: tuple[tuple[Any, str], ...] = ()

    def __post_init__(self) -> None:
        if not self.producers or not self.consumers:
            raise ModelError(f"{self.name}: a site needs a producer and a consumer")
        counts = [(p.name, len(rows)) for p in self.producers for rows in p.rows()]
        counts += [(c.name, c.channels) for c in self.consumers]
        if len({count for _, count in counts}) > 1:
            found = ", ".join(f"{name} {count}" for name, count in counts)
            raise ModelError(
                f"{self.name}: its layers disagree on the number of channels: {found}; a layer "
                "that writes several values for each, [gate; up], is grail.Fused(name), and one "
                "of whose channels others are another site's is grail.Part(name, …)"
            )
        for layer in self.along:
            layer.check(self.channels)

    @property
    def outputs(self) -> int:
        """The outputs O of all consumers, each tap of a convolution counted."""
        return sum(c.outputs * c.taps for c in self.consumers)

    def modules(self) -> dict[str, nn.Module]:
        """Returns every layer that narrowing rewrites, by its name."""
        writing = {producer.name: producer.module for producer in self.producers}
        reading = {consumer.name: consumer.module for consumer in self.consumers}
        between = {layer.name: layer.module for layer in self.along}
        return {**writing, **between, **reading}

    def add_biases(self, transaction: Transaction) -> None:
        """Adds a bias of zeros to every layer of the site without one."""
        for module in self.modules().values():
            weight: Any = module.weight
            if getattr(module, "bias", None) is None:
                zeros = nn.Parameter(weight.new_zeros(len(weight)), weight.requires_grad)
                transaction.set_attribute(module, "bias", zeros)

    def require_bias(self) -> None:
        """Raises InputError for a consumer without a bias or batch norm to shift its outputs."""
        for consumer in self.consumers:
            if not consumer.holds_bias:
                raise InputError(
                    f"{consumer.name} has no bias, nor a batch norm after it, to take the mean of "
                    "the removed signal; choose fit_bias=False"
                )

    def weights(self) -> tuple[Tensor, ...]:
        """Returns weights [H, ...] whose row h writes channel h."""
        return tuple(rows for producer in self.producers for rows in producer.rows())

    def width(self, keep: float, multiple: Multiple | None) -> Width:
        """Returns the feasible width nearest to `keep`."""
        return ChannelWidth.nearest(self.channels, keep, multiple)

    def narrow(self, reduction: Reduction, width: Width, transaction: Transaction) -> None:
        """Narrows producers, layers along and attributes of the width; not the consumers."""
        self._narrow({"channels": reduction}, transaction)

    def parameters_saved(self, width: Width) -> int:
        """Returns the number of parameters that the model loses at `width`."""
        return self._saved({"channels": width.channels - width.kept})

    def _narrow(self, reductions: Mapping[str, Reduction], transaction: Transaction) -> None:
        reduction = reductions["channels"]
        for producer in self.producers:
            producer.narrow(reductions, transaction)
        for layer in self.along:
            layer.narrow(reduction, transaction)
        for owner, name in self.sizes:
            transaction.set_attribute(owner, name, reduction.kept)

    def _saved(self, lost: Mapping[str, int]) -> int:
        rows = sum(
            producer.values_per_row() * count * len(producer.rows(role))
            for producer in self.producers
            for role, count in lost.items()
        )
        columns = sum(consumer.weights_per_channel for consumer in self.consumers)
        along = sum(layer.values_per_channel() for layer in self.along)
        return rows + (columns + along) * lost["channels"]


@dataclass(frozen=True, eq=False, kw_only=True)
class GroupedSite(BoundSite):
    """The channels that a grouped convolution writes or reads: equally many of each group stay."""

    def width(self, keep: float, multiple: Multiple | None) -> GroupWidth:
        groups = math.lcm(*_groups(self.producers, self.consumers))
        return GroupWidth.nearest_of_each(groups, self.channels // groups, keep)

    def narrow(self, reduction: Reduction, width: Width, transaction: Transaction) -> None:
        if not isinstance(reduction, Selection):
            raise InputError(
                f"{self.name}: a grouped convolution is narrowed by a selection of channels, not "
                "by folding them"
            )
        assert isinstance(width, GroupWidth)
        width.check(self.name, reduction)
        super().narrow(reduction, width, transaction)


def bind(
    *, producers: tuple[Producer, ...], consumers: tuple[Consumer, ...], **fields: Any
) -> BoundSite:
    """Returns a site of the class that its layers require.

    A linear layer with several columns for each channel of a map reads the map flattened.
    """
    grouped = max(_groups(producers, consumers)) > 1
    if all(isinstance(producer.module, MAPS) for producer in producers):
        channels = len(producers[0].rows()[0])
        consumers = tuple(consumer.reading(channels) for consumer in consumers)
    kind = GroupedSite if grouped else BoundSite
    return kind(producers=producers, consumers=consumers, **fields)


def _groups(producers: Iterable[Producer], consumers: Iterable[Consumer]) -> list[int]:
    """Returns the number of groups of each layer; 1 for a linear layer."""
    modules = [*(p.module for p in producers), *(c.module for c in consumers)]
    return [getattr(module, "groups", 1) for module in modules]


class Architecture(ABC):
    """A model as a chain of blocks, each with sites in the order in which they run.

    Attributes:
        name: of the model, for reports.
        kinds: of sites, in the order in which they run.
        default: the kinds that are narrowed if none is named.
        blocks: the modules, in order.
        block_names: their names in the model; empty where they are no parts of it.
        trusted: whether the sites come from a known family; others are checked by a run.
    """

    name: str
    kinds: tuple[str, ...]
    default: tuple[str, ...]
    blocks: Sequence[nn.Module]
    block_names: Sequence[str] = ()
    trusted = True

    @property
    def device(self) -> torch.device:
        """The device of the blocks."""
        return next(self.blocks[0].parameters()).device

    @property
    def element_size(self) -> int:
        """The bytes of one weight."""
        return next(self.blocks[0].parameters()).element_size()

    def norms(self, block: int) -> list[nn.Module]:
        """Returns the batch norms of a block with running statistics."""
        norms = (m for m in self.blocks[block].modules() if isinstance(m, NORMS))
        return [norm for norm in norms if norm.running_mean is not None]

    def attention_inputs(self, block: int) -> list[AttentionInput]:
        """Returns the inputs of a block's attention, if known."""
        return []

    @abstractmethod
    def sites(self, kinds: Sequence[str]) -> list[list[BoundSite]]:
        """Returns for each block its sites of those kinds, which `check_kinds` accepted."""

    def write_config(  # noqa: B027
        self, sites: Sequence[BoundSite], widths: Mapping[str, Width], transaction: Transaction
    ) -> None:
        """Writes the new widths, by name of site, into the model's configuration, if it has one."""

    def notes(self, sites: Sequence[BoundSite], widths: Mapping[str, Width]) -> list[str]:
        """Returns notes for the report about a model of these widths."""
        reasons = self.beyond_configuration(sites, widths)
        return [f"{reason}: save with grail.save" for reason in reasons]

    def beyond_configuration(
        self, sites: Sequence[BoundSite], widths: Mapping[str, Width]
    ) -> list[str]:
        """Returns a reason for each kind whose new widths the configuration cannot hold.

        Called after the sites are narrowed. Only `grail.save` and `grail.load` keep such a model.
        """
        return []

    def ensure_biases(self, sites: Sequence[BoundSite], transaction: Transaction) -> None:
        """Ensures that the consumers' biases can be shifted.

        Raises:
            InputError: one has no bias and can be given none.
        """
        for site in sites:
            site.require_bias()

    def check_kinds(self, kinds: Sequence[str]) -> None:
        """Raises InputError for an unknown kind, or for no kind."""
        unknown = [kind for kind in kinds if kind not in self.kinds]
        if unknown or not kinds:
            raise InputError(
                f"sites must be one or more of {', '.join(self.kinds)}; "
                f"got {', '.join(unknown) or 'none'}",
                page="docs/networks.md#where-sites-come-from",
            )
