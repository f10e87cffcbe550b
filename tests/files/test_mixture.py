"""Several texts as one calibration: shares, order, held-out sequences, origin."""

import math
import random

import pytest
import torch

import grail
from grail.calibrate.stream import Stream
from grail.errors import EmptyCalibrationError, InputError
from grail.files.mixture import apportion, as_text, interleaving, named_texts
from grail.files.text import Text

pytest.importorskip("transformers")

LENGTH = 8


@pytest.fixture
def write(tmp_path):
    """`write(name, word, count)`: a file of so many times one word; returns its path."""

    def make(name, word, count):
        path = tmp_path / name
        path.write_text(" ".join([word] * count))
        return str(path)

    return make


@pytest.fixture
def loaded(tiny_llama, tiny_tokenizer):
    return tiny_llama(), tiny_tokenizer()


def owners(batches, count):
    """Returns the number of each sequence's text, whose words are w10, w11 …, and whether held."""
    rows = torch.cat(batches)
    first = rows[:, 0] - 10
    assert torch.equal(rows, (first + 10)[:, None].expand_as(rows))
    assert set(first.tolist()) <= set(range(count))
    return first.tolist()


@pytest.mark.parametrize("texts", range(1, 8))
@pytest.mark.parametrize("equal", [True, False])
def test_a_run_holds_out_each_text_in_proportion(texts, equal, write, loaded):
    weights = [1 if equal else 1 + i for i in range(texts)]
    shares = [weight / sum(weights) for weight in weights]
    sources = [write(f"{i}.txt", f"w{10 + i}", 1000) for i in range(texts)]
    total = 105
    mixture = grail.Mixture(
        sources, shares, tokens=total * LENGTH, sequence_length=LENGTH, batch_size=4, seed=0
    )
    network, tokenizer = loaded
    batches = mixture.batches(network, tokenizer)
    assert [len(batch) for batch in batches] == [4] * 26 + [1]
    found = owners(batches, texts)
    counts = [found.count(text) for text in range(texts)]
    assert sum(counts) == total
    stream = Stream(network, network.model.layers, batches)
    flags = [stream.held_out(i) for i in range(len(batches))]
    held = torch.cat(
        [
            torch.zeros(len(batch), dtype=torch.bool) if flag is None else flag
            for batch, flag in zip(batches, flags, strict=True)
        ]
    ).tolist()
    assert sum(held) == total // 5
    for text in range(texts):
        assert abs(counts[text] - shares[text] * total) < 1
        of_text = sum(h for h, owner in zip(held, found, strict=True) if owner == text)
        assert abs(of_text - counts[text] / 5) < 1
        for end in range(1, total + 1):  # any first part is such a mixture, too
            assert abs(found[:end].count(text) - counts[text] * end / total) <= 2


@pytest.mark.parametrize("seed", range(20))
def test_apportioning_keeps_the_total_and_misses_no_share_by_one(seed):
    draw = random.Random(seed)
    shares = [draw.random() for _ in range(draw.randrange(1, 9))]
    total = draw.randrange(0, 10**30) if seed % 2 else draw.randrange(0, 20)
    counts = apportion(total, shares)
    assert sum(counts) == total
    for count, share in zip(counts, shares, strict=True):
        assert abs(count - share / sum(shares) * total) < 1 + 1e-12 * total


def test_a_tiny_share_is_one_sequence_at_the_cost_of_the_largest():
    assert apportion(10, [0.98, 0.01, 0.01], least=1) == [8, 1, 1]
    assert apportion(3, [0.9, 0.05, 0.05], least=1) == [1, 1, 1]
    assert apportion(4, [1, 1, 1], least=1) == [2, 1, 1]


@pytest.mark.parametrize("counts", [[1], [1, 1], [3, 1], [0, 7], [1, 1, 1, 1, 1], [50, 2, 13]])
def test_an_interleaving_uses_every_sequence_once(counts):
    order = interleaving(counts)
    assert [order.count(text) for text in range(len(counts))] == counts


def test_a_text_keeps_its_order_and_is_read_as_alone(write, tmp_path, loaded):
    a, b = tmp_path / "a.txt", write("b.txt", "w50", 500)
    a.write_text(" ".join(f"w{10 + i % 37}" for i in range(900)))
    how = {"sequence_length": LENGTH, "seed": 3}
    mixed = torch.cat(
        grail.Mixture([str(a), b], [0.6, 0.4], tokens=50 * LENGTH, **how).batches(*loaded)
    )
    alone = torch.cat(Text(str(a), tokens=30 * LENGTH, **how).batches(*loaded))
    assert torch.equal(mixed[(mixed != 50).all(1)], alone)
    only = torch.cat(grail.Mixture([str(a)], tokens=30 * LENGTH, **how).batches(*loaded))
    assert torch.equal(only, alone)


def test_a_short_text_gives_what_it_has_and_nothing_fills_the_rest(write, loaded):
    sources = [write("long.txt", "w10", 1000), write("short.txt", "w11", 30)]
    mixture = grail.Mixture(sources, tokens=20 * LENGTH, sequence_length=LENGTH)
    with pytest.warns(
        UserWarning, match=r"short\.txt holds 24 tokens .* fewer than the 80"
    ) as all_:
        batches, origin = mixture.read(*loaded)
    assert len(all_) == 1
    found = owners(batches, 2)
    assert (found.count(0), found.count(1)) == (10, 3)
    assert [text["tokens"] for text in origin["texts"]] == [80, 24]
    assert origin["tokens"] == 104


def test_without_a_number_of_tokens_each_text_gives_all(write, loaded):
    sources = [write("long.txt", "w10", 100), write("short.txt", "w11", 30)]
    found = grail.Mixture(sources, tokens=None, sequence_length=LENGTH).batches(*loaded)
    assert [owners(found, 2).count(text) for text in (0, 1)] == [12, 3]


def test_the_origin_names_every_text_as_alone(write, loaded):
    sources = [write("a.txt", "w10", 400), write("b.txt", "w11", 400)]
    how = {"sequence_length": LENGTH, "seed": 1}
    batches, origin = grail.Mixture(
        [Text(sources[0], join="blank"), sources[1]], [0.25, 0.75], tokens=16 * LENGTH, **how
    ).read(*loaded)
    assert origin["source"] == ", ".join(sources)
    assert origin["seed"] == 1
    assert origin["tokens"] == sum(batch.numel() for batch in batches) == 16 * LENGTH
    for text, source, tokens, join in zip(
        origin["texts"], sources, (4 * LENGTH, 12 * LENGTH), ("blank", None), strict=True
    ):
        alone = Text(source, tokens=tokens, join=join, **how).read(*loaded)[1]
        assert text | {"seed": 1} == alone


def test_more_tokens_than_any_text_has_are_all(write, loaded):
    sources = [write("a.txt", "w10", 100), write("b.txt", "w11", 100)]
    with pytest.warns(UserWarning, match="of its share"):
        found = grail.Mixture(sources, tokens=10**30, sequence_length=LENGTH).batches(*loaded)
    assert sum(map(len, found)) == 2 * (100 // LENGTH)


def test_too_few_tokens_for_a_sequence_of_each_are_refused(write, loaded, tiny_folder):
    sources = [write(f"{i}.txt", "w10", 100 + i) for i in range(3)]
    mixture = grail.Mixture(sources, tokens=2 * LENGTH, sequence_length=LENGTH)
    for call in (lambda: mixture.checked(str(tiny_folder)), lambda: mixture.batches(*loaded)):
        with pytest.raises(InputError, match="one sequence of 8 for each of 3 texts"):
            call()


def test_a_text_without_a_sequence_is_refused_by_name(write, tiny_folder):
    sources = [write("a.txt", "w10", 100), write("empty.txt", "w1", 0)]
    mixture = grail.Mixture(sources, tokens=4 * LENGTH, sequence_length=LENGTH)
    with pytest.raises(EmptyCalibrationError, match=r"calibration .*empty\.txt"):
        mixture.checked(str(tiny_folder))


def test_a_text_that_is_given_twice_is_refused(write, tmp_path, tiny_folder):
    source = write("a.txt", "w10", 100)
    (tmp_path / "copy.txt").write_bytes((tmp_path / "a.txt").read_bytes())
    for sources in ([source, source], [source, str(tmp_path / "copy.txt")]):
        mixture = grail.Mixture(sources, tokens=4 * LENGTH, sequence_length=LENGTH)
        with pytest.raises(InputError, match="again; give each text once"):
            mixture.checked(str(tiny_folder))


def test_it_is_the_same_text_as_each_of_its_texts(write):
    sources = [write("a.txt", "w10", 100), write("b.txt", "w11", 100)]
    mixture = grail.Mixture(sources)
    assert all(mixture.is_same_text(Text(source)) for source in sources)
    assert not mixture.is_same_text(Text(write("c.txt", "w12", 100)))
    assert not mixture.is_same_text(None)


def test_a_held_out_text_is_read_as_all_texts_are(tmp_path):
    plain, rows, others = (str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c.jsonl"))
    mixture = grail.Mixture(
        [plain, Text(rows, field="body")], sequence_length=32, batch_size=2, tokens=64
    )
    found = mixture.compared_on(others, {"tokens": 96}, "--evaluate")
    assert (found.field, found.sequence_length, found.batch_size) == ("body", 32, 2)
    assert (found.tokens, found.option) == (96, "--evaluate")
    assert mixture.compared_on(plain, {}, "evaluate").field is None
    apart = grail.Mixture([Text(rows, field="body"), Text(others, field="code")])
    assert apart.compared_on("d.jsonl", {}, "evaluate").field is None


def test_a_list_of_one_is_that_text():
    assert as_text("calibration", ["a.txt"]) == Text("a.txt")
    assert as_text("calibration", Text("a.txt", tokens=7)).tokens == 7
    assert as_text("calibration", ("a.txt", "b.txt")) == grail.Mixture(["a.txt", "b.txt"])


def test_settings_of_all_texts_are_not_those_of_one():
    with pytest.raises(InputError, match=r"give it as grail\.Mixture\(texts, tokens=…\)"):
        grail.Mixture([Text("a.txt", tokens=4), "b.txt"])


def test_shares_need_a_number_of_tokens_and_may_be_rounded():
    with pytest.raises(InputError, match="give tokens"):
        grail.Mixture(["a", "b"], [0.5, 0.5], tokens=None)
    assert grail.Mixture(["a", "b", "c"], [0.33, 0.33, 0.33]).shares == (0.33,) * 3
    with pytest.raises(InputError, match=r"add up to 1; got 0\.9"):
        grail.Mixture(["a", "b"], [0.7, 0.2])
    with pytest.raises(InputError, match="> 0"):
        grail.Mixture(["a", "b"], [math.nan, 0.2])


def test_field_and_split_are_of_the_texts_that_have_them():
    found = named_texts(["a.txt", "b.jsonl", "name"], field="body", split="dev", join="blank")
    assert [(t.field, t.split, t.join) for t in found.texts] == [
        (None, None, "blank"),
        ("body", None, "blank"),
        ("body", "dev", "blank"),
    ]
    refused = named_texts(["a.txt", "b.txt"], field="body")  # by the texts themselves
    assert [text.field for text in refused.texts] == ["body", "body"]
    assert named_texts(["a.txt"], tokens=5) == Text("a.txt", tokens=5)
