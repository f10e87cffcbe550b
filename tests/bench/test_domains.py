"""The page on domains: every number is one of levers.csv, and a missing one is said."""

import pytest

from bench.quality import levers
from bench.report import domains
from tests.bench.test_levers import ROWS


@pytest.fixture
def page() -> domains.Page:
    return domains.Page([row | {"text": text} for row in ROWS for text in levers.TEXTS])


def test_the_committed_page_is_the_generated_one():
    assert domains.PAGE.read_text(encoding="utf-8") == domains.page()


def test_a_share_is_that_of_its_row(page):
    assert page.share("passages", 16, "producers", "brown").startswith("64.0% ± ")


def test_a_row_that_is_missing_is_said(page):
    assert page.share("passages", 16, "wanda", "brown") == "not measured"
    assert page.share("general", 64, "defaults", "brown") == "not measured"
    assert page.perplexity("passages", 16, "wanda", "brown") == "not measured"
    assert page.perplexity("passages", 16, "producers", "brown") == "9.0"


def test_tables_have_the_rows_that_they_name(page):
    assert [line.split(" | ")[0] for line in page.calibrations().splitlines()[2:]] == [
        "| passages",
        "| general",
    ]
    lines = page.levers("passages", 16).splitlines()
    assert len(lines) == 2 + 3
    assert "+0.233 ±" in lines[-1]
    assert len({line.count("|") for line in lines}) == 1


def test_cells_that_are_worse_than_pruned_are_counted():
    more = " ".join(str(loss) for loss in (2.5, 4.6, 5.4))
    bad = dict(zip(levers.KEY, ("passages", "16", "wanda", "mlp", "0.5", "brown"), strict=True))
    rows = [*ROWS, ROWS[0] | bad | {"losses": more}]
    assert domains.Page(ROWS).worse() == "0 of 2"
    assert domains.Page(rows).worse() == "1 of 3"
    assert domains.Page(ROWS).worse_cells() == ""
    (line,) = domains.Page(rows).worse_cells().splitlines()[2:]
    assert line.startswith("| passages, 16k | wanda | mlp | 0.5 | brown |")


def test_ratios_have_pruning_first(page):
    lines = page.ratios("passages", 16).splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        ["| 0.5", "pruned"],
        ["| 0.5", "defaults"],
    ]


def test_near_and_far_begin_with_the_dense_model():
    row = dict(ROWS[0]) | {"text": "technical"}
    table = domains.Page([row]).near_and_far("technical", 64)
    dense = f"{float(row['perplexity']):.1f}"
    assert table.splitlines()[-1] == f"| dense | {dense} | not measured |"
