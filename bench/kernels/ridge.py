"""One site's ridge and absorb, W' = W G_:P (G_PP + λI)⁻¹: grail against published code.

    python -m bench.kernels.ridge                        MLP sites of real models, half of them kept
    python -m bench.kernels.ridge --model llama-3-8b --keep 0.7
    python -m bench.kernels.ridge --shape 4096,11008     O consumer rows, H channels; repeatable

"grail auto" also chooses α by held-out tokens: its time over that of "grail" is what the choice
costs. "64 experts" is the same for as many sites of at most 1024 channels, fitted together.

How to read the table: docs/benches.md.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import grail
from bench.kernels import cases
from bench.tools.allocations import peak_bytes
from bench.tools.measuring import Call, Row, percentiles, time_in_turns
from bench.tools.tables import aligned
from grail.algebra import ridge
from grail.algebra._fit import FitSite, fit_each
from grail.algebra.heldout import SKETCH

# A minute on two cores.
CPU_MODELS = ("smollm2-135m", "llama-2-7b-quarter")
ALPHA = 1e-3
RATIO_LIMIT = 30.0
EXPERTS, MOST_EXPERT_CHANNELS = 64, 1024
AUTO, TOGETHER = "grail auto", f"{EXPERTS} experts"
AUTOMATIC: dict[str, Any] = {
    "fit_bias": False,
    "alpha": "auto",
    "toward": "zero",
    "drift_correction": 0.0,
}


@dataclass(frozen=True)
class Site:
    """A case: a consumer [O, H], the Grams of its inputs, a fifth held out, and what is kept."""

    weight: Tensor
    gram: grail.Gram
    held_out: grail.Gram
    selection: grail.Selection

    @property
    def sizes(self) -> tuple[int, int, int]:
        """O, H, K."""
        return (*self.weight.shape, self.selection.kept)

    def system(self, alpha: float, merged: bool) -> tuple[Tensor, Tensor]:
        """G_PP + λI [K, K] and W G_:P [O, K] in fp64, of all tokens or of those not held out."""
        gram = self.gram.matrix().double()
        if merged:
            gram += self.held_out.matrix()
        a = self.selection.normal(gram)
        a.diagonal().add_(alpha * a.diagonal().mean())
        return a, self.weight.double() @ gram[:, self.selection.index.to(gram.device)]

    def automatic(self, weight: Tensor) -> grail.Fit:
        """The fit whose α is chosen by the held-out tokens."""
        one = FitSite(self.gram, self.selection, (weight,), self.held_out)
        return fit_each([one], **AUTOMATIC)[0]


def site(outputs: int, channels: int, keep: float, device: str) -> Site:
    """A random case with correlated channels of positive mean, as activations are."""
    grams = [grail.Gram(channels, device=device) for _ in range(2)]
    rank = channels // 4
    mixing = torch.randn(rank, channels, device=device) / rank**0.5
    for gram, count in zip(grams, (2048, 512), strict=True):
        for _ in range(max(1, 2 * channels // 2048)):
            tokens = torch.randn(count, rank, device=device) @ mixing
            gram.update(tokens + 0.5 * torch.randn(count, channels, device=device) + 0.5)
    kept = torch.randperm(channels)[: max(1, round(keep * channels))].sort().values
    weight = torch.randn(outputs, channels, device=device)
    return Site(weight, *grams, grail.Selection(kept, channels))


def providers(case: Site) -> dict[str, Call]:
    """Every way to W', as a function of the weight."""
    selection = case.selection
    kept = selection.index.to(case.weight.device)
    is_dropped = torch.ones(selection.channels, dtype=torch.bool, device=kept.device)
    is_dropped[kept] = False
    dropped = is_dropped.nonzero().flatten()

    def fitted(weight: Tensor) -> Tensor:
        return grail.fit(case.gram, selection, weight, alpha=ALPHA, toward="zero").weight

    def solved(weight: Tensor) -> Tensor:
        gram = case.gram.matrix()
        plain = weight[:, kept].double()
        damping = ALPHA * case.gram.energy[kept].double().mean()
        right = weight[:, dropped].double() @ gram[dropped][:, kept].double() - damping * plain
        solution = ridge.solve(lambda: selection.normal(gram).double(), right, damping)
        return (plain + solution.x).to(weight.dtype)

    def reference(weight: Tensor) -> Tensor:
        gram = case.gram.matrix()
        a = gram[kept][:, kept]
        a.diagonal().add_(ALPHA * a.diagonal().mean())
        return weight @ torch.linalg.solve(a, gram[:, kept], left=False)

    def automatic(weight: Tensor) -> Tensor:
        return case.automatic(weight).weight

    def together(weight: Tensor) -> Tensor:
        one = FitSite(case.gram, selection, (weight,), case.held_out)
        return fit_each([one] * EXPERTS, **AUTOMATIC)[-1].weight

    calls = {"grail": fitted, AUTO: automatic, TOGETHER: together, "grail solve": solved}
    if selection.channels > MOST_EXPERT_CHANNELS:
        del calls[TOGETHER]
    return {**calls, "reference": reference}


def flops(outputs: int, channels: int, kept: int) -> dict[str, float]:
    """FLOPs of each provider, by count."""
    lost = channels - kept
    solve = kept**3 / 3 + 2 * outputs * kept**2
    errors = 5 / 4 * outputs * (kept**2 + lost**2)
    fit = solve + 2 * outputs * lost * kept + errors
    automatic = fit + 3 * (kept**3 / 3 + 4 * SKETCH * kept**2)  # of 3 to 6 strengths
    return {
        "grail": fit,
        AUTO: automatic,
        TOGETHER: EXPERTS * automatic,
        "grail solve": solve + 2 * outputs * lost * kept,
        "reference": 2 * kept**3 / 3 + 2 * channels * kept**2 + 2 * outputs * channels * kept,
    }


def accuracies(case: Site, calls: dict[str, Call]) -> dict[str, tuple[float, float]]:
    """The backward ratio of each provider's W', and its distance from fp64's."""
    eps, norm = torch.finfo(torch.float32).eps / 2, torch.linalg.matrix_norm
    chosen = case.automatic(case.weight).alpha
    found = {}
    for name, call in calls.items():
        merged = name in (AUTO, TOGETHER)
        a, target = case.system(chosen if merged else ALPHA, merged)
        exact = torch.cholesky_solve(target.T, torch.linalg.cholesky(a)).T
        x = call(case.weight).double()
        ratio = norm(target - x @ a, 1) / (norm(a, 1) * norm(x, 1) * len(a) * eps)
        found[name] = ratio.item(), (norm(x - exact) / norm(exact)).item()
    return found


def measure(case: Site, repeats: int) -> list[Row]:
    """The rows of one case, times in seconds and memory in bytes, ready for a CSV.

    Raises:
        ArithmeticError: a result of grail is wrong, so nothing was timed.
    """
    calls = providers(case)
    accuracy = accuracies(case, calls)
    ours = accuracy.keys() - {"reference"}
    wrong = {name: accuracy[name][0] for name in ours if not accuracy[name][0] < RATIO_LIMIT}
    if wrong:
        raise ArithmeticError(f"O, H, K = {case.sizes}: backward ratios {wrong}")
    device, count = case.weight.device.type, flops(*case.sizes)
    peak = {name: peak_bytes(partial(call, case.weight), device) for name, call in calls.items()}
    timed = time_in_turns(calls, [case.weight, case.weight.clone()], repeats)
    sizes = zip(("outputs", "channels", "kept"), map(str, case.sizes), strict=True)
    of = {"kernel": "ridge", "alpha": str(ALPHA), "provider": "", **dict(sizes)}
    return [
        of
        | {"provider": name, **percentiles(seconds), "flops": f"{count[name]:.6g}"}
        | {"memory": str(peak[name])}
        | dict(zip(("ratio", "error"), (f"{v:.6g}" for v in accuracy[name]), strict=True))
        for name, seconds in timed.items()
    ]


def show(rows: list[Row]) -> str:
    """The rows of one case as text."""
    first, times = rows[0], ("p20", "p50", "p80")
    rival = next(float(row["p50"]) for row in rows if row["provider"] == "reference")
    lines = []
    for row in rows:
        of = {name: float(row[name]) for name in (*times, "flops", "memory", "ratio", "error")}
        rates = (
            f"{rival / of['p50']:.2f}",
            f"{of['flops'] / 1e9:.2f}",
            f"{of['memory'] / 1e6:.1f}",
        )
        milliseconds = (f"{1e3 * of[name]:.2f}" for name in times)
        accuracy = (f"{of['ratio']:.2g}", f"{of['error']:.1e}")
        lines.append((row["provider"], *milliseconds, *rates, *accuracy))
    names = ("provider", *times, "x ref.", "GFLOP", "memory", "ratio", "error")
    sizes = "{outputs} outputs x {channels} channels, {kept} kept".format(**first)
    return f"\n{sizes}; ms, MB\n{aligned(names, lines)}"


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints, saves; the exit code is 1 if a result was wrong."""
    takes = "many minutes on 2 cores; --seconds limits it"
    of = (__doc__, arguments, CPU_MODELS)
    options = cases.parse_mlp(*of, takes=takes, results="ridge{device}")
    cases.announce(options.device)

    def measured(outputs: int, channels: int) -> list[Row]:
        return measure(site(outputs, channels, options.keep, options.device), options.repeats)

    todo = [(f"{o} x {h}", partial(measured, o, h)) for o, h in options.shapes]
    return cases.run(options, todo, show)


if __name__ == "__main__":
    raise SystemExit(main())
