"""Torch-Pruning's groups as sites of grail, where `grail.Site` can express them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from grail.adapters._pruning_groups import READS, WRITES
from grail.adapters._refit import width_of
from grail.errors import GrailError, InputError
from grail.networks import Site
from grail.networks.named import Named

# Kinds of nodes that a site cannot run along, each with the reason.
_BARRIERS = {
    "LN": "a norm over channels",
    "GN": "a norm over channels",
    "PARAMETER": "a bare parameter",
    "EMBED": "an embedding",
    "MHA": "attention",
    "LSTM": "a recurrent layer",
    "OUTPUT": "the network's output",
    "CUSTOMIZED": "a customised layer",
}
_ALONG = ("BN", "IN", "PRELU", "DEPTHWISE_CONV")
_LAYERS = ("CONV", "LINEAR")
# Parts of the names of autograd functions that choose among channels, or multiply by others.
_MIXING = ("softmax", "bmm", "attention", "einsum")


class Sites(list[Site]):
    """Sites for `grail.compress`, in the order in which they run.

    Attributes:
        refused: by name of a group's root layer, the reason why it is no site.
    """

    def __init__(self, sites: Iterable[Site], refused: dict[str, str]):
        super().__init__(sites)
        self.refused = refused

    @property
    def reasons(self) -> Counter[str]:
        """How many groups are refused for each reason."""
        return Counter(reason.partition(":")[0] for reason in self.refused.values())


def sites_of(source: Any, *, ignored: Sequence[nn.Module] = ()) -> Sites:
    """Returns the groups of Torch-Pruning that `grail.Site` can express.

    They are what its graph says; `grail.compress` tries each by a run before it narrows it.

    Args:
        source: a pruner, or a `DependencyGraph` that was built.
        ignored: layers whose groups are left out; those that a pruner ignores are without.

    Returns:
        `Sites`, a list that also says which groups it cannot express and why: a map of indices
        between layers (concatenation, split), a norm over channels, a bare parameter, a grouped
        convolution that reads them, attention, the network's output.

    Raises:
        InputError: neither a pruner nor a graph.
    """
    graph = getattr(source, "DG", source)
    if not hasattr(graph, "get_all_groups") or not hasattr(graph, "module2node"):
        raise InputError(
            "source must be a pruner or a DependencyGraph after build_dependency; got "
            f"{type(source).__name__}"
        )
    skip = [*getattr(source, "ignored_layers", ()), *ignored]
    options = {}
    if hasattr(source, "root_module_types"):
        options["root_module_types"] = source.root_module_types
    order = _order(graph)
    names = {module: name for name, module in graph.model.named_modules()}
    found: list[tuple[int, Site]] = []
    refused: dict[str, str] = {}
    for group in graph.get_all_groups(ignored_layers=skip, **options):
        root = names[group[0].dep.target.module]
        site, reason = _site(graph.model, group, names)
        if site is None:
            refused[root] = reason
        else:
            first = min(order[graph.model.get_submodule(name)] for name in site.written)
            found.append((first, site))
    found.sort(key=lambda pair: pair[0])
    return Sites([site for _, site in found], refused)


def _site(model: nn.Module, group: Any, names: Mapping[Any, str]) -> tuple[Site | None, str]:
    """Returns the site of a group, or the reason why it is none."""
    producers: list[str] = []
    consumers: list[str] = []
    along: list[str] = []
    reason, flat = "", False
    channels = len(group[0].idxs)
    for item in group:
        dep, indices = item
        module, kind = dep.target.module, dep.target.type.name
        name = names.get(module, "")
        reason = reason or _barrier(module, kind)
        if kind in _LAYERS or kind == "DEPTHWISE_CONV":
            reads = dep.handler in READS
            size = width_of(module, "in" if reads else "out")
            flat = flat or size != channels
            if not _whole(indices, size) or not (
                size == channels or (reads and _flattens(item, module, channels))
            ):
                reason = reason or f"an index map: {name} has {size} of {channels} channels"
            if kind == "DEPTHWISE_CONV":
                along.append(name)
            elif reads and getattr(module, "groups", 1) > 1:
                reason = reason or f"a grouped convolution: {name} reads the channels"
            elif reads:
                consumers.append(name)
            elif dep.handler in WRITES:
                producers.append(name)
        elif kind in _ALONG and getattr(module, "num_parameters", 2) > 1:
            along.append(name)
            if len(indices) != channels:
                reason = reason or f"an index map: {name} has other channels, too"
    if not reason and not consumers:
        reason = "the network's output"
    if reason:
        return None, reason
    try:
        site = Site(producers, consumers, list(dict.fromkeys(along)))
        bound = Named(model, [site]).sites(("named",))[0][0]
        if flat and bound.channels != channels:
            return None, f"an index map: {consumers[0]} reads a map that is not flattened"
    except GrailError as error:
        return None, f"a layer that cannot be narrowed: {error}"
    return site, ""


def _barrier(module: Any, kind: str) -> str:
    """Returns the reason why no site runs along a node; empty if one can."""
    if kind == "ELEMENTWISE":
        function = str(getattr(module, "_grad_fn", "")).lower()
        return "attention" if any(word in function for word in _MIXING) else ""
    return _BARRIERS.get(kind, "")


def _flattens(item: Any, module: nn.Module, channels: int) -> bool:
    """Returns whether a linear layer reads each channel in adjacent columns, all in order."""
    roots = getattr(item, "root_idxs", None)
    if not isinstance(module, nn.Linear) or roots is None:
        return False
    positions = module.in_features // channels
    expected = [channel for channel in range(channels) for _ in range(positions)]
    return [root for _, root in sorted(zip(item.idxs, roots, strict=True))] == expected


def _whole(indices: Iterable[int], size: int) -> bool:
    """Returns whether indices are all of a size."""
    found = set(indices)
    return len(found) == size and min(found) == 0 and max(found) == size - 1


def _order(graph: Any) -> dict[Any, int]:
    """Returns the place of each module in an order in which inputs come first."""
    left = {node: len(set(node.inputs)) for node in graph.module2node.values()}
    ready = [node for node, count in left.items() if not count]
    order: dict[Any, int] = {}
    while ready:
        node = ready.pop(0)
        order[node.module] = len(order)
        for after in set(node.outputs):
            left[after] -= 1
            if not left[after]:
                ready.append(after)
    # A reused layer may close a circle.
    for node in left:
        order.setdefault(node.module, len(order))
    return order
