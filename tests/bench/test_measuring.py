"""Rows of CSV that grow: what is measured stays, whatever columns later rows bring."""

from pathlib import Path

import pytest

from bench.tools import measuring
from bench.tools.commandline import CommandLine, save, write
from bench.tools.measuring import Table, compared, read_rows, write_rows
from grail.errors import InputError

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


@pytest.mark.parametrize("cut", [2, 6, 30, 60])
def test_a_line_that_a_kill_cut_off_is_measured_again(path, cut):
    table = Table(path, ("name",))
    table.add({"name": "first", "value": 1})
    head = path.read_bytes()
    table.add({"name": "second", "value": 2})
    cut = min(cut, len(path.read_bytes()) - len(head) - 1)
    path.write_bytes(path.read_bytes()[: len(head) + cut])
    table = Table(path, ("name",))
    assert ("first",) in table
    assert ("second",) not in table
    table.add({"name": "second", "value": 2})
    table.add({"name": "third", "value": 3})
    found = [(row["name"], row["value"]) for row in read_rows(path)]
    assert found == [("first", "1"), ("second", "2"), ("third", "3")]


def test_the_file_of_another_bench_is_refused_and_stays(path):
    Table(path, ("name",)).add({"name": "one", "value": 1})
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"has no column selector, keep: it is the file of anoth"):
        Table(path, ("selector", "keep"))
    assert path.read_bytes() == before


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
        "    value: 2.1, committed 2 (+5.00%)",
        "    no committed row has the same name",
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


def test_nothing_to_compare_with_is_said():
    known = [{"n": "1", "p50": "1"}]
    assert list(compared([{"n": "2", "p50": "1"}], known, ("n",), ("p50",))) == [
        "no committed row has the same n"
    ]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (["0", "3"], "x: 1 of 2 rows are 0, as the committed ones"),
        (["nan", "0"], "x: in 1 of 2 rows one of the two is no finite number"),
        (["", ""], "x: in 2 of 2 rows one of the two is no finite number"),
    ],
)
def test_what_has_no_ratio_is_said(values, line):
    known = [{"n": str(n), "x": "0"} for n in range(2)]
    rows = [{"n": str(n), "x": value} for n, value in enumerate(values)]
    assert line in list(compared(rows, known, ("n",), ("x",)))


def test_a_number_that_became_nan_does_not_hide_in_the_ratios():
    known = [{"n": str(n), "x": "2"} for n in range(3)]
    rows = [{"n": str(n), "x": value} for n, value in enumerate(["2", "nan", "4"])]
    assert list(compared(rows, known, ("n",), ("x",))) == [
        "x: 1.500 of the committed value in the median of 2 rows, 1.000 to 2.000",
        "x: in 1 of 3 rows one of the two is no finite number",
    ]


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


def test_an_option_can_name_another_file(committed):
    parser = CommandLine("A bench.", takes="a second", results="a", instead={"other": "b"})
    parser.add_argument("--other", action="store_true")
    assert parser.read(["--output", "new"]).output == Path("new/a.csv")
    assert parser.read(["--output", "new", "--oth"]).output == Path("new/b.csv")


@pytest.mark.parametrize(
    ("names", "given", "message"),
    [
        ({"results": "speed"}, "file/new", "file is a file; give a folder"),
        ({"rows": "*"}, "file", "file is a file; give a folder"),
        ({"rows": "speed"}, "folder.csv", "folder.csv is a folder"),
        ({"results": "speed"}, "locked/new", "locked cannot be written"),
        ({"results": "speed"}, "folder.csv/locked.csv", "locked.csv cannot be written"),
    ],
)
def test_what_cannot_be_written_is_refused_before_any_work(
    names, given, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name in ("folder.csv", "locked"):
        (tmp_path / name).mkdir()
    for name in ("file", "folder.csv/locked.csv"):
        (tmp_path / name).touch()
    # Root may write everywhere.
    monkeypatch.setattr("os.access", lambda path, _: "locked" not in Path(path).name)
    with pytest.raises(SystemExit):
        CommandLine("A bench.", takes="a second", **names).read(["--output", given])
    assert message in capsys.readouterr().err


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
    write(options, rows)
    assert not capsys.readouterr().out
    save(options, rows)
    assert capsys.readouterr().out == "beside the committed CSV: p50: 3, committed 2 (+50.00%)\n"
    assert read_rows(tmp_path / "new" / "speed_cpu.csv")[0]["p50"] == "3"
