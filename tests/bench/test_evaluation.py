"""The evaluation suite on a tiny model: each score by hand, pairing, and resuming."""

import csv
import math
import statistics

import pytest
import torch

from bench.quality import evaluation, tasks
from bench.quality.evaluation import Known, Measured, Score, Suite
from bench.quality.tasks import Question, Task
from bench.tools import texts, tiny
from grail.errors import InputError
from grail.report import paired

LENGTH = 40


def make(seed):
    transformers = pytest.importorskip("transformers")
    sizes = {name: tiny.SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size")}
    config = transformers.LlamaConfig(
        **sizes, num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=3
    )
    return tiny.randomised(lambda: transformers.LlamaForCausalLM(config), seed)


@pytest.fixture(scope="module")
def models():
    return {name: make(seed) for seed, name in enumerate(("dense", "pruned", "grail"))}


def sequences(seed, count=3):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(tiny.VOCABULARY, (count, 1, LENGTH), generator=generator))


def easy(dense, count=30):
    """A task that the dense model solves: its likeliest token is told from its unlikeliest."""
    questions = []
    for token in range(count):
        with torch.no_grad():
            order = dense(input_ids=torch.tensor([[token, 5]])).logits[0, -1].argsort()
        questions.append(Question((token, 5), ((int(order[-1]),), (int(order[0]),))))
    return Task(questions, "sum", 0.5)


def hard(dense):
    """A task that it does not solve."""
    return Task([Question(q.context, q.options[::-1]) for q in easy(dense).questions], "sum", 0.5)


@pytest.fixture
def suite(models):
    dense = models["dense"]
    batches = {"one": sequences(1), "two": sequences(2)}
    return Suite(dense, batches, {"easy": easy(dense), "hard": hard(dense)}, prompts=2, new=6)


def logs_of(model, sequence):
    with torch.no_grad():
        return model(input_ids=sequence).logits[0].double().log_softmax(-1)


def losses_of(model, batches):
    found = []
    for sequence in batches:
        logs = logs_of(model, sequence)[:-1]
        found.append(-logs.gather(1, sequence[0, 1:, None]).mean().item())
    return found


def value(scores, on, measure):
    (score,) = [s for s in scores if (s.on, s.measure) == (on, measure)]
    return score


def test_a_text_is_scored_beside_the_dense_and_the_pruned_model(models, suite):
    pruned = evaluation.scores_of(models["pruned"], suite, on=["one"])
    known = Known({}, evaluation.each_of(pruned))
    found = evaluation.scores_of(models["grail"], suite, known, ["one"])
    assert [score.measure for score in found] == list(suite.measures("one"))
    losses = {name: losses_of(model, suite.batches["one"]) for name, model in models.items()}
    own = value(found, "one", "perplexity")
    assert own.value == pytest.approx(math.exp(statistics.fmean(losses["grail"])))
    assert own.each == pytest.approx(losses["grail"])
    for measure, expected in (
        ("nats_lost", paired.difference(losses["grail"], losses["dense"])),
        ("nats_over_pruned", paired.difference(losses["grail"], losses["pruned"])),
        ("share", paired.share(losses["dense"], losses["pruned"], losses["grail"])),
    ):
        score = value(found, "one", measure)
        if expected is None:
            assert score.value is None
            continue
        assert score.value == pytest.approx(expected.value, abs=1e-6)
        assert score.error == pytest.approx(expected.error, rel=1e-3)
    divergences, same = [], []
    for sequence in suite.batches["one"]:
        dense, narrow = (logs_of(models[name], sequence)[:-1] for name in ("dense", "grail"))
        divergences.append((dense.exp() * (dense - narrow)).sum(-1))
        same.append((dense.argmax(-1) == narrow.argmax(-1)).double())
    for measure, tokens, close in (("kl", divergences, 1e-4), ("top1", same, 1e-6)):
        score = value(found, "one", measure)
        each = [of.mean().item() for of in tokens]
        assert score.value == pytest.approx(torch.cat(tokens).mean().item(), close)
        assert score.each == pytest.approx(each, close)
        error = statistics.stdev(each) / math.sqrt(len(each))
        assert score.error == pytest.approx(error, rel=1e-2, abs=1e-9)


def greedy(model, ids, new):
    for _ in range(new):
        ids = torch.cat([ids, logs_of(model, ids)[-1:].argmax(-1)[None]], 1)
    return ids[0, -new:].tolist()


def test_the_first_divergence_of_a_text_is_between_two_greedy_continuations(models, suite):
    (score,) = evaluation.scores_of(models["grail"], suite, on=["two"])[-1:]
    counts = []
    for sequence in suite.batches["two"][:2]:
        start = sequence[:, : evaluation.PROMPT]
        pair = [greedy(models[name], start, 6) for name in ("dense", "grail")]
        differ = [a != b for a, b in zip(*pair, strict=True)]
        counts.append(differ.index(True) if True in differ else 6)
    assert score.measure == "first_divergence"
    assert score.each == tuple(map(float, counts))
    (score,) = evaluation.scores_of(make(0), suite, on=["two"])[-1:]  # the same weights
    assert score.each == (6.0, 6.0)


def test_a_task_is_paired_with_the_dense_model(models, suite):
    dense = evaluation.scores_of(suite.dense, suite, on=["easy"])
    assert [(s.measure, s.value) for s in dense] == [("accuracy", 1.0), ("chance", 0.5)]
    known = Known(evaluation.each_of(dense), {})
    found = evaluation.scores_of(models["grail"], suite, known, ["easy"])
    own = value(found, "easy", "accuracy")
    assert own.value == statistics.fmean(own.each)
    assert own.error == pytest.approx(statistics.stdev(own.each) / math.sqrt(30))
    lost = value(found, "easy", "accuracy_lost")
    assert lost.value == pytest.approx(1 - own.value)
    assert lost.error == pytest.approx(own.error)  # the dense model's are all 1


def test_writing_is_scored_by_its_own_repetition_and_by_the_dense_model(models, suite):
    distinct, nats = evaluation.scores_of(models["grail"], suite, on=[evaluation.WRITING])
    assert (distinct.measure, nats.measure) == ("distinct4", "dense_nats")
    assert len(distinct.each) == len(nats.each) == 4  # two of each text
    assert all(1 / 3 <= share <= 1 for share in distinct.each)
    assert nats.value == pytest.approx(statistics.fmean(nats.each))
    again = evaluation.scores_of(models["grail"], suite, on=[evaluation.WRITING])
    assert [distinct, nats] == again


class Subject:
    """Stands for SmolLM2: its compressed models are known, and counted."""

    def __init__(self, models):
        self.model, self._models, self.made = models["dense"], models, []

    def batches(self, text, half, tokens):
        return [(text, half, tokens)]

    def compressed(self, calibration, name):
        self.made.append((name, *calibration[0]))
        return self._models[name], None


def runs():
    return [
        (evaluation.described(name, "brown", 64, "mlp", 0.5), {"name": name})
        for name in ("pruned", "grail")
    ]


def test_a_killed_run_resumes_and_gives_the_same_file(models, suite, tmp_path, capsys):
    subject = Subject(models)
    path = tmp_path / "evaluation.csv"
    evaluation.measure(Measured(path, suite), subject, runs(), [])
    whole = path.read_text().splitlines()
    assert subject.made == [(name, "brown", "calibration", 64) for name in ("pruned", "grail")]
    assert "hard: left out" in capsys.readouterr().out
    rows = list(csv.DictReader(whole))
    assert {row["on"] for row in rows if row["model"] == "grail"} == {
        "one",
        "two",
        "easy",
        "writing",
    }
    assert {row["on"] for row in rows if row["model"] == "dense"} == set(suite.names)
    evaluation.measure(Measured(path, suite), subject, runs(), [])
    assert len(subject.made) == 2  # nothing was missing
    for kept in (5, len(whole) - 8, len(whole) - 1):
        path.write_text("\n".join(whole[:kept]) + "\n")
        evaluation.measure(Measured(path, suite), subject, runs(), [])
        assert path.read_text().splitlines() == whole


def test_a_mixture_takes_its_texts_in_turn(models):
    subject = Subject(models)
    subject.batches = lambda text, half, tokens: [f"{text} {half} {n}" for n in range(tokens // 8)]
    found = evaluation.mixture(subject, "brown+source", 32)
    assert found == [f"{text} calibration {n}" for n in (0, 1) for text in ("brown", "source")]
    assert evaluation.mixture(subject, "brown", 16) == [
        "brown calibration 0",
        "brown calibration 1",
    ]


def test_a_folder_is_measured_under_its_name(models, suite, tmp_path):
    models["grail"].save_pretrained(tmp_path / "narrow")
    tiny.tokenizer().save_pretrained(tmp_path / "narrow")
    out = Measured(tmp_path / "evaluation.csv", suite)
    evaluation.measure(out, Subject(models), [], [tmp_path / "narrow"])
    found = out.each(evaluation.described("narrow"))
    expected = losses_of(models["grail"], suite.batches["one"])
    assert found["one"] == pytest.approx(expected, rel=1e-6)


def test_a_file_of_other_sizes_is_refused(models, suite, tmp_path):
    path = tmp_path / "evaluation.csv"
    evaluation.measure(Measured(path, suite), Subject(models), runs()[:1], [])
    Measured(path, suite)
    dense, fewer = suite.dense, {"one": sequences(1)[:2], "two": sequences(2)}
    for other, words in (
        (
            Suite(dense, fewer, suite.questions, prompts=2),
            "perplexity of one over 3, .* measures 2",
        ),
        (
            Suite(dense, suite.batches, {"easy": easy(dense, 20)}, prompts=2),
            "accuracy of easy over",
        ),
        (
            Suite(dense, suite.batches, {}, prompts=3),
            "distinct4 of writing over 4, .* measures 6",
        ),
    ):
        with pytest.raises(InputError, match=words):
            Measured(path, other)
    # What the suite does not have is left alone.
    Measured(path, Suite(dense, {"two": sequences(2)}, {}, prompts=0))


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ([], (12, 200, 8)),
        (["--quick"], (6, 100, 4)),
        (["--quick", "--questions", "40"], (6, 40, 4)),
        (["--sequences", "3", "--prompts", "2"], (3, 200, 2)),
        (["--quick", "--on", "brown"], (6, 100, 0)),
    ],
    ids=["default", "quick", "questions given", "sequences given", "without writing"],
)
def test_sizes_of_a_quick_run_are_smaller_unless_given(monkeypatch, arguments, sizes):
    class MadeError(Exception):
        pass

    def suite_of(*_, **settings):
        raise MadeError(tuple(settings[name] for name in ("sequences", "questions", "prompts")))

    monkeypatch.setattr(evaluation, "Subject", lambda: None)
    monkeypatch.setattr(evaluation, "suite_of", suite_of)
    with pytest.raises(MadeError) as made:
        evaluation.main(arguments)
    assert made.value.args == (sizes,)


def test_show_prints_the_tables_and_measures_nothing(models, suite, tmp_path, monkeypatch, capsys):
    path = tmp_path / "evaluation.csv"
    evaluation.measure(Measured(path, suite), Subject(models), runs(), [])
    capsys.readouterr()
    rows = path.read_text().replace(",one,", ",brown,").replace(",two,", ",source,")
    path.write_text(rows.replace(",easy,", ",agreement,"))
    monkeypatch.setattr(evaluation, "Subject", lambda: pytest.fail("loads a model"))
    evaluation.main(["--show", "--output", str(path)])
    shown = capsys.readouterr().out
    assert "brown, 64, mlp, 0.5" in shown
    for words in (
        "in domain: dense",
        "off domain: grail",
        "top-1, grail",
        "agreement",
        "distinct4",
    ):
        assert words in shown


def test_a_run_without_the_pruned_model_has_no_share(models, suite, tmp_path):
    out = Measured(tmp_path / "evaluation.csv", suite)
    evaluation.measure(out, Subject(models), runs()[1:], [])
    row = {
        row["measure"]: row
        for row in out.table.rows
        if (row["model"], row["on"]) == ("grail", "one")
    }
    assert row["share"]["value"] == row["nats_over_pruned"]["value"] == ""
    assert float(row["nats_lost"]["value"]) != 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--on", "poetry"], "--on: poetry is none of documentation"),
        (["--on", "writing"], "needs a text whose starts are continued"),
        (["--calibration", "poetry"], "--calibration: poetry is none of"),
    ],
)
def test_a_wrong_option_is_named_before_any_work(capsys, arguments, message):
    with pytest.raises(SystemExit):
        evaluation.main(arguments)
    assert message in capsys.readouterr().err


def test_every_text_but_two_cuts_of_one_is_read():
    assert set(texts.TEXTS) - set(evaluation.READ) == {"python", "technical"}
    assert Score("brown", "kl", 0.1) == Score("brown", "kl", 0.1, None, ())
    assert not set(tasks.TASKS) & set(texts.TEXTS)
