"""Statistics collected apart and added are those of one run over everything."""

import copy

import pytest
import torch
from torch import nn

import grail
from grail import merge
from grail.errors import InputError, NonFiniteError, StateError
from tests.convnets import images, network


@pytest.fixture
def collected(tiny_llama, tiny_batches, tmp_path):
    """`collected(name, batches)`: the folder of that name with statistics of a tiny Llama."""

    def make(name, batches, **settings):
        arguments = {"sites": ("mlp", "heads"), "progress": False, **settings}
        return grail.collect(tiny_llama(), batches, output=tmp_path / name, **arguments)

    return make


CONSUMERS = {"mlp": "down_proj", "self_attn": "o_proj"}


def grams(folder):
    """The Grams of a folder by name of site: all sequences together."""
    found = {}
    for path in sorted(folder.glob("[0-9]*.state")):
        gram = grail.Gram.load(path)
        found.setdefault(gram.name, grail.Gram(gram.channels)).merge(gram)
    return found


def seen(model: nn.Module, site: str, batches) -> torch.Tensor:
    """What a site's consumer reads in plain forward passes, [tokens, H] fp64."""
    inputs = []
    consumer = model.get_submodule(f"{site}.{CONSUMERS[site.rpartition('.')[2]]}")
    handle = consumer.register_forward_pre_hook(
        lambda _, args: inputs.append(args[0].flatten(0, -2).double())
    )
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat(inputs)


def assert_sums_of(found, model, batches):
    assert len(found) == 4
    for site, gram in found.items():
        x = seen(model, site, batches)
        assert gram.tokens == len(x)
        # Reference BLAS's syrk test, componentwise.
        bound = 16 * torch.finfo(torch.float32).eps * x.abs().T @ x.abs()
        assert ((gram.matrix().double() - x.T @ x).abs() <= bound).all()


def test_they_are_the_sums_of_plain_forward_passes(collected, tiny_llama, tiny_batches):
    batches = tiny_batches(count=5)
    assert_sums_of(grams(collected("a", batches)), tiny_llama(), batches)


def test_halves_add_up_to_the_whole(collected, tiny_llama, tiny_batches, tmp_path):
    batches = tiny_batches(count=5)
    halves = collected("a", batches[:2]), collected("b", batches[2:])
    assert_sums_of(grams(merge(halves, tmp_path / "c")), tiny_llama(), batches)


def test_merging_one_folder_copies_every_bit(collected, tiny_batches, tmp_path):
    one = collected("a", tiny_batches())
    other = merge([one], tmp_path / "b")
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {
        p.name: p.read_bytes() for p in other.iterdir()
    }


def test_a_merge_can_be_merged(collected, tiny_llama, tiny_batches, tmp_path):
    batches = tiny_batches(count=3)
    a, b, c = (collected(name, [batch]) for name, batch in zip("abc", batches, strict=True))
    both = merge([a, b], tmp_path / "ab")
    assert_sums_of(grams(merge([both, c], tmp_path / "abc")), tiny_llama(), batches)
    with pytest.raises(InputError, match="count twice"):
        merge([both, b], tmp_path / "twice")


def test_the_model_is_only_read(tiny_llama, tiny_batches, tmp_path):
    model = tiny_llama().train()
    before = copy.deepcopy(model.state_dict())
    grail.collect(model, tiny_batches(), output=tmp_path / "a", progress=False)
    assert model.training
    assert all(map(torch.equal, model.state_dict().values(), before.values()))


def test_convolutions_have_the_sums_of_channels_beside_those_of_taps(tmp_path):
    model = network("torchvision-basic")
    folder = grail.collect(model, images(), output=tmp_path / "a", progress=False)
    taps, channels = (
        grail.Gram.load(folder / f"0000.0.{name}.state") for name in ("train", "channels")
    )
    assert taps.channels == 9 * channels.channels


def test_statistics_of_another_model_are_refused(collected, tiny_llama, tiny_batches, tmp_path):
    one = collected("a", tiny_batches())
    other = grail.collect(
        tiny_llama(seed=1),
        tiny_batches(seed=1),
        ("mlp", "heads"),
        output=tmp_path / "b",
        progress=False,
    )
    with pytest.raises(InputError, match="model differ"):
        merge([one, other], tmp_path / "c")
    with pytest.raises(InputError, match="sites differ"):
        merge([one, collected("d", tiny_batches(seed=2), sites=("mlp",))], tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_damage_is_refused_and_nothing_is_written(collected, tiny_batches, tmp_path):
    folder = collected("a", tiny_batches())
    path = folder / "0001.0.train.state"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StateError, match=r"0001\.0\.train\.state"):
        merge([folder], tmp_path / "c")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_calibration_that_fails_writes_nothing(tiny_llama, tiny_batches, tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1e38)
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp"):
        grail.collect(model, tiny_batches(), output=tmp_path / "a", progress=False)
    assert not list(tmp_path.iterdir())


OPEN = {"closed_loop": False, "progress": False}


def assert_same_weights(model, other):
    for name, weight in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], weight), name


@pytest.mark.parametrize(
    "settings",
    [{"keep": 0.5}, {"keep": 0.7, "selector": "wanda", "fit_bias": True, "alpha": 1e-3}],
)
def test_what_was_collected_compresses_like_the_batches_themselves(
    settings, collected, tiny_llama, tiny_batches
):
    batches, there = tiny_batches(count=5), {"mlp_bias": True, "attention_bias": True}
    model, other = tiny_llama(**there), tiny_llama(**there)
    folder = grail.collect(model, batches, ("mlp", "heads"), output=collected("x", batches) / "b")
    expected = grail.compress(model, batches, sites=("mlp", "heads"), **OPEN, **settings)
    report = grail.compress(
        other, grail.Collected(folder), sites=("mlp", "heads"), **OPEN, **settings
    )
    for ours, theirs in zip(report.sites, expected.sites, strict=True):
        assert ours.tokens == theirs.tokens
        assert ours.error == pytest.approx(theirs.error, rel=1e-5)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], weight, rtol=1e-3, atol=1e-5)
    assert report.calibration["tokens"] == expected.calibration["tokens"] == 5 * 2 * 16
    assert report.calibration["sequences"] == 10


@pytest.mark.parametrize("from_statistics", [False, True], ids=["batches", "statistics"])
def test_a_note_tells_what_was_taken_where_one_sequence_is_all(
    from_statistics, collected, tiny_llama, tiny_batches
):
    batches = tiny_batches(count=1, rows=1, length=64)
    given = grail.Collected(collected("a", batches)) if from_statistics else batches
    for alpha, notes in (("auto", ["alpha=0.001"]), (0.05, [])):
        report = grail.compress(tiny_llama(), given, 0.5, ("mlp",), alpha=alpha, **OPEN)
        assert [note.rpartition(" was ")[2] for note in report.notes] == notes
    if not from_statistics:
        report = grail.compress(tiny_llama(), given, 0.5, ("mlp",), alpha=0.05, progress=False)
        assert [note.rpartition(" was ")[2] for note in report.notes] == ["drift_correction=0"]


def test_one_collection_serves_any_sites_and_widths(collected, tiny_llama, tiny_batches):
    batches = tiny_batches(count=5)
    collection = grail.Collected(collected("a", batches))
    for keep in (0.5, 0.8):
        model, other = tiny_llama(), tiny_llama()
        grail.compress(model, batches, keep, ("mlp",), **OPEN)
        grail.compress(other, collection, keep, ("mlp",), **OPEN)
        assert_same_weights(model, other)


def test_merged_halves_compress_like_the_whole(collected, tiny_llama, tiny_batches, tmp_path):
    batches = tiny_batches(count=10)  # so that both halves hold out what the whole does
    halves = collected("a", batches[:5]), collected("b", batches[5:])
    model, other = tiny_llama(), tiny_llama()
    report = grail.compress(model, batches, 0.5, ("mlp", "heads"), **OPEN)
    both = grail.Collected(merge(halves, tmp_path / "c"))
    found = grail.compress(other, both, 0.5, ("mlp", "heads"), **OPEN)
    assert found.calibration["tokens"] == report.calibration["tokens"]
    for ours, theirs in zip(found.sites, report.sites, strict=True):
        assert ours.error == pytest.approx(theirs.error, rel=1e-5)
        assert ours.tokens == theirs.tokens
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("per_tap", [False, True])
def test_convolutions_compress_from_what_was_collected(per_tap, tmp_path):
    batches = images()
    model, other = network("torchvision-basic"), network("torchvision-basic")
    taps = {"per_tap": per_tap}
    folder = grail.collect(model, batches, output=tmp_path / "a", progress=False, **taps)
    grail.compress(model, batches, 0.5, **OPEN, **taps)
    grail.compress(other, grail.Collected(folder), 0.5, **OPEN, **taps)
    assert_same_weights(model, other)


def test_sums_of_taps_are_not_those_of_channels(tmp_path):
    model = network("torchvision-basic")
    folder = grail.collect(model, images(), output=tmp_path / "a", progress=False)
    with pytest.raises(InputError, match="give per_tap=True"):
        grail.compress(model, grail.Collected(folder), 0.5, **OPEN, per_tap=False)


def test_without_convolutions_taps_make_no_difference(
    collected, tiny_llama, tiny_batches, tmp_path
):
    halves = tiny_batches(count=6)[:3], tiny_batches(count=6)[3:]
    folders = collected("a", halves[0]), collected("b", halves[1], per_tap=False)
    for per_tap in (True, False):
        collection = grail.Collected(folders[per_tap])  # collected with the other
        grail.compress(tiny_llama(), collection, 0.5, **OPEN, per_tap=per_tap)
    merge(folders, tmp_path / "c")


def test_where_nothing_is_held_out_all_samples_choose_channels(tmp_path):
    # Every fifth image says of other channels that they are loud.
    batches = [
        batch * (100 if number % 5 == 4 else 1) for number, batch in enumerate(images(count=10))
    ]
    model, other = network("torchvision-basic"), network("torchvision-basic")
    settings = {**OPEN, "selector": "gram", "alpha": 1e-3}
    folder = grail.collect(model, batches, output=tmp_path / "a", progress=False)
    grail.compress(model, batches, 0.5, **settings)
    grail.compress(other, grail.Collected(folder), 0.5, **settings)
    for name, weight in model.state_dict().items():  # sums in another order
        torch.testing.assert_close(other.state_dict()[name], weight, rtol=1e-3, atol=1e-4)


def test_experts_compress_from_what_was_collected(tiny_model, tiny_batches, tmp_path):
    model, other = tiny_model("mixtral"), tiny_model("mixtral")
    folder = grail.collect(
        model, tiny_batches(), ("experts",), output=tmp_path / "a", progress=False
    )
    report = grail.compress(model, tiny_batches(), 0.5, ("experts",), **OPEN)
    found = grail.compress(other, grail.Collected(folder), 0.5, ("experts",), **OPEN)
    assert_same_weights(model, other)
    assert found.notes == report.notes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"closed_loop": True}, "give closed_loop=False"),
        ({"selector": "wanda++"}, "a selector without gradients"),
        ({"sites": ("mlp", "heads")}, r"no statistics of model\.layers\.0\.self_attn, model"),
        ({"resume_dir": "state"}, "without resume_dir"),
    ],
)
def test_what_needs_more_than_sums_is_refused(
    settings, message, collected, tiny_llama, tiny_batches, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    collection = grail.Collected(collected("a", tiny_batches(), sites=("mlp",)))
    with pytest.raises(InputError, match=message):
        grail.compress(tiny_llama(), collection, 0.5, **{**OPEN, **settings})
    with pytest.raises(InputError, match="statistics of another model"):
        grail.compress(tiny_llama(seed=1), collection, 0.5, **OPEN)
    with pytest.raises(StateError, match=r"nothing/index\.state"):
        grail.Collected("nothing")


def test_tokens_that_were_dropped_are_told_when_the_sums_are_used(
    tiny_llama, tiny_batches, tmp_path
):
    model, batches = tiny_llama(), tiny_batches()
    with torch.no_grad():
        model.model.embed_tokens.weight[96] = float("nan")
    batches[-1][-1, -1] = 96
    arguments = {"output": tmp_path / "a", "progress": False, "non_finite": "drop"}
    collection = grail.Collected(grail.collect(model, batches, **arguments))
    report = grail.compress(model, collection, 0.5, **OPEN)
    assert sum("were dropped" in note for note in report.notes) == 2


def test_the_command_line_collects_and_merges(tiny_folder, tmp_path):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from grail import commands

    for name, first in (("a", 3), ("b", 50)):
        words = (f"w{first + n % 40}" for n in range(400))
        (tmp_path / f"{name}.txt").write_text(" ".join(words))
        arguments = ["stats", "collect", tiny_folder, "--calibration", tmp_path / f"{name}.txt"]
        arguments += ["--output", tmp_path / name, "--tokens", 64, "--sequence-length", 16]
        result = CliRunner().invoke(commands.app, list(map(str, arguments)))
        assert result.exit_code == 0, result.output
    arguments = ["stats", "merge", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "c"]
    result = CliRunner().invoke(commands.app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert {gram.tokens for gram in grams(tmp_path / "c").values()} == {128}

    def compress(*more):
        arguments = ["compress", tiny_folder, "--output", tmp_path / "out", "--keep", 0.5, *more]
        return CliRunner().invoke(commands.app, list(map(str, arguments)))

    statistics = ["--statistics", tmp_path / "c"]
    refused = {
        "give either --calibration or --statistics": [*statistics, "--calibration", "a.txt"],
        "give --open-loop": statistics,
    }
    for message, more in refused.items():
        result = compress(*more)
        assert result.exit_code == 2
        assert message in result.stderr
    result = compress(*statistics, "--open-loop")
    assert result.exit_code == 0, result.output
    report = grail.Report.from_json((tmp_path / "out" / "report.json").read_text())
    assert report.calibration["tokens"] == 128
    assert report.calibration["source"] == str(tmp_path / "c")
