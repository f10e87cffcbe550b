"""Quantising: each layer by the Gram of what it reads, in the network quantised up to there."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import grail
from grail.algebra.gptq import inverse_factor, quantize
from grail.algebra.grids import FORMATS, round_to_nearest
from grail.errors import InputError, ModelError
from grail.files.grids import grids_of, require_on_grids, stored_bytes
from grail.report.report import Report
from grail.run import checkpoint
from tests import processes
from tests.kills import Killed, killing

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8}
SIZES |= {"num_key_value_heads": 4, "head_dim": 8}
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def model(tiny_llama):
    return lambda **config: tiny_llama(**{**SIZES, **config})


def by_hand(model: Any, batches: Any, name: str) -> dict[str, torch.Tensor]:
    """The weights by the definition: all layers of block after block, on whole forwards."""
    model = copy.deepcopy(model)
    kind = FORMATS[name]
    embedding = model.get_input_embeddings()
    grid, codes = round_to_nearest(embedding.weight.detach(), FORMATS["q8_0"])
    embedding.weight.data = grid.values(codes)
    output = model.get_output_embeddings()
    if output.weight is not embedding.weight:
        grid, codes = round_to_nearest(output.weight.detach(), FORMATS["q8_0"])
        output.weight.data = grid.values(codes)
    for block in model.model.layers:
        layers = [module for module in block.modules() if isinstance(module, nn.Linear)]
        grams = {layer: torch.zeros(layer.in_features, layer.in_features) for layer in layers}

        def add(layer: nn.Module, args: Any, grams: Any = grams) -> None:
            x = args[0].flatten(0, -2)
            grams[layer] += x.T @ x

        hooks = [layer.register_forward_pre_hook(add) for layer in layers]
        with torch.no_grad():
            for batch in batches:
                model(batch, use_cache=False)
        for hook in hooks:
            hook.remove()
        for layer in layers:
            gram = grams[layer]
            (rounded,) = quantize([layer.weight.detach()], gram, inverse_factor(gram), kind)
            layer.weight.data = rounded.values
    return model.state_dict()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_it_is_gptq_block_by_block_on_the_quantised_network(name, tied, model, tiny_batches):
    network, batches = model(tie_word_embeddings=tied), tiny_batches()
    expected = by_hand(network, batches, name)
    grail.quantize(network, batches, name, progress=False)
    for key, value in network.state_dict().items():
        # A weight half-way between two codes may fall to the other side.
        same = (value == expected[key]).float().mean()
        assert float(same) > (0.95 if value.dim() > 1 else 0.999), key
    require_on_grids(network, grids_of(network))
    assert (network.lm_head.weight is network.model.embed_tokens.weight) is tied


def test_the_report_has_the_errors_of_every_matrix(model, tiny_batches):
    network, batches = model(), tiny_batches()
    before = copy.deepcopy(network)
    report = grail.quantize(network, batches, "q4_1", progress=False)
    expected = ["model.embed_tokens", "lm_head"]
    for block in range(2):
        parts = [f"self_attn.{n}" for n in LAYERS[:4]] + [f"mlp.{n}" for n in LAYERS[4:]]
        expected += [f"model.layers.{block}.{part}" for part in parts]
    assert [row.name for row in report.quantized] == expected
    assert [row.format for row in report.quantized] == ["q8_0"] * 2 + ["q4_1"] * 14
    assert [row.block for row in report.quantized] == [None] * 2 + [0] * 7 + [1] * 7
    for row in report.quantized[2:]:
        assert 0 < row.error < 0.9 * row.nearest_error
    # The first block's query projection reads what it reads in a network of rounded embeddings.
    row, reads = report.quantized[2], []
    before.model.embed_tokens.weight.data = network.model.embed_tokens.weight.data
    layer = before.model.layers[0].self_attn.q_proj
    layer.register_forward_pre_hook(lambda _, args: reads.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            before(batch)
    x = torch.cat(reads).double()
    new = network.model.layers[0].self_attn.q_proj.weight.detach()
    old = layer.weight.detach()
    apart = torch.linalg.norm((old - new).double() @ x.T)
    assert row.error == pytest.approx(
        float(apart / torch.linalg.norm(old.double() @ x.T)), rel=1e-3
    )
    assert report.settings["quantize"] == "q4_1"
    assert report.seconds["quantise"] > 0
    assert Report.from_json(report.to_json()).quantized == report.quantized


def test_masked_tokens_do_not_count(model, tiny_batches):
    batches = tiny_batches(count=2)
    padded = []
    for batch in batches:
        mask = torch.ones_like(batch)
        other = batch.clone()
        other[1, 10:], mask[1, 10:] = 5, 0
        padded.append({"input_ids": other, "attention_mask": mask})
    changed = [{**batch, "input_ids": batch["input_ids"].clone()} for batch in padded]
    for batch in changed:
        batch["input_ids"][1, 10:] = 7
    one, other = model(), model()
    first = grail.quantize(one, padded, progress=False)
    second = grail.quantize(other, changed, progress=False)
    for a, b in zip(first.quantized[2:], second.quantized[2:], strict=True):
        assert a.error == pytest.approx(b.error, rel=1e-3)
    assert first.calibration["tokens"] == 52


def test_a_run_narrows_restores_and_quantises(model, tiny_batches):
    network, batches = model(intermediate_size=128), tiny_batches(count=6)
    report = grail.compress(network, batches, keep=0.5, quantize="q4_1", progress=False)
    assert report.settings["multiple"] == 32
    assert report.model["widths"]["after"] == {"mlp": 64}
    assert all(site.error < site.baseline_error for site in report.sites)
    grids = grids_of(network)
    require_on_grids(network, grids)
    assert len(grids) == 2 + 14
    assert grids["model.layers.1.mlp.down_proj.weight"].shape == (64, 64)
    # The first block's fit is that of a run without rounding, in front of rounded embeddings.
    other = model(intermediate_size=128)
    other.model.embed_tokens.weight.data = network.model.embed_tokens.weight.data.clone()
    plain = grail.compress(other, batches, keep=0.5, multiple=32, progress=False)
    assert plain.sites[0].error == pytest.approx(report.sites[0].error, rel=1e-3)
    # The second reads the rounded one's outputs, and its drift is corrected.
    assert report.sites[1].error != plain.sites[1].error
    bits = 8 * stored_bytes(network) / sum(p.numel() for p in network.parameters())
    assert 5 < bits < 8


def test_without_anything_to_narrow_it_is_quantize(model, tiny_batches):
    one, other, batches = model(), model(), tiny_batches()
    grail.quantize(one, batches, "q8_0", progress=False)
    grail.compress(other, batches, keep=1.0, quantize="q8_0", progress=False)
    for key, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_keep_their_dtype(dtype, model, tiny_batches):
    network = model().to(dtype)
    grail.quantize(network, tiny_batches(), "q4_1", progress=False)
    assert {p.dtype for p in network.parameters()} == {dtype}
    require_on_grids(network, grids_of(network))


@pytest.mark.parametrize("after", [1, 2])
def test_a_killed_run_resumes_to_the_same_bits(after, model, tiny_batches, monkeypatch, tmp_path):
    batches = tiny_batches(count=4)
    settings = {"keep": 0.5, "quantize": "q4_1", "progress": False}
    whole = model(num_hidden_layers=3, intermediate_size=128)
    expected = grail.compress(whole, batches, **settings)
    kill = killing(checkpoint.Checkpoint, "save", monkeypatch)
    kill(after)
    with pytest.raises(Killed):
        grail.compress(
            model(num_hidden_layers=3, intermediate_size=128),
            batches,
            resume_dir=tmp_path,
            **settings,
        )
    kill(None)
    resumed = model(num_hidden_layers=3, intermediate_size=128)
    report = grail.compress(resumed, batches, resume_dir=tmp_path, **settings)
    assert report.resumed["after"] == after
    assert report.quantized == expected.quantized
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    first, second = grids_of(whole), grids_of(resumed)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name].table, second[name].table) for name in first)


def test_a_failure_leaves_the_model_as_it_was(model, tiny_batches, monkeypatch):
    network = model()
    before = copy.deepcopy(network.state_dict())
    batches = tiny_batches()
    network.model.layers[1].mlp.down_proj.weight.data[0, 0] = 1e9
    before["model.layers.1.mlp.down_proj.weight"][0, 0] = 1e9
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.down_proj: a weight is beyond"):
        grail.quantize(network, batches, progress=False)
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])
    assert not grids_of(network)


def test_another_run_forgets_the_grids(model, tiny_batches):
    network, batches = model(), tiny_batches()
    grail.quantize(network, batches, "q8_0", progress=False)
    assert grids_of(network)
    grail.compress(network, batches, keep=0.5, progress=False)
    assert not grids_of(network)


def test_what_cannot_be_quantised_is_refused(model, tiny_model, tiny_batches):
    batches = tiny_batches()
    with pytest.raises(InputError, match="q_proj reads 48 channels, and GGUF's formats store"):
        grail.quantize(model(hidden_size=48, num_attention_heads=6, num_key_value_heads=3), batches)
    with pytest.raises(InputError, match=r"down_proj reads 48 channels.*--multiple 32"):
        grail.compress(model(), batches, keep=0.5, quantize="q4_1", multiple=8)
    with pytest.raises(ModelError, match=r"h\.0\.attn\.c_attn\.weight is of a Conv1D"):
        grail.quantize(tiny_model("gpt2"), batches)
    with pytest.raises(ModelError, match="is of a MixtralTopKRouter"):
        grail.quantize(tiny_model("mixtral"), batches)
    with pytest.raises(ModelError, match="BertModel has no output matrix"):
        grail.quantize(tiny_model("bert"), batches)
    with pytest.raises(InputError, match="quantize must be one of q4_1, q8_0; did you mean 'q8_0'"):
        grail.quantize(model(), batches, "q4_0")
    with pytest.raises(InputError, match="quantize needs the closed loop"):
        grail.compress(model(), batches, quantize="q4_1", closed_loop=False)
    with pytest.raises(InputError, match="unknown setting 'alpha'"):
        grail.quantize(model(), batches, alpha=0.1)
    named = [
        grail.Site(
            ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"],
            ["model.layers.0.mlp.down_proj"],
        )
    ]
    with pytest.raises(ModelError, match="quantize runs the blocks of a transformer one by one"):
        grail.compress(model(), batches, sites=named, quantize="q4_1")


def in_a_process(number: int) -> tuple[dict[str, torch.Tensor], list[Any]]:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=97, num_hidden_layers=2, initializer_range=0.1, **SIZES)
    config.intermediate_size = 128
    network = LlamaForCausalLM(config).eval()
    draw = torch.Generator().manual_seed(0)
    batches = [torch.randint(3, 60, (2, 16), generator=draw) for _ in range(4)]
    report = grail.compress(network, batches, keep=0.5, quantize="q4_1", progress=False)
    return network.state_dict(), [row.error for row in report.quantized[2:]]


def test_all_processes_end_with_the_same_bits():
    (one, errors), (other, _) = processes.run(2, in_a_process)
    assert all(torch.equal(other[name], value) for name, value in one.items())
    _, alone = in_a_process(0)
    assert errors == pytest.approx(alone, rel=0.2)
