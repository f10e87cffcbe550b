"""Calibration text that a model draws itself: draws, documents, resuming, refusals."""

import json
import shutil

import pytest
import torch

import grail
from grail.errors import ExportError, InputError, ModelError, StateError
from grail.files import generated
from grail.files.mixture import Mixture
from grail.run import generation, sampling
from grail.run.sampling import Sampling, continuations, draw, uniforms
from grail.runtime import state

transformers = pytest.importorskip("transformers")

FEW = {"tokens": 200, "sequence_length": 16, "batch_size": 4, "progress": False}


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(" ".join(f"w{10 + i % 80}" for i in range(60)))
    return str(path)


def nucleus(logits, temperature, top_p):
    """The nucleus of one row by brute force, in fp64: probabilities by token."""
    weights = torch.exp((logits.double() - logits.max()) / temperature)
    ranked = sorted(((float(w / weights.sum()), -i) for i, w in enumerate(weights)), reverse=True)
    kept, mass = {}, 0.0
    for probability, token in ranked:
        if mass >= top_p:
            break
        kept[-token] = probability
        mass += probability
    return {token: probability / mass for token, probability in kept.items()}


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [1e-6, 0.5, 0.98, 1.0])
def test_draws_follow_the_nucleus(temperature, top_p):
    logits = torch.randn(3, 13, generator=torch.Generator().manual_seed(0)) * 2
    count = 4000
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    for row in logits:
        drawn = draw(row.expand(count, -1), grid, temperature, top_p)
        found = torch.bincount(drawn, minlength=13) / count
        expected = nucleus(row, temperature, top_p)
        for token in range(13):
            assert abs(float(found[token]) - expected.get(token, 0.0)) <= 1.5 / count


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.98])
def test_the_nucleus_is_that_of_transformers(top_p):
    logits = torch.randn(4, 29, generator=torch.Generator().manual_seed(1)) * 3
    theirs = transformers.TopPLogitsWarper(top_p)(None, logits).isfinite()
    for row, kept in zip(logits, theirs, strict=True):
        assert set(nucleus(row, 1.0, top_p)) == set(kept.nonzero().flatten().tolist())


def test_the_last_number_draws_a_token_of_the_nucleus():
    logits = torch.tensor([[0.0, -1.0, -torch.inf]])
    assert int(draw(logits, torch.tensor([1 - 2**-53], dtype=torch.float64), 1.0, 1.0)) == 1
    assert int(draw(logits, torch.tensor([0.0], dtype=torch.float64), 1.0, 1.0)) == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_refused(value):
    logits = torch.zeros(2, 5)
    logits[1, 3] = value
    with pytest.raises(ModelError, match="NaN or Inf"):
        draw(logits, torch.zeros(2, dtype=torch.float64), 1.0, 1.0)


def test_random_numbers_are_of_the_sequence_alone():
    several = uniforms(5, [0, 3, 4], 6)
    assert several.dtype == torch.float64
    assert torch.equal(several[1:2], uniforms(5, [3], 6))
    assert torch.equal(several[:, :2], uniforms(5, [0, 3, 4], 2))
    assert len({tuple(row.tolist()) for row in uniforms(5, range(50), 6)}) == 50
    assert not torch.equal(several, uniforms(6, [0, 3, 4], 6))


def test_a_continuation_is_drawn_token_by_token_from_the_whole_text_before(tiny_llama):
    model, how = tiny_llama(), Sampling(temperature=0.7, top_p=0.9)
    starts = torch.tensor([[1, 5, 9], [1, 7, 3]])
    numbers = uniforms(0, [0, 1], 10)
    steps = []
    found = continuations(model, starts, numbers, how, steps.append)
    assert steps == [2] * 10
    expected = starts
    with torch.no_grad():
        for step in range(10):
            logits = model(expected).logits[:, -1]
            chosen = draw(logits, numbers[:, step], 0.7, 0.9)
            expected = torch.cat([expected, chosen[:, None]], dim=1)
    assert torch.equal(found, expected)
    alone = continuations(model, starts[1:], numbers[1:], how)
    assert torch.equal(found[1:], alone)


def test_an_end_of_text_ends_no_sequence_and_the_models_settings_stay(tiny_llama):
    model = tiny_llama()
    model.generation_config.repetition_penalty = 9.0
    own = model.generation_config
    row = torch.tensor([[1, 5]])
    with torch.no_grad():  # the first draw is the end, whatever the logits
        order = model(row).logits[0, -1].float().sort(descending=True)
    mass = order.values.double().softmax(0).cumsum(0)
    place = int((order.indices == 2).nonzero())
    low = float(mass[place - 1]) if place else 0.0
    numbers = uniforms(0, [0], 6)
    numbers[0, 0] = (low + float(mass[place])) / 2
    found = continuations(model, row, numbers, Sampling(top_p=1.0))
    assert found[0, 2] == 2
    assert found.shape == (1, 8)
    assert model.generation_config is own


def test_documents_are_cut_at_the_ends_and_read_back_as_they_were(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    row = [1, 5, 6, 2, 7, 2, 2, 8, 1, 9]
    found = generated.documents(row, tokenizer, start=1)
    assert found == ["w5 w6", "w7", "w8 <s> w9"]
    assert generated.documents(row, tokenizer, start=5) == ["w8 <s> w9"]
    assert generated.documents([2, 2], tokenizer) == []
    assert generated.tokens_read(found, tokenizer) == 3 + 2 + 4
    batches = grail.token_batches(found, tokenizer, tokens=9, sequence_length=9)
    assert batches[0].tolist() == [[5, 6, 2, 7, 2, 8, 1, 9, 2]]


def test_a_character_that_is_cut_at_the_end_is_dropped(tiny_tokenizer):
    class Cut:
        bos_token_id, eos_token_id, pad_token_id = 1, 2, None

        def decode(self, tokens, **_):
            return "naïve\ufffd"

    assert generated.documents([5, 2, 5], Cut()) == ["naïve\ufffd", "naïve"]


@pytest.fixture
def drawn(monkeypatch):
    """The starts of every batch that is drawn."""
    seen = []
    whole = generation.continuations

    def counted(model, starts, numbers, *rest):
        seen.append(starts)
        return whole(model, starts, numbers, *rest)

    monkeypatch.setattr(generation, "continuations", counted)
    return seen


def test_the_file_is_calibration_text_of_the_tokens_asked_for(tiny_folder, tmp_path, drawn):
    output = tmp_path / "generated.jsonl"
    written = grail.generate_calibration(tiny_folder, output, **FEW)
    assert [path.name for path in tmp_path.iterdir() if "generated" in path.name] == [output.name]
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert rows[0]["made"]["tokens"] == 200
    assert all(row.keys() <= {"text", "sequence", "made"} for row in rows)
    assert len(rows) == written.documents
    assert written.tokens >= 208  # 13 sequences
    assert written.written == 15 * sum(map(len, drawn))
    assert all((starts == 1).all() for starts in drawn)
    model, tokenizer = grail.load_model(tiny_folder)
    text = grail.Text(str(output), tokens=200, sequence_length=16)
    assert torch.cat(text.batches(model, tokenizer)).numel() == 208  # a warning would fail
    assert generated.tokens_read([row["text"] for row in rows], tokenizer) == written.tokens
    # Sequence 5 is what it is alone.
    numbers = uniforms(0, [5], 15)
    alone = continuations(model, torch.tensor([[1]]), numbers, Sampling(**without(FEW)))[0]
    of_row = [row["text"] for row in rows if row["sequence"] == 5]
    assert of_row == generated.documents(alone.tolist(), tokenizer, 1)


def without(settings):
    return {name: value for name, value in settings.items() if name != "progress"}


def test_sequences_continue_the_prompts_and_use_them_again(tiny_folder, tmp_path, prompts, drawn):
    output = tmp_path / "generated.jsonl"
    how = {**FEW, "tokens": 600, "prompt_tokens": 5}
    with pytest.warns(UserWarning, match="fewer than the 190 asked for"):
        grail.generate_calibration(tiny_folder, output, prompts=prompts, **how)
    starts = torch.cat(drawn)
    assert starts.shape[1] == 6
    pieces = {tuple(row) for row in starts[:, 1:].tolist()}
    whole = [10 + i % 80 for i in range(60)] + [2]
    assert pieces == {tuple(whole[i : i + 5]) for i in range(0, 60, 5)}
    assert torch.equal(starts[:12], starts[12:24])
    text = " ".join(f"w{token}" for token in starts[0, 1:].tolist())
    assert json.loads(output.read_text().splitlines()[0])["text"].startswith(text)


def test_prompts_come_of_several_texts(tiny_folder, tmp_path, drawn):
    texts = [tmp_path / name for name in ("a.txt", "b.txt")]
    for path, word in zip(texts, ("w11", "w12"), strict=True):
        path.write_text(" ".join([word] * 200))
    how = {**FEW, "prompt_tokens": 4}
    grail.generate_calibration(tiny_folder, tmp_path / "out.jsonl", prompts=texts, **how)
    counts = torch.cat(drawn)[:, 1].bincount()
    assert abs(int(counts[11]) - int(counts[12])) <= 1


class Killed(BaseException):
    pass


def killed(*_):
    raise Killed


@pytest.mark.parametrize("when", [0, 1, 2, "written"])
def test_a_killed_run_resumes_to_the_same_file(when, tiny_folder, tmp_path, monkeypatch, drawn):
    expected, output = tmp_path / "expected.jsonl", tmp_path / "out.jsonl"
    grail.generate_calibration(tiny_folder, expected, **FEW)
    total = len(drawn)
    drawn.clear()
    calls = []

    def die(path, kind, *rest):
        if kind == "batch":
            if len(calls) == when:
                raise Killed
            calls.append(path)
        return write(path, kind, *rest)

    write = state.write
    with monkeypatch.context() as patch:
        if when == "written":
            patch.setattr(generated, "write", killed)
        patch.setattr(state, "write", die)
        with pytest.raises(Killed):
            grail.generate_calibration(tiny_folder, output, **FEW)
    assert not output.exists()
    drawn.clear()
    grail.generate_calibration(tiny_folder, output, **FEW)
    assert output.read_bytes() == expected.read_bytes()
    assert len(drawn) == (0 if when == "written" else total - when)
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_a_complete_file_is_not_written_again(tiny_folder, tmp_path, drawn):
    output = tmp_path / "out.jsonl"
    first = grail.generate_calibration(tiny_folder, output, **FEW)
    before, count = output.stat().st_mtime_ns, len(drawn)
    again = grail.generate_calibration(tiny_folder, output, **FEW)
    assert (output.stat().st_mtime_ns, len(drawn)) == (before, count)
    assert (again.written, again.tokens, again.documents) == (0, first.tokens, first.documents)


@pytest.mark.parametrize(
    "other",
    [
        {"tokens": 300}, {"seed": 1}, {"top_p": 0.5}, {"temperature": 2.0}, {"batch_size": 2},
        {"sequence_length": 8}, {"prompt_tokens": 4, "prompts": True},
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["complete", "partial"])
def test_text_of_another_call_is_refused(
    other, form, tiny_folder, tmp_path, prompts, monkeypatch, drawn
):
    output = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        if form == "partial":
            patch.setattr(generated, "write", killed)
            with pytest.raises(Killed):
                grail.generate_calibration(tiny_folder, output, **FEW)
        else:
            grail.generate_calibration(tiny_folder, output, **FEW)
    drawn.clear()
    if other.get("prompts"):
        other = {**other, "prompts": prompts}
    name = next(iter(other))
    with pytest.raises(InputError, match=f"is of another call: .*{name} .* instead of .*delete it"):
        grail.generate_calibration(tiny_folder, output, **{**FEW, **other})
    assert drawn == []


def test_text_of_another_model_is_refused(tiny_folder, tmp_path, tiny_llama):
    output = tmp_path / "out.jsonl"
    grail.generate_calibration(tiny_folder, output, **FEW)
    tiny_llama(seed=1).save_pretrained(tiny_folder)
    with pytest.raises(InputError, match="is of another call: model '"):
        grail.generate_calibration(tiny_folder, output, **FEW)


@pytest.mark.parametrize("content", ["w3 w4", '{"text": "w3"}\n', ""])
def test_a_file_of_someone_else_is_left_alone(content, tiny_folder, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text(content)
    with pytest.raises(InputError, match="grail did not write it"):
        grail.generate_calibration(tiny_folder, output, **FEW)
    assert output.read_text() == content


def test_a_damaged_file_is_refused(tiny_folder, tmp_path):
    output = tmp_path / "out.jsonl"
    grail.generate_calibration(tiny_folder, output, **FEW)
    with output.open("a") as lines:
        lines.write('{"text": "w3"\n')
    with pytest.raises(InputError, match="was changed since"):
        grail.generate_calibration(tiny_folder, output, **FEW)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"output": "out.txt"}, r"does not end in \.jsonl"),
        ({"output": "no/out.jsonl"}, "is no folder"),
        ({"tokens": 0}, "tokens must be"), ({"top_p": 1.5}, "top_p must be a number > 0 and ≤ 1"),
        ({"temperature": 0}, "temperature must be a number > 0; got 0"),
        ({"temperature": float("inf")}, "temperature"), ({"seed": -1}, "seed"),
        ({"sequence_length": 1}, "sequence_length"), ({"sequence_length": 999}, "at most 128"),
        ({"top_k": 5}, "unknown setting 'top_k'; did you mean 'top_p'"),
        ({"prompts": "prompts.txt", "prompt_tokens": 15}, "leave no room in sequences of 16"),
        ({"prompts": "nowhere.txt"}, r"prompts: nowhere\.txt: no such file"),
    ],
)  # fmt: skip
def test_wrong_calls_are_refused(how, said, tiny_folder, tmp_path, prompts, monkeypatch):
    monkeypatch.chdir(tmp_path)
    how = {"output": "out.jsonl", **FEW, **how}
    with pytest.raises(InputError, match=said):
        grail.generate_calibration(tiny_folder, **how)
    assert not list(tmp_path.glob("out*"))


def test_sequences_begin_with_the_token_that_is_given(tiny_folder, tmp_path, drawn):
    how = {**FEW, "tokens": 16}
    grail.generate_calibration(tiny_folder, tmp_path / "out.jsonl", begin="w7", **how)
    assert {int(token) for starts in drawn for token in starts[:, 0]} == {7}
    for begin in ("w7 w8", "word", ""):
        with pytest.raises(InputError, match=r"begin must be one token .* leave it out for <s>"):
            grail.generate_calibration(tiny_folder, tmp_path / "b.jsonl", begin=begin, **how)


def test_the_unknown_token_may_begin_sequences_by_its_name(tiny_folder, tmp_path, drawn):
    # SmolLM2's token between documents is also its unknown token.
    how = {**FEW, "tokens": 16}
    grail.generate_calibration(tiny_folder, tmp_path / "out.jsonl", begin="<unk>", **how)
    assert {int(token) for starts in drawn for token in starts[:, 0]} == {0}


def test_a_tokenizer_without_a_token_to_begin_with_needs_prompts(
    tiny_folder, tmp_path, prompts, monkeypatch, drawn
):
    load = grail.Pretrained.load

    def bare(self, *given):
        network, tokenizer = load(self, *given)
        tokenizer.bos_token = tokenizer.eos_token = None
        return network, tokenizer

    monkeypatch.setattr(grail.Pretrained, "load", bare)
    with pytest.raises(InputError, match=r"neither .* nor an end-of-text token .*--prompts"):
        grail.generate_calibration(tiny_folder, tmp_path / "out.jsonl", **FEW)
    how = {**FEW, "tokens": 48, "prompt_tokens": 5}
    text = grail.Text(prompts, join="none")
    written = grail.generate_calibration(tiny_folder, tmp_path / "out.jsonl", prompts=text, **how)
    assert drawn[0].shape[1] == 5
    assert written.tokens >= 48


def test_a_model_that_cannot_generate_is_refused(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.LlamaForCausalLM, "can_generate", lambda self: False)
    with pytest.raises(ModelError, match="LlamaForCausalLM cannot generate"):
        grail.generate_calibration(tiny_folder, tmp_path / "out.jsonl", **FEW)


def test_a_model_that_writes_nothing_ends_with_an_error(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sampling, "draw", lambda logits, *_: torch.full((len(logits),), 2, dtype=torch.int64)
    )
    with pytest.raises(ModelError, match="wrote no text in 4 sequences"):
        grail.generate_calibration(tiny_folder, tmp_path / "out.jsonl", **FEW)


def test_too_little_disk_is_refused_before_the_model_is_loaded(tiny_folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 21)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(grail.Pretrained, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises((StateError, ExportError), match="free some space"):
        grail.generate_calibration(tiny_folder, tmp_path / "out.jsonl", **{**FEW, "tokens": 10**6})


def test_two_runs_do_not_write_one_file(tiny_folder, tmp_path):
    from grail.runtime.lock import locked

    with (
        locked(tmp_path / "out.jsonl.partial"),
        pytest.raises(InputError, match="in use by another run"),
    ):
        grail.generate_calibration(tiny_folder, tmp_path / "out.jsonl", **FEW)


def test_it_says_what_it_will_take(tiny_folder, tmp_path, capfd):
    grail.generate_calibration(tiny_folder, tmp_path / "out.jsonl", **{**FEW, "progress": True})
    said = capfd.readouterr().err
    assert "Predicted for 208 tokens in sequences of 16: time about" in said
    assert "writing" in said


def test_a_mixture_of_prompts_keeps_one_sequence_of_each():
    text = generation._starting(Mixture(["a", "b", "c"]), Sampling(tokens=10))
    assert (text.tokens, text.sequence_length, text.option) == (96, 32, "prompts")
