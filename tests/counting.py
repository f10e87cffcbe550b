"""Counts of what the test run tried: faults injected, bad inputs refused, reported errors measured.

Printed at the end of the run; `pytest --counts=FILE` writes them as CSV.
"""

import csv
from collections import Counter
from pathlib import Path

import pytest

from bench.report.numbers.counts import COUNTED, sentence
from grail.errors import GrailError

COUNTS = {what: Counter() for what in COUNTED}


def injected(fault: str, count: int = 1) -> None:
    """Hears that a test has injected a fault."""
    COUNTS["fault"][fault] += count


def pytest_addoption(parser):
    parser.addoption("--counts", metavar="FILE", help="write the counts of this run as CSV")


def refused(error, count=1):
    """Hears that bad input or damage was refused, by a named error or an exit code."""
    COUNTS["refusal"][error] += count


def measured(kind):
    """Counts a reported error of a site of some kind that was held against the network's."""
    COUNTS["error"][kind] += 1


class Counting:
    """`pytest.raises` as a context that counts the named error it was waiting for."""

    def __init__(self, waiting):
        self._waiting = waiting

    def __enter__(self):
        return self._waiting.__enter__()

    def __exit__(self, kind, error, trace):
        expected = self._waiting.__exit__(kind, error, trace)
        if expected and isinstance(error, GrailError):
            refused(type(error).__name__)
        return expected


def count_refusals():
    """Lets every `with pytest.raises(…)` count."""
    raises = pytest.raises

    def counting(*arguments, **keywords):
        found = raises(*arguments, **keywords)
        return Counting(found) if hasattr(found, "__exit__") else found

    pytest.raises = counting


def pytest_sessionfinish(session):
    """A process that runs a share of the tests hands its counts over."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["counts"] = rows()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Adds what such a process counted."""
    for what, kind, count in getattr(node, "workeroutput", {}).get("counts", ()):
        COUNTS[what][kind] += count


def rows():
    """What was counted so far, as (what, kind, count)."""
    return [(what, kind, count) for what in COUNTED for kind, count in sorted(COUNTS[what].items())]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    if not any(COUNTS.values()):
        return
    terminalreporter.write_line(f"This run: {sentence(rows())}.")
    if path := config.getoption("--counts"):
        with Path(path).open("w", newline="") as file:
            csv.writer(file).writerows([("what", "kind", "count"), *rows()])
