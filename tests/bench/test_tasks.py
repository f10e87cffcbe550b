"""Questions and writing of the evaluation suite, against a model run token by token."""

import io
import json
import math
import random
import re
import tarfile
from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from bench.quality import generating, tasks
from bench.quality.tasks import Question, Task
from bench.tools import tiny
from grail.errors import InputError


@pytest.fixture(scope="module")
def model():
    transformers = pytest.importorskip("transformers")
    sizes = {name: tiny.SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size")}
    config = transformers.LlamaConfig(
        **sizes, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=3
    )
    return tiny.randomised(lambda: transformers.LlamaForCausalLM(config), seed=3)


def by_hand(model, ids):
    """Log-probabilities [tokens, vocabulary] of the token after each prefix, without a cache."""
    starts = [torch.tensor([ids[: end + 1]]) for end in range(len(ids))]
    with torch.no_grad():
        logits = [model(input_ids=start).logits[0, -1] for start in starts]
    return torch.stack(logits).double().log_softmax(-1)


def options_by_hand(model, question):
    """Of each option, log-probabilities of its tokens and whether each is the likeliest."""
    found = []
    for option in question.options:
        logs = by_hand(model, [*question.context, *option])[len(question.context) - 1 :]
        chosen = [float(logs[at, token]) for at, token in enumerate(option)]
        likeliest = [int(logs[at].argmax()) == token for at, token in enumerate(option)]
        found.append((chosen, likeliest))
    return found


def random_questions(count, options=4, seed=0):
    """Questions of different lengths, in no order."""
    generator = random.Random(seed)

    def ids(length):
        return tuple(generator.randrange(tiny.VOCABULARY) for _ in range(length))

    return [
        Question(
            ids(generator.randrange(1, 5)),
            tuple(ids(generator.randrange(1, 6)) for _ in range(options)),
        )
        for _ in range(count)
    ]


def test_answers_are_those_of_whole_sequences_without_a_cache(model):
    questions = random_questions(30)
    found = {index: of for index, *of in tasks.answers(model, questions)}
    assert sorted(found) == list(range(30))
    for index, question in enumerate(questions):
        expected = options_by_hand(model, question)
        for (logs, hits), own, likeliest in zip(expected, *found[index], strict=True):
            assert own.tolist() == pytest.approx(logs, abs=1e-5)
            assert likeliest.tolist() == hits


@pytest.mark.parametrize("rule", ["sum", "mean"])
def test_a_choice_is_right_if_the_first_option_is_likeliest(model, rule):
    questions = random_questions(60, seed=1)
    expected = []
    for question in questions:
        sums = [
            sum(logs) / (len(logs) if rule == "mean" else 1)
            for logs, _ in options_by_hand(model, question)
        ]
        expected.append(float(sums[0] == max(sums)))
    assert Task(questions, rule, 0.25).scores(model) == expected
    assert 0 < sum(expected) < 60


def test_an_answer_no_likelier_than_another_is_wrong(model):
    question = Question((5, 7), ((9, 11), (9, 11)))
    assert Task([question], "sum", 0.5).scores(model) == [0.0]


def test_tokens_counts_the_likeliest_ones(model):
    context = (5, 7, 11)
    best = []
    for _ in range(4):
        best.append(int(by_hand(model, [*context, *best])[-1].argmax()))
    # The third token is another one; the fourth is the likeliest after it.
    changed = [*best[:2], (best[2] + 1) % tiny.VOCABULARY]
    changed.append(int(by_hand(model, [*context, *changed])[-1].argmax()))
    questions = [Question(context, (tuple(best),)), Question(context, (tuple(changed),))]
    assert Task(questions, "tokens", 0.0).scores(model) == [1.0, 0.75]


@pytest.mark.parametrize(
    ("right", "of", "chance", "beats"),
    [(49, 100, 0.25, False), (51, 100, 0.25, True), (51, 100, 0.5, False), (100, 100, 0.9, False)],
)
def test_a_task_counts_from_five_standard_errors_above_chance(right, of, chance, beats):
    scores = [1.0] * right + [0.0] * (of - right)
    share = right / of
    own = math.sqrt(share * (1 - share) / (of - 1))
    guess = math.sqrt(chance * (1 - chance) / of)
    assert beats == (share - chance > 5 * max(own, guess))
    assert tasks.beats_chance(scores, chance) == beats


class Words:
    """A tokenizer of single words, numbered as they come."""

    def __init__(self):
        self.words = []

    def __call__(self, text, **_):
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return SimpleNamespace(input_ids=[self.words.index(word) for word in text.split()])

    def text(self, ids):
        return " ".join(self.words[index] for index in ids)


def prose(document):
    """A document of 30 sentences, each with words of its own."""
    line = "In {0}s{1} the {0}word{1} is known to those by {2}end."
    return " ".join(line.format(document, n, "abcdefgh"[n % 8]) for n in range(30))


@pytest.fixture
def corpus(monkeypatch):
    genres = {"news": [prose("abcdefghij"[index]) for index in range(10)]}
    monkeypatch.setattr(tasks.assets, "brown", lambda _: genres)
    tasks._documents.cache_clear()
    yield genres["news"][1::2]  # the held-out ones
    tasks._documents.cache_clear()


def test_sentences_are_followed_by_the_true_one_and_three_of_other_documents(corpus, tmp_path):
    words = Words()
    task = tasks.build("next_sentence", words, tmp_path, 40)
    assert len(task.questions) == 20  # half
    for question in task.questions:
        assert len(question.context) == tasks.CONTEXT
        context, right, *wrong = (words.text(ids) for ids in (question.context, *question.options))
        (document,) = [text for text in corpus if context in text]
        assert f"{context} {right}" in document
        sources = {next(i for i, text in enumerate(corpus) if option in text) for option in wrong}
        assert len(sources) == 3
        assert corpus.index(document) not in sources
    again = tasks.build("next_sentence", words, tmp_path, 40)
    assert again == task


def test_the_last_word_is_told_from_those_of_the_same_document(corpus, tmp_path):
    words = Words()
    task = tasks.build("last_word", words, tmp_path, 40)
    assert len(task.questions) == 40
    for question in task.questions:
        assert len(question.context) == tasks.CONTEXT
        right, *wrong = (words.text(option) for option in question.options)
        text = f"{words.text(question.context)} {right}."
        assert sum(text in document for document in corpus) == 1
        assert len({right, *wrong}) == 4
        assert all(re.fullmatch("[a-h]end", option) for option in wrong)


def test_agreement_swaps_one_word_and_keeps_the_rest(corpus, tmp_path):
    words = Words()
    task = tasks.build("agreement", words, tmp_path, 20)
    for question in task.questions:
        right, wrong = question.options
        assert any(words.text([*question.context, *right]) in document for document in corpus)
        assert (words.text(right[:1]), words.text(wrong[:1])) in {("is", "are"), ("those", "that")}
        assert right[1:] == wrong[1:]


def country(name, code, region, capital, borders, member=True):
    return {
        "name": {"common": name},
        "cca3": code,
        "region": region,
        "capital": [capital] if capital else [],
        "borders": borders,
        "unMember": member,
    }


@pytest.fixture
def countries(tmp_path):
    of = [country(f"Land{n}", f"L{n}", "One", f"City{n}", [f"L{(n + 1) % 8}"]) for n in range(8)]
    of += [country(f"Far{n}", f"F{n}", "Two", f"Town{n}", []) for n in range(4)]
    of += [
        country("United Isles", "UI", "Two", "", ["F0"]),
        country("Nowhere", "NO", "One", "Gone", ["L0"], member=False),
    ]
    content = json.dumps(of).encode()
    with tarfile.open(tmp_path / "world-countries-5.1.0.tgz", "w:gz") as archive:
        member = tarfile.TarInfo("package/countries.json")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    tasks._countries.cache_clear()
    yield tmp_path
    tasks._countries.cache_clear()


def test_capitals_are_those_of_the_same_region(countries):
    words = Words()
    task = tasks.build("capitals", words, countries, 100)
    asked = {words.text(q.context): [words.text(o) for o in q.options] for q in task.questions}
    assert len(asked) == 12  # one has no capital, one is no member of the United Nations
    right, *wrong = asked["The capital of Land3 is"]
    assert right == "City3"
    assert len(set(wrong)) == 3
    assert set(wrong) < {f"City{n}" for n in range(8) if n != 3}
    assert set(asked["The capital of Far1 is"][1:]) == {"Town0", "Town2", "Town3"}


def test_a_neighbour_is_told_from_three_that_are_none(countries):
    words = Words()
    task = tasks.build("neighbours", words, countries, 100)
    asked = {words.text(q.context): [words.text(o) for o in q.options] for q in task.questions}
    right, *wrong = asked["Land7 shares a border with"]
    assert right == "Land0"
    assert len(set(wrong) & {f"Land{n}" for n in range(1, 7)}) == 3
    right, *wrong = asked["the United Isles shares a border with"]
    assert right == "Far0"
    assert set(wrong) == {"Far1", "Far2", "Far3"}
    assert len(asked) == 9


def test_a_damaged_archive_of_countries_is_named(countries):
    path = countries / "world-countries-5.1.0.tgz"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(InputError, match=r"world-countries-.*tgz is damaged"):
        tasks.build("capitals", Words(), countries, 3)


INDEX = """  1 licence
dog n 2 1 @ 2 1 00000020 00000030
cat n 1 1 @ 1 1 00000040
unmet n 1 1 @ 1 0 00000050
thought n 1 1 @ 1 1 00000060
sea_dog n 1 1 @ 1 1 00000030
"""
DATA = """  1 licence
00000010 03 n 01 animal 0 000 | alive
00000020 05 n 02 dog 0 hound 0 002 @ 00000010 n 0000 ~ 00000050 n 0000 | barks @ 00000060 n 0000
00000030 18 n 01 sea_dog 0 001 @ 00000010 n 0000 | sails
00000040 05 n 01 cat 0 001 @ 00000070 n 0000 | purrs
00000050 05 n 01 unmet 0 001 @ 00000010 n 0000 | rare
00000060 09 n 01 thought 0 001 @ 00000010 n 0000 | not a thing
00000070 05 n 01 feline 0 001 @ 00000010 n 0000 | whiskers
"""


def test_kinds_are_of_the_first_sense_of_things_that_texts_mention(tmp_path):
    (tmp_path / "index.noun").write_text(INDEX)
    (tmp_path / "data.noun").write_text(DATA)
    assert tasks.hypernyms(tmp_path) == {"dog": "animal", "cat": "feline"}


def test_copying_asks_for_the_rest_of_a_sequence_of_different_tokens(tmp_path, monkeypatch):
    numbers = {}
    letters = "abcdefghijklmnopqrstuvwxyz"
    sentence = " ".join(f"{a}{b}word Other {a}{b}x" for a in "ab" for b in letters)
    monkeypatch.setattr(tasks, "_documents", lambda _: [[sentence]])

    def encode(text):
        assert re.fullmatch(" [a-b][a-z]word", text)
        first = text.replace(" ba", " aa").replace(" bb", " ab")  # of two words the same
        return numbers.setdefault(first, len(numbers)), 99

    questions = list(islice(tasks._copying(encode, tmp_path, random.Random(0)), 3))
    for question in questions:
        first = question.context[: tasks.COPIED]
        (rest,) = question.options
        assert len(set(first)) == tasks.COPIED
        assert (*question.context[tasks.COPIED :], *rest) == first
        assert len(rest) == 16
    assert questions[0] != questions[1]


def test_the_first_divergence_is_that_of_two_greedy_texts(model):
    prompts = torch.tensor([[5, 7, 11], [13, 17, 19], [23, 29, 31]])
    own = []
    for prompt in prompts.tolist():
        text = []
        for _ in range(6):
            text.append(int(by_hand(model, [*prompt, *text])[-1].argmax()))
        own.append(text)
    other = [list(text) for text in own]
    other[1][0] = (other[1][0] + 1) % tiny.VOCABULARY
    other[2][4] = (other[2][4] + 1) % tiny.VOCABULARY
    found = generating.first_divergence(model, prompts, torch.tensor(other))
    assert found == [6, 0, 4]


def test_nucleus_sampling_takes_the_token_at_its_place_in_the_kept_probabilities():
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
    # Kept of 0.65: 0.4 and 0.3, together 0.7; token 1 below 4/7 of it.
    chances = torch.tensor([0.0, 0.57, 0.58, 0.999], dtype=torch.float64)
    logits = probabilities.log().expand(4, 4)
    assert generating.pick(logits, chances, 0.65).tolist() == [1, 1, 3, 3]
    assert generating.pick(logits, chances, 0.75).tolist() == [1, 3, 3, 2]  # of 0.9
    assert generating.pick(logits, chances, 0.01).tolist() == [1, 1, 1, 1]
    assert generating.pick(logits, chances, 1.0).tolist() == [1, 3, 3, 0]


def test_samples_are_drawn_by_seeded_numbers_from_a_model_without_a_cache(model):
    prompts = torch.tensor([[5, 7, 11], [13, 17, 19]])
    found = generating.sample(model, prompts, 5, top_p=0.9, seed=4)
    generator = random.Random(4)
    texts = [[], []]
    for _ in range(5):
        for text, prompt in zip(texts, prompts.tolist(), strict=True):
            logs = by_hand(model, [*prompt, *text])[-1]
            chance = torch.tensor([generator.random()], dtype=torch.float64)
            text.append(int(generating.pick(logs[None], chance, 0.9)))
    assert found.tolist() == texts
    assert torch.equal(found, generating.sample(model, prompts, 5, top_p=0.9, seed=4))
    assert not torch.equal(found, generating.sample(model, prompts, 5, top_p=0.9, seed=5))


def test_distinct_is_the_share_of_different_fourgrams():
    # 1234, 2341, 3412, 4123, 1234, 2345
    assert generating.distinct([[1, 2, 3, 4, 1, 2, 3, 4, 5]]) == [5 / 6]
    assert generating.distinct([[1, 1, 1, 1, 1, 1], [1, 2, 3, 4]]) == [1 / 3, 1.0]


def test_surprise_is_the_mean_loss_of_the_text_after_its_prompt(model):
    prompts = torch.tensor([[5, 7, 11], [13, 17, 19]])
    texts = torch.tensor([[2, 3, 5, 8], [13, 21, 34, 55]])
    found = generating.surprise(model, prompts, texts)
    for own, prompt, text in zip(found, prompts.tolist(), texts.tolist(), strict=True):
        logs = by_hand(model, prompt + text)[2:6]
        assert own == pytest.approx(-sum(float(logs[i, t]) for i, t in enumerate(text)) / 4)
