"""The pages of the documentation that quote numbers, from the committed CSV files alone.

    python -m bench.report.guides     writes README.md, docs/index.md and others

The texts are in bench/report/pages, one template a page. A number of `Numbers` without a row is
"not measured"; for those of bench/report/numbers a missing row is an error.
"""

import functools
from pathlib import Path

from bench.quality import evaluation, levers
from bench.report.domains import Page
from bench.report.numbers.adapters import Adapters
from bench.report.numbers.kernels import Kernels
from bench.report.numbers.readme import Readme
from bench.report.numbers.reliability import Reliability
from bench.report.numbers.scale import Scale
from bench.report.numbers.serving import Serving
from bench.tools import texts
from bench.tools.commandline import CommandLine
from bench.tools.measuring import RESULTS, ROOT, Row, read_rows
from bench.tools.pages import fill
from bench.tools.tables import markdown
from grail.report.report import recovered
from grail.serving import gguf_check, onnx_check, vllm_check

TEMPLATES = ROOT / "bench" / "report" / "pages"
PAGES = {
    path.relative_to(TEMPLATES).with_suffix("").as_posix(): path
    for path in sorted(TEMPLATES.rglob("*.md.j2"))
}
MISSING = "not measured"
KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)
SEQUENCES = (4, 16, 64)
OURS, PAPER, PRUNED = "restored", "paper", "pruned"


class Numbers:
    """Measured values in words, by what was measured."""

    def __init__(self) -> None:
        self._table = {
            (row["text"], row["sites"], float(row["keep"]), row["model"]): row
            for row in read_rows(RESULTS / "smollm2_table.csv")
        }
        self._studies = read_rows(RESULTS / "studies_smollm2.csv")
        self._seconds = {
            row["design"]: float(row["p50"])
            for row in read_rows(RESULTS / "calibrate_cpu.csv")
            if row["metric"] in ("bare forward", "total")
        }
        self.domains = Page(read_rows(RESULTS / "levers.csv"))

    def row(self, text: str, keep: float, model: str, sites: str = "mlp") -> Row | None:
        """Returns the row of a compressed SmolLM2-135M; of the dense one with the keep 1."""
        return self._table.get((text, "" if keep == 1 else sites, keep, model))

    def perplexity(self, text: str, keep: float, model: str, sites: str = "mlp") -> str:
        """Returns the perplexity on held-out text, "17.2"."""
        row = self.row(text, keep, model, sites)
        return MISSING if row is None else f"{float(row['perplexity']):.1f}"

    def share(self, text: str, keep: float, model: str, sites: str = "mlp") -> str:
        """Returns the share of the log-perplexity lost by plain pruning that is back, "80%"."""
        rows = (
            self.row(text, 1, "dense"),
            self.row(text, keep, PRUNED, sites),
            self.row(text, keep, model, sites),
        )
        known = [float(row["perplexity"]) for row in rows if row is not None]
        share = recovered(*known) if len(known) == len(rows) else None
        return MISSING if share is None else f"{share:.0%}"

    def parameters(self, text: str, keep: float, sites: str = "mlp") -> str:
        """Returns the share of the parameters that stays, "70%"."""
        dense, row = self.row(text, 1, "dense"), self.row(text, keep, PRUNED, sites)
        if dense is None or row is None:
            return MISSING
        return f"{int(row['parameters']) / int(dense['parameters']):.0%}"

    def cell(self, text: str, keep: float, model: str, sites: str = "mlp") -> str:
        """Returns perplexity and share, "17.2 (80%)"."""
        shown = self.perplexity(text, keep, model, sites)
        return shown if shown == MISSING else f"{shown} ({self.share(text, keep, model, sites)})"

    def by_keep(self, text: str, sites: str = "mlp") -> str:
        """Returns the table of keep ratios of one text."""
        rows = [
            [
                f"{keep:g}",
                self.parameters(text, keep, sites),
                self.perplexity(text, keep, PRUNED, sites),
                self.cell(text, keep, PAPER, sites),
                self.cell(text, keep, OURS, sites),
            ]
            for keep in KEEPS
            if self.row(text, keep, PRUNED, sites) is not None
        ]
        return markdown(["keep", "parameters", "pruned", "the paper's way", "grail"], rows)

    def by_tokens(self) -> str:
        """Returns the table of calibration sizes: Wanda at half of the channels, one text."""
        found = {
            (row["samples"], row["variant"]): row["perplexity"]
            for row in [*self._studies, *read_rows(RESULTS / "selectors_smollm2.csv")]
            if (row["selector"], float(row["keep"])) == ("wanda", 0.5)
        }
        rows = [
            [f"{count}k", *(self._shown(found.get((str(count), way))) for way in ("grail", "ours"))]
            for count in SEQUENCES
        ]
        return markdown(["tokens", "the paper's way", "grail"], rows)

    @staticmethod
    def _shown(value: str | None) -> str:
        return MISSING if value is None else f"{float(value):.1f}"

    def passes(self, design: str) -> str:
        """Returns the time of a run over that of a bare forward pass, "2.55"."""
        return f"{self._seconds[design] / self._seconds['']:.2f}"


@functools.cache
def subjects() -> dict[str, object]:
    """The numbers by subject, under the names of the templates."""
    numbers = Numbers()
    return {
        "n": numbers,
        "k": Kernels(),
        "serving": Serving(),
        "reliability": Reliability(),
        "adapters": Adapters(),
        "scale": Scale(),
        "readme": Readme(numbers.domains),
        "texts": texts.TEXTS,
        "evaluation": evaluation,
        "tolerances": gguf_check.TOLERANCES,
        "onnx_tolerance": onnx_check.TOLERANCE,
        "vllm_tolerance": vllm_check.TOLERANCE,
    }


def path(name: str) -> Path:
    """Returns where a page lies: in docs/, and README.md in the checkout's folder."""
    return ROOT / name if name == "README.md" else ROOT / "docs" / name


def page(name: str) -> str:
    """One page in Markdown, by its path below docs/."""
    return fill(PAGES[name], levers=levers, **subjects())


def main() -> None:
    """Writes the pages."""
    names = ", ".join(path(name).relative_to(ROOT).as_posix() for name in PAGES)
    CommandLine(__doc__, writes=names, takes="seconds").read()
    for name in PAGES:
        path(name).parent.mkdir(parents=True, exist_ok=True)
        path(name).write_text(page(name), encoding="utf-8")


if __name__ == "__main__":
    main()
