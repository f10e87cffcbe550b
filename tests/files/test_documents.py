"""Documents of files and datasets: each form that is plain is read, each split is the one meant."""

import json
import os

import datasets
import pytest

from grail.errors import InputError
from grail.files.documents import HELD_OUT_SPLITS, has_lines_for_rows, load_texts, split_of

CHAT = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}]
TEXTS = ["one,\n“two”\t3", "four"]
ROWS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".ndjson", ".JSON"])
@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        "\n \n" + json.dumps(TEXTS, indent=1),
        "\ufeff" + json.dumps(TEXTS),
        "\n".join(map(json.dumps, ROWS)),
        "\r\n\r\n".join(map(json.dumps, TEXTS)) + "\r\n",
    ],
    ids=["array", "indented array", "strings", "byte order mark", "lines", "strings on lines"],
)
def test_json_is_read_as_an_array_or_one_value_a_line(tmp_path, content, ending):
    path = tmp_path / f"texts{ending}"
    path.write_bytes(content.encode())
    assert list(load_texts(path)) == TEXTS


def test_one_json_object_over_several_lines_is_one_document(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(ROWS[0], indent=2))
    assert list(load_texts(tmp_path / "one.json")) == TEXTS[:1]


@pytest.mark.parametrize("ending", ["csv", "tsv", "CSV"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "byte order mark"])
def test_tables_are_read_by_column(tmp_path, ending, mark):
    between = "\t" if ending == "tsv" else ","
    long = "x y" * 50_000  # beyond what the csv module allows by default
    cells = [f'"{text}"' for text in (*TEXTS, long)]
    rows = [f"text{between}id", *(f"{cell}{between}7" for cell in cells)]
    path = tmp_path / f"table.{ending}"
    path.write_text(mark + "\n".join(rows), encoding="utf-8")
    assert list(load_texts(path)) == [*TEXTS, long]
    assert list(load_texts(path, field="id")) == ["7"] * 3


@pytest.mark.parametrize("form", ["lines", "array", "parquet", "bare lines", "bare array", "alone"])
def test_chats_come_as_lists_of_messages(tmp_path, form):
    path = tmp_path / f"chats.{'parquet' if form == 'parquet' else 'json'}"
    rows = [{"messages": CHAT}, {"messages": CHAT}]
    if form == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        content = {
            "lines": "\n".join(map(json.dumps, rows)),
            "array": json.dumps(rows),
            "bare lines": "\n".join(map(json.dumps, [CHAT, CHAT])),
            "bare array": json.dumps([CHAT, CHAT]),
            "alone": json.dumps(CHAT),
        }
        path.write_text(content[form])
    assert list(load_texts(path)) == [CHAT] * (1 if form == "alone" else 2)


def test_text_is_looked_for_before_messages_and_a_field_wins(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT, "text": "plain", "b": "other"}))
    assert list(load_texts(tmp_path / "a.jsonl")) == ["plain"]
    assert list(load_texts(tmp_path / "a.jsonl", field="messages")) == [CHAT]
    assert list(load_texts(tmp_path / "a.jsonl", field="b")) == ["other"]


def folder_of(tmp_path, *splits, saved=False):
    """A dataset whose rows say their split."""
    rows = {name: datasets.Dataset.from_list([{"text": f"in {name}"}]) for name in splits}
    folder = tmp_path / "data"
    if saved:
        datasets.DatasetDict(rows).save_to_disk(folder)
        return str(folder)
    folder.mkdir()
    for name, split in rows.items():
        split.to_parquet(folder / f"{name}.parquet")
    return str(folder)


@pytest.mark.parametrize("saved", [False, True], ids=["files", "save_to_disk"])
@pytest.mark.parametrize(
    ("splits", "asked", "found"),
    [
        (["train", "test", "validation"], None, "train"),
        (["train", "test", "validation"], HELD_OUT_SPLITS, "test"),
        (["train", "validation"], HELD_OUT_SPLITS, "validation"),
        (["train", "test"], "test", "test"),
    ],
    ids=["default", "held out", "no test", "named"],
)
def test_a_split_is_the_first_that_is_there(tmp_path, saved, splits, asked, found):
    source = folder_of(tmp_path, *splits, saved=saved)
    assert list(load_texts(source, split=asked)) == [f"in {found}"]
    assert split_of(source, asked) == found


@pytest.mark.parametrize("saved", [False, True], ids=["files", "save_to_disk"])
@pytest.mark.parametrize("asked", [HELD_OUT_SPLITS, "validation"], ids=["held out", "named"])
def test_a_split_that_is_not_there_is_refused_with_those_that_are(tmp_path, saved, asked):
    source = folder_of(tmp_path, "train", saved=saved)
    with pytest.raises(InputError, match=r"has no split .*validation: .*'train'"):
        list(load_texts(source, split=asked))
    with pytest.raises(InputError, match=r"has no split .*validation: .*'train'"):
        split_of(source, asked)


@pytest.mark.parametrize("name", [None, "train", "validation"])
def test_the_only_split_of_a_saved_dataset_is_read_unless_another_is_named(tmp_path, name):
    stored = datasets.Dataset.from_dict({"text": ["a", "b"]}, split=name and datasets.Split(name))
    stored.save_to_disk(tmp_path)
    for asked in {None, HELD_OUT_SPLITS, name}:
        assert list(load_texts(str(tmp_path), split=asked)) == ["a", "b"]
        assert split_of(str(tmp_path), asked) == name
    for asked in ("test", "train[:1]"):
        with pytest.raises(InputError, match="leave the split out"):
            list(load_texts(str(tmp_path), split=asked))
        with pytest.raises(InputError, match="leave the split out"):
            split_of(str(tmp_path), asked)


def test_a_file_has_no_splits(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    assert list(load_texts(tmp_path / "a.txt", split=HELD_OUT_SPLITS)) == ["a"]
    with pytest.raises(InputError, match="one file and has no split 'test'"):
        load_texts(tmp_path / "a.txt", split="test")
    assert split_of(tmp_path / "a.txt", HELD_OUT_SPLITS) is None


@pytest.mark.parametrize("name", ["a.txt", "a.md"])
def test_plain_text_has_no_fields(tmp_path, name):
    (tmp_path / name).write_text("a")
    with pytest.raises(InputError, match="plain text and has no field 'text'"):
        load_texts(tmp_path / name, field="text")


@pytest.mark.parametrize("named", [{"field": ""}, {"split": ""}, {"split": []}], ids=str)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "no/dataset"])
def test_empty_names_of_fields_and_splits_are_refused(tmp_path, monkeypatch, name, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a", "": "b"}))
    with pytest.raises(InputError, match=f"the name of the {min(named)} is empty"):
        load_texts(name, **named)


@pytest.mark.parametrize("ending", ["csv", "tsv"])
@pytest.mark.parametrize("header", [["text", "text"], ["id", "text", "a", "id"]])
def test_columns_of_one_name_are_refused(tmp_path, ending, header):
    between = "," if ending == "csv" else "\t"
    (tmp_path / f"a.{ending}").write_text(between.join(header) + "\n" + between.join("wxyz"))
    with pytest.raises(InputError, match="several columns of the name"):
        list(load_texts(tmp_path / f"a.{ending}"))


@pytest.mark.parametrize("name", ["pipe", "pipe.txt", "pipe.jsonl", "-", "/dev/null"])
def test_pipes_and_devices_are_refused_in_words(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    if name.startswith("pipe"):
        os.mkfifo(name)
    with pytest.raises(InputError, match=r"pipe or a device.*file first"):
        load_texts(name)


@pytest.mark.parametrize("name", ["link", "link.txt"])
@pytest.mark.parametrize("target", ["itself", "nowhere"])
def test_links_that_lead_to_no_file_are_refused(tmp_path, name, target):
    (tmp_path / name).symlink_to(tmp_path / (name if target == "itself" else target))
    with pytest.raises(InputError, match="link that leads to no file"):
        load_texts(str(tmp_path / name))


def test_files_of_a_folder_of_texts_are_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.txt").write_text("three\n\nfour")
    assert list(load_texts(str(tmp_path))) == ["one\ntwo\n", "three\n\nfour"]


@pytest.mark.parametrize("name", ["wikitext2", "WikiText-2", "wikitext-2-raw-v1"])
def test_wikitext2_is_a_short_name_unless_a_file_has_it(tmp_path, monkeypatch, name):
    asked = {}

    def load_dataset(builder, **options):
        asked.update(options, builder=builder)
        return datasets.Dataset.from_list([{"text": "a"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert list(load_texts(name, split=HELD_OUT_SPLITS)) == ["a"]
    assert asked["builder"] == "Salesforce/wikitext"
    assert (asked["name"], asked["split"]) == ("wikitext-2-raw-v1", "test")
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("of my own")
    assert list(load_texts(name)) == ["of my own"]


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("wikitext2", True),
        ("wikitext:wikitext-103-raw-v1", True),
        ("Salesforce/wikitext:wikitext-2-v1", True),
        ("allenai/c4:en", False),
        ("EleutherAI/wikitext_document_level", False),
        (["wikitext2"], False),
    ],
)
def test_rows_are_lines_where_the_dataset_is_known_for_it(source, lines):
    assert has_lines_for_rows(source) == lines


@pytest.mark.parametrize("source", [None, 5, b"text", "", " ", ":config"], ids=repr)
def test_what_names_no_text_is_refused(source):
    with pytest.raises(InputError, match="text"):
        load_texts(source)
