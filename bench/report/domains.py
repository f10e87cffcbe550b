"""The page "In the calibration's domain and off it", from bench/results/{levers,swaps}.csv alone.

    python -m bench.report.domains     writes docs/domains.md

The text of the page is in bench/report/domains.md.j2.
"""

from collections.abc import Sequence
from typing import Any

from bench.quality import levers, swaps
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
        self._dense = {
            row["text"]: float(row["perplexity"]) for row in rows if row["lever"] == levers.DENSE
        }

    def text(self) -> str:
        """The whole page."""
        return fill(TEMPLATE, page=self, levers=levers, swaps=swaps)

    def row(
        self,
        calibration: str,
        sequences: int,
        lever: str,
        text: str,
        sites: str = "mlp",
        keep: float = 0.5,
    ) -> dict[str, Any] | None:
        """A measured cell, or None."""
        return self._found.get((calibration, str(sequences), lever, sites, str(keep), text))

    def share(self, *cell: Any) -> str:
        """The recovered share of a cell and its standard error; "not measured" without rows."""
        row = self.row(*cell)
        known = row is not None and row["share"] is not None
        return levers.percent(row["share"]) if known else "not measured"

    def perplexity(self, *cell: Any) -> str:
        """The perplexity of a cell; "not measured" without a row."""
        row = self.row(*cell)
        return "not measured" if row is None else f"{float(row['perplexity']):.1f}"

    def dense(self, text: str) -> str:
        """The dense model's perplexity on a text; "not measured" without a row."""
        return f"{self._dense[text]:.1f}" if text in self._dense else "not measured"

    def divergence(self, *cell: Any) -> str:
        """KL(dense‖compressed) of a cell in nats, with its standard error where that is known."""
        row = self.row(*cell)
        return "not measured" if row is None else levers.nats(row["kl"])

    def worse(self) -> str:
        """The count of cells that are worse than plain pruning by their calibration, "0 of 26"."""
        cells = [row["worse"] for row in self._found.values() if row["lever"] != levers.PRUNED]
        known = [worse for worse in cells if worse is not None]
        return f"{sum(known)} of {len(known)}"

    def worse_cells(self) -> str:
        """A table of the cells that are worse than plain pruning, and by how much."""
        lines = [
            [
                f"{row['calibration']}, {row['sequences']}k",
                *(row[name] for name in ("lever", "sites", "keep", "text")),
                *(self.perplexity(*cell) for cell in (self._pruned(row), self._key(row))),
            ]
            for row in self._found.values()
            if row["lever"] != levers.PRUNED and row["worse"]
        ]
        header = ["calibration", "lever", "sites", "keep", "read on", "pruned", "with the lever"]
        return markdown(header, lines) if lines else ""

    @staticmethod
    def _key(row: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments of `row` that find this one."""
        names = ("calibration", "sequences", "lever", "text", "sites", "keep")
        return tuple(row[name] for name in names)

    def _pruned(self, row: dict[str, Any]) -> tuple[Any, ...]:
        return self._key(row | {"lever": levers.PRUNED})

    def calibrations(self) -> str:
        """A table of the defaults, and of all that recovers most, on each calibration."""
        rows = [
            row | {"tokens": f"{int(row['sequences'])}k"}
            for row in self._of_halves()
            if row["lever"] in (levers.DEFAULTS, levers.BEST)
        ]
        return markdown(*levers.table(rows, ("calibration", "tokens", "lever"), gains=False))

    def levers(self, calibration: str, sequences: int) -> str:
        """A table of all levers on one calibration."""
        wanted = (calibration, str(sequences))
        rows = (
            row for row in self._of_halves() if (row["calibration"], row["sequences"]) == wanted
        )
        return markdown(*levers.table(rows, ("lever",)))

    def near_and_far(self, calibration: str, sequences: int) -> str:
        """A table of one calibration's models: perplexity, share and KL on each text."""
        texts = levers.NEAR_AND_FAR[calibration]
        lines = [[levers.DENSE, *map(self.dense, texts)]]
        for lever in (levers.PRUNED, levers.DEFAULTS, levers.BEST):
            cells = [(calibration, sequences, lever, text) for text in texts]
            if any(self.row(*cell) for cell in cells):
                shown = (
                    f"{self.perplexity(*cell)} ({self.share(*cell)}, KL {self.divergence(*cell)})"
                    for cell in cells
                )
                lines.append([lever, *shown])
        return markdown(["lever", *(f"read on {text}" for text in texts)], lines)

    def ratios(self, calibration: str, sequences: int) -> str:
        """A table of every keep ratio of MLPs: pruned, compensated, and with broader selections."""
        shown = (levers.PRUNED, "paper", levers.DEFAULTS, levers.BROAD, levers.OWN_TOO)
        rows = sorted(
            (
                row
                for row in self._found.values()
                if row["sites"] == "mlp"
                and row["lever"] in shown
                and (row["calibration"], row["sequences"]) == (calibration, str(sequences))
            ),
            key=lambda row: (-float(row["keep"]), shown.index(row["lever"])),
        )
        return markdown(*levers.table(rows, ("keep", "lever"), gains=False))

    def swaps(self, tokens: str) -> str:
        """The mean relative change of single sites' squared errors by swaps, "-0.1%"."""
        return f"{swaps.change(Table(RESULTS / 'swaps.csv', swaps.KEY).rows, tokens):+.1%}"

    def _of_halves(self) -> list[dict[str, Any]]:
        """Returns cells of half of the MLP's channels, read on the two texts of all tables."""
        return [
            row
            for row in self._found.values()
            if (row["sites"], row["keep"]) == ("mlp", "0.5")
            and row["calibration"] not in levers.NEAR_AND_FAR
        ]


def page() -> str:
    """The whole page in Markdown."""
    return Page(Table(RESULTS / "levers.csv", levers.KEY).rows).text()


def main() -> None:
    """Writes the page."""
    CommandLine(__doc__, writes="docs/domains.md", takes="a second").read()
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
