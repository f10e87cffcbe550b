"""The page "What a user notices", from bench/results/evaluation.csv alone.

    python -m bench.report.evaluation     writes docs/evaluation.md

The text of the page is in bench/report/evaluation.md.j2.
"""

from collections.abc import Sequence

from bench.quality import evaluation
from bench.quality.endtoend import WRITTEN
from bench.quality.suite_tables import (
    PRUNED,
    Run,
    Scores,
    domain_table,
    task_table,
    text_table,
    writing_table,
)
from bench.tools.commandline import CommandLine
from bench.tools.measuring import RESULTS, ROOT, Row, Table
from bench.tools.pages import fill
from bench.tools.tables import markdown

PAGE = ROOT / "docs" / "evaluation.md"
TEMPLATE = ROOT / "bench" / "report" / "evaluation.md.j2"
NOTHING = "Not measured."


class Page:
    """The parts of the page; each returns Markdown."""

    def __init__(self, rows: Sequence[Row]):
        self._scores = Scores(rows)
        self.runs = [run for run in self._scores.runs if run.calibration]

    def text(self) -> str:
        """The whole page."""
        return fill(TEMPLATE, page=self, evaluation=evaluation)

    def calibration(self, run: Run) -> str:
        """The texts and tokens of the calibration: "16k tokens of passages"."""
        names = run.calibration.replace(WRITTEN, "text that the model wrote").replace("+", " and ")
        return f"{int(run.tokens) // 1024}k tokens of {names}"

    def title(self, run: Run) -> str:
        """How models were compressed: "16k tokens of passages, mlp at 0.5"."""
        return f"{self.calibration(run)}, {run.sites.replace(',', ' and ')} at {run.keep}"

    def domains(self, run: Run) -> str:
        """A table of the models in the calibration's domain and off it."""
        return self._table(domain_table(self._scores, run))

    def cell(self, run: Run, measure: str, column: str) -> str:
        """A cell of that table, by its row and a column as in "off domain: grail"."""
        header, rows = domain_table(self._scores, run)
        of = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
        return of.get(measure, {}).get(column, "–")

    def texts(self, run: Run) -> str:
        """A table of all texts."""
        return self._table(text_table(self._scores, run))

    def tasks(self, run: Run) -> str:
        """A table of the tasks."""
        return self._table(task_table(self._scores, run))

    def writing(self, run: Run) -> str:
        """A table of what the models write."""
        return self._table(writing_table(self._scores, run))

    def worse(self, run: Run) -> str:
        """The texts on which a model is worse than plain pruning, "grail: 0 of 4 texts"."""
        found = []
        for model in self._scores.models(run):
            texts, known = self._scores.worse(run, model)
            if model != PRUNED and known:
                names = f" ({', '.join(texts)})" if texts else ""
                found.append(f"{model}: {len(texts)} of {known} texts{names}")
        return "; ".join(found) or "not measured"

    def sequences(self, run: Run) -> str:
        """How many sequences of each text were measured: "6", or "6 or 12" where texts differ."""
        return " or ".join(map(str, self._scores.sequences(run))) or "0"

    @staticmethod
    def _table(table: tuple[list[str], list[list[str]]]) -> str:
        return markdown(*table) if table[1] else NOTHING


def page() -> str:
    """The whole page in Markdown."""
    return Page(Table(RESULTS / "evaluation.csv", evaluation.KEY).rows).text()


def main() -> None:
    """Writes the page."""
    CommandLine(__doc__, writes="docs/evaluation.md", takes="a second").read()
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
