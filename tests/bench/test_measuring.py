"""Rows of CSV that grow: what is measured stays, whatever columns later rows bring."""

import pytest

from bench.tools.measuring import Table, read_rows

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
