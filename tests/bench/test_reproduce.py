"""The small version of the paper's tables: the rows that it measures, and their differences."""

import shutil

import pytest

from bench.quality import paper, sweep
from bench.quality.paper import SHOWN
from bench.quality.sweep import Choice
from bench.report import reproduce
from bench.report.paper import SIZES
from bench.tools import measuring
from bench.tools.measuring import RESULTS, read_rows, write_rows
from grail.errors import InputError

ROW = {"selector": "wanda", "keep": "0.5", "variant": "ours", "samples": "512"}


@pytest.mark.parametrize("network", sweep.SUBJECTS)
def test_every_study_can_be_listed(network):
    rows = list(sweep._mixed(0.5) if network == "mixture" else sweep._studies(network, 0.5))
    assert len(rows) > 5
    assert {row[1] for row in rows} == {0.5}


def test_a_choice_takes_the_rows_that_have_all_it_names():
    rows = [(s, k, v, {}, 0) for s in ("a", "b") for k in (0.5, 0.3) for v in ("own", "ours")]
    assert list(Choice().of(rows)) == rows
    assert list(Choice(selectors=("a",), keeps=(0.3,)).of(rows)) == rows[2:4]
    assert list(Choice(variants=("own",), samples=(4,)).of(rows)) == []


@pytest.fixture
def asked(monkeypatch):
    """Returns the choice that each bench gets. The benches measure nothing."""
    found = {}
    for name, experiment in reproduce.EXPERIMENTS.items():

        def bench(choice, name=name):
            found[name] = choice
            write_rows(choice.folder / "studies_vit.csv", [ROW | {"accuracy": "0.5"}])

        monkeypatch.setitem(reproduce.EXPERIMENTS, name, experiment._replace(bench=bench))
    return found


def test_every_experiment_is_measured_into_the_folder_and_compared(asked, tmp_path, capsys):
    reproduce.main(["--output", str(tmp_path)])
    assert asked.keys() == reproduce.EXPERIMENTS.keys()
    assert {choice.folder for choice in asked.values()} == {tmp_path}
    assert "# The paper's tables, here" in (tmp_path / "paper.md").read_text(encoding="utf-8")
    out = capsys.readouterr().out
    rows = read_rows(RESULTS / "studies_vit.csv")
    known = next(row for row in rows if ROW.items() <= row.items())
    change = 0.5 / float(known["accuracy"]) - 1
    assert f"studies_vit.csv: accuracy: 0.5, committed {float(known['accuracy']):g}" in out
    assert f"({change:+.2%})" in out


def test_one_experiment_alone_and_once(asked, tmp_path, capsys):
    reproduce.main(["--output", str(tmp_path), "--only", "clip", "--only", "clip"])
    assert list(asked) == ["clip"]
    assert capsys.readouterr().out.count("clip: the vision tower") == 1


def test_files_of_other_benches_and_empty_ones_are_left_out(tmp_path):
    """They may lie in the same folder."""
    shutil.copy(RESULTS / "levers.csv", tmp_path)
    shutil.copy(RESULTS / "serving.csv", tmp_path)
    (tmp_path / "paper_cost.csv").write_text("network,design,seconds\n", encoding="utf-8")
    (tmp_path / "studies_vit.csv").write_text("", encoding="utf-8")
    assert reproduce.differences(tmp_path) == []


def test_a_choice_of_no_row_says_so(capsys):
    assert list(Choice(variants=("our",)).of([("a", 0.5, "ours", {}, 0)])) == []
    assert capsys.readouterr().out == "no row has one of ('our',)\n"


def test_an_unknown_variant_is_refused_before_any_work(tmp_path):
    with pytest.raises(InputError, match="no variant 'our'; the table has own"):
        sweep.table("vit", Choice(tmp_path, variants=("our",)))


@pytest.mark.parametrize("given", [["--keep", "half"], ["--keep", "2"], ["--only", "wanda"]])
def test_what_a_part_cannot_be_asked_is_refused(given, tmp_path, capsys):
    with pytest.raises(SystemExit):
        paper.main(["cost", *given, "--output", str(tmp_path)])
    assert given[0] in capsys.readouterr().err


def test_what_is_chosen_is_in_the_committed_tables():
    """So each value has one that it can be compared with."""
    for name, file in {"vit": "selectors_vit", "alpha": "studies_resnet18"}.items():
        choice = reproduce.EXPERIMENTS[name].choice
        rows = read_rows(RESULTS / f"{file}.csv")
        for selector in choice.selectors:
            for keep in choice.keeps:
                found = {
                    row["variant"]
                    for row in rows
                    if (row["selector"], row["keep"]) == (selector, str(keep))
                }
                assert set(choice.variants or SHOWN) <= found
    assert set(reproduce.SAMPLES) <= set(SIZES["resnet18"])


def test_a_folder_without_committed_rows_differs_in_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "RESULTS", tmp_path / "none")
    write_rows(tmp_path / "studies_vit.csv", [ROW | {"accuracy": "0.5"}])
    assert reproduce.differences(tmp_path) == []
