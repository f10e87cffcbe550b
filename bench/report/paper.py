"""The page "The paper's tables, here": its figures beside those of the committed CSV files.

    python -m bench.report.paper     writes docs/paper.md

The text of the page is in bench/report/paper.md.j2. Every number comes from a CSV of bench/results
or, as the paper reports it, from bench/report/paper.csv; a row that is missing is "not measured".
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.quality import paper as bench
from bench.quality.endtoend import LENGTH, MODELS
from bench.quality.sweep import SEQUENCES, StudyRow
from bench.report.networks import NETWORKS, RIDGE, VARIANTS, number, share
from bench.tools.commandline import CommandLine
from bench.tools.measuring import RESULTS, ROOT, Row, Table
from bench.tools.pages import fill
from bench.tools.tables import markdown

PAGE = ROOT / "docs" / "paper.md"
TEMPLATE, REPORTED = (Path(__file__).with_name(f"paper.{suffix}") for suffix in ("md.j2", "csv"))
MISSING, UNSAID = "not measured", "–"
AS_SAID = "reported"  # the score of a perplexity that is shown as the paper does
LLAMA = "llama-2-7b"
BLOCKS, PAPERS_LENGTH = 32, 2048  # of Llama-2-7B, and tokens of a calibration sample
# Of the table of strengths: the columns of other networks, with their keep ratio and samples.
STUDIED = {"smollm2": 16, "resnet18": 512, "vit": 512, "minilm": 512}
SIZES = {"resnet18": (32, 128, 512, 2048), "vit": (32, 128, 512, 2048), "minilm": (32, 128, 512)}
KEEPS, _VISION_KEEPS = (0.8, 0.7, 0.5), (0.5, 0.3)
SWEPT = {"smollm2": (KEEPS, bench.SELECTORS), "vit": (_VISION_KEEPS, bench.CLIP_SELECTORS)}


class Results:
    """The rows of a folder of CSV files; a file that is missing has none."""

    def __init__(self, folder: Path = RESULTS):
        self.rows = functools.cache(lambda name: Table(folder / f"{name}.csv", ()).rows)

    def value(self, name: str, column: str, **key: Any) -> float | None:
        """The value of the only row whose columns equal `key`; None without one.

        Raises:
            ValueError: several rows with different values.
        """
        found = {row[column] for row in self.rows(name) if _is(row, key)}
        if len(found) > 1:
            raise ValueError(f"{name}.csv has {len(found)} values of {column} for {key}")
        return float(found.pop()) if found else None

    def measured(self, name: str, rows: Iterable[StudyRow], samples: int) -> str:
        """The count of a bench's rows that are there, "24 of 36"."""
        keys = [
            {"selector": s, "keep": keep, "variant": variant, "samples": n or samples}
            for s, keep, variant, _, n in rows
        ]
        there = sum(any(_is(row, key) for row in self.rows(name)) for key in keys)
        return f"{there} of {len(keys)}"


def _is(row: Row, key: dict[str, Any]) -> bool:
    return all(_equal(row.get(column, ""), value) for column, value in key.items())


def _equal(text: str, value: Any) -> bool:
    if isinstance(value, str):
        return text == value
    return text.replace(".", "", 1).isdecimal() and float(text) == value


class Page:
    """The parts of the page; each returns Markdown."""

    def __init__(self, results: Results | None = None):
        self.results = results or Results()
        self._paper = Results(REPORTED.parent)

    def text(self) -> str:
        """The whole page."""
        return fill(TEMPLATE, page=self, bench=bench, llama=LLAMA)

    def said(self, setting: str, metric: str = "perplexity", **key: Any) -> float | None:
        """A figure of the paper."""
        key = {"network": LLAMA, **key}
        return self._paper.value("paper", "value", setting=setting, metric=metric, **key)

    def said_dense(self) -> str:
        """The paper's accuracy of its dense ResNet-18."""
        key = {"network": "resnet18", "selector": bench.L1, "sparsity": 0}
        return f"{_shown('accuracy', self.said('dense', 'accuracy', **key))}%"

    def inventory(self) -> str:
        """A table of experiments: rows measured, and the command that measures the rest."""
        parts = {
            name: self.results.measured(
                f"paper_{'samples' if name == 'samples' else 'smollm2'}", rows(), bench.SEQUENCES
            )
            for name, rows in bench.PARTS.items()
        }
        resnet = self.results.measured("paper_resnet18", bench.resnet_rows(), 512)
        clip = self.results.measured("paper_clip", bench.clip_rows(), 512)
        designs = [*itertools.product(bench.COSTED, bench.DESIGNS)]
        costs = f"{sum(of in self._cost_rows() for of in designs)} of {len(designs)}"
        lines = [
            ("LLaMA-2-7B by selector, sparsity", "SmolLM2, MLP", *self._swept("smollm2")),
            ("", "SmolLM2, MLP and heads", "paper cells", parts["cells"]),
            ("", "all other selectors", "paper others", parts["others"]),
            ("α at 40%", "SmolLM2, MLP and heads", "paper alphas", parts["alphas"]),
            ("calibration samples", "4 to 256 sequences", "paper samples", parts["samples"]),
            ("ResNet-18, L1; REPAIR, fine-tuning", "ResNet-18", "paper resnet18", resnet),
            ("ViT", "ViT, MLP", *self._swept("vit")),
            ("CLIP", "a small CLIP trained here", "paper clip", clip),
            ("time and memory", "ResNet-18, ViT, CLIP", "paper cost", costs),
        ]
        header = ["experiment of the paper", "here", "`python -m bench.quality.…`", "rows"]
        return markdown(header, [[a, b, f"`{command}`", there] for a, b, command, there in lines])

    def _swept(self, name: str) -> tuple[str, str]:
        """The command of `sweep` for a network's rows on this page, and how many are there."""
        keeps, selectors = SWEPT[name]
        cells = itertools.product(keeps, selectors, bench.SHOWN)
        rows: list[StudyRow] = [(s, keep, variant, {}, 0) for keep, s, variant in cells]
        shares = ",".join(f"{keep:g}" for keep in keeps)
        command = f"sweep {name} --keep {shares} --only {','.join(selectors)}"
        return command, self.results.measured(f"selectors_{name}", rows, STUDIED[name])

    def helped(self) -> str:
        """How often each variant is no worse than the selector alone, by network."""
        lines = []
        for name, (title, score, _) in NETWORKS.items():
            rows = self.results.rows(f"selectors_{name}")
            values = {(r["selector"], r["keep"], r["variant"]): float(r[score]) for r in rows}
            sign = -1 if score == "perplexity" else 1
            cells = []
            for variant in ("grail", "ours"):
                pairs = [
                    (sign * values[s, k, "own"], sign * value)
                    for (s, k, v), value in values.items()
                    if v == variant and s != RIDGE and (s, k, "own") in values
                ]
                cells.append(f"{sum(b >= a for a, b in pairs)} of {len(pairs)}")
            if rows:
                selectors = {s for s, _, v in values if v == "grail" and s != RIDGE}
                lines.append([title, str(len(selectors)), *cells])
        return markdown(["network", "selectors", "the paper's way", "defaults"], lines)

    def overhead(self) -> str:
        """Seconds of whole runs of SmolLM2 as multiples of the bare forward passes."""
        bare, *totals = (
            self.results.value("calibrate_cpu", "p50", design=design, metric=metric)
            for design, metric in (
                ("", "bare forward"),
                *((design, "total") for design in bench.DESIGNS),
            )
        )
        ratios = (None if bare is None or t is None else t / bare for t in totals)
        return " and ".join(MISSING if ratio is None else f"{ratio:.1f}×" for ratio in ratios)

    def llama(self) -> str:
        """The paper's table, beside SmolLM2 with narrow MLPs, and with heads removed as well."""
        lines = []
        for selector in bench.SELECTORS:
            for keep in KEEPS:
                sparsity = round(1 - keep, 2)
                key = {"selector": selector, "sparsity": sparsity}
                papers = [self.said(setting, **key) for setting in ("pruned", "grail")]
                if papers == [None, None]:
                    continue
                lines.append(
                    [
                        *(selector, f"{sparsity:.0%}"),
                        _arrow(AS_SAID, self.said("dense"), papers, missing=UNSAID),
                        self.cell("selectors_smollm2", "perplexity", selector, keep, 16),
                        self.cell(
                            *("paper_smollm2", f"perplexity_{bench.CALIBRATED}"),
                            *(selector, keep, bench.SEQUENCES),
                        ),
                    ]
                )
        header = ["selector", "sparsity", "the paper", "MLP", "MLP and heads"]
        return markdown(header, lines)

    def cell(self, name: str, column: str, selector: str, keep: float, samples: int) -> str:
        """The selector alone → in the paper's way → with the defaults, with shares."""
        dense = self.results.value(name, column, selector="", variant="dense")
        values = [
            self.results.value(
                name, column, selector=selector, keep=keep, variant=variant, samples=samples
            )
            for variant in bench.SHOWN
        ]
        score = column.partition("_")[0]
        return _arrow(score, dense, values, ridge=selector == RIDGE)

    def brown(self) -> str:
        """MLPs, heads and both on Brown: pruned by Wanda → Wanda in the paper's way → defaults."""
        file, text = "smollm2_table", {"text": "brown"}
        dense = self.results.value(file, "perplexity", model="dense", **text)
        kinds = ("mlp", "heads", "mlp,heads")
        lines = []
        for keep in (0.9, 0.8, 0.7, 0.6, 0.5):
            cells = []
            for sites in kinds:
                key = {"sites": sites, "keep": keep, **text}
                values = [
                    self.results.value(file, "perplexity", model=model, **key) for model in MODELS
                ]
                cells.append(_arrow("perplexity", dense, values, missing=UNSAID))
            lines.append([f"{1 - keep:.0%}", *cells])
        return markdown(["sparsity", *(kind.replace(",", " and ") for kind in kinds)], lines)

    def others(self) -> str:
        """MLP and heads with the selectors of which the paper has no perplexity."""
        selectors = dict.fromkeys(row[0] for row in bench.others())
        return _table(
            ["selector", *(f"read on {text}" for text in bench.READ)],
            [[selector, *self._read(selector, bench.OTHERS_AT)] for selector in selectors],
        )

    def _read(self, selector: str, keep: float) -> list[str]:
        of = (selector, keep, bench.SEQUENCES)
        return [self.cell("paper_smollm2", f"perplexity_{text}", *of) for text in bench.READ]

    def domains(self) -> str:
        """Sparsities up to 70%, read on the calibration's kind of text and on another."""
        lines = [
            [selector, f"{1 - keep:.0%}", *self._read(selector, keep)]
            for keep in sorted(bench.CELLS, reverse=True)
            for selector in bench.SELECTORS
        ]
        header = ["selector", "sparsity", *(f"read on {text}" for text in bench.READ)]
        return _table(header, lines, words=2)

    def losses(self) -> str:
        """The cells that the paper reports as worse with GRAIL."""
        cells: dict[tuple[str, str], list[str]] = {}
        for row in self._paper.rows("paper"):
            if row["metric"] == "losses":
                of = cells.setdefault((row["selector"], row["setting"]), [])
                of.append(f"{float(row['sparsity']):.0%}")
        return "; ".join(
            f"{selector} {setting} at {', '.join(of)}" for (selector, setting), of in cells.items()
        )

    def strengths(self) -> str:
        """Scores by α toward zero; last, α and target as the defaults choose them."""
        lines = []
        for alpha in bench.ALPHAS:
            variant = f"alpha={alpha:g}"
            papers = (
                self.said(variant, selector=selector, sparsity=0.4) for selector in bench.SWEPT
            )
            heads = (self._at(selector, variant) for selector in bench.SWEPT)
            lines.append(
                [
                    f"{alpha:g}",
                    *(_shown(AS_SAID, value, UNSAID) for value in papers),
                    *(_shown("perplexity", value) for value in heads),
                    *self._studies(variant),
                ]
            )
        chosen = [_shown("perplexity", self._at(selector, "ours")) for selector in bench.SWEPT]
        lines.append(["defaults", UNSAID, UNSAID, *chosen, *self._studies("ours")])
        networks = [f"{name}, {NETWORKS[name][1]}" for name in STUDIED]
        titles = [f"{of}: {s}" for of in ("paper", "MLP and heads") for s in bench.SWEPT]
        return markdown(["α", *titles, *networks], lines)

    def _at(self, selector: str, variant: str) -> float | None:
        key = {"selector": selector, "variant": variant, "keep": bench.SWEPT_AT}
        column = f"perplexity_{bench.CALIBRATED}"
        return self.results.value("paper_smollm2", column, samples=bench.SEQUENCES, **key)

    def _sized(self, selector: str, variant: str, samples: int) -> float | None:
        key = {"selector": selector, "variant": variant, "keep": bench.SWEPT_AT}
        column = f"perplexity_{bench.SIZED}"
        return self.results.value("paper_samples", column, samples=samples, **key)

    def _studies(self, variant: str) -> list[str]:
        found = []
        for name, samples in STUDIED.items():
            score = NETWORKS[name][1]
            key = {"selector": "wanda", "keep": 0.5, "variant": variant, "samples": samples}
            found.append(_shown(score, self.results.value(f"studies_{name}", score, **key)))
        return found

    def price(self) -> str:
        """The increase of the perplexity at α = 1e-3 over the best of the table, in percent."""

        def percent(values: list[float | None]) -> str:
            there = [value for value in values if value is not None]
            if values[bench.ALPHAS.index(1e-3)] is None or len(there) < len(values):
                return MISSING
            return f"{values[bench.ALPHAS.index(1e-3)] / min(there) - 1:.1%}"

        names = [f"alpha={alpha:g}" for alpha in bench.ALPHAS]
        key = {"selector": "wanda", "keep": 0.5, "samples": STUDIED["smollm2"]}
        papers = [self.said(name, selector="wanda", sparsity=0.4) for name in names]
        mlps = [
            self.results.value("studies_smollm2", "perplexity", variant=name, **key)
            for name in names
        ]
        heads = [self._at("wanda", name) for name in names]
        return (
            f"the paper {percent(papers)}; SmolLM2, MLP at 50% {percent(mlps)}; "
            f"MLP and heads at 40% {percent(heads)}"
        )

    def off_domain(self) -> str:
        """The best α of another text than the calibration's, beside that of its own kind."""
        rows = [r for r in self.results.rows("smollm2_calibration") if r["toward"] == "baseline"]
        lines = []
        for tokens in sorted({int(row["calibration_tokens"]) for row in rows}):
            of = [row for row in rows if int(row["calibration_tokens"]) == tokens]
            line = [f"{tokens:,}"]
            for text in ("brown", "python"):
                best = min(of, key=lambda row: float(row[f"perplexity_{text}"]))
                line.append(f"{best['alpha']} ({float(best[f'perplexity_{text}']):.1f})")
            lines.append(line)
        header = ["tokens of Brown", "best α on Brown (perplexity)", "best α on Python's reference"]
        return markdown(header, lines) if lines else f"{MISSING.capitalize()}."

    def sequences(self) -> str:
        """Perplexity of MLP and heads by calibration tokens."""
        wanda = f"alpha={bench.ALPHAS[0]:g}"
        lines = []
        for count in sorted({*bench.SIZES, bench.SEQUENCES}):
            tokens = count * LENGTH
            name = f"samples={tokens // PAPERS_LENGTH}"
            papers = self.said(name, selector="wanda", sparsity=0.4)
            rows = (("wanda", wanda), ("greedy", "ours"))
            line = [_shown("perplexity", self._sized(*of, count)) for of in rows]
            key = {"selector": "wanda", "keep": 0.5, "samples": count}
            for variant in ("grail", "ours"):
                value = self.results.value("studies_smollm2", "perplexity", variant=variant, **key)
                line.append(_shown("perplexity", value, MISSING if count in SEQUENCES else UNSAID))
            lines.append([f"{tokens:,}", _shown(AS_SAID, papers, UNSAID), *line])
        header = ["tokens", "the paper", f"MLP and heads at 40%: wanda, α = {bench.ALPHAS[0]:g}"]
        header += ["defaults", "MLP at 50%: wanda, α = 0.001", "wanda, defaults"]
        return markdown(header, lines)

    def images(self) -> str:
        """Scores of the other networks by calibration samples, Wanda at 50%."""
        counts = sorted(set().union(*SIZES.values()))
        lines = []
        for name in SIZES:
            score = NETWORKS[name][1]
            for variant in ("grail", "ours"):
                key = {"selector": "wanda", "keep": 0.5, "variant": variant}
                values = (
                    self.results.value(f"studies_{name}", score, samples=count, **key)
                    for count in counts
                )
                cells = [_shown(score, value) for value in values]
                lines.append([f"{name}, {score}", VARIANTS[variant], *cells])
        return markdown(["network", "way", *(f"{count} samples" for count in counts)], lines)

    def resnet(self) -> str:
        """Accuracy of ResNet-18 by sites and keep ratio; REPAIR and fine-tuning beside them."""
        variants = [*bench.references(), bench.TRAINED]
        lines = self._resnet_said(variants)
        for suffix, sites in (("", "inside blocks"), (bench.STREAM, "with the stream")):
            for keep in bench.RESNET_KEEPS:
                values = (
                    self.results.value(
                        *("paper_resnet18", "accuracy"),
                        selector=bench.L1,
                        keep=keep,
                        variant=f"{variant}{suffix}",
                    )
                    for variant in variants
                )
                row = [_shown("accuracy", value) for value in values]
                if keep != bench.TRAINED_AT:
                    row[-1] = UNSAID
                lines.append([sites, f"{1 - keep:.0%}", *row])
        return markdown(["sites", "sparsity", *map(_named, variants)], lines)

    def _resnet_said(self, variants: Sequence[str]) -> list[list[str]]:
        """The paper's rows, by its sparsities; its way is the open loop."""
        lines = []
        for sparsity in ("high", 0.5):
            key = {"network": "resnet18", "selector": bench.L1, "sparsity": sparsity}
            said = {"own": "pruned", "grail, open loop": "grail", "own, REPAIR": "REPAIR"}
            said |= {bench.TRAINED: "five epochs"}
            values = (self.said(said.get(variant, ""), "accuracy", **key) for variant in variants)
            title = sparsity if isinstance(sparsity, str) else f"{sparsity:.0%}"
            cells = (_shown("accuracy", value, UNSAID) for value in values)
            lines.append(["the paper, with the stream", title, *cells])
        return lines

    def vision(self, name: str, file: str) -> str:
        """Accuracy of a transformer on images by selector."""
        lines = [
            [
                selector,
                *(self.cell(file, "accuracy", selector, k, STUDIED["vit"]) for k in _VISION_KEEPS),
            ]
            for selector in bench.CLIP_SELECTORS
        ]
        return _table([name, *(f"{1 - keep:.0%}" for keep in _VISION_KEEPS)], lines)

    def dense(self, name: str, score: str = "accuracy") -> str:
        """The score of a dense network, in percent."""
        value = self.results.value(name, score, selector="", variant="dense")
        return MISSING if value is None else f"{_shown(score, value)}%"

    def _cost_rows(self) -> dict[tuple[str, str], Row]:
        return {(row["network"], row["design"]): row for row in self.results.rows("paper_cost")}

    def costs(self) -> str:
        """Seconds and peaks beside the paper's; Llama-2-7B from blocks of its shape on a GPU."""
        lines = [
            [f"{name}: the paper", *self._papers_costs(name)] for name in (*bench.COSTED, LLAMA)
        ]
        for name, design in itertools.product(bench.COSTED, bench.DESIGNS):
            lines.append([f"{name} here: {design} recipe", *self._costs(name, design)])
        for (title, *of), design in itertools.product(
            (
                ("SmolLM2", "calibrate_cpu", "smollm2-135m"),
                (f"{LLAMA} by shape", "gpu/calibrate", LLAMA),
            ),
            bench.DESIGNS,
        ):
            lines.append([f"{title} here: {design} recipe", *self._whole(*of, design)])
        lines.append([f"{LLAMA} by count here: default recipe", *self._simulated()])
        return _table(["network", "calibrate", "compensate", "peak memory"], lines)

    def _papers_costs(self, name: str) -> list[str]:
        seconds = [self.said(part, "s", network=name) for part in bench.PHASES]
        peak = self.said("peak", "MB", network=name)
        return [*(f"{value:.2f} s" for value in seconds), f"{peak:,.0f} MB"]

    def _costs(self, name: str, design: str) -> list[str]:
        if (row := self._cost_rows().get((name, design))) is None:
            return [MISSING] * 3
        seconds = (f"{float(row[f'{part}_s']):.2f} s" for part in bench.PHASES)
        parts = ("added_measured_peak_bytes", "weights_bytes", "inputs_bytes")
        return [*seconds, f"{sum(float(row[part]) for part in parts) / 1e6:,.0f} MB"]

    def _simulated(self) -> list[str]:
        """The seconds that FLOPs of a whole run take at assumed rates of a GPU; its peak there."""
        of = {"model": LLAMA, "simulated on": "assumed H100 rates"}
        if not (rows := [row for row in self.results.rows("simulated") if _is(row, of)]):
            return [MISSING] * 3
        parts = (("forward_s", "gram_s"), ("select_s", "solve_s"))
        seconds = (sum(float(rows[0][part]) for part in phase) for phase in parts)
        peak = float(rows[0]["device_peak_bytes"]) / 1e6
        tokens = int(rows[0]["tokens"])
        return [*(f"{value:.1f} s, {tokens:,} tokens" for value in seconds), f"{peak:,.0f} MB"]

    def _whole(self, name: str, model: str, design: str) -> list[str]:
        """The costs of a whole model; if fewer blocks were run, times scaled to all of them."""
        of = [row for row in self.results.rows(name) if row["model"] == model]
        # Files without a column of designs are of the defaults.
        ours = {row["metric"]: row for row in of if row.get("design", "default") == design}
        if not ours:
            return [MISSING] * 3
        blocks = int(ours["total"]["blocks"])
        scale = BLOCKS / blocks if model == LLAMA else 1
        note = f", {blocks} of {BLOCKS} blocks × {scale:g}" if scale != 1 else ""
        seconds = (
            scale * sum(float(ours[p]["p50"]) for p in parts) for parts in bench.PHASES.values()
        )
        peak = float(ours["measured_peak"]["p50"]) / 1e6
        only = f" ({blocks} blocks)" if scale != 1 else ""
        return [*(f"{value:.1f} s{note}" for value in seconds), f"{peak:,.0f} MB{only}"]


def _named(variant: str) -> str:
    """A variant of a bench in words: of what, and what is added."""
    of, comma, more = variant.partition(", ")
    names = {"own": "pruned", "grail": "the paper's way", "ours": "defaults"}
    return names[of] + comma + more


def _shown(score: str, value: float | None, missing: str = MISSING) -> str:
    if value is None:
        return missing
    return f"{value:.2f}" if score == AS_SAID else number(score, value)


def _table(header: Sequence[str], lines: Iterable[Sequence[str]], words: int = 1) -> str:
    """The lines with a measured cell after the first `words`, and the names of all others."""
    kept, missing = [], []
    for line in lines:
        (missing if set(line[words:]) <= {MISSING, UNSAID} else kept).append(line)
    names = ", ".join(" ".join(line[:words]) for line in missing)
    parts = [markdown(header, kept)] if kept else []
    parts += [f"{MISSING.capitalize()}: {names}."] if missing else []
    return "\n\n".join(parts)


def _arrow(
    score: str,
    dense: float | None,
    values: Sequence[float | None],
    ridge: bool = False,
    missing: str = MISSING,
) -> str:
    """Values joined by arrows, each after the first with the share that it recovers.

    Args:
        ridge: whether the first has a ridge of its own, beside which a share says nothing.
    """
    if all(value is None for value in values):
        return missing
    pruned, *restored = values
    parts = [_shown(score, pruned, missing)]
    for value in restored:
        back = None
        if not ridge and dense is not None and pruned is not None and value is not None:
            back = share("perplexity" if score == AS_SAID else score, dense, pruned, value)
        parts.append(_shown(score, value, missing) + ("" if back is None else f" ({back:.0%})"))
    return " → ".join(parts)


def main(arguments: list[str] | None = None) -> None:
    """Writes the page."""
    CommandLine(__doc__, writes="docs/paper.md", takes="a second").read(arguments)
    PAGE.write_text(Page().text(), encoding="utf-8")


if __name__ == "__main__":
    main()
