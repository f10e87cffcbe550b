"""The numbers of the pages: each is of one row, and a row that is missing is an error."""

import pytest

from bench.report.numbers import rows as module
from bench.report.numbers.adapters import Adapters
from bench.report.numbers.counts import sentence
from bench.report.numbers.kernels import Kernels
from bench.report.numbers.reliability import Reliability
from bench.report.numbers.rows import Rows
from bench.report.numbers.serving import Serving, power


@pytest.fixture
def three(tmp_path, monkeypatch) -> Rows:
    (tmp_path / "three.csv").write_text("name,size,time\na,1,2.5\na,2,3\nb,1,\n")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return Rows("three.csv")


def test_a_row_is_found_by_its_columns(three):
    assert three.value("time", name="a", size=1) == 2.5
    assert three.values("time") == [2.5, 3.0]
    assert three.where(other="") == three.all


@pytest.mark.parametrize("columns", [{"name": "c"}, {"name": "a"}, {"other": "x"}])
def test_none_or_several_are_an_error(three, columns):
    with pytest.raises(LookupError, match=r"three\.csv has [02] rows"):
        three.one(**columns)


@pytest.mark.parametrize("columns", [{"name": "b"}, {"name": "d"}])
def test_no_number_is_an_error(three, columns):
    with pytest.raises(LookupError, match=r"three\.csv has (no|0 rows)"):
        three.value("time", **columns)
    with pytest.raises(LookupError, match=r"three\.csv has no time"):
        three.values("time", **columns)


@pytest.mark.parametrize("column", ["tim", "name"])
def test_a_column_without_numbers_is_an_error_that_names_file_and_column(three, column):
    for read in (three.value, three.values):
        with pytest.raises(LookupError, match=rf"three\.csv has no number in column '{column}'"):
            read(column, name="a", size=1)


def test_counts_are_in_words():
    assert sentence([("fault", "killed runs", 1000), ("fault", "lost processes", 2)]) == (
        "1,002 faults injected (1,000 killed runs, 2 lost processes); 0 refusals of bad input or "
        "damage; 0 reported errors measured in the whole network"
    )


def test_a_small_number_has_two_digits():
    assert power(5.66e-6) == "5.7e-6"
    assert power(1.2e-10) == "1.2e-10"


def test_a_speed_is_the_rivals_time_over_ours():
    kernels = Kernels()
    assert kernels.gpu.speed("addmm", 4096) == pytest.approx(
        kernels.gpu.ms("addmm") / kernels.gpu.ms("grail")
    )
    assert kernels.pointers()[0] > 1  # the table takes them where they are faster
    trial = kernels.trial(8192, 4096)
    assert trial["rate"] == pytest.approx(2 * 8192 * 4096**2 / 0.000327 / 1e12)


def test_outcomes_of_bad_data_add_up():
    found = Reliability()
    for method in ("grail", "usual loop"):
        shares = [
            found.outcome(kind, method) for kind in ("refused", "flagged", "solved", "silent")
        ]
        assert sum(shares) == pytest.approx(1)


def test_no_promise_of_the_page_is_broken_by_its_rows():
    found = Reliability()
    assert found.count("silent") == 0
    assert found.found() == found.damaged()
    for name in ("killing", "killing_uneven"):
        assert found.same(name) == found.killed(name)
    assert found.tensors() == 0


def test_rounding_to_nearest_recovers_none_of_its_loss_and_the_model_in_fp32_all():
    serving = Serving()
    assert serving.quantised_share("rounded to nearest") == 0
    assert serving.quantised_share("restored") == 1
    assert 0 < serving.quantised_share("GPTQ") < 1


def test_memory_beside_another_library_is_below_its_own():
    adapters = Adapters()
    assert 0 < adapters.memory("held") < adapters.memory("readout") < 1
