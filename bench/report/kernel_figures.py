"""Figures of the kernels: speed, error, memory, and the phases of a calibration."""

from typing import Any

from bench.kernels.accuracy import BIAS_LIMIT
from bench.report import drawing
from bench.report.drawing import decades, framed, line, name_lines, number_axis
from bench.tools.measuring import Row
from grail_kernels.reference import ERROR_LIMIT

MEMORY_TARGET = 0.55
READ_OUT = "gram_readout"  # many short calls: docs/kernels.md has their table
# Of providers: grail's own first, then the library's calls.
LOOKS: tuple[tuple[str, str], ...] = (
    (drawing.PRUNED, "s"),
    (drawing.PAPER, "D"),
    (drawing.OTHER, "^"),
    (drawing.FURTHER, "v"),
    (drawing.DENSE, "X"),
    (drawing.MUTED, "P"),
)


def _looks(providers: list[str]) -> dict[str, dict[str, Any]]:
    """Returns colour and marker of each provider."""
    others = iter(LOOKS)
    looks = {}
    for name in providers:
        colour, marker = (drawing.OURS, "o") if name == "grail" else next(others)
        looks[name] = {"color": colour, "marker": marker, "markersize": 5, "label": name}
    return looks


def roof(rows: list[Row], _: str = "") -> Any:
    """Draws the share of the limit that each provider reaches, by shape and dtype: `gram`.

    100 is the limit of a symmetric accumulation at the machine's best product and copy.
    """
    times: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        case = _values(row, "dtype", "kernel", "tokens", "channels", "matrices")
        if row["metric"] in ("time", "limit") and row["kernel"] != READ_OUT:
            time = times.setdefault((*case, row["provider"]), {})
            time[row["metric"]] = float(row["p50"])
    reached = {key: 100 * time["limit"] / time["time"] for key, time in times.items()}
    dtypes = list(dict.fromkeys(key[0] for key in reached))
    names = sorted(dict.fromkeys(key[-1] for key in reached), key=lambda name: name != "grail")
    cases = sorted({key[1:-1] for key in reached}, key=lambda case: (case[0], int(case[2])))
    looks = _looks(names)
    ours = {key[:-1]: share for key, share in reached.items() if key[-1] == "grail"}
    first = sum(
        share == max(reached.get((*case, name), 0) for name in names)
        for case, share in ours.items()
    )
    figure, panels = framed(
        f"grail's Gram is the fastest in {first} of {len(ours)} cases, at "
        f"{min(ours.values()):.0f} to {max(ours.values()):.0f}% of the measured roof",
        f"{rows[0]['device']}; roof: time of a symmetric accumulation at the machine's best "
        "product and copy; H channels, T tokens",
        columns=max(1, len(dtypes)),
        height=0.8 + 0.21 * len(cases),
        legend=list(looks.values()),
        sharey=True,
    )
    # Above the roof only where a provider is: the library's best product was not the best.
    end = max([100, *reached.values()])
    for panel, dtype in zip(panels, dtypes, strict=False):
        for place, case in enumerate(cases):
            keys = {name: (dtype, *case, name) for name in names}
            shares = {name: reached[key] for name, key in keys.items() if key in reached}
            if not shares:
                continue
            between = [min(shares.values()), max(shares.values())]
            panel.plot(between, [place, place], color=drawing.GRID, linewidth=1.5, zorder=1)
            for name in sorted(shares, key=lambda name: name == "grail"):
                panel.plot(shares[name], place, linestyle="none", **looks[name])
        panel.axvline(100, color=drawing.DENSE, linestyle=":")
        panel.set_yticks(range(len(cases)), [_case_label(*case) for case in cases])
        panel.set(title=dtype, xlabel="% of the roof (higher is better)", xlim=(0, end))
        panel.set_ylim(len(cases) - 0.5, -0.5)
        panel.grid(axis="x")
        for mark in panel.lines:
            mark.set_clip_on(False)
    return figure


def _case_label(kernel: str, tokens: str, channels: str, matrices: str) -> str:
    many = {"gram_batched": f", {matrices} heads", "gram_ragged": f", {matrices} experts"}
    return f"H {channels}, T {tokens}" + many.get(kernel, "")


def accuracy(rows: list[Row], _: str) -> Any:
    """Draws error, and bias of the diagonal, against tokens: `bench.kernels.accuracy`."""
    series: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        series.setdefault(_values(row, "dtype", "provider", "chain"), []).append(row)
    chains = [key for key in series if key[1] == "grail" and key[2]]
    shown = {key for key in series if key not in chains[1:]}  # the first chain is the default
    most = max(int(row["tokens"]) for row in rows)
    ours = [row for key in shown if key[1] == "grail" for row in series[key]]
    worst = {
        dtype: max(float(row["error"]) for row in ours if row["dtype"] == dtype)
        for dtype in dict.fromkeys(key[0] for key in series)
    }
    rival, loss = max(
        ((row["provider"], float(row["error"])) for row in rows if row["provider"] != "grail"),
        key=lambda pair: pair[1],
    )
    looks = {
        "grail": {"color": drawing.OURS, "label": "grail"},
        "addmm": {"color": drawing.PRUNED, "label": "addmm, fp32 sums"},
        "mm": {"color": drawing.PAPER, "label": "mm in bf16"},
    }
    longer = {"color": drawing.DENSE, "linewidth": 0.9, "label": "grail, longer chains"}
    limits = {"color": drawing.MUTED, "linestyle": ":", "label": "limit of the tests"}
    strokes = {"bfloat16": "-", "float32": "--"}
    figure, panels = framed(
        "grail's error is at most "
        + " and ".join(f"{error:.1f} eps in {dtype}" for dtype, error in worst.items())
        + f" up to {most:,} tokens; {rival} reaches {loss:,.0f}",
        f"{rows[0]['device']}; {rows[0]['channels']} channels of mean 0.5, deviation 1; all tokens "
        "in one call",
        columns=2,
        height=2.9,
        legend=[
            *({"linestyle": "-"} | look for look in looks.values()),
            *([longer | {"linestyle": "-"}] if chains[1:] else []),
            *(
                {"color": drawing.MUTED, "linestyle": stroke, "label": dtype}
                for dtype, stroke in strokes.items()
            ),
            limits,
        ],
    )
    for key, of in series.items():
        look = looks[key[1]] if key in shown else longer
        for panel, column in zip(panels, ("error", "diagonal_bias"), strict=True):
            points = ((int(row["tokens"]), abs(float(row[column]))) for row in of)
            line(panel, points, **look, linestyle=strokes[key[0]], zorder=2 + (key in shown))
    for panel, title, limit in zip(
        panels,
        ("Largest error, eps·Σ|x||x|ᵀ", "Bias of the diagonal, relative"),
        (ERROR_LIMIT, BIAS_LIMIT),
        strict=True,
    ):
        panel.axhline(limit, **limits)
        panel.set(title=title, xscale="log", yscale="log", xlabel="tokens")
        number_axis(panel.xaxis, [2**power for power in (8, 12, 16, 20)], "{:,.0f}".format)
        low, high = panel.get_ylim()
        ticks = decades(low, high)
        number_axis(panel.yaxis, ticks[:: 1 + len(ticks) // 8], "{:,g}".format)
        panel.grid(axis="y")
    return figure


def ridge(rows: list[Row], _: str) -> Any:
    """Draws times of every provider by channels: `bench.kernels.ridge`."""
    times: dict[str, dict[int, float]] = {}
    for row in rows:
        times.setdefault(row["provider"], {})[int(row["channels"])] = 1e3 * float(row["p50"])
    names = {"grail": "grail, a whole fit", "grail solve": "grail, the solve", "reference": "fp32"}
    colours = {"grail": drawing.OURS, "grail solve": drawing.FURTHER, "reference": drawing.PRUNED}
    ratios = [time / times["reference"][size] for size, time in times["grail"].items()]
    figure, (panel,) = framed(
        f"A whole fit, in fp64 with its errors, takes {min(ratios):.2f} to {max(ratios):.2f} times "
        "as long as the fp32 reference",
        f"{rows[0]['device']}; half of the channels kept; medians",
        height=2.8,
    )
    for name, of in times.items():
        line(panel, of.items(), color=colours[name], marker="o", markersize=5)
    panel.set(xscale="log", yscale="log", xlabel="channels H", ylabel="milliseconds")
    sizes = sorted(times["grail"])
    number_axis(panel.xaxis, sizes)
    low, high = panel.get_ylim()
    number_axis(panel.yaxis, decades(low, high, (1, 2, 5)))
    panel.grid(axis="y")
    ends = {names[name]: (max(of), of[max(of)]) for name, of in times.items()}
    name_lines(panel, ends, {names[name]: colour for name, colour in colours.items()})
    return figure


def phases(rows: list[Row], _: str) -> Any:
    """Draws a calibration by phase over the bare forward pass, by design: `calibrate`."""
    seconds: dict[tuple[str, str], float] = {}
    for row in rows:  # without a column of designs they are of the defaults
        if row["unit"] == "s":
            seconds[row.get("design") or "default", row["metric"]] = float(row["p50"])
    bare = seconds.pop(("default", "bare forward"))
    designs = list(dict.fromkeys(design for design, _ in seconds))
    parts = [metric for design, metric in seconds if design == designs[0] and metric != "total"]
    palette = (drawing.DENSE, drawing.OURS, drawing.PAPER, drawing.OTHER, drawing.FURTHER)
    colours = dict(zip(parts, (*palette, drawing.PRUNED), strict=False))
    totals = {design: seconds[design, "total"] / bare for design in designs}
    first = rows[0]
    figure, (panel,) = framed(
        "A calibration takes as long as "
        + ", ".join(f"{total:.1f} forward passes ({name})" for name, total in totals.items()),
        f"{first['model']}, {first['tokens']} tokens, {first['sites']}, keep {first['keep']}, "
        f"{first['dtype']}, {first['device']}, {first['threads']} threads; medians",
        height=0.75 + 0.36 * len(designs),
        legend=[{"color": of, "marker": "s", "label": part} for part, of in colours.items()],
    )
    left = [0.0] * len(designs)
    for part in parts:
        shares = [seconds[design, part] / bare for design in designs]
        panel.barh(designs, shares, left=left, color=colours[part], height=0.7)
        left = [start + share for start, share in zip(left, shares, strict=True)]
    for place, end in enumerate(left):
        panel.annotate(
            f"{end:.2f}×", (end, place), xytext=(4, 0), textcoords="offset points", va="center"
        )
    panel.invert_yaxis()
    panel.axvline(1, color=drawing.INK, linestyle=":")
    panel.set_xlabel("time over one bare forward pass (dotted)")
    panel.margins(x=0.08)
    panel.grid(axis="x")
    return figure


def memory(rows: list[Row], _: str) -> Any:
    """Draws bytes of the statistics of one site by channels, over a dense fp32 G: `memory`."""
    shares: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        channels = int(row["channels"])
        of = shares.setdefault(_values(row, "provider", "metric"), {})
        of[channels] = int(row["p50"]) / (4 * channels**2)
    names = list(dict.fromkeys(row["provider"] for row in rows))
    colours = dict(zip(names, (drawing.OURS, drawing.FURTHER, drawing.PRUNED), strict=False))
    widest = max(int(row["channels"]) for row in rows)
    held, peak = (shares["grail", metric][widest] for metric in ("accumulator", "peak"))
    strokes = {
        "formula": {"linestyle": "-", "label": "predicted"},
        "accumulator": {"marker": "o", "linestyle": "none", "label": "measured"},
        "peak": {"marker": "x", "linestyle": "none", "label": "peak"},
    }
    figure, (panel,) = framed(
        f"grail's statistics take {held:.0%} of a dense fp32 Gram at {widest} channels, {peak:.0%} "
        "at the peak; prediction and measurement agree",
        f"{rows[0]['device']}; one site; a dense fp32 Gram has 4H² bytes",
        height=3.2,
        legend=[{"color": drawing.MUTED} | stroke for stroke in strokes.values()]
        + [{"color": drawing.MUTED, "linestyle": ":", "label": f"target {MEMORY_TARGET}"}],
    )
    for (provider, metric), of in shares.items():
        line(panel, of.items(), color=colours[provider], **strokes[metric])
    panel.axhline(MEMORY_TARGET, color=drawing.MUTED, linestyle=":")
    panel.set(xscale="log", yscale="log", xlabel="channels H", ylabel="bytes / 4H²")
    number_axis(panel.yaxis, (0.5, 1, 2, 4, 8, 16))
    number_axis(panel.xaxis, sorted({int(row["channels"]) for row in rows}))
    panel.grid(axis="y")
    panel.set_xlim(right=1.03 * widest)
    ends = {name: (widest, shares[name, "formula"][widest]) for name in names}
    name_lines(panel, ends, colours)
    return figure


def _values(row: Row, *names: str) -> tuple[str, ...]:
    return tuple(row.get(name, "") for name in names)
