"""Every figure of the benches, drawn from its CSV alone, beside it.

    python -m bench.report.figures              draw all of bench/results again
    python -m bench.report.figures FILE.csv     draw one

The bench of a CSV is named on its page; a GPU's come from `python bench/on_gpu.py`.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.kernels.accuracy import BIAS_LIMIT
from bench.quality.levers import TEXTS
from bench.report.comparison import NETWORKS, VARIANTS, found, has_axes
from bench.tools.commandline import CommandLine
from bench.tools.measuring import RESULTS, Row, read_rows
from grail.report.report import recovered
from grail_kernels.reference import ERROR_LIMIT

MEMORY_TARGET = 0.55
_MARKERS = ("o", "s", "^", "D", "P", "X")
KEEP_RATIOS = "passages", "16"  # calibration and its sequences
PERPLEXITIES = (15, 20, 30, 40, 50, 70, 100, 150, 200, 300, 500, 1000, 2000, 3000)


def accuracy(rows: list[Row], _: str) -> Any:
    """Error, and bias of the diagonal, against tokens: `bench.kernels.accuracy`."""
    figure, (error, bias) = _panels(1, 2)
    for key in dict.fromkeys(_values(row, "provider", "dtype", "chain") for row in rows):
        provider, dtype, chain = key
        ours = [row for row in rows if _values(row, "provider", "dtype", "chain") == key]
        tokens = [int(row["tokens"]) for row in ours]
        label = f"{provider} {dtype}" + (f", chain {chain}" if chain else "")
        style = {"marker": ".", "label": label}
        error.plot(tokens, [float(row["error"]) for row in ours], **style)
        bias.plot(tokens, [abs(float(row["diagonal_bias"])) for row in ours], **style)
    limit = error.axhline(ERROR_LIMIT, color="grey", linestyle=":", label="16 eps")
    bias.axhline(BIAS_LIMIT, color="grey", linestyle=":", label="target")
    channels = rows[0]["channels"]
    title = f"{channels} channels of mean 0.5, deviation 1; all tokens in one call"
    error.set(title=title, ylabel="largest error, eps·Σ|x||x|ᵀ")
    bias.set(title=rows[0]["device"], ylabel="|mean relative error| of the diagonal")
    for panel in (error, bias):
        panel.set(xscale="log", yscale="log", xlabel="tokens")
    error.legend(handles=[limit], fontsize=8)
    bias.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def roof(rows: list[Row], _: str = "") -> Any:
    """Share of the limit that each provider reaches, by shape and dtype: `bench.kernels.gram`.

    100 is the limit of a symmetric accumulation at the machine's best product and copy.
    """
    shares: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        case = _values(row, "dtype", "kernel", "tokens", "channels", "matrices")
        if row["metric"] in ("time", "limit"):
            share = shares.setdefault((*case, row["provider"]), {})
            share[row["metric"]] = float(row["p50"])
    dtypes = list(dict.fromkeys(key[0] for key in shares))
    figure, panels = _panels(max(1, len(dtypes)), 1, width=10)
    names = list(dict.fromkeys(key[-1] for key in shares))
    for panel, dtype in zip(panels, dtypes, strict=False):
        cases = list(dict.fromkeys(key[1:-1] for key in shares if key[0] == dtype))
        for index, name in enumerate(names):
            reached = {
                position: 100 * share["limit"] / share["time"]
                for position, case in enumerate(cases)
                if (share := shares.get((dtype, *case, name)))
            }
            if reached:
                width = 0.8 / len(names)
                places = [position + (index - len(names) / 2 + 0.5) * width for position in reached]
                panel.bar(places, reached.values(), width, label=name, color=f"C{index}")
        panel.axhline(100, color="grey", linestyle=":")
        panel.set_xticks(range(len(cases)), [_case_label(*case) for case in cases], fontsize=8)
        panel.set(title=f"{dtype}, {rows[0]['device']}", ylabel="% of the measured roof")
        # Above the roof only where a provider is: the library's best product was not the best.
        panel.set_ylim(0, max([100, *(bar.get_height() for bar in panel.patches)]))
        panel.legend(fontsize=8)
    return figure


def _case_label(kernel: str, tokens: str, channels: str, matrices: str) -> str:
    many = {"gram_batched": f"\n{matrices} heads", "gram_ragged": f"\n{matrices} experts"}
    return f"H {channels}\nT {tokens}" + many.get(kernel, "")


def ridge(rows: list[Row], _: str) -> Any:
    """Times of every provider by channels: `bench.kernels.ridge`."""
    figure, (panel,) = _panels(1, 1)
    for name in dict.fromkeys(row["provider"] for row in rows):
        ours = [row for row in rows if row["provider"] == name]
        points = sorted((int(row["channels"]), float(row["p50"])) for row in ours)
        panel.plot(*zip(*points, strict=True), marker="o", label=name)
    panel.set(xscale="log", yscale="log", xlabel="channels H", ylabel="seconds (p50)")
    panel.set_title(rows[0]["device"])
    _tick_channels(panel, rows)
    panel.legend(fontsize=8)
    return figure


def phases(rows: list[Row], _: str) -> Any:
    """Time of a whole calibration by phase over the bare forward pass, by design: `calibrate`."""
    seconds: dict[tuple[str, str], float] = {}
    for row in rows:  # without a column of designs they are of the defaults
        if row["unit"] == "s":
            seconds[row.get("design") or "default", row["metric"]] = float(row["p50"])
    bare = seconds.pop(("default", "bare forward"))
    designs = list(dict.fromkeys(design for design, _ in seconds))
    parts = [metric for design, metric in seconds if design == designs[0] and metric != "total"]
    figure, (panel,) = _panels(1, 1, width=9, height=1 + 0.6 * len(designs))
    left = [0.0] * len(designs)
    for part in parts:
        shares = [100 * seconds[design, part] / bare for design in designs]
        panel.barh(designs, shares, left=left, label=part)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    panel.invert_yaxis()
    panel.axvline(100, color="grey", linestyle=":", label="bare forward")
    first = rows[0]
    panel.set_title(
        f"{first['model']}, {first['tokens']} tokens, {first['sites']}, keep {first['keep']}, "
        f"{first['dtype']}, {first['device']}, {first['threads']} threads",
        fontsize=9,
    )
    panel.set_xlabel("% of the bare forward pass (p50)")
    panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def memory(rows: list[Row], _: str) -> Any:
    """Bytes of the statistics of one site against channels, over a dense fp32 G: `memory`."""
    figure, (panel,) = _panels(1, 1, width=7)
    styles = {"accumulator": {"marker": "o"}, "peak": {"marker": "x"}, "formula": {}}
    for index, provider in enumerate(dict.fromkeys(row["provider"] for row in rows)):
        for metric, marker in styles.items():
            ours = [
                (int(row["channels"]), int(row["p50"]))
                for row in rows
                if _values(row, "provider", "metric") == (provider, metric)
            ]
            shares = [value / (4 * channels**2) for channels, value in ours]
            style = {"linestyle": "none" if marker else "-", "color": f"C{index}", **marker}
            panel.plot([c for c, _ in ours], shares, label=f"{provider}: {metric}", **style)
    panel.axhline(MEMORY_TARGET, color="grey", linestyle=":", label=f"target {MEMORY_TARGET}")
    panel.set(xscale="log", yscale="log", xlabel="channels H", ylabel="bytes / 4H²")
    panel.set_title("statistics of one site over a dense fp32 G")
    panel.set_yticks([0.5, 1, 2, 4, 8, 16], ["0.5", "1", "2", "4", "8", "16"])
    _tick_channels(panel, rows)
    panel.legend(fontsize=8)
    return figure


def selectors(rows: list[Row], name: str) -> Any:
    """Score against keep ratio, a panel for each variant, a line for each selector: `sweep`."""
    title, score, _ = NETWORKS[name]
    values = found(rows, score)
    variants = [v for v in VARIANTS if any(w == v for _, _, w in values)]
    figure, panels = _panels(1, len(variants), 3.4, 3.6, layout="constrained", sharey=True)
    for panel, variant in zip(panels, variants, strict=True):
        names = dict.fromkeys(row["selector"] for row in rows if row["selector"])
        for number, selector in enumerate(names):
            points = ((k, v) for (s, k, w), v in values.items() if (s, w) == (selector, variant))
            style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
            _line(panel, points, marker=".", label=selector, **style)
        panel.axhline(values["", 1.0, "dense"], color="grey", linestyle=":")
        panel.set(title=VARIANTS[variant], xlabel="channels kept")
        if score == "perplexity":
            panel.set(yscale="log", ylim=(None, 1e3))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(score)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(title)
    return figure


def studies(rows: list[Row], name: str) -> Any:
    """Score against calibration size and against α, a line for each keep ratio: `sweep`."""
    title, score, _ = NETWORKS[name]
    figure, (sizes, alphas) = _panels(1, 2, 4.5, 3.6, layout="constrained", sharey=True)
    for number, keep in enumerate(sorted({r["keep"] for r in rows if r["selector"]}, reverse=True)):
        at = [r for r in rows if r["keep"] == keep and r["selector"] == "wanda"]
        colour = f"C{number}"
        for variant, style in (("grail", "o--"), ("ours", "o-")):
            points = ((int(r["samples"]), float(r[score])) for r in at if r["variant"] == variant)
            label = f"{VARIANTS[variant]}, keep {keep}"
            _line(sizes, points, style, color=colour, label=label)
        for toward, style in (("zero", "o--"), ("baseline", "o-")):
            suffix = " toward baseline" if toward == "baseline" else ""
            points = (
                (float(r["variant"].removeprefix("alpha=").removesuffix(suffix)), float(r[score]))
                for r in at
                if r["variant"].startswith("alpha=")
                and r["variant"].endswith("baseline") == bool(suffix)
            )
            _line(alphas, points, style, color=colour, label=f"toward {toward}, keep {keep}")
    sizes.set(xscale="log", xlabel="calibration samples", ylabel=score, title="wanda")
    alphas.set(xscale="log", xlabel="α", title="wanda, the paper's way")
    for panel in (sizes, alphas):
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    figure.suptitle(title)
    return figure


def keep_ratios(rows: list[Row], _: str) -> Any:
    """Perplexity against keep ratio of MLPs, in the calibration's domain and off it: `levers`."""
    by_cell = {
        (row["text"], row["lever"], float(row["keep"])): float(row["perplexity"])
        for row in rows
        if (row["calibration"], row["sequences"], row["sites"]) == (*KEEP_RATIOS, "mlp")
    }
    dense = {row["text"]: float(row["perplexity"]) for row in rows if row["lever"] == "dense"}
    figure, panels = _panels(1, 2, 5, 3.6, layout="constrained", sharey=True)
    titles = ("Python reference, as the calibration", "Brown, another kind of text")
    for panel, text, title in zip(panels, TEXTS, titles, strict=True):
        for lever, label, colour in (
            ("pruned", "pruned", "#c44e52"),
            ("paper", "the paper's way", "#dd8452"),
            ("defaults", "grail", "#4c72b0"),
        ):
            points = ((k, v) for (t, of, k), v in by_cell.items() if (t, of) == (text, lever))
            _line(panel, points, "o-", color=colour, label=label)
        for keep in sorted(k for t, of, k in by_cell if (t, of) == (text, "defaults")):
            pruned = by_cell.get((text, "pruned", keep))
            restored = by_cell[text, "defaults", keep]
            if pruned is None:
                continue
            if (share := recovered(dense[text], pruned, restored)) is not None:
                style = {"textcoords": "offset points", "xytext": (5, -3), "fontsize": 8}
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
                place = (keep, math.sqrt(pruned * restored))
                panel.annotate(f"{share:.0%}", place, bbox=box, **style)
        panel.axhline(dense[text], color="gray", linestyle=":", label="dense")
        panel.set(title=title, xlabel="channels kept of each MLP", yscale="log")
        ticks = [t for t in PERPLEXITIES if t <= max(by_cell.values(), default=1)]
        panel.set_yticks(ticks, [str(t) for t in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("perplexity, held-out text")
    panels[0].legend()
    figure.suptitle("GRAIL recovers most of the loss in the domain of the calibration, less off it")
    return figure


def calibration(rows: list[Row], _: str) -> Any:
    """Perplexity against α: a line for each amount of text, a panel a domain: `endtoend`."""
    figure, panels = _panels(1, 2, 5, 3.6, layout="constrained")
    domains = (("brown", "Brown (the calibration's domain)"), ("python", "Python reference"))
    lengths = sorted({int(r["calibration_tokens"]) for r in rows if r["alpha"]})
    for panel, (text, title) in zip(panels, domains, strict=True):
        for length in lengths:
            for toward, style in (("baseline", "o-"), ("zero", "x:")):
                points = (
                    (float(r["alpha"]), float(r[f"perplexity_{text}"]))
                    for r in rows
                    if (r["calibration_tokens"], r["toward"]) == (str(length), toward)
                    and r["alpha"]
                )
                label = f"{length // 1024}k tokens, toward {toward}"
                _line(panel, points, style, label=label)
        panel.set(title=title, xlabel="alpha", ylabel="perplexity, held-out", xscale="log")
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.suptitle("SmolLM2-135M, MLP at 0.5, calibrated on Brown text")
    return figure


def serving(rows: list[Row], _: str) -> Any:
    """Perplexity against decode speed: a colour for each model, a marker for each format."""
    figure, (panel,) = _panels(1, 1, 9, 5.4, layout="constrained")
    rows = [row for row in rows if row.get("decode_1") and row.get("perplexity")]
    names = list(dict.fromkeys(row["model"] for row in rows))
    formats = list(dict.fromkeys(row["format"] for row in rows))
    for number, name in enumerate(names):
        ours = [row for row in rows if row["model"] == name]
        points = [(float(row["decode_1"]), float(row["perplexity"])) for row in ours]
        colour = f"C{number}"
        # Thin, so that the formats of one model are seen together.
        panel.plot(*zip(*points, strict=True), color=colour, linewidth=0.6, alpha=0.5)
        for row, point in zip(ours, points, strict=True):
            panel.plot(*point, _MARKERS[formats.index(row["format"])], color=colour)
        panel.plot([], [], color=colour, label=name)
    for name, marker in zip(formats, _MARKERS, strict=False):
        panel.plot([], [], marker, color="grey", label=name)
    threads = {row["speed_threads"] for row in rows}
    panel.set(
        xlabel=f"tokens per second, decode, one sequence, {'/'.join(sorted(threads))} thread",
        ylabel=f"perplexity, held-out {rows[0]['text']} text",
        title="SmolLM2-135M in llama.cpp (right and down is better)",
    )
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _line(panel: Any, points: Iterable[tuple[float, float]], *style: str, **settings: Any) -> None:
    """Points in their order along the axis, joined; nothing where there are none."""
    if line := sorted(points):
        panel.plot(*zip(*line, strict=True), *style, **settings)


def _tick_channels(panel: Any, rows: list[Row]) -> None:
    channels = sorted({int(row["channels"]) for row in rows})
    panel.set_xticks(channels, [str(channel) for channel in channels])
    panel.minorticks_off()


def _values(row: Row, *names: str) -> tuple[str, ...]:
    return tuple(row.get(name, "") for name in names)


def _panels(
    rows: int,
    columns: int,
    width: float = 6,
    height: float = 4,
    layout: str | None = None,
    sharey: bool = False,
) -> tuple[Any, list[Any]]:
    """A figure, and its panels from top left on; matplotlib is imported where it is used."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout=layout)
    return figure, list(figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat)


def save(path: Path, figure: Any) -> None:
    """Writes a figure; the same numbers give the same file."""
    import matplotlib

    if figure.get_layout_engine() is None:
        figure.tight_layout()
    with matplotlib.rc_context({"svg.hashsalt": "grail"}):
        figure.savefig(path, metadata={"Date": None})


# By the name of a CSV, or its first word: the other words are passed on.
FIGURES: dict[str, Callable[[list[Row], str], Any]] = {
    "accuracy": accuracy,
    "gram": roof,
    "ridge": ridge,
    "calibrate": phases,
    "memory": memory,
    "selectors": selectors,
    "studies": studies,
    "levers": keep_ratios,
    "smollm2_calibration": calibration,
    "serving": serving,
}


def kind(path: Path) -> tuple[str, str]:
    """The figure of a CSV, "" if it has none, and the network that it is of."""
    if path.stem in FIGURES:
        return path.stem, ""
    first, _, name = path.stem.partition("_")
    measured = name == "cpu" or name in NETWORKS
    return (first, name) if first in FIGURES and measured else ("", "")


def drawable(folder: Path) -> list[Path]:
    """The CSV files under `folder` that have a figure."""
    return [
        path
        for path in sorted(folder.rglob("*.csv"))
        if (of := kind(path)[0]) and (of != "studies" or has_axes(read_rows(path)))
    ]


def main(arguments: list[str] | None = None) -> int:
    """Draws; each figure lies beside its CSV."""
    takes = "less than a minute"
    parser = CommandLine(__doc__, writes="an SVG beside every CSV", takes=takes)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.csv")
    for path in parser.read(arguments).files or drawable(RESULTS):
        of, name = kind(path)
        if not of:
            parser.error(f"{path.name} has no figure; those with one: {', '.join(FIGURES)}")
        save(path.with_suffix(".svg"), FIGURES[of](read_rows(path), name))
        print(path.with_suffix(".svg"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
