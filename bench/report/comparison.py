"""The tables of docs/results.md and docs/results/, from the committed CSV files alone.

    python -m bench.report.comparison     writes the pages

The texts are in bench/report/results.md.j2 and bench/report/results; their numbers come from the
CSV files.
"""

from pathlib import Path

from bench.report.networks import (
    ARROW,
    RIDGE,
    VARIANTS,
    Network,
    Scores,
    best,
    compared,
    found,
    has_axes,
    kept,
    networks,
    number,
    share,
    spread,
    unit,
    worse,
)
from bench.tools.commandline import CommandLine
from bench.tools.measuring import RESULTS, ROOT, Row, read_rows
from bench.tools.pages import fill
from bench.tools.tables import markdown

TEXT = ROOT / "bench" / "report"
PAGE = ROOT / "docs" / "results.md"
FOLDER = PAGE.with_suffix("")
TEXTS = {PAGE: TEXT / "results.md.j2"} | {
    FOLDER / path.stem: path for path in sorted((TEXT / "results").glob("[!_]*.md.j2"))
}
# Recovered share of the lost log-perplexity in the paper: LLaMA-2-7B, WikiText-2, by selector and
# keep ratio (arXiv 2602.23795, computed from its perplexities).
PAPERS_SHARES = {("wanda", 0.8): 0.47, ("wanda", 0.5): 0.64, ("flap", 0.5): 0.19}


def pages() -> dict[Path, str]:
    """Returns every page in Markdown, by its path."""
    parts = (table, spread_table, study_table, beside_the_paper, has_axes, kept)
    values = {part.__name__: part for part in parts} | {
        "networks": networks(),
        "summary": summary_table(list(networks().values())),
        "counted": counted(list(networks().values())),
        "producers": producer_table(read_rows(RESULTS / "producers.csv")),
    }
    return {path: fill(text, **values) for path, text in TEXTS.items()}


def summary_table(of: list[Network]) -> str:
    """Returns a line for each network: Wanda and the best selector at one keep ratio."""
    lines = []
    for network in of:
        values, score, keep = network.values, network.score, network.lead
        wanda = (number(score, values["wanda", keep, variant]) for variant in ARROW)
        selector, value = best(values, score, keep)
        lines.append(
            [
                f"[{network.title.partition(',')[0]}](results/{network.name}.md)",
                f"{score}, {unit(score)}".removesuffix(", "),
                network.dense,
                f"{keep:g}",
                " → ".join(wanda),
                f"{selector} {number(score, value)}",
                " → ".join(counted([network]).values()),
            ]
        )
    header = ["network", "score", "dense", "keep", "Wanda", "best", "no worse than alone"]
    return markdown(header, lines)


def counted(of: list[Network]) -> dict[str, str]:
    """Returns by variant in how many cells of the networks it is no worse, "457 of 498"."""
    counts = {}
    for variant in ARROW[1:]:
        cells = sum(len(compared(network.values, variant)) for network in of)
        lost = sum(len(worse(network.values, network.score, variant)) for network in of)
        counts[variant] = f"{cells - lost} of {cells}"
    return counts


def spread_table(values: Scores, score: str) -> str:
    """Returns the range over selectors, by keep ratio and variant."""
    keeps = sorted({k for _, k, v in values if v != "dense"}, reverse=True)
    ranges = {v: [spread(values, score, keep, v) for keep in keeps] for v in VARIANTS}
    shown = {variant: cells for variant, cells in ranges.items() if any(cells)}
    lines = [
        [f"{keep:g}", *(cells[index] or "–" for cells in shown.values())]
        for index, keep in enumerate(keeps)
    ]
    return markdown(["keep", *(VARIANTS[variant] for variant in shown)], lines)


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


def producer_table(rows: list[Row]) -> str:
    """Refitted producers beside the defaults: a line for each network and number of steps."""
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    base: dict[tuple[str, str], str] = {}
    for row in rows:
        value = f"{float(row['value']):.4f}"
        if row["steps"] == "0":
            base[row["network"], row["measure"]] = value
            continue
        gain = f"{float(row['gain']):+.4f} ± {float(row['gain_error']):.4f}"
        key = (row["network"], row["keep"], row["steps"])
        cell = f"{base[row['network'], row['measure']]} → {value} ({gain})"
        lines.setdefault(key, {"seconds": row["cpu_seconds"]})[row["measure"]] = cell
    names = list(dict.fromkeys(row["measure"] for row in rows))
    of_defaults = {row["network"]: row["cpu_seconds"] for row in rows if row["steps"] == "0"}
    cells = [
        [
            *key,
            *(line.get(name, "–") for name in names),
            f"{float(of_defaults[key[0]]):.0f} → {float(line['seconds']):.0f}",
        ]
        for key, line in lines.items()
    ]
    return markdown(["network", "keep", "steps", *names, "CPU seconds"], cells)


def main(arguments: list[str] | None = None) -> None:
    """Writes the pages."""
    CommandLine(__doc__, writes="docs/results.md, docs/results/", takes="a second").read(arguments)
    FOLDER.mkdir(exist_ok=True)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
