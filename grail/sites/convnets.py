"""Sites of convolutional networks: the channels inside their residual blocks.

    conv    producer ─► batch norm, activation, depthwise convolution … ─► consumer

A block is whatever a list of modules (`nn.Sequential`, `nn.ModuleList`) holds that has such
channels: ResNet's basic and bottleneck blocks, plain or pre-activation, inverted residuals with or
without squeeze-and-excitation, whatever their library calls the layers. `grail.sites.channels`
finds the channels; the stream between blocks, the stem and the downsampling branch are left alone.

A gate (squeeze-and-excitation) reads and writes the same channels as the convolutions around it:
its first layer is one more consumer, its last one more producer. A grouped convolution keeps
equally many channels of each of its groups, and cannot consume a site: a full map of channels does
not fit into it.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import fx, nn

from grail.errors import ModelError
from grail.layers import Consumer, Producer
from grail.sites.channels import Channels, Flow
from grail.sites.site import Architecture, BoundSite, Landing, bind
from grail.weights import CONVOLUTIONS
from grail.width import Width

_LISTS = (nn.Sequential, nn.ModuleList)


class ConvNet(Architecture):
    """The blocks of a convolutional network, as `search` found them in `model`."""

    kinds = default = ("conv",)

    def __init__(self, model: Any, search: "Search"):
        name = getattr(getattr(model, "config", None), "_name_or_path", "")
        self.name, self.blocks = name or type(model).__name__, list(search.blocks.values())
        self._names, self._search = list(search.blocks), search
        if not any(self.sites(self.kinds)):
            why = "; ".join(self.notes([], {}))
            raise ModelError(f"{self.name} has no channels to narrow: {why}")

    def sites(self, kinds: Sequence[str]) -> list[list[BoundSite]]:
        return [
            [site for site in self._tried(number) if isinstance(site, BoundSite)]
            for number in range(len(self.blocks))
        ]

    def notes(self, sites: Sequence[BoundSite], widths: Mapping[str, Width]) -> list[str]:
        tried = itertools.chain(*map(self._tried, range(len(self.blocks))))
        return [f"left out: {error}" for error in tried if isinstance(error, ModelError)]

    def _tried(self, number: int) -> Iterator[BoundSite | ModelError]:
        """The sites of a block, or why they cannot be narrowed."""
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
            along=tuple(named(channels.along)),
            landing=_landing(flow, channels.consumers[-1]),
        )


class Search:
    """Looks for the innermost lists of blocks.

    `blocks`: by name, from the first one that has channels of its own. `flows`: of those that
    have. `untraced`: why others could not be traced.
    """

    def __init__(self, model: nn.Module):
        self.flows: dict[str, Flow] = {}
        self.untraced: dict[str, str] = {}
        self.blocks = self._below("", model)

    def _below(self, prefix: str, module: nn.Module) -> dict[str, nn.Module]:
        children = {f"{prefix}{key}": child for key, child in module.named_children()}
        found: dict[str, nn.Module] = {}
        for name, child in children.items():
            found |= self._below(f"{name}.", child)
        if found or not isinstance(module, _LISTS):
            return found
        for name, child in children.items():
            if self._has_channels(name, child) or found:
                found[name] = child
        return found

    def _has_channels(self, name: str, block: nn.Module) -> bool:
        convolutions = [m for m in block.modules() if isinstance(m, CONVOLUTIONS)]
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


def architecture(model: nn.Module) -> Architecture | None:
    """Its blocks and sites, if it has lists of blocks with channels of their own.

    Raises:
        ModelError: nothing in it can be narrowed, with the reason.
    """
    search = Search(model)
    if search.untraced and not search.blocks:
        name, reason = next(iter(search.untraced.items()))
        raise ModelError(f"{name} of {type(model).__name__}: {reason}; name sites by grail.Site")
    return ConvNet(model, search) if search.blocks else None


LAYOUTS = {"convolutional networks of blocks (ResNet, MobileNet, EfficientNet)": architecture}


def _landing(flow: Flow, consumer: fx.Node) -> Landing:
    """The sum that the consumer's output becomes a part of, or else that output itself."""
    found = flow.sum_behind(consumer)
    if found is None:
        return Landing(flow.module(consumer), output=True)
    module, slope = found
    return Landing(module, scale=slope)
