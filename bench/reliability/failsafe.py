"""Fits of broken or barely solvable data: ours beside the usual calibration loop.

    python -m bench.reliability.failsafe            run every case and print the table
    python -m bench.reliability.failsafe --output new/    write new/failsafe.csv, too
    python -m bench.reliability.failsafe --show     print the committed table

Outcomes, their bound and the usual loop are described in docs/benches.md.
"""

import itertools
import math
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import grail
from bench.tools.commandline import CommandLine, compare
from bench.tools.measuring import RESULTS as FOLDER
from bench.tools.measuring import Row, read_rows, write_rows
from bench.tools.tables import markdown
from grail.algebra._fit import Toward
from grail.errors import GrailError

RESULTS = FOLDER / "failsafe.csv"
OUTCOMES = ("refused", "flagged", "solved", "silent")
REPEATS = 30  # problems of each case
CHUNK = 24  # tokens of a batch
ROUNDING = 16 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Trial:
    """One problem.

    `x` [T, H], `mask` [T] or None, `drift` [T, O] or None; `weight` [O, H]; `kept` [K].
    `solvable`: the counted data are finite and there is a token, so an answer exists.
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
    """The answer of a method.

    `weight` [O, K]; `shift` [O], added to the bias; `flagged`: the method reports that it had to
    change the problem; `error`: ‖T − W'RX‖/‖T‖ as the method reports it, if it does.
    """

    weight: Tensor
    shift: Tensor | float = 0.0
    flagged: bool = False
    error: float | None = None


Case = Callable[[Trial, torch.Generator], Trial]
Method = Callable[[Trial], Answer]


def healthy(generator: torch.Generator) -> Trial:
    """Correlated channels, T = 200, H = 32, K = 20, O = 8: the start of every case."""
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
    """The loop of GPTQ-style libraries."""
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
    """The outcome of a method on a problem, and its error over the bound (NaN without one)."""
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


def _loudness(energies: float, generator: torch.Generator) -> Tensor:
    """Factors [H] that spread the channels' energies over a ratio, in random order."""
    factors = torch.logspace(0, -float(torch.log10(torch.tensor(energies)) / 2), 32)
    return factors[torch.randperm(len(factors), generator=generator)]


def _nan_in_masked(t: Trial, g: torch.Generator) -> Trial:
    mask = torch.rand(len(t.x), generator=g) < 0.7
    return replace(t, x=torch.where(mask[:, None], t.x, float("nan")), mask=mask)


def _one_masked_nan_let_through(t: Trial, g: torch.Generator) -> Trial:
    t = _nan_in_masked(t, g)
    assert t.mask is not None
    mask = t.mask.clone()
    mask[(~mask).nonzero()[0]] = True
    return replace(t, mask=mask, solvable=False)


def _nan_in_masked_drift(t: Trial, g: torch.Generator) -> Trial:
    t = _nan_in_masked(t, g)
    assert t.mask is not None
    return replace(t, drift=torch.where(t.mask[:, None], _noise(t, g), float("nan")))


def _rank_deficient(t: Trial, g: torch.Generator, **settings: float) -> Trial:
    return replace(t, x=t.x[:, :6] @ torch.randn(6, 32, generator=g), **settings)


def _nearly_singular(t: Trial, g: torch.Generator) -> Trial:
    # From what an fp32 Gram distinguishes from a singular one, to what it does not.
    t = _rank_deficient(t, g, alpha=0.0)
    size = 10 ** (1 - 6 * torch.rand((), generator=g))
    return replace(t, x=t.x + size * torch.randn(t.x.shape, generator=g))


def _loud_weights(t: Trial, g: torch.Generator) -> Trial:
    factors = _loudness(1e12, g)
    return replace(t, x=t.x * factors, weight=t.weight / factors, alpha=0.0)


def _louder(t: Trial, g: torch.Generator, **settings: float) -> Trial:
    factors = torch.ones(len(t.x), 1)
    factors[torch.randint(len(t.x), (), generator=g)] = 1e6
    return replace(t, x=t.x * factors, **settings)


def _constant_channels(t: Trial, g: torch.Generator, **settings: float) -> Trial:
    constant = torch.rand(32, generator=g) < 0.4
    return replace(t, x=torch.where(constant, t.x[:1] + 3, t.x), affine=True, **settings)


def _large_means(t: Trial, g: torch.Generator, **settings: float) -> Trial:
    means = 10 ** (5 * torch.rand(32, generator=g))
    return replace(t, x=t.x + means, affine=True, **settings)


def _infinite_drift(t: Trial, g: torch.Generator) -> Trial:
    drift = _noise(t, g)
    drift[3, 5] = float("inf")
    x = t.x.index_fill(0, torch.tensor(3), 0.0)
    return replace(t, x=x, drift=drift, solvable=False)


def _noise(t: Trial, g: torch.Generator) -> Tensor:
    return torch.randn(len(t.x), 8, generator=g)


def _duplicated(t: Trial, g: torch.Generator) -> Tensor:
    return t.x[:, torch.randint(8, (32,), generator=g)]


def _partly_dead(t: Trial, g: torch.Generator) -> Tensor:
    return t.x * (torch.rand(32, generator=g) < 0.5)


NAN, INFINITY = float("nan"), float("inf")
# Names seed the generators. `t`: a healthy problem.
CASES: dict[str, Case] = {
    "nothing wrong": lambda t, g: t,
    "nan activation": lambda t, g: replace(t, x=_set(t.x, g, NAN), solvable=False),
    "infinite activation": lambda t, g: replace(t, x=_set(t.x, g, -INFINITY), solvable=False),
    "fp16 activation overflowed": lambda t, g: replace(
        t, x=_set(t.x, g, 1e5).half(), solvable=False
    ),
    "nan in masked tokens": _nan_in_masked,
    "mask lets one nan through": _one_masked_nan_let_through,
    "everything masked": lambda t, g: replace(
        t, mask=torch.zeros(len(t.x), dtype=torch.bool), solvable=False
    ),
    "nan weight": lambda t, g: replace(t, weight=_set(t.weight, g, NAN), solvable=False),
    "infinite weight": lambda t, g: replace(t, weight=_set(t.weight, g, INFINITY), solvable=False),
    "no token": lambda t, g: replace(t, x=t.x[:0], solvable=False),
    "one token": lambda t, g: replace(t, x=t.x[:1]),
    "two tokens": lambda t, g: replace(t, x=t.x[:2]),
    "two tokens undamped": lambda t, g: replace(t, x=t.x[:2], alpha=0.0),
    "one token with bias": lambda t, g: replace(t, x=t.x[:1], affine=True),
    "fewer tokens than channels": lambda t, g: replace(t, x=t.x[:12]),
    "fewer tokens undamped": lambda t, g: replace(t, x=t.x[:12], alpha=0.0),
    "rank deficient": _rank_deficient,
    "rank deficient undamped": lambda t, g: _rank_deficient(t, g, alpha=0.0),
    "nearly singular undamped": _nearly_singular,
    "duplicated channels": lambda t, g: replace(t, x=_duplicated(t, g)),
    "duplicated channels undamped": lambda t, g: replace(t, x=_duplicated(t, g), alpha=0.0),
    "dead channels": lambda t, g: replace(t, x=_partly_dead(t, g)),
    "dead channels undamped": lambda t, g: replace(t, x=_partly_dead(t, g), alpha=0.0),
    "all channels dead": lambda t, g: replace(t, x=torch.zeros_like(t.x)),
    "all kept channels dead": lambda t, g: replace(t, x=t.x.index_fill(1, t.kept, 0.0)),
    "energies 1e8 apart": lambda t, g: replace(t, x=t.x * _loudness(1e8, g)),
    "energies 1e12 apart": lambda t, g: replace(t, x=t.x * _loudness(1e12, g)),
    "energies 1e12 apart undamped": lambda t, g: replace(t, x=t.x * _loudness(1e12, g), alpha=0.0),
    "loud weights on quiet channels": _loud_weights,
    "squares overflow fp32": lambda t, g: replace(t, x=t.x * 1e20),
    "sums overflow fp32": lambda t, g: replace(t, x=t.x / t.x.abs().max() * 1.8e19),
    "sums overflow fp16": lambda t, g: replace(t, x=(t.x / t.x.abs().max() * 6e4).half()),
    "activations of 1e18": lambda t, g: replace(t, x=t.x * 1e17),
    "activations of 1e minus 18": lambda t, g: replace(t, x=t.x * 1e-18),
    # From rms 1e-18, where little is lost, to 1e-24, where nothing is left.
    "squares underflow fp32": lambda t, g: replace(
        t, x=t.x * 10 ** -(19 + 6 * torch.rand((), generator=g))
    ),
    "denormal activations": lambda t, g: replace(t, x=t.x * 1e-40),
    "denormal fp16 activations": lambda t, g: replace(t, x=(t.x * 1e-6).half()),
    "one token 1e6 louder": _louder,
    "one token 1e6 louder undamped": lambda t, g: _louder(t, g, alpha=0.0),
    "constant channels with bias": _constant_channels,
    "constant channels with bias undamped": lambda t, g: _constant_channels(t, g, alpha=0.0),
    "large means with bias": _large_means,
    "large means with bias undamped": lambda t, g: _large_means(t, g, alpha=0.0),
    # The kept channels are so quiet that their weights would have to exceed fp16.
    "fp16 weight overflows": lambda t, g: replace(
        t, x=t.x * torch.ones(32).index_fill(0, t.kept, 1e-6), weight=t.weight.half(), alpha=0.0
    ),
    "bf16 weight": lambda t, g: replace(t, weight=t.weight.bfloat16(), toward="zero"),
    "drift with nan": lambda t, g: replace(t, drift=_set(_noise(t, g), g, NAN), solvable=False),
    "infinite drift of silent tokens": _infinite_drift,
    "nan in masked drift": _nan_in_masked_drift,
    "drift whose squares overflow": lambda t, g: replace(t, drift=1e25 * _noise(t, g)),
}


def measure(repeats: int = REPEATS) -> list[Row]:
    """A row for each case and method: problems, outcomes, and the worst error among the solved.

    The error is in units of the bound.
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
    """The rows as Markdown: the outcomes of each case, a total last."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    by_case: dict[str, dict[str, Row]] = {}
    for row in [*rows, *(_total(rows, method) for method in methods)]:
        by_case.setdefault(row["case"], {})[row["method"]] = row
    lines = [
        [name, next(iter(group.values()))["problems"]]
        + [_shares(group[method]) if method in group else "–" for method in methods]
        for name, group in by_case.items()
    ]
    return markdown(["case", "problems", *methods], lines)


def _total(rows: list[Row], method: str) -> Row:
    of_method = [row for row in rows if row["method"] == method]
    counts = {key: str(sum(int(row[key]) for row in of_method)) for key in ("problems", *OUTCOMES)}
    return {"case": "all", "method": method, **counts}


def _shares(row: Row) -> str:
    shares = {kind: int(row[kind]) / int(row["problems"]) for kind in OUTCOMES if int(row[kind])}
    return ", ".join(
        f"**{share:.0%} silently wrong**" if kind == "silent" else f"{share:.0%} {kind}"
        for kind, share in shares.items()
    )


def main(arguments: list[str] | None = None) -> None:
    """Runs or shows."""
    parser = CommandLine(__doc__, takes="less than a minute", results="failsafe")
    parser.add_argument("--show", action="store_true", help="print the committed table")
    options = parser.read(arguments)
    if options.show:
        rows = read_rows(RESULTS)
    else:
        torch.set_num_threads(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows = measure()
        if options.output:
            write_rows(options.output, rows)
        counts = ("problems", "refused", "flagged", "solved", "silent", "worst")
        compare(options, rows, counts)
    print(table(rows))


if __name__ == "__main__":
    main()
