"""Saved and loaded again: networks that differ from the factory's in more than their widths."""

import copy

import pytest
import torch
from torch import nn

import grail
from grail.errors import ExportError


def assert_loads_the_same(model, x, folder, factory):
    loaded = grail.load(grail.save(model, folder), factory)
    with torch.no_grad():
        found, expected = loaded(x), model(x)
    assert torch.equal(getattr(found, "logits", found), getattr(expected, "logits", expected))
    return loaded


def test_attention_that_reads_a_configuration_of_its_own(tiny_model, tiny_batches, tmp_path):
    model, batches = tiny_model("phi3"), tiny_batches()
    keep = {"heads": [0.5, 2 / 3]}
    report = grail.compress(model, batches, keep, ("heads",), progress=False)
    assert len({site.kept for site in report.sites}) == 2
    loaded = assert_loads_the_same(model, batches[0], tmp_path / "a", lambda: tiny_model("phi3"))
    assert_loads_the_same(loaded, batches[0], tmp_path / "b", lambda: tiny_model("phi3"))
    assert loaded.config.num_attention_heads == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_buffers_that_are_not_saved_are_cast_as_the_model_was(
    dtype, tiny_llama, tiny_batches, tmp_path
):
    model, batches = tiny_llama().to(dtype), tiny_batches(length=64)  # rotary frequencies as well
    grail.compress(model, batches, 0.5, progress=False)
    loaded = assert_loads_the_same(model, batches[0], tmp_path / "out", tiny_llama)
    assert loaded.model.rotary_emb.inv_freq.dtype == dtype


def test_biases_that_compensation_added(tiny_llama, tiny_batches, tmp_path):
    model, batches = tiny_llama(), tiny_batches()
    keep = {"mlp": [0.5, 0.7]}
    grail.compress(model, batches, keep, ("mlp",), compensate="both", progress=False)
    loaded = assert_loads_the_same(model, batches[0], tmp_path / "out", tiny_llama)
    assert isinstance(loaded.model.layers[1].mlp.down_proj.bias, nn.Parameter)
    assert loaded.config.mlp_bias is True


class Tied(nn.Module):
    """One embedding for the input and for two outputs, of which a narrow layer feeds the first."""

    def __init__(self, tied: str = "parameters"):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.first, self.second = (nn.Linear(16, 50, bias=False) for _ in range(2))
        for head in (self.first, self.second):
            if tied == "parameters":
                head.weight = self.embed.weight
            else:
                head.weight.data = self.embed.weight.data

    def forward(self, x):
        x = self.embed(x)
        return self.first(self.down(self.up(x).relu())) + self.second(x)


@pytest.mark.parametrize("tied", ["parameters", "storage"])
def test_parameters_that_narrowing_untied(tied, tmp_path):
    torch.manual_seed(0)
    model, x = Tied(tied).eval(), torch.randint(50, (4, 12))
    model.first.weight = nn.Parameter(model.first.weight[:, :8].clone())
    model.down.weight = nn.Parameter(model.down.weight[:8].clone())
    model.down.bias = nn.Parameter(model.down.bias[:8].clone())
    loaded = assert_loads_the_same(model, x, tmp_path / "out", lambda: Tied(tied))
    assert (loaded.second.weight is loaded.embed.weight) == (tied == "parameters")


@pytest.mark.parametrize("tied", ["parameters", "storage"])
def test_parameters_that_stay_tied(tied, tmp_path):
    torch.manual_seed(0)
    model, x = Tied(tied).eval(), torch.randint(50, (4, 12))
    assert_loads_the_same(model, x, tmp_path / "out", lambda: Tied(tied))


@pytest.mark.parametrize("more", ["parameter", "buffer", "layer", "less"])
def test_what_the_factory_has_no_place_for_is_refused(more, tmp_path):
    factory, model = Tied, Tied()
    if more == "parameter":
        model.down.scale = nn.Parameter(torch.ones(16))
    elif more == "buffer":
        model.down.register_buffer("scale", torch.ones(16))
    elif more == "layer":
        model.more = nn.Linear(2, 2)
    else:
        larger = copy.deepcopy(model)
        larger.down.scale = nn.Parameter(torch.ones(16))
        factory = lambda: larger  # noqa: E731
    with pytest.raises(ExportError, match=r"differ in (down\.scale|more\.bias, more\.weight)$"):
        grail.load(grail.save(model, tmp_path / "out"), factory)
