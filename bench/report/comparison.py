"""docs/results.md and its figures, from the CSV files of bench/quality/sweep.py alone.

python -m bench.report.comparison
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from bench.quality.endtoend import RESULTS, Row, Table, save_figure
from bench.tools.measuring import command_line
from grail.report.report import recovered

PAGE = Path(__file__).parents[2] / "docs" / "results.md"
# Network: what it is, the score that is shown, and the keep ratios of its table.
NETWORKS = {
    "smollm2": ("SmolLM2-135M, MLP, technical text", "perplexity", (0.8, 0.65, 0.5)),
    "mixture": ("SmolLM2-135M as a mixture of experts", "perplexity", ()),
    "resnet18": ("ResNet-18, Fashion-MNIST, block-internal channels", "accuracy", (0.7, 0.5, 0.3)),
    "vit": ("ViT, Fashion-MNIST, MLP", "accuracy", (0.7, 0.5, 0.3)),
    "efficientnet": (
        "EfficientNet-lite0, expanded channels, photographs",
        "agreement",
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

# The selector that is published with a ridge of its own: what GRAIL does beside it is no recovery.
RIDGE = "slimgpt"
# Share of the lost log-perplexity that the paper's tables win back: LLaMA-2-7B, WikiText-2, by
# selector and keep ratio (arXiv 2602.23795, computed from its perplexities).
PAPERS_SHARES = {("wanda", 0.8): 0.47, ("wanda", 0.5): 0.64, ("flap", 0.5): 0.19}
# What a table shows and does not say.
REMARKS = {
    "smollm2": """Plain magnitude and k-means drop the few channels that carry massive activations,
hence their perplexities. GRAIL evens selectors out, as in the paper. SlimGPT's own update is a
ridge toward the baseline with α = 0.01, so the paper's way changes next to nothing there. All
blocks have one width, also for FLAP: its own budget across blocks is far worse here (see the
studies). Widths by what narrowing each block costs the network (`grail.sensitivity`) are better
than even ones. Greedy chooses its channels for what undoes drift as well: 19.1 became 19.0 by that,
with 64k tokens of passages (README.md) 17.35 became 17.25. In the paper's way the ridge matters
little toward the baseline (21.8 up to α = 0.01, 22.2 at 0.1) and much toward zero (22.7 and 30.0).
Weighting tokens (`token_weights`) can go wrong: 27.8 for 19.8 behind Wanda. A few tokens' enormous
activations are made in block 12, by channels that weighted tokens do not choose; with the choice of
that one block by plain tokens it was 19.8 in a trial. The share that comes back grows with the
text: defaults behind Wanda, at half of the channels, with 4, 16 and 64 sequences of 1024 tokens are
the points of the figure.""",
    "mixture": """Every MLP stands four times as an expert, and a random router sends each token
to two of them: the same function, and every expert is compressed by the tokens that it gets. (No
trained mixture of experts can be installed as a package.) The defaults without drift correction
are hardly better than the paper's way: that each expert undoes its share of the drift is what
helps.""",
    "resnet18": """In the paper's way the closed loop is worse than the open one here: each block is
made to repeat what its drifted input gives, and the drift of all blocks adds up behind batch norms
whose statistics are the dense network's. Fitting every tap, undoing the drift, or setting the
statistics anew (REPAIR) each mends most of that; the defaults do the first two, and REPAIR adds
nothing to them. SlimGPT alone has taps fitted by themselves too, for its Hessian is that of
patches; the paper's way, with one map for all taps, undoes that. The same share of all weights,
dealt out by what each site's narrowing costs (`grail.sensitivity`), gains 0.4 to 0.9 points in
each of four cells.""",
    "vit": """Half of these MLPs can go at hardly any cost, whoever chooses; what there is to win
back shows at 0.3. A cell's standard error is 0.6 points (2000 images); weighting tokens and
correcting attention change less than that. Uneven widths by measured losses bring the 0.3 to within
0.3 points of the dense network.""",
    "efficientnet": """The photographs are 117, four crops of each, so a cell's standard error is up
to 2.3 points if crops of one photograph are independent, up to 4.6 if they are alike. Calibration
has 256 crops of other photographs; from 128 on more of them gain nothing. Uneven widths by measured
losses (`grail.sensitivity`) are worth more here than anywhere: the same share of all weights dealt
out by what narrowing costs, 69 and 72% for 55 and 62%. That greedy chooses for what undoes drift,
too, is worth most here: 62% for 53% at half. In the paper's way the open loop is better than the
closed one, as for ResNet-18; undoing the drift mends that.""",
    "minilm": """The cosine is to the dense network's embeddings; rank correlations of similarities
are in the CSV. Most of folding's gain is its exact form: the Gram of what the folded layer gives,
not of the folded channels. With 16 sentences, at 0.5 with 32, too, the paper's way is worse than
plain pruning, the defaults never are; more text goes on helping: from 256 to 2048 sentences the
defaults gain 0.013 at 0.5 and 0.021 at 0.3. Weighting tokens (`token_weights=True`)
helps behind all three selectors that were tried, random most. It is no default, for SmolLM2 with
64k tokens of passages is worse with it: 17.5 for 17.4, both before greedy reckoned with drift.
Correcting attention (`correct_attention=True`) helps behind all three, too, and both together
more than either. It is no default: SmolLM2 gains by it with 16k tokens (see its studies), and did
not in a trial with 64k. Uneven widths by measured losses are no gain here: the cosine changes by
-0.001 to 0.002, and the rank correlation falls by 0.004 to 0.015 (CSV). What is measured is the
error of every token's state, and few of six blocks stand out.""",
}

Scores = dict[tuple[str, float, str], float]


def page() -> str:
    """The whole page in Markdown."""
    parts = [_HEAD]
    for name, (title, score, keeps) in NETWORKS.items():
        rows, studied = _rows(f"selectors_{name}.csv"), _rows(f"studies_{name}.csv")
        if rows or studied:
            parts += [f"## {title}", REMARKS[name]]
        if rows:
            parts += [_summary(rows, score), table(rows, score, keeps)]
            if name == "smollm2":
                parts.insert(-1, _beside_the_paper(rows, score))
            parts.append(f"![{title}](../bench/results/selectors_{name}.svg)")
        if _has_axes(studied):
            parts.append(f"![Studies of {name}](../bench/results/studies_{name}.svg)")
        if studied:
            # Tables have one size of calibration; of a network without one, most of its rows.
            ((size, _),) = Counter(
                r["samples"] for r in (rows or studied) if r["selector"]
            ).most_common(1)
            parts.append(study_table(studied, score, size))
    return "\n\n".join(parts) + "\n"


_HEAD = """# Selectors, with and without compensation

Made by `python -m bench.report.comparison` from bench/results/selectors_\\*.csv and studies_\\*.csv, which
`python -m bench.quality.sweep` measures. A cell is: the selector alone, one share kept at every site
(FLAP with its biases, SlimGPT with its weight update, all others plainly pruned or folded, OBS and
Wanda++ without their own updates, too) → with GRAIL in the paper's way (α = 1e-3 toward zero) →
with grail's defaults; in brackets the share of what was lost that came
back: of accuracy, agreement or cosine, or of log-perplexity. No share is given where next to
nothing was lost."""


def _rows(name: str) -> list[Row]:
    return Table(RESULTS / name, ()).rows


def found(rows: list[Row], score: str) -> Scores:
    """Scores by selector, keep and variant."""
    return {(r["selector"], float(r["keep"]), r["variant"]): float(r[score]) for r in rows}


def share(score: str, dense: float, pruned: float, restored: float) -> float | None:
    """What came back of what was lost; None where next to nothing was."""
    if score == "perplexity":
        return recovered(dense, pruned, restored)
    return None if dense - pruned < LEAST else (restored - pruned) / (dense - pruned)


def table(rows: list[Row], score: str, keeps: tuple[float, ...]) -> str:
    """A line for each selector, a column for each keep ratio."""
    values = found(rows, score)
    dense = values["", 1.0, "dense"]
    lines = [
        "| selector | " + " | ".join(f"keep {keep:g}" for keep in keeps) + " |",
        "|---|" + "---|" * len(keeps),
    ]
    for selector in dict.fromkeys(r["selector"] for r in rows if r["selector"]):
        cells = (_cell(values, score, dense, selector, keep) for keep in keeps)
        lines.append(f"| {selector} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: Scores, score: str, dense: float, selector: str, keep: float) -> str:
    pruned = values.get((selector, keep, "own"))
    if pruned is None:
        return "–"
    parts = [_number(score, pruned)]
    for variant in ("grail", "ours"):
        if (value := values.get((selector, keep, variant))) is None:
            parts.append("–")
            continue
        back = None if selector == RIDGE else share(score, dense, pruned, value)
        parts.append(_number(score, value) + ("" if back is None else f" ({back:.0%})"))
    return " → ".join(parts)


def _number(score: str, value: float) -> str:
    if score == "perplexity":
        return f"{value:,.1f}" if value < 1e4 else f"{value:.0e}"
    return f"{value:.3f}" if score == "cosine" else f"{100 * value:.1f}"


def _summary(rows: list[Row], score: str) -> str:
    """Dense score, and how often compensation helped, from all cells."""
    values = found(rows, score)
    dense = values["", 1.0, "dense"]
    sign = -1 if score == "perplexity" else 1
    sentences = [
        f"Dense: {_number(score, dense)}{'' if score in ('perplexity', 'cosine') else '%'}."
    ]
    for variant in ("grail", "ours"):
        pairs = [
            (values[s, k, "own"], value)
            for (s, k, v), value in values.items()
            if v == variant and (s, k, "own") in values
        ]
        worse = [(own, value) for own, value in pairs if sign * value < sign * own]
        better = len(pairs) - len(worse)
        sentence = f"{VARIANTS[variant]}: no worse than alone in {better} of {len(pairs)} cells"
        if worse:
            own, value = max(worse, key=lambda pair: abs(pair[0] - pair[1]))
            sentence += f", at worst {_number(score, value)} for {_number(score, own)}"
        sentences.append(sentence + ".")
    for keep in sorted({k for _, k, v in values if v != "dense"}, reverse=True):
        spreads = []
        for variant in ("own", "grail", "ours"):
            cells = [v for (_, k, w), v in values.items() if (k, w) == (keep, variant)]
            if len(cells) > 2:
                spreads.append(f"{_number(score, min(cells))}–{_number(score, max(cells))}")
        if len(spreads) == 3:
            sentences.append(f"Keep {keep:g}, over selectors: {' → '.join(spreads)}.")
    return "\n".join(sentences)


def _beside_the_paper(rows: list[Row], score: str) -> str:
    """Shares that came back, beside the paper's."""
    values = found(rows, score)
    dense = values["", 1.0, "dense"]
    cells = []
    for (selector, keep), papers in PAPERS_SHARES.items():
        pruned = values[selector, keep, "own"]
        shares = [papers] + [
            back
            for variant in ("grail", "ours")
            if (value := values.get((selector, keep, variant))) is not None
            and (back := share(score, dense, pruned, value)) is not None
        ]
        cells.append(f"{selector} at {keep:g} " + " → ".join(f"{back:.0%}" for back in shares))
    return (
        "Share of the lost log-perplexity that comes back, in the paper (LLaMA-2-7B on "
        "WikiText-2) → in the paper's way here → with the defaults: " + "; ".join(cells) + "."
    )


def study_table(rows: list[Row], score: str, size: str) -> str:
    """Settings that are no axis of a figure: the loop, taps, drift, folding."""
    values = found(rows, score)
    dense = values["", 1.0, "dense"]
    keeps = sorted({k for _, k, v in values if v != "dense"}, reverse=True)
    lines = ["| selector | variant | " + " | ".join(f"keep {keep:g}" for keep in keeps) + " |"]
    lines.append("|---|---|" + "---|" * len(keeps))
    shown = dict.fromkeys(
        (r["selector"], r["variant"])
        for r in rows
        if r["selector"] and not r["variant"].startswith("alpha=")
    )
    for selector, variant in shown:
        cells = [
            next(
                (
                    _number(score, float(r[score]))
                    for r in rows
                    if (r["selector"], r["variant"], float(r["keep"])) == (selector, variant, keep)
                    and r["samples"] == size
                ),
                "–",
            )
            for keep in keeps
        ]
        lines.append(f"| {selector} | {variant} | " + " | ".join(cells) + " |")
    return f"Dense: {_number(score, dense)}. Calibration samples: {size}.\n\n" + ("\n".join(lines))


def _has_axes(rows: list[Row]) -> bool:
    """Whether sizes or strengths were varied, which a figure can show."""
    return any(r["variant"].startswith("alpha=") for r in rows)


def selector_figure(rows: list[Row], score: str, title: str) -> Any:
    """Score against keep ratio, a panel for each variant, a line for each selector."""
    from matplotlib.figure import Figure

    values = found(rows, score)
    selectors = list(dict.fromkeys(r["selector"] for r in rows if r["selector"]))
    variants = [v for v in VARIANTS if any(w == v for _, _, w in values)]
    figure = Figure(figsize=(3.4 * len(variants), 3.6), layout="constrained")
    for axes, variant in zip(figure.subplots(1, len(variants), sharey=True), variants, strict=True):
        for number, selector in enumerate(selectors):
            line = sorted(
                (k, v) for (s, k, w), v in values.items() if (s, w) == (selector, variant)
            )
            if line:
                style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
                axes.plot(*zip(*line, strict=True), marker=".", label=selector, **style)
        axes.axhline(values["", 1.0, "dense"], color="grey", linestyle=":")
        axes.set(title=VARIANTS[variant], xlabel="channels kept")
        if score == "perplexity":
            axes.set(yscale="log", ylim=(None, 1e3))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel(score)
    lines, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside right upper", fontsize=8)
    figure.suptitle(title)
    return figure


def study_figure(rows: list[Row], score: str, title: str) -> Any:
    """Score against calibration size, and against α, a line for each keep ratio and variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    sizes, alphas = figure.subplots(1, 2, sharey=True)
    keeps = sorted({r["keep"] for r in rows if r["selector"]}, reverse=True)
    for number, keep in enumerate(keeps):
        at = [r for r in rows if r["keep"] == keep and r["selector"] == "wanda"]
        for variant, style in (("grail", "o--"), ("ours", "o-")):
            line = sorted(
                (int(r["samples"]), float(r[score])) for r in at if r["variant"] == variant
            )
            if line:
                label = f"{VARIANTS[variant]}, keep {keep}"
                sizes.plot(*zip(*line, strict=True), style, color=f"C{number}", label=label)
        for toward, style in (("", "o--"), (" toward baseline", "o-")):
            line = sorted(
                (float(r["variant"].removeprefix("alpha=").removesuffix(toward)), float(r[score]))
                for r in at
                if r["variant"].startswith("alpha=")
                and ("baseline" in r["variant"]) == bool(toward)
            )
            if line:
                label = f"toward {'baseline' if toward else 'zero'}, keep {keep}"
                alphas.plot(*zip(*line, strict=True), style, color=f"C{number}", label=label)
    sizes.set(xscale="log", xlabel="calibration samples", ylabel=score, title="wanda")
    alphas.set(xscale="log", xlabel="α", title="wanda, the paper's way")
    for axes in (sizes, alphas):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle(title)
    return figure


def main() -> None:
    """Draws everything."""
    command_line(
        __doc__,
        writes="docs/results.md, selectors_* and studies_*.svg in bench/results",
        takes="a minute",
    ).parse_args()
    for name, (title, score, _) in NETWORKS.items():
        if rows := _rows(f"selectors_{name}.csv"):
            save_figure(selector_figure(rows, score, title), f"selectors_{name}.svg")
        if _has_axes(rows := _rows(f"studies_{name}.csv")):
            save_figure(study_figure(rows, score, title), f"studies_{name}.svg")
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
