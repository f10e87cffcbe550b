"""SmolLM2-135M, compressed and restored: perplexity, by keep ratio, text length and ridge.

    python -m bench.quality.endtoend table          # keep × sites: dense, pruned, the paper's way, ours
    python -m bench.quality.endtoend calibration    # calibration length × alpha, on two domains
    python -m bench.quality.endtoend cost           # time against bare forward passes; memory
    python -m bench.quality.endtoend plot           # the figures, from the CSV files alone

Results are bench/results/smollm2_{table,calibration,cost}.csv.

Calibration and held-out text of the table are disjoint halves of the Brown corpus (32k and 17k
tokens); three quarters and a quarter of the topics of the Python language reference (64k and 12k),
called technical, or five and one of six passages of its every topic (64k and 12k), called passages;
or seven eighths and an eighth of the pages of the Python documentation, sequences drawn at random
from each (256k and 16k), called documentation; see bench/tools/assets.py. A row is written as soon as it
is measured and never measured again: kill it and run it again to go on. Hours on two cores; never
part of the tests.
"""

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
from bench.tools import assets
from bench.tools.measuring import command_line
from grail.files.calibration import token_batches
from grail.files.load import load_model
from grail.report._evaluate import evaluate
from grail.report.report import Evaluation, Report, recovered

RESULTS = Path(__file__).parents[1] / "results"
TEXTS = Path(".assets")
LENGTH = 1024
# In the order of measuring.
CELLS = [
    ("documentation", "mlp", 0.5),
    ("technical", "mlp", 0.5),
    ("passages", "mlp", 0.5),
    ("brown", "mlp", 0.5),
    ("brown", "heads", 0.5),
    ("brown", "mlp,heads", 0.5),
    ("documentation", "mlp", 0.75),
    ("technical", "mlp", 0.75),
    ("passages", "mlp", 0.75),
    ("brown", "mlp", 0.7),
    ("brown", "heads", 0.7),
    ("brown", "mlp,heads", 0.7),
    *(("brown", "mlp", keep) for keep in (0.9, 0.8, 0.6)),
]
# Calibration and held-out tokens of a text.
TOKENS = {
    "brown": (32 * LENGTH, 17 * LENGTH),
    "technical": (64 * LENGTH, 12 * LENGTH),
    "passages": (64 * LENGTH, 12 * LENGTH),
    "documentation": (256 * LENGTH, 16 * LENGTH),
}
# Of these, sequences are drawn at random; of the others the first ones are taken.
DRAWN = {"documentation": 0}
SOURCES: dict[str, Callable[[], tuple[list[str], list[str]]]] = {
    "brown": lambda: assets.split_genres(assets.brown(TEXTS)),
    "python": lambda: assets.split_topics(assets.python_reference()),
    "technical": lambda: assets.split_topics(assets.python_reference(), calibration=3),
    "passages": lambda: assets.split_passages(assets.python_reference(), calibration=5),
    "documentation": lambda: assets.split_topics(assets.python_documentation(TEXTS), calibration=7),
}
# The paper's selector, target and ridge; what a user gets who sets nothing.
PAPER: dict[str, Any] = {"selector": "wanda", "alpha": 1e-3, "drift_correction": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    "pruned": {"selector": "wanda", "compensate": False},
    "paper": PAPER,
    "restored": {},
}
# Beside those, of some cells: widths by what each block's narrowing costs the network; a setting.
UNEVEN = "restored, uneven widths"
OTHERS: dict[tuple[str, str, float], dict[str, dict[str, Any]]] = {
    ("passages", "mlp", 0.5): {
        UNEVEN: {},
        "restored, tokens weighted": {"token_weights": True},
    },
    **{
        cell: {UNEVEN: {}}
        for cell in (
            ("technical", "mlp", 0.5),
            ("passages", "mlp", 0.75),
            ("technical", "mlp", 0.75),
            ("brown", "mlp", 0.5),
        )
    },
}
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
        self._written: set[str] = set()
        self.model, self.tokenizer = load_model(assets.smollm2())

    def batches(self, text: str, half: str, tokens: int) -> list[torch.Tensor]:
        """Sequences of `LENGTH` tokens, one a batch."""
        if text not in self._written:
            assets.write_texts(text, SOURCES[text](), TEXTS)
            self._written.add(text)
        return token_batches(
            TEXTS / f"{text}-{half}.txt",
            self.tokenizer,
            tokens=tokens,
            sequence_length=LENGTH,
            batch_size=1,
            seed=DRAWN.get(text),
        )

    def compressed(self, calibration: list[torch.Tensor], **settings: Any) -> tuple[Any, Report]:
        """A compressed copy and its report."""
        model = copy.deepcopy(self.model)
        return model, grail.compress(model, calibration, progress=sys.stderr.isatty(), **settings)


def table() -> None:
    """Every model of every cell, on held-out text."""
    out = Table(RESULTS / "smollm2_table.csv", ("text", "sites", "keep", "model"))
    subject = Subject()
    for text, sites, keep in CELLS:
        models = MODELS | OTHERS.get((text, sites, keep), {})
        missing = [name for name in models if (text, sites, keep, name) not in out]
        dense_missing = (text, "", 1.0, "dense") not in out
        if not (missing or dense_missing):  # nor is its text to be fetched and cut
            continue
        calibration_tokens, heldout_tokens = TOKENS[text]
        calibration = subject.batches(text, "calibration", calibration_tokens)
        heldout = subject.batches(text, "heldout", heldout_tokens)
        if dense_missing:
            dense = evaluate(subject.model, heldout, progress=False)
            out.add(_table_row(text, "", 1.0, "dense", dense, None))
        for name in missing:
            kinds = tuple(sites.split(","))
            chosen = {"keep": keep, "sites": kinds, **models[name]}
            if name == UNEVEN:
                of = grail.sensitivity(subject.model, calibration, keep, kinds, progress=False)
                chosen["keep"] = of.shares()
            model, report = subject.compressed(calibration, **chosen)
            result = evaluate(model, heldout, progress=False)
            out.add(_table_row(text, sites, keep, name, result, report))


def _table_row(
    text: str,
    sites: str,
    keep: float,
    name: str,
    result: Evaluation,
    report: Report | None,
) -> Row:
    errors = [site.error for site in report.sites] if report else []
    settings = report.settings if report else {}
    return {
        "text": text,
        "sites": sites,
        "keep": keep,
        "model": name,
        "perplexity": round(result.perplexity, 4),
        "parameters": result.parameters,
        "bytes": result.bytes,
        **{k: settings.get(k, "") for k in ("selector", "alpha", "drift_correction", "toward")},
        "widths": " ".join(f"{k}={v}" for k, v in report.model["widths"]["after"].items())
        if report
        else "",
        "mean_error": round(sum(errors) / len(errors), 5) if errors else "",
        "calibration_tokens": report.calibration["tokens"] if report else "",
        "heldout_tokens": result.tokens,
        **conditions(),
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
        settings = {**PAPER, "keep": keep, "alpha": alpha, "toward": toward}
        model, report = subject.compressed(batches, **settings)
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
        out.add({**row, "heldout_tokens": heldout_tokens, **conditions()})


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
                **conditions(),
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
def conditions() -> Row:
    """Threads, torch and commit of a row."""
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
    save_figure(_keep_figure(rows), "smollm2_table.svg")
    save_figure(
        _calibration_figure(Table(RESULTS / "smollm2_calibration.csv", ()).rows),
        "smollm2_calibration.svg",
    )


def markdown(rows: list[Row]) -> str:
    """The table of README.md: a line for each cell, from the rows of smollm2_table.csv."""
    found = {(r["text"], r["sites"], float(r["keep"]), r["model"]): r for r in rows}
    lines = [
        "| text | sites | keep | parameters | dense | pruned | the paper's way | grail "
        "| uneven widths |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for text, sites, keep in sorted(
        CELLS, key=lambda c: (c[0] == "brown", c[0], c[1] != "mlp", len(c[1]), -c[2])
    ):
        dense, pruned = (
            found.get((text, "", 1.0, "dense")),
            found.get((text, sites, keep, "pruned")),
        )
        if dense is None or pruned is None:
            continue
        left = int(pruned["parameters"]) / int(dense["parameters"])
        base = float(dense["perplexity"]), float(pruned["perplexity"])
        ours = (
            _with_share(found.get((text, sites, keep, m)), *base)
            for m in ("paper", "restored", UNEVEN)
        )
        lines.append(
            f"| {text} | {sites} | {keep:g} | {left:.0%} | {base[0]:.1f} | {base[1]:.1f} "
            f"| {' | '.join(ours)} |"
        )
    return "\n".join(lines)


def _with_share(row: Row | None, dense: float, pruned: float) -> str:
    if row is None:  # not measured yet
        return "–"
    perplexity = float(row["perplexity"])
    share = recovered(dense, pruned, perplexity)
    return f"{perplexity:.1f}" if share is None else f"{perplexity:.1f} ({share:.0%})"


def _keep_figure(rows: list[Row]) -> Any:
    """Perplexity against keep ratio, a panel for each set of sites."""
    from matplotlib.figure import Figure

    brown = [r for r in rows if r["text"] == "brown"]
    by_cell = {(r["sites"], float(r["keep"]), r["model"]): float(r["perplexity"]) for r in brown}
    dense = by_cell["", 1.0, "dense"]
    panels = ("mlp", "heads", "mlp,heads")
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, sites in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        keeps = sorted({k for s, k, _ in by_cell if s == sites})
        for model, label, colour in (
            ("pruned", "pruned", "#c44e52"),
            ("paper", "the paper's way", "#dd8452"),
            ("restored", "grail", "#4c72b0"),
        ):
            line = [(k, by_cell[sites, k, model]) for k in keeps if (sites, k, model) in by_cell]
            axes.plot(*zip(*line, strict=True), "o-", color=colour, label=label)
        for keep in keeps:
            if (sites, keep, "restored") not in by_cell:
                continue
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


def save_figure(figure: Any, name: str) -> None:
    """Writes an SVG into the results; the same data gives the same file."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(RESULTS / name, metadata={"Date": None})
    print(f"wrote {RESULTS / name}")


def main() -> None:
    """Command line of this file."""
    parser = command_line(
        __doc__,
        writes="bench/results/smollm2_*, row by row",
        takes="hours on 2 cores; plot, seconds",
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
