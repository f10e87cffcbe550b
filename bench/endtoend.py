"""SmolLM2-135M, compressed and restored: perplexity, by keep ratio, text length and ridge.

    python -m bench.endtoend table          # keep × sites: dense, pruned, restored
    python -m bench.endtoend calibration    # calibration length × alpha, on two domains
    python -m bench.endtoend cost           # time against bare forward passes; memory
    python -m bench.endtoend plot           # the figures, from the CSV files alone

Results are bench/results/smollm2_{table,calibration,cost}.csv.

Calibration and held-out text are disjoint halves of the Brown corpus; the other domain is the
Python language reference (see bench/assets.py). A row is written as soon as it is measured and
never measured again: kill it and run it again to go on. Hours on two cores; never part of the
tests.
"""

import argparse
import copy
import csv
import functools
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import grail
from bench import assets
from grail.calibration import token_batches
from grail.evaluate import evaluate
from grail.models import load_model
from grail.report import Evaluation, Report, recovered

RESULTS = Path(__file__).parent / "results"
TEXTS = Path(".assets")
LENGTH = 1024
MLP_KEEPS, HEAD_KEEPS = (0.5, 0.9, 0.8, 0.7, 0.6), (0.5, 0.7, 0.9)
CELLS = [
    *(("mlp", keep) for keep in MLP_KEEPS),
    *((sites, keep) for sites in ("heads", "mlp,heads") for keep in HEAD_KEEPS),
]
LENGTHS, ALPHAS = (8192, 32768, 131072), (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)

Row = dict[str, Any]


class Table:
    """A CSV that grows by rows, and knows which it has."""

    def __init__(self, path: Path, key: tuple[str, ...]):
        self.path, self.key = path, key
        self.rows: list[Row] = []
        if path.exists():
            with path.open(newline="") as file:
                self.rows = list(csv.DictReader(file))

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return any(tuple(row[k] for k in self.key) == tuple(map(str, key)) for row in self.rows)

    def add(self, row: Row) -> None:
        """Appends a row at once; the first one brings the header."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row if new else self.rows[0]))
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.rows.append({k: str(v) for k, v in row.items()})
        print(", ".join(f"{k}={v}" for k, v in row.items()), flush=True)


class Subject:
    """The dense model, and batches of a text's calibration or held-out half."""

    def __init__(self) -> None:
        assets.write_texts("brown", assets.split_genres(assets.brown(TEXTS)), TEXTS)
        assets.write_texts("python", assets.split_topics(assets.python_reference()), TEXTS)
        self.model, self.tokenizer = load_model(assets.smollm2())

    def batches(self, text: str, half: str, tokens: int) -> list[torch.Tensor]:
        """Sequences of `LENGTH` tokens, one a batch."""
        return token_batches(
            TEXTS / f"{text}-{half}.txt",
            self.tokenizer,
            tokens=tokens,
            sequence_length=LENGTH,
            batch_size=1,
        )

    def compressed(self, calibration: list[torch.Tensor], **settings: Any) -> tuple[Any, Report]:
        """A compressed copy and its report."""
        model = copy.deepcopy(self.model)
        return model, grail.compress(model, calibration, progress=sys.stderr.isatty(), **settings)


def table(calibration_tokens: int = 32 * LENGTH, heldout_tokens: int = 17 * LENGTH) -> None:
    """Pruned and restored at every keep ratio, on held-out Brown text."""
    out = Table(RESULTS / "smollm2_table.csv", ("sites", "keep", "model"))
    subject = Subject()
    calibration = subject.batches("brown", "calibration", calibration_tokens)
    heldout = subject.batches("brown", "heldout", heldout_tokens)
    if ("", 1.0, "dense") not in out:
        dense = evaluate(subject.model, heldout, progress=False)
        out.add(_table_row("", 1.0, "dense", dense, None, calibration_tokens))
    for sites, keep in CELLS:
        for name, compensate in (("pruned", False), ("restored", True)):
            if (sites, keep, name) in out:
                continue
            settings = {"keep": keep, "sites": tuple(sites.split(",")), "compensate": compensate}
            model, report = subject.compressed(calibration, **settings)
            result = evaluate(model, heldout, progress=False)
            out.add(_table_row(sites, keep, name, result, report, calibration_tokens))


def _table_row(
    sites: str, keep: float, name: str, result: Evaluation, report: Report | None, tokens: int
) -> Row:
    errors = [site.error for site in report.sites] if report else []
    return {
        "text": "brown",
        "sites": sites,
        "keep": keep,
        "model": name,
        "perplexity": round(result.perplexity, 4),
        "parameters": result.parameters,
        "bytes": result.bytes,
        "selector": report.settings["selector"] if report else "",
        "alpha": report.settings["alpha"] if report else "",
        "toward": report.settings["toward"] if report else "",
        "widths": " ".join(f"{k}={v}" for k, v in report.model["widths"]["after"].items())
        if report
        else "",
        "mean_error": round(sum(errors) / len(errors), 5) if errors else "",
        "calibration_tokens": tokens,
        "heldout_tokens": result.tokens,
        **_conditions(),
    }


def calibration(keep: float = 0.5, heldout_tokens: int = 8 * LENGTH) -> None:
    """MLP at one keep ratio: how much text and which ridge, on the text's domain and another."""
    out = Table(RESULTS / "smollm2_calibration.csv", ("calibration_tokens", "alpha", "toward"))
    subject = Subject()
    heldout = {t: subject.batches(t, "heldout", heldout_tokens) for t in ("brown", "python")}
    todo = [(n, a, "baseline") for n in LENGTHS for a in ALPHAS]
    todo += [(LENGTHS[1], a, "zero") for a in ALPHAS[3:]]
    for tokens, alpha, toward in todo:
        if (tokens, alpha, toward) in out:
            continue
        batches = subject.batches("brown", "calibration", tokens)
        model, report = subject.compressed(batches, keep=keep, alpha=alpha, toward=toward)
        row = {
            "calibration_tokens": tokens,
            "alpha": alpha,
            "toward": toward,
            "sites": "mlp",
            "keep": keep,
            "selector": report.settings["selector"],
        }
        for text, held in heldout.items():
            row[f"perplexity_{text}"] = round(evaluate(model, held, progress=False).perplexity, 4)
        out.add({**row, "heldout_tokens": heldout_tokens, **_conditions()})


def cost(tokens: int = 32 * LENGTH, keep: float = 0.5) -> None:
    """GRAIL's time against one bare forward pass of the same tokens; peak memory."""
    out = Table(RESULTS / "smollm2_cost.csv", ("sites",))
    subject = Subject()
    batches = subject.batches("brown", "calibration", tokens)
    for sites in ("mlp", "heads", "mlp,heads"):
        if (sites,) in out:
            continue
        bare = _bare_seconds(subject.model, batches)
        _, report = subject.compressed(batches, keep=keep, sites=tuple(sites.split(",")))
        own = sum(report.seconds[p] for p in ("gram", "select", "solve", "absorb"))
        out.add(
            {
                "sites": sites,
                "keep": keep,
                "tokens": tokens,
                "bare_forward_s": round(bare, 3),
                **{f"{phase}_s": round(s, 3) for phase, s in report.seconds.items()},
                "own_work_over_bare": round(own / bare, 4),
                "total_over_bare": round(report.seconds["total"] / bare, 4),
                "predicted_peak_bytes": report.memory["predicted_peak"],
                "measured_peak_bytes": report.memory["measured_peak"],
                **_conditions(),
            }
        )


def _bare_seconds(model: Any, batches: list[torch.Tensor]) -> float:
    """The dense decoder over the same tokens, without logits, as a calibration needs none."""
    with torch.no_grad():
        model.model(batches[0], use_cache=False)
        start = time.perf_counter()
        for batch in batches:
            model.model(batch, use_cache=False)
    return time.perf_counter() - start


@functools.cache  # the commit whose code was loaded, not the one of an hour later
def _conditions() -> Row:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def plot() -> None:
    """Both figures and the table in Markdown, from the committed CSV alone."""
    rows = Table(RESULTS / "smollm2_table.csv", ()).rows
    print(markdown(rows))
    _save(_keep_figure(rows), "smollm2_table.svg")
    _save(
        _calibration_figure(Table(RESULTS / "smollm2_calibration.csv", ()).rows),
        "smollm2_calibration.svg",
    )


def markdown(rows: list[Row]) -> str:
    """The table of README.md: a line for each cell, from the rows of smollm2_table.csv."""
    found = {(r["sites"], float(r["keep"]), r["model"]): r for r in rows}
    dense = float(found["", 1.0, "dense"]["perplexity"])
    total = int(found["", 1.0, "dense"]["parameters"])
    lines = [
        "| sites | keep | parameters | pruned | restored | recovered |",
        "|---|---|---|---|---|---|",
    ]
    for sites, keep in sorted(CELLS, key=lambda cell: (cell[0] != "mlp", len(cell[0]), -cell[1])):
        pruned, restored = found[sites, keep, "pruned"], found[sites, keep, "restored"]
        ends = float(pruned["perplexity"]), float(restored["perplexity"])
        share = recovered(dense, *ends)
        lines.append(
            f"| {sites} | {keep:g} | {int(restored['parameters']) / total:.0%} "
            f"| {ends[0]:.1f} | {ends[1]:.1f} | {'–' if share is None else f'{share:.0%}'} |"
        )
    return "\n".join(lines)


def _keep_figure(rows: list[Row]) -> Any:
    """Perplexity against keep ratio, a panel for each set of sites."""
    from matplotlib.figure import Figure

    by_cell = {(r["sites"], float(r["keep"]), r["model"]): float(r["perplexity"]) for r in rows}
    dense = by_cell["", 1.0, "dense"]
    panels = ("mlp", "heads", "mlp,heads")
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, sites in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        keeps = sorted({k for s, k, _ in by_cell if s == sites})
        for model, colour in (("pruned", "#c44e52"), ("restored", "#4c72b0")):
            values = [by_cell[sites, k, model] for k in keeps]
            axes.plot(keeps, values, "o-", color=colour, label=model)
        for keep in keeps:
            pruned, restored = (by_cell[sites, keep, m] for m in ("pruned", "restored"))
            share = recovered(dense, pruned, restored)
            if share is not None:
                axes.annotate(
                    f"{share:.0%}",
                    (keep, math.sqrt(pruned * restored)),
                    textcoords="offset points",
                    xytext=(5, -3),
                    fontsize=8,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
                )
        axes.axhline(dense, color="gray", linestyle=":", label="dense")
        axes.set(title=sites.replace(",", " and "), xlabel="channels kept", yscale="log")
        ticks = [
            t
            for t in (40, 50, 70, 100, 150, 200, 300, 500, 1000, 2000, 3000)
            if t <= max(by_cell.values())
        ]
        axes.set_yticks(ticks, [str(t) for t in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("perplexity, held-out Brown text")
    figure.axes[0].legend()
    figure.suptitle("SmolLM2-135M: pruned and restored (share of the lost log-perplexity won back)")
    return figure


def _calibration_figure(rows: list[Row]) -> Any:
    """Perplexity against ridge strength: a line for each amount of text, a panel a domain."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = (("brown", "Brown (the calibration's domain)"), ("python", "Python reference"))
    lengths = sorted({int(r["calibration_tokens"]) for r in rows if r["alpha"]})
    for axes, (text, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for length in lengths:
            for toward, style in (("baseline", "o-"), ("zero", "x:")):
                line = sorted(
                    (float(r["alpha"]), float(r[f"perplexity_{text}"]))
                    for r in rows
                    if r["alpha"]
                    and int(r["calibration_tokens"]) == length
                    and r["toward"] == toward
                )
                if line:
                    label = f"{length // 1024}k tokens, toward {toward}"
                    axes.plot(*zip(*line, strict=True), style, label=label)
        axes.set(title=title, xlabel="alpha", ylabel="perplexity, held-out", xscale="log")
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.suptitle("SmolLM2-135M, MLP at 0.5, calibrated on Brown text")
    return figure


def _save(figure: Any, name: str) -> None:
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": name}):  # the same data gives the same file
        figure.savefig(RESULTS / name, metadata={"Date": None})
    print(f"wrote {RESULTS / name}")


def main() -> None:
    """Command line of this file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts: dict[str, Callable[[], None]] = {
        "table": table,
        "calibration": calibration,
        "cost": cost,
        "plot": plot,
    }
    parser.add_argument("part", choices=parts, help="which experiment to run, or the figures")
    parts[parser.parse_args().part]()


if __name__ == "__main__":
    main()
