"""Sites of transformers, by layout: where a family keeps its blocks, and what they are made of.

    mlp      producers ─► act(…)[·…] [intermediate]     ─► consumer
    heads    queries, keys, values ─► attention [heads·head_dim] ─► output projection

A family is a `Layout`: paths into its blocks and the names of what holds its sizes. All blocks get
the same widths where the configuration holds one number for all: stock transformers then reloads
them.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from grail.errors import InputError, ModelError
from grail.layers import Consumer, Producer
from grail.reduction import Reduction, Selection
from grail.sites.site import Architecture, BoundSite, Landing
from grail.transaction import Transaction
from grail.width import ChannelWidth, HeadWidth, Width

Number = Callable[[HeadWidth], int]
Parts = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Seen:
    """A `Landing` in a block: at the input of the module of that path, or at its output."""

    path: str
    output: bool = False


BLOCK_OUTPUT = Seen("")


@dataclass(frozen=True)
class Mlp:
    """Intermediate channels: paths in a block.

    `fused`: how many producers lie in one matrix, one after the other. `config`: the
    configuration's name of their number; `sizes`: paths of attributes of it in the block.
    """

    producers: tuple[str, ...]
    consumer: str
    fused: int = 1
    config: str = "intermediate_size"
    sizes: tuple[str, ...] = ()
    landing: Seen = BLOCK_OUTPUT


@dataclass(frozen=True)
class Heads:
    """Attention heads: paths in a block.

    `projections`: query, key and value, or one that holds the rows of all three in that order.
    `head_dim`: the attention module's name of the channels of a head. `sizes`: what else of its
    attributes follows from a width; `config`: what of the configuration does.
    """

    attention: str
    projections: tuple[str, ...]
    consumer: str
    landing: Seen
    head_dim: str = "head_dim"
    sizes: Mapping[str, Number] | None = None
    config: Mapping[str, Number] | None = None


@dataclass(frozen=True)
class Layout:
    """One family: its sites, and the places where its list of blocks may be."""

    blocks: tuple[str, ...]
    mlp: Mlp
    heads: Heads | None = None


class Transformer(Architecture):
    """The blocks of a model of one layout."""

    default = ("mlp",)

    def __init__(self, model: Any, layout: Layout):
        self.config, self._layout = model.config, layout
        self.prefix, self.blocks = _blocks(model, layout)
        self.kinds = ("heads", "mlp") if layout.heads else ("mlp",)
        self.name = model.config._name_or_path or type(model).__name__
        self.hidden_size = Consumer("", self.blocks[0].get_submodule(layout.mlp.consumer)).outputs
        every = self.sites(self.kinds)
        # The MLP is the widest point: its producers, an activation and their product beside three
        # hidden states.
        rows = len(every[0][-1].weights())
        self.activations_per_token = 2 * rows * every[0][-1].channels + 3 * self.hidden_size

    def sites(self, kinds: Sequence[str]) -> list[list[BoundSite]]:
        make = {"heads": self._heads, "mlp": self._mlp}
        return [
            [make[kind](number, block) for kind in self.kinds if kind in kinds]
            for number, block in enumerate(self.blocks)
        ]

    def settle(self, widths: Mapping[str, Width], transaction: Transaction) -> None:
        for width in dict.fromkeys(widths.values()):
            if isinstance(width, ChannelWidth):
                settings = {self._layout.mlp.config: width.kept}
            else:
                settings = self._head_settings(width)
            for name, value in settings.items():
                transaction.set_attribute(self.config, name, value)

    def _mlp(self, number: int, block: nn.Module) -> BoundSite:
        mlp, name = self._layout.mlp, f"{self.prefix}.{number}"
        consumer = Consumer(f"{name}.{mlp.consumer}", block.get_submodule(mlp.consumer))
        parts = (("channels", consumer.channels),) * mlp.fused if mlp.fused > 1 else None
        heads = self._layout.heads
        return BoundSite(
            name=f"{name}.{mlp.consumer.rpartition('.')[0]}".rstrip("."),
            kind="mlp",
            block=number,
            producers=tuple(
                Producer(f"{name}.{path}", block.get_submodule(path), parts)
                for path in mlp.producers
            ),
            consumers=(consumer,),
            upstream=(block.get_submodule(heads.attention),) if heads else (),
            landing=_landing(block, mlp.landing),
            sizes=tuple(_attributes(block, mlp.sizes)),
        )

    def _heads(self, number: int, block: nn.Module) -> BoundSite:
        heads, name = self._layout.heads, f"{self.prefix}.{number}"
        assert heads is not None
        attention = block.get_submodule(heads.attention)
        head_dim: Any = getattr(attention, heads.head_dim)
        consumer = Consumer(f"{name}.{heads.consumer}", block.get_submodule(heads.consumer))
        modules: list[Any] = [block.get_submodule(path) for path in heads.projections]
        if len(modules) == 1:
            whole = Producer("", modules[0])
            grouped = (len(whole.rows()[0]) - consumer.channels) // 2
            roles: list[Parts] = [
                (("channels", consumer.channels), ("groups", grouped), ("groups", grouped))
            ]
        else:
            grouped = len(Producer("", modules[1]).rows()[0])
            shared: Parts = (("groups", grouped),)
            roles = [(("channels", consumer.channels),), shared, shared]
        return HeadSite(
            name=f"{name}.{heads.attention}",
            kind="heads",
            block=number,
            producers=tuple(
                Producer(f"{name}.{path}", module, parts)
                for path, module, parts in zip(heads.projections, modules, roles, strict=True)
            ),
            consumers=(consumer,),
            landing=_landing(block, heads.landing),
            attention=attention,
            shape=(grouped // head_dim, consumer.channels // grouped, head_dim),
            numbers=heads.sizes or {},
            allowed=self._loads,
        )

    def _loads(self, width: HeadWidth) -> bool:
        """Whether the configuration accepts it: Llama's wants heads to divide hidden_size."""
        validate = getattr(self.config, "validate_architecture", None)
        if validate is None:
            return True
        trial = copy.copy(self.config)
        trial.__dict__.update(self._head_settings(width))
        try:
            trial.validate_architecture()
        except ValueError:
            return False
        return True

    def _head_settings(self, width: HeadWidth) -> dict[str, int]:
        assert self._layout.heads is not None
        return {name: number(width) for name, number in (self._layout.heads.config or {}).items()}


@dataclass(frozen=True, eq=False)
class HeadSite(BoundSite):
    """Query heads of grouped attention; dropping a whole group drops its key and value head too.

    `shape`: groups, queries in each, channels of a head. `numbers`: attributes of the attention
    module that follow from a width. `allowed`: the widths that the configuration can express.
    """

    attention: Any = None
    shape: tuple[int, int, int] = (1, 1, 1)
    numbers: Mapping[str, Number] | None = None
    allowed: Callable[[HeadWidth], bool] = lambda width: True

    def weights(self) -> tuple[Tensor, ...]:
        _, queries, head_dim = self.shape

        def per_query_head(weight: Tensor) -> Tensor:
            return weight.unflatten(0, (-1, head_dim)).repeat_interleave(queries, 0).flatten(0, 1)

        own = [rows for producer in self.producers for rows in producer.rows()]
        shared = [rows for producer in self.producers for rows in producer.rows("groups")]
        return (*own, *map(per_query_head, shared))

    def width(self, keep: float, multiple: int | None) -> HeadWidth:
        return HeadWidth.nearest(*self.shape, keep, self.allowed)

    def narrow(self, reduction: Reduction, width: Width, transaction: Transaction) -> None:
        if not isinstance(reduction, Selection) or not isinstance(width, HeadWidth):
            raise InputError("attention heads are narrowed by a selection of whole heads")
        self._narrow({"channels": reduction, "groups": width.group_rows(reduction)}, transaction)
        for name, number in (self.numbers or {}).items():
            transaction.set_attribute(self.attention, name, number(width))

    def parameters_saved(self, width: Width) -> int:
        assert isinstance(width, HeadWidth)
        groups = (width.groups - width.kept_groups) * width.head_dim
        return self._saved({"channels": width.channels - width.kept, "groups": groups})


def _blocks(model: nn.Module, layout: Layout) -> tuple[str, list[nn.Module]]:
    for path in layout.blocks:
        try:
            found = model.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(found, (nn.ModuleList, nn.Sequential)) and len(found):
            return path, list(found)
    raise ModelError(
        f"{type(model).__name__} keeps its blocks at none of {', '.join(layout.blocks)}"
    )


def _landing(block: nn.Module, seen: Seen) -> Landing:
    return Landing(block.get_submodule(seen.path) if seen.path else None, seen.output)


def _attributes(block: nn.Module, paths: Sequence[str]) -> list[tuple[Any, str]]:
    """Owner and name of those attributes that are there."""
    found = []
    for path in paths:
        owner, _, name = path.rpartition(".")
        module = block.get_submodule(owner)
        if hasattr(module, name):
            found.append((module, name))
    return found
