"""Sites found by a trace of a whole network, where that is unambiguous."""

from torch import nn

from grail.arguments import require_model
from grail.errors import ModelError
from grail.networks.channel_graph import Flow
from grail.networks.named import Named, Site
from grail.networks.wrappers import refuse_wrapped


def trace(model: nn.Module, *, streams: bool = False) -> list[Site]:
    """Finds the sites of a network by following its channels (see `grail.networks.channel_graph`).

    Channels that are mixed (by a concatenation, attention), and those that enter or leave the
    network, are skipped. So are the channels of linear layers where the result depends on whether
    they belong to vectors [B, C] or tokens [B, L, C], as in `softmax(1)`; a batch norm of their
    width makes them vectors. A map that is flattened channel by channel is followed to the linear
    layer that reads it.

    Args:
        model: a network that `torch.fx` can trace.
        streams: also returns sites of several producers and consumers, such as residual streams and
            gated MLPs; otherwise only activations that one layer writes and one reads.

    Returns:
        Sites in the order in which they are first written, for `grail.compress(sites=…)`.

    Raises:
        ModelError: the network cannot be traced, or nothing in it is unambiguous.
    """
    require_model(model)
    refuse_wrapped(model)
    kind = type(model).__name__
    try:
        flow = Flow(model)
    except Exception as error:  # a model's Python can raise anything at a proxy
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{kind} cannot be traced ({reason}); name its sites: grail.Site"
        ) from error
    sites, reasons = [], []
    for channels in flow.every():
        layers = (channels.producers, channels.consumers, channels.along)
        producers, consumers, along = ([str(node.target) for node in nodes] for nodes in layers)
        if channels.outside or not producers or not consumers:
            continue
        if channels.lost:
            reasons.append(f"the channels of {producers[0]} are lost in {channels.lost}")
            continue
        if streams or len(producers) == len(consumers) == 1:
            try:
                site = Site(producers, consumers, along)
                Named(model, [site])
            except ModelError as error:  # a layer of a kind that cannot be narrowed or rewritten
                reasons.append(str(error))
            else:
                sites.append(site)
    if not sites:
        why = f" ({'; '.join(reasons[:3])})" if reasons else ""
        raise ModelError(f"tracing found no unambiguous site in {kind}{why}; name them: grail.Site")
    return sites
