"""Text in, token sequences out: nothing lost, nothing padded, nothing read in vain."""

import json
import logging
import sys
import warnings

import datasets
import pytest
import torch

from grail.calibration import load_texts, token_batches
from grail.errors import EmptyCalibrationError, InputError

END = 2  # </s> of the tiny tokenizer


def words(first, count):
    """A document of the tiny tokenizer whose tokens count up from `first`."""
    return " ".join(f"w{first + index}" for index in range(count))


def test_packs_documents_with_an_end_token_and_drops_the_rest(tiny_tokenizer):
    texts = [words(10, 5), "  \n", words(20, 6), words(30, 2)]
    batches = token_batches(texts, tiny_tokenizer(), tokens=None, sequence_length=4, batch_size=2)
    # 10–14 END 20–25 END 30 31 END: 16 tokens in four sequences, and none left over.
    expected = [[[10, 11, 12, 13], [14, END, 20, 21]], [[22, 23, 24, 25], [END, 30, 31, END]]]
    assert [batch.tolist() for batch in batches] == expected
    assert batches[0].dtype == torch.int64


def test_gives_whole_sequences_for_the_tokens_asked(tiny_tokenizer):
    batches = token_batches(
        [words(3, 90)], tiny_tokenizer(), tokens=33, sequence_length=16, batch_size=2
    )
    assert [tuple(batch.shape) for batch in batches] == [(2, 16), (1, 16)]


def test_reads_no_further_than_it_needs(tiny_tokenizer):
    def endless():
        yield from (words(3, 9) for _ in range(20))
        pytest.fail("read on after it had enough")

    token_batches(endless(), tiny_tokenizer(), tokens=200, sequence_length=10)


def test_a_seed_draws_distinct_sequences_from_more_text(tiny_tokenizer):
    texts = [words(3 + index, 7) for index in range(80)]
    options = {"tokens": 80, "sequence_length": 8, "batch_size": 100}
    first = token_batches(texts, tiny_tokenizer(), **options)[0]
    drawn = token_batches(texts, tiny_tokenizer(), seed=1, **options)[0]
    again = token_batches(texts, tiny_tokenizer(), seed=1, **options)[0]
    other = token_batches(texts, tiny_tokenizer(), seed=2, **options)[0]
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, other)
    assert first[:, 0].max() == 3 + 9 < drawn[:, 0].max()
    assert len(drawn.unique(dim=0)) == len(drawn) == 10


def test_a_document_longer_than_the_context_brings_no_warning(tiny_tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)  # to caplog
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        token_batches([words(3, 64)], tokenizer, tokens=64, sequence_length=16)
    assert not caplog.records


def test_says_when_the_text_is_shorter_than_asked(tiny_tokenizer):
    with pytest.warns(UserWarning, match="64 tokens .* fewer than the 1000 asked"):
        batches = token_batches([words(3, 70)], tiny_tokenizer(), tokens=1000, sequence_length=16)
    assert sum(batch.numel() for batch in batches) == 64


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [([], "empty"), ([" \n", ""], "empty"), ([words(3, 10)], "11 tokens, less than one sequence")],
    ids=["no document", "blank", "short"],
)
def test_refuses_text_shorter_than_one_sequence(tiny_tokenizer, texts, sentence):
    with pytest.raises(EmptyCalibrationError, match=sentence):
        token_batches(texts, tiny_tokenizer(), tokens=32, sequence_length=16)


@pytest.mark.parametrize(
    "options",
    [{"tokens": 8}, {"sequence_length": 0}, {"batch_size": 0}],
    ids=lambda o: next(iter(o)),
)
def test_refuses_impossible_sizes(tiny_tokenizer, options):
    sizes = {"tokens": 32, "sequence_length": 16, **options}
    with pytest.raises(InputError, match=next(iter(options))):
        token_batches([words(3, 70)], tiny_tokenizer(), **sizes)


DOCUMENTS = ["First, naïve.\n\nSecond paragraph.\n", "Another: 🎉"]


def write(path, field="text"):
    """Writes DOCUMENTS in the format that the name of `path` says."""
    rows = [{"id": index, field: text} for index, text in enumerate(DOCUMENTS)]
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        lines = [json.dumps(row) for row in rows]
        path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["documents.jsonl", "documents.parquet", "documents.JSONL"])
def test_rows_are_documents(tmp_path, name):
    assert list(load_texts(write(tmp_path / name))) == DOCUMENTS
    assert list(load_texts(write(tmp_path / name, field="body"), field="body")) == DOCUMENTS


def test_json_lines_end_at_line_feeds_alone(tmp_path):
    # U+2028 may stand raw in a JSON string; a byte order mark is no part of the text.
    text = "one\u2028two\u0085three"
    row = json.dumps({"text": text}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(row + "\n" + row, encoding="utf-8-sig")
    assert list(load_texts(tmp_path / "a.jsonl")) == [text, text]


def test_a_dataset_that_breaks_later_is_an_input_error(monkeypatch):
    def rows(*args, **kwargs):
        yield {"text": "first"}
        raise ConnectionError("gone")

    monkeypatch.setattr("datasets.load_dataset", rows)
    texts = load_texts("some-dataset")
    assert next(texts) == "first"
    with pytest.raises(InputError, match=r"some-dataset cannot be read.*gone"):
        next(texts)


def test_a_dataset_name_is_left_to_datasets(tmp_path):
    # `datasets` takes a folder of data files for a name; no network is needed.
    write(tmp_path / "train.jsonl")
    assert list(load_texts(str(tmp_path))) == DOCUMENTS


@pytest.mark.parametrize("name", ["text.txt", "README.md"])
def test_a_text_file_comes_whole_and_in_pieces(tmp_path, monkeypatch, name):
    text = "".join(f"line {index} – naïve\n" for index in range(100))
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert list(load_texts(tmp_path / name)) == [text]
    monkeypatch.setattr("grail.calibration._PIECE", 100)
    pieces = list(load_texts(tmp_path / name))
    assert "".join(pieces) == text
    assert 10 < len(pieces) < 100


@pytest.mark.parametrize("name", ["documents.jsonl", "documents.parquet"])
def test_a_wrong_field_names_those_found(tmp_path, name):
    with pytest.raises(InputError, match=r"no field 'text'; fields found: 'id', 'body'"):
        list(load_texts(write(tmp_path / name, field="body")))
    with pytest.raises(InputError, match="holds no text in field 'id'"):
        list(load_texts(write(tmp_path / name), field="id"))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("bad.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("list.jsonl", b'["text"]\n', "line 1 is not a JSON object"),
        ("digits.jsonl", b'{"text": "a", "id": ' + b"9" * 5000 + b"}", "line 1 is not JSON"),
        ("half.jsonl", b'{"text": "a \\ud800"}', "line 1 holds half of a surrogate pair"),
        ("deep.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("latin.txt", "naïve".encode("latin-1"), "cannot be read as UTF-8"),
        ("bad.parquet", b"PAR1 and nothing else", "cannot be read"),
        ("array.json", b'["a",\n "b"]\n', "line 1 is not JSON"),
        ("missing.txt", None, "no such file"),
        ("missing.TXT", None, "no such file"),
        ("missing.md", None, "no such file"),
        ("missing.jsonl", None, "no such file"),
        ("missing.parquet", None, "no such file"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value else "",
)
def test_refuses_unreadable_files(tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        list(load_texts(tmp_path / name))


def test_refuses_an_unknown_dataset(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="nobody/no-such-dataset cannot be read"):
        list(load_texts("nobody/no-such-dataset"))


@pytest.mark.parametrize("name", ["documents.parquet", "nobody/dataset"])
def test_names_the_extra_when_datasets_is_missing(tmp_path, monkeypatch, name):
    source = write(tmp_path / name) if name.endswith("parquet") else name
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"grail-kernels\[llm\]"):
        list(load_texts(source))
