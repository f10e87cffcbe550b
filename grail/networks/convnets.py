"""Sites of convolutional networks: the channels inside their residual blocks.

    conv    producer ─► batch norm, activation, depthwise convolution … ─► consumer

A block is an entry of a list of modules (`nn.Sequential`, `nn.ModuleList`) with such channels:
ResNet's basic and bottleneck blocks, plain or pre-activation, inverted residuals with or without
squeeze-and-excitation, under any layer names. `grail.networks.channel_graph` finds the channels.
The stream between blocks, the stem and the downsampling branch are not narrowed. Where no list has
blocks, a module whose forward runs its children in sequence counts as a list (RegNet's stages).

A gate (squeeze-and-excitation) reads and writes the same channels as the convolutions around it:
its first layer is one more consumer, its last one more producer. A grouped convolution keeps
equally many channels of each of its groups, and cannot consume a site: a full map of channels does
not fit into it.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import fx, nn

from grail.algebra.kinds import MAPS
from grail.algebra.width import Width
from grail.errors import ModelError
from grail.networks.channel_graph import Flow
from grail.networks.channel_sets import Channels
from grail.networks.configuration import has_configuration, not_held
from grail.networks.layers import Along, Consumer, Producer
from grail.networks.site import Architecture, BoundSite, ResidualProbe, bind

_LISTS = (nn.Sequential, nn.ModuleList)


class ConvNet(Architecture):
    """The blocks of a convolutional network, as `search` found them in `model`."""

    kinds = default = ("conv",)

    def __init__(self, model: Any, search: "Search"):
        name = getattr(getattr(model, "config", None), "_name_or_path", "")
        self.name, self.blocks = name or type(model).__name__, list(search.blocks.values())
        self._names, self._search = list(search.blocks), search
        self._configured = has_configuration(model)
        if not any(self.sites(self.kinds)):
            why = "; ".join(self._left_out())
            raise ModelError(
                f"{self.name} has no channels to narrow: {why}; find sites by grail.trace, or name "
                "them by grail.Site"
            )

    def sites(self, kinds: Sequence[str]) -> list[list[BoundSite]]:
        return [
            [site for site in self._tried(number) if isinstance(site, BoundSite)]
            for number in range(len(self.blocks))
        ]

    def notes(self, sites: Sequence[BoundSite], widths: Mapping[str, Width]) -> list[str]:
        return [*super().notes(sites, widths), *self._left_out()]

    def beyond_configuration(
        self, sites: Sequence[BoundSite], widths: Mapping[str, Width]
    ) -> list[str]:
        found = list(dict.fromkeys(widths[site.name] for site in sites))
        reason = not_held("conv", found) if self._configured else None
        return [reason] if reason else []

    def _left_out(self) -> list[str]:
        """Returns a note for each set of channels that cannot be narrowed, with the reason."""
        tried = itertools.chain(*map(self._tried, range(len(self.blocks))))
        return [f"left out: {error}" for error in tried if isinstance(error, ModelError)]

    def _tried(self, number: int) -> Iterator[BoundSite | ModelError]:
        """Yields the sites of a block, and errors for those that cannot be narrowed."""
        name = self._names[number]
        if name in self._search.untraced:
            yield ModelError(f"{name}: {self._search.untraced[name]}")
        if name not in self._search.flows:
            return
        flow = self._search.flows[name]
        for channels in flow.inner():
            try:
                yield self._site(number, flow, channels)
            except ModelError as error:
                yield error

    def _site(self, number: int, flow: Flow, channels: Channels) -> BoundSite:
        name = f"{self._names[number]}.{channels.producers[0].target}"
        if channels.lost:
            raise ModelError(f"{name}: its channels cannot be followed through {channels.lost}")

        def named(nodes: Sequence[fx.Node]) -> list[tuple[str, Any]]:
            return [(f"{self._names[number]}.{node.target}", flow.module(node)) for node in nodes]

        for node in channels.consumers:
            if (groups := getattr(flow.module(node), "groups", 1)) > 1:
                raise ModelError(
                    f"{self._names[number]}.{node.target} reads its channels in {groups} groups; "
                    "grail.trace finds such sites"
                )
        return bind(
            name=name,
            kind="conv",
            block=number,
            producers=tuple(Producer(*producer) for producer in named(channels.producers)),
            consumers=tuple(
                Consumer(*consumer, flow.norm(node))
                for consumer, node in zip(
                    named(channels.consumers), channels.consumers, strict=True
                )
            ),
            along=tuple(Along(*layer) for layer in named(channels.along)),
            probe=_probe(flow, channels.consumers[-1]),
        )


class Search:
    """A search for the innermost lists of blocks, or else for the innermost chains of them.

    Attributes:
        blocks: by name, from the first one with channels of its own.
        flows: of the blocks with channels of their own.
        untraced: the reasons why others could not be traced.
    """

    def __init__(self, model: nn.Module):
        self.flows: dict[str, Flow] = {}
        self.untraced: dict[str, str] = {}
        self.blocks = self._below("", model, _in_list) or self._below("", model, _in_chain)

    def _below(
        self, prefix: str, module: nn.Module, ordered: Callable[[nn.Module], list[str]]
    ) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {}
        for key, child in module.named_children():
            found |= self._below(f"{prefix}{key}.", child, ordered)
        if found:
            return found
        for key in ordered(module):
            name, child = f"{prefix}{key}", module.get_submodule(key)
            if self._has_channels(name, child) or found:
                found[name] = child
        return found

    def _has_channels(self, name: str, block: nn.Module) -> bool:
        convolutions = [m for m in block.modules() if isinstance(m, MAPS)]
        if isinstance(block, _LISTS) or len(convolutions) < 2:
            return False
        try:
            flow = Flow(block)
        except Exception as error:  # its forward may raise anything at a tensor without values
            self.untraced[name] = f"its forward cannot be traced ({error})"
            return False
        if any(flow.inner()):
            self.flows[name] = flow
        return name in self.flows


def _in_list(module: nn.Module) -> list[str]:
    """Returns the names of the entries of a list of modules, in order."""
    return [key for key, _ in module.named_children()] if isinstance(module, _LISTS) else []


def _in_chain(module: nn.Module) -> list[str]:
    """Returns the names of a module's children, if its forward runs them in sequence."""
    if isinstance(module, _LISTS) or not any(True for _ in module.children()):
        return []
    try:
        first, *calls, last = _Chain().trace(module).nodes
    except Exception:  # its forward may raise anything at a tensor without values
        return []
    links = itertools.pairwise([first, *calls, last])
    reads = all(n.args == (before,) and not n.kwargs for before, n in links)
    called = [str(node.target) for node in calls if node.op == "call_module"]
    chained = first.op == "placeholder" and reads and len(called) == len(calls)
    return called if chained and len(set(called)) == len(called) else []


class _Chain(fx.Tracer):
    """A tracer down to a module's children."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def architecture(model: nn.Module) -> Architecture | None:
    """Returns its blocks and sites, if it has lists of blocks with channels of their own.

    Raises:
        ModelError: nothing in it can be narrowed, with the reason.
    """
    search = Search(model)
    if search.untraced and not search.blocks:
        name, reason = next(iter(search.untraced.items()))
        raise ModelError(
            f"{name} of {type(model).__name__}: {reason}; find sites by grail.trace, or name them "
            "by grail.Site"
        )
    return ConvNet(model, search) if search.blocks else None


LAYOUTS = {"convolutional networks of blocks (ResNet, MobileNet, EfficientNet)": architecture}


def _probe(flow: Flow, consumer: fx.Node) -> ResidualProbe:
    """Returns a probe at the sum that the consumer's output joins, or else at that output."""
    found = flow.sum_behind(consumer)
    if found is None:
        return ResidualProbe(flow.module(consumer), output=True)
    module, slope = found
    return ResidualProbe(module, scale=slope)
