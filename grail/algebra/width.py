"""Feasible widths of a site, and the best selection of a width.

A width has the structure of its site: single channels, or attention heads in key/value groups.
Selectors score channels; the width turns scores into a feasible `Selection`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from grail.algebra.reduction import Selection
from grail.algebra.targets import Multiple, as_multiple
from grail.arguments import is_number
from grail.errors import InputError

_PAGE = "docs/concepts/keep.md#which-keep"  # of errors

# The multiple by the least number of channels. 256 is the block of llama.cpp's K-quants and the
# step of DeciLM's widths, 32 the block of Q8_0, Q4_0 and Q4_1: other rows are stored in larger
# types, and decode slower. A width moves by at most 1/32 of the channels, by 1/16 below 128.
MULTIPLES = {4096: 256, 1024: 32, 64: 8, 0: 1}


def check_keep(keep: float) -> None:
    """Raises InputError unless 0 < keep ≤ 1."""
    if not is_number(keep) or not 0 < keep <= 1:
        raise InputError(
            f"keep must be a fraction in (0, 1], the share of channels that stay; got {keep!r}",
            page=_PAGE,
        )


def usual_multiple(channels: int) -> int:
    """Returns 256 from 4096 channels up, 32 from 1024, 8 from 64, else 1."""
    return next(multiple for least, multiple in MULTIPLES.items() if channels >= least)


@dataclass(frozen=True)
class ChannelWidth:
    """`kept` of `channels` single channels."""

    channels: int
    kept: int

    @classmethod
    def nearest(
        cls, channels: int, keep: float, multiple: Multiple | None = None
    ) -> "ChannelWidth":
        """Returns the multiple of `multiple` nearest to keep·channels, ties up, at most `channels`.

        Args:
            multiple: a number of channels, or the name of a target that
                `grail.algebra.targets.TARGETS` has; default 256 from 4096 channels up, 32 from
                1024, 8 from 64, else 1.

        Raises:
            InputError: keep outside (0, 1], an unknown name, or a width that would become 0.
        """
        check_keep(keep)
        if keep == 1:
            return cls(channels, channels)
        multiple = usual_multiple(channels) if multiple is None else as_multiple(multiple)
        kept = min(int(keep * channels / multiple + 0.5) * multiple, channels)
        if kept == 0:
            least = f"keep at least {multiple / channels:.3g}, or choose a smaller multiple"
            fewer = f"choose a multiple of at most {channels}"
            raise InputError(
                f"keep={keep:g} of {channels} channels, in multiples of {multiple}, is a width of "
                f"0; {least if multiple <= channels else fewer}",
                page=_PAGE,
            )
        return cls(channels, kept)

    def __str__(self) -> str:
        return f"{self.kept} of {self.channels} channels"

    @property
    def structure(self) -> str:
        """The site before narrowing, in words."""
        return f"{self.channels} channels"

    def splits(self, parts: int, multiple: int) -> bool:
        """Returns whether each of `parts` equal parts is a multiple of `multiple` channels."""
        return self.kept % (parts * multiple) == 0

    def best(self, scores: Tensor) -> Selection:
        """Keeps the channels of highest score [channels], in their order."""
        return Selection(_best(scores, self.kept).sort().values, self.channels)


@dataclass(frozen=True)
class HeadWidth:
    """Attention heads: `kept_queries` of `queries` in each of `kept_groups` of `groups`.

    head_dim never changes, and every group keeps equally many query heads: uneven groups would
    mis-wire grouped attention.
    """

    groups: int
    queries: int
    head_dim: int
    kept_groups: int
    kept_queries: int

    @classmethod
    def nearest(
        cls,
        groups: int,
        queries: int,
        head_dim: int,
        keep: float,
        allowed: Callable[["HeadWidth"], bool] = lambda width: True,
    ) -> "HeadWidth":
        """Returns the feasible width nearest keep·heads; of equals, more heads, then fewer groups.

        Args:
            allowed: which widths the architecture can express.

        Raises:
            InputError: keep outside (0, 1], or a width that would become 0.
        """
        check_keep(keep)
        wanted = Fraction(keep).limit_denominator(10**6) * groups * queries
        if wanted < Fraction(1, 2):
            raise InputError(
                f"keep={keep:g} of {groups * queries} heads is a width of 0; "
                f"keep at least {1 / (groups * queries):.3g}",
                page=_PAGE,
            )
        every = (
            cls(groups, queries, head_dim, g, q)
            for g in range(1, groups + 1)
            for q in range(1, queries + 1)
        )

        def preference(width: HeadWidth) -> tuple[Fraction, int, int]:
            heads = width.kept_groups * width.kept_queries
            return abs(heads - wanted), -heads, width.kept_groups

        return min(filter(allowed, every), key=preference)

    @property
    def channels(self) -> int:
        """The channels of the attention output before narrowing: all heads side by side."""
        return self.groups * self.queries * self.head_dim

    @property
    def kept(self) -> int:
        """The number of channels that stay."""
        return self.kept_groups * self.kept_queries * self.head_dim

    def __str__(self) -> str:
        return (
            f"{self.kept_groups * self.kept_queries} of {self.groups * self.queries} heads "
            f"({self.kept_groups} of {self.groups} key/value groups, "
            f"{self.kept_queries} of {self.queries} queries in each)"
        )

    @property
    def structure(self) -> str:
        """The site before narrowing, in words."""
        return (
            f"{self.groups * self.queries} heads of {self.head_dim} in {self.groups} "
            f"key/value groups of {self.queries}"
        )

    def splits(self, parts: int, multiple: int) -> bool:
        """Returns whether each of `parts` equal parts is a multiple of `multiple` channels.

        A part has whole query heads, and whole key/value heads or a copy of one.
        """
        whole = self.kept_groups * self.kept_queries % parts == 0
        shared = self.kept_groups % parts == 0 or parts % self.kept_groups == 0
        return whole and shared and self.kept // parts % multiple == 0

    def best(self, scores: Tensor) -> Selection:
        """Keeps the best queries of each group, then the best groups, by channel scores summed."""
        heads = scores.view(self.groups, self.queries, self.head_dim).sum(-1)
        top = _best(heads, self.kept_queries)
        chosen = _best(heads.gather(1, top).sum(1), self.kept_groups).sort().values
        queries = top[chosen].sort(1).values + chosen[:, None] * self.queries
        channels = queries.reshape(-1, 1) * self.head_dim + torch.arange(
            self.head_dim, device=scores.device
        )
        return Selection(channels.flatten(), self.channels)

    def check(self, name: str, selection: Selection) -> None:
        """Raises InputError for a selection that `best` could not have made."""
        chosen = torch.zeros(self.channels, dtype=torch.float32)
        chosen[selection.index] = 1
        if not torch.equal(self.best(chosen).index, selection.index):
            raise InputError(
                f"{name}: {self} must stay, whole and in ascending order, as "
                "view.width.best(scores) gives them; the selector answered others"
            )

    def group_rows(self, selection: Selection) -> Selection:
        """Returns the kept rows of a key or value projection [groups·head_dim, ...]."""
        per_group = self.queries * self.head_dim
        chosen = (selection.index // per_group).unique()
        rows = chosen[:, None] * self.head_dim + torch.arange(self.head_dim)
        return Selection(rows.flatten(), self.groups * self.head_dim)


@dataclass(frozen=True)
class GroupWidth(HeadWidth):
    """Channels of a grouped convolution: equally many of each group.

    For a selector those are heads of one channel; every group stays.
    """

    @classmethod
    def nearest_of_each(cls, groups: int, size: int, keep: float) -> "GroupWidth":
        """Returns the width nearest to keep·size in each of `groups` groups of `size` channels."""
        width = cls.nearest(groups, size, 1, keep, lambda width: width.kept_groups == groups)
        return cls(*vars(width).values())

    def __str__(self) -> str:
        return f"{self.kept} of {self.channels} channels ({self.kept_queries} in each group)"

    @property
    def structure(self) -> str:
        return f"{self.channels} channels in {self.groups} groups of {self.queries}"


Width = ChannelWidth | HeadWidth


def _best(scores: Tensor, count: int) -> Tensor:
    """Returns the indices of the highest scores along the last axis; of equals the first."""
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
