"""What a fit does with broken or barely solvable data: ours beside the usual calibration loop.

    python -m bench.reliability.failsafe          # run every case, write bench/results/failsafe.csv, print it
    python -m bench.reliability.failsafe --show   # print the committed table

Every problem is small, random and corrupted in one way. A method may refuse it with an error,
answer and say that it had to change the problem ("flagged": a larger damping, a fallback that
warns), or solve it; what it then returns is compared with fp64 least squares on the data itself:

    ‖(W' − W*) R X‖ ≤ (√(16·eps32) + u·‖|W*| |R X|‖/‖T‖) · ‖T‖,  T = W X + βδ

An fp32 Gram is known to 16·eps32 (see `grail_kernels.gram`), a squared error read from it to no
more than that, hence the root; u is the unit roundoff of the weight's dtype. All else, also a
result where the data hold NaN, is silently wrong.

The usual loop is that of GPTQ-style libraries: a running mean Hessian in fp32, masked tokens
multiplied by 0, dead channels set to 1, 1% of the mean diagonal as damping, one Cholesky, and where
that fails the identity in its place (nothing is compensated) with a warning. It is compared with
its own 1% ridge, not with the strength that a problem asks of ours, and knows no drift or biases.
"""

import itertools
import math
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import grail
from bench.tools.measuring import Row, command_line, read_rows, write_rows
from grail.algebra._fit import Toward
from grail.errors import GrailError

RESULTS = Path(__file__).parents[1] / "results" / "failsafe.csv"
OUTCOMES = ("refused", "flagged", "solved", "silent")
REPEATS = 30  # problems of each case
CHUNK = 24  # tokens of a batch
ROUNDING = 16 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Trial:
    """One problem.

    `x` [T, H], `mask` [T] or None, `drift` [T, O] or None; `weight` [O, H]; `kept` [K].
    `solvable`: whether the counted data are finite and there is a token, so that an answer exists.
    """

    x: Tensor
    weight: Tensor
    kept: Tensor
    mask: Tensor | None = None
    drift: Tensor | None = None
    alpha: float = 1e-3
    toward: Toward = "baseline"
    affine: bool = False
    solvable: bool = True


@dataclass(frozen=True)
class Answer:
    """What a method returns.

    `weight` [O, K]; `shift` [O], what the bias gets; `flagged`: the method says that it had to
    change the problem; `error`: ‖T − W'RX‖/‖T‖ as the method reports it, if it does.
    """

    weight: Tensor
    shift: Tensor | float = 0.0
    flagged: bool = False
    error: float | None = None


Case = Callable[[Trial, torch.Generator], Trial]
Method = Callable[[Trial], Answer]
CASES: dict[str, Case] = {}


def case(change: Case) -> Case:
    """Registers a corruption under its function's name."""
    CASES[change.__name__.replace("_", " ").strip()] = change
    return change


def healthy(generator: torch.Generator) -> Trial:
    """Correlated channels, T = 200, H = 32, K = 20, O = 8; what every case starts from."""
    tokens, channels, outputs, kept = 200, 32, 8, 20
    mixing = torch.randn(channels, channels, generator=generator)
    x = torch.randn(tokens, channels, generator=generator) @ mixing
    weight = torch.randn(outputs, channels, generator=generator)
    return Trial(x, weight, torch.randperm(channels, generator=generator)[:kept].sort().values)


def trials(repeats: int = REPEATS) -> Iterator[tuple[str, Trial]]:
    """Every case, `repeats` times, and its name."""
    for name, number in itertools.product(CASES, range(repeats)):
        yield name, problem(name, number)


def problem(name: str, number: int) -> Trial:
    """One of a case's problems."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {number}".encode()))
    return CASES[name](healthy(generator), generator)


def ours(trial: Trial) -> Answer:
    """`grail.Gram` and `grail.fit`."""
    gram = grail.Gram(trial.x.shape[-1])
    for x, mask, drift in _batches(trial):
        gram.update(x, mask, drift)
    result = grail.fit(
        gram,
        grail.Selection(trial.kept, gram.channels),
        trial.weight,
        alpha=trial.alpha,
        toward=trial.toward,
        fit_bias=trial.affine,
        drift_correction=0.0 if trial.drift is None else 1.0,
    )
    shift = 0.0 if result.shifts is None else result.shifts[0]
    return Answer(result.weight, shift, result.retries > 0, result.error)


def usual_loop(trial: Trial) -> Answer:
    """What calibration libraries do; see above."""
    channels, seen = trial.x.shape[-1], 0
    hessian = torch.zeros(channels, channels)
    for x, mask, _ in _batches(trial):
        batch = x.float() if mask is None else x.float() * mask[:, None]
        hessian *= seen / (seen + len(batch))
        seen += len(batch)
        batch = batch * (2 / seen) ** 0.5
        hessian += batch.T @ batch
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    kept = trial.kept
    dropped = _dropped(trial)
    normal = hessian[kept][:, kept]
    normal = normal + 0.01 * normal.diagonal().mean() * torch.eye(len(kept))
    plain = trial.weight[:, kept]
    try:
        factor = torch.linalg.cholesky(normal)
    except RuntimeError:  # torch's LinAlgError is one
        return Answer(plain, flagged=True)
    correction = torch.cholesky_solve(hessian[kept][:, dropped], factor).T
    fitted = plain.float() + trial.weight[:, dropped].float() @ correction
    return Answer(fitted.to(trial.weight.dtype))


METHODS: dict[str, Method] = {"grail": ours, "usual loop": usual_loop}


def outcome(method: Method, trial: Trial) -> tuple[str, float]:
    """How a method fares with a problem, and its error in units of the bound (NaN without one)."""
    refusals = GrailError if method is ours else Exception
    try:
        answer = method(trial)
    except refusals:
        return "refused", float("nan")
    finite = bool(answer.weight.isfinite().all()) and math.isfinite(answer.error or 0.0)
    if answer.flagged and finite:
        return "flagged", float("nan")
    if not trial.solvable or not finite:
        return "silent", float("inf")
    if method is usual_loop:
        trial = replace(trial, alpha=0.01, toward="baseline", affine=False, drift=None)
    ratio = _ratio(answer, trial)
    return ("solved" if ratio <= 1 else "silent"), ratio


def _batches(trial: Trial) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
    for low in range(0, max(len(trial.x), 1), CHUNK):
        part = slice(low, low + CHUNK)
        mask = None if trial.mask is None else trial.mask[part]
        yield trial.x[part], mask, None if trial.drift is None else trial.drift[part]


def _dropped(trial: Trial) -> Tensor:
    dropped = torch.ones(trial.x.shape[-1], dtype=torch.bool)
    dropped[trial.kept] = False
    return dropped.nonzero().flatten()


def _ratio(answer: Answer, trial: Trial) -> float:
    """‖(W' − W*)RX‖, or if that is worse the error of the reported error, over what is allowed."""
    counted = slice(None) if trial.mask is None else trial.mask
    x, weight = trial.x[counted].double(), trial.weight.double()
    target = x @ weight.T
    if trial.drift is not None:
        target = target + trial.drift[counted].double()
    seen = x[:, trial.kept]
    best, shift = _exact(trial, seen, target, weight[:, trial.kept])
    wrong = seen @ (answer.weight.double() - best).T + answer.shift - shift
    roundoff = torch.finfo(trial.weight.dtype).eps / 2
    allowed = ROUNDING**0.5 * target.norm() + roundoff * (seen.abs() @ best.abs().T).norm()
    off = wrong.norm()
    if answer.error is not None:
        left = target - seen @ answer.weight.double().T - answer.shift
        off = torch.maximum(off, (answer.error * target.norm() - left.norm()).abs())
    return (off / allowed).item() if off > 0 else 0.0


def _exact(
    trial: Trial, seen: Tensor, target: Tensor, plain: Tensor
) -> tuple[Tensor, Tensor | float]:
    """W* [O, K] and its shift [O]: ridge regression in fp64 without a Gram, by lstsq."""
    means = seen.mean(0) if trial.affine else torch.zeros_like(seen[0])
    aims = target.mean(0) if trial.affine else torch.zeros_like(target[0])
    centred = seen - means
    pull = (trial.alpha * centred.square().sum(0).mean()).sqrt()
    start = plain if trial.toward == "baseline" else torch.zeros_like(plain)
    scale = centred.abs().max().clamp_min(torch.finfo(torch.float64).tiny)  # lstsq's own range
    rows = torch.cat([centred, pull * torch.eye(len(means), dtype=torch.float64)]) / scale
    goals = torch.cat([target - aims - centred @ start.T, torch.zeros(plain.mT.shape).double()])
    found = torch.linalg.lstsq(rows, goals / scale, driver="gelsd", rcond=1e-15).solution
    best = start + found.T
    return best, aims - best @ means if trial.affine else 0.0


def _set(x: Tensor, generator: torch.Generator, value: float) -> Tensor:
    """A copy with one element set, anywhere."""
    x = x.clone()
    x.view(-1)[torch.randint(x.numel(), (), generator=generator)] = value
    return x


def _loudness(trial: Trial, energies: float, generator: torch.Generator) -> Tensor:
    """Factors [H] that spread the channels' energies over a ratio, in random order."""
    decades = torch.log10(torch.tensor(energies)) / 2
    factors = torch.logspace(0, -float(decades), trial.x.shape[1])
    return factors[torch.randperm(len(factors), generator=generator)]


@case
def _nothing_wrong(trial: Trial, generator: torch.Generator) -> Trial:
    return trial


@case
def _nan_activation(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(trial, x=_set(trial.x, generator, float("nan")), solvable=False)


@case
def _infinite_activation(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(trial, x=_set(trial.x, generator, float("-inf")), solvable=False)


@case
def _fp16_activation_overflowed(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(trial, x=_set(trial.x, generator, 1e5).half(), solvable=False)


@case
def _nan_in_masked_tokens(trial: Trial, generator: torch.Generator) -> Trial:
    mask = torch.rand(len(trial.x), generator=generator) < 0.7
    x = torch.where(mask[:, None], trial.x, float("nan"))
    return replace(trial, x=x, mask=mask)


@case
def _mask_lets_one_nan_through(trial: Trial, generator: torch.Generator) -> Trial:
    trial = _nan_in_masked_tokens(trial, generator)
    assert trial.mask is not None
    mask = trial.mask.clone()
    mask[(~mask).nonzero()[0]] = True
    return replace(trial, mask=mask, solvable=False)


@case
def _everything_masked(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(trial, mask=torch.zeros(len(trial.x), dtype=torch.bool), solvable=False)


@case
def _nan_weight(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(trial, weight=_set(trial.weight, generator, float("nan")), solvable=False)


@case
def _infinite_weight(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(trial, weight=_set(trial.weight, generator, float("inf")), solvable=False)


@case
def _no_token(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(trial, x=trial.x[:0], solvable=False)


@case
def _one_token(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(trial, x=trial.x[:1])


@case
def _two_tokens(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(trial, x=trial.x[:2])


@case
def _two_tokens_undamped(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(trial, x=trial.x[:2], alpha=0.0)


@case
def _one_token_with_bias(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(trial, x=trial.x[:1], affine=True)


@case
def _fewer_tokens_than_channels(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(trial, x=trial.x[:12])


@case
def _fewer_tokens_undamped(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(trial, x=trial.x[:12], alpha=0.0)


@case
def _rank_deficient(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(trial, x=trial.x[:, :6] @ torch.randn(6, 32, generator=generator))


@case
def _rank_deficient_undamped(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(_rank_deficient(trial, generator), alpha=0.0)


@case
def _nearly_singular_undamped(trial: Trial, generator: torch.Generator) -> Trial:
    # From what an fp32 Gram tells from a singular one, to what it does not.
    trial = _rank_deficient_undamped(trial, generator)
    size = 10 ** (1 - 6 * torch.rand((), generator=generator))
    return replace(trial, x=trial.x + size * torch.randn(trial.x.shape, generator=generator))


@case
def _duplicated_channels(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(trial, x=trial.x[:, torch.randint(8, (32,), generator=generator)])


@case
def _duplicated_channels_undamped(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(_duplicated_channels(trial, generator), alpha=0.0)


@case
def _dead_channels(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(trial, x=trial.x * (torch.rand(32, generator=generator) < 0.5))


@case
def _dead_channels_undamped(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(_dead_channels(trial, generator), alpha=0.0)


@case
def _all_channels_dead(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(trial, x=torch.zeros_like(trial.x))


@case
def _all_kept_channels_dead(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(trial, x=trial.x.index_fill(1, trial.kept, 0.0))


@case
def _energies_1e8_apart(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(trial, x=trial.x * _loudness(trial, 1e8, generator))


@case
def _energies_1e12_apart(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(trial, x=trial.x * _loudness(trial, 1e12, generator))


@case
def _energies_1e12_apart_undamped(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(_energies_1e12_apart(trial, generator), alpha=0.0)


@case
def _loud_weights_on_quiet_channels(trial: Trial, generator: torch.Generator) -> Trial:
    factors = _loudness(trial, 1e12, generator)
    return replace(trial, x=trial.x * factors, weight=trial.weight / factors, alpha=0.0)


@case
def _squares_overflow_fp32(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(trial, x=trial.x * 1e20)


@case
def _sums_overflow_fp32(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(trial, x=trial.x / trial.x.abs().max() * 1.8e19)


@case
def _sums_overflow_fp16(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(trial, x=(trial.x / trial.x.abs().max() * 6e4).half())


@case
def _activations_of_1e18(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(trial, x=trial.x * 1e17)


@case
def _activations_of_1e_minus_18(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(trial, x=trial.x * 1e-18)


@case
def _squares_underflow_fp32(trial: Trial, generator: torch.Generator) -> Trial:
    # From rms 1e-18, where little is lost, to 1e-24, where nothing is left.
    return replace(trial, x=trial.x * 10 ** -(19 + 6 * torch.rand((), generator=generator)))


@case
def _denormal_activations(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(trial, x=trial.x * 1e-40)


@case
def _denormal_fp16_activations(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(trial, x=(trial.x * 1e-6).half())


@case
def _one_token_1e6_louder(trial: Trial, generator: torch.Generator) -> Trial:
    x = trial.x.clone()
    x[torch.randint(len(x), (), generator=generator)] *= 1e6
    return replace(trial, x=x)


@case
def _one_token_1e6_louder_undamped(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(_one_token_1e6_louder(trial, generator), alpha=0.0)


@case
def _constant_channels_with_bias(trial: Trial, generator: torch.Generator) -> Trial:
    constant = torch.rand(32, generator=generator) < 0.4
    return replace(trial, x=torch.where(constant, trial.x[:1] + 3, trial.x), affine=True)


@case
def _constant_channels_with_bias_undamped(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(_constant_channels_with_bias(trial, generator), alpha=0.0)


@case
def _large_means_with_bias(trial: Trial, generator: torch.Generator) -> Trial:
    means = 10 ** (5 * torch.rand(32, generator=generator))
    return replace(trial, x=trial.x + means, affine=True)


@case
def _large_means_with_bias_undamped(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(_large_means_with_bias(trial, generator), alpha=0.0)


@case
def _fp16_weight_overflows(trial: Trial, generator: torch.Generator) -> Trial:
    # The kept channels are so quiet that what they are to say needs weights beyond fp16.
    factors = torch.ones(32).index_fill(0, trial.kept, 1e-6)
    return replace(trial, x=trial.x * factors, weight=trial.weight.half(), alpha=0.0)


@case
def _bf16_weight(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(trial, weight=trial.weight.bfloat16(), toward="zero")


@case
def _drift_with_nan(trial: Trial, generator: torch.Generator) -> Trial:
    drift = torch.randn(len(trial.x), 8, generator=generator)
    return replace(trial, drift=_set(drift, generator, float("nan")), solvable=False)


@case
def _infinite_drift_of_silent_tokens(trial: Trial, generator: torch.Generator) -> Trial:
    drift = torch.randn(len(trial.x), 8, generator=generator)
    drift[3, 5] = float("inf")
    x = trial.x.index_fill(0, torch.tensor(3), 0.0)
    return replace(trial, x=x, drift=drift, solvable=False)


@case
def _nan_in_masked_drift(trial: Trial, generator: torch.Generator) -> Trial:
    trial = _nan_in_masked_tokens(trial, generator)
    assert trial.mask is not None
    drift = torch.randn(len(trial.x), 8, generator=generator)
    return replace(trial, drift=torch.where(trial.mask[:, None], drift, float("nan")))


@case
def _drift_whose_squares_overflow(trial: Trial, generator: torch.Generator) -> Trial:
    return replace(trial, drift=1e25 * torch.randn(len(trial.x), 8, generator=generator))


def measure(repeats: int = REPEATS) -> list[Row]:
    """A row for each case and method.

    How many problems, how many of each outcome, and the worst error among the solved, in units of
    the bound.
    """
    found: dict[tuple[str, str], list[tuple[str, float]]] = {}
    for name, trial in trials(repeats):
        for method, run in METHODS.items():
            if run is usual_loop and trial.drift is not None:
                continue  # it knows none
            found.setdefault((name, method), []).append(outcome(run, trial))
    return [_row(*key, results) for key, results in found.items()]


def _row(name: str, method: str, results: list[tuple[str, float]]) -> Row:
    solved = [ratio for kind, ratio in results if kind == "solved"]
    counts = {kind: str(sum(kind == found for found, _ in results)) for kind in OUTCOMES}
    worst = f"{max(solved):.3g}" if solved else ""
    return {"case": name, "method": method, "problems": str(len(results)), **counts, "worst": worst}


def table(rows: list[Row]) -> str:
    """The rows as Markdown: for each case what became of its problems, a total last."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = [
        "| case | problems | " + " | ".join(methods) + " |",
        "|---|---|" + "---|" * len(methods),
    ]
    by_case: dict[str, list[Row]] = {}
    for row in [*rows, *(_total(rows, method) for method in methods)]:
        by_case.setdefault(row["case"], []).append(row)
    for name, group in by_case.items():
        cells = {row["method"]: _shares(row) for row in group}
        shown = " | ".join(cells.get(method, "–") for method in methods)
        lines.append(f"| {name} | {group[0]['problems']} | {shown} |")
    return "\n".join(lines)


def _total(rows: list[Row], method: str) -> Row:
    of_method = [row for row in rows if row["method"] == method]
    counts = {key: str(sum(int(row[key]) for row in of_method)) for key in ("problems", *OUTCOMES)}
    return {"case": "all", "method": method, **counts}


def _shares(row: Row) -> str:
    problems = int(row["problems"])
    shares = {kind: int(row[kind]) / problems for kind in OUTCOMES if int(row[kind])}
    return ", ".join(
        f"**{share:.0%} silently wrong**" if kind == "silent" else f"{share:.0%} {kind}"
        for kind, share in shares.items()
    )


def main() -> None:
    """Runs or shows."""
    parser = command_line(
        __doc__,
        writes="bench/results/failsafe.csv; with --show nothing",
        takes="less than a minute",
    )
    parser.add_argument("--show", action="store_true", help="print the committed table")
    if not parser.parse_args().show:
        torch.set_num_threads(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write_rows(RESULTS, measure())
    print(table(read_rows(RESULTS)))


if __name__ == "__main__":
    main()
