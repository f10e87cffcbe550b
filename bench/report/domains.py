"""The page "In the calibration's domain and off it", from bench/results/levers.csv alone.

    python -m bench.report.domains     writes docs/domains.md

The text of the page is in bench/report/domains.md.j2.
"""

from collections.abc import Sequence

from bench.quality import levers
from bench.tools.commandline import CommandLine
from bench.tools.measuring import RESULTS, ROOT, Row, Table
from bench.tools.pages import fill
from bench.tools.tables import markdown

PAGE = ROOT / "docs" / "domains.md"
TEMPLATE = ROOT / "bench" / "report" / "domains.md.j2"


class Page:
    """The parts of the page; each returns Markdown."""

    def __init__(self, rows: Sequence[Row]):
        self._found = {
            tuple(row[key] for key in levers.KEY): row for row in levers.comparisons(list(rows))
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
        """The count of cells that are worse than plain pruning by their calibration, "0 of 26"."""
        cells = [row["worse"] for row in self._found.values() if row["lever"] != levers.PRUNED]
        known = [worse for worse in cells if worse is not None]
        return f"{sum(known)} of {len(known)}"

    def calibrations(self) -> str:
        """A table of the defaults on each calibration."""
        rows = [
            row | {"tokens": f"{int(row['sequences'])}k"}
            for row in self._found.values()
            if row["lever"] == levers.DEFAULTS
        ]
        return markdown(*levers.table(rows, ("calibration", "tokens"), gains=False))

    def levers(self, calibration: str, sequences: int) -> str:
        """A table of all levers on one calibration."""
        wanted = (calibration, str(sequences))
        rows = (row for key, row in self._found.items() if key[:2] == wanted)
        return markdown(*levers.table(rows, ("lever",)))


def page() -> str:
    """The whole page in Markdown."""
    return Page(Table(RESULTS / "levers.csv", levers.KEY).rows).text()


def main() -> None:
    """Writes the page."""
    CommandLine(__doc__, writes="docs/domains.md", takes="a second").read()
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
