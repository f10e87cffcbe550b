"""Sets of channels, and the layers that share them: what `grail.networks.channel_graph` finds.

The channels of a tensor are a list of sets, one after the other. A concatenation appends lists, a
slice cuts sets in two, and a sum of two tensors ties their lists, set by set.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from torch import fx


@dataclass(frozen=True)
class Slot:
    """The place of a set of channels in a layer: from `start` of its `total`; None if unknown."""

    node: fx.Node
    start: int | None = 0
    total: int | None = None


@dataclass(eq=False)
class Channels:
    """One set of channels, and the layers that write them, run along them and read them.

    Attributes:
        axis: of the channels in a tensor: 1 after a convolution, -1 after a linear layer.
        size: their number; None if unknown.
        writes, runs, reads: the places of the set in its layers.
        outside: whether they enter or leave the block.
        lost: the operation through which they cannot be followed; "" for none.
    """

    axis: int = 1
    size: int | None = None
    writes: list[Slot] = field(default_factory=list)
    runs: list[Slot] = field(default_factory=list)
    reads: list[Slot] = field(default_factory=list)
    outside: bool = False
    lost: str = ""

    @property
    def producers(self) -> list[fx.Node]:
        """The layers that write them."""
        return [slot.node for slot in self.writes]

    @property
    def along(self) -> list[fx.Node]:
        """The layers that run along them."""
        return [slot.node for slot in self.runs]

    @property
    def consumers(self) -> list[fx.Node]:
        """The layers that read them."""
        return [slot.node for slot in self.reads]

    def take(self, other: "Channels") -> None:
        """Merges the other set into this one."""
        self.writes += other.writes
        self.runs += other.runs
        self.reads += other.reads
        self.size = other.size if self.size is None else self.size
        self.lose(other.lost)
        if self.axis != other.axis and not other.outside:
            self.lose("a sum or a product over different axes")
        self.outside |= other.outside

    def lose(self, reason: str) -> None:
        """Records why they cannot be followed further; the first reason is kept."""
        self.lost = self.lost or reason

    def cut(self, at: int) -> "list[Channels]":
        """Returns the first `at` channels and the others as two sets."""
        assert self.size is not None
        return [self._part(0, at), self._part(at, self.size - at)]

    def _part(self, first: int, size: int) -> "Channels":
        writes, runs, reads = (
            [replace(s, start=None if s.start is None else s.start + first) for s in role]
            for role in (self.writes, self.runs, self.reads)
        )
        return Channels(self.axis, size, writes, runs, reads, self.outside, self.lost)


Layout = list[Channels]  # the channels of a tensor, set by set


def total(layout: Layout) -> int | None:
    """Returns the number of channels of a tensor; None if unknown."""
    sizes = [channels.size for channels in layout]
    return None if None in sizes else sum(size for size in sizes if size is not None)


def lose(layout: Iterable[Channels], reason: str) -> None:
    """Records for every set why it cannot be followed further."""
    for channels in layout:
        channels.lose(reason)


class Layouts:
    """The layouts of all tensors of a graph, which change with the sets that they are made of."""

    def __init__(self) -> None:
        self._live: list[Layout] = []

    def new(self, sets: Iterable[Channels]) -> Layout:
        """Returns a layout of these sets."""
        layout = list(sets)
        self._live.append(layout)
        return layout

    def join(self, first: Channels, other: Channels) -> None:
        """Merges the other set into the first one, in every layout."""
        if first is not other:
            first.take(other)
            self._replace(other, [first])

    def tie(self, layout: Layout, other: Layout) -> None:
        """Joins the sets of two layouts, channel by channel, cutting sets where it must."""
        if len(layout) == len(other) == 1 and None in (layout[0].size, other[0].size):
            self.join(layout[0], other[0])
            return
        sizes = total(layout), total(other)
        if sizes[0] != sizes[1] or None in sizes:
            lose([*layout, *other], "a sum or a product of different numbers of channels")
            return
        while cuts := set(_ends(layout)) ^ set(_ends(other)):
            self._cut_at(layout, min(cuts))
            self._cut_at(other, min(cuts))
        for number in range(len(layout)):
            self.join(layout[number], other[number])

    def part(self, layout: Layout, start: int, stop: int) -> Layout:
        """Returns a range of a layout's channels as a layout, cutting sets where it must."""
        self._cut_at(layout, start)
        self._cut_at(layout, stop)
        ends = [0, *_ends(layout)]
        return self.new(layout[ends.index(start) : ends.index(stop)])

    def _cut_at(self, layout: Layout, at: int) -> None:
        """Cuts the set of a layout in two that has a channel before `at` and one from there on."""
        start = 0
        for channels in layout:
            assert channels.size is not None
            if start < at < start + channels.size:
                self._replace(channels, channels.cut(at - start))
                return
            start += channels.size

    def _replace(self, old: Channels, new: Sequence[Channels]) -> None:
        for layout in self._live:
            if old in layout:
                layout[:] = itertools.chain(*(new if c is old else [c] for c in layout))


def _ends(layout: Layout) -> list[int]:
    """Returns the number of channels up to each set, and with it."""
    return list(itertools.accumulate(channels.size or 0 for channels in layout))
