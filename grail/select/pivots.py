"""The search that `greedy` runs forward and `elimination` backward, by panels of channels.

Each chosen channel j is projected out of all others, for a symmetric S [H, H] and A [O, H]:

    S ← S − S_:j·S_j: / S_jj        A ← A − A_:j·S_j: / S_jj

and the next one has the largest, or the least, ‖A_:j‖² / S_jj. S itself is not rewritten: a pivoted
partial Cholesky S ≈ V·Vᵀ gives S − V·Vᵀ where it is needed, and A is updated by products of V. To
work with matrices, not vectors, the order is exact among the candidates only, those of best score,
and all scores are updated after a panel of choices.

A score needs only ‖A_:j‖² of A, so the choices of a panel are made on two matrices of the p
candidates alone, S_PP and A_Pᵀ·A_P (`grail_kernels.choose_panel`). Then one triangular factor gives
the columns of V and the updates of A for the whole panel.

All matrices of a batch are searched at once. The number of operators depends on the number of
panels alone, and the host reads nothing before the last panel. On a CPU small operators run in one
thread.

Everything is computed in fp32. Scores do not change when channels are scaled, S_ij by 1/(s_i·s_j)
and A_:j by 1/s_j. Powers of two for s bring the diagonal of S into [1, 4), so that no square leaves
fp32's range, and change no digit: activations scaled by a power of two have the same order.

FLOPs for N channels in panels of n with p candidates: H·N² for V, 2·N·O·H for A, 2·N·O·p²/n and
N²·p²/n for the candidates, and 2·N·n·(H + O) for the factors.

Source of the panels: LAPACK's pivoted Cholesky `pstrf` (Lucas, LAPACK Working Note 161, 2004).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from grail.select.view import View
from grail_kernels import choose_panel, full_fp32

# Candidates of a panel. On SmolLM2's MLPs, 768 and 384 of 1536 channels, panels of 16 of them
# choose what fp64 does channel for channel. Panels of 32 take 30% less time, and the error on
# held-out tokens changes by -0.06% and +0.03%. Panels of 64 take 45% less time for 0.3% more error,
# panels of 128 with 256 candidates no less than that for 0.4% and 0.8%.
POOL = 128

# A channel whose S_jj has fallen to this share of its first value is what the chosen ones explain,
# but for rounding. Of 600 random tokens of 1536 channels, which explain all of them, 600 channels
# are chosen, with 1e-5 602 and with 1e-6 606. In SmolLM2's MLPs the least share is 1e-2, and fp32
# errs by at most 1e-6.
NOISE = 3e-5

# FLOPs from which an operator uses all threads of a CPU: about 5 ms of one. Beside other processes
# the threads of an operator wait for one another for milliseconds. With two threads on two cores,
# beside a dozen other processes, a search of 1536 channels takes 10.5 s if all operators use both
# and 0.6 s otherwise.
PARALLEL = 5e8

InParallel = Callable[[float], AbstractContextManager[None]]


def panel_size(count: int) -> int:
    """Returns the number of choices of a panel."""
    # A product with few rows is as slow as memory where the matrix is beyond the caches.
    return max(1, min(count, 32 if count <= 1024 else 64))


@contextmanager
def one_thread() -> Iterator[InParallel]:
    """Lets operators on a CPU use one thread.

    Yields a function of an operator's FLOPs; in the context that it returns the operator uses all
    threads if it is large.
    """
    threads = torch.get_num_threads()

    @contextmanager
    def in_parallel(flops: float) -> Iterator[None]:
        torch.set_num_threads(threads if flops >= PARALLEL else 1)
        try:
            yield
        finally:
            torch.set_num_threads(1)

    torch.set_num_threads(1)
    try:
        yield in_parallel
    finally:
        torch.set_num_threads(threads)


def stacked(matrices: Sequence[Tensor]) -> Tensor:
    """Returns a batch [E, H, H]; of one matrix without a copy."""
    return matrices[0][None] if len(matrices) == 1 else torch.stack(list(matrices))


def consumers(views: Sequence[View], like: Tensor) -> Tensor:
    """Returns Wᵀ [E, H, O] of several sites of equal sizes, with the dtype and device of `like`."""
    weight = like.new_empty(len(views), *views[0].consumer.mT.shape)
    for own, view in zip(weight, views, strict=True):
        own.copy_(view.consumer.mT)
    return weight


def searching(channels: int, count: int, outputs: int) -> int:
    """Returns the most fp32 numbers held while `count` channels are chosen, without S and A."""
    h, o = channels, outputs
    panel, pool = panel_size(count), min(POOL, h)
    # Of a panel's choices their rows of S and V, or of A; or the candidates' columns of V and rows
    # of A, the matrices among them, and the columns of the last panel's choices.
    rows = panel * count + panel * max(3 * h, h + 2 * o)
    among = pool * (count + 2 * pool + max(pool, o)) + panel * count
    return (count + 1) * h + max(rows, among) + 6 * h


def pivots(matrix: Tensor, outputs: Tensor, count: int, *, least: bool = False) -> Tensor:
    """Returns `count` channels of each matrix in the order of their choice; of equals the first.

    Where no channel can be chosen any more the rest follows by the diagonal of S, largest first. A
    channel can be chosen while its S_jj is above `NOISE` of its first value; for the largest score
    its ‖A_:j‖ must not be 0.

    Args:
        matrix: S [E, H, H] fp32; overwritten.
        outputs: Aᵀ [E, H, O] fp32, so that a channel's numbers are contiguous; overwritten.
        least: whether the least score comes next.

    Returns:
        [E, count] int64 on the CPU, by one read of the device.
    """
    with torch.no_grad(), full_fp32(matrix.device), one_thread() as in_parallel:
        return _Search(matrix, outputs, count, least, in_parallel).run()


class _Choices(NamedTuple):
    """The choices of a panel, until they are projected out."""

    channels: Tensor  # [E, n]; any where there is no choice
    slots: Tensor  # [E, n], their rows of the factor
    of_factor: Tensor  # [E, N, n], their columns of the factor before
    inverse: Tensor  # [E, n, n], from their rows of S − V·Vᵀ to their rows of the factor


class _Search:
    """A search: what is chosen, the factor V, and what is left of S and A."""

    def __init__(
        self, matrix: Tensor, outputs: Tensor, count: int, least: bool, in_parallel: InParallel
    ):
        self._diagonal = matrix.diagonal(dim1=1, dim2=2).clone()
        balance(matrix, outputs)
        self._matrix, self._outputs, self._least = matrix, outputs, least
        self._in_parallel = in_parallel
        matrices, channels = self._diagonal.shape
        self._left = matrix.diagonal(dim1=1, dim2=2).clone()
        self._floor = NOISE * self._left  # infinite for those chosen
        self._factor = matrix.new_zeros(matrices, count + 1, channels)  # V, and a row of scratch
        self._every = torch.arange(matrices, device=matrix.device)[:, None]
        self._done = torch.zeros_like(self._every[:, 0])
        # The channels so far, then -1; the last column is scratch.
        self._order = self._done.new_full((matrices, count + 1), -1)
        self._count, self._known = count, 0  # the most that any matrix has chosen
        self._waiting: _Choices | None = None

    def run(self) -> Tensor:
        """Returns what `pivots` does."""
        panel = panel_size(self._count)
        todo, missing = self._count, self._order[:, 1:].numel()
        while todo:
            for _ in range(math.ceil(todo / panel)):
                self._choose(panel)
            order = self._order[:, : self._count].cpu()
            short = (order < 0).sum(1)
            # A panel chooses fewer where its candidates explain one another; others may be left.
            todo = int(short.max()) if int(short.sum()) < missing else 0
            missing = int(short.sum())
        return _filled(order, self._diagonal) if missing else order

    def _choose(self, panel: int) -> None:
        """Chooses up to `panel` more channels of each matrix."""
        self._project_out()
        pool = self._scores().argsort(dim=1, descending=True, stable=True)[:, :POOL]
        known = self._factor[:, : self._known]
        of_pool = known.gather(2, pool[:, None].expand(-1, known.shape[1], -1))
        limits = (self._count - self._done).clamp_max(panel)
        places, triangle = choose_panel(
            self._schur_complement(pool, of_pool),
            self._products(pool),
            self._floor.gather(1, pool),
            limits,
            panel,
            least=self._least,
        )
        found = places >= 0
        places = places.clamp_min_(0)
        chosen = pool.gather(1, places)
        slots = self._done[:, None] + torch.arange(panel, device=pool.device)
        slots = slots.where(found, self._count)
        self._order[self._every, slots] = chosen.where(found, -1)
        self._floor.scatter_add_(
            1, chosen, torch.full_like(triangle[:, 0], math.inf).where(found, 0)
        )
        self._done += found.sum(1)
        of_chosen = of_pool.gather(2, places[:, None].expand(-1, of_pool.shape[1], -1))
        self._waiting = _Choices(chosen, slots, of_chosen, _inverse(triangle, found))

    def _schur_complement(self, pool: Tensor, of_pool: Tensor) -> Tensor:
        """Returns (S − V·Vᵀ) [E, p, p] of the channels `pool` [E, p]."""
        places = pool[:, :, None] * self._matrix.shape[1] + pool[:, None]
        among = self._matrix.flatten(1).gather(1, places.flatten(1)).view_as(places)
        return among.baddbmm_(of_pool.mT, of_pool, alpha=-1)

    def _products(self, pool: Tensor) -> Tensor:
        """Returns A_Pᵀ·A_P [E, p, p] of the channels `pool` [E, p]."""
        rows = self._outputs[self._every, pool]
        return torch.bmm(rows, rows.mT)

    def _project_out(self) -> None:
        """Projects the last panel's choices out of all channels."""
        if self._waiting is None:
            return
        chosen, slots, of_chosen, inverse = self._waiting
        rows = self._matrix[self._every, chosen]
        with self._in_parallel(2 * rows.numel() * self._known):
            rows.baddbmm_(of_chosen.mT, self._factor[:, : self._known], alpha=-1)
        rows = torch.bmm(inverse, rows)
        self._factor[self._every, slots] = rows
        self._left = (self._left - rows.square().sum(1)).clamp_min_(0)
        of_outputs = torch.bmm(inverse, self._outputs[self._every, chosen])
        with self._in_parallel(2 * self._outputs.numel() * rows.shape[1]):
            self._outputs.baddbmm_(rows.mT, of_outputs, alpha=-1)
        self._known = min(self._known + chosen.shape[1], self._count)

    def _scores(self) -> Tensor:
        """Returns the scores [E, H], the highest to be chosen first; -inf where that cannot be."""
        # A number is read in the time of some 64 FLOPs.
        with self._in_parallel(64 * self._outputs.numel()):
            squares = torch.linalg.vector_norm(self._outputs, dim=2).square()
        possible = self._left > self._floor
        if not self._least:
            possible &= squares > 0
        scores = squares / self._left
        return (-scores if self._least else scores).where(possible, -math.inf)


def _inverse(triangle: Tensor, found: Tensor) -> Tensor:
    """Returns the inverse [E, n, n] of a triangle, with rows of 0 where `found` [E, n] is False."""
    identity = torch.eye(triangle.shape[1], dtype=torch.float64, device=triangle.device)
    inverse = torch.linalg.solve_triangular(triangle.double(), identity, upper=False)
    return inverse.to(triangle.dtype) * found[:, :, None]


def balance(matrix: Tensor, outputs: Tensor) -> None:
    """Scales channels so that S_jj lies in [1, 4), and A so that its largest value does, in place.

    By powers of two, which changes no digit. A channel with S_jj = 0 keeps its scale.
    """
    scale = power_below_root(matrix.diagonal(dim1=1, dim2=2))
    matrix.div_(scale[:, :, None]).div_(scale[:, None])
    outputs.div_(scale[:, :, None])
    largest = torch.linalg.vector_norm(outputs, math.inf, dim=(1, 2), keepdim=True)
    outputs.div_(power_below_root(largest.double().square()))


def power_below_root(values: Tensor) -> Tensor:
    """Returns the largest power of two up to √value, 1 for 0, in fp32."""
    bits = values.double().view(torch.int64) >> 52  # exponents: the sign is 0
    exponent = (bits - 1023).where(values > 0, 0) >> 1
    return ((exponent + 1023) << 52).view(torch.float64).float()


def _filled(order: Tensor, diagonal: Tensor) -> Tensor:
    """Returns an order [E, count] with channels in place of -1, by their diagonal [E, H]."""
    by_diagonal = diagonal.argsort(dim=1, descending=True, stable=True).cpu()
    for row, preferred in zip(order, by_diagonal, strict=True):
        rest = preferred[~torch.isin(preferred, row)]
        row[row < 0] = rest[: int((row < 0).sum())]
    return order
