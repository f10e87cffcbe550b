"""Scores on several texts: names, shares, tables, headline and the line of what is worse."""

import dataclasses
import json
import statistics

import pytest

from grail.report.card import card
from grail.report.report import Evaluation, Report, TextScore
from grail.report.summary import comparison_tables, explanation, headline
from grail.report.texts import (
    add_comparisons,
    distance_cells,
    joined,
    score_table,
    text_names,
    text_table,
    worse_sentence,
    worse_than_pruned,
)
from tests.report.test_page import Document, report

page = pytest.importorskip("grail.report.page").page
pytest.importorskip("matplotlib")

# Mean losses of 4 sequences: on "in" half of what pruning loses comes back, on "off" it gets worse.
LOSSES = {
    "in": {"dense": [1.0, 2, 3, 2], "pruned": [2.0, 3, 4, 3], "restored": [1.5, 2.6, 3.4, 2.5]},
    "off": {"dense": [3.0, 4, 3, 4], "pruned": [4.0, 5, 4, 5], "restored": [4.1, 5.2, 4.2, 5.1]},
}
MADE = {
    "dense": {},
    "pruned": {"selector": "wanda"},
    "restored": {"selector": "wanda", "compensation": "weights"},
}

DISTANCE = {"kl": 0.25, "kl_error": 0.0123, "top1": 0.625, "top1_error": 0.0078}


def rows(*texts):
    """Evaluated models by role, on those texts, with KL and top-1 of the narrow ones."""
    found = {}
    for role, made in MADE.items():
        distance = {} if role == "dense" else DISTANCE
        each = {}
        for text in texts:
            losses = LOSSES[text][role]
            value = 2.0 ** (sum(losses) / 4)
            each[f"{text}.txt"] = Evaluation(
                value, 4092, 1_000_000, 4_000_000, losses=losses, **distance, **made
            )
        found[role] = joined(each)
    add_comparisons(found)
    return found


def test_names_are_short_where_they_differ(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name in ("one.txt", "two.txt"):
            (tmp_path / folder / name).touch()
    one, other, two = (str(tmp_path / name) for name in ("a/one.txt", "b/one.txt", "a/two.txt"))
    assert text_names([one, two]) == ["one.txt", "two.txt"]
    assert text_names([one, two, other]) == [one, "two.txt", other]
    assert text_names([one, one]) == [one, f"{one} (2)"]
    assert text_names(["wikitext2", "some/data", "some/data"]) == [
        *("wikitext2", "some/data", "some/data (2)")
    ]


def test_one_evaluation_holds_the_scores_of_all_texts():
    first, other = (Evaluation(value, 10, 5, 20, kl=value / 100) for value in (20.0, 30.0))
    found = joined({"in.txt": first, "off.txt": other})
    assert (found.perplexity, found.text, found.parameters) == (20.0, "in.txt", 5)
    assert found.others == [TextScore(30.0, 10, text="off.txt", kl=0.3)]
    assert found.scores == [found, *found.others]


def test_the_table_has_a_block_of_rows_for_each_text():
    found = comparison_tables(rows("in", "off"))
    (header, cells, words), (models, sizes, _) = found
    assert (header, words) == (["text", "model", "perplexity", "recovered", "KL", "top-1"], 2)
    assert cells == [
        ["in.txt", "dense", "4.00", "–", "–", "–"],
        ["in.txt", "pruned (wanda)", "8.00", "–", "0.250 ± 0.012", "62.5 ± 0.8%"],
        ["in.txt", "compensated (wanda)", "5.66", "50 ± 4%", "0.250 ± 0.012", "62.5 ± 0.8%"],
        ["off.txt", "dense", "11.3", "–", "–", "–"],
        ["off.txt", "pruned (wanda)", "22.6", "–", "0.250 ± 0.012", "62.5 ± 0.8%"],
        ["off.txt", "compensated (wanda)", "25.1", "-15 ± 3%", "0.250 ± 0.012", "62.5 ± 0.8%"],
    ]
    assert models == ["model", "parameters", "weights"]
    assert len(sizes) == 3


def test_one_text_needs_no_name_and_no_column():
    (header, models, _), (other, cells, words) = comparison_tables(rows("in"))
    assert header == ["model", "perplexity", "parameters", "weights"]
    assert models[2][:2] == ["compensated (wanda)", "5.66"]
    assert (other, words) == (["model", "recovered", "KL", "top-1"], 1)
    assert cells == [
        ["pruned (wanda)", "–", "0.250 ± 0.012", "62.5 ± 0.8%"],
        ["compensated (wanda)", "50 ± 4%", "0.250 ± 0.012", "62.5 ± 0.8%"],
    ]
    plain = {role: Evaluation(5.0, 10, 5, 20, **made) for role, made in MADE.items()}
    assert text_table(plain)[1] == []
    assert len(comparison_tables(plain)) == 1


def test_evaluated_texts_are_rows():
    row = rows("in", "off")["restored"]
    header, cells = score_table(row)
    assert header == ["text", "perplexity", "KL", "top-1", "predicted tokens"]
    assert cells == [
        ["in.txt", "5.66", "0.250 ± 0.012", "62.5 ± 0.8%", "4,092"],
        ["off.txt", "25.1", "0.250 ± 0.012", "62.5 ± 0.8%", "4,092"],
    ]


def test_the_headline_is_of_the_first_text_and_names_the_others():
    assert headline(report(evaluation=rows("in", "off"))) == (
        "50%",
        "of the log-perplexity lost by pruning (wanda) is recovered on in.txt; 15% worse than "
        "pruning on off.txt",
    )
    assert headline(report(evaluation=rows("off", "in"))) == (
        "15% worse",
        "than plain pruning (wanda) on off.txt, in shares of the log-perplexity that it lost; 50% "
        "on in.txt",
    )
    alone = headline(report(evaluation=rows("in")))
    assert alone == ("50%", "of the log-perplexity lost by pruning (wanda) is recovered")
    whole = report(evaluation=rows("in", "off"))
    assert explanation(whole).startswith("Perplexity on in.txt: dense 4.00, pruned (wanda) 8.00")
    assert "perplexity (in.txt, off.txt)" in whole._repr_html_()


def test_what_is_worse_than_plain_pruning_is_said_everywhere():
    whole = report(evaluation=rows("in", "off"))
    line = (
        "The model is worse than plain pruning on off.txt by 0.15 ± 0.029 nats a token, beyond 2 "
        "standard errors: calibrate on such text as well, or on text by the model itself "
        "(grail generate), or keep more."
    )
    assert worse_sentence(whole) == line
    assert line in Document(page(whole)).text
    assert line in card(whole)
    assert worse_sentence(report(evaluation=rows("in"))) == ""
    # 0.1 ± 0.1 is within the error.
    within = rows("off")
    within["restored"].losses = [4.1, 5.3, 3.9, 5.1]
    assert worse_than_pruned(report(evaluation=within)) == {}
    # A quantised model is judged by the one that was rounded.
    quantised = rows("in")
    quantised["unquantised"] = quantised["restored"]
    quantised["restored"] = dataclasses.replace(rows("off")["restored"])
    assert worse_than_pruned(report(evaluation=quantised)) == {}


def test_the_page_draws_each_text():
    shown = Document(page(report(evaluation=rows("in", "off")))).text
    for words in ("Perplexity on in.txt", "Perplexity on off.txt", "50 ± 4%", "-15 ± 3%"):
        assert words in shown
    assert "4,092 predicted tokens of in.txt, 4,092 predicted tokens of off.txt" in shown
    assert "KL: mean divergence" in shown
    for words in ("0.250 ± 0.012", "62.5 ± 0.8%", "(±) are standard errors over sequences"):
        assert words in shown
    assert "KL" not in Document(page(report())).text


# Of schema 7, and of schemas 6 and 7.
SEVENTH = ("kl_error", "top1_error", "over_pruned", "over_pruned_error", "divergences")
SEVENTH += ("agreements", "predicted")
SIXTH = ("text", "kl", "top1", "losses", "others", "recovered", "recovered_error")


@pytest.mark.parametrize(("schema", "missing"), [(5, SIXTH + SEVENTH), (6, SEVENTH)])
def test_a_report_of_an_earlier_schema_is_read(schema, missing):
    whole = report()
    text = whole.to_json()
    data = dataclasses.asdict(whole)
    for row in data["evaluation"].values():
        for name in missing:
            assert f'"{name}"' in text
            del row[name]
    old = Report.from_json(json.dumps({**data, "schema": schema}))
    assert old.evaluation == whole.evaluation
    assert worse_sentence(old) == ""
    assert headline(old) == headline(whole)


def test_a_report_without_errors_shows_and_judges_what_it_has():
    data = dataclasses.asdict(report(evaluation=rows("in", "off")))
    for row in data["evaluation"].values():
        for score in (row, *row["others"]):
            for name in SEVENTH:
                del score[name]
    old = Report.from_json(json.dumps({**data, "schema": 6}))
    (_, cells, _), _ = comparison_tables(old.evaluation)
    assert cells[2] == ["in.txt", "compensated (wanda)", "5.66", "50 ± 4%", "0.250", "62.5%"]
    assert list(worse_than_pruned(old)) == ["off.txt"]


def test_distances_are_shown_with_errors_of_their_precision():
    def cells(**distance):
        return distance_cells(TextScore(9.0, 10, **distance))

    assert cells() == ["–", "–"]
    assert cells(kl=1.234, top1=0.5) == ["1.23", "50.0%"]
    assert cells(kl=1.234, kl_error=0.0567, top1=0.5, top1_error=0.0123) == [
        "1.23 ± 0.06",
        "50.0 ± 1.2%",
    ]
    assert cells(kl=1.234, kl_error=0.0004)[0] == "1.23 ± 0.0004"
    assert cells(kl=0.0123, kl_error=0.00051)[0] == "0.0123 ± 0.0005"
    assert cells(kl=0.0, kl_error=0.0, top1=1.0, top1_error=0.0) == ["0 ± 0", "100.0 ± 0.0%"]
    assert cells(kl=float("inf"))[0] == "∞"


def test_comparisons_with_plain_pruning_stand_in_the_report():
    found = rows("in", "off")
    for role in ("dense", "pruned"):
        assert found[role].over_pruned is None
    off = found["restored"].others[0]
    assert off.over_pruned == pytest.approx(0.15)
    gaps = [0.1, 0.2, 0.2, 0.1]
    assert off.over_pruned_error == pytest.approx(statistics.stdev(gaps) / 2)
    assert found["restored"].over_pruned == pytest.approx(-0.5)
    # A text whose second sequence is long.
    for row in found.values():
        row.others[0].predicted = [10, 1000, 10, 10]
    add_comparisons(found)
    assert off.over_pruned == pytest.approx((1 + 200 + 2 + 1) / 1030)


def test_an_infinite_perplexity_of_any_text_is_read_back():
    found = rows("in", "off")
    found["pruned"].others[0].perplexity = float("inf")
    whole = report(evaluation=found)
    assert Report.from_json(whole.to_json()).evaluation == found
