"""Figures of what compressed networks lose: selectors, studies, texts, and files of a runtime."""

from typing import Any

from bench.quality.levers import BROAD, DEFAULTS, DENSE, PRUNED, TEXTS
from bench.report import drawing
from bench.report.drawing import LOOKS, decades, framed, line, number_axis
from bench.report.networks import (
    ARROW,
    HALF,
    LEAD,
    NETWORKS,
    Scores,
    found,
    kept,
    number,
    spread_sentence,
    study_sentence,
    unit,
)
from bench.tools.measuring import Row
from grail.report.report import recovered

KEEP_RATIOS = "passages", "16"  # calibration and its sequences
FAR = 800  # perplexity at which the axis of selectors ends
MARKERS = ("o", "s", "^", "D", "P", "X")
LEVERS: dict[str, dict[str, Any]] = {
    PRUNED: LOOKS["own"] | {"label": "pruned"},
    "paper": LOOKS["grail"],
    DEFAULTS: LOOKS["ours"],
    BROAD: {
        "color": drawing.FURTHER,
        "marker": "s",
        "markersize": 4,
        "label": f"{DEFAULTS}, {BROAD} text",
    },
}


def selectors(rows: list[Row], name: str) -> Any:
    """Draws a line for each selector: alone, in the paper's way, with the defaults: `sweep`."""
    title, score, keeps = NETWORKS[name]
    values, lead = found(rows, score), LEAD.get(name, HALF)
    dense, factor = values["", 1.0, "dense"], 100 if unit(score) else 1
    names = sorted(
        {s for s, k, _ in values if k == lead},
        key=lambda s: values.get((s, lead, "ours"), values[s, lead, "own"]),
        reverse=score != "perplexity",
    )
    of_dense = {"color": drawing.DENSE, "linestyle": ":", "label": "dense network"}
    figure, panels = framed(
        spread_sentence(values, score, lead),
        f"{title}; dense network {number(score, dense)}{unit(score)}",
        columns=2,
        height=0.75 + 0.18 * len(names),
        legend=[*(LOOKS[variant] for variant in ARROW), of_dense],
        sharey=True,
        sharex=score == "perplexity",
    )
    better = "lower" if score == "perplexity" else "higher"
    for panel, keep in zip(panels, keeps[-2:], strict=True):
        panel.axvline(factor * dense, **of_dense)
        for place, selector in enumerate(names):
            _dumbbell(panel, place, values, selector, keep, score)
        panel.set_yticks(range(len(names)), names)
        panel.set(title=kept(keep).capitalize(), ylim=(len(names) - 0.5, -0.5))
        panel.set_xlabel(f"{score}{', %' * bool(unit(score))} ({better} is better)")
        panel.grid(axis="x")
        if score == "perplexity":
            panel.set(xscale="log", xlim=(dense * 0.92, FAR))
            number_axis(panel.xaxis, [t for t in (20, 50, 100, 200, 500) if t > dense])
    return figure


def _dumbbell(
    panel: Any, place: int, values: Scores, selector: str, keep: float, score: str
) -> None:
    """Draws the points of a selector, joined; a perplexity beyond the axis stands at its end."""
    factor = 100 if unit(score) else 1
    shown = {v: factor * values[selector, keep, v] for v in ARROW if (selector, keep, v) in values}
    inside = {v: value for v, value in shown.items() if score != "perplexity" or value <= FAR}
    ends = [*inside.values(), *([FAR] if len(inside) < len(shown) else [])]
    panel.plot([min(ends), max(ends)], [place, place], color=drawing.GRID, linewidth=1.5, zorder=1)
    for variant, value in inside.items():
        look = {key: of for key, of in LOOKS[variant].items() if key != "label"}
        panel.plot(value, place, linestyle="none", **({"markersize": 5} | look))
    for variant in shown.keys() - inside.keys():
        style = {"textcoords": "offset points", "va": "center", "annotation_clip": False}
        colour = LOOKS[variant]["color"]
        text = f"▸ {number(score, values[selector, keep, variant])}"
        panel.annotate(text, (FAR, place), xytext=(-3, 0), color=colour, **style)


def studies(rows: list[Row], name: str) -> Any:
    """Draws the score against calibration size and against α, by keep ratio: `sweep`."""
    title, score, _ = NETWORKS[name]
    keeps = sorted({r["keep"] for r in rows if r["selector"]}, key=float, reverse=True)
    looks = {
        "ours": {"color": drawing.OURS, "label": "grail's defaults"},
        "grail": {"color": drawing.PAPER, "label": "the paper's way, toward zero"},
        "baseline": {"color": drawing.OTHER, "label": "toward the baseline"},
    }
    strokes = dict(zip(keeps, ("-", "--", ":"), strict=False))
    of_keeps = [
        {"color": drawing.MUTED, "linestyle": stroke, "label": f"keep {keep}"}
        for keep, stroke in strokes.items()
    ]
    entries = [{"linestyle": "-", "marker": "o", "markersize": 4} | look for look in looks.values()]
    figure, (sizes, alphas) = framed(
        study_sentence(rows, score),
        title,
        columns=2,
        height=2.7,
        legend=[*entries, *(of_keeps if len(keeps) > 1 else [])],
        sharey=True,
    )
    factor = 100 if unit(score) else 1
    for keep, stroke in strokes.items():
        at = [r for r in rows if r["keep"] == keep and r["selector"] == "wanda"]
        look = {"linestyle": stroke, "marker": "o", "markersize": 4}
        for variant in ("grail", "ours"):
            points = (
                (int(r["samples"]), factor * float(r[score])) for r in at if r["variant"] == variant
            )
            line(sizes, points, **look, **looks[variant])
        for variant, suffix in (("grail", ""), ("baseline", " toward baseline")):
            points = (
                (
                    float(r["variant"].removeprefix("alpha=").removesuffix(suffix)),
                    factor * float(r[score]),
                )
                for r in at
                if r["variant"].startswith("alpha=")
                and r["variant"].endswith("baseline") == bool(suffix)
            )
            line(alphas, points, **look, **looks[variant])
    numbers = sorted({int(r["samples"]) for r in rows if r["variant"] == "ours"})
    sizes.set(xscale="log", xlabel="calibration samples", title="Amount of data")
    sizes.set_ylabel(f"{score}{', %' * bool(unit(score))}")
    number_axis(sizes.xaxis, numbers[:: 1 if len(numbers) < 6 else 2])
    alphas.set(xscale="log", xlabel="ridge strength α", title="Ridge strength (the paper: 0.001)")
    number_axis(alphas.xaxis, decades(1e-6, 0.1), "{:g}".format)
    for panel in (sizes, alphas):
        panel.grid(axis="y")
    return figure


def keep_ratios(rows: list[Row], _: str) -> Any:
    """Draws perplexity against keep ratio, in the calibration's domain and off: `levers`."""
    values = {
        (row["text"], row["lever"], float(row["keep"])): float(row["perplexity"])
        for row in rows
        if (row["calibration"], row["sequences"], row["sites"]) == (*KEEP_RATIOS, "mlp")
    }
    dense = {row["text"]: float(row["perplexity"]) for row in rows if row["lever"] == DENSE}
    keeps = sorted({keep for _, lever, keep in values if lever in LEVERS})
    levers = {
        lever: look for lever, look in LEVERS.items() if any(of == lever for _, of, _ in values)
    }

    def back(text: str, lever: str, keep: float) -> float | None:
        pruned, restored = (values.get((text, of, keep)) for of in (PRUNED, lever))
        if pruned is None or restored is None:
            return None
        return recovered(dense[text], pruned, restored)

    found_shares = (
        (back(TEXTS[0], DEFAULTS, HALF), "of the loss on text like the calibration's"),
        (back(TEXTS[1], DEFAULTS, HALF), "on other text"),
        (back(TEXTS[1], BROAD, HALF), "there if channels are selected on many kinds"),
    )
    recoveries = (f"{share:.0%} {where}" for share, where in found_shares if share is not None)
    of_dense = {"color": drawing.DENSE, "linestyle": ":", "label": "dense network"}
    join = {"linestyle": "-", "markersize": 5}
    figure, panels = framed(
        f"With half of the channels GRAIL recovers {', '.join(recoveries)}",
        "SmolLM2-135M, MLPs; calibrated on 16k tokens of a Python reference; "
        "loss: log-perplexity that plain pruning adds",
        columns=2,
        height=2.9,
        legend=[*(join | look for look in levers.values()), of_dense],
        sharey=True,
    )
    titles = ("Read on the Python reference", "Read on Brown, another kind of text")
    for panel, text, title in zip(panels, TEXTS, titles, strict=True):
        panel.axhline(dense[text], **of_dense)
        for lever, look in levers.items():
            points = ((k, v) for (t, of, k), v in values.items() if (t, of) == (text, lever))
            line(panel, points, **join | look)
        panel.set(title=title, xlabel="channels kept of each MLP", yscale="log")
        number_axis(panel.xaxis, keeps, "{:.0%}".format)
        if len(keeps) < 4:
            panel.set_xlim(keeps[0] - 0.05, keeps[-1] + 0.05)
        top = max(value for (_, lever, _), value in values.items() if lever in LEVERS)
        number_axis(panel.yaxis, decades(min(dense[text] for text in TEXTS), top, (1, 2, 3, 5)))
        panel.grid(axis="y")
    panels[0].set_ylabel("perplexity, held-out text")
    return figure


def calibration(rows: list[Row], _: str) -> Any:
    """Draws perplexity against α, by the amount of text and the ridge's target: `endtoend`."""
    at = {
        (r["toward"], int(r["calibration_tokens"]), float(r["alpha"])): r
        for r in rows
        if r["alpha"]
    }
    lengths = sorted({length for _, length, _ in at})
    colours = dict(zip(lengths, (drawing.OTHER, drawing.FURTHER, drawing.OURS), strict=False))
    length, alpha = max((of, a) for toward, of, a in at if toward == "zero")
    ends = (float(at[toward, length, alpha]["perplexity_brown"]) for toward in ("zero", "baseline"))
    zero, baseline = (f"{value:.1f}" for value in ends)
    least = min(float(r["perplexity_brown"]) for r in at.values())
    figure, panels = framed(
        f"A ridge toward the baseline allows a large α: at α = {alpha:g} perplexity on Brown is "
        f"{baseline}, toward zero {zero}; the best of all is {least:.1f}",
        "SmolLM2-135M, half of the channels of each MLP, Wanda; 8k to 128k tokens of Brown",
        columns=2,
        legend=[
            *(
                {"color": colour, "linestyle": "-", "label": f"{of // 1024}k tokens"}
                for of, colour in colours.items()
            ),
            {"color": drawing.MUTED, "linestyle": "-", "marker": "o", "label": "toward baseline"},
            {"color": drawing.MUTED, "linestyle": ":", "marker": "x", "label": "toward zero"},
        ],
    )
    domains = (("brown", "Read on Brown, as calibrated"), ("python", "Read on a Python reference"))
    for panel, (text, title) in zip(panels, domains, strict=True):
        for of, colour in colours.items():
            for toward, stroke, marker in (("baseline", "-", "o"), ("zero", ":", "x")):
                points = (
                    (a, float(r[f"perplexity_{text}"]))
                    for (t, tokens, a), r in at.items()
                    if (t, tokens) == (toward, of)
                )
                line(panel, points, color=colour, linestyle=stroke, marker=marker, markersize=5)
        panel.set(title=title, xlabel="ridge strength α", xscale="log")
        number_axis(panel.xaxis, decades(1e-6, 0.1), "{:g}".format)
        panel.grid(axis="y")
    panels[0].set_ylabel("perplexity, held-out text")
    return figure


def serving(rows: list[Row], _: str) -> Any:
    """Draws perplexity against decode speed, a marker for each format and colour for each model."""
    rows = [row for row in rows if row.get("decode_1") and row.get("perplexity")]
    names = list(dict.fromkeys(row["model"] for row in rows))
    formats = list(dict.fromkeys(row["format"] for row in rows))
    by_file = {(row["model"], row["format"]): row for row in rows}
    own, dense = by_file.get(("uneven 0.5", "Q4_1 by grail")), by_file.get(("dense", "Q4_1"))
    finding = "Perplexity against decode speed"
    if own and dense:
        finding = (
            "Half of each MLP, uneven widths, Q4_1 by grail: decodes "
            f"{float(own['decode_1_ratio']):.2f}× as fast as dense Q4_1, with perplexity "
            f"{float(own['perplexity']):.1f} instead of {float(dense['perplexity']):.1f}"
        )
    threads = "/".join(sorted({row["speed_threads"] for row in rows}))
    looks = dict(zip(formats, MARKERS, strict=False))
    figure, (panel,) = framed(
        finding,
        f"SmolLM2-135M in llama.cpp, {threads} thread; held-out {rows[0]['text']} text; "
        "right and down is better",
        height=3.8,
        legend=[
            {"color": drawing.MUTED, "marker": marker, "label": name}
            for name, marker in looks.items()
        ],
    )
    palette = (drawing.DENSE, drawing.PRUNED, drawing.OURS, drawing.PAPER, drawing.FURTHER)
    colours = dict(zip(names, palette, strict=False))
    labels = {}
    for name in names:
        ours = [row for row in rows if row["model"] == name]
        points = [(float(row["decode_1"]), float(row["perplexity"])) for row in ours]
        line(panel, points, color=colours[name], linewidth=0.8, alpha=0.5)
        for row, point in zip(ours, points, strict=True):
            panel.plot(*point, looks[row["format"]], color=colours[name])
        labels[name] = max(points)
    panel.set(xlabel="decode speed of one sequence, tokens per second", ylabel="perplexity")
    panel.margins(x=0.1)
    panel.grid()
    drawing.name_lines(panel, labels, colours)
    return figure
