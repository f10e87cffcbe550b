"""The layers that share channels, from the traced graph of a block or a whole network.

The trace (torch.fx) goes down to modules without children. Convolutions and linear layers read
channels and start new ones, sums and products tie channels together, and operations that treat
every channel separately pass them on. Operations without parameters are classified by a trial, not
by a list. A flatten turns each channel of a map into a block of columns for a linear layer.

With `divides` concatenations and slices are followed, too (`grail.networks.channel_sets`), and bare
parameters that run along channels.
"""

import itertools
import math
import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from grail.algebra.kinds import INSTANCE_NORMS, MAPS, NORMS, is_depthwise
from grail.networks.channel_sets import Channels, Layout, Layouts, Slot, lose, total
from grail.networks.tracing import Tracer
from grail.runtime.transaction import eval_no_grad

_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_TIES = (*_SUMS, *_PRODUCTS, "expand_as")
_RESHAPES = (torch.reshape, "reshape", "view")
_JOINS = (torch.cat, torch.concat, torch.concatenate)
_SLICES = (operator.getitem, torch.chunk, torch.split, torch.narrow, "chunk", "split", "narrow")

Shapes = tuple[tuple[int, ...], ...]  # that a tensor may have, of two samples with `_FEW` channels
_FEW = 4
_ANY: Shapes = ((2, _FEW), (2, _FEW, 8), (2, _FEW, 8, 8))  # of an unknown tensor


_ALONG = (*NORMS, *INSTANCE_NORMS, nn.PReLU)
_LAYERS = (*MAPS, nn.Linear, *_ALONG)


class Flow:
    """The channels of a block, and the readers of its sums.

    Args:
        block: a module, or a whole network.
        divides: whether concatenations, slices and bare parameters are followed; without, channels
            are lost there.
        example: arguments, and those by name, with which the block runs while it is traced, so that
            its control flow can depend on them; None traces it without.

    Raises:
        Exception: any error of a block that cannot be traced.
    """

    def __init__(
        self,
        block: nn.Module,
        divides: bool = False,
        example: tuple[Sequence[Any], Mapping[str, Any]] | None = None,
    ):
        self._block, self._divides, self._layouts = block, divides, Layouts()
        self._modules: dict[str, Any] = dict(block.named_modules())
        self._of: dict[fx.Node, Layout] = {}
        self._several: dict[fx.Node, list[Layout]] = {}  # of operations that return several tensors
        self._bare: dict[fx.Node, _Bare] = {}  # parameters, and what is computed of them alone
        self._axes: dict[fx.Node, int] = {}  # of bare parameters, along their channels
        self._shapes: dict[fx.Node, Shapes] = {}  # of what a node returns
        self._pooled: set[fx.Node] = set()
        self._unchanged: set[fx.Node] = set()  # operations that return their input
        self._flat: set[fx.Node] = set()  # tensors in which each channel is a block of columns
        self._sizes: set[fx.Node] = set()  # of tensors, and values computed from them
        with eval_no_grad(block), _recorded_len(block):
            tracer = Tracer(divides, example)
            self._nodes, self._values = list(tracer.trace(block).nodes), tracer.values
            self._runs = Counter(n.target for n in self._nodes if n.op == "call_module")
            for node in self._nodes:
                self._follow(node)

    def every(self) -> Iterator[Channels]:
        """Yields all channels, in the order in which they are first written."""
        return iter(dict.fromkeys(itertools.chain(*self._of.values())))

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

    def axis_of(self, parameter: fx.Node) -> int | None:
        """Returns the axis of a bare parameter along which its channels lie; None for a layer."""
        return self._axes.get(parameter)

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
        if self._divides and self._is_bare(node):
            return
        tensors = self._read(node)
        bare = self._bare.keys() & set(tensors)
        if tensors and self._pooled.issuperset(tensors):
            self._pooled.add(node)
        if node.op in ("placeholder", "output"):
            self._leave(node, tensors)
        elif len(tensors) == 1 and not bare and self._calls(node, *_LAYERS):
            self._layer(node, self._of[tensors[0]])
        elif len(tensors) == 2 and len(bare) < 2 and _is(node, _TIES):
            self._tied(node, tensors)
        elif self._divides and self._is_divided(node, tensors):
            pass
        elif len(tensors) == 1 and not bare and self._by_channel(node, tensors[0]):
            self._of[node] = self._layouts.new(self._of[tensors[0]])
        else:
            self._lose_in(node, tensors)

    def _leave(self, node: fx.Node, tensors: list[fx.Node]) -> None:
        """Marks channels that enter or leave the block."""
        if self._divides:
            for channels in itertools.chain(*(self._of.get(tensor, []) for tensor in tensors)):
                channels.outside = True
            self._of[node] = self._layouts.new([Channels(outside=True)])
        else:
            self._of[node] = self._joined(tensors, Channels(outside=True))

    def _lose_in(self, node: fx.Node, tensors: list[fx.Node]) -> None:
        """Ends all channels that an operation reads: it may mix them."""
        what = type(self.module(node)).__name__ if node.op == "call_module" else node.op
        lost = f"{getattr(node.target, '__name__', node.target)} ({what})"
        if _is(node, _RESHAPES) and _has_fixed_sizes(node):
            lost += ", perhaps for its sizes, which are written into the code: try flatten(1)"
        if self._divides:  # the number of what it returns is another
            lose(itertools.chain(*(self._of.get(tensor, []) for tensor in tensors)), lost)
            self._of[node] = self._layouts.new([Channels(lost=lost)])
        else:
            self._of[node] = self._joined(tensors, Channels(lost=lost))

    def _joined(self, tensors: Sequence[fx.Node], last: Channels | None = None) -> Layout:
        """Returns the layout of tensors whose channels are the same, and of one more set."""
        own = self._merged([self._of[tensor] for tensor in tensors if tensor in self._of])
        if last is not None:
            own = self._merged([own, self._layouts.new([last])]) if own else [last]
        return self._layouts.new(own)

    def _merged(self, layouts: list[Layout]) -> Layout:
        """Returns the first one of layouts whose channels are the same from now on."""
        order = {id(channels): number for number, channels in enumerate(self.every())}
        layouts = sorted(layouts, key=lambda layout: order.get(id(layout[0]), len(order)))
        for layout in layouts[1:]:
            if self._divides:
                self._layouts.tie(layouts[0], layout)
            else:
                self._layouts.join(layouts[0][0], layout[0])
        return layouts[0] if layouts else []

    def _tied(self, node: fx.Node, tensors: list[fx.Node]) -> None:
        """Follows channels through a sum or a product of two tensors."""
        plain = [tensor for tensor in tensors if tensor not in self._bare]
        self._shapes[node] = _broadcast(*map(self._may_be, plain * (3 - len(plain))))
        sizes = {total(self._of[tensor]) for tensor in plain}
        if self._divides and len(plain) == 2 and len(sizes) == 2 and 1 in sizes:
            single, wide = sorted(plain, key=lambda tensor: total(self._of[tensor]) != 1)
            lose(self._of[single], f"{node.target}, a product with one channel for all")
            self._of[node] = self._layouts.new(self._of[wide])
        else:
            self._of[node] = self._joined(plain)
        for parameter in tensors:
            if parameter in self._bare:
                self._run_along(parameter, plain[0])
        if flat := self._flat.intersection(tensors):
            self._flat.add(node)
            if len(flat) < len(tensors):
                lose(self._of[node], "a sum or a product of a flattened map and another one")

    def _is_divided(self, node: fx.Node, tensors: list[fx.Node]) -> bool:
        """Follows a concatenation or a slice of channels; returns whether it can be."""
        if _is(node, _JOINS):
            return self._concatenated(node, tensors)
        if len(tensors) != 1 or not _is(node, _SLICES) or tensors[0] not in self._of:
            return False
        (read,) = tensors
        if read not in self._several:
            return self._sliced(node, read)
        number: Any = node.args[1] if node.target is operator.getitem else None
        if not isinstance(number, int):
            return False
        self._of[node] = self._layouts.new(self._several[read][number])
        self._shapes[node] = self._may_be(read)
        return True

    def _concatenated(self, node: fx.Node, tensors: list[fx.Node]) -> bool:
        """Follows a concatenation, along the channels or along another axis."""
        joined: Any = node.args[0] if node.args else node.kwargs.get("tensors")
        axis: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        plain = [tensor for tensor in tensors if tensor not in self._bare]
        if not isinstance(joined, (list, tuple)) or not isinstance(axis, int) or not plain:
            return False
        axes = {channels.axis for n in plain for channels in self._of[n] if not channels.outside}
        ranks = {self._bare[tensor].numbers.dim() for tensor in tensors if tensor in self._bare}
        shapes = tuple(s for s in self._may_be(plain[0]) if not ranks or len(s) in ranks)
        along = {axis % len(s) == a % len(s) for s in shapes for a in axes or {1}}
        if len(axes) > 1 or len(along) != 1 or self._flat.intersection(plain):
            return False
        self._shapes[node] = shapes
        if along == {False}:
            self._of[node] = self._joined(plain)
            for parameter in tensors:
                if parameter in self._bare:
                    self._run_along(parameter, plain[0])
            return True
        for tensor in tensors:
            value, own = self._values.get(tensor), self._of.get(tensor)
            if isinstance(value, Tensor) and own and len(own) == 1 and own[0].size is None:
                own[0].size = value.shape[axis]
        sets: Layout = []
        for tensor in joined:
            if (bare := self._bare.get(tensor)) is None:
                sets += self._of[tensor]
            else:
                sets.append(Channels(size=bare.numbers.shape[axis], outside=True))
        self._of[node] = self._layouts.new(sets)
        return True

    def _sliced(self, node: fx.Node, read: fx.Node) -> bool:
        """Follows an operation that returns ranges of the channels.

        Where a network takes n parts of one size, by the number of its channels, it needs n of one
        size once it is narrow, too: they are tied. Where a range begins or ends at a number that
        is written into the code, the channels on one side of it stay.
        """
        layout, axis = self._of[read], self._of[read][0].axis
        size = total(layout)
        if size is None or read in self._flat:
            return False
        several = isinstance(self._ran(node, read, size, 1), (tuple, list))
        found, twice = (_ranges(self._ran(node, read, size, n), axis, size * n) for n in (1, 2))
        if not found:
            return False  # of no channels alone
        if found == [(0, size)]:
            parts = [layout]
        elif twice == [(2 * start, 2 * stop) for start, stop in found]:
            unit = math.gcd(size, *itertools.chain(*found))
            ends = range(0, size, unit)
            first, *others = [self._layouts.part(layout, end, end + unit) for end in ends]
            for other in others:
                self._layouts.tie(first, other)
            parts = [self._layouts.part(layout, start, stop) for start, stop in found]
        else:
            parts = [self._layouts.part(layout, start, stop) for start, stop in found]
            self._keep_fixed(layout, parts, found, twice)
        self._of[node] = self._layouts.new(parts[0])
        if several:
            self._several[node] = parts
        self._shapes[node] = self._may_be(read)
        return True

    def _keep_fixed(
        self,
        layout: Layout,
        parts: Sequence[Layout],
        found: Sequence[tuple[int, int]],
        twice: Sequence[tuple[int, int]],
    ) -> None:
        """Ends the channels that a slice, whose size is written into the code, does not let go.

        Args:
            layout: of what is sliced.
            parts, found: of the slices, and where they are.
            twice: where they are of twice as many channels.
        """
        stays = list(layout)  # of [:, 2:6] or several
        if len(found) == len(twice) == 1:
            (start, stop), size = found[0], total(layout) or 0
            from_end = (2 * size - twice[0][0], 2 * size - twice[0][1])
            if start == twice[0][0] and size - stop == from_end[1]:  # [:, 8:] and [:, :-8]
                stays = [channels for channels in layout if channels not in parts[0]]
            elif twice[0] == (0, stop) or from_end == (size - start, 0):  # [:, :8] and [:, -8:]
                stays = list(parts[0])
        lose(stays, "a slice whose size is written into the code")

    def _ran(self, node: fx.Node, read: fx.Node, size: int, times: int) -> Any:
        """Returns what an operation makes of so many channels that are numbered; None if it fails.

        Args:
            times: how many times the network's own number of channels that is.
        """
        shape = list(self._may_be(read)[-1])
        numbers = torch.arange(size * times, dtype=torch.float32)
        axis = self._of[read][0].axis
        shape[axis] = 1
        x = numbers.view([-1 if a == axis % len(shape) else 1 for a in range(len(shape))])
        try:
            return self._tried(node, read, x * torch.ones(shape, dtype=x.dtype), times=times)
        except Exception:  # it can raise anything at such a tensor
            return None

    def _is_bare(self, node: fx.Node) -> bool:
        """Follows a parameter or buffer, and what is computed of it alone."""
        if node.op == "get_attr":
            value: Any = self._block
            for name in str(node.target).split("."):
                value = getattr(value, name, None)
            if not isinstance(value, Tensor) or not value.numel():
                return False
            numbers = torch.arange(value.numel(), dtype=torch.float64).view(value.shape)
            self._bare[node] = _Bare(node, tuple(value.shape), numbers)
            return True
        read = self._read(node)
        if len(read) != 1 or read[0] not in self._bare or node.op == "output":
            return False
        bare = self._bare[read[0]]
        try:
            numbers = self._tried(node, read[0], bare.numbers)
            inside = torch.equal(numbers, numbers.long().clamp(0, math.prod(bare.shape) - 1))
        except Exception:  # it can raise anything at such a tensor
            return False
        if inside:
            self._bare[node] = replace(bare, numbers=numbers)
        return inside

    def _run_along(self, parameter: fx.Node, read: fx.Node) -> None:
        """Follows channels through a sum or a product with a bare parameter."""
        bare, layout = self._bare[parameter], self._of[read]
        dims = bare.numbers.dim()
        axes = {dims - len(s) + layout[0].axis % len(s) for s in self._may_be(read)}
        (axis, *others) = axes
        size = bare.numbers.shape[axis] if 0 <= axis < dims else 1
        if others:
            lose(layout, f"{bare.node.target}, on an axis that is not known")
        elif size > 1:
            if len(layout) == 1 and layout[0].size is None:
                layout[0].size = size
            own = bare.axis_of_channels(axis)
            known = bare.node in self._axes or total(layout) != size
            if own is None or known or self._read_twice(bare.node):
                lose(layout, f"{bare.node.target}, a parameter that is used in more than one way")
            else:
                self._axes[bare.node] = own
                self._record("runs", bare.node, layout)

    def _read_twice(self, parameter: fx.Node) -> bool:
        same = (n for n in self._nodes if n.op == "get_attr" and n.target == parameter.target)
        return sum(len(n.users) for n in same) > 1

    def _record(self, role: str, node: fx.Node, layout: Layout) -> None:
        """Records the places of the sets of a layout in a layer."""
        start: int | None = 0
        for channels in layout:
            getattr(channels, role).append(Slot(node, start, total(layout)))
            start = None if start is None or channels.size is None else start + channels.size

    def _learn_sizes(self, layout: Layout, size: int | None, name: str) -> None:
        """Gives a set its size where a layer of so many channels shows it."""
        unknown = [channels for channels in layout if channels.size is None]
        if size is not None and len(unknown) == 1:
            unknown[0].size = size - sum(channels.size or 0 for channels in layout)
        if len(layout) > 1 and (total(layout) is None or size not in (None, total(layout))):
            lose(layout, f"{name}, of another number of channels than it reads")

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

    def _layer(self, node: fx.Node, layout: Layout) -> None:
        """Follows channels through a layer with parameters for each channel or pair of channels."""
        module = self.module(node)
        twice = f"{node.target}, which runs twice" if self._runs[node.target] > 1 else ""
        lose(layout, twice)
        (read,) = self._read(node)
        shapes = self._may_be(read)
        axis = -1 if isinstance(module, nn.Linear) else 1
        self._learn_sizes(layout, None if read in self._flat else _inputs(module), str(node.target))
        if not isinstance(module, _ALONG) and not is_depthwise(module):
            if axis != layout[0].axis and any(len(shape) > 2 for shape in shapes):
                lose(layout, f"{node.target}, which reads another axis")
            self._record("reads", node, layout)
            written = Channels(size=_outputs(module), lost=twice, axis=axis)
            layout = self._layouts.new([written])
            self._record("writes", node, layout)
            self._shapes[node] = _behind(module, shapes)
        else:
            self._shapes[node] = shapes
            layout = self._layouts.new(layout)
            self._record("runs", node, layout)
            if any(True for child in module.children() for _ in child.parameters()):
                lose(layout, f"{node.target} ({type(module).__name__})")
            elif read in self._flat:
                self._flat.add(node)
                if not _is_alike_for_all(module):
                    lose(layout, f"{node.target}, which runs over a flattened map")
            elif layout[0].axis == -1 and not _is_alike_for_all(module):
                # It runs along axis 1, which is the last axis of vectors only.
                self._shapes[node] = tuple(shape for shape in shapes if len(shape) == 2)
                if not isinstance(module, (*NORMS, nn.PReLU)) or not self._shapes[node]:
                    lose(layout, f"{node.target}, which runs over another axis")
        self._of[node] = layout

    def _by_channel(self, node: fx.Node, read: fx.Node) -> bool:
        """Tries whether an operation without parameters treats every channel separately.

        The last axis of vectors [B, C] is axis 1, and can become that of a map [B, C, 1, 1]. Where
        an operation does so by the number of other channels, as `z.view(b, c, 1, 1)` with
        `x.size()`, those are tied to the channels that it reads.
        """
        if node.op == "call_module" and self.module(node).state_dict():
            return False
        layout = self._of[read]
        before = layout[0].axis
        axes = [before, 1] if self._are_vectors(layout) else [before]
        others = [of for of in self._sized_by(node) if of != layout]
        for tied, axis in itertools.product([False, True] if others else [False], axes):
            _turn(layout, axis)
            if self._passes_on(node, read, tied):
                if tied:
                    self._merged([layout, *others])
                return True
            _turn(layout, before)
        return False

    def _are_vectors(self, layout: Layout) -> bool:
        """Returns whether every tensor of these channels is [B, C]."""
        nodes = [node for node, of in self._of.items() if not set(layout).isdisjoint(of)]
        return layout[0].axis == -1 and all(len(s) == 2 for n in nodes for s in self._may_be(n))

    def _sized_by(self, node: fx.Node) -> Iterator[Layout]:
        """Yields the channels of the tensors whose sizes are arguments of an operation."""
        for size in self._sizes.intersection(node.all_input_nodes):
            read = (n for n in size.all_input_nodes if n not in self._sizes)
            yield from (self._of[n] for n in read if n in self._of)
            yield from self._sized_by(size)

    def _passes_on(self, node: fx.Node, read: fx.Node, tied: bool) -> bool:
        """Returns whether an operation treats every channel separately along their axis.

        It must do so for all possible shapes of its input: `softmax(1)` does for tokens [B, L, C],
        and does not for vectors [B, C].

        Args:
            tied: whether all its size arguments are of the same channels.
        """
        axis, tried, same, unchanged = self._of[read][0].axis, [], True, True
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
        """Returns the shapes that a tensor may have; of the example's rank, if there is one."""
        shapes, value = self._shapes.get(node, _ANY), self._values.get(node)
        if not isinstance(value, Tensor) or value.dim() < 2:
            return shapes
        rank = value.dim()
        return tuple(s for s in shapes if len(s) == rank) or ((2, _FEW, *[8] * (rank - 2)),)

    def _apart(self, node: fx.Node, read: fx.Node, x: Tensor, tied: bool) -> Tensor:
        """Returns the outputs of an operation for each channel alone, concatenated."""
        axis = self._of[read][0].axis
        each = x.split(x.shape[axis] // _FEW, axis)
        return torch.cat([self._tried(node, read, one.clone(), tied) for one in each], axis)

    def _tried(
        self, node: fx.Node, read: fx.Node, x: Tensor, tied: bool = False, times: int = 0
    ) -> Any:
        """Computes a node on x instead of the tensor that it reads, and on known sizes.

        Args:
            tied: whether all its size arguments are of the same channels.
            times: how many times their own number of channels other tensors have; 0 for `_FEW`.
        """

        def value(argument: fx.Node) -> Any:
            if argument is read:
                return x
            if argument in self._sizes:
                return self._tried(argument, read, x, tied, times)
            if argument in self._bare:
                return self._bare[argument].numbers
            shapes, layout = self._may_be(argument), self._of[argument]
            shape = list(next((s for s in shapes if len(s) == x.dim()), shapes[0]))
            size = total(layout)
            if times and size is not None:
                shape[layout[0].axis] = size * times
            elif (tied or layout == self._of.get(read)) and argument not in self._flat:
                shape[layout[0].axis] = min(_FEW, x.shape[self._of[read][0].axis])
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


@dataclass(frozen=True, eq=False)
class _Bare:
    """The values that are computed of one parameter or buffer alone.

    Args:
        node: that reads the parameter.
        shape: of the parameter.
        numbers: the index of the parameter's value at each place, among all its values.
    """

    node: fx.Node
    shape: tuple[int, ...]
    numbers: Tensor

    def axis_of_channels(self, axis: int) -> int | None:
        """Returns the parameter's axis that is this axis of `numbers`; None if none is."""
        places = torch.unravel_index(self.numbers.long().movedim(axis, -1), self.shape)
        channels = torch.arange(self.numbers.shape[axis])
        same = (a for a, place in enumerate(places) if bool((place == channels).all()))
        return next(same, None)


def _ranges(outputs: Any, axis: int, size: int) -> list[tuple[int, int]]:
    """Returns the ranges of numbered channels that an operation returned; none for another one."""
    found = []
    for output in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
        if not isinstance(output, Tensor) or output.dim() < 2 or not output.numel():
            return []
        channels = output.movedim(axis, 0).flatten(1)
        start, stop = int(channels[0, 0]), int(channels[-1, 0]) + 1
        ascending = torch.arange(start, stop, dtype=torch.float32)
        if len(ascending) != len(channels) or bool((channels != ascending[:, None]).any()):
            return []
        found.append((start, stop))
    return found if all(stop <= size for _, stop in found) else []


def _inputs(module: Any) -> int | None:
    """Returns the number of channels that a layer reads; None for one parameter for all."""
    for name in ("in_channels", "in_features", "num_features", "num_parameters"):
        if isinstance(size := getattr(module, name, None), int):
            return None if _is_alike_for_all(module) else size
    return None


def _outputs(module: Any) -> int:
    """Returns the number of channels that a layer writes."""
    size: int = module.out_channels if isinstance(module, MAPS) else module.out_features
    return size


def _turn(layout: Layout, axis: int) -> None:
    """Sets the axis of channels."""
    for channels in layout:
        channels.axis = axis


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
