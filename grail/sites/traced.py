"""Sites found by tracing a network (torch.fx), where that is unambiguous.

Channels flow from the layer that writes them through whatever treats each by itself. A sum or a
product of two flows makes them one: a residual stream is a site with many producers and consumers.
A flow that meets anything else (a concatenation, a reshape, the network's own input or output) is
given up.
"""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from grail.errors import InputError, ModelError
from grail.layers import NORMS, is_depthwise
from grail.sites.named import Site
from grail.transaction import steady

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Layers without parameters that leave channels apart: elementwise, or over positions.
_APART = (
    *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.ELU, nn.LeakyReLU, nn.Softplus),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Mish, nn.Identity),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d),
)
_APART_FUNCTIONS: set[Callable[..., Any]] = {
    *(torch.relu, torch.sigmoid, torch.tanh, F.relu, F.relu6, F.gelu, F.silu, F.leaky_relu, F.elu),
    *(F.hardswish, F.hardsigmoid, F.hardtanh, F.mish, F.softplus, F.dropout),
    *(F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d),
}
_APART_METHODS = {"relu", "relu_", "sigmoid", "tanh", "contiguous", "clone", "float"}
_JOINING: set[Callable[..., Any]] = {
    *(operator.add, operator.mul, operator.iadd, operator.imul, torch.add, torch.mul),
}


@dataclass(eq=False)
class _Flow:
    """Channels that must stay and go together."""

    axis: int  # where a tensor holds them, counted from the front, of convolutions, or the back
    producers: list[str] = field(default_factory=list)
    along: list[str] = field(default_factory=list)
    consumers: list[str] = field(default_factory=list)
    ambiguous: bool = False
    merged: "_Flow | None" = None

    def root(self) -> "_Flow":
        """The flow that this one became part of."""
        return self if self.merged is None else self.merged.root()


def trace(model: nn.Module, batch: Any, *, streams: bool = False) -> list[Site]:
    """The sites of a network, found by following its channels.

    Args:
        model: a network that `torch.fx.symbolic_trace` can trace.
        batch: one batch, a tensor or a tuple of the model's arguments, for the shapes.
        streams: also sites of several producers and consumers, as residual streams are; without,
            only activations that one layer writes and one reads.

    Returns:
        Sites in the order in which they run, for `grail.compress(sites=…)`.

    Raises:
        ModelError: the network cannot be traced, or nothing in it is unambiguous.
    """
    if not isinstance(batch, (Tensor, tuple, list)):
        raise InputError(
            f"a batch to trace by is a tensor or a tuple of them; got {type(batch).__name__}"
        )
    try:
        graph = fx.symbolic_trace(model)
    except Exception as error:  # whatever a model's Python does with a proxy
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{type(model).__name__} cannot be traced ({reason}); name its sites: grail.Site"
        ) from error
    with steady(model):
        ShapeProp(graph).propagate(*(batch if isinstance(batch, (tuple, list)) else (batch,)))
    sites = [
        Site(flow.producers, flow.consumers, flow.along)
        for flow in _flows(graph)
        if flow.producers and flow.consumers and not flow.ambiguous
        if streams or len(flow.producers) == len(flow.consumers) == 1
    ]
    if not sites:
        raise ModelError(
            f"tracing found no unambiguous site in {type(model).__name__}; name them: grail.Site"
        )
    return sites


def _flows(graph: fx.GraphModule) -> Iterator[_Flow]:
    """Every flow of a traced network, whole and once, in the order of its first layer."""
    modules, flows = dict(graph.named_modules()), []
    uses: dict[str, int] = {}
    of: dict[fx.Node, _Flow] = {}
    for node in graph.graph.nodes:
        inputs = [of[n].root() for n in node.all_input_nodes if n in of]
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        name = str(node.target)
        if module is not None and next(module.parameters(), None) is not None:
            uses[name] = uses.get(name, 0) + 1
        if _writes(module):
            for flow in inputs:
                flow.consumers.append(name)
            axis = 1 if isinstance(module, _CONVOLUTIONS) else -1
            of[node] = _Flow(axis, [name])
            flows.append(of[node])
        elif inputs and _keeps_apart(node, module, inputs[0]):
            if module is not None and next(module.parameters(), None) is not None:
                inputs[0].along.append(name)
            of[node] = inputs[0]
        elif inputs and node.op == "call_function" and node.target in _JOINING:
            tensors = [n for n in node.all_input_nodes if _shape(n)]
            joined = inputs[0]
            # What has no flow, or another shape, is no channel of a layer of ours.
            known = all(n in of and _shape(n) == _shape(node) for n in tensors)
            for flow in inputs:
                joined = _join(joined, flow, known and flow.axis == joined.axis)
            of[node] = joined
        else:
            for flow in inputs:
                flow.ambiguous = True
    for flow in dict.fromkeys(flow.root() for flow in flows):
        # A layer that runs twice has one weight for two flows.
        layers = (*flow.producers, *flow.along, *flow.consumers)
        flow.ambiguous |= any(uses.get(layer, 0) > 1 for layer in layers)
        yield flow


def _join(one: _Flow, other: _Flow, clear: bool) -> _Flow:
    if one is not other:
        for part in ("producers", "along", "consumers"):
            getattr(one, part).extend(getattr(other, part))
        one.ambiguous |= other.ambiguous
        other.merged = one
    one.ambiguous |= not clear
    return one


def _writes(module: Any) -> bool:
    if isinstance(module, _CONVOLUTIONS):
        return not is_depthwise(module)
    return isinstance(module, nn.Linear)


def _keeps_apart(node: fx.Node, module: Any, flow: _Flow) -> bool:
    """Whether a node leaves channels by themselves, where the flow has them."""
    before, after = _shape(node.all_input_nodes[0]), _shape(node)
    if not before or not after or len(node.all_input_nodes) > 1:
        return False
    if module is not None:
        depthwise = isinstance(module, _CONVOLUTIONS) and is_depthwise(module)
        return depthwise or isinstance(module, (*NORMS, nn.PReLU, *_APART))
    if node.op == "call_function" and node.target in _APART_FUNCTIONS:
        return True
    if node.op == "call_method" and node.target in _APART_METHODS:
        return True
    # Means over positions, and the flattening of one position, leave [N, C].
    pooled = node.target in ("mean", "flatten", "squeeze", torch.mean, torch.flatten)
    return pooled and flow.axis == 1 and after == before[:2] and _one_value(node, before)


def _one_value(node: fx.Node, before: tuple[int, ...]) -> bool:
    single = all(size == 1 for size in before[2:])
    return single or node.target in ("mean", torch.mean)


def _shape(node: fx.Node) -> tuple[int, ...]:
    found = node.meta.get("tensor_meta")
    return tuple(getattr(found, "shape", ()))
