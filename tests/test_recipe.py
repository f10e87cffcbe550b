"""A recipe as data, what it asks of an architecture, and what it refuses."""

import copy
import dataclasses
import json
import pickle
import re
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

import grail
from grail import select
from grail.errors import InputError
from grail.networks import find
from grail.recipe import PRESETS, Recipe, merged
from grail.runtime.settings import Runtime
from tests.settings import PAGE, rewritten


def test_shares_are_for_kinds_blocks_and_single_sites(tiny_llama):
    keep = {"mlp": [0.5, 0.75], "model.layers.0.mlp": 0.25, "heads": 0.5}  # heads are not narrowed
    widths = Recipe(keep, sites=("mlp",), multiple=1).widths(find(tiny_llama()))
    assert {name: width.kept for name, width in widths.items()} == {
        "model.layers.0.mlp": 20,
        "model.layers.1.mlp": 60,
    }


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ({"mlp": 0.5, "haeds": 0.2}, r"keep names haeds; .* kinds heads, mlp and .*layers\.0\.mlp"),
        ({"mlp": 0.5, "model.layers.1.mpl": 0.2}, r"keep names model\.layers\.1\.mpl;"),
        ({"mlp": [0.5, 0.5, 0.9]}, "3 shares for mlp, one for each block; there are 2 blocks"),
    ],
    ids=["kind", "site", "blocks"],
)
def test_shares_of_what_is_not_there_are_refused(keep, said, tiny_llama):
    with pytest.raises(InputError, match=said):
        Recipe(keep, sites=("mlp",)).widths(find(tiny_llama()))


@pytest.mark.parametrize(
    ("asked", "found"),
    [("Wanda", "wanda"), ("WANDA++", "wanda++"), (" magnitude_l1 ", "magnitude-l1")],
)
def test_selectors_and_kinds_are_found_in_any_case(asked, found):
    options = Recipe(selector=asked, sites="MLP, heads mlp")
    assert (options.selector, options.sites) == (found, ("mlp", "heads"))
    assert select.get(asked) is select.get(found)


@pytest.mark.parametrize("name", select.names())
@pytest.mark.parametrize("wrong", [lambda n: n[:2] + n[3:], lambda n: n[0] + n[2] + n[1] + n[3:]])
def test_a_misspelt_selector_is_answered_with_the_nearest(name, wrong):
    with pytest.raises(InputError, match=re.escape(f"did you mean {name!r}?")):
        Recipe(selector=wrong(name))


def test_a_name_like_no_selector_gets_the_list_alone():
    with pytest.raises(InputError, match="unknown selector 'best'; choose one of backward"):
        select.get("best")


SITES = [
    grail.Site(["a", grail.Fused("b", parts=3, interleaved=True)], ["c"], along=["n"], name="one"),
    grail.Site(["d"], ["e", "f"]),
]
RECIPES = {
    "default": Recipe(),
    **{name: Recipe.named(name) for name in PRESETS},
    "kinds": Recipe(sites="mlp,heads", multiple=4, seed=7, token_weights=False),
    "shares": Recipe({"mlp": [0.9, 0.8], "heads": 0.5}, non_finite="drop"),
    "sites": Recipe(0.25, SITES, "magnitude", per_tap=False, repair=True),
}


@pytest.mark.parametrize("suffix", ["json", "yaml", "yml"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_saved_recipe_is_loaded_as_it_was(name, suffix, tmp_path):
    path = tmp_path / f"recipe.{suffix}"
    RECIPES[name].save(path)
    assert Recipe.load(path) == Recipe.load(str(path)) == RECIPES[name]
    assert merged(path, None, {})[0] == RECIPES[name]
    assert Recipe.from_dict(json.loads(json.dumps(RECIPES[name].as_dict()))) == RECIPES[name]


def test_settings_that_a_file_leaves_out_have_their_defaults(tmp_path):
    (tmp_path / "few.yaml").write_text("keep: 0.5\nsites: mlp, heads\nalpha: 1e-3\n")
    loaded = Recipe.load(tmp_path / "few.yaml")
    assert loaded == Recipe(0.5, ("mlp", "heads"), alpha=1e-3)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", '{"alhpa": 1}', r"a\.json: unknown setting 'alhpa'; did you mean 'alpha'\?"),
        ("a.yaml", "keeps: 1", r"a\.yaml: unknown setting 'keeps'; did you mean 'keep'\?"),
        ("a.json", '{"keep": 2}', r"a\.json: keep must be a fraction"),
        ("a.json", '{"sites": [{"producer": ["a"]}]}', "did you mean 'producers'"),
        ("a.json", '{"sites": [{"producers": ["a"]}]}', "a site needs"),
        ("a.json", '{"sites": [{"producers": [{"nam": "a"}]}]}', "did you mean 'name'"),
        ("a.json", '{"sites": [{"producers": [{"parts": 2}]}]}', "the name of a layer"),
        ("a.json", "[1]", "must be a mapping of settings; got list"),
        ("a.json", '{"keep": ', r"a\.json: no JSON: "),
        ("a.yaml", "keep: [", r"a\.yaml: no YAML: "),
        ("a.yaml", "", "must be a mapping of settings; got None"),
        ("a.toml", "keep = 1", r"a\.toml: a recipe file ends in \.json, \.yaml, \.yml"),
        ("a.json", '{"keep": 0.5, "keep": 0.6}', r"a\.json: 'keep' is given twice; leave one out"),
        ("a.json", '{"keep": {"mlp": 0.5, "mlp": 0.6}}', "'mlp' is given twice"),
        ("a.yaml", "keep: 0.5\nseed: 1\nkeep: 0.6", r"a\.yaml: 'keep' is given twice; leave one"),
        ("a.yaml", "keep: {mlp: 0.5, mlp: 0.6}", "'mlp' is given twice"),
        ("a.yaml", "[a, b]: 0.5", r"a\.yaml: no YAML: .* unhashable key"),
        ("a.yaml", "keep: &a {mlp: *a}", r"a\.yaml: keep must be a fraction"),
        ("a.yaml", "sites: {mlp: 0.5}", "sites must be a list of kinds .*; got dict"),
        ("a.yaml", "PAPER: 1", "unknown setting 'PAPER'; choose of"),
        ("a.yaml", "KEEP: 1", "unknown setting 'KEEP'; did you mean 'keep'"),
        ("a.json", "[" * 100_000, r"a\.json: no JSON: .*recursion"),
        ("a.yaml", "keep: " + "[" * 2_000, r"a\.yaml: no YAML: .*recursion"),
        ("a.json", b'{"selector": "\xe9"}', r"a\.json is no text in UTF-8"),
        ("a.yaml", "keep: 0.5".encode("utf-16"), r"a\.yaml is no text in UTF-8"),
    ],
)
def test_files_that_hold_no_recipe_are_refused(name, text, said, tmp_path):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=said):
        Recipe.load(tmp_path / name)


@pytest.mark.parametrize("name", ["a.JSON", "a.json", "a.Yaml", "a.yaml"])
def test_a_file_with_a_byte_order_mark_and_a_suffix_in_any_case_is_read(name, tmp_path):
    (tmp_path / name).write_bytes(b'\xef\xbb\xbf{"keep": 0.5}\n')
    assert Recipe.load(tmp_path / name) == merged(tmp_path / name, None, {})[0] == Recipe(0.5)


def test_yaml_may_merge_mappings_and_override_what_they_hold(tmp_path):
    (tmp_path / "a.yaml").write_text("keep:\n  <<: {mlp: 0.5, heads: 0.6}\n  mlp: 0.7\n")
    assert Recipe.load(tmp_path / "a.yaml").keep == {"mlp": 0.7, "heads": 0.6}


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("x" * 5000, "unknown recipe 'xxx"),
        ("x" * 5000 + ".json", "cannot be read"),
        ("a\0.json", "path must be a path; got"),
        ({"keep": 0.5}, "recipe must be a grail.Recipe, the name of one, or a path; got dict"),
    ],
    ids=["long", "long path", "null byte", "mapping"],
)
def test_what_names_no_recipe_is_refused(recipe, said):
    with pytest.raises(InputError, match=said):
        merged(recipe, None, {})


@pytest.mark.parametrize("path", ["no/such.json", "folder.json"])
def test_a_recipe_that_cannot_be_written_is_refused(path, tmp_path):
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        Recipe().save(tmp_path / path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"multiple": "8"}, "multiple must be a positive integer"),
        ({"multiple": 0}, "multiple must be a positive integer"),
        ({"multiple": True}, "multiple must be a positive integer"),
        ({"multiple": 10**400}, "multiple must be a positive integer less than"),
        ({"alpha": 10**400}, "alpha must be a finite number"),
        ({"token_weights": 1}, "token_weights must be True, False or 'auto'; got 1"),
        ({"keep": {}}, "keep must give shares"),
        ({"keep": {"mlp": []}}, "keep must give shares"),
        ({"keep": {1: 0.5}}, "keep must name kinds, such as 'mlp', or sites; got 1"),
        ({"keep": {"mlp": {"a": 0.5}}}, "keep must be a fraction"),
        ({"sites": {"mlp": 0.5}}, "sites must be a list of kinds or of grail.Site; got dict"),
    ],
)
def test_settings_are_checked_when_a_recipe_is_made(settings, said):
    with pytest.raises(InputError, match=said):
        Recipe(**settings)


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"keep": Fraction(1, 2)}, {"keep": 0.5}),
        ({"keep": {"mlp": np.array([0.5, 0.25])}}, {"keep": {"mlp": [0.5, 0.25]}}),
        ({"compensate": np.False_}, {"compensate": False}),
        ({"token_weights": np.True_}, {"token_weights": True}),
        ({"multiple": np.int64(8)}, {"multiple": 8}),
        ({"sites": np.array(["MLP", "mlp"])}, {"sites": ("mlp",)}),
        ({"sites": ["MLP", " heads"]}, {"sites": "mlp, heads"}),
        ({"sites": {"mlp", "heads", "conv"}}, {"sites": ("conv", "heads", "mlp")}),
        (
            {"sites": [grail.Site([grail.Fused("a", np.int64(2))], ["b"])]},
            {"sites": [grail.Site([grail.Fused("a")], ["b"])]},
        ),
    ],
)
def test_values_of_other_libraries_are_stored_as_pythons(given, plain, tmp_path):
    made = Recipe(**given)
    assert repr(made) == repr(Recipe(**plain))
    for name in ("a.json", "a.yaml"):
        made.save(tmp_path / name)
        assert Recipe.load(tmp_path / name) == made


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_compared_copied_and_hashed_by_value(name):
    recipe = RECIPES[name]
    for copied in (pickle.loads(pickle.dumps(recipe)), copy.deepcopy(recipe)):
        assert copied == recipe
        assert hash(copied) == hash(recipe)
    assert len({recipe, dataclasses.replace(recipe), dataclasses.replace(recipe, seed=99)}) == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"storage": None}, "storage must be the name of a device"),
        ({"onload": True}, "onload must be the name of a device, such as 'cuda'; got bool"),
        ({"resume_dir": ""}, "resume_dir must be a path; got ''"),
        ({"resume_dir": "a\0b"}, "resume_dir must be a path"),
        ({"resume_dir": 5}, "resume_dir must be a path; got int"),
        ({"progress": 1}, "progress must be True or False; got int"),
    ],
)
def test_wrong_ways_of_computing_are_refused_by_their_name(settings, said):
    with pytest.raises(InputError, match=said):
        Runtime(**settings)


def test_a_recipe_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"gone\.json: no such recipe file"):
        Recipe.load(tmp_path / "gone.json")


def test_yaml_without_its_library_is_refused_and_json_needs_none(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(InputError, match=r"needs PyYAML: pip install pyyaml, or give a \.json"):
        Recipe().save(tmp_path / "a.yaml")
    Recipe().save(tmp_path / "a.json")
    assert Recipe.load(tmp_path / "a.json") == Recipe()


def test_a_selector_that_is_a_function_is_in_no_file(tmp_path):
    with pytest.raises(InputError, match="no file holds a function"):
        Recipe(selector=lambda view: view.gram.energy).save(tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("papre", "unknown recipe 'papre'; did you mean 'paper'?"),
        ("best", "unknown recipe 'best'; choose one of default, paper, prune, flap, slimgpt, or"),
    ],
)
def test_an_unknown_preset_is_answered_with_the_nearest(name, said):
    for find_recipe in (Recipe.named, lambda name: merged(name, None, {})):
        with pytest.raises(InputError, match=re.escape(said)):
            find_recipe(name)


def test_what_a_call_names_wins_over_the_recipe():
    given = {"alpha": 1e-2, "multiple": None, "progress": False}
    base = Recipe(0.6, "mlp", "gram", alpha=1e-4, multiple=4)
    recipe, runtime = merged(base, Runtime(storage="cpu"), given, keep=0.5, sites=None)
    assert recipe == dataclasses.replace(base, keep=0.5, alpha=1e-2, multiple=None)
    assert runtime == Runtime(storage="cpu", progress=False)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, batches: grail.compress(model, batches, 0.5, alhpa=1),
        lambda model, batches: grail.sensitivity(model, batches, alhpa=1),
        lambda model, batches: grail.collect(model, batches, output="no", alhpa=1),
        lambda model, batches: grail.inspect(model, alhpa=1),
    ],
    ids=["compress", "sensitivity", "collect", "inspect"],
)
def test_an_unknown_setting_is_answered_with_the_nearest_by_every_verb(
    call, tiny_llama, tiny_batches
):
    with pytest.raises(InputError, match="unknown setting 'alhpa'; did you mean 'alpha'"):
        call(tiny_llama(), tiny_batches())


@pytest.mark.parametrize(
    "call",
    [
        lambda model, batches: grail.sensitivity(model, batches, alpha=1),
        lambda model, batches: grail.collect(model, batches, output="no", keep=0.5),
    ],
    ids=["sensitivity", "collect"],
)
def test_a_setting_that_a_verb_does_not_read_is_refused(call, tiny_llama, tiny_batches):
    with pytest.raises(InputError, match=r"is a setting .* that is not read here"):
        call(tiny_llama(), tiny_batches())


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_the_same_file_and_calibration_give_the_same_bits(
    suffix, tiny_llama, tiny_batches, tmp_path
):
    settings = {"sites": ("mlp", "heads"), "alpha": 3e-3, "fit_bias": True, "seed": 3}
    model, again = tiny_llama(), tiny_llama()
    report = grail.compress(model, tiny_batches(), 0.5, progress=False, **settings)
    Recipe.from_dict(report.settings).save(path := tmp_path / f"recipe.{suffix}")
    grail.compress(again, tiny_batches(), recipe=path, runtime=Runtime(progress=False))
    assert same(weights(model), weights(again))


def test_the_papers_preset_is_its_formula(tiny_llama, tiny_batches):
    # By hand, open loop, one layer: W G Rᵀ (A + λI)⁻¹ of the Gram that its consumer reads.
    model, dense = tiny_llama(num_hidden_layers=1), tiny_llama(num_hidden_layers=1)
    seen = []
    mlp = dense.model.layers[0].mlp
    mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in tiny_batches():
            dense(batch)
    x = torch.cat(seen).double()
    gram = x.T @ x
    score = mlp.down_proj.weight.abs().double().sum(0) * gram.diagonal().sqrt()
    kept = score.topk(40).indices.sort().values
    a = gram[kept][:, kept]
    damped = a + 1e-3 * a.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    expected = mlp.down_proj.weight.double() @ gram[:, kept] @ torch.linalg.inv(damped)
    grail.compress(model, tiny_batches(), 0.5, recipe="paper", progress=False)
    found = model.model.layers[0].mlp.down_proj.weight.double()
    # fp32 sums through a system of condition < 1e4.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_presets_say_what_they_fit():
    recipes = {name: Recipe.named(name) for name in PRESETS}
    assert recipes["default"] == Recipe()
    fitted = {name: (r.compensate, r.fit_bias) for name, r in recipes.items()}
    assert fitted == {
        "default": (True, False),
        "paper": (True, False),
        "prune": (False, False),
        "flap": (False, True),
        "slimgpt": (True, False),
    }


@pytest.mark.parametrize("settings", [Recipe, Runtime])
def test_the_docstring_has_the_help_of_every_field(settings):
    text = " ".join(settings.__doc__.split())
    for field in dataclasses.fields(settings):
        assert f"{field.name}: {' '.join(field.metadata['help'].split())}" in text


@pytest.mark.parametrize("selector", ["wanda", lambda view: view.gram.energy], ids=["name", "f"])
@pytest.mark.parametrize("way", ["save", "export"])
def test_the_recipe_lies_beside_every_output(way, selector, tiny_llama, tiny_batches, tmp_path):
    model = tiny_llama()
    report = grail.compress(model, tiny_batches(), 0.5, selector=selector, progress=False)
    if way == "save":
        grail.save(model, tmp_path / "out", report)
    else:
        grail.export(model, None, tmp_path / "out", report)
    written = tmp_path / "out" / "recipe.json"
    if callable(selector):
        assert not written.exists()
    else:
        assert Recipe.load(written) == Recipe(0.5, selector="wanda")


def test_the_tables_of_the_docs_are_those_of_the_fields():
    page = PAGE.read_text(encoding="utf-8")
    assert rewritten(page) == page
    for name in PRESETS:
        assert f"| `{name}` |" in page
