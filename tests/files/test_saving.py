"""Saved and loaded again: networks that differ from the factory's in more than their widths."""

import copy
import itertools

import pytest
import torch
from torch import nn

import grail
from grail import export
from grail.errors import ExportError, InputError
from grail.files.load import read_model


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
    grail.compress(model, batches, keep, ("mlp",), fit_bias=True, progress=False)
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


def mlp(sizes):
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh()))).eval()


def convolutions(sizes):
    layers = [nn.Conv2d(*pair, 3, padding=1) for pair in itertools.pairwise(sizes)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU()))).eval()


@pytest.mark.parametrize("rows", [1, 2, 3, 16])
@pytest.mark.parametrize("sizes", [(7, 13, 9), (5, 31, 3, 11), (64, 64, 64), (17, 129, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_odd_sizes_load_to_the_same_bits_at_every_batch_size(dtype, sizes, rows, tmp_path):
    torch.manual_seed(0)
    model = mlp(sizes).to(dtype)
    loaded = assert_loads_the_same(
        model, torch.randn(rows, sizes[0], dtype=dtype), tmp_path / "out", lambda: mlp(sizes)
    )
    assert all(parameter.data_ptr() % 64 == 0 for parameter in loaded.parameters())


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
def test_weights_load_in_the_order_in_memory_that_they_had(order, rows, tmp_path):
    torch.manual_seed(0)
    sizes = (3, 13, 7)
    model = convolutions(sizes).to(memory_format=order)
    x = torch.randn(rows, 3, 11, 9)
    loaded = assert_loads_the_same(model, x, tmp_path / "out", lambda: convolutions(sizes))
    for new, old in zip(loaded.parameters(), model.parameters(), strict=True):
        assert new.stride() == old.stride()


def test_a_transposed_weight_loads_transposed(tmp_path):
    torch.manual_seed(0)
    model = mlp((5, 7, 3))
    model[0].weight = nn.Parameter(model[0].weight.T.contiguous().T)
    loaded = assert_loads_the_same(
        model, torch.randn(1, 5), tmp_path / "out", lambda: mlp((5, 7, 3))
    )
    assert loaded[0].weight.stride() == (1, 7)


@pytest.mark.parametrize("keep", [0.5, {"mlp": [0.4, 0.7]}], ids=["even", "uneven"])
@pytest.mark.parametrize("rows", [1, 3])
def test_an_exported_folder_loads_to_the_same_bits_at_every_batch_size(
    keep, rows, tiny_llama, tiny_batches, tmp_path
):
    model = tiny_llama(intermediate_size=77, hidden_size=42, head_dim=6)
    grail.compress(model, tiny_batches(), keep, multiple=1, progress=False)
    export(model, None, tmp_path / "out", uneven=isinstance(keep, dict))
    loaded, _ = read_model(tmp_path / "out")
    for length in (1, 5, 16):
        ids = tiny_batches(1, rows, length)[0]
        with torch.no_grad():
            assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


def test_stock_transformers_maps_the_weights_of_an_export_at_aligned_addresses(
    tiny_llama, tiny_batches, tmp_path
):
    model = tiny_llama(hidden_size=96, intermediate_size=128)
    grail.compress(model, tiny_batches(), 0.5, progress=False)
    export(model, None, tmp_path / "out")
    stock = type(model).from_pretrained(tmp_path / "out").eval()
    assert all(parameter.data_ptr() % 64 == 0 for parameter in stock.parameters())
    ids = tiny_batches(1, 1, 7)[0]
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, model(ids).logits)


@pytest.mark.parametrize("id", [97, 1000, -1])
@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping"])
def test_token_ids_without_a_row_in_the_embedding_are_refused(form, id, tiny_llama, tiny_batches):
    batches = tiny_batches()
    batches[1][0, 3] = id
    if form != "tensor":
        batches = [(ids,) if form == "tuple" else {"input_ids": ids} for ids in batches]
    with pytest.raises(InputError, match=rf"embedding of 97 rows does not have: {id};"):
        grail.compress(tiny_llama(), batches, 0.5, progress=False)


def test_what_is_made_in_inference_mode_can_be_trained(tiny_llama, tiny_batches, tmp_path):
    model, batches = tiny_llama(), tiny_batches()
    with torch.inference_mode():
        grail.compress(model, batches, 0.5, ("heads", "mlp"), progress=False)
        grail.save(model, tmp_path / "out")
        loaded = grail.load(tmp_path / "out", tiny_llama)
    for trained in (model, loaded):
        trained(batches[0], labels=batches[0]).loss.backward()
        assert all(parameter.grad is not None for parameter in trained.parameters())


def test_a_fit_in_inference_mode_gives_weights_that_can_be_trained():
    torch.manual_seed(0)
    x, layer = torch.randn(50, 8), nn.Linear(8, 3)
    drift, mask = torch.randn(50, 3), torch.arange(50) % 3 > 0
    with torch.inference_mode():
        gram, other = grail.Gram(8, buffer=64), grail.Gram(8)
        gram.update(x[:30], mask[:30], drift=drift[:30])
        other.update(x[:30], drift=drift[:30])
    gram.update(x[30:], mask[30:], drift=drift[30:])
    gram.merge(other)
    with torch.inference_mode():
        other.merge(gram)
    with torch.inference_mode():
        result = grail.fit(gram, grail.Selection([0, 2, 5], 8), layer.weight)
    layer.weight = nn.Parameter(result.weight)
    layer(x[:, [0, 2, 5]]).sum().backward()
    assert layer.weight.grad is not None


def test_loading_leaves_the_factorys_configuration_as_it_was(tiny_llama, tiny_batches, tmp_path):
    model = tiny_llama()
    config = copy.deepcopy(model.config)

    def factory():
        return type(model)(config)

    grail.compress(model, tiny_batches(), 0.5, progress=False)
    loaded = assert_loads_the_same(model, tiny_batches(1)[0], tmp_path / "out", factory)
    assert loaded.config.intermediate_size == 40
    assert config.intermediate_size == 80
    factory().save_pretrained(tmp_path / "dense")
    assert type(model).from_pretrained(tmp_path / "dense").config.intermediate_size == 80


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_of_buffers_that_are_no_part_of_the_state_are_kept(
    dtype, tiny_llama, tiny_batches, tmp_path
):
    model = tiny_llama().to(dtype).float()  # rotary frequencies are rounded
    grail.compress(model, tiny_batches(), 0.5, progress=False)
    ids = tiny_batches(1, 2, 64)[0]
    assert_loads_the_same(model, ids, tmp_path / "a", tiny_llama)
    assert_loads_the_same(model, ids, tmp_path / "b", lambda: tiny_llama().to(dtype))


def test_one_tap_in_channels_last_loads_to_the_same_bits(tmp_path):
    torch.manual_seed(0)

    def factory():
        return nn.Sequential(nn.Conv2d(13, 7, 1), nn.ReLU(), nn.Conv2d(7, 5, 1)).eval()

    model = factory().to(memory_format=torch.channels_last)
    loaded = assert_loads_the_same(model, torch.randn(3, 13, 9, 5), tmp_path / "out", factory)
    assert loaded[0].weight.stride() == model[0].weight.stride()
