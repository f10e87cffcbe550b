"""Sites found by a trace of a whole network, where that is unambiguous."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from grail.algebra.kinds import as_matrix
from grail.arguments import require_model
from grail.errors import InputError, ModelError
from grail.networks.channel_graph import Flow
from grail.networks.channel_sets import Channels, Slot
from grail.networks.named import Named, Part, Site
from grail.networks.wrappers import refuse_wrapped


def trace(model: nn.Module, *, streams: bool = False, example: Any = None) -> list[Site]:
    """Finds the sites of a network by following its channels (see `grail.networks.channel_graph`).

    Channels that are mixed (by attention, a layer norm), and those that enter or leave the network,
    are skipped. So are the channels of linear layers where the result depends on whether they
    belong to vectors [B, C] or tokens [B, L, C], as in `softmax(1)`; a batch norm of their width
    makes them vectors, and an example decides it. A map that is flattened channel by channel is
    followed to the linear layer that reads it. Channels are followed through concatenations, and
    through slices and chunks whose sizes follow from the number of channels; such layers are a
    `grail.Part` in each site.

    Args:
        model: a network that `torch.fx` can trace.
        streams: also returns sites of several producers and consumers, such as residual streams,
            gated MLPs and maps that several concatenations read; otherwise only activations that
            one layer writes and one reads.
        example: a batch, as `grail.compress` takes it: the network runs on it while it is traced,
            and its control flow can depend on sizes and values. Sites hold for inputs for which it
            goes the same way.

    Returns:
        Sites in the order in which they are first written, for `grail.compress(sites=…)`.

    Raises:
        InputError: an example that is no batch of the model's.
        ModelError: the network cannot be traced, or nothing in it is unambiguous.
    """
    require_model(model)
    refuse_wrapped(model)
    kind = type(model).__name__
    arguments = None if example is None else _arguments(model, example)
    try:
        flow = Flow(model, divides=True, example=arguments)
    except Exception as error:  # a model's Python can raise anything at a proxy
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = "name its sites: grail.Site"
        if example is None:
            hint = f"if its control flow depends on its input, give a batch, example=…; or {hint}"
        raise ModelError(f"{kind} cannot be traced ({reason}); {hint}") from error
    sites, reasons = [], []
    for channels in flow.every():
        if channels.outside or not channels.writes:
            continue
        if channels.lost:
            first = channels.producers[0].target
            reasons.append(f"the channels of {first} are lost in {channels.lost}")
            continue
        if not channels.reads:
            continue
        if streams or len(set(channels.producers)) == len(set(channels.consumers)) == 1:
            try:
                site = _site(flow, channels)
                Named(model, [site])
            except (InputError, ModelError) as error:  # of a kind that cannot be narrowed
                reasons.append(str(error))
            else:
                sites.append(site)
    if not sites:
        why = f" ({'; '.join(reasons[:3])})" if reasons else ""
        raise ModelError(f"tracing found no unambiguous site in {kind}{why}; name them: grail.Site")
    return sites


def _arguments(model: nn.Module, example: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Returns a batch as the arguments of a model's forward; tensors are copied."""
    example = tree_map_only(Tensor, Tensor.clone, example)
    args, kwargs = example if isinstance(example, tuple) else (example,), {}
    if isinstance(example, Mapping):
        args, kwargs = (), dict(example)
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"example must be a batch, with which {type(model).__name__} can be called: {error}"
        ) from error
    return args, kwargs


def _site(flow: Flow, channels: Channels) -> Site:
    """Returns the site of a set of channels."""
    producers, consumers, along = (
        [_layer(flow, node, slots, channels.size, side) for node, slots in _by_node(role).items()]
        for role, side in ((channels.writes, 0), (channels.reads, 1), (channels.runs, None))
    )
    return Site(producers, consumers, along)


def _by_node(slots: Sequence[Slot]) -> dict[fx.Node, list[Slot]]:
    found: dict[fx.Node, list[Slot]] = {}
    for slot in slots:
        found.setdefault(slot.node, []).append(slot)
    return found


def _layer(
    flow: Flow, node: fx.Node, slots: Sequence[Slot], size: int | None, side: int | None
) -> str | Part:
    """Returns a layer of a site, or the part of it that has the site's channels.

    Args:
        side: 0 for the rows of its weight, 1 for its columns, None for a layer along the site.

    Raises:
        ModelError: a part whose place is not known.
    """
    name, axis = str(node.target), flow.axis_of(node)
    (first, *others) = slots
    if not others and first.start == 0 and first.total in (None, size):
        return name if axis is None else Part(name, axis=axis)
    starts = sorted(slot.start for slot in slots if slot.start is not None)
    if size is None or first.total is None or len(starts) < len(slots):
        raise ModelError(f"{name} has channels of other layers, whose number is not known")
    positions = 1  # of each channel, where the layer reads a flattened map
    if side is not None:
        module = flow.module(node)
        positions = as_matrix(module, module.weight.detach()).shape[side] // first.total
    ranges = [(start * positions, (start + size) * positions) for start in starts]
    return Part(name, ranges, axis)
