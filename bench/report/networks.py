"""The networks of `sweep`, their scores, and what the scores show, in sentences.

Tables, pages and figures take their numbers from here.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from bench.tools.measuring import RESULTS, Row, Table
from grail.report.report import recovered

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
ARROW = ("own", "grail", "ours")  # the variants of a cell, in its order
LEAST = 0.005  # of the score; where pruning loses less, no share of it is given
# The selector that is published with a ridge of its own: a further ridge recovers nothing.
RIDGE = "slimgpt"
LEAD = {"vit": 0.3}  # keep ratio of a network's finding; of the others HALF
HALF = 0.5

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

    @cached_property
    def values(self) -> Scores:
        """Scores of the table; without a table, of the studies."""
        return found(self.rows or self.studies, self.score)

    @property
    def dense(self) -> str:
        """The dense network's score."""
        return number(self.score, self.values["", 1.0, "dense"])

    @property
    def lead(self) -> float:
        """The keep ratio of the finding."""
        return LEAD.get(self.name, HALF)

    @property
    def finding(self) -> str:
        """Returns a sentence: how far selectors lie apart, with the defaults and alone."""
        return spread_sentence(self.values, self.score, self.lead)

    @property
    def helped(self) -> str:
        """Returns two sentences: how often GRAIL is no worse than a selector alone."""
        return "\n".join(helped(self.values, self.score, variant) for variant in ARROW[1:])

    @property
    def study_finding(self) -> str:
        """Returns a sentence: what more samples and a larger ridge change."""
        return study_sentence(self.studies, self.score)

    def study(self, variant: str, selector: str = "wanda", keep: float = HALF) -> str:
        """Returns the score of a study."""
        (value,) = (
            float(r[self.score])
            for r in self.studies
            if (r["selector"], r["variant"], float(r["keep"])) == (selector, variant, keep)
            and r["samples"] == self.samples
        )
        return number(self.score, value)


def networks() -> dict[str, Network]:
    """Returns every network by its name."""
    return {name: Network(name, *of) for name, of in NETWORKS.items()}


def found(rows: list[Row], score: str) -> Scores:
    """Returns scores by selector, keep and variant."""
    return {(r["selector"], float(r["keep"]), r["variant"]): float(r[score]) for r in rows}


def has_axes(rows: list[Row]) -> bool:
    """Finds sizes or strengths that a figure can show."""
    return any(r["variant"].startswith("alpha=") for r in rows)


def share(score: str, dense: float, pruned: float, restored: float) -> float | None:
    """Returns the recovered share of the lost score; None where almost nothing was lost."""
    if score == "perplexity":
        return recovered(dense, pruned, restored)
    return None if dense - pruned < LEAST else (restored - pruned) / (dense - pruned)


def number(score: str, value: float) -> str:
    """Returns a score with the digits of the page."""
    if score == "perplexity":
        return f"{value:,.1f}" if value < 1e4 else f"{value:.0e}"
    return f"{value:.3f}" if score == "cosine" else f"{100 * value:.1f}"


def unit(score: str) -> str:
    """Returns the unit of a score: % or none."""
    return "" if score in ("perplexity", "cosine") else "%"


def better(score: str, value: float, than: float) -> bool:
    """Compares two scores; of perplexities the smaller is better."""
    return value < than if score == "perplexity" else value > than


def kept(keep: float) -> str:
    """Returns a keep ratio in words."""
    return "half of the channels" if keep == HALF else f"{keep:.0%} of the channels"


def spread(values: Scores, score: str, keep: float, variant: str) -> str | None:
    """Returns the range over selectors, "19.0–60.4"; None if it has fewer than three."""
    of = [value for (_, k, v), value in values.items() if (k, v) == (keep, variant)]
    return f"{number(score, min(of))}–{number(score, max(of))}" if len(of) > 2 else None


def spread_sentence(values: Scores, score: str, keep: float) -> str:
    """Returns how far selectors lie apart with the defaults, and alone."""
    count = len({s for s, k, v in values if (k, v) == (keep, "ours")})
    ours, own = (spread(values, score, keep, variant) for variant in ("ours", "own"))
    return (
        f"With {kept(keep)}, {count} selectors have {score} {ours}{unit(score)} by grail's "
        f"defaults, {own}{unit(score)} alone"
    )


def best(values: Scores, score: str, keep: float) -> tuple[str, float]:
    """Returns the best selector with the defaults, and its score."""
    ours = {s: value for (s, k, v), value in values.items() if (k, v) == (keep, "ours")}
    choose = min if score == "perplexity" else max
    name = choose(ours, key=lambda selector: ours[selector])
    return name, ours[name]


def compared(values: Scores, variant: str) -> list[tuple[float, float]]:
    """Returns the score alone and with a variant, of every cell that has both."""
    return [
        (values[s, k, "own"], value)
        for (s, k, v), value in values.items()
        if v == variant and (s, k, "own") in values
    ]


def worse(values: Scores, score: str, variant: str) -> list[tuple[float, float]]:
    """Returns the cells in which a variant is worse than the selector alone."""
    return [(own, value) for own, value in compared(values, variant) if better(score, own, value)]


def helped(values: Scores, score: str, variant: str) -> str:
    """Returns in how many cells a variant is no worse than the selector alone."""
    pairs, lost = compared(values, variant), worse(values, score, variant)
    sentence = (
        f"{VARIANTS[variant]}: no worse than alone in {len(pairs) - len(lost)} of {len(pairs)} "
        "cells"
    )
    if lost:
        own, value = max(lost, key=lambda pair: abs(pair[0] - pair[1]))
        sentence += f", at worst {number(score, value)} instead of {number(score, own)}"
    return sentence + "."


def study_sentence(rows: list[Row], score: str) -> str:
    """Returns what more samples and a larger ridge change, with Wanda at half."""
    of = [r for r in rows if r["selector"] == "wanda" and float(r["keep"]) == HALF]
    sizes = {
        variant: {int(r["samples"]): float(r[score]) for r in of if r["variant"] == variant}
        for variant in ("ours", "grail")
    }
    few, many = min(sizes["ours"]), max(sizes["ours"])
    changes = (
        f"{number(score, each[few])} → {number(score, each[many])}{unit(score)}"
        for each in sizes.values()
    )
    grown = "{} by grail's defaults, {} in the paper's way".format(*changes)
    return f"With {few} → {many:,} calibration samples, Wanda at half has {score} {grown}"
