"""The tables of docs/results.md and README.md, from the committed CSV files alone.

    python -m bench.report.comparison     writes docs/results.md, prints the table of README.md

The text of the page is in bench/report/results.md.j2; its numbers come from the CSV files.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from bench.quality import levers
from bench.tools.commandline import CommandLine
from bench.tools.measuring import RESULTS, ROOT, Row, Table, read_rows
from bench.tools.pages import fill
from bench.tools.tables import markdown
from grail.report.report import recovered

PAGE = ROOT / "docs" / "results.md"
# Network: a title, the score that is shown, and the keep ratios of its table.
NETWORKS: dict[str, tuple[str, str, tuple[float, ...]]] = {
    "smollm2": ("SmolLM2-135M, MLP, technical text", "perplexity", (0.8, 0.65, 0.5)),
    "mixture": ("SmolLM2-135M as a mixture of experts", "perplexity", ()),
    "resnet18": ("ResNet-18, Fashion-MNIST, block-internal channels", "accuracy", (0.7, 0.5, 0.3)),
    "vit": ("ViT, Fashion-MNIST, MLP", "accuracy", (0.7, 0.5, 0.3)),
    "efficientnet": (
        *("EfficientNet-lite0, expanded channels, photographs", "agreement"),
        (0.7, 0.5, 0.3),
    ),
    "minilm": ("all-MiniLM-L6-v2, MLP, Brown sentences", "cosine", (0.7, 0.5, 0.3)),
}
VARIANTS = {
    "own": "alone",
    "grail": "GRAIL, the paper's way",
    "both": "the same, with a bias",
    "ours": "GRAIL, grail's defaults",
}
LEAST = 0.005  # of the score; where pruning loses less, no share of it is given
# The selector that is published with a ridge of its own: a further ridge recovers nothing.
RIDGE = "slimgpt"
# Recovered share of the lost log-perplexity in the paper: LLaMA-2-7B, WikiText-2, by selector and
# keep ratio (arXiv 2602.23795, computed from its perplexities).
PAPERS_SHARES = {("wanda", 0.8): 0.47, ("wanda", 0.5): 0.64, ("flap", 0.5): 0.19}

Scores = dict[tuple[str, float, str], float]


@dataclass(frozen=True)
class Network:
    """The results of one network. `score`: the column that is shown; `keeps`: of the table."""

    name: str
    title: str
    score: str
    keeps: tuple[float, ...]

    @cached_property
    def rows(self) -> list[Row]:
        """Selectors; none for a network with studies alone."""
        return Table(RESULTS / f"selectors_{self.name}.csv", ()).rows

    @cached_property
    def studies(self) -> list[Row]:
        """Settings, sizes and strengths."""
        return Table(RESULTS / f"studies_{self.name}.csv", ()).rows

    @property
    def samples(self) -> str:
        """Calibration samples of the tables; without a table, of most studies."""
        counts = Counter(r["samples"] for r in (self.rows or self.studies) if r["selector"])
        return counts.most_common(1)[0][0]

    def study(self, variant: str, selector: str = "wanda", keep: float = 0.5) -> str:
        """The score of a study."""
        (value,) = (
            float(r[self.score])
            for r in self.studies
            if (r["selector"], r["variant"], float(r["keep"])) == (selector, variant, keep)
            and r["samples"] == self.samples
        )
        return number(self.score, value)


def page() -> str:
    """The whole page in Markdown."""
    parts = (summary, table, study_table, beside_the_paper, has_axes)
    return fill(
        ROOT / "bench/report/results.md.j2",
        networks={name: Network(name, *of) for name, of in NETWORKS.items()},
        **{part.__name__: part for part in parts},
    )


def found(rows: list[Row], score: str) -> Scores:
    """Scores by selector, keep and variant."""
    return {(r["selector"], float(r["keep"]), r["variant"]): float(r[score]) for r in rows}


def has_axes(rows: list[Row]) -> bool:
    """Finds sizes or strengths that a figure can show."""
    return any(r["variant"].startswith("alpha=") for r in rows)


def share(score: str, dense: float, pruned: float, restored: float) -> float | None:
    """The recovered share of the lost score; None where almost nothing was lost."""
    if score == "perplexity":
        return recovered(dense, pruned, restored)
    return None if dense - pruned < LEAST else (restored - pruned) / (dense - pruned)


def number(score: str, value: float) -> str:
    """A score with the digits of the page."""
    if score == "perplexity":
        return f"{value:,.1f}" if value < 1e4 else f"{value:.0e}"
    return f"{value:.3f}" if score == "cosine" else f"{100 * value:.1f}"


def table(rows: list[Row], score: str, keeps: tuple[float, ...]) -> str:
    """A line for each selector, a column for each keep ratio."""
    values = found(rows, score)
    lines = [
        [selector, *(_cell(values, score, selector, keep) for keep in keeps)]
        for selector in dict.fromkeys(r["selector"] for r in rows if r["selector"])
    ]
    return markdown(["selector", *(f"keep {keep:g}" for keep in keeps)], lines)


def _cell(values: Scores, score: str, selector: str, keep: float) -> str:
    dense, pruned = values["", 1.0, "dense"], values.get((selector, keep, "own"))
    if pruned is None:
        return "–"
    parts = [number(score, pruned)]
    for variant in ("grail", "ours"):
        if (value := values.get((selector, keep, variant))) is None:
            parts.append("–")
            continue
        back = None if selector == RIDGE else share(score, dense, pruned, value)
        parts.append(number(score, value) + ("" if back is None else f" ({back:.0%})"))
    return " → ".join(parts)


def summary(rows: list[Row], score: str) -> str:
    """Dense score, and how often compensation helped, from all cells."""
    values = found(rows, score)
    unit = "" if score in ("perplexity", "cosine") else "%"
    lines = [f"Dense: {number(score, values['', 1.0, 'dense'])}{unit}."]
    lines += [_helped(values, score, variant) for variant in ("grail", "ours")]
    for keep in sorted({k for _, k, v in values if v != "dense"}, reverse=True):
        cells = (
            [v for (_, k, w), v in values.items() if (k, w) == (keep, variant)]
            for variant in ("own", "grail", "ours")
        )
        spreads = [
            f"{number(score, min(of))}–{number(score, max(of))}" for of in cells if len(of) > 2
        ]
        if len(spreads) == 3:
            lines.append(f"Keep {keep:g}, over selectors: {' → '.join(spreads)}.")
    return "\n".join(lines)


def _helped(values: Scores, score: str, variant: str) -> str:
    """A sentence: in how many cells a variant is no worse than the selector alone."""
    pairs = [
        (values[s, k, "own"], value)
        for (s, k, v), value in values.items()
        if v == variant and (s, k, "own") in values
    ]
    sign = -1 if score == "perplexity" else 1
    worse = [(own, value) for own, value in pairs if sign * value < sign * own]
    sentence = (
        f"{VARIANTS[variant]}: no worse than alone in {len(pairs) - len(worse)} of {len(pairs)} "
        "cells"
    )
    if worse:
        own, value = max(worse, key=lambda pair: abs(pair[0] - pair[1]))
        sentence += f", at worst {number(score, value)} instead of {number(score, own)}"
    return sentence + "."


def beside_the_paper(rows: list[Row], score: str) -> str:
    """Recovered shares beside the paper's."""
    values = found(rows, score)
    cells = []
    for (selector, keep), papers in PAPERS_SHARES.items():
        of = [values["", 1.0, "dense"], values[selector, keep, "own"]]
        ours = (share(score, *of, values[selector, keep, v]) for v in ("grail", "ours"))
        shares = " → ".join(f"{back:.0%}" for back in (papers, *ours) if back is not None)
        cells.append(f"{selector} at {keep:g} {shares}")
    return (
        "Recovered share of the lost log-perplexity, in the paper (LLaMA-2-7B on WikiText-2) → in "
        f"the paper's way here → with the defaults: {'; '.join(cells)}."
    )


def study_table(rows: list[Row], score: str, size: str) -> str:
    """Settings that are no axis of a figure: the loop, taps, drift, folding."""
    dense = found(rows, score)["", 1.0, "dense"]
    values = found([r for r in rows if r["samples"] == size], score)
    keeps = sorted({float(r["keep"]) for r in rows if r["selector"]}, reverse=True)
    shown = dict.fromkeys(
        (r["selector"], r["variant"])
        for r in rows
        if r["selector"] and not r["variant"].startswith("alpha=")
    )
    cells = {
        of: [
            number(score, values[of[0], keep, of[1]]) if (of[0], keep, of[1]) in values else "–"
            for keep in keeps
        ]
        for of in shown
    }
    header = ["selector", "variant", *(f"keep {keep:g}" for keep in keeps)]
    lines = [[*of, *cells[of]] for of in shown]
    title = f"Dense: {number(score, dense)}. Calibration samples: {size}."
    return f"{title}\n\n{markdown(header, lines)}"


# Of the table of README.md: calibration, its sequences, sites, keep ratio, and the text read.
QUALITY: tuple[tuple[str, int, str, float, str], ...] = (
    ("passages", 64, "mlp", 0.75, "passages"),
    ("passages", 64, "mlp", 0.5, "passages"),
    ("passages", 64, "mlp", 0.5, "brown"),
    ("general", 64, "mlp", 0.5, "brown"),
    ("brown", 32, "mlp", 0.5, "brown"),
    ("brown", 32, "mlp,heads", 0.7, "brown"),
)


def quality_table(rows: list[Row]) -> str:
    """The table of README.md, from the rows of bench/results/levers.csv: a line for each cell."""
    measured = {tuple(row[key] for key in levers.KEY): row for row in levers.comparisons(rows)}
    dense = {row["text"]: row for row in rows if row["lever"] == levers.DENSE}
    lines = []
    for calibration, sequences, sites, keep, text in QUALITY:
        before, after = (calibration, str(sequences)), (sites, str(keep), text)
        names = (levers.PRUNED, "paper", levers.DEFAULTS, levers.BEST)
        cells = [measured.get((*before, name, *after)) for name in names]
        grail = cells[names.index(levers.DEFAULTS)]
        near = ("–", "–")
        if grail is not None:
            near = f"{float(grail['kl']):.2f}", f"{float(grail['top1']):.0%}"
        lines.append(
            [
                *(f"{calibration}, {sequences}k", sites, f"{keep:g}", text),
                f"{float(dense[text]['perplexity']):.1f}",
                *(*map(_with_share, cells[:-1]), *near, _with_share(cells[-1])),
            ]
        )
    header = ["calibrated on", "sites", "keep", "read on", "dense", "pruned", "the paper's way"]
    return markdown([*header, "grail", "KL", "top-1", "uneven, producers"], lines)


def _with_share(row: Row | None) -> str:
    """Returns the perplexity of a cell, and in brackets the share that it recovers."""
    if row is None:  # not measured
        return "–"
    shown, back = f"{float(row['perplexity']):.1f}", row["share"]
    return shown if back is None or back.value == 0 else f"{shown} ({back.value:.0%})"


def main(arguments: list[str] | None = None) -> None:
    """Writes the page."""
    CommandLine(__doc__, writes="docs/results.md", takes="a second").read(arguments)
    PAGE.write_text(page(), encoding="utf-8")
    print(quality_table(read_rows(RESULTS / "levers.csv")))


if __name__ == "__main__":
    main()
