"""A site is one hidden activation: producers write its channels, consumers read them."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from grail.algebra.kinds import MAPS, NORMS
from grail.algebra.reduction import Reduction, Selection
from grail.algebra.width import ChannelWidth, GroupWidth, Width
from grail.errors import InputError, ModelError
from grail.networks.layers import Consumer, Producer, check_along, narrow_along, values_along
from grail.runtime.transaction import Transaction

LEAST_SLOPE = 1e-3  # of a batch norm's largest; behind less of it no drift is asked for
NORM_EPS = 1e-6  # beside the mean square of a token, as RMSNorm's


@dataclass(frozen=True, eq=False)
class ResidualProbe:
    """Where the network shows what it holds once a consumer's output is in.

    `module`: whose input is looked at, or whose output with `output`; None is the block's output.
    `scale`: [O], what a unit of the consumer's output is there (a batch norm's slope); None is 1.
    `normalised`: whether all that reads it first brings each token to one size.
    """

    module: nn.Module | None = None
    output: bool = False
    scale: Tensor | None = None
    normalised: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class CalibrationPoint:
    """Where a run listens in a block: what consumers read, and what the network then holds.

    `name`: "model.layers.3.mlp"; `upstream`: modules of the block that run before, and that no
    change here touches; `landing`: where drift is seen, None if nowhere; `beside`: the same for
    places that run side by side, each for some of the tokens (experts).
    """

    name: str
    block: int
    consumers: tuple[Consumer, ...]
    upstream: tuple[nn.Module, ...] = ()
    probe: ResidualProbe | None = None
    group: Any = None

    @property
    def channels(self) -> int:
        """H."""
        return self.consumers[0].channels

    @property
    def lands_at_output(self) -> bool:
        """Whether the block's output is where its landing is."""
        return self.probe is not None and self.probe.module is None

    def can_aim(self, per_tap: bool) -> bool:
        """Whether what the network is to hold where it lands can be asked of the consumer.

        A map of channels that is the same at every tap of a convolution leaves no such choice.
        """
        return self.probe is not None and self.fits_outputs(per_tap)

    def fits_outputs(self, per_tap: bool) -> bool:
        """Whether a consumer can be fitted to any output, whatever it is."""
        return len(self.consumers) == 1 and (per_tap or self.consumers[0].taps == 1)

    def drift(self, target: Tensor, observed: Tensor) -> Tensor:
        """What the consumer's output lacks, [..., O] fp32, for the network to hold `aim`, fp32."""
        assert self.probe is not None
        missing = self.consumers[0].outputs_as_tokens(target - observed)
        if self.probe.scale is None:
            return missing
        scale = self.probe.scale.to(missing)
        # Through a slope of next to nothing no output could reach what is missing.
        seen = scale.abs() > LEAST_SLOPE * scale.abs().amax()
        return (missing / scale).where(seen, 0)

    def token_scale(self, target: Tensor) -> Tensor | None:
        """What each token's error counts by, [...], if the network is to hold `aim` [..., O], fp32.

        Where norms read it that is 1/rms, as they see it; None is alike for all.
        """
        assert self.probe is not None
        if not self.probe.normalised:
            return None
        return (target.square().mean(-1) + NORM_EPS).rsqrt()


AnyPoint = TypeVar("AnyPoint", bound=CalibrationPoint)


def grouped(points: Sequence[AnyPoint]) -> list[list[AnyPoint]]:
    """Places in order, those that run side by side in one step."""
    apart = itertools.groupby(points, lambda point: point.group or point)
    return [list(step) for _, step in apart]


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionInput(CalibrationPoint):
    """Where a block reads the stream: layers with the same input, query, key and value.

    `layers`: all of them. It listens at one, whose input is both what is read and where drift is
    seen: the stream keeps its width, and nothing of it is lost.
    """

    layers: tuple[Consumer, ...]

    @classmethod
    def of(
        cls, name: str, block: int, layers: tuple[Consumer, ...], **others: Any
    ) -> "AttentionInput":
        """An entry that listens at the first of its layers."""
        first, probe = layers[:1], ResidualProbe(layers[0].module)
        return cls(name=name, block=block, consumers=first, probe=probe, layers=layers, **others)


@dataclass(frozen=True, eq=False, kw_only=True)
class BoundSite(CalibrationPoint):
    """One hidden activation of one block, bound to the modules of a model.

    `kind`: "mlp", "heads", "conv", …; `along`: layers between producers and consumers that treat
    every channel by itself, by name; `sizes`: attributes that hold the width, as (owner, name).
    """

    kind: str
    producers: tuple[Producer, ...]
    along: tuple[tuple[str, nn.Module], ...] = ()
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
                "that writes several values for each, [gate; up], is grail.Fused(name)"
            )
        for name, module in self.along:
            check_along(name, module, self.channels)

    @property
    def outputs(self) -> int:
        """O of all consumers, each tap of a convolution counted."""
        return sum(c.outputs * c.taps for c in self.consumers)

    def modules(self) -> dict[str, nn.Module]:
        """Every layer that narrowing rewrites, by its name."""
        writing = {producer.name: producer.module for producer in self.producers}
        reading = {consumer.name: consumer.module for consumer in self.consumers}
        return {**writing, **dict(self.along), **reading}

    def add_biases(self, transaction: Transaction) -> None:
        """Gives every layer of the site that has no bias one of zeros."""
        for module in self.modules().values():
            weight: Any = module.weight
            if getattr(module, "bias", None) is None:
                zeros = nn.Parameter(weight.new_zeros(len(weight)), weight.requires_grad)
                transaction.set_attribute(module, "bias", zeros)

    def require_bias(self) -> None:
        """Raises InputError where a consumer has no place for a shift of its outputs."""
        for consumer in self.consumers:
            if not consumer.holds_bias:
                raise InputError(
                    f"{consumer.name} has no bias, nor a batch norm behind it, that could take up "
                    "the mean of what is lost; choose compensate=True"
                )

    def weights(self) -> tuple[Tensor, ...]:
        """Weights [H, ...] whose row h writes channel h."""
        return tuple(rows for producer in self.producers for rows in producer.rows())

    def width(self, keep: float, multiple: int | None) -> Width:
        """The feasible width nearest to `keep`."""
        return ChannelWidth.nearest(self.channels, keep, multiple)

    def narrow(self, reduction: Reduction, width: Width, transaction: Transaction) -> None:
        """Narrows producers, what runs along, and records of the width; not the consumers."""
        self._narrow({"channels": reduction}, transaction)

    def parameters_saved(self, width: Width) -> int:
        """How many parameters fewer the model has at `width`."""
        return self._saved({"channels": width.channels - width.kept})

    def _narrow(self, reductions: Mapping[str, Reduction], transaction: Transaction) -> None:
        reduction = reductions["channels"]
        for producer in self.producers:
            producer.narrow(reductions, transaction)
        for _, module in self.along:
            narrow_along(module, reduction, transaction)
        for owner, name in self.sizes:
            transaction.set_attribute(owner, name, reduction.kept)

    def _saved(self, lost: Mapping[str, int]) -> int:
        rows = sum(
            producer.values_per_row() * count * len(producer.rows(role))
            for producer in self.producers
            for role, count in lost.items()
        )
        columns = sum(c.outputs * c.taps for c in self.consumers)
        beside = sum(values_along(module, self.channels) for _, module in self.along)
        return rows + (columns + beside) * lost["channels"]


@dataclass(frozen=True, eq=False, kw_only=True)
class GroupedSite(BoundSite):
    """Channels that a grouped convolution writes: equally many of each group stay."""

    def width(self, keep: float, multiple: int | None) -> GroupWidth:
        modules = [producer.module for producer in self.producers]
        groups = math.lcm(*map(_groups, modules))
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
    """A site of the class that its producers ask for.

    A linear layer with several columns for each channel of a map reads it flattened.
    """
    grouped = any(_groups(producer.module) > 1 for producer in producers)
    if all(isinstance(producer.module, MAPS) for producer in producers):
        channels = len(producers[0].rows()[0])
        consumers = tuple(consumer.reading(channels) for consumer in consumers)
    kind = GroupedSite if grouped else BoundSite
    return kind(producers=producers, consumers=consumers, **fields)


def _groups(module: Any) -> int:
    """In how many groups a layer writes its channels; a linear layer writes one."""
    return getattr(module, "groups", 1)


class Architecture(ABC):
    """A model as a chain of blocks, each with sites in the order in which they run.

    `name`: the model, for people. `kinds`: of sites, in the order in which they run; `default`:
    those that are narrowed if none are named.
    """

    name: str
    kinds: tuple[str, ...]
    default: tuple[str, ...]
    blocks: Sequence[nn.Module]
    trusted = True  # or its sites are what somebody says of them, which a run then checks

    @property
    def device(self) -> torch.device:
        """Where the blocks are."""
        return next(self.blocks[0].parameters()).device

    @property
    def element_size(self) -> int:
        """Bytes of one weight."""
        return next(self.blocks[0].parameters()).element_size()

    def norms(self, block: int) -> list[nn.Module]:
        """The batch norms of a block that remember statistics."""
        norms = (m for m in self.blocks[block].modules() if isinstance(m, NORMS))
        return [norm for norm in norms if norm.running_mean is not None]

    def attention_inputs(self, block: int) -> list[AttentionInput]:
        """Where the attention of a block reads the stream, if that is known."""
        return []

    @abstractmethod
    def sites(self, kinds: Sequence[str]) -> list[list[BoundSite]]:
        """For each block its sites of those kinds, of which `check_kinds` approved."""

    def write_config(  # noqa: B027
        self, sites: Sequence[BoundSite], widths: Mapping[str, Width], transaction: Transaction
    ) -> None:
        """Writes the new widths, by name of site, into the model's configuration, if it has one."""

    def notes(self, sites: Sequence[BoundSite], widths: Mapping[str, Width]) -> list[str]:
        """What a person should know about a model of these widths."""
        reasons = self.beyond_configuration(sites, widths)
        return [f"{reason}: save with grail.save" for reason in reasons]

    def beyond_configuration(
        self, sites: Sequence[BoundSite], widths: Mapping[str, Width]
    ) -> list[str]:
        """For each kind whose new widths the model's configuration cannot hold, the reason.

        Asked once the sites are narrow. Only `grail.save` and `grail.load` keep such a model.
        """
        return []

    def ensure_biases(self, sites: Sequence[BoundSite], transaction: Transaction) -> None:
        """Sees to it that the consumers' biases can be shifted.

        Raises:
            InputError: one has no bias and can be given none.
        """
        for site in sites:
            site.require_bias()

    def check_kinds(self, kinds: Sequence[str]) -> None:
        """Raises InputError for a kind that the architecture does not have, or none at all."""
        unknown = [kind for kind in kinds if kind not in self.kinds]
        if unknown or not kinds:
            raise InputError(
                f"sites must be one or more of {', '.join(self.kinds)}; "
                f"got {', '.join(unknown) or 'none'}"
            )
