"""Every figure of the benches, drawn from the committed CSV alone.

    python -m bench.report.figures              draw all of bench/results again
    python -m bench.report.figures FILE.csv     draw one

What makes the CSV; a GPU's come from `python bench/on_gpu.py`, under bench/results/gpu
  gram_cpu       python bench/gram.py --csv bench/results/gram_cpu.csv
  ridge_cpu      python -m bench.kernels.ridge --csv bench/results/ridge_cpu.csv
  calibrate_cpu  python -m bench.quality.calibrate --csv bench/results/calibrate_cpu.csv
  accuracy_cpu   python -m bench.kernels.accuracy --csv bench/results/accuracy_cpu.csv
  memory_cpu     python -m bench.kernels.memory --csv bench/results/memory_cpu.csv
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.kernels.accuracy import BIAS_LIMIT
from bench.tools.measuring import Row, command_line, read_rows
from grail_kernels.reference import ERROR_LIMIT

RESULTS = Path(__file__).parents[1] / "results"
MEMORY_TARGET = 0.55


def accuracy(rows: list[Row]) -> Any:
    """Error, and bias of the diagonal, against tokens: `bench/kernels/accuracy.py`."""
    figure, (error, bias) = _panels(1, 2)
    for key in _distinct(rows, "provider", "dtype", "chain"):
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


def roof(rows: list[Row]) -> Any:
    """Share of the limit that each provider reaches, by shape and dtype: `bench/kernels/gram.py`.

    100 is what the machine's best product and copy allow a symmetric accumulation.
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
            found = {
                position: 100 * share["limit"] / share["time"]
                for position, case in enumerate(cases)
                if (share := shares.get((dtype, *case, name)))
            }
            if found:
                width = 0.8 / len(names)
                places = [position + (index - len(names) / 2 + 0.5) * width for position in found]
                panel.bar(places, found.values(), width, label=name, color=f"C{index}")
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


def ridge(rows: list[Row]) -> Any:
    """Times of every provider by channels: `bench/kernels/ridge.py`."""
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


def phases(rows: list[Row]) -> Any:
    """Where the time of a whole calibration goes, beside bare forward passes: `calibrate.py`."""
    figure, (panel,) = _panels(1, 1, width=9, height=2.4)
    seconds = {row["metric"]: float(row["p50"]) for row in rows if row["unit"] == "s"}
    bare = seconds.pop("bare forward")
    total = seconds.pop("total")
    panel.barh("bare forward", bare, color="lightgrey")
    left = 0.0
    for name, value in seconds.items():
        label = f"{name} {value:.2g} s"
        panel.barh("grail.compress", value, left=left, label=label)
        left += value
    first = rows[0]
    panel.set_title(
        f"{first['model']}, {first['tokens']} tokens, {first['sites']}, keep {first['keep']}, "
        f"{first['dtype']}, {first['device']}: {100 * total / bare:.0f}% of bare forward passes",
        fontsize=9,
    )
    panel.set_xlabel("seconds (p50)")
    panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def memory(rows: list[Row]) -> Any:
    """Bytes of the statistics of one site against channels, over a dense fp32 G: `memory.py`."""
    figure, (panel,) = _panels(1, 1, width=7)
    for index, provider in enumerate(dict.fromkeys(row["provider"] for row in rows)):
        for metric, style in (
            ("accumulator", {"marker": "o", "linestyle": "none"}),
            ("peak", {"marker": "x", "linestyle": "none"}),
            ("formula", {"linestyle": "-"}),
        ):
            ours = [
                (int(row["channels"]), int(row["p50"]))
                for row in rows
                if _values(row, "provider", "metric") == (provider, metric)
            ]
            shares = [value / (4 * channels**2) for channels, value in ours]
            label = f"{provider}: {metric}"
            panel.plot([c for c, _ in ours], shares, color=f"C{index}", label=label, **style)
    panel.axhline(MEMORY_TARGET, color="grey", linestyle=":", label=f"target {MEMORY_TARGET}")
    panel.set(xscale="log", yscale="log", xlabel="channels H", ylabel="bytes / 4H²")
    panel.set_title("statistics of one site over a dense fp32 G")
    panel.set_yticks([0.5, 1, 2, 4, 8, 16], ["0.5", "1", "2", "4", "8", "16"])
    _tick_channels(panel, rows)
    panel.legend(fontsize=8)
    return figure


def _tick_channels(panel: Any, rows: list[Row]) -> None:
    channels = sorted({int(row["channels"]) for row in rows})
    panel.set_xticks(channels, [str(channel) for channel in channels])
    panel.minorticks_off()


def _values(row: Row, *names: str) -> tuple[str, ...]:
    return tuple(row.get(name, "") for name in names)


def _distinct(rows: list[Row], *names: str) -> list[tuple[str, ...]]:
    return list(dict.fromkeys(_values(row, *names) for row in rows))


def _panels(rows: int, columns: int, width: float = 6, height: float = 4) -> tuple[Any, list[Any]]:
    """A figure, and its panels from top left on; matplotlib is imported where it is used."""
    import matplotlib

    matplotlib.use("Agg")
    # The same CSV gives the same file.
    matplotlib.rcParams["svg.hashsalt"] = "grail"
    from matplotlib import pyplot

    size = (width * columns, height * rows)
    figure, panels = pyplot.subplots(rows, columns, figsize=size, squeeze=False)
    return figure, list(panels.flat)


def save(path: Path, figure: Any) -> None:
    """Write a figure and let it go."""
    from matplotlib import pyplot

    figure.tight_layout()
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    figure.savefig(path, dpi=150, metadata=metadata)
    pyplot.close(figure)


FIGURES: dict[str, Callable[[list[Row]], Any]] = {
    "accuracy": accuracy,
    "gram": roof,
    "ridge": ridge,
    "calibrate": phases,
    "memory": memory,
}


def drawable(folder: Path) -> list[Path]:
    """The CSV files under `folder` that have a figure."""
    return [path for path in sorted(folder.rglob("*.csv")) if _kind(path) in FIGURES]


def _kind(path: Path) -> str:
    return path.stem.removesuffix("_cpu")


def main(arguments: list[str] | None = None) -> int:
    """Draw; each figure lies beside its CSV."""
    parser = command_line(
        __doc__,
        writes="an SVG beside every CSV",
        takes="less than a minute",
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.csv")
    for path in parser.parse_args(arguments).files or drawable(RESULTS):
        if _kind(path) not in FIGURES:
            parser.error(f"{path.name} has no figure; those with one: {', '.join(FIGURES)}")
        target = path.with_suffix(".svg")
        save(target, FIGURES[_kind(path)](read_rows(path)))
        print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
