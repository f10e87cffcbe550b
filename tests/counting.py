"""Counts of what the test run tried: faults that were injected, bad inputs that were refused.

Printed at the end of the run; `pytest --counts FILE` writes them as CSV.
"""

import csv
from collections import Counter
from pathlib import Path

import pytest

from grail.errors import GrailError

FAULTS, REFUSALS = Counter(), Counter()
COMMITTED = Path(__file__).parent.parent / "bench" / "results" / "faults.csv"


def injected(fault: str, count: int = 1) -> None:
    """Hears that a test has injected a fault."""
    FAULTS[fault] += count


def pytest_addoption(parser):
    parser.addoption("--counts", metavar="FILE", help="write the counts of this run as CSV")


def pytest_configure(config):
    """Lets every named error count itself when it is raised in this process."""
    initialise = GrailError.__init__

    def counting(self, *arguments):
        REFUSALS[type(self).__name__] += 1
        initialise(self, *arguments)

    GrailError.__init__ = counting


def rows():
    """What was counted so far, as (what, kind, count)."""
    found = [("fault", fault, count) for fault, count in sorted(FAULTS.items())]
    return found + [("refusal", error, count) for error, count in sorted(REFUSALS.items())]


def sentence(counted):
    """Rows in words."""
    total = {what: sum(int(n) for w, _, n in counted if w == what) for what in ("fault", "refusal")}
    kinds = {
        what: ", ".join(f"{int(n):,} {kind}" for w, kind, n in counted if w == what)
        for what in total
    }
    return (
        f"{total['fault']:,} faults injected ({kinds['fault']}); {total['refusal']:,} refusals of "
        f"bad input or damage ({kinds['refusal']})"
    )


def read(path):
    """The rows that were written."""
    with Path(path).open(newline="") as file:
        return [(row["what"], row["kind"], row["count"]) for row in csv.DictReader(file)]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    if not FAULTS and not REFUSALS:
        return
    terminalreporter.write_line(f"This run: {sentence(rows())}.")
    if path := config.getoption("--counts"):
        with Path(path).open("w", newline="") as file:
            csv.writer(file).writerows([("what", "kind", "count"), *rows()])
