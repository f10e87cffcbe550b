"""The layers that share channels, from the traced graph of a block or a whole network.

The trace (torch.fx) goes down to modules without children. Convolutions and linear layers read
channels and start new ones, sums and products tie channels together, and operations that treat
every channel separately pass them on. Operations without parameters are classified by a trial, not
by a list. A flatten turns each channel of a map into a block of columns for a linear layer.
"""

import itertools
import math
import operator
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from grail.algebra.kinds import INSTANCE_NORMS, MAPS, NORMS, is_depthwise
from grail.runtime.transaction import eval_no_grad

_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_TIES = (*_SUMS, *_PRODUCTS, "expand_as")
_RESHAPES = (torch.reshape, "reshape", "view")

Shapes = tuple[tuple[int, ...], ...]  # that a tensor may have, of two samples with `_FEW` channels
_FEW = 4
_ANY: Shapes = ((2, _FEW), (2, _FEW, 8), (2, _FEW, 8, 8))  # of an unknown tensor


_ALONG = (*NORMS, *INSTANCE_NORMS, nn.PReLU)
_LAYERS = (*MAPS, nn.Linear, *_ALONG)


@dataclass(eq=False)
class Channels:
    """One set of channels, and the layers that write them, run along them and read them.

    Attributes:
        axis: of the channels in a tensor: 1 after a convolution, -1 after a linear layer.
        outside: whether they enter or leave the block.
        lost: the operation through which they cannot be followed; "" for none.
    """

    axis: int = 1

    producers: list[fx.Node] = field(default_factory=list)
    along: list[fx.Node] = field(default_factory=list)
    consumers: list[fx.Node] = field(default_factory=list)
    outside: bool = False
    lost: str = ""

    def take(self, other: "Channels") -> None:
        """Merges the other set into this one."""
        self.producers += other.producers
        self.along += other.along
        self.consumers += other.consumers
        self.lose(other.lost)
        if self.axis != other.axis and not other.outside:
            self.lose("a sum or a product over different axes")
        self.outside |= other.outside

    def lose(self, reason: str) -> None:
        """Records why they cannot be followed further; the first reason is kept."""
        self.lost = self.lost or reason


class Flow:
    """The channels of a block, and the readers of its sums.

    Raises:
        Exception: any error of a block that cannot be traced.
    """

    def __init__(self, block: nn.Module):
        self._modules: dict[str, Any] = dict(block.named_modules())
        self._of: dict[fx.Node, Channels] = {}
        self._shapes: dict[fx.Node, Shapes] = {}  # of what a node returns
        self._pooled: set[fx.Node] = set()
        self._unchanged: set[fx.Node] = set()  # operations that return their input
        self._flat: set[fx.Node] = set()  # tensors in which each channel is a block of columns
        self._sizes: set[fx.Node] = set()  # of tensors, and values computed from them
        with eval_no_grad(block), _recorded_len(block):
            self._nodes = list(_Tracer().trace(block).nodes)
            self._runs = Counter(n.target for n in self._nodes if n.op == "call_module")
            for node in self._nodes:
                self._follow(node)

    def every(self) -> Iterator[Channels]:
        """Yields all channels, in the order in which they are first written."""
        return iter(dict.fromkeys(self._of.values()))

    def inner(self) -> Iterator[Channels]:
        """Yields the channels that stay inside the block, in the order in which they are written.

        Channels that are read at a single pixel only, inside a gate, are skipped.
        """
        for channels in self.every():
            read = set(channels.consumers) - self._pooled
            if channels.producers and read and not channels.outside:
                yield channels

    def module(self, node: fx.Node) -> Any:
        """Returns the module that a node calls."""
        return self._modules[str(node.target)]

    def norm(self, node: fx.Node) -> nn.Module | None:
        """Returns the batch norm directly after a layer, if nothing else runs through it."""
        user = _only_user(node)
        if user is None or not self._calls(user, *NORMS):
            return None
        norm = self.module(user)
        calls = (n for n in self._nodes if n.op == "call_module" and self.module(n) is norm)
        return norm if sum(1 for _ in calls) == 1 else None

    def sum_behind(self, node: fx.Node) -> tuple[nn.Module | None, Tensor | None] | None:
        """Finds the reader of the sum that a layer's output joins.

        Returns:
            The module that reads the sum, None if the block returns it, and the slope of the batch
            norms before it and of a scaled sum, None for 1. None without such a reader.
        """
        last, slope, summed = node, None, False
        while (user := _only_user(last)) is not None and user.op != "output":
            if self._calls(user, *NORMS) and _is_affine(self.module(user)):
                own = _slope(self.module(user))
                slope = own if slope is None else own * slope
            elif self._is_sum(user):
                summed, share = True, _share(user, last)
                if share is not None:
                    slope = share if slope is None else share * slope
            elif user not in self._unchanged:
                break
            last = user
        if user is None:
            return None
        if user.op == "output":
            return (None, slope) if user.args[0] is last else None
        # A run observes the first call of a module after that of the consumer.
        calls = (n for n in self._nodes[self._nodes.index(node) :] if n.op == "call_module")
        shows = summed and next((n for n in calls if n.target == user.target), None) is user
        return (self.module(user), slope) if shows else None

    def _follow(self, node: fx.Node) -> None:
        if self._is_size(node):
            self._sizes.add(node)
            return
        tensors = self._read(node)
        if tensors and self._pooled.issuperset(tensors):
            self._pooled.add(node)
        read = list(dict.fromkeys(self._of[n] for n in tensors))
        if node.op in ("placeholder", "output"):
            self._of[node] = self._joined([*read, Channels(outside=True)])
        elif len(tensors) == 1 and self._calls(node, *_LAYERS):
            self._layer(node, *read)
        elif len(tensors) == 2 and _is(node, _TIES):
            self._of[node] = self._joined(read)
            self._shapes[node] = _broadcast(*map(self._may_be, tensors))
            if flat := self._flat.intersection(tensors):
                self._flat.add(node)
                if len(flat) == 1:
                    self._of[node].lose("a sum or a product of a flattened map and another one")
        elif len(tensors) == 1 and self._by_channel(node, tensors[0]):
            self._of[node] = self._of[tensors[0]]
        else:
            what = type(self.module(node)).__name__ if node.op == "call_module" else node.op
            lost = f"{getattr(node.target, '__name__', node.target)} ({what})"
            if _is(node, _RESHAPES) and _has_fixed_sizes(node):
                lost += ", perhaps for its sizes, which are written into the code: try flatten(1)"
            self._of[node] = self._joined([*read, Channels(lost=lost)])

    def _read(self, node: fx.Node) -> list[fx.Node]:
        """Returns the tensors that a node reads."""
        return [n for n in node.all_input_nodes if n not in self._sizes]

    def _is_size(self, node: fx.Node) -> bool:
        """Returns whether a node is a size of a tensor, or computed from sizes alone."""
        if not node.all_input_nodes or node.op not in ("call_function", "call_method"):
            return False
        asks = node.target in (len, "size", "dim", "numel")
        asks |= node.target is getattr and node.args[1] in ("shape", "ndim")
        return asks or not self._read(node)

    def _is_sum(self, node: fx.Node) -> bool:
        return _is(node, _SUMS) and len(self._read(node)) == 2

    def _layer(self, node: fx.Node, channels: Channels) -> None:
        """Follows channels through a layer with parameters for each channel or pair of channels."""
        module = self.module(node)
        twice = f"{node.target}, which runs twice" if self._runs[node.target] > 1 else ""
        channels.lose(twice)
        (read,) = self._read(node)
        shapes = self._may_be(read)
        axis = -1 if isinstance(module, nn.Linear) else 1
        if not isinstance(module, _ALONG) and not is_depthwise(module):
            if axis != channels.axis and any(len(shape) > 2 for shape in shapes):
                channels.lose(f"{node.target}, which reads another axis")
            channels.consumers.append(node)
            channels = Channels(producers=[node], lost=twice, axis=axis)
            self._shapes[node] = _behind(module, shapes)
        else:
            self._shapes[node] = shapes
            channels.along.append(node)
            if any(True for child in module.children() for _ in child.parameters()):
                channels.lose(f"{node.target} ({type(module).__name__})")
            elif read in self._flat:
                self._flat.add(node)
                if not _is_alike_for_all(module):
                    channels.lose(f"{node.target}, which runs over a flattened map")
            elif channels.axis == -1 and not _is_alike_for_all(module):
                # It runs along axis 1, which is the last axis of vectors only.
                self._shapes[node] = tuple(shape for shape in shapes if len(shape) == 2)
                if not isinstance(module, (*NORMS, nn.PReLU)) or not self._shapes[node]:
                    channels.lose(f"{node.target}, which runs over another axis")
        self._of[node] = channels

    def _joined(self, sets: list[Channels]) -> Channels:
        older = list(dict.fromkeys(self._of.values()))
        first, *rest = sorted(sets, key=(older + sets).index)
        for other in rest:
            first.take(other)
        for node, channels in self._of.items():
            if channels in rest:
                self._of[node] = first
        return first

    def _by_channel(self, node: fx.Node, read: fx.Node) -> bool:
        """Tries whether an operation without parameters treats every channel separately.

        The last axis of vectors [B, C] is axis 1, and can become that of a map [B, C, 1, 1]. Where
        an operation does so by the number of other channels, as `z.view(b, c, 1, 1)` with
        `x.size()`, those are tied to the channels that it reads.
        """
        if node.op == "call_module" and self.module(node).state_dict():
            return False
        channels = self._of[read]
        axes = [channels.axis, 1] if self._are_vectors(channels) else [channels.axis]
        others = [of for of in dict.fromkeys(self._sized_by(node)) if of is not channels]
        for tied, axis in itertools.product([False, True] if others else [False], axes):
            before, channels.axis = channels.axis, axis
            if self._passes_on(node, read, tied):
                if tied:
                    self._joined([channels, *others])
                return True
            channels.axis = before
        return False

    def _are_vectors(self, channels: Channels) -> bool:
        """Returns whether every tensor of these channels is [B, C]."""
        nodes = (node for node, of in self._of.items() if of is channels)
        return channels.axis == -1 and all(len(s) == 2 for n in nodes for s in self._may_be(n))

    def _sized_by(self, node: fx.Node) -> Iterator[Channels]:
        """Yields the channels of the tensors whose sizes are arguments of an operation."""
        for size in self._sizes.intersection(node.all_input_nodes):
            yield from (self._of[n] for n in size.all_input_nodes if n not in self._sizes)
            yield from self._sized_by(size)

    def _passes_on(self, node: fx.Node, read: fx.Node, tied: bool) -> bool:
        """Returns whether an operation treats every channel separately along their axis.

        It must do so for all possible shapes of its input: `softmax(1)` does for tokens [B, L, C],
        and does not for vectors [B, C].

        Args:
            tied: whether all its size arguments are of the same channels.
        """
        axis, tried, same, unchanged = self._of[read].axis, [], True, True
        flat = read in self._flat
        for shape in self._may_be(read):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
            try:
                every = self._tried(node, read, x.clone(), tied)
                tried.append(tuple(every.shape))
                unchanged &= torch.equal(every, x)
                flattens = axis == 1 and every.dim() == 2 and every.shape[1] > x.shape[1] == _FEW
                flat |= flattens
                same &= every.shape[0] == 2 and (flattens or x.shape[axis] == every.shape[axis])
                apart = self._apart(node, read, x, tied)
                same = same and apart.shape == every.shape
                same = same and every.allclose(apart, equal_nan=True)
            except Exception:  # it can raise anything at such a tensor
                same = unchanged = False
        if not tried:
            return False
        self._shapes[node] = tuple(dict.fromkeys(tried))
        if flat:
            self._flat.add(node)
        elif axis == 1 and all(math.prod(shape[2:]) == 1 for shape in tried):
            self._pooled.add(node)
        if unchanged:
            self._unchanged.add(node)
        return same

    def _may_be(self, node: fx.Node) -> Shapes:
        return self._shapes.get(node, _ANY)

    def _apart(self, node: fx.Node, read: fx.Node, x: Tensor, tied: bool) -> Tensor:
        """Returns the outputs of an operation for each channel alone, concatenated."""
        axis = self._of[read].axis
        each = x.split(x.shape[axis] // _FEW, axis)
        return torch.cat([self._tried(node, read, one.clone(), tied) for one in each], axis)

    def _tried(self, node: fx.Node, read: fx.Node, x: Tensor, tied: bool = False) -> Any:
        """Computes a node on x instead of the tensor that it reads, and on known sizes."""

        def value(argument: fx.Node) -> Any:
            if argument is read:
                return x
            if argument in self._sizes:
                return self._tried(argument, read, x, tied)
            shapes, channels = self._may_be(argument), self._of[argument]
            shape = list(next((s for s in shapes if len(s) == x.dim()), shapes[0]))
            if (tied or channels is self._of[read]) and argument not in self._flat:
                shape[channels.axis] = min(_FEW, x.shape[self._of[read].axis])
            return torch.zeros(shape, dtype=torch.float32)

        args, kwargs = fx.node.map_arg(node.args, value), fx.node.map_arg(node.kwargs, value)
        if node.op == "call_module":
            return self.module(node)(*args, **kwargs)
        if isinstance(node.target, str):
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return node.target(*args, **kwargs)

    def _calls(self, node: fx.Node, *kinds: type) -> bool:
        return node.op == "call_module" and isinstance(self.module(node), kinds)


def _behind(module: Any, shapes: Shapes) -> Shapes:
    """Returns the known shapes of a layer's output for inputs of these shapes."""
    if isinstance(module, nn.Linear):
        return tuple((2, *(8,) * (len(shape) - 2), _FEW) for shape in shapes)
    return ((2, _FEW, *(32,) * len(module.kernel_size)),)


def _broadcast(a: Shapes, b: Shapes) -> Shapes:
    """Returns the possible shapes of a sum or a product of two tensors."""
    pairs = ((x, y) for x in a for y in b if len(x) == len(y))
    return tuple(dict.fromkeys(tuple(map(max, x, y)) for x, y in pairs)) or _ANY


def _is_alike_for_all(module: Any) -> bool:
    """Returns whether a layer has one parameter for all channels, on any axis."""
    return isinstance(module, nn.PReLU) and module.num_parameters == 1


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, NORMS) or next(m.children(), None) is None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _has_fixed_sizes(reshape: fx.Node) -> bool:
    """Returns whether a reshape has sizes that are numbers in the code, except -1."""
    sizes = reshape.args[1:]
    several = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
    return any(isinstance(size, int) and size > 1 for size in several)


def _length(value: Any) -> Any:
    """Returns `len`, as a node for a traced tensor."""
    if not isinstance(value, fx.Proxy):
        return len(value)
    return value.tracer.create_proxy("call_function", len, (value,), {})


@contextmanager
def _recorded_len(block: nn.Module) -> Iterator[None]:
    """Allows a block to call `len` of a traced tensor, as `fx.wrap("len")` in its file would."""
    forwards = (getattr(type(module), "forward", None) for module in block.modules())
    files = [getattr(forward, "__globals__", {"len": len}) for forward in forwards]
    own = list({id(names): names for names in files if "len" not in names}.values())
    for names in own:
        names["len"] = _length
    try:
        yield
    finally:
        for names in own:
            del names["len"]


def _is(node: fx.Node, targets: tuple[Any, ...]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets


def _share(total: fx.Node, part: fx.Node) -> Tensor | None:
    """Returns the factor of a part of a sum, None for 1: `torch.add(x, y, alpha=0.1)`."""
    alpha: Any = total.kwargs.get("alpha", 1)
    second = total.args[1] if len(total.args) > 1 else total.kwargs["other"]
    if alpha == 1 or part is not second:
        return None
    return torch.tensor(float(alpha), dtype=torch.float32)


def _is_affine(norm: Any) -> bool:
    """Returns whether a batch norm has fixed statistics, and no activation inside."""
    inside = all(isinstance(child, nn.Identity) for child in norm.children())
    return inside and norm.running_var is not None


def _slope(norm: Any) -> Tensor:
    """Returns the factor of each channel in a batch norm, [C] fp32."""
    slope = (norm.running_var.detach().float() + norm.eps).rsqrt()
    return slope if norm.weight is None else slope * norm.weight.detach().float()
