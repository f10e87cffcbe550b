"""Text in, token sequences out: nothing lost, nothing padded, nothing read in vain."""

import json
import logging
import sys
import warnings

import datasets
import pytest
import torch

from grail.errors import EmptyCalibrationError, InputError
from grail.files.documents import load_texts
from grail.files.packing import require_text, token_batches

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
    monkeypatch.setattr("grail.files.documents._PIECE", 100)
    pieces = list(load_texts(tmp_path / name))
    assert "".join(pieces) == text
    assert 10 < len(pieces) < 100


@pytest.mark.parametrize("name", ["documents.jsonl", "documents.parquet"])
def test_a_wrong_field_names_those_found(tmp_path, name):
    with pytest.raises(
        InputError, match=r"no field 'text' or 'messages'; fields found: 'id', 'body'"
    ):
        list(load_texts(write(tmp_path / name, field="body")))
    with pytest.raises(InputError, match="field 'id' holds no text but int"):
        list(load_texts(write(tmp_path / name), field="id"))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("bad.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("lists.jsonl", b'["text"]\n["text"]\n', "is not JSON .* one object a line, or one array"),
        ("digits.jsonl", b'{"text": "a", "id": ' + b"9" * 5000 + b"}", "is not JSON"),
        ("half.jsonl", b'{"text": "a \\ud800"}', "line 1, .* holds half of a surrogate pair"),
        ("half.json", b'["a", "\\ud800"]', "element 2 of the array holds half of a surrogate"),
        ("deep.jsonl", b"[" * 100_000, "is not JSON"),
        ("latin.txt", "naïve".encode("latin-1"), "cannot be read as UTF-8"),
        ("bad.parquet", b"PAR1 and nothing else", "cannot be read"),
        ("array.json", b'["a",\n "b"', "is not JSON .* line 2 column"),
        ("numbers.json", b"[1, 2]", "element 1 of the array holds no text but int"),
        ("object.json", b'{"data": [{"text": "a"}]}', "no field .* found: 'data'"),
        ("null.json", b"null", "holds no text but null"),
        ("empty.jsonl", b'{"messages": []}', "field 'messages' holds no text but list"),
        ("other.jsonl", b'{"messages": [{"from": "a", "value": "b"}]}', "with role and content"),
        ("more.csv", b"id,text\n1,a,b\n", "line 2 has more cells than the header"),
        ("fewer.csv", b"id,text\n1\n", "line 2, field 'text' holds no text but null"),
        ("quote.csv", b'text\n"a', "is no table"),
        ("other.csv", b"id;text\n1;a\n", "found: 'id;text'"),
        ("text.txt.gz", b"\x1f\x8b", "is compressed"),
        ("text.jsonl.ZST", b"", "is compressed"),
        ("wide.txt", "a".encode("utf-16-le"), "holds NUL bytes"),
        ("wide.json", "[]".encode("utf-16"), "cannot be read as UTF-8"),
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


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "w90 {{ m.content }} w91 {% endfor %}"
)
CHAT = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}]


def test_chats_are_rendered_by_the_template(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    found = token_batches([CHAT, words(20, 2)], tokenizer, tokens=None, sequence_length=11)
    assert found[0].tolist() == [[90, 5, 6, 91, 90, 7, 91, END, 20, 21, END]]


@pytest.mark.parametrize(
    ("document", "template", "sentence"),
    [
        (CHAT, None, "need a tokenizer with a chat template"),
        ([{"role": "tool", "content": "w5"}], TEMPLATE, "does not render .*no tools"),
        (CHAT, "{% for", "does not render"),
        (5, TEMPLATE, "a document is int"),
        (None, TEMPLATE, "a document is NoneType"),
        (b"w5", TEMPLATE, "a document is bytes"),
        ([], TEMPLATE, "a document is list"),
        ("w5 \ud800", TEMPLATE, "no text that can be encoded"),
    ],
)
def test_refuses_what_no_text_can_be_made_of(tiny_tokenizer, document, template, sentence):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=sentence):
        token_batches([words(3, 9), document], tokenizer, tokens=None, sequence_length=8)


@pytest.fixture
def byte_tokenizer():
    """A byte-level tokenizer that merges across white space, and begins a text with `<s>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    core.train_from_iterator(["a line\n\n = Title = \n\n a line\n\n"] * 9, trainer)
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


LINES = ["", " = Title = \n", "", " a line with more in it\n", "", " a line\n"] * 7


def expected(tokenizer, text, length):
    ids = tokenizer(text).input_ids
    whole = len(ids) - len(ids) % length
    return torch.tensor(ids[:whole]).view(-1, length)


@pytest.mark.parametrize(("join", "between"), [("blank", "\n\n"), ("none", "")])
@pytest.mark.parametrize("length", [7, 11, 16])
def test_joined_documents_are_tokenised_as_one_text(byte_tokenizer, join, between, length):
    found = token_batches(
        LINES, byte_tokenizer, tokens=None, sequence_length=length, join=join, batch_size=3
    )
    assert torch.equal(torch.cat(found), expected(byte_tokenizer, between.join(LINES), length))


@pytest.mark.parametrize("tokens", [32, 96, 128])
def test_joining_stops_where_it_has_enough(byte_tokenizer, tokens):
    def endless():
        yield from LINES * 40
        pytest.fail("read on after it had enough")

    found = token_batches(
        endless(), byte_tokenizer, tokens=tokens, sequence_length=16, join="blank"
    )
    whole = expected(byte_tokenizer, "\n\n".join(LINES * 40), 16)
    assert torch.equal(torch.cat(found), whole[: tokens // 16])


def test_stretches_of_joined_documents_keep_their_separator(byte_tokenizer, monkeypatch):
    monkeypatch.setattr("grail.files.packing._CHARACTERS", 1)  # too few: several stretches
    options = {"tokens": 64, "sequence_length": 16, "join": "blank"}
    found = token_batches(["ab", "c"] * 50, byte_tokenizer, **options)
    text = byte_tokenizer.decode(torch.cat(found).flatten(), clean_up_tokenization_spaces=False)
    assert ("<s>" + "\n\n".join(["ab", "c"] * 50)).startswith(text)


def test_rows_of_wikitext_are_joined_by_blank_lines(byte_tokenizer, monkeypatch):
    rows = datasets.Dataset.from_dict({"text": LINES})
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: rows)
    whole = expected(byte_tokenizer, "\n\n".join(LINES), 8)
    for source in ("wikitext2", "wikitext:wikitext-2-raw-v1", "Salesforce/wikitext:any"):
        found = token_batches(source, byte_tokenizer, tokens=None, sequence_length=8)
        assert torch.equal(torch.cat(found), whole)
    found = token_batches("some/other", byte_tokenizer, tokens=None, sequence_length=8)
    assert (torch.cat(found) == 1).sum() == 20  # an end-of-text for each row that is not blank
    with pytest.raises(InputError, match="join must be one of eos, blank, none; got 'newline'"):
        token_batches("wikitext2", byte_tokenizer, tokens=None, join="newline")


@pytest.mark.parametrize("join", ["eos", "blank", "none"])
def test_a_text_file_is_one_document_however_it_is_read(
    tiny_tokenizer, tmp_path, monkeypatch, join
):
    lines = [words(3 + number, 5) + "\n" for number in range(60)]
    (tmp_path / "a.txt").write_text("".join(lines))
    options = {"tokens": None, "sequence_length": 43, "join": join, "batch_size": 99}
    found = token_batches(tmp_path / "a.txt", tiny_tokenizer(), **options)[0]
    monkeypatch.setattr("grail.files.documents._PIECE", 50)
    again = token_batches(tmp_path / "a.txt", tiny_tokenizer(), **options)[0]
    assert torch.equal(found, again)
    assert found.shape == ((7 if join == "eos" else 6), 43)  # 300 tokens, with the end 301 = 7 · 43
    assert (found == END).sum() == (1 if join == "eos" else 0)


@pytest.mark.parametrize(
    ("text", "length", "known"),
    [
        ("", None, True),
        (" \n\t ", None, True),
        ("w5", None, False),
        ("w5 w6", 8, True),
        ("w5 w6", 7, False),  # a byte a token, and two that begin and end the document
        ("㍿" * 3, 32, False),  # four characters of three bytes each after NFKC
        ("㍿", 15, True),
    ],
)
def test_too_little_text_is_known_without_a_tokenizer(tmp_path, text, length, known):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    if not known:
        return require_text(tmp_path / "a.txt", sequence_length=length)
    with pytest.raises(EmptyCalibrationError, match="one sequence"):
        require_text(tmp_path / "a.txt", sequence_length=length)


def test_join_eos_needs_a_tokenizer_with_an_end_of_text_token(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    sizes = {"tokens": 6, "sequence_length": 3}
    with pytest.raises(InputError, match=r'no end-of-text token.*"blank" or "none"'):
        token_batches(["w5 w7", "w11 w13"] * 3, tokenizer, join="eos", **sizes)
    batches = token_batches(["w5 w7", "w11 w13"] * 3, tokenizer, **sizes)
    assert batches[0].tolist() == [[5, 7, 11], [13, 5, 7]]
