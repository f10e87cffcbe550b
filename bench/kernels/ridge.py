"""One site's ridge and absorb, W' = W G_:P (G_PP + λI)⁻¹: grail against published code.

    python -m bench.kernels.ridge                        MLP sites of real models, half of them kept
    python -m bench.kernels.ridge --model llama-3-8b --keep 0.7
    python -m bench.kernels.ridge --shape 4096,11008     O consumer rows, H channels; repeatable

How to read the table: docs/benches.md.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import grail
from bench.kernels import cases
from bench.tools.allocations import peak_bytes
from bench.tools.measuring import Call, Row, percentiles, time_in_turns
from bench.tools.tables import aligned
from grail.algebra import ridge

# A minute on two cores.
CPU_MODELS = ("smollm2-135m", "llama-2-7b-quarter")
ALPHA = 1e-3
RATIO_LIMIT = 30.0


@dataclass(frozen=True)
class Site:
    """A case: a consumer [O, H], the Gram of its inputs, and the kept channels."""

    weight: Tensor
    gram: grail.Gram
    selection: grail.Selection

    @property
    def sizes(self) -> tuple[int, int, int]:
        """O, H, K."""
        return (*self.weight.shape, self.selection.kept)

    def damped(self, dtype: torch.dtype) -> Tensor:
        """G_PP + λI [K, K]."""
        a = self.selection.normal(self.gram.matrix()).to(dtype)
        a.diagonal().add_(ALPHA * a.diagonal().mean())
        return a


def site(outputs: int, channels: int, keep: float, device: str) -> Site:
    """A random case with correlated channels of positive mean, as activations are."""
    gram = grail.Gram(channels, device=device)
    rank = channels // 4
    mixing = torch.randn(rank, channels, device=device) / rank**0.5
    for _ in range(max(1, 2 * channels // 2048)):
        tokens = torch.randn(2048, rank, device=device) @ mixing
        gram.update(tokens + 0.5 * torch.randn(2048, channels, device=device) + 0.5)
    kept = torch.randperm(channels)[: max(1, round(keep * channels))].sort().values
    weight = torch.randn(outputs, channels, device=device)
    return Site(weight, gram, grail.Selection(kept, channels))


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

    return {"grail": fitted, "grail solve": solved, "reference": reference}


def flops(outputs: int, channels: int, kept: int) -> dict[str, float]:
    """FLOPs of each provider, by count."""
    lost = channels - kept
    solve = kept**3 / 3 + 2 * outputs * kept**2
    return {
        "grail": solve + 2 * outputs * lost * channels + 4 * outputs * kept**2,
        "grail solve": solve + 2 * outputs * lost * kept,
        "reference": 2 * kept**3 / 3 + 2 * channels * kept**2 + 2 * outputs * channels * kept,
    }


def accuracies(case: Site, calls: dict[str, Call]) -> dict[str, tuple[float, float]]:
    """The backward ratio of each provider's W', and its distance from fp64's."""
    a = case.damped(torch.float64)
    kept = case.selection.index.to(a.device)
    target = case.weight.double() @ case.gram.matrix()[:, kept].double()
    exact = torch.cholesky_solve(target.T, torch.linalg.cholesky(a)).T
    eps, norm = torch.finfo(torch.float32).eps / 2, torch.linalg.matrix_norm
    found = {}
    for name, call in calls.items():
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
    wrong = {n: r for n, (r, _) in accuracy.items() if "grail" in n and not r < RATIO_LIMIT}
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
