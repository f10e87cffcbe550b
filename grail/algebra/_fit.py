"""The fit: a site's Gram, a reduction and the consumer's weight in, the rewritten weight out.

The mathematics is in `grail.algebra.problem`, the choice of the ridge strength and of the drift
correction by held-out tokens in `grail.algebra.heldout`. fp64 throughout, one rounding into the
weight's dtype.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from grail.algebra.gram import Gram
from grail.algebra.heldout import ALPHAS, choose
from grail.algebra.problem import ROWS, Consumer, Problem
from grail.algebra.reduction import Reduction, as_reduction
from grail.algebra.weights import as_given, consumer_matrix
from grail.arguments import is_number, plain, require_dense, require_switches
from grail.errors import InputError, NonFiniteError
from grail_kernels import check_kind

Toward = Literal["zero", "baseline"]
Auto = Literal["auto"]
Weight = Tensor | nn.Module  # a consumer

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
    """

    weights: tuple[Tensor, ...]
    error: float
    baseline_error: float
    alpha: float
    drift_correction: float
    damping: float
    retries: int
    shifts: tuple[Tensor, ...] | None = None

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
            `drift_correction`, is chosen for the least error on them; then they join the fit. An
            automatic alpha may be infinite: plain pruning or folding, where nothing did better.
            Without `held_out` an automatic alpha is 1e-3 and an automatic correction 0.

    Defaults are those of `grail.compress`; `grail.Recipe.named("paper")` has the paper's.

    Raises:
        InputError: shapes that do not fit, or a setting that is not allowed.
        NonFiniteError: NaN or Inf in a weight or in the Gram, or a result beyond the weight's
            dtype.
        SolveError: see `grail.algebra.ridge.solve`.

    Memory: `peak_bytes`.
    """
    given = tuple(weight) if isinstance(weight, (list, tuple)) else (weight,)
    grams = [gram] if held_out is None else [gram, held_out]
    for each in grams:
        check_kind("gram" if each is gram else "held_out", each, Gram, "a grail.Gram")
    weights = tuple(map(consumer_matrix, given))
    reduction = as_reduction(reduction, gram.channels)
    _check(grams, reduction, weights)
    alpha, drift_correction = plain(alpha), plain(drift_correction)
    check_settings(alpha, toward, drift_correction)
    require_switches(compensate=compensate, fit_bias=fit_bias)
    if held_out is None:  # nothing to choose by
        alpha = ALPHA if alpha == "auto" else alpha
        drift_correction = 0.0 if drift_correction == "auto" else drift_correction
    if not (compensate and any(g.drift is not None for g in grams)):
        if reduction.is_identity:
            return _as_given(_unchanged(weights, fit_bias), given)
        drift_correction = 0.0
    if not compensate:
        alpha = math.inf

    dense = torch.cat([w.detach().to(gram.device, torch.float64) for w in weights])
    consumer = Consumer(dense, reduction, fit_bias)
    del dense  # large
    problem = Problem(consumer, gram)
    if held_out is not None:
        other = Problem(consumer, held_out)
        alpha, drift_correction = _chosen(problem, other, toward, alpha, drift_correction)
        problem.add(other)
        del other
    assert alpha != "auto"
    assert drift_correction != "auto"
    return _as_given(_solved(problem, weights, alpha, toward, drift_correction), given)


def _as_given(fit: Fit, given: Sequence[object]) -> Fit:
    """Returns a fit whose weights have the forms in which the given layers store theirs."""
    pairs = zip(fit.weights, given, strict=True)
    return replace(fit, weights=tuple(as_given(weight, layer) for weight, layer in pairs))


def _unchanged(weights: tuple[Tensor, ...], fit_bias: bool) -> Fit:
    shifts = tuple(w.new_zeros(len(w), dtype=torch.float64) for w in weights)
    same = tuple(w.detach().clone() for w in weights)
    return Fit(same, 0.0, 0.0, 0.0, 0.0, 0.0, 0, shifts if fit_bias else None)


def _chosen(
    train: Problem, held_out: Problem, toward: str, alpha: float | Auto, correction: float | Auto
) -> tuple[float, float]:
    if alpha != "auto" and correction != "auto":
        return alpha, correction
    # Of equals the first: the one that changes nothing.
    alphas = (math.inf, *ALPHAS) if alpha == "auto" else (alpha,)
    choice = choose(train, held_out, toward, alphas, None if correction == "auto" else correction)
    return choice.alpha, choice.correction


def _solved(
    problem: Problem, weights: tuple[Tensor, ...], alpha: float, toward: str, correction: float
) -> Fit:
    """Returns the fit of consumers of the shapes, dtypes and devices of `weights`, rounded once."""
    fitted, damping, retries = problem.solve(alpha, toward, correction)
    fitted.add_(problem.plain)
    outputs = [len(w) for w in weights]
    rounded = [part.to(w.dtype) for part, w in zip(fitted.split(outputs), weights, strict=True)]
    fitted = torch.cat([part.double() for part in rounded])
    name = problem.name or "a site"
    _require_finite(fitted, f"rewritten weight of {name}, in {weights[0].dtype}")
    fitted = problem.complete(fitted.sub_(problem.plain), correction)
    error, baseline_error = problem.errors(fitted)
    shifts = None
    if problem.affine:
        parts = zip(fitted[:, -1].split(outputs), weights, strict=True)
        shifts = tuple(part.to(w.device, copy=True) for part, w in parts)
    return Fit(
        tuple(part.to(w.device) for part, w in zip(rounded, weights, strict=True)),
        error,
        baseline_error,
        alpha,
        correction,
        damping,
        retries,
        shifts,
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
    weight_bytes: int = 4,
) -> int:
    """Returns the peak of the memory that `fit` adds to its arguments, if the ridge solves in fp64.

    Args:
        channels, kept, outputs: H, K, and O of all consumers.
        folding: whether clusters are averaged, for which G is held in fp64.
        drift, held_out: whether the Grams hold a drift, and whether there is a second one.
        affine: whether the biases are fitted as well.
        weight_bytes: of one value of the consumers.
    """
    h, k, o, lost = channels, kept, outputs, channels if folding else channels - kept
    full, parts = k + affine, 1 + drift  # columns with the constant's; W x and the drift's share
    consumer = 8 * o * (full + lost)  # W₀ and V
    result = 8 * o * full
    terms = parts * result  # V G Rᵀ, and C Rᵀ
    normal = 8 * (h * h + 2 * h * k) if folding else 4 * k * (h + k)
    making = max(normal, 12 * k * k)  # of A
    bordering = max(making, 8 * k * k + 8 * full * full) if affine else making
    building = 8 * o * h + max(12 * min(lost, ROWS) * h, 8 * o * (k + lost))
    if drift:
        building = max(building, terms + 8 * min(o, ROWS) * (h + lost))
    products = 8 * full * full + result
    errors = (8 + weight_bytes) * o * k + max(bordering, 2 * result, products + drift * result)
    one = 4 * h * h + consumer + max(building, terms + errors)
    if not held_out:
        return one
    right = terms if drift or affine else 0
    solving = right + max(making, 8 * k * k + parts * result)
    pricing = parts * result + max(bordering, products + 2 * drift * result)
    choosing = terms + max(building, terms + max(solving, pricing))
    return max(one, 8 * h * h + consumer + choosing)


def _check(grams: Sequence[Gram], reduction: Reduction, weights: tuple[Tensor, ...]) -> None:
    gram = grams[0]
    channels = [g.channels for g in grams]
    if {*channels, reduction.channels} != {gram.channels}:
        raise InputError(
            f"the reduction has {reduction.channels} channels, the Gram "
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
        _require_finite(w, f"consumer weight of {gram.name or 'a site'}")
    outputs = sum(w.shape[0] for w in weights)
    for drift in (g.drift for g in grams if g.drift is not None):
        if drift.outputs != outputs:
            raise InputError(
                f"the Gram recorded a drift of {drift.outputs} outputs, "
                f"the consumers have {outputs}"
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
