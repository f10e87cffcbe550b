"""Widths that quantisers and runtimes refuse are said before a run, with the remedy."""

import warnings

import pytest
import torch
from torch import nn

import grail
from grail.recipe import Recipe
from grail.run.fingerprint import run_fingerprint
from grail.run.served import WidthWarning
from tests.run.test_inspect import inspected


def heard(work):
    """The warnings of widths that a call gives, and its result."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = work()
    assert {w.filename for w in caught if w.category is WidthWarning} <= {__file__}
    return [str(w.message) for w in caught if w.category is WidthWarning], result


def compressed(model, batches, **settings):
    return heard(lambda: grail.compress(model, batches, progress=False, **settings))


@pytest.fixture
def wide(tiny_llama):
    return lambda **config: tiny_llama(intermediate_size=384, **config)


def test_a_width_without_a_group_is_said_once_with_the_remedy(wide, tiny_batches):
    said, report = compressed(wide(), tiny_batches(), keep=0.7, selector="wanda")
    (sentence,) = said
    assert sentence == (
        "mlp: 272 of 384 channels is a multiple of neither 128 nor 64, and quantisation in groups "
        "of so many channels, as by GPTQ, refuses other widths; choose multiple=128, which gives "
        "256"
    )
    assert report.notes.count(sentence) == 1


@pytest.mark.parametrize("settings", [{"multiple": 128}, {"multiple": "gptq"}, {"multiple": 64}])
def test_the_remedy_and_other_groups_are_silent(settings, wide, tiny_batches):
    said, report = compressed(wide(), tiny_batches(), keep=0.7, selector="wanda", **settings)
    assert said == []
    assert not any("GPTQ" in note for note in report.notes)


def test_a_remedy_narrows(wide, tiny_batches):
    # 0.97 of 384 in 128s is 384: only 64 leaves less.
    said, _ = compressed(wide(), tiny_batches(), keep=0.9, multiple=8, selector="wanda")
    assert said[0].endswith("choose multiple=64, which gives 320")
    said, _ = compressed(wide(), tiny_batches(), keep=0.97, multiple=8, selector="wanda")
    assert said[0].endswith("refuses other widths")


def test_uneven_widths_are_counted(wide, tiny_batches):
    keep = {"mlp": [0.5, 0.7, 0.4]}
    model = wide(num_hidden_layers=3)
    (sentence,), _ = compressed(model, tiny_batches(), keep=keep, selector="wanda")
    assert "mlp: 2 of 3 widths, such as 272, are multiples of neither" in sentence
    assert sentence.endswith("; choose multiple=128")


def test_heads_without_a_group_name_another_share(tiny_llama, tiny_batches):
    def narrowed(keep):
        model = tiny_llama(num_attention_heads=12, num_key_value_heads=12, head_dim=16)
        settings = {"keep": keep, "sites": ("heads",), "selector": "wanda"}
        return compressed(model, tiny_batches(), **settings)

    (sentence,), _ = narrowed(0.5)
    assert "heads: 6 of 12 heads" in sentence
    assert ", 96 channels, is a multiple of neither" in sentence
    assert sentence.endswith("choose keep=0.667 of heads, which gives 128 channels")
    said, report = narrowed(0.667)
    assert (said, report.sites[0].kept) == ([], 128)


def test_nothing_is_said_where_the_dense_width_had_no_group(tiny_llama, tiny_batches):
    said, _ = compressed(tiny_llama(), tiny_batches(), keep=0.5, selector="wanda")  # 80 channels
    assert said == []


def test_nothing_is_said_of_networks_that_are_no_language_models():
    model = nn.Sequential(nn.Linear(5, 128), nn.ReLU(), nn.Linear(128, 3))
    batches, site = [torch.randn(40, 5)], grail.Site(["0"], ["2"])
    said, report = compressed(model, batches, keep=0.7, sites=[site], selector="wanda")
    assert said == []
    assert report.sites[0].kept == 88
    assert grail.inspect(model, sites=[site], keeps=[0.7]).savings[0].fits == {}


def test_a_name_and_its_number_are_the_same_run(wide, tiny_batches):
    prints, weights = [], []
    for multiple in ("gptq", 128):
        model = wide()
        prints.append(run_fingerprint(model, Recipe(multiple=multiple)))
        report = grail.compress(model, tiny_batches(), 0.7, multiple=multiple, progress=False)
        weights.append(model.state_dict())
        assert report.settings["multiple"] == 128
        assert report.sites[0].kept == 256
    assert prints[0] == prints[1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_an_inspection_counts_what_widths_fit(wide):
    found = inspected(wide(), recipe=Recipe(0.7, ("mlp", "heads")), keeps=[0.7, 0.5, 2 / 3])
    at_07, half, even = (saving.fits for saving in found.savings)
    assert at_07["mlp"]["tensor parallel: 8"] == 2  # 272 = 8·34, in both blocks
    assert at_07["mlp"]["groups: 64"] == at_07["mlp"]["GGUF blocks: 32"] == 0
    assert half["mlp"]["groups: 64"] == half["mlp"]["GGUF blocks: 32"] == 2  # 192
    assert half["mlp"]["groups: 128"] == 0
    assert even["mlp"]["TP, groups of 128: 2"] == 2  # 256
    assert even["mlp"]["TP, groups of 128: 4"] == 0
    assert half["heads"]["tensor parallel: 2"] == 0  # 3 of 6 heads
    assert [note.partition(" of ")[0] for note in found.notes] == ["mlp: 272"]


def test_an_inspection_counts_uneven_widths(wide):
    found = inspected(wide(), keeps=[{"mlp": [0.5, 2 / 3], "heads": 1.0}])
    counts = found.savings[0].fits["mlp"]
    assert (counts["groups: 64"], counts["groups: 128"]) == (2, 1)
