"""Sites of transformers, by layout: the paths of a family's blocks and of their parts.

    mlp      producers ─► act(…)[·…] [intermediate]     ─► consumer
    heads    queries, keys, values ─► attention [heads·head_dim] ─► output projection
    experts  the same as mlp, in each expert of a layer (see `grail.networks.experts`)
    shared_experts  the same as mlp, in the expert that every token is routed to

A family is a `Layout`: paths into its blocks and the names of the attributes of its sizes. Where
all blocks get the same width and the configuration can hold it, it is written there, and stock
transformers reloads the model; where not, `Transformer.notes` has a note.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grail.algebra.reduction import Reduction, Selection
from grail.algebra.targets import Multiple
from grail.algebra.width import HeadWidth, Width
from grail.errors import InputError, ModelError
from grail.networks.configuration import not_held, own_configuration
from grail.networks.experts import Experts
from grail.networks.layers import Consumer, Producer
from grail.networks.site import Architecture, AttentionInput, BoundSite, ResidualProbe
from grail.runtime.transaction import Transaction

# Settings that give all layers of a kind of site a bias: zeros change nothing, and reload.
BIASES = {"mlp": "mlp_bias", "heads": "attention_bias"}

Number = Callable[[HeadWidth], int]
Settings = dict[str, int]  # of a configuration, by name
Parts = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class ProbeSpec:
    """A `ResidualProbe` in a block: at the input of the module of that path, or at its output.

    Args:
        scale: the path of the factor of a consumer's output there.
    """

    path: str
    output: bool = False
    scale: str = ""


BLOCK_OUTPUT = ProbeSpec("")


def setting(name: str) -> Callable[[Any, int], Settings]:
    """Returns a function that writes a number of channels into a configuration."""
    return lambda config, kept: {name: kept}


_INTERMEDIATE_SIZE = setting("intermediate_size")

_NUMBERS: dict[tuple[str, ...], Number] = {
    ("num_heads", "num_attention_heads", "n_heads"): lambda w: w.kept_groups * w.kept_queries,
    ("num_key_value_heads", "num_kv_heads"): lambda w: w.kept_groups,
    ("num_key_value_groups",): lambda w: w.kept_queries,
    ("head_dim",): lambda w: w.head_dim,
    ("all_head_size", "attn_dim", "split_size"): lambda w: w.kept,
}


def numbers(*names: str) -> dict[str, Number]:
    """Returns attributes or settings of attention as functions of a width."""
    known = {name: number for of, number in _NUMBERS.items() for name in of}
    return {name: known[name] for name in names}


@dataclass(frozen=True)
class Mlp:
    """Intermediate channels: paths in a block; without producers there are none.

    Args:
        fused: the number of producers in one matrix, one after the other.
        config: returns the settings of a configuration for a number of channels; none if it cannot
            hold it.
        sizes: paths of attributes of that number in the block.
        probe: None where the output is scaled by token, so that no drift is corrected.
    """

    producers: tuple[str, ...]
    consumer: str
    fused: int = 1
    config: Callable[[Any, int], Settings] = _INTERMEDIATE_SIZE
    sizes: tuple[str, ...] = ()
    probe: ProbeSpec | None = BLOCK_OUTPUT


@dataclass(frozen=True)
class Mixture:
    """Experts instead of an MLP: the path of the layer that holds them all, and `Mlp.config`.

    Blocks with a plain MLP there are not narrowed.
    """

    path: str
    config: Callable[[Any, int], Settings]
    probe: ProbeSpec | None = BLOCK_OUTPUT


@dataclass(frozen=True)
class Heads:
    """Attention heads: paths in a block.

    Args:
        projections: query, key and value, or one layer with the rows of all three.
        consumer: the output projection.
        interleaved: whether one layer's rows are ordered head by head, not by query, key and value.
        head_dim: the attention module's name of the number of channels of a head.
        sizes: further attributes of it, as functions of a width.
        config: settings of the configuration, as functions of a width; None where it cannot hold
            fewer heads of the same head_dim.
        reads_config: whether the attention module reads such numbers whenever it runs.
    """

    projections: tuple[str, ...]
    consumer: str
    probe: ProbeSpec
    interleaved: bool = False
    head_dim: str = "head_dim"
    sizes: Mapping[str, Number] | None = None
    config: Mapping[str, Number] | None = None
    reads_config: bool = False


@dataclass(frozen=True)
class Layout:
    """One family: the path of its list of blocks, and its sites.

    Args:
        blocks: below the model, or below its `base_model_prefix`.
        attention: the path of that module; "" if unknown.
        heads: None for attention without modules for its projections.
        no_heads: the reason why heads cannot be narrowed.
        experts: narrowed instead of an MLP.
        shared_experts: the expert that every token is routed to.
        attention_first: whether the attention runs before all that is narrowed.
    """

    blocks: str
    attention: str
    mlp: Mlp
    heads: Heads | None = None
    no_heads: str = ""
    experts: Mixture | None = None
    shared_experts: Mlp | None = None
    attention_first: bool = True


class Transformer(Architecture):
    """The blocks of a model, of one layout or of one for each."""

    def __init__(self, model: Any, layout: Layout | Sequence[Layout]):
        self._model = model
        self._writing: Transaction | None = None  # the run that gave the model its configuration
        named = _blocks(model, layout if isinstance(layout, Layout) else layout[0])
        self._names, self.blocks = list(named), list(named.values())
        self.block_names = self._names
        self._layouts = [layout] * len(named) if isinstance(layout, Layout) else list(layout)
        self.default = ("experts",) if any(found.experts for found in self._layouts) else ("mlp",)
        others = {
            "heads": any(found.heads and not found.no_heads for found in self._layouts),
            "shared_experts": any(found.shared_experts for found in self._layouts),
        }
        self.kinds = (*(kind for kind, there in others.items() if there), *self.default)
        self.name = getattr(self.config, "_name_or_path", "") or type(model).__name__
        try:
            self.sites(self.default)
        except AttributeError as error:
            raise ModelError(
                f"{self.name} is not of its family's form ({error}); name sites by grail.Site"
            ) from error

    @property
    def config(self) -> Any:
        """The model's configuration; a write replaces the object."""
        return getattr(self._model, "config", None)

    def sites(self, kinds: Sequence[str]) -> list[list[BoundSite]]:
        make = {
            "heads": self._heads,
            "mlp": self._mlp,
            "shared_experts": self._shared_experts,
            "experts": self._experts,
        }
        return [
            [site for kind in self.kinds if kind in kinds for site in make[kind](number, block)]
            for number, block in enumerate(self.blocks)
        ]

    def attention_inputs(self, block: int) -> list[AttentionInput]:
        layout, module, name = self._layouts[block], self.blocks[block], self._names[block]
        heads = layout.heads
        if heads is None or not all(has(module, path) for path in heads.projections):
            return []
        try:
            layers = tuple(
                Consumer(f"{name}.{path}", module.get_submodule(path)) for path in heads.projections
            )
        except ModelError:  # quantised layers and adapters are not rewritten
            return []
        return [AttentionInput.of(f"{name}.{layout.attention}", block, layers)]

    def check_kinds(self, kinds: Sequence[str]) -> None:
        reasons = [layout.no_heads for layout in self._layouts if layout.no_heads]
        if "heads" in kinds and "heads" not in self.kinds and reasons:
            raise InputError(f"heads of {self.name} cannot be narrowed: {reasons[0]}")
        super().check_kinds(kinds)

    def write_config(
        self, sites: Sequence[BoundSite], widths: Mapping[str, Width], transaction: Transaction
    ) -> None:
        different = _different(sites, widths)
        for kind in different:
            settings = self._settings(kind, different, sites)
            self._write(settings, transaction)
            if settings and kind == "heads":
                self._share_config(transaction)

    def _write(self, settings: Settings, transaction: Transaction) -> None:
        """Writes changed settings into a configuration that only this model uses."""
        changed = {
            name: value
            for name, value in settings.items()
            if getattr(self.config, name, None) != value
        }
        if not changed:
            return
        if transaction is not self._writing:
            own_configuration(self._model, transaction)
            self._writing = transaction
        for name, value in changed.items():
            transaction.set_attribute(self.config, name, value)

    def beyond_configuration(
        self, sites: Sequence[BoundSite], widths: Mapping[str, Width]
    ) -> list[str]:
        reasons, different = [], _different(sites, widths)
        for kind, found in different.items():
            reason = not_held(kind, found)
            if self.config is not None and reason and not self._settings(kind, different, sites):
                reasons.append(reason)
        return reasons

    def settings_by_block(self) -> list[Settings]:
        """Returns for each block the settings of a configuration that build its present widths.

        Widths that the family's configuration has no setting for are left out.
        """
        found: list[Settings] = []
        for sites in self.sites(self.kinds):
            widths = {site.kind: [site.width(1, None)] for site in sites}
            of_kinds = [self._settings(kind, widths, sites) for kind in widths]
            found.append({name: value for of_kind in of_kinds for name, value in of_kind.items()})
        return found

    def _settings(
        self, kind: str, widths: Mapping[str, Sequence[Width]], sites: Sequence[BoundSite]
    ) -> Settings:
        """Returns the settings of the configuration for a kind; none if it cannot hold its widths.

        Args:
            widths: the different widths of each kind.
            sites: those of the run, narrow.
        """
        if self.config is None or len(widths[kind]) > 1:
            return {}
        (width,) = widths[kind]
        if isinstance(width, HeadWidth):
            return self._head_settings(width)
        part: Mlp | Mixture | None = getattr(self._layouts[0], kind)
        assert part is not None
        return part.config(self.config, width.kept)

    def _share_config(self, transaction: Transaction) -> None:
        """Gives attention modules the model's configuration again, which now has their widths."""
        for block, layout in zip(self.blocks, self._layouts, strict=True):
            attention: Any = block.get_submodule(layout.attention)
            if getattr(attention, "config", self.config) is not self.config:
                transaction.set_attribute(attention, "config", self.config)

    def ensure_biases(self, sites: Sequence[BoundSite], transaction: Transaction) -> None:
        for kind, setting in BIASES.items():
            of_kind = [site for site in sites if site.kind == kind]
            if of_kind and getattr(self.config, setting, None) is False:
                for site in of_kind:
                    site.add_biases(transaction)
                self._write({setting: True}, transaction)
        super().ensure_biases(sites, transaction)

    def _experts(self, number: int, block: nn.Module) -> list[BoundSite]:
        mixture = self._layouts[number].experts
        if mixture is None or not has(block, mixture.path):
            return []
        module = block.get_submodule(mixture.path)
        experts = Experts(f"{self._names[number]}.{mixture.path}", module)
        probe = None if mixture.probe is None else _probe(block, mixture.probe)
        return experts.sites(number, self._upstream(number, block), probe)

    def _shared_experts(self, number: int, block: nn.Module) -> list[BoundSite]:
        shared = self._layouts[number].shared_experts
        if shared is None or not has(block, shared.consumer):
            return []
        return [self._channels("shared_experts", shared, number, block)]

    def _mlp(self, number: int, block: nn.Module) -> list[BoundSite]:
        mlp = self._layouts[number].mlp
        return [self._channels("mlp", mlp, number, block)] if mlp.producers else []

    def _upstream(self, number: int, block: nn.Module) -> tuple[nn.Module, ...]:
        path = self._layouts[number].attention
        return (block.get_submodule(path),) if path else ()

    def _channels(self, kind: str, mlp: Mlp, number: int, block: nn.Module) -> BoundSite:
        name = self._names[number]
        consumer = Consumer(f"{name}.{mlp.consumer}", block.get_submodule(mlp.consumer))
        parts = (("channels", consumer.channels),) * mlp.fused if mlp.fused > 1 else None
        return BoundSite(
            name=f"{name}.{mlp.consumer.rpartition('.')[0]}".rstrip("."),
            kind=kind,
            block=number,
            producers=tuple(
                Producer(f"{name}.{path}", block.get_submodule(path), parts)
                for path in mlp.producers
            ),
            consumers=(consumer,),
            upstream=self._upstream(number, block),
            probe=None if mlp.probe is None else _probe(block, mlp.probe),
            sizes=tuple(_attributes(block, mlp.sizes)),
        )

    def _heads(self, number: int, block: nn.Module) -> list[BoundSite]:
        layout, name = self._layouts[number], self._names[number]
        heads = layout.heads
        if heads is None or layout.no_heads:
            return []
        attention = block.get_submodule(layout.attention)
        head_dim: Any = getattr(attention, heads.head_dim)
        consumer = Consumer(f"{name}.{heads.consumer}", block.get_submodule(heads.consumer))
        producers = _projections(name, block, heads, consumer.channels, head_dim)
        grouped = len(producers[-1].rows("groups")[-1])
        site = HeadSite(
            name=f"{name}.{layout.attention}",
            kind="heads",
            block=number,
            producers=producers,
            consumers=(consumer,),
            probe=_probe(block, heads.probe),
            attention=attention,
            shape=(grouped // head_dim, consumer.channels // grouped, head_dim),
            numbers=heads.sizes or {},
            settings=self._head_settings if heads.reads_config else None,
            allowed=self._loads,
        )
        return [site]

    def _loads(self, width: HeadWidth) -> bool:
        """Returns whether the configuration accepts it: in Llama's, heads divide hidden_size."""
        validate = getattr(self.config, "validate_architecture", None)
        if validate is None:
            return True
        try:
            _with_settings(self.config, self._head_settings(width)).validate_architecture()
        except ValueError:
            return False
        return True

    def _head_settings(self, width: HeadWidth) -> Settings:
        heads = next(layout.heads for layout in self._layouts if layout.heads)
        return {name: number(width) for name, number in (heads.config or {}).items()}


def _different(sites: Sequence[BoundSite], widths: Mapping[str, Width]) -> dict[str, list[Width]]:
    """Returns the distinct widths of each kind."""
    found: dict[str, dict[Width, None]] = {}
    for site in sites:
        found.setdefault(site.kind, {})[widths[site.name]] = None
    return {kind: list(of_kind) for kind, of_kind in found.items()}


@dataclass(frozen=True, eq=False, kw_only=True)
class HeadSite(BoundSite):
    """Query heads of grouped attention; dropping a whole group also drops its key and value head.

    Args:
        attention: the attention module.
        shape: groups, queries in each, channels of a head.
        numbers: attributes of the attention module, as functions of a width.
        settings: the settings that it reads in its configuration. It gets a configuration of its
            own, since blocks of other widths share the old one.
        allowed: whether the configuration can hold a width.
    """

    attention: Any = None
    shape: tuple[int, int, int] = (1, 1, 1)
    numbers: Mapping[str, Number] | None = None
    settings: Callable[[HeadWidth], Settings] | None = None
    allowed: Callable[[HeadWidth], bool] = lambda width: True

    def weights(self) -> tuple[Tensor, ...]:
        _, queries, head_dim = self.shape

        def per_query_head(weight: Tensor) -> Tensor:
            return weight.unflatten(0, (-1, head_dim)).repeat_interleave(queries, 0).flatten(0, 1)

        own = [rows for producer in self.producers for rows in producer.rows()]
        shared = [rows for producer in self.producers for rows in producer.rows("groups")]
        return (*own, *map(per_query_head, shared))

    def width(self, keep: float, multiple: Multiple | None) -> HeadWidth:
        return HeadWidth.nearest(*self.shape, keep, self.allowed)

    def narrow(self, reduction: Reduction, width: Width, transaction: Transaction) -> None:
        if not isinstance(reduction, Selection) or not isinstance(width, HeadWidth):
            raise InputError("attention heads are narrowed by a selection of whole heads")
        width.check(self.name, reduction)
        self._narrow({"channels": reduction, "groups": width.group_rows(reduction)}, transaction)
        for name, number in (self.numbers or {}).items():
            transaction.set_attribute(self.attention, name, number(width))
        if self.settings is not None:
            own = _with_settings(self.attention.config, self.settings(width))
            transaction.set_attribute(self.attention, "config", own)

    def parameters_saved(self, width: Width) -> int:
        assert isinstance(width, HeadWidth)
        groups = (width.groups - width.kept_groups) * width.head_dim
        return self._saved({"channels": width.channels - width.kept, "groups": groups})


def _blocks(model: nn.Module, layout: Layout) -> dict[str, nn.Module]:
    """Returns the blocks by their names."""
    paths = (f"{getattr(model, 'base_model_prefix', '')}.{layout.blocks}", layout.blocks)
    for path in paths:
        try:
            found = model.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(found, (nn.ModuleList, nn.Sequential)) and len(found):
            return {f"{path}.{name}": block for name, block in found._modules.items()}
    raise ModelError(f"{type(model).__name__} has no blocks at {' or '.join(paths)}")


def _projections(
    name: str, block: nn.Module, heads: Heads, channels: int, head_dim: int
) -> tuple[Producer, ...]:
    modules = [block.get_submodule(path) for path in heads.projections]
    names = [f"{name}.{path}" for path in heads.projections]
    if len(modules) > 1:
        shared: Parts = (("groups", len(Producer(names[1], modules[1]).rows()[0])),)
        roles: list[Parts] = [(("channels", channels),), shared, shared]
        return tuple(map(Producer, names, modules, roles))
    grouped = (len(Producer(names[0], modules[0]).rows()[0]) - channels) // 2
    parts = (("channels", channels), ("groups", grouped), ("groups", grouped))
    turn = head_dim if heads.interleaved else None  # of each head its query, key and value
    return (Producer(names[0], modules[0], parts, turn=turn),)


def has(module: nn.Module, path: str) -> bool:
    """Returns whether a module holds a module of that path."""
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def _probe(block: nn.Module, spec: ProbeSpec) -> ResidualProbe:
    """Returns the probe of a block."""
    scale = None
    if spec.scale:
        owner, _, name = spec.scale.rpartition(".")
        found: Tensor | float = getattr(block.get_submodule(owner), name)
        dtype = found.dtype if isinstance(found, Tensor) else torch.float32
        scale = torch.as_tensor(found, dtype=dtype).detach()
    module = block.get_submodule(spec.path) if spec.path else None
    return ResidualProbe(module, spec.output, scale, normalised=True)


def _with_settings(config: Any, settings: Settings) -> Any:
    """Returns a copy of a configuration with other settings."""
    changed = copy.copy(config)
    changed.__dict__.update(settings)
    return changed


def _attributes(block: nn.Module, paths: Sequence[str]) -> list[tuple[Any, str]]:
    """Returns owner and name of those attributes that exist."""
    found = []
    for path in paths:
        owner, _, name = path.rpartition(".")
        module = block.get_submodule(owner)
        if hasattr(module, name):
            found.append((module, name))
    return found
