"""Statistics collected apart and added are those of one run over everything."""

import copy

import pytest
import torch
from torch import nn

import grail
from grail.collect import merge
from grail.errors import InputError, NonFiniteError, StateError

from .convnets import images, network


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
