"""Transformers that no list of families names, recognised by the form of their blocks.

A site is proposed by shapes: layers that run in sequence and write and read one activation, experts
in one tensor, projections to queries, keys and values with whole heads. Then it is tried with a few
tokens:

    narrow     the site is narrowed and restored; its consumer must read the kept channels
               unchanged. This detects a norm or a softmax over the channels, a choice among them
               and another order of fused rows
    probe      the consumer's output is changed; drift is measured at the last module whose input
               shows the change one to one, or by a factor that the block stores as a number
    reload     a model of the narrow configuration is made without weights; its shapes must be the
               narrowed ones

Blocks of equal modules, shapes and settings are tried once.
"""

import copy
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from grail.algebra.width import HeadWidth, Width
from grail.calibrate.stream import Stream
from grail.errors import ModelError
from grail.networks.layers import Consumer
from grail.networks.site import Architecture, BoundSite
from grail.networks.transformer import (
    BLOCK_OUTPUT,
    Heads,
    Layout,
    Mixture,
    Mlp,
    ProbeSpec,
    Settings,
    Transformer,
    has,
    numbers,
)
from grail.networks.trial import KINDS, NO_MLP, NarrowsNot, Trial, first_line
from grail.runtime.memory import ran_out
from grail.runtime.transaction import eval_no_grad

LAYOUTS = ("language models of transformers whose blocks have the usual form",)

TOKENS = 12  # of each of two sequences that run through a block
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_MLP_SIZES = ("intermediate_size", "intermediate_dim", "ffn_dim", "ffn_hidden_size")
_HEAD_SIZES = numbers(
    *("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads"),
    "num_key_value_groups",
)
_HEAD_CONFIG = numbers("num_attention_heads", "num_key_value_heads", "head_dim")


def architecture(model: Any) -> Architecture | None:
    """Returns the blocks and sites of a model of token ids with a configuration of transformers.

    Raises:
        NotRecognisedError: no site is found, with the reason.
    """
    if not hasattr(getattr(model, "config", None), "model_type"):
        return None
    if "input_ids" not in inspect.signature(model.forward).parameters:
        return None
    try:
        return Recognised(model)
    except ModelError as error:
        raise NotRecognisedError(str(error)) from error


class NotRecognisedError(ModelError):
    """A model of token ids without a site; the message is the reason."""


class Recognised(Transformer):
    """The blocks of a model whose layouts were found by trials.

    Attributes:
        reasons: by kind, why its sites were refused.
    """

    def __init__(self, model: Any):
        layouts, self.reasons = _layouts(model)
        super().__init__(model, layouts)
        self.kinds = KINDS
        made = {kind: self.sites((kind,)) for kind in KINDS}
        self.kinds = tuple(kind for kind in KINDS if any(made[kind]))
        self._fitting: dict[str, Settings] = {}  # of the last run, by kind
        self._fitted: Any = None  # what that run narrowed

    def _settings(
        self, kind: str, widths: Mapping[str, Sequence[Width]], sites: Sequence[BoundSite]
    ) -> Settings:
        if self._fitted != widths:
            self._fitted, self._fitting = dict(widths), self._reloading(widths, sites)
        return self._fitting.get(kind, {})

    def _reloading(
        self, widths: Mapping[str, Sequence[Width]], sites: Sequence[BoundSite]
    ) -> dict[str, Settings]:
        """Returns by kind the settings with which the configuration makes a model of these shapes.

        Kinds are tried one by one, then together those whose settings change each other's shapes.
        """
        found: dict[str, Settings] = {}
        narrow = {name: p.shape for name, p in self._model.named_parameters()}
        dense = _shapes(self._model, {})
        changed = {name for name in dense if narrow.get(name) != dense[name]}
        options = {
            kind: list(self._candidates(of_kind[0]))
            for kind, of_kind in widths.items()
            if len(of_kind) == 1
        }
        names = {kind: self._names_of([s for s in sites if s.kind == kind]) for kind in options}
        for kind, candidates in options.items():
            wanted = dense | {name: narrow[name] for name in changed & names[kind]}
            for settings in candidates:
                if dense and kind not in found and _shapes(self._model, settings) == wanted:
                    found[kind] = settings
        left = [kind for kind in options if kind not in found]
        if len(left) > 1:
            own = set().union(*(names[kind] for kind in left))
            wanted = dense | {name: narrow[name] for name in changed & own}
            for several in itertools.product(*([*options[kind], {}] for kind in left)):
                together = {name: value for settings in several for name, value in settings.items()}
                if together and _shapes(self._model, together) == wanted:
                    return found | dict.fromkeys(left, together)
        return found

    def _names_of(self, sites: Sequence[BoundSite]) -> set[str]:
        """Returns the names of the model's parameters that these sites narrow."""
        own = {id(p) for site in sites for m in _modules_of(site) for p in m.parameters(False)}
        return {name for name, p in self._model.named_parameters() if id(p) in own}

    def _candidates(self, width: Width) -> Iterator[Settings]:
        if isinstance(width, HeadWidth):
            yield self._head_settings(width)
            return
        names = [name for name, v in vars(self.config).items() if v == width.channels]
        for name in sorted(names, key=lambda name: "intermediate" not in name):
            if type(getattr(self.config, name)) is int:
                yield {name: width.kept}


def _modules_of(site: BoundSite) -> list[nn.Module]:
    """Returns the modules of the model that a site narrows."""
    return [site.group.module] if site.group is not None else list(site.modules().values())


def _has_number(config: Any, name: str) -> bool:
    """Returns whether a configuration has one number of that name."""
    try:
        return isinstance(getattr(config, name), int)
    except Exception:  # a number that differs by layer raises its own error
        return False


def _shapes(model: Any, settings: Settings) -> dict[str, Any]:
    """Returns the shapes of a model of this class with these settings; empty if it fails."""
    config = copy.deepcopy(model.config)
    try:
        for name, value in settings.items():
            setattr(config, name, value)
        with torch.device("meta"):
            made = type(model)(config)
    except Exception:  # a class can raise anything at such settings
        return {}
    return {name: parameter.shape for name, parameter in made.named_parameters()}


def _layouts(model: Any) -> tuple[list[Layout], dict[str, str]]:
    """Returns a layout for each block, and by kind the reasons for refused sites.

    Raises:
        ModelError: no block has an MLP or experts that can be narrowed.
    """
    path, blocks = _stack(model)
    with eval_no_grad(model):
        try:
            layouts, reasons = _tried(model, path, blocks)
        except Exception as error:  # a model can raise anything at token ids alone
            if ran_out(error):
                raise
            first = first_line(error).partition("; name the sites")[0]
            raise ModelError(f"its blocks cannot be tried one by one: {first}") from error
    if not any(layout.mlp.producers or layout.experts for layout in layouts):
        why = reasons.get("experts") or reasons.get("mlp")
        raise ModelError(why or "its blocks have no layers that write and read one activation")
    return layouts, reasons


def _tried(
    model: Any, path: str, blocks: Sequence[nn.Module]
) -> tuple[list[Layout], dict[str, str]]:
    """Tries each form of block once; returns the layouts, and the reasons for refused sites."""
    batch = _tokens(model)
    stream = Stream(model, blocks, [batch])
    hidden, tokens = (list(t.shape) for t in (stream.hidden[0], batch["input_ids"]))
    if hidden[:-1] != tokens:
        raise ModelError(f"blocks pass on hidden states {hidden} of tokens {tokens}, not [B, L, _]")
    stream.require_chain(model, batch)
    found: dict[Any, Layout] = {}
    layouts, reasons = [], {}
    for number, block in enumerate(blocks):
        form = _form(block)
        if form not in found:
            proposals = _Proposals(model, path, stream, number)
            found[form] = proposals.layout()
            reasons.update(proposals.reasons)
        layouts.append(found[form])
    return layouts, reasons


def _tokens(model: Any) -> dict[str, Tensor]:
    """Returns a batch to try blocks with."""
    size = getattr(model.get_input_embeddings(), "num_embeddings", 2 * TOKENS)
    ids = torch.arange(2 * TOKENS).mul(7).remainder(max(1, size - 1)).view(2, TOKENS)
    return {"input_ids": ids}


def _stack(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """Returns path and blocks of a model's only stack of blocks."""
    found: dict[str, list[nn.Module]] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside and any(map(_computes, module)):
            found[path] = list(module)
    found = {path: blocks for path, blocks in found.items() if blocks}
    if len(found) > 1:
        raise ModelError(
            f"it is made of {len(found)} stacks of blocks, {', '.join(found)}; compress a model "
            "that has one of them, such as its language model"
        )
    if not found:
        raise ModelError("it has no list of blocks")
    return next(iter(found.items()))


def _computes(block: nn.Module) -> bool:
    """Returns whether a module is a block, of several layers."""
    return sum(p.dim() >= 2 for p in block.parameters()) > 2


def _form(block: nn.Module) -> Any:
    """Returns the form of a block: its modules, shapes and settings."""
    modules = tuple(
        (name, type(module), tuple(sorted(_plain(vars(module)).items())))
        for name, module in block.named_modules()
    )
    return modules, tuple((name, p.shape) for name, p in block.named_parameters())


def _plain(attributes: Mapping[str, Any]) -> dict[str, str]:
    kinds = (bool, int, float, str)
    return {
        name: repr(value)
        for name, value in attributes.items()
        if isinstance(value, kinds) and name not in ("layer_idx", "layer_id", "layer_number")
    }


class _Proposals(Trial):
    """Proposes sites by the shapes of a block, and keeps those that pass their trial.

    Attributes:
        reasons: by kind, why its sites were refused.
    """

    def __init__(self, model: Any, path: str, stream: Stream, number: int):
        super().__init__(model, path, stream, number)
        self.reasons: dict[str, str] = {}

    def layout(self) -> Layout:
        """Returns the layout of the block."""
        layers = self.in_order()
        layout = self._with_experts(Layout(self._path, "", NO_MLP))
        layout = self._with_mlps(layout, layers)
        return self._with_attention(layout, layers)

    def _with_mlps(self, layout: Layout, layers: Sequence[tuple[str, nn.Module]]) -> Layout:
        """Adds the widest MLP of the block, and the shared expert, to a layout."""
        mixture = next((path.rpartition(".")[0] for path, _ in self._fused()), "")
        for consumer, candidates in self._mlps(layers).items():
            inside = bool(mixture) and consumer.startswith(f"{mixture}.")
            shared = inside or (bool(self._fused()) and "shared" in consumer)
            kind = "shared_experts" if shared else "mlp"
            for number, mlp in enumerate(candidates):
                try:
                    site = self.narrows(replace(layout, mlp=mlp), "mlp")
                except NarrowsNot as reason:
                    if number == 0:  # the one with most producers is the likeliest
                        self._refused(kind, consumer, str(reason))
                    continue
                probe = self.probe(consumer, site.consumers[0].outputs)
                if shared:
                    # Where its output is scaled by token, the routed experts correct its drift.
                    probe = probe if probe is not None and not probe.output else None
                    layout = replace(layout, shared_experts=replace(mlp, probe=probe))
                elif self._width(layout.mlp) < site.channels:
                    layout = replace(layout, mlp=replace(mlp, probe=probe))
                break
        return layout

    def _refused(self, kind: str, consumer: str, reason: str) -> None:
        """Records why a site was refused, preferably one outside of attention."""
        owner = consumer.rpartition(".")[0]
        attends = any(word in owner for word in ("att", "mixer", "conv", "temporal"))
        if kind not in self.reasons or not attends:
            self.reasons[kind] = reason

    def _width(self, mlp: Mlp) -> int:
        module = self._block.get_submodule(mlp.consumer)
        return Consumer("", module).channels if mlp.producers else 0

    def _mlps(self, layers: Sequence[tuple[str, nn.Module]]) -> dict[str, list[Mlp]]:
        """Returns by consumer its possible MLPs, those of most producers first."""
        sizes = [Consumer(name, module) for name, module in layers]
        found: dict[str, list[Mlp]] = {}
        for last, consumer in enumerate(sizes):
            gate = "norm" in consumer.name.rpartition(".")[0]  # inside a norm
            if consumer.outputs != self._hidden or gate:
                continue
            before = sizes[max(0, last - 2) : last]
            width, mlps = consumer.channels, []
            if len(before) == 2 and all(p.outputs == width for p in before):
                mlps.append(Mlp((before[0].name, before[1].name), consumer.name))
            if before and before[-1].outputs == 2 * width:
                mlps.append(Mlp((before[-1].name,), consumer.name, fused=2))
            if before and before[-1].outputs == width:
                mlps.append(Mlp((before[-1].name,), consumer.name))
            found[consumer.name] = [replace(mlp, sizes=self._sizes(mlp, width)) for mlp in mlps]
        return found

    def _sizes(self, mlp: Mlp, width: int) -> tuple[str, ...]:
        owner = mlp.consumer.rpartition(".")[0]
        module = self._block.get_submodule(owner)
        names = (name for name in _MLP_SIZES if getattr(module, name, None) == width)
        return tuple(f"{owner}.{name}".removeprefix(".") for name in names)

    def _fused(self) -> list[tuple[str, nn.Module]]:
        """Returns the layers that hold experts in one tensor, by path."""
        return [
            (path, module)
            for path, module in self._block.named_modules()
            if isinstance(down := getattr(module, "down_proj", None), nn.Parameter)
            and down.dim() == 3
        ]

    def _with_experts(self, layout: Layout) -> Layout:
        for path, module in self._fused():
            proposed = replace(layout, experts=Mixture(path, lambda config, kept: {}))
            try:
                self.narrow_together(proposed, path, module)
            except NarrowsNot as reason:
                self.reasons.setdefault("experts", str(reason))
                continue
            assert proposed.experts is not None
            probe = self.probe(path, self._outputs(path))
            return replace(layout, experts=replace(proposed.experts, probe=probe))
        return layout

    def _outputs(self, path: str) -> int:
        return int(self.returned(self._block.get_submodule(path)).shape[-1])

    def _with_attention(self, layout: Layout, layers: Sequence[tuple[str, nn.Module]]) -> Layout:
        """Adds the path of the attention, and its heads if they can be narrowed, to a layout."""
        for path, module in self._block.named_modules():
            if all(has(module, name) for name in _PROJECTIONS):
                attention = path
                break
        else:
            return replace(layout, no_heads="its attention has no q_proj, k_proj and v_proj")
        if not self.replays(attention):
            return replace(layout, no_heads="its attention hands more than its output on")
        runs = [name.startswith(f"{attention}.") for name, _ in layers]
        others = [*layout.mlp.producers]
        others += layout.shared_experts.producers if layout.shared_experts else ()
        last = max((number for number, own in enumerate(runs) if own), default=0)
        first = min((n for n, (name, _) in enumerate(layers) if name in others), default=len(runs))
        layout = replace(layout, attention=attention, attention_first=last < first)
        try:
            return replace(layout, heads=self._heads(layout, attention))
        except NarrowsNot as reason:
            self.reasons.setdefault("heads", str(reason))
            return replace(layout, no_heads=str(reason))

    def _heads(self, layout: Layout, path: str) -> Heads:
        """Returns the heads of an attention module.

        Raises:
            NarrowsNot: they are not whole, or depend on each other.
        """
        attention: Any = self._block.get_submodule(path)
        heads = self._proposed_heads(path, attention)
        reading = replace(heads, reads_config=True)
        options = [heads, reading] if hasattr(attention, "config") else [heads]
        for last, proposed in enumerate(options, 1):
            try:
                site = self.narrows(replace(layout, heads=proposed), "heads")
            except NarrowsNot:
                if last == len(options):
                    raise
                continue
            probe = self.probe(heads.consumer, site.consumers[0].outputs)
            return replace(proposed, probe=probe or ProbeSpec(heads.consumer, output=True))
        raise AssertionError

    def _proposed_heads(self, path: str, attention: Any) -> Heads:
        """Returns the heads of an attention module by its attributes.

        Raises:
            NarrowsNot: it has other layers, or values for all heads.
        """
        outputs = [name for name in ("o_proj", "out_proj", "dense") if has(attention, name)]
        if not outputs or not isinstance(getattr(attention, "head_dim", None), int):
            raise NarrowsNot("its attention has no output projection o_proj, or no head_dim")
        layers = (*_PROJECTIONS, outputs[0])
        if not all(self.is_plain(name, attention.get_submodule(name)) for name in layers):
            raise NarrowsNot("its projections are no plain layers")
        for name, tensor in (*attention.named_parameters(), *attention.named_buffers()):
            own = name.rpartition(".")[0] in layers
            if not own and tensor.numel() not in (1, attention.head_dim):
                raise NarrowsNot(f"{name} of its attention has values for all heads")
        return Heads(
            projections=tuple(f"{path}.{name}" for name in _PROJECTIONS),
            consumer=f"{path}.{outputs[0]}",
            probe=BLOCK_OUTPUT,
            sizes={
                name: number
                for name, number in _HEAD_SIZES.items()
                if isinstance(vars(attention).get(name), int)
            },
            config={
                name: number
                for name, number in _HEAD_CONFIG.items()
                if _has_number(self._model.config, name)
            },
        )
