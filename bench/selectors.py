"""Every selector, pruned and compensated, on a real language model: perplexity on held-out text.

    python -m bench.selectors            # SmolLM2-135M, MLP: selector × {pruned, + GRAIL} × sparsity
    python -m bench.selectors table      # the table in Markdown, from the CSV alone

Results are bench/results/smollm2_selectors.csv. Text is the Python language reference ("technical",
see bench/assets.py), 16k calibration and 8k held-out tokens. "grail" is the paper's way with each
selector (α = 1e-3, the block's own output as target); "ours" is what a user gets who sets nothing
but the selector. A row is written as soon as it is measured and never measured again: kill it and
run it again to go on. Hours on two cores; never part of the tests.
"""

import argparse
from typing import Any

from bench.endtoend import LENGTH, PAPER, RESULTS, Row, Subject, Table, _conditions
from grail import select
from grail.evaluate import evaluate
from grail.report import recovered

KEEPS = (0.5, 0.8, 0.65)
FIRST = ("wanda", "magnitude", "flap", "greedy", "folding", "random", "gram", "cholesky")
TEXT, TOKENS, HELD_OUT = "technical", 16 * LENGTH, 8 * LENGTH
MODELS: dict[str, dict[str, Any]] = {
    "pruned": {"compensate": False},
    "grail": {k: v for k, v in PAPER.items() if k != "selector"},
    "ours": {},
}
OURS = ("wanda", "greedy")  # selectors of the third row


def measure() -> None:
    """Every model of every cell."""
    out = Table(RESULTS / "smollm2_selectors.csv", ("selector", "keep", "model"))
    subject = Subject()
    calibration = subject.batches(TEXT, "calibration", TOKENS)
    heldout = subject.batches(TEXT, "heldout", HELD_OUT)
    if ("", 1.0, "dense") not in out:
        dense = evaluate(subject.model, heldout, progress=False)
        out.add(_row("", 1.0, "dense", dense.perplexity, None))
    others = [name for name in select.names() if name not in FIRST]
    for keep in KEEPS:
        for selector in (*FIRST, *others):
            for name, settings in MODELS.items():
                known = (selector, keep, name) in out
                if known or (name == "ours" and selector not in OURS):
                    continue
                model, report = subject.compressed(
                    calibration, keep=keep, sites=("mlp",), selector=selector, **settings
                )
                result = evaluate(model, heldout, progress=False)
                out.add(_row(selector, keep, name, result.perplexity, report))


def _row(selector: str, keep: float, name: str, perplexity: float, report: Any) -> Row:
    settings = report.settings if report else {}
    return {
        "selector": selector,
        "keep": keep,
        "model": name,
        "perplexity": round(perplexity, 4),
        **{k: settings.get(k, "") for k in ("alpha", "drift_correction", "toward")},
        "calibration_tokens": report.calibration["tokens"] if report else "",
        "heldout_tokens": HELD_OUT,
        "seconds": round(report.seconds["total"], 1) if report else "",
        **_conditions(),
    }


def markdown(rows: list[Row]) -> str:
    """A line for each selector: pruned → + GRAIL (share of the lost log-perplexity that is back)."""
    found = {(r["selector"], float(r["keep"]), r["model"]): float(r["perplexity"]) for r in rows}
    dense = found["", 1.0, "dense"]
    keeps = sorted({keep for _, keep, model in found if model != "dense"}, reverse=True)
    selectors = list(dict.fromkeys(r["selector"] for r in rows if r["selector"]))
    lines = [
        "| selector | " + " | ".join(f"keep {keep:g}" for keep in keeps) + " |",
        "|---|" + "---|" * len(keeps),
    ]
    for selector in selectors:
        cells = [_cell(found, dense, selector, keep) for keep in keeps]
        lines.append(f"| {selector} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(found: dict[tuple[str, float, str], float], dense: float, name: str, keep: float) -> str:
    pruned = found.get((name, keep, "pruned"))
    if pruned is None:
        return "–"
    parts = [f"{pruned:.1f}"]
    for model in ("grail", "ours"):
        if (name, keep, model) in found:
            perplexity = found[name, keep, model]
            share = recovered(dense, pruned, perplexity)
            parts.append(f"{perplexity:.1f}" + ("" if share is None else f" ({share:.0%})"))
    return " → ".join(parts)


def main() -> None:
    """Command line of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", default="measure", choices=("measure", "table"))
    if parser.parse_args().part == "measure":
        measure()
    else:
        print(markdown(Table(RESULTS / "smollm2_selectors.csv", ()).rows))


if __name__ == "__main__":
    main()
