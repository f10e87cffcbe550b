"""The tables of the evaluation suite and their page: every number is one of the rows."""

import math
import statistics

import pytest

from bench.quality import suite_tables
from bench.quality.evaluation import KEY
from bench.quality.suite_tables import Run, Scores
from bench.report import evaluation as report
from grail.report import paired

RUN = Run("passages", "16384", "mlp", "0.5")
# Mean losses of three sequences of each text. On scripture grail is worse than pruned.
LOSSES = {
    "dense": {"passages": [1.0, 2, 3], "documentation": [1.0, 1, 2]},
    "pruned": {"passages": [2.0, 4, 5], "documentation": [2.0, 3, 3]},
    "grail": {"passages": [1.5, 2.5, 3.5], "documentation": [1.5, 2, 2.2]},
}
OFF = {
    "dense": {"brown": [3.0, 4, 3], "scripture": [2.0, 3, 2]},
    "pruned": {"brown": [5.0, 5, 6], "scripture": [3.0, 4, 3.1]},
    "grail": {"brown": [4.0, 4.5, 5], "scripture": [3.2, 4.3, 3.3]},
}


def row(model, on, measure, value="", error="", each=(), run=RUN):
    """A row as `bench.quality.evaluation` writes it."""
    key = {
        "model": model,
        **(run._asdict() if model != "dense" else dict.fromkeys(run._fields, "")),
    }
    shown = {"value": str(value), "error": str(error), "count": str(len(each) or "")}
    return {**key, "on": on, "measure": measure, **shown, "each": " ".join(map(str, each))}


def rows():
    found = []
    for model in LOSSES:
        for text, losses in (LOSSES[model] | OFF[model]).items():
            value = math.exp(statistics.fmean(losses))
            found.append(row(model, text, "perplexity", value, each=losses))
            if model == "dense":
                continue
            plain = (LOSSES["pruned"] | OFF["pruned"])[text]
            base = (LOSSES["dense"] | OFF["dense"])[text]
            over, back = paired.difference(losses, plain), paired.share(base, plain, losses)
            if model == "grail":
                found.append(row(model, text, "nats_over_pruned", over.value, over.error))
                found.append(row(model, text, "share", back.value, back.error))
            kl = [loss / 10 for loss in losses]
            found.append(row(model, text, "kl", statistics.fmean(kl), 0.0123, kl))
            found.append(row(model, text, "top1", 0.625, 0.0078, [0.5, 0.625, 0.75]))
            found.append(row(model, text, "first_divergence", 9, 1, [7, 11]))
        right = [1, 1, 1, 0]
        found.append(row(model, "agreement", "accuracy", 0.75, 0.25, right))
        found.append(row(model, "writing", "distinct4", 0.9, 0.02, [0.9, 0.9]))
    found.append(row("dense", "agreement", "chance", 0.5))
    return found


def cells(table, line):
    header, lines = table
    (found,) = (dict(zip(header, cells, strict=True)) for cells in lines if cells[0] == line)
    return found


def test_rows_are_of_the_columns_that_the_suite_writes():
    assert set(KEY) < set(row("grail", "brown", "kl"))
    assert Run._fields == KEY[1:5]


def test_models_stand_side_by_side_in_the_domain_and_off_it():
    table = suite_tables.domain_table(Scores(rows()), RUN)
    perplexity = cells(table, "perplexity")
    assert perplexity["in domain: dense"] == f"{math.exp(2):.1f}"
    assert perplexity["in domain: paper"] == "–"
    off = [loss for text in OFF["grail"].values() for loss in text]
    assert perplexity["off domain: grail"] == f"{math.exp(statistics.fmean(off)):.1f}"
    pooled = [[x for text in OFF[m].values() for x in text] for m in ("dense", "pruned", "grail")]
    back = paired.share(*pooled)
    share = cells(table, "share")
    assert share["off domain: grail"] == f"{back.value:.1%} ± {back.error:.1%}"
    assert share["in domain: grail"].startswith("70.0% ± ")
    assert share["in domain: dense"] == share["in domain: pruned"] == "–"
    kl = cells(table, "KL")
    error = statistics.stdev(loss / 10 for loss in off) / math.sqrt(6)
    assert kl["off domain: grail"] == f"{statistics.fmean(off) / 10:.3f} ± {error:.3f}"
    assert cells(table, "nats over pruned")["in domain: grail"].startswith("-1.167 ± ")
    assert cells(table, "first divergence")["in domain: pruned"] == "9.0 ± 2.0"
    assert cells(table, "top-1")["in domain: grail"] == "62.5% ± 7.2%"


def test_a_model_that_did_not_read_all_texts_has_no_common_value():
    some = [r for r in rows() if (r["model"], r["on"]) != ("grail", "scripture")]
    perplexity = cells(suite_tables.domain_table(Scores(some), RUN), "perplexity")
    assert perplexity["off domain: grail"] == "–"
    assert perplexity["off domain: pruned"] != "–"
    assert perplexity["in domain: grail"] != "–"


def test_texts_are_in_near_and_off_the_domain():
    scores = Scores(rows())
    header, lines = suite_tables.text_table(scores, RUN)
    assert [line[:2] for line in lines] == [
        ["passages", "in"],
        ["documentation", "near"],
        ["brown", "off"],
        ["scripture", "off"],
    ]
    assert lines[0][header.index("grail")].startswith("12.2 (70.0% ± ")
    assert lines[0][-2:] == ["0.250 ± 0.012", "62.5% ± 0.8%"]
    both = Run("passages+brown", *RUN[1:])
    assert [both.domain(text) for text in ("brown", "passages", "technical", "source")] == [
        *("in", "in", "near", "off")
    ]
    assert Run("brown", *RUN[1:]).domain("passages") == "off"


def test_texts_on_which_a_model_is_worse_than_pruned_are_counted():
    scores = Scores(rows())
    assert scores.worse(RUN, "grail") == (["scripture"], 4)
    assert scores.worse(RUN, "paper") == ([], 0)


def test_tasks_and_writing_have_a_row_each():
    scores = Scores(rows())
    task = cells(suite_tables.task_table(scores, RUN), "agreement")
    assert (task["chance"], task["grail"], task["paper"]) == ("50.0%", "75.0% ± 25.0%", "–")
    written = cells(suite_tables.writing_table(scores, RUN), "distinct4")
    assert written["dense"] == "90.0% ± 2.0%"


def test_a_folder_has_columns_of_its_own():
    folder = [row("narrow", "brown", "perplexity", 7.5, each=[2.0, 2.1], run=Run("", "", "", ""))]
    scores = Scores([*rows(), *folder])
    empty = suite_tables.DENSE_RUN
    assert scores.runs == [RUN, empty]
    assert scores.models(empty) == ["dense", "narrow"]
    lines = suite_tables.text_table(scores, empty)[1]
    assert lines == [["brown", "–", "28.0", "7.5", "–", "–"]]
    # The dense model wrote, so there is a table of writing.
    assert [len(table[1]) for table in suite_tables.tables(scores, empty)] == [1, 1]


def test_the_committed_page_is_the_generated_one():
    assert report.PAGE.read_text(encoding="utf-8") == report.page()


def test_the_page_has_what_is_measured_and_says_what_is_not():
    page = report.Page(rows())
    text = page.text()
    assert "## Calibrated on 16k tokens of passages, mlp at 0.5" in text
    assert page.cell(RUN, "perplexity", "in domain: grail") in text
    assert page.cell(RUN, "no measure", "in domain: grail") == "–"
    assert "grail: 1 of 4 texts (scripture)" in text
    assert "3 sequences of 1024 tokens" in text
    assert "| agreement | 50.0% |" in text
    texts_only = [r for r in rows() if r["on"] not in ("agreement", "writing")]
    assert report.Page(texts_only).text().count("Not measured.") == 2
    dense_only = [r for r in rows() if r["model"] == "dense"]
    for some in ([], dense_only):
        assert report.Page(some).text().count("Not measured.") == 1


@pytest.mark.parametrize("count", range(0, 45, 4))
def test_a_page_of_some_rows_is_whole(count):
    text = report.Page(rows()[:count]).text()
    for lines in text.split("\n\n"):
        table = [line for line in lines.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in table}) <= 1
