"""Exchange of Grams and decisions: each site is solved in one process, for all of them.

The Grams of a site are reduced to one process: the packed triangle only, 2·H·(H + 256) bytes. That
process selects and solves. It then sends the reduction and the rewritten weights, O·K values, to
all others, which narrow their models alike.
"""

import heapq
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist
from torch import Tensor

from grail.algebra._fit import Fit
from grail.algebra.gram import Gram
from grail.algebra.reduction import Reduction
from grail.errors import InputError
from grail.networks import AnyPoint, grouped
from grail.runtime.processes import Processes, ProcessGroup
from grail.statistics.site_statistics import SiteStatistics


@dataclass(frozen=True)
class Decision:
    """The reduction of a site and its consumers' fits; no fits if they are still to be made.

    `tokens`: the number that each consumer read. `notes`: for the report.
    """

    reduction: Reduction
    fits: tuple[Fit, ...]
    tokens: tuple[int, ...]
    notes: tuple[str, ...] = ()


class Exchange:
    """Spreads the solves of a run over its processes, by an even share of the work."""

    def __init__(self, processes: Processes):
        self._processes = processes
        self._work = [(0.0, number) for number in range(processes.count)]  # a heap

    def decided(
        self,
        collected: Mapping[AnyPoint, Sequence[SiteStatistics]],
        decide: Callable[
            [Sequence[AnyPoint], Sequence[Sequence[SiteStatistics]]], Sequence[Decision]
        ],
    ) -> Iterator[tuple[AnyPoint, Decision]]:
        """Yields each point and its decision, by the tokens of all processes, in order.

        Args:
            collected: the statistics of this process's tokens.
            decide: called for the points of a group that a process owns; of one process alone only
                when a decision on the group is asked for.
        """
        groups = grouped(list(collected))
        if self._processes.count == 1:
            for points in groups:
                parts = [collected[point] for point in points]
                yield from zip(points, decide(points, parts), strict=True)
            return
        owners = {point: self._next_owner(point.channels**3) for point in collected}
        decisions: dict[AnyPoint, Decision] = {}
        for points in groups:
            for point in points:
                for gram in itertools.chain(*(part.grams for part in collected[point])):
                    self.reduce(gram, owners[point])
            own = [point for point in points if owners[point] == self._processes.number]
            if own:
                found = decide(own, [collected[point] for point in own])
                decisions.update(zip(own, found, strict=True))
        for point, owner in owners.items():
            yield point, self._broadcast(decisions.pop(point, None), owner)

    def _next_owner(self, cost: float) -> int:
        """Returns the process with the least work so far, and adds the cost to its work."""
        work, number = heapq.heappop(self._work)
        heapq.heappush(self._work, (work + cost, number))
        return number

    def reduce(self, gram: Gram, owner: int | None = None) -> None:
        """Sums a Gram over all processes, in one of them or in all; in the others it is lost.

        Raises:
            InputError: Grams of different sites.
        """
        drift = None if gram.drift is None else gram.drift.form
        forms = self._processes.gather((gram.channels, drift))
        drifts = {form for _, form in forms if form is not None}
        if len({channels for channels, _ in forms}) > 1 or len(drifts) > 1:
            raise InputError(
                "the processes hold sums of different sites: channels, and outputs and form of the "
                f"drift, are {forms}; give every process the same sites"
            )
        for tensor in gram.parts(next(iter(drifts), None)).values():
            self._processes.add_up(tensor, owner)

    def _broadcast(self, decision: Decision | None, owner: int) -> Decision:
        """Returns the decision of its owner, in all processes; tensors of fits are not pickled."""
        fits = () if decision is None else decision.fits
        bare = [
            (replace(fit, weights=(), shifts=None), len(fit.weights), len(fit.shifts or ()))
            for fit in fits
        ]
        header = (decision and replace(decision, fits=()), bare)
        tensors = [tensor for fit in fits for tensor in (*fit.weights, *(fit.shifts or ()))]
        (sent, bare), received = self._processes.broadcast(header, tensors, owner)
        if decision is not None:
            return decision
        parts = iter(received)
        whole = [
            replace(fit, weights=_take(parts, weights), shifts=_take(parts, shifts) or None)
            for fit, weights, shifts in bare
        ]
        return replace(sent, fits=tuple(whole))


def all_reduce(gram: Gram, group: dist.ProcessGroup | None = None) -> None:
    """Sums a Gram over the processes of a group: afterwards each has the sums of all tokens.

    Only the packed triangle is sent. Token counts are integers, and exact. All processes call this
    once, after the last update, also those without a token: a second call counts everything again.

    Raises:
        InputError: Grams of different sites.
        RankError: another process failed or was lost.
    """
    processes = ProcessGroup(group)
    with processes.together():
        Exchange(processes).reduce(gram)


def _take(tensors: Iterator[Tensor], count: int) -> tuple[Tensor, ...]:
    return tuple(itertools.islice(tensors, count))
