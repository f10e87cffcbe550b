"""Torch-Pruning's groups: the layers that read them, the rows and columns that they remove."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from grail.adapters._library import Library
from grail.adapters._refit import Layer, width_of
from grail.algebra.kinds import MAPS, NORMS, require_plain
from grail.errors import InputError, ModelError

library = Library("torch-pruning", ("1.6.1",))
tp = library.module("torch_pruning")
READS = tuple(library.attribute(tp, f"prune_{kind}_in_channels") for kind in ("linear", "conv"))
WRITES = tuple(library.attribute(tp, f"prune_{kind}_out_channels") for kind in ("linear", "conv"))
NORMALISES = tuple(
    library.attribute(tp, f"prune_{kind}_out_channels") for kind in ("layernorm", "groupnorm")
)
# Attributes of attention modules that hold the number of heads, and the width of one, of all.
_HEADS = ("num_heads", "num_attention_heads")
_WIDTHS = ("head_dim", "attention_head_size")
_ALL = ("attn_dim", "all_head_size")


def readers(model: nn.Module, group: Any) -> tuple[list[Layer], dict[str, str]]:
    """Returns the layers that read a group's channels, and by name why others are left alone."""
    graph = getattr(group, "_DG", None)
    if graph is None or not hasattr(group, "prune"):
        raise InputError(
            f"group must be one of pruner.step(interactive=True); got {type(group).__name__}"
        )
    names = {module: name for name, module in model.named_modules()}
    found: list[Layer] = []
    skipped: dict[str, str] = {}
    for dep, lost in group:
        if not len(lost) or not reads(graph, dep):
            continue
        module = dep.target.module
        if module not in names:
            raise InputError(f"{dep.target.name} is no layer of the model; the group is another's")
        kept = left(torch.arange(width_of(module, "in")), lost)
        layer = Layer(names[module], module, kept, module, norm=_norm_after(graph, module))
        reason = _reason(dep.handler, layer, model)
        if reason:
            skipped[layer.name] = reason
        else:
            found.append(layer)
    return found, skipped


def reads(graph: Any, dep: Any) -> bool:
    """Returns whether a dependency prunes what a Linear or convolution reads, and only that."""
    if not isinstance(dep.target.module, (nn.Linear, *MAPS)):
        return False
    return graph.is_in_channel_pruning_fn(dep.handler) and not graph.is_out_channel_pruning_fn(
        dep.handler
    )


def _reason(handler: Any, layer: Layer, model: nn.Module) -> str:
    """Returns why a layer cannot be refitted; empty if it can."""
    if handler not in READS:
        return "it is pruned by a customised pruner, so its columns are not known"
    weights = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    if weights[id(layer.module.weight)] > 1:
        return "its weight is that of another layer, too"
    try:
        require_plain(layer.name, layer.module)
        layer.require_regular()
    except ModelError as error:
        return str(error)
    return ""


def left(indices: Tensor, lost: Iterable[int]) -> Tensor:
    """Returns indices without those at the places `lost`."""
    stays = torch.ones(len(indices), dtype=torch.bool)
    stays[torch.as_tensor(list(lost), dtype=torch.int64)] = False
    return indices[stays]


def _norm_after(graph: Any, module: nn.Module) -> nn.Module | None:
    """Returns the batch norm that alone reads a layer, and reads nothing else."""
    node = graph.module2node.get(module)
    if node is None or len(node.outputs) != 1:
        return None
    after = node.outputs[0]
    found: nn.Module = after.module
    return found if isinstance(found, NORMS) and len(after.inputs) == 1 else None


class NarrowNorms:
    """The outputs of norms over a group's channels, computed from the kept channels alone.

    A layer norm of fewer channels is not the old one's part. While the block runs, each is computed
    as well by its narrow twin, and given to the layers that read its output directly.
    """

    def __init__(self, group: Any):
        self._norms = [
            (dep, lost) for dep, lost in group if len(lost) and dep.handler in NORMALISES
        ]
        self._narrow: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # by id of the output
        self._hooks: list[Any] = []

    def forget(self) -> None:
        """Drops what the last batch left."""
        self._narrow.clear()

    def narrowed(self, layer: Layer, x: Tensor) -> Tensor:
        """Returns what a layer will read of an input."""
        known = self._narrow.get(id(x))
        if known is not None and known[0] is x and torch.equal(known[1], layer.kept):
            return known[2]
        return layer.narrowed(x)

    def __enter__(self) -> "NarrowNorms":
        for dep, lost in self._norms:
            norm = dep.target.module
            kept = left(torch.arange(_norm_width(norm)), lost)
            twin = copy.deepcopy(norm)
            dep.handler.__self__.pruning_dim = dep.target.pruning_dim
            dep.handler(twin, sorted(lost))
            self._hooks.append(norm.register_forward_hook(self._hook(twin, kept)))
        return self

    def _hook(self, twin: nn.Module, kept: Tensor) -> Callable[..., None]:
        def look(norm: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            of_maps = isinstance(norm, nn.GroupNorm) or "2d" in type(norm).__name__
            part = args[0].index_select(1 if of_maps else -1, kept.to(y.device))
            self._narrow[id(y)] = (y, kept, twin(part))

        return look

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self.forget()


def _norm_width(norm: Any) -> int:
    width: int = norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.normalized_shape[-1]
    return width


class Trail:
    """The rows and columns that a step removes, numbered as in the dense network.

    Args:
        pruner: whose step it is.
        dense: a copy of its model before the step.
    """

    def __init__(self, pruner: Any, dense: nn.Module):
        self.model: nn.Module = pruner.model
        self._graph, self._dense = pruner.DG, dense
        self._names = {module: name for name, module in self.model.named_modules()}
        self._rows: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}
        self._customised: dict[str, str] = {}

    def note(self, group: Any) -> None:
        """Notes what a group removes when it is pruned."""
        for dep, lost in group:
            name = self._names.get(dep.target.module)
            if name is None or not len(lost):
                continue
            if dep.handler in WRITES:
                self._remove(self._rows, name, "out", lost)
            elif dep.handler in READS:
                self._remove(self._kept, name, "in", lost)
            elif reads(self._graph, dep):
                self._customised[name] = _reason(dep.handler, self._layer(name), self.model)

    def _remove(
        self, stay: dict[str, Tensor], name: str, side: Literal["in", "out"], lost: Iterable[int]
    ) -> None:
        if name not in stay:
            stay[name] = torch.arange(width_of(self._dense.get_submodule(name), side))
        stay[name] = left(stay[name], lost)

    def readers(self) -> tuple[list[Layer], dict[str, str]]:
        """Returns the layers that read removed channels, and by name why others are left alone."""
        found, skipped = [], dict(self._customised)
        for name in self._kept:
            layer = self._layer(name)
            reason = _reason(READS[0], layer, self.model)
            if reason:
                skipped[name] = reason
            elif not layer.fits:
                skipped[name] = "its width is not that which its groups leave"
            else:
                found.append(layer)
        return found, skipped

    def _layer(self, name: str) -> Layer:
        module, reference = self.model.get_submodule(name), self._dense.get_submodule(name)
        every = torch.arange(width_of(reference, "in"))
        return Layer(
            name,
            module,
            self._kept.get(name, every),
            reference,
            self._rows.get(name),
            _norm_after(self._graph, module),
        )


def set_heads(pruner: Any) -> None:
    """Sets the number and width of heads of attention modules to those of their narrow layers."""
    names = {module: name for name, module in pruner.model.named_modules()}
    owners: dict[str, list[Any]] = {}
    for layer in pruner.num_heads:
        if layer in names:
            owners.setdefault(names[layer].rpartition(".")[0], []).append(layer)
    for path, layers in owners.items():
        owner: Any = pruner.model.get_submodule(path)
        query = max(layers, key=lambda layer: pruner.num_heads[layer])
        heads = pruner.num_heads[query]
        width = query.out_features // (3 if len(layers) == 1 else 1)
        values = dict.fromkeys(_HEADS, heads) | dict.fromkeys(_ALL, width)
        for key, value in (values | dict.fromkeys(_WIDTHS, width // heads)).items():
            if isinstance(getattr(owner, key, None), int):
                setattr(owner, key, value)
