"""What a model is compared with, and what is predicted of it."""

import weakref
from dataclasses import replace

import pytest

from grail.recipe import Recipe
from grail.report.card import card
from grail.report.formatting import format_bytes
from grail.report.page import page
from grail.report.report import Evaluation, Report
from grail.report.summary import quantising_sentence, size_sentence
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
