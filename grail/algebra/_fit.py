"""The fit: a site's Gram, a reduction and the consumer's weight in, the rewritten weight out.

The mathematics is in `grail.algebra.problem`, the choice of the ridge strength and of the drift
correction by held-out tokens and guard text in `grail.algebra.heldout`. fp64 throughout, one
rounding into the weight's dtype.
"""

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from grail.algebra.gram import Gram, read_together
from grail.algebra.guard import Guard
from grail.algebra.heldout import SKETCH, Choice
from grail.algebra.problem import Consumers, Moments, Problem, Solution, Sums
from grail.algebra.reduction import Reduction, Selection, as_reduction
from grail.algebra.reductions import PANELS, ROWS, together
from grail.algebra.weights import as_given, consumer_matrix
from grail.arguments import is_number, plain, require_dense, require_switches
from grail.errors import InputError, NonFiniteError
from grail_kernels import check_kind, packed_numel

Toward = Literal["zero", "baseline"]
Auto = Literal["auto"]
Weight = Tensor | nn.Module  # a consumer

# Sites of equal sizes are fitted together up to this peak of memory. A GPU is spared the launches
# of each. A CPU gains nothing where a site keeps it busy: of 24 experts of 2048 × 768 each took
# 115 ms in batches of 1 GiB, 100 in 256 MiB and 93 one by one.
BATCH_BYTES = {"cpu": 2**26}
GPU_BATCH_BYTES = 2**30

# The α of "auto" where no tokens are held out. From bench/results/smollm2_calibration.csv: the best
# or within 2% of it at 8k, 32k and 128k tokens, on the calibration's text and on another.
ALPHA = 1e-3


@dataclass(frozen=True, repr=False)
class Fit:
    """A site's rewritten consumers and how well they rebuild the dense output.

    `weights`: one [O, K] per consumer given; of a layer in the form in which it stores its own, as
    [K, O] for a Conv1D or [O, K, 1, 1] for a convolution. `shifts`: where biases are fitted, the
    change of each consumer's bias, [O] fp64, else None. `error` and `baseline_error`:
    ‖T − W'RX‖/‖T‖ with compensation and without any, no bias either, over all consumers, measured
    on the rounded weights; T is WX, or the dense network's stream where the Gram
    has its drift. `alpha` and `drift_correction`: as given or chosen; an infinite alpha is plain
    pruning or folding. `damping`: the λ used. `retries`: how often it had to grow.
    `guard_error` and `guard_baseline_error`: the same two errors on the guard's tokens, else None.
    `guard_share`: the share of the fitted change W' − W₀ that stays so that neither error exceeds
    plain pruning's.
    """

    weights: tuple[Tensor, ...]
    error: float
    baseline_error: float
    alpha: float
    drift_correction: float
    damping: float
    retries: int
    shifts: tuple[Tensor, ...] | None = None
    guard_error: float | None = None
    guard_baseline_error: float | None = None
    guard_share: float = 1.0

    def __repr__(self) -> str:
        shapes = ", ".join(str(list(weight.shape)) for weight in self.weights)
        return (
            f"Fit(weights {shapes}, error {self.error:.4g}, plain {self.baseline_error:.4g}, "
            f"alpha {self.alpha:g})"
        )

    @property
    def weight(self) -> Tensor:
        """The rewritten weight of the only consumer."""
        if len(self.weights) != 1:
            raise InputError(f"this fit has {len(self.weights)} consumers; read .weights")
        return self.weights[0]


@torch.inference_mode(False)  # what is made in it could never be trained
def fit(
    gram: Gram,
    reduction: Reduction | Tensor | Sequence[int],
    weight: Weight | Sequence[Weight],
    *,
    compensate: bool = True,
    fit_bias: bool = False,
    alpha: float | Auto = "auto",
    toward: Toward = "baseline",
    drift_correction: float | Auto = "auto",
    held_out: Gram | None = None,
    guard: Gram | None = None,
) -> Fit:
    """Rebuilds a consumer's output from the channels that `reduction` keeps.

    Args:
        gram: the Gram of the consumer's input, H channels.
        reduction: a `Selection`, a `Folding` or another map of the same H channels; or, for a
            `Selection`, the index or the mask of the channels that stay.
        weight: the consumer [O, H], or several that read the same channels: one factorisation
            serves all. Each a tensor, a numpy array or a layer: a Linear, a Conv1D of transformers,
            a convolution of one tap. Layers are read, not changed.
        compensate: fits the weights. Without, they are the baseline W₀: plain pruning or folding.
        fit_bias: also fits shifts of the consumers' biases, from centred sums; see `Fit.shifts`.
            Where W₀ stays, without compensation or with an infinite ridge toward the baseline, the
            shift is the mean of the removed signal, (W − W₀R) s/N: the bias compensation of FLAP
            (An et al., AAAI 2024).
        alpha: ridge strength ≥ 0, relative to the mean diagonal of R G Rᵀ, centred where biases are
            fitted.
        toward: what a strong ridge shrinks to: "baseline" (plain pruning or folding) or "zero" (the
            paper).
        drift_correction: the share in [0, 1] of the drift recorded by the Gram (`Gram.update`) that
            the consumer corrects; 0 is the paper.
        held_out: the Gram of other tokens of the site. What is "auto", `alpha` or
            `drift_correction`, is chosen for the least error on them, measured on 32 combinations
            of the outputs (`grail.algebra.heldout`); then they join the fit. An
            automatic alpha may be infinite: plain pruning or folding, where nothing did better.
            Without `held_out` an automatic alpha is 1e-3 and an automatic correction 0.
        guard: the Gram of tokens of another kind of text, for an automatic `alpha`. They are never
            fitted. What is "auto" is chosen for the least mean of the errors on `held_out` and on
            `guard`, each relative to plain pruning's, among what is not worse than plain pruning on
            either. Nor is the result: where the final fit would be, a share of its change stays.

    Defaults are those of `grail.compress`; `grail.Recipe.named("paper")` has the paper's.

    Raises:
        InputError: shapes that do not fit, or a setting that is not allowed.
        NonFiniteError: NaN or Inf in a weight or in the Gram, or a result beyond the weight's
            dtype.
        SolveError: see `grail.algebra.ridge.solve`.

    Memory: `peak_bytes`.
    """
    given = tuple(weight) if isinstance(weight, (list, tuple)) else (weight,)
    check_kind("gram", gram, Gram, "a grail.Gram")
    if held_out is not None:
        check_kind("held_out", held_out, Gram, "a grail.Gram")
    require_switches(compensate=compensate, fit_bias=fit_bias)
    alpha, drift_correction = plain(alpha), plain(drift_correction)
    check_settings(alpha, toward, drift_correction)
    if guard is not None:
        check_kind("guard", guard, Gram, "a grail.Gram")
        check_guard(alpha, compensate)
    reduction = as_reduction(reduction, gram.channels)
    site = FitSite(gram, reduction, given, held_out, compensate, guard)
    (found,) = fit_each(
        [site], fit_bias=fit_bias, alpha=alpha, toward=toward, drift_correction=drift_correction
    )
    return found


@dataclass(frozen=True)
class FitSite:
    """One site of `fit_each`; the fields are arguments of `fit`."""

    gram: Gram
    reduction: Reduction
    given: tuple[Weight, ...]
    held_out: Gram | None = None
    compensate: bool = True
    guard: Gram | None = None

    @cached_property
    def weights(self) -> tuple[Tensor, ...]:
        """The consumers as matrices [O, H]."""
        return tuple(consumer_matrix(weight).detach() for weight in self.given)

    @property
    def grams(self) -> list[Gram]:
        """The Grams of all sets of tokens."""
        return [gram for gram in (self.gram, self.held_out, self.guard) if gram is not None]

    @property
    def follows_drift(self) -> bool:
        """Whether a drift was recorded and can be corrected."""
        return self.compensate and any(gram.drift is not None for gram in self.grams)

    @property
    def form(self) -> Any:
        """Returns the key that sites share which are fitted as one batch."""
        drifts = [None if gram.drift is None else gram.drift.form for gram in self.grams]
        present = (self.held_out is None, self.guard is None)
        weights = [(weight.shape, weight.dtype, weight.device) for weight in self.weights]
        selects = isinstance(self.reduction, Selection)
        kept, device = (self.reduction.kept, selects), self.gram.device
        return self.gram.channels, kept, device, weights, drifts, present, self.compensate


@torch.inference_mode(False)  # what is made in it could never be trained
def fit_each(
    sites: Sequence[FitSite],
    *,
    fit_bias: bool,
    alpha: float | Auto,
    toward: Toward,
    drift_correction: float | Auto,
) -> list[Fit]:
    """Returns the fit of each of several sites, those of equal sizes as one batch.

    At most 4 reads of the device a batch, which is one of sites of `BATCH_BYTES`, unless a
    factorisation fails, or guard text would be worse than pruned after rounding.

    Raises:
        See `fit`.
    """
    for site in sites:
        _check(site)
    read_together([gram for site in sites for gram in site.grams])
    fits: dict[int, Fit] = {}
    alike: list[tuple[Any, list[int]]] = []
    for number, site in enumerate(sites):
        if site.reduction.is_identity and not site.follows_drift:
            fits[number] = _unchanged(site, fit_bias)
            continue
        form = site.form
        known = next((members for of, members in alike if of == form), None)
        if known is None:
            alike.append((form, [number]))
        else:
            known.append(number)
    for _, members in alike:
        first = sites[members[0]]
        held_out, guard = first.held_out is not None, first.guard is not None
        one = _bytes_of(first, first.compensate, held_out, fit_bias, guard)
        count = _batch_size(first, one)
        for low in range(0, len(members), count):
            numbers = members[low : low + count]
            batch = _Batch([sites[n] for n in numbers], fit_bias, toward)
            fits |= zip(numbers, batch.fits(alpha, drift_correction), strict=True)
    return [fits[number] for number in range(len(sites))]


class _Batch:
    """The fit of sites of one form.

    Args:
        sites: E sites.
        fit_bias, toward: see `fit`.
    """

    def __init__(self, sites: Sequence[FitSite], fit_bias: bool, toward: Toward):
        self._sites, self._toward, self._like = sites, toward, sites[0]
        self._outputs = [len(weight) for weight in self._like.weights]
        device = self._like.gram.device
        reductions = together([site.reduction for site in sites], device)
        dense = _stacked([weight for site in sites for weight in site.weights], device)
        dense = dense.view(len(sites), sum(self._outputs), -1)
        self._consumers = Consumers.of(dense, reductions, fit_bias)
        self._sums = Sums([site.gram for site in sites])
        self._moments = Moments(self._consumers, self._sums)

    def fits(self, alpha: float | Auto, correction: float | Auto) -> list[Fit]:
        """Returns the fits; see `fit` for the settings."""
        chosen = self._chosen(alpha, correction)
        problem = Problem(self._consumers, self._moments, self._sums)
        found = self._solved(problem, chosen)
        retry = not found.sound
        if retry:
            self._require_finite_weights()
            found = self._solved(problem, chosen, retry)
        worse = [row.guard_after > row.guard_before for row in found.rows]
        if any(worse):  # by rounding
            pairs = zip(chosen, worse, strict=True)
            chosen = [(math.inf, 0.0) if plain else pair for pair, plain in pairs]
            found = self._solved(problem, chosen, retry)
        return [self._fit(n, found, *pair) for n, pair in enumerate(chosen)]

    def _solved(
        self, problem: Problem, chosen: Sequence[tuple[float, float]], retry: bool = False
    ) -> "_Measured":
        """Solves for an α and a β of each site, rounds the weights and measures them."""
        alphas, corrections = zip(*chosen, strict=True)
        solution = problem.solve(alphas, corrections, self._toward, retry)
        guards = [site.guard for site in self._sites if site.guard is not None]
        guard = None
        if guards and self._like.compensate:
            sums = Sums(guards)
            guard = Guard(self._consumers, sums, problem)
            solution = guard.shortened(solution)
        return self._measured(problem, solution, guard)

    def _chosen(self, alpha: float | Auto, correction: float | Auto) -> list[tuple[float, float]]:
        """Returns α and β of each site, and adds the held-out tokens to the others."""
        like, count = self._like, len(self._sites)
        if not like.follows_drift:
            correction = 0.0
        if not like.compensate:
            alpha = math.inf
        held_out, guard = (
            [gram for gram in grams if gram is not None]
            for grams in zip(*((site.held_out, site.guard) for site in self._sites), strict=True)
        )
        judges = [Sums(grams) for grams in (held_out, guard) if grams]
        if not judges:  # nothing to choose by
            alpha = ALPHA if alpha == "auto" else alpha
            correction = 0.0 if correction == "auto" else correction
            return [(alpha, correction)] * count
        moments = [Moments(self._consumers, sums) for sums in judges]
        if alpha == "auto" or correction == "auto":
            of = None if correction == "auto" else correction
            given = None if alpha == "auto" else alpha
            every = [self._moments, *moments], [self._sums, *judges]
            chosen = Choice(self._consumers, *every, self._toward, of).best(given)
        else:
            chosen = [(alpha, correction)] * count
        if held_out:
            self._sums.add(judges[0])
            self._moments.add(moments[0])
        return chosen

    def _measured(
        self, problem: Problem, solution: Solution, guard: Guard | None = None
    ) -> "_Measured":
        """Rounds the weights and measures them; one read."""
        weights = self._like.weights
        fitted = solution.change + problem.baseline
        rounded = self._rounded(fitted)
        finite = torch.linalg.vector_norm(fitted, math.inf, dim=(1, 2)).isfinite()
        fitted = problem.complete(fitted.sub_(problem.baseline), solution)
        shifts = None
        if self._consumers.affine:
            shifts = fitted[..., -1].split(self._outputs, 1)
        ends = itertools.accumulate(self._outputs)
        rows = zip(weights, ends, self._outputs, strict=True)
        coarse = [slice(end - count, end) for w, end, count in rows if w.element_size() < 4]
        none = torch.zeros_like(solution.damping)
        of_guard = (none, none, none, none + 1) if guard is None else guard.errors(fitted)
        errors = problem.errors(solution, fitted, coarse)
        facts = (solution.good, finite, solution.damping, solution.retries, *errors, *of_guard)
        table = torch.stack([fact.double() for fact in facts], 1).tolist()
        return _Measured(rounded, shifts, [_Row(*row) for row in table])

    def _rounded(self, fitted: Tensor) -> tuple[Tensor, ...]:
        """Rounds weights [E, O, K] in place; returns those of each consumer in its dtype."""
        rounded = []
        for part, weight in zip(fitted.split(self._outputs, 1), self._like.weights, strict=True):
            rounded.append(part.to(weight.dtype, copy=True))
            part.copy_(rounded[-1])
        return tuple(rounded)

    def _require_finite_weights(self) -> None:
        for site in self._sites:
            for weight in site.weights:
                _require_finite(weight, f"consumer weight of {site.gram.name or 'a site'}")

    def _fit(self, number: int, found: "_Measured", alpha: float, correction: float) -> Fit:
        site, row = self._sites[number], found.rows[number]
        rounded = [part[number] for part in found.rounded]
        if not row.finite:
            whole = torch.cat([part.double() for part in rounded])
            name = site.gram.name or "a site"
            _require_finite(whole, f"rewritten weight of {name}, in {rounded[0].dtype}")
        shifts = None
        if found.shifts is not None:
            parts = zip(found.shifts, site.weights, strict=True)
            shifts = tuple(part[number].to(w.device, copy=True) for part, w in parts)
        return Fit(
            tuple(
                as_given(part.to(w.device), given)
                for part, w, given in zip(rounded, site.weights, site.given, strict=True)
            ),
            _relative(row.after, row.total),
            _relative(row.before, row.total),
            alpha,
            correction,
            row.damping,
            int(row.retries),
            shifts,
            *_of_guard(site, row),
        )


class _Row(NamedTuple):
    """The values of one site's fit that are read from the device."""

    good: float
    finite: float
    damping: float
    retries: float
    after: float
    before: float
    total: float
    guard_after: float
    guard_before: float
    guard_total: float
    guard_share: float


class _Measured(NamedTuple):
    """Rounded weights [E, O, K] and shifts [E, O] of each consumer, and a row for each site."""

    rounded: tuple[Tensor, ...]
    shifts: tuple[Tensor, ...] | None
    rows: list[_Row]

    @property
    def sound(self) -> bool:
        """Whether every factorisation held and every value is finite."""
        return all(row.good and row.finite and math.isfinite(sum(row)) for row in self.rows)


def _stacked(weights: Sequence[Tensor], device: torch.device) -> Tensor:
    """Returns the rows of all weights [E·O, H]."""
    weights = [weight.to(device) for weight in weights]
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def _unchanged(site: FitSite, fit_bias: bool) -> Fit:
    for weight in site.weights:
        _require_finite(weight, f"consumer weight of {site.gram.name or 'a site'}")
    shifts = tuple(w.new_zeros(len(w), dtype=torch.float64) for w in site.weights)
    pairs = zip(site.weights, site.given, strict=True)
    same = tuple(as_given(w.clone(), given) for w, given in pairs)
    none = None if site.guard is None else 0.0
    return Fit(same, 0.0, 0.0, 0.0, 0.0, 0.0, 0, shifts if fit_bias else None, none, none)


def _of_guard(site: FitSite, row: _Row) -> tuple[float | None, float | None, float]:
    """Returns the errors on the guard's tokens with and without compensation, and the share."""
    if site.guard is None or not site.compensate:
        return None, None, 1.0
    after, before = (
        _relative(squared, row.guard_total) for squared in (row.guard_after, row.guard_before)
    )
    return after, before, row.guard_share


def _relative(squared: float, total: float) -> float:
    # Rounding can leave a perfect fit a little below 0; a dead site (total 0) is rebuilt exactly.
    return math.sqrt(max(squared, 0.0) / total) if total > 0 else 0.0


def batch_bytes(
    sites: Sequence[FitSite],
    *,
    compensate: bool,
    held_out: bool,
    fit_bias: bool,
    guard: bool = False,
) -> int:
    """Returns the peak of the memory that `fit_each` adds to its arguments, for sites of one size.

    Args:
        compensate, held_out, guard: whether any site is compensated, has tokens held out, or a
            guard.
        fit_bias: see `fit`.
    """
    first = sites[0]
    one = _bytes_of(first, compensate, held_out, fit_bias, guard)
    together = min(len(sites), _batch_size(first, one))
    # The last batch is fitted beside the rewritten weights of the others.
    weights = sum(w.element_size() * len(w) * first.reduction.kept for w in first.weights)
    return one * together + weights * (len(sites) - together)


def _batch_size(site: FitSite, one: int) -> int:
    """Returns how many sites that take `one` bytes each are fitted together."""
    return max(1, BATCH_BYTES.get(site.gram.device.type, GPU_BATCH_BYTES) // one)


def _bytes_of(
    site: FitSite, compensate: bool, held_out: bool, fit_bias: bool, guard: bool = False
) -> int:
    """Returns `peak_bytes` of a site alone."""
    return peak_bytes(
        site.reduction.channels,
        site.reduction.kept,
        sum(map(len, site.weights)),
        folding=not isinstance(site.reduction, Selection),
        drift=compensate and site.gram.drift is not None,
        held_out=held_out,
        affine=fit_bias,
        guard=guard and compensate,
        weight_bytes=max(weight.element_size() for weight in site.weights),
    )


def peak_bytes(
    channels: int,
    kept: int,
    outputs: int,
    *,
    folding: bool = False,
    drift: bool = False,
    held_out: bool = False,
    affine: bool = False,
    guard: bool = False,
    weight_bytes: int = 4,
) -> int:
    """Returns the peak of the memory that `fit` adds to its arguments, if the ridge solves in fp64.

    Args:
        channels, kept, outputs: H, K, and O of all consumers.
        folding: whether clusters are averaged, for which G is unpacked.
        drift, held_out: whether the Grams hold a drift, and whether there is a second one.
        affine: whether the biases are fitted as well.
        guard: whether there is a Gram of guard text.
        weight_bytes: of one value of the consumers.
    """
    h, k, o, lost = channels, kept, outputs, channels if folding else channels - kept
    full, parts = k + affine, 1 + drift  # columns with the constant's; W x and the drift's share
    result, terms = 8 * o * k, 8 * o * full * parts  # Δ; V G Rᵀ and C Rᵀ
    consumer, normal = 8 * o * (k + lost), 8 * k * k  # W₀ and V; A
    slices = 8 * min(lost, ROWS) * k  # of G
    if folding:
        splitting = 24 * o * h + result
        dense = 12 * h * h + 16 * k * h  # G and R G
        making = terms + 8 * o * h + 12 * h * h
        restricting = 8 * o * (full + h) + 2 * result
        energy = 16 * o * h + 12 * h * h
    else:
        splitting = consumer + (weight_bytes % 8) * o * lost
        dense, panel = normal, -(-lost // PANELS)
        energy = 8 * panel * (lost + 3 * o)
        making = max(8 * o * full * (1 + affine), result + slices, terms + energy)
        restricting = terms + max(4 * o * k, 12 * o * lost)
    if drift:
        making = max(making, restricting, terms + affine * result)
    factor = (2 if affine else 1) * normal
    solving = terms + result + max(factor, normal + result)
    rounding = max(12 * k * k, 4 * k * k + 16 * o * k) if weight_bytes < 4 else 0
    measuring = terms + 2 * result + weight_bytes * o * k
    measuring += 8 * o * full + result if affine else result
    merged = 4 * (packed_numel(h) + (o * h if drift else 0)) if held_out else 0
    guarding = 0
    if guard:  # beside the solution: its terms, the share, and the product for an error
        solved = terms + 2 * result
        shortening = normal + terms + 2 * result + affine * 8 * o * full
        guarding = solved + max(dense, normal + making, shortening)
        measuring += normal + terms
        rounding = max(rounding, 8 * o * full * (1 + affine) - affine * result)
    one = consumer + normal + merged + max(making, solving, measuring + rounding, guarding)
    first = max(splitting, consumer + dense)
    sets = held_out + guard  # on which candidates are compared
    if not sets:
        return max(first, one)
    rows = SKETCH if o > 2 * SKETCH else o
    mixed = 8 * rows * (k + lost) if rows < o else 0
    sketch = 8 * rows * full * parts
    trying = (3 + sets) * sketch + max(factor, normal + sketch)  # of all sets, centred and as one
    choosing = max(trying, (1 + sets) * sketch + slices)
    weighing = max(energy, 12 * o * lost * drift) if sets > 1 else 0
    both = consumer + (1 + sets) * normal + max(mixed + choosing, merged, weighing)
    return max(first, consumer + sets * normal + dense, both, one)


def _check(site: FitSite) -> None:
    gram, weights = site.gram, site.weights
    channels = [g.channels for g in site.grams]
    if {*channels, site.reduction.channels} != {gram.channels}:
        raise InputError(
            f"the reduction has {site.reduction.channels} channels, the Gram "
            f"{', '.join(map(str, channels))}: all must describe one site"
        )
    if not weights:
        raise InputError("at least one consumer weight is needed")
    for w in weights:
        require_dense("a consumer", w)
        if w.dim() != 2 or w.shape[1] != gram.channels or not len(w):
            raise InputError(
                f"a consumer must be [O, {gram.channels}] with at least 1 output; "
                f"got {tuple(w.shape)}"
            )
        if not w.is_floating_point() or w.element_size() < 2:  # of 8 bits
            raise InputError(f"a consumer must be of floating point; got {w.dtype}: dequantise it")
    outputs = sum(w.shape[0] for w in weights)
    drifts = [g.drift for g in site.grams]
    for drift in drifts:
        if drift is not None and drift.outputs != outputs:
            raise InputError(
                f"the Gram recorded a drift of {drift.outputs} outputs, "
                f"the consumers have {outputs}"
            )
    if len({drift is not None and drift.of_target for drift in drifts}) > 1:
        raise InputError(
            "one of the Grams has the target and the other has not; record it in both, or in none"
        )


def _require_finite(weight: Tensor, name: str) -> None:
    bad = ~weight.isfinite()
    if bool(bad.any()):
        raise NonFiniteError(name, bad.any(0).nonzero().flatten().tolist(), int(bad.sum()))


def check_settings(alpha: float | str, toward: str, drift_correction: float | str) -> None:
    """Raises InputError for a setting of `fit` that is not allowed."""
    if alpha != "auto" and not (is_number(alpha) and 0 <= alpha <= sys.float_info.max):
        raise InputError(f"alpha must be a finite number ≥ 0, or 'auto'; got {alpha!r}")
    if drift_correction != "auto" and not (
        is_number(drift_correction) and 0 <= drift_correction <= 1
    ):
        raise InputError(
            f"drift_correction must be a share in [0, 1], or 'auto'; got {drift_correction!r}"
        )
    if toward not in get_args(Toward):
        raise InputError(f"toward must be one of {', '.join(get_args(Toward))}; got {toward!r}")


def check_guard(alpha: float | str, compensate: bool) -> None:
    """Raises InputError for settings with which a guard has nothing to choose."""
    if not compensate or alpha != "auto":
        given = "compensate=False" if not compensate else f"alpha={alpha!r}"
        raise InputError(
            f"a guard chooses how strongly to compensate, which {given} gives already: leave the "
            "guard out, or compensate with alpha='auto'"
        )
