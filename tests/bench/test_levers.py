"""The bench of levers: its table follows from the losses of its rows."""

import math
import statistics

import pytest

from bench.quality import levers
from grail.report.paired import Estimate
from grail.report.report import Evaluation

LOSSES = {
    ("", "0", "dense", "", "1.0", "brown"): [1.0, 2.0, 3.0],
    ("passages", "16", "pruned", "mlp", "0.5", "brown"): [2.0, 4.0, 5.0],
    ("passages", "16", "defaults", "mlp", "0.5", "brown"): [1.5, 3.0, 4.0],
    ("passages", "16", "producers", "mlp", "0.5", "brown"): [1.5, 2.5, 3.8],
    ("general", "64", "defaults", "mlp", "0.5", "brown"): [2.0, 3.0, 3.0],
}
ROWS = [
    dict(zip(levers.KEY, key, strict=True))
    | {"losses": " ".join(map(str, of)), "perplexity": "9", "kl": "0.1", "top1": "0.5"}
    for key, of in LOSSES.items()
]


def found(*key: str) -> dict:
    (row,) = (r for r in levers.comparisons(ROWS) if tuple(r[k] for k in levers.KEY) == key)
    return row


def test_a_share_and_a_gain_are_of_the_same_sequences():
    row = found("passages", "16", "producers", "mlp", "0.5", "brown")
    assert row["share"].value == pytest.approx((11 - 7.8) / (11 - 6))
    assert row["gain"].value == pytest.approx((0.0 + 0.5 + 0.2) / 3)
    gaps = [0.0, 0.5, 0.2]
    mean = sum(gaps) / 3
    variance = sum((gap - mean) ** 2 for gap in gaps) / 2
    assert row["gain"].error == pytest.approx(math.sqrt(variance / 3))


def test_without_a_pruned_row_of_its_calibration_there_is_no_share():
    row = found("general", "64", "defaults", "mlp", "0.5", "brown")
    assert row["share"] is None
    assert row["gain"].value == 0
    assert found("passages", "16", "pruned", "mlp", "0.5", "brown")["share"].value == 0


def test_the_dense_model_is_no_lever():
    assert len(list(levers.comparisons(ROWS))) == len(ROWS) - 1


def test_a_table_has_a_row_for_each_lever_and_both_texts_side_by_side():
    rows = [row | {"text": text} for text in levers.TEXTS for row in ROWS]
    header, lines = levers.table(levers.comparisons(rows))
    assert len(lines) == len(ROWS) - 1
    named = [f"{text}: perplexity" for text in levers.TEXTS]
    assert [name for name in header if name in named] == named
    (producers,) = (line for line in lines if "producers" in line)
    assert [cell.split()[0] for cell in producers].count("64.0%") == len(levers.TEXTS)


def test_a_mixed_calibration_has_every_text_in_equal_parts(monkeypatch, tmp_path):
    class Subject:
        def batches(self, text: str, half: str, tokens: int) -> list:
            assert half == "calibration"
            return [f"{text} {number}" for number in range(tokens // levers.LENGTH)]

    bench = levers.Bench(tmp_path / "levers.csv")
    monkeypatch.setattr(bench, "_subject", Subject())
    rows = bench.calibration("general", 12)
    names = levers.CALIBRATIONS["general"]
    assert sorted(rows) == sorted(f"{name} {n}" for name in names for n in range(2))
    assert rows != sorted(rows, key=lambda row: row.split()[1])
    assert bench.calibration("passages", 3) == ["passages 0", "passages 1", "passages 2"]


def test_every_cell_names_known_calibrations_and_levers():
    for cell in levers.CELLS:
        assert cell.calibration in levers.CALIBRATIONS
        assert set(cell.levers) <= set(levers.LEVERS)


def test_distances_have_an_error_where_sequences_are_known():
    each = {"divergences": "0.1 0.2 0.6", "agreements": "0.5 0.4 0.9"}
    row = ROWS[2] | {"kl": "0.3", "top1": "0.6"}
    (old,) = levers.comparisons([ROWS[0], row])
    (new,) = levers.comparisons([ROWS[0], row | each])
    (empty,) = levers.comparisons([ROWS[0], row | dict.fromkeys(each, "")])
    assert old["kl"] == empty["kl"] == Estimate(0.3, None)
    assert new["kl"].error == pytest.approx(statistics.stdev([0.1, 0.2, 0.6]) / math.sqrt(3))
    assert new["top1"].error == pytest.approx(statistics.stdev([0.5, 0.4, 0.9]) / math.sqrt(3))
    shown = [levers.table([of])[1][0][-2:] for of in (old | {"text": "brown"}, new)]
    assert shown == [["0.30", "60.0%"], ["0.300 ± 0.153", "60.0% ± 15.3%"]]


def test_what_a_bench_writes_has_its_errors():
    found = Evaluation(
        *(9.0, 2046, 5, 20),
        losses=[2.0, 2.5],
        kl=0.3,
        top1=0.6,
        divergences=[0.2, 0.4],
        agreements=[0.5, 0.7],
    )
    row = {key: str(value) for key, value in levers._scores("brown", found, 3.0).items()}
    (shown,) = levers.comparisons([ROWS[0], ROWS[2] | row])
    assert shown["kl"] == Estimate(0.3, pytest.approx(0.1))
    assert shown["top1"] == Estimate(0.6, pytest.approx(0.1))


def test_a_text_that_is_not_of_all_rows_has_columns_of_its_own():
    base = ROWS[0]
    rows = [base, base | {"text": "source"}, ROWS[2], ROWS[2] | {"text": "source"}, ROWS[3]]
    header, lines = levers.table(levers.comparisons(rows))
    assert [name for name in header if name.endswith("perplexity")] == [
        f"{text}: perplexity" for text in ("passages", "brown", "source")
    ]
    assert {len(line) for line in lines} == {len(header)}
    (defaults, producers) = lines
    assert defaults[len(levers.KEY) - 1] == "–"
    assert defaults[-5] == "9.0"
    assert producers[-5:] == ["–"] * 5
