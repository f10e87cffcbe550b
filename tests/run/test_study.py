"""What a model is compared with, and what is predicted of it."""

import math
import weakref
from dataclasses import replace

import pytest
import torch

from grail import evaluate, sensitivity
from grail.recipe import Recipe
from grail.report import paired
from grail.report.card import card
from grail.report.formatting import format_bytes, format_number
from grail.report.page import page
from grail.report.report import Evaluation, Report
from grail.report.summary import headline, quantising_sentence, size_sentence
from grail.report.texts import recovered_cell
from grail.run import study as stages_of
from grail.run.study import Study, baselines
from grail.runtime.clock import Stages
from grail.runtime.settings import Runtime


@pytest.mark.parametrize(
    ("settings", "uneven", "expected"),
    [
        ({}, False, {"pruned": ("wanda", False), "compensated": ("wanda", True)}),
        ({"selector": "wanda"}, False, {"pruned": ("wanda", False)}),
        ({"selector": "folding"}, False, {"pruned": ("folding", False)}),
        (
            {"selector": "magnitude"},
            True,
            {"pruned": ("magnitude", False), "compensated": ("magnitude", True)},
        ),
        (
            {"compensate": False, "fit_bias": True},
            False,
            {"pruned": ("wanda", False), "compensated": ("wanda", False)},
        ),
        ({"compensate": False}, False, {}),
    ],
    ids=["greedy", "wanda", "folding", "uneven", "bias", "plain"],
)
def test_a_model_is_compared_with_its_own_choice_or_wandas(settings, uneven, expected):
    options = (
        Recipe(0.6, "mlp", alpha=1e-2, correct_attention=True, **settings)
        if (settings.get("compensate", True) is True)
        else Recipe(0.6, "mlp", alpha=1e-2, **settings)
    )
    found = baselines(options, uneven=uneven)
    assert {role: (o.selector, o.compensate) for role, o in found.items()} == expected
    for role, other in found.items():
        assert (other.keep, other.sites) == (options.keep, options.sites)
        assert other.fit_bias == (role == "compensated" and options.fit_bias)
        if role == "compensated":
            assert other == replace(options, selector=other.selector)


@pytest.mark.parametrize("heldout", [0, 3], ids=["no text", "text"])
@pytest.mark.parametrize("compare", [False, True], ids=["alone", "compared"])
def test_every_stage_that_runs_is_predicted(heldout, compare, tiny_llama, tiny_batches, tmp_path):
    class Tokenizer:
        def decode(self, row, **_):
            return " ".join(map(str, row.tolist()))

        def save_pretrained(self, folder):
            pass

    stages = Stages()
    with stages(stages_of.LOADING):
        network = tiny_llama()
    dense, alive = weakref.ref(network), []

    def fresh():
        alive.append(dense() is not None)
        return tiny_llama()

    texts = {"held-out": tiny_batches(heldout, seed=1)} if heldout else {}
    study = Study(
        network,
        fresh, Tokenizer(), tiny_batches(), texts, stages,
        runtime=Runtime(progress=False), say=lambda _: None,
    )  # fmt: skip
    options = Recipe(0.5, "mlp")
    del network
    prediction = study.predict(options, compare=compare, uneven=False)
    study.measure("dense")
    if compare and heldout:
        study.compare(options)
    report = study.run(options)
    study.write(report, prediction, tmp_path / "out", lambda _: None)
    assert alive == [False] * len(alive)  # never two networks at once
    total = report.stages.pop("total")
    for column in ("predicted", "measured"):
        times = [row[column] for row in report.stages.values()]  # none is missing
        assert all(seconds > 0 for seconds in times)
        assert total[column] == pytest.approx(sum(times))
    assert total["predicted"] == prediction.total
    assert report.memory["predicted_peak"] == prediction.peak
    assert (stages_of.RUNS in report.stages) == (compare and heldout > 0)
    assert bool(report.samples) == bool(heldout)


@pytest.mark.parametrize("alpha", ["auto", 1e-3], ids=["guarded", "fixed"])
def test_widths_are_chosen_on_the_guard_of_the_run(alpha, tiny_llama, tiny_batches):
    model, batches, guard = tiny_llama(), tiny_batches(6), tiny_batches(3, length=9, seed=5)
    recipe = Recipe(0.6, ("mlp", "heads"), alpha=alpha)
    runtime = Runtime(progress=False)
    study = Study(model, tiny_llama, None, batches, {}, Stages(), runtime, guard=guard)
    used = guard if alpha == "auto" else None
    measured = sensitivity(model, batches, guard=used, recipe=recipe, runtime=runtime)
    assert study.uneven(recipe).keep == measured.shares()
    alone = sensitivity(model, batches, recipe=recipe, runtime=runtime)
    assert (alone.losses == measured.losses) == (used is None)


@pytest.mark.parametrize("layers", [2, 3])
def test_the_stage_of_a_resumed_run_has_the_time_of_the_runs_before(
    layers, tiny_llama, tiny_batches, tmp_path
):
    def stage():
        stages = Stages()
        network = tiny_llama(num_hidden_layers=layers)
        runtime = Runtime(progress=False, resume_dir=tmp_path / "state")
        study = Study(network, tiny_llama, None, tiny_batches(), {}, stages, runtime)
        report = study.run(Recipe(0.5, "mlp"))
        return report, stages.seconds[stages_of.COMPRESSING]

    first, _ = stage()
    again, seconds = stage()  # nothing is left to do
    assert first.resumed == {}
    assert (again.resumed["after"], again.resumed["of"]) == (layers, layers)
    # All phases of the blocks before, less what the last state took to write.
    spent = sum(first.seconds[phase] for phase in ("forward", "gram", "select", "solve"))
    assert seconds > again.resumed["seconds"] >= 0.5 * spent > 0


def test_a_quantised_model_is_compared_with_one_that_is_rounded(tiny_llama, tiny_batches):
    def fresh():
        sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
        return tiny_llama(hidden_size=64, intermediate_size=128, **sizes)

    recipe = Recipe(0.5, selector="wanda", quantize="q4_1")
    assert all(other.quantize is None for other in baselines(recipe).values())
    runtime = Runtime(progress=False)
    batches, heldout = tiny_batches(), {"held-out": tiny_batches(seed=1)}
    study = Study(fresh(), fresh, None, batches, heldout, Stages(), runtime, say=lambda _: None)
    study.measure("dense")
    study.compare(recipe)
    study.compare_rounding(recipe)
    report = study.run(recipe)
    rows = report.evaluation
    assert {role: row.label for role, row in rows.items()} == {
        "dense": "dense",
        "pruned": "pruned (wanda)",
        "unquantised": "compensated (wanda)",
        "rounded": "compensated (wanda) + q4_1 (to nearest)",
        "restored": "compensated (wanda) + q4_1 (GPTQ)",
    }
    assert len({row.perplexity for row in rows.values()}) == 5
    assert rows["rounded"].bytes == rows["restored"].bytes == report.model["bytes"]["quantised"]
    assert rows["rounded"].bytes < 0.3 * rows["unquantised"].bytes
    assert report.same_choice == "unquantised"
    sentence = quantising_sentence(report)
    assert "14 matrices in q4_1: mean error of a layer's output 0." in sentence
    assert f"as GGUF {format_bytes(rows['restored'].bytes)}" in size_sentence(report)
    assert "+ q4_1 (GPTQ)" in page(report).replace("&#43;", "+")
    assert "rounded to nearest" in card(report)


def test_the_share_that_gptq_recovers_is_of_the_loss_by_rounding():
    rows = {"unquantised": 10.0, "rounded": 40.0, "restored": 20.0}
    report = Report({}, {}, {})
    assert report.rounding_recovered is None
    report.evaluation = {role: Evaluation(value, 8, 8, 8) for role, value in rows.items()}
    assert report.rounding_recovered == pytest.approx(0.5)
    assert quantising_sentence(report) == ""


@pytest.fixture
def on_two_texts(tiny_llama, tiny_batches):
    """A study of two texts that has run, and its report."""
    texts = {"in.txt": tiny_batches(seed=1), "off.txt": tiny_batches(count=2, seed=2)}
    runtime, silent = Runtime(progress=False), lambda _: None
    study = Study(
        tiny_llama(), tiny_llama, None, tiny_batches(), texts, Stages(), runtime, say=silent
    )
    recipe = Recipe(0.5, selector="wanda")
    study.measure("dense")
    study.compare(recipe)
    return study, study.run(recipe)


def test_each_text_has_its_own_scores_shares_and_distances(on_two_texts, tiny_llama):
    study, report = on_two_texts
    dense = tiny_llama()
    for index, (name, batches) in enumerate(study.heldout.items()):
        scores = {role: row.scores[index] for role, row in report.evaluation.items()}
        alone = evaluate(study.network, batches, against=dense, progress=False)
        found = scores["restored"]
        assert found.text == name
        for field in ("perplexity", "tokens", "kl", "top1", "losses"):
            assert getattr(found, field) == getattr(alone, field)
        share = paired.share(*(scores[role].losses for role in ("dense", "pruned", "restored")))
        assert (found.recovered, found.recovered_error) == (share.value, share.error)
        losses = [math.log(scores[role].perplexity) for role in ("dense", "pruned", "restored")]
        assert share.value == pytest.approx((losses[1] - losses[2]) / (losses[1] - losses[0]))
        assert scores["pruned"].kl > 0
        assert scores["pruned"].recovered is None
        assert scores["dense"].kl is None
    assert len(report.evaluation["restored"].scores) == 2
    assert Report.from_json(report.to_json()).evaluation == report.evaluation


def test_the_dense_network_runs_once_on_each_text(tiny_llama, tiny_batches):
    texts, runs = {"in.txt": tiny_batches(seed=1), "off.txt": tiny_batches(seed=2)}, []
    network = tiny_llama()
    runtime = Runtime(progress=False)
    study = Study(network, tiny_llama, None, tiny_batches(), texts, Stages(), runtime)
    network.model.register_forward_hook(lambda *_: runs.append(1))
    study.measure("dense")
    once = len(runs)
    study.network = tiny_llama()  # as after a comparison
    study.measure("pruned", Recipe(0.5))
    assert len(runs) == once
    assert study.rows["pruned"].kl == 0


def test_a_rounded_output_layer_is_compared_with_the_dense_one(tiny_llama, tiny_batches):
    texts, runtime = {"in.txt": tiny_batches(seed=1)}, Runtime(progress=False)
    study = Study(tiny_llama(), tiny_llama, None, tiny_batches(), texts, Stages(), runtime)
    study.measure("dense")
    with torch.no_grad():
        study.network.lm_head.weight.copy_(study.network.lm_head.weight.round(decimals=2))
    study.measure("rounded", Recipe(0.5))
    expected = evaluate(study.network, texts["in.txt"], against=tiny_llama(), progress=False)
    assert study.rows["rounded"].kl == expected.kl > 0


def test_all_texts_are_on_the_page_and_on_the_card(on_two_texts):
    _, report = on_two_texts
    for shown in (page(report), card(report).replace("\\", "")):
        for score in report.evaluation["restored"].scores:
            for cell in (score.text, format_number(score.perplexity), recovered_cell(score)):
                assert cell in shown
    figure, claim = headline(report)
    first, other = (score.recovered for score in report.evaluation["restored"].scores)
    assert figure == (f"{first:.0%}" if first >= 0 else f"{-first:.0%} worse")
    assert "on in.txt" in claim
    assert f"{abs(other):.0%}" in claim
    assert claim.endswith(" on off.txt")
