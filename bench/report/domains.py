"""The page "In the calibration's domain and off it", from bench/results/levers.csv alone.

    python -m bench.report.domains     writes docs/domains.md

The text of the page is in bench/report/domains.md.j2.
"""

from collections.abc import Callable, Sequence
from typing import Any

from bench.quality import levers
from bench.tools.commandline import CommandLine
from bench.tools.measuring import RESULTS, ROOT, Row, Table
from bench.tools.pages import fill
from bench.tools.tables import markdown
from grail.report.paired import is_worse

PAGE = ROOT / "docs" / "domains.md"
TEMPLATE = ROOT / "bench" / "report" / "domains.md.j2"


class Page:
    """The parts of the page; each returns Markdown."""

    def __init__(self, rows: Sequence[Row]):
        self._rows = list(rows)
        self._found = {
            tuple(row[key] for key in levers.KEY): row for row in levers.comparisons(self._rows)
        }

    def text(self) -> str:
        """The whole page."""
        return fill(TEMPLATE, page=self, levers=levers)

    def share(self, calibration: str, sequences: int, lever: str, text: str) -> str:
        """The recovered share of a lever and its standard error; "not measured" without rows."""
        row = self._found.get((calibration, str(sequences), lever, text))
        known = row is not None and row["share"] is not None
        return levers.percent(row["share"]) if known else "not measured"

    def perplexity(self, calibration: str, sequences: int, lever: str, text: str) -> str:
        """The perplexity of a lever; "not measured" without a row."""
        row = self._found.get((calibration, str(sequences), lever, text))
        return "not measured" if row is None else f"{float(row['perplexity']):.1f}"

    def worse(self) -> str:
        """How many cells are worse than plain pruning by the same calibration, of how many."""
        losses = {
            key: [float(loss) for loss in row["losses"].split()] for key, row in self._found.items()
        }
        pairs = [
            (own, losses[calibration, sequences, levers.PRUNED, text])
            for (calibration, sequences, lever, text), own in losses.items()
            if lever != levers.PRUNED and (calibration, sequences, levers.PRUNED, text) in losses
        ]
        return f"{sum(is_worse(*pair) for pair in pairs)} of {len(pairs)}"

    def calibrations(self) -> str:
        """A table of the defaults on each calibration."""
        return self._table(lambda row: row["lever"] == levers.DEFAULTS, ("calibration", "tokens"))

    def levers(self, calibration: str, sequences: int) -> str:
        """A table of all levers on one calibration."""
        wanted = (calibration, str(sequences))
        return self._table(
            lambda row: (row["calibration"], row["sequences"]) == wanted, ("lever",), gains=True
        )

    def _table(
        self, wanted: Callable[[dict[str, Any]], bool], columns: Sequence[str], gains: bool = False
    ) -> str:
        lines: dict[tuple[str, ...], list[str]] = {}
        for row in filter(wanted, self._found.values()):
            named = row | {"tokens": f"{int(row['sequences'])}k"}
            cells = lines.setdefault(tuple(named[name] for name in columns), [])
            cells += [f"{float(row['perplexity']):.1f}", levers.percent(row["share"])]
            cells += [levers.signed(row["gain"])] * gains
            cells += [f"{float(row['kl']):.2f}", f"{float(row['top1']):.0%}"]
        header = list(columns)
        for text in levers.TEXTS:
            header += [f"{text}: perplexity", "share", *["gain, nats"] * gains, "KL", "top-1"]
        return markdown(header, [[*key, *cells] for key, cells in lines.items()])


def page() -> str:
    """The whole page in Markdown."""
    return Page(Table(RESULTS / "levers.csv", levers.KEY).rows).text()


def main() -> None:
    """Writes the page."""
    CommandLine(__doc__, writes="docs/domains.md", takes="a second").read()
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
