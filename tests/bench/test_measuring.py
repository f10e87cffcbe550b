"""Rows of CSV that grow: what is measured stays, whatever columns later rows bring."""

import pytest

from bench.tools import measuring
from bench.tools.commandline import CommandLine, save
from bench.tools.measuring import Table, compared, read_rows, write_rows

ENDS = ("threads", "torch", "commit")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.csv"


def test_a_row_is_appended_and_found_again(path):
    table = Table(path, ("name",))
    table.add({"name": "one", "value": 1.5})
    head = path.read_bytes()
    table.add({"name": "two", "value": 2})
    assert path.read_bytes().startswith(head)
    for found in (table, Table(path, ("name",))):
        assert ("one",) in found
        assert ("three",) not in found
        assert [row["value"] for row in found.rows] == ["1.5", "2"]
    assert tuple(table.rows[0]) == ("name", "value", *ENDS)


def test_new_columns_are_empty_in_the_rows_before(path):
    Table(path, ("name",)).add({"name": "one", "value": 1})
    table = Table(path, ("name",))
    table.add({"name": "two", "each": "1 2", "value": 2})
    table.add({"name": "three", "value": 3})
    rows = read_rows(path)
    assert [row["name"] for row in rows] == ["one", "two", "three"]
    assert [row["each"] for row in rows] == ["", "1 2", ""]
    assert [row["value"] for row in rows] == ["1", "2", "3"]
    assert tuple(rows[0]) == ("name", "value", *ENDS, "each")
    assert list(path.parent.iterdir()) == [path]


def test_rows_that_another_process_added_stay(path):
    Table(path, ("name",)).add({"name": "one", "value": 1})
    early, late = Table(path, ("name",)), Table(path, ("name",))
    early.add({"name": "two", "value": 2})
    late.add({"name": "three", "value": 3, "each": "4"})
    early.add({"name": "four", "value": 5})
    rows = read_rows(path)
    assert [row["name"] for row in rows] == ["one", "two", "three", "four"]
    assert [row["each"] for row in rows] == ["", "", "4", ""]
    assert all(row["torch"] for row in rows)


def test_what_is_written_anew_is_whole_or_the_old_file(path, monkeypatch):
    table = Table(path, ("name",))
    table.add({"name": "one", "value": 1})
    before = path.read_bytes()
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        table.add({"name": "two", "value": 2, "each": "3"})
    assert path.read_bytes() == before


def test_a_row_that_is_there_is_named(path, capsys):
    table = Table(path, ("name", "keep"))
    assert not table.measured("one", 0.5)
    table.add({"name": "one", "keep": 0.5, "value": 1})
    capsys.readouterr()
    assert table.measured("one", 0.5)
    assert capsys.readouterr().out == f"already measured in {path}: name=one, keep=0.5\n"


@pytest.fixture
def committed(tmp_path, monkeypatch):
    folder = tmp_path / "committed"
    monkeypatch.setattr(measuring, "RESULTS", folder)
    monkeypatch.setattr("bench.tools.commandline.RESULTS", folder)
    Table(folder / "rows.csv", ("name",)).add({"name": "one", "value": 2.0, "each": "1 2"})
    return folder


def test_a_row_elsewhere_is_compared_with_the_committed_one(path, committed, capsys):
    capsys.readouterr()
    table = Table(path, ("name",))
    table.add({"name": "one", "value": 2.1, "each": "1 3"})
    table.add({"name": "two", "value": 5})
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "committed" in line] == [
        "    value: 2.1, committed 2 (+5.00%)"
    ]


def test_the_committed_file_is_compared_with_nothing(committed, capsys):
    capsys.readouterr()
    Table(committed / "rows.csv", ("name",)).add({"name": "two", "value": 3})
    assert "committed 3" not in capsys.readouterr().out


def test_several_rows_are_compared_by_their_ratios_and_texts_by_equality():
    known = [{"n": str(n), "p50": str(n), "equal": "yes"} for n in (1, 2, 4)]
    rows = [
        {"n": "1", "p50": "2", "equal": "yes"},
        {"n": "2", "p50": "2", "equal": "no"},
        {"n": "3", "p50": "9", "equal": "no"},
        {"n": "4", "p50": "6", "equal": "yes"},
    ]
    assert list(compared(rows, known, ("n",), ("p50", "equal"))) == [
        "p50: 1.500 of the committed value in the median of 3 rows, 1.000 to 2.000",
        "equal: 2 of 3 rows have the committed value",
    ]
    assert not list(compared(rows, [], ("n",), ("p50",)))


@pytest.mark.parametrize(
    ("names", "given", "expected"),
    [
        ({"rows": "rows"}, [], "committed/rows.csv"),
        ({"rows": "rows"}, ["--output", "new"], "new/rows.csv"),
        ({"rows": "rows"}, ["--output", "new/other.csv"], "new/other.csv"),
        ({"rows": "rows_*"}, [], "committed"),
        ({"rows": "rows_*"}, ["--output", "new"], "new"),
        ({"results": "speed{device}"}, [], None),
        ({"results": "speed{device}"}, ["--output", "new"], "new/speed_cpu.csv"),
        ({"results": "speed{device}"}, ["--output", "committed"], "committed/speed_cpu.csv"),
    ],
)
def test_output_is_a_folder_or_a_file(names, given, expected, committed, monkeypatch):
    monkeypatch.chdir(committed.parent)
    parser = CommandLine("A bench.", "device", takes="a second", device={"default": "cpu"}, **names)
    found = parser.read(given).output
    assert (found and found.resolve()) == (expected and committed.parent / expected)


def test_several_files_need_a_folder(committed, capsys):
    with pytest.raises(SystemExit):
        CommandLine("A bench.", takes="a second", rows="*").read(["--output", "one.csv"])
    assert "give a folder" in capsys.readouterr().err


def test_what_is_saved_at_the_end_is_compared(committed, tmp_path, capsys):
    write_rows(committed / "speed_cpu.csv", [{"case": "a", "p50": "2", "commit": "x"}])
    parser = CommandLine("A bench.", takes="a second", results="speed_cpu")
    options = parser.read(["--output", str(tmp_path / "new")])
    capsys.readouterr()
    rows = [{"case": "a", "p50": "3"}]
    save(options, rows, done=False)
    assert not capsys.readouterr().out
    save(options, rows)
    assert capsys.readouterr().out == "beside the committed CSV: p50: 3, committed 2 (+50.00%)\n"
    assert read_rows(tmp_path / "new" / "speed_cpu.csv")[0]["p50"] == "3"
