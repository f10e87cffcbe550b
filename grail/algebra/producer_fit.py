"""The fit of a producer's weight through what is between it and the consumer.

A producer writes z = Z x [K], the consumer W [O, K] reads h = F(z, …), in which F treats every
channel separately: a gated unit, GELU, ReLU. With the slope J = ∂h/∂z of each channel and token,

    h(z + X x) ≈ h + J ∘ (X x)

which is exact where F is linear in z, as it is in the second factor of a gated unit, and is one
Gauss-Newton step elsewhere. With e [O], the output that is missing, the change X [K, D] of Z solves

    min over X   Σ ‖e − W (J ∘ (X x))‖² + λ Σ_k c_k ‖X_k‖²
    c_k = ‖W_k‖² · mean(J_k²),   λ = α · mean(diag G),   G = Σ x xᵀ

The penalty measures a change of each row by its effect on the output. The normal equations

    N X + λ c X = B,   N X = Σ (J ∘ (Wᵀ W (J ∘ (X x)))) xᵀ,   B = Σ (J ∘ (Wᵀ e)) xᵀ

are solved by conjugate gradients from X = 0, preconditioned by c ⊗ (G + λI): N itself if different
channels were orthogonal and J did not depend on x. A step is one pass over the tokens, for linear
layers with 2·T·K·(2·D + min(K, 2·O)) FLOPs. Few steps are a regularisation of their own: tokens
that are not fitted choose their number. For each set of tokens the error of all steps comes from
the same products,

    ‖e − W (J ∘ (X x))‖² = Σ|e|² − 2 tr(B Xᵀ) + tr((N X) Xᵀ)

Products are in fp32, sums of their results and scalars in fp64.

Convolutions read neighbours, so W J is a linear map A from what the producer writes of a sample to
the consumer's output of it, and x are the patches that the producer reads:

    N X = Σ (Aᵀ A (X x)) xᵀ,   B = Σ (Aᵀ e) xᵀ

The sums and the steps are the same (`Moments`, `conjugate_gradients`); the products N X come from
`TokenProduct` for layers of tokens, from `grail.statistics.derivative` for maps.

Source: this project. Preconditioned conjugate gradients: Hestenes and Stiefel, 1952.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grail.algebra.drift import Drift
from grail_kernels import add_products, full_fp32

# Of a set of tokens: its number, x [T, D] and J [T, K].
Chunk = tuple[int, Tensor, Tensor]

ROWS = 4096  # tokens that are multiplied at once
# Of the mean of c: the least c of a channel, so that one that hardly acts stays where it is.
LEAST_WEIGHT = 1e-2
# Of the preconditioner alone: below it, G + λI is too ill-conditioned to be inverted.
LEAST_DAMPING = 1e-6


# From a change X [K, D] to N X [K, D] fp32 of each set.
Product = Callable[[Tensor], list[Tensor]]


class Moments:
    """The sums of one set of tokens for the fit of a producer.

    Args:
        channels, inputs: K and D.
        device: where the sums live.

    `right`: B [K, D] fp32. `inputs`: G [D, D] fp32. `slopes`: Σ J² [K] fp64. `energy`: Σ|e|², and
    `tokens`, that the producer reads, both fp64.
    """

    def __init__(self, channels: int, inputs: int, device: torch.device):
        self.right = torch.zeros(channels, inputs, dtype=torch.float32, device=device)
        self.inputs = torch.zeros(inputs, inputs, dtype=torch.float32, device=device)
        self.slopes = torch.zeros(channels, dtype=torch.float64, device=device)
        self.energy = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x: Tensor, back: Tensor) -> None:
        """Adds tokens: x [T, D], and Aᵀ e [T, K] of what the consumer's output lacks."""
        add_products(self.right, back, x)
        add_products(self.inputs, x, x)
        self.tokens += len(x)

    def add_slopes(self, slope: Tensor, weight: float = 1.0) -> None:
        """Adds J² of rows [T, K], each counted `weight` times."""
        self.slopes += weight * slope.square().sum(0, dtype=torch.float64)

    def add_missing(self, missing: Tensor) -> None:
        """Adds |e|² of rows [T, O]."""
        self.energy += missing.square().sum(dtype=torch.float64)

    def sums(self) -> list[Tensor]:
        """Returns all sums; those of several processes add up."""
        return [self.right, self.inputs, self.slopes, self.energy, self.tokens]


def add_tokens(
    moments: Moments, consumer: Tensor, x: Tensor, slope: Tensor, missing: Tensor
) -> None:
    """Adds tokens of linear layers: x [T, D], J [T, K] and e [T, O] for W [O, K]."""
    weight = consumer.float()
    for rows in _rows(len(x)):
        own, slopes, lacking = x[rows].float(), slope[rows].float(), missing[rows].float()
        with full_fp32(own.device):
            back = lacking @ weight
        moments.add(own, back.mul_(slopes))
        moments.add_slopes(slopes)
        moments.add_missing(lacking)


@dataclass(frozen=True)
class Change:
    """A change X [K, D] of a producer's weight, fp32.

    `steps`: after how many steps it was taken; 0 where no step lowered the error, and X is zero.
    `errors`: after each step the squared error of each set relative to that without a change.
    """

    change: Tensor
    steps: int
    errors: tuple[tuple[float, ...], ...]


def conjugate_gradients(
    sets: Sequence[Moments],
    product: Product,
    energies: Tensor,
    *,
    steps: int,
    alpha: float,
) -> Change:
    """Returns the change of a producer's weight after the best number of steps.

    Args:
        sets: the moments of the tokens that are fitted and, after it, of those that judge. A step
            counts as better if the largest error of the judging sets, each relative to its own
            before the first step, is smaller. Without such a set the last step is the best.
        product: over the tokens of all sets and processes, as their moments.
        energies: ‖W_k‖² [K].
        steps: the most that are taken.
        alpha: strength of the penalty, ≥ 0.

    Memory: 4·K·D·(8 + 4·len(sets)) + 8·D² bytes, and what the product takes.
    """
    fitted = sets[0]
    if not all(bool(sums.isfinite().all()) for each in sets for sums in each.sums()):
        return Change(torch.zeros_like(fitted.right), 0, ())
    weights = _weights(energies, fitted)
    penalty = alpha * fitted.inputs.diagonal().double().mean()
    condition = _preconditioner(fitted, weights, alpha)
    scaled = (penalty * weights).float()[:, None]
    change = torch.zeros_like(fitted.right)
    errors = _Errors(sets)
    best, taken = change, 0
    residual = fitted.right.clone()
    ready = condition(residual)
    direction, size = ready.clone(), _inner(residual, ready)
    for step in range(1, steps + 1):
        if not size > 0:  # solved, or not finite
            break
        seen = product(direction)
        system = torch.addcmul(seen[0], scaled, direction)
        curvature = _inner(direction, system)
        if not (curvature > 0 and math.isfinite(curvature)):
            break
        length = size / curvature
        change = change + length * direction
        residual.sub_(system, alpha=length)
        if errors.add(direction, seen, length):
            best, taken = change, step
        ready = condition(residual)
        size, before = _inner(residual, ready), size
        direction = ready.add_(direction, alpha=size / before)
    return Change(best, taken, tuple(errors.trace))


def error_of(landed: Drift, normal: Tensor, before: Tensor, after: Tensor) -> float:
    """Returns ‖T − W'h‖ / ‖T‖ of a consumer, for T = W₀h + δ.

    Args:
        landed: the moments of δ, what W₀ lacks, with h.
        normal: Σ h hᵀ [K, K].
        before, after: W₀ and W' [O, K].
    """
    normal, before = normal.double(), before.double()
    cross, change = landed.cross.double(), after.double() - before
    left = landed.energy + (change @ normal * change).sum() - 2 * (cross * change).sum()
    whole = landed.energy + (before @ normal * before).sum() + 2 * (cross * before).sum()
    squared, size = left.item(), whole.item()
    return math.sqrt(max(squared, 0.0) / size) if size > 0 else 0.0


class TokenProduct:
    """The product N X of each set, for linear layers, each token alone.

    Args:
        consumer: W [O, K].
        sets: how many.
        chunks: yields all tokens of all sets, in the same order at every call.
        total: adds up a sum over processes.

    Memory: 4·(2·K + D) bytes a token of 4096 at once.
    """

    def __init__(
        self,
        consumer: Tensor,
        sets: int,
        chunks: Callable[[], Iterable[Chunk]],
        total: Callable[[Tensor], Tensor] = lambda sums: sums,
    ):
        self._through, self._sets = _through(consumer), sets
        self._chunks, self._total = chunks, total

    def __call__(self, change: Tensor) -> list[Tensor]:
        """Returns N X [K, D] fp32 of each set."""
        sums = [torch.zeros_like(change) for _ in range(self._sets)]
        for number, x, slope in self._chunks():
            for rows in _rows(len(x)):
                own, slopes = x[rows].float(), slope[rows].float()
                with full_fp32(own.device):
                    back = self._through((own @ change.mT).mul_(slopes))
                add_products(sums[number], back.mul_(slopes), own)
        return [self._total(each) for each in sums]


class _Errors:
    """The squared errors of all sets along a path of changes, relative to the first."""

    def __init__(self, sets: Sequence[Moments]):
        self._sets = sets
        self._seen = [torch.zeros_like(each.right) for each in sets]
        self._now = [each.energy.item() for each in sets]
        self._first = list(self._now)
        self._best = 1.0
        self.trace: list[tuple[float, ...]] = []

    def add(self, direction: Tensor, seen: Sequence[Tensor], length: float) -> bool:
        """Moves by `length` of a direction with N·direction `seen`; returns whether that is best.

        The first set is the fitted one, which does not judge.
        """
        for number, (each, product) in enumerate(zip(self._sets, seen, strict=True)):
            slope = _inner(each.right, direction) - _inner(self._seen[number], direction)
            self._now[number] += length * (length * _inner(product, direction) - 2 * slope)
            self._seen[number].add_(product, alpha=length)
        pairs = zip(self._now, self._first, strict=True)
        relative = tuple(now / first if first > 0 else 1.0 for now, first in pairs)
        self.trace.append(relative)
        if len(relative) == 1:  # its error and the penalty have fallen together
            return relative[0] < 1
        judged = max(relative[1:])
        better = judged < self._best
        self._best = min(judged, self._best)
        return better


def _weights(energies: Tensor, fitted: Moments) -> Tensor:
    """Returns c [K] fp64."""
    weights = energies.double() * fitted.slopes / fitted.tokens
    return weights + LEAST_WEIGHT * weights.mean()


def _preconditioner(fitted: Moments, weights: Tensor, alpha: float) -> Callable[[Tensor], Tensor]:
    """Returns R [K, D] → c⁻¹ R (G + λI)⁻¹."""
    normal = fitted.inputs.double()
    normal = (normal + normal.mT) / 2
    mean = normal.diagonal().mean()
    damping = max(alpha, LEAST_DAMPING) * mean + (mean == 0)
    while True:
        factor, failed = torch.linalg.cholesky_ex(normal + torch.diag(damping.expand(len(normal))))
        if not failed:
            break
        damping = 10 * damping
    inverse = torch.where(weights > 0, 1 / weights, 0)

    def condition(residual: Tensor) -> Tensor:
        solved = torch.cholesky_solve(residual.double().mT, factor).mT
        return (solved * inverse[:, None]).float().contiguous()

    return condition


def _through(consumer: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns y [T, K] → y WᵀW, by the cheaper of one product and two."""
    weight = consumer.float()
    outputs, channels = weight.shape
    if 2 * outputs < channels:
        return lambda rows: rows @ weight.mT @ weight
    with full_fp32(weight.device):
        both = weight.mT @ weight
    return lambda rows: rows @ both


def _rows(tokens: int) -> Iterable[slice]:
    return (slice(first, first + ROWS) for first in range(0, tokens, ROWS))


def _inner(a: Tensor, b: Tensor) -> float:
    """Returns the sum of products of two fp32 matrices, in fp64."""
    parts = zip(a.split(ROWS // 8), b.split(ROWS // 8), strict=True)
    return float(sum((x.double() * y.double()).sum() for x, y in parts))
