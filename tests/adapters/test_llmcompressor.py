"""The adapter of llm-compressor, against the library itself."""

import itertools
import os

import pytest

pytest.importorskip("llmcompressor")
os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import torch
import torch.distributed as dist
import transformers
from compressed_tensors.offload import set_onload_device
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from llmcompressor.modifiers.gptq import GPTQModifier as Theirs
from llmcompressor.modifiers.gptq import base
from llmcompressor.modifiers.gptq.helpers import accumulate_hessian, make_empty_hessian
from llmcompressor.modifiers.pruning import SparseGPTModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from loguru import logger
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import grail
from bench.tools.tiny import VOCABULARY, tokenizer
from grail.adapters import _llmcompressor_prune
from grail.adapters.llmcompressor import GPTQModifier, GrailModifier
from grail.errors import EmptyCalibrationError, InputError, ModelError, NonFiniteError
from tests import processes

logger.remove()
W4 = {"scheme": "W4A16", "targets": "Linear", "ignore": ["lm_head"]}
IDS = torch.arange(3, 67).view(2, 32)
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "initializer_range": 0.1,
}


def saved(folder, config, **changes):
    """Writes a tiny model with its tokenizer; oneshot reads both from its folder."""
    if not (folder / "config.json").exists():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config(**(SIZES | changes)))
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def llama(folders):
    """`llama(dtype)`: the same tiny model each time."""
    folder = saved(folders / "llama", transformers.LlamaConfig)
    return lambda dtype=torch.float32: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.fixture
def mixtral(folders):
    moe = {"num_local_experts": 4, "num_experts_per_tok": 1, "num_hidden_layers": 1}
    folder = saved(folders / "mixtral", transformers.MixtralConfig, **moe)
    return lambda: AutoModelForCausalLM.from_pretrained(folder)


def uneven(count=12, length=32, seed=1):
    """Batches of two sequences, one, and of another length."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, length), generator=draw)
    sizes = [2] * (count // 2 - 1) + [1, 1]
    batches = [{"input_ids": part} for part in ids.split(sizes)]
    batches[-1] = {"input_ids": ids[-1:, : length // 2]}
    return [batch | {"attention_mask": torch.ones_like(batch["input_ids"])} for batch in batches]


def loader(batches):
    return DataLoader(batches, batch_size=None)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def quantised(monkeypatch, model, recipe, batches, **settings):
    """Runs oneshot; returns the arguments and results of llm-compressor's quantisation."""
    calls = []
    quantise = base.quantize_weight

    def watched(**arguments):
        hessians = arguments["hessians"].clone()
        weights, losses, fell_back = quantise(**arguments)
        calls.append((hessians, weights.clone(), losses.clone(), fell_back.clone()))
        return weights, losses, fell_back

    with monkeypatch.context() as patch:
        patch.setattr(base, "quantize_weight", watched)
        oneshot(model=model, dataset=loader(batches), recipe=recipe, **settings)
    return calls


def distance(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# GPTQModifier


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hessians_losses_and_outputs_are_theirs(monkeypatch, llama, dtype):
    theirs, ours = llama(dtype), llama(dtype)
    expected = quantised(monkeypatch, theirs, Theirs(**W4), uneven())
    found = quantised(monkeypatch, ours, GPTQModifier(**W4), uneven())
    assert len(found) == len(expected) == 14
    for own, other in zip(found, expected, strict=True):
        assert distance(own[0], other[0]) < 1e-6  # after rounding they differ, and do not matter
        assert own[2].item() == pytest.approx(other[2].item(), rel=0.01)
        assert distance(own[1], other[1]) < 1e-2
    assert distance(logits(ours), logits(theirs)) < 2e-2


def test_a_hessian_is_that_of_an_fp64_product(monkeypatch, llama):
    model, seen = llama(), []
    module = model.model.layers[0].mlp.gate_proj
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in uneven():
            model(**batch)
    hook.remove()
    tokens = torch.cat(seen).double()
    calls = quantised(monkeypatch, model, GPTQModifier(**W4), uneven())
    samples = sum(len(batch["input_ids"]) for batch in uneven())
    assert distance(calls[4][0][0], 2 * tokens.T @ tokens / samples) < 1e-6


def test_layers_of_one_input_share_a_gram_and_statistics_take_half(monkeypatch, tmp_path):
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 1}
    folder, held = saved(tmp_path, transformers.LlamaConfig, **sizes), {}
    for kind in (Theirs, GPTQModifier):
        original = kind.compress_module_list

        def watched(self, modules, kind=kind, original=original):
            tensors = {t.data_ptr(): t for t in self._hessians.values()}
            held.setdefault(kind, []).append(
                (len(tensors), sum(t.nbytes for t in tensors.values()))
            )
            return original(self, modules)

        with monkeypatch.context() as patch:
            patch.setattr(kind, "compress_module_list", watched)
            model = AutoModelForCausalLM.from_pretrained(folder)
            oneshot(model=model, dataset=loader(uneven(4)), recipe=kind(**W4))
    (ours, own_bytes), (theirs, bytes_of_theirs) = max(held[GPTQModifier]), max(held[Theirs])
    assert (ours, theirs) == (4, 7)
    assert own_bytes <= 0.55 * bytes_of_theirs


def test_experts_with_few_tokens_or_none_are_quantised_as_theirs(monkeypatch, mixtral):
    few = [{"input_ids": IDS[:1, :3], "attention_mask": torch.ones(1, 3, dtype=torch.int64)}]
    found = []
    for kind in (Theirs, GPTQModifier):
        model = mixtral()
        settings = {"moe_calibrate_all_experts": False}
        calls = quantised(monkeypatch, model, kind(**W4), few, **settings)
        names = [name for name, m in model.named_modules() if hasattr(m, "weight_scale")]
        found.append((names, calls, model))
    (names, theirs, one), (own_names, ours, two) = found
    assert own_names == names
    assert len(ours) == len(theirs)
    empty = [not call[0].any() for call in theirs]
    assert any(empty) or len(theirs) < len(names)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own[0], other[0], rtol=1e-5, atol=1e-6)
        assert torch.equal(own[3], other[3])
    assert distance(logits(two), logits(one)) < 2e-2


def test_all_experts_that_read_all_tokens_share_one_gram(monkeypatch, mixtral):
    held = []
    original = GPTQModifier.compress_module_list

    def watched(self, modules):
        held.append(len({t.data_ptr() for t in self._hessians.values()}))
        return original(self, modules)

    with monkeypatch.context() as patch:
        patch.setattr(GPTQModifier, "compress_module_list", watched)
        oneshot(model=mixtral(), dataset=loader(uneven(4)), recipe=GPTQModifier(**W4))
    # Queries, keys and values; the output; gate and up of four experts (their router is none of
    # the targets, or reads the same); each expert's down.
    assert max(held) in (1 + 1 + 1 + 4, 1 + 1 + 2 + 4)


def test_nan_falls_back_to_rounding_as_theirs(monkeypatch, llama):
    fell_back = []
    for kind in (Theirs, GPTQModifier):
        model = llama()
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
        calls = quantised(monkeypatch, model, kind(**W4), uneven())
        fell_back.append([bool(call[3].any()) for call in calls])
    assert fell_back[0] == fell_back[1]
    assert 0 < sum(fell_back[0]) < 14


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, stride=2), nn.Conv1d(4, 6, 3)], ids=str)
def test_the_gram_of_a_convolution_is_right_where_theirs_fails(layer):
    x = torch.randn(3, 4, *[9] * (layer.weight.dim() - 2))
    modifier = GPTQModifier(**W4)
    reset_session()
    modifier.on_initialize(type("State", (), {"model": nn.Sequential(layer)}))
    modifier.calibrate_module(layer, (x,), layer(x))
    as_image = x if x.dim() == 4 else x[:, :, None]
    kernel, stride = ([1, 3], [1, 1]) if x.dim() == 3 else (layer.kernel_size, layer.stride)
    columns = nn.functional.unfold(as_image, kernel, stride=stride).movedim(1, -1).flatten(0, 1)
    expected = columns.double().T @ columns.double()
    assert distance(modifier._shared[layer].matrix(), expected) < 1e-6
    assert modifier._num_samples[layer] == 3
    with pytest.raises(RuntimeError):
        accumulate_hessian(x, layer, make_empty_hessian(layer), torch.zeros(()))


def test_two_modifiers_for_one_layer_are_refused_and_for_different_ones_are_not(llama):
    mlp = {"targets": ["re:.*mlp.*"], "ignore": []}
    heads = {"targets": ["re:.*self_attn.._proj"], "ignore": []}
    with pytest.raises(InputError, match="two GPTQModifiers of the recipe quantise"):
        oneshot(
            model=llama(),
            dataset=loader(uneven(4)),
            recipe=[GPTQModifier(**W4), GPTQModifier(**W4 | mlp)],
        )
    model = llama()
    recipe = [GPTQModifier(**W4 | mlp), GPTQModifier(**W4 | heads)]
    oneshot(model=model, dataset=loader(uneven(4)), recipe=recipe)
    assert hasattr(model.model.layers[0].self_attn.q_proj, "weight_scale")


def one_layer(folder):
    """A model of one block: with several, llm-compressor's processes race on shared weights."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    return model


def quantised_in_a_process(number, folder, kinds):
    """Quantises a model in one of two processes, each with its own half of the batches."""
    logger.remove()
    found = []
    for kind in kinds:
        model = one_layer(folder)
        with pytest.MonkeyPatch.context() as patch:
            calls = quantised(patch, model, kind(**W4), uneven(12)[number::2])
        dist.barrier()
        traces = [float(call[0].diagonal(0, 1, 2).sum()) for call in calls]
        found.append((traces, [call[2].item() for call in calls], logits(model)))
    return found


def test_two_processes_reduce_as_theirs(folders, llama):
    results = processes.run(2, quantised_in_a_process, folders / "llama", (Theirs, GPTQModifier))
    assert all(isinstance(result, list) for result in results), results
    expected, found = (list(zip(*each, strict=True)) for each in zip(*results, strict=True))
    for number in (0, 1):  # traces and losses, whichever process had a layer
        own, others = (sorted(itertools.chain(*each[number])) for each in (found, expected))
        assert len(own) == 7
        assert own == pytest.approx(others, rel=1e-4)
    assert torch.equal(*found[2])  # both processes have the same weights
    assert distance(found[2][0], expected[2][0]) < 2e-2


# GrailModifier


def _name(value):
    return type(value).__name__


@pytest.mark.parametrize("pipeline", ["independent", "sequential"])
def test_one_run_prunes_restores_and_quantises(monkeypatch, llama, tmp_path, pipeline):
    model, dense = llama(), logits(llama())
    prune = GrailModifier(keep=0.75, multiple=128)
    recipe = [prune, GPTQModifier(**W4)]
    calls = quantised(monkeypatch, model, recipe, uneven(), pipeline=pipeline)
    assert model.config.intermediate_size == 384
    assert [tuple(call[0].shape[1:]) for call in calls].count((384, 384)) == 2  # of down_proj
    assert [row.kept for row in prune.rows] == [384, 384]
    assert model.model.layers[0].mlp.down_proj.weight_scale.shape == (128, 3)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.intermediate_size == 384
    assert again.model.layers[0].mlp.gate_proj.out_features == 384
    assert torch.equal(logits(again), expected)
    assert distance(expected, dense) < 1


@pytest.mark.parametrize("other", [Theirs(**W4), SparseGPTModifier(sparsity=0.5)], ids=_name)
def test_their_own_modifiers_work_on_the_narrow_network(llama, tmp_path, other):
    model = llama()
    recipe = [GrailModifier(keep=0.75, multiple=128), other]
    oneshot(model=model, dataset=loader(uneven()), recipe=recipe)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.intermediate_size == 384
    assert torch.equal(logits(again), expected)


def test_the_saved_recipe_prunes_and_quantises_alike(llama, tmp_path):
    model = llama()
    recipe = [GrailModifier(keep=0.75, multiple=128, selector="wanda"), GPTQModifier(**W4)]
    oneshot(model=model, dataset=loader(uneven()), recipe=recipe)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = llama()
    oneshot(model=again, dataset=loader(uneven()), recipe=str(tmp_path / "recipe.yaml"))
    assert again.config.intermediate_size == 384
    assert distance(logits(again), expected) < 2e-2


def test_recipes_in_yaml_know_both_modifiers(monkeypatch, llama):
    recipe = """
        prune_stage:
          grail_modifiers:
            GrailModifier: {recipe: paper, keep: {mlp: 0.5}, multiple: 128, sites: [mlp]}
            GrailGPTQModifier: {scheme: W4A16, targets: [Linear], ignore: [lm_head]}
    """
    model, used = llama(), []
    original = GPTQModifier.compress_modules
    with monkeypatch.context() as patch:
        patch.setattr(
            GPTQModifier, "compress_modules", lambda self: used.append(self) or original(self)
        )
        texts = datasets.Dataset.from_dict({"input_ids": IDS.tolist() * 4})  # in a drawn order
        oneshot(model=model, dataset=texts, recipe=recipe)
    assert model.config.intermediate_size == 256
    assert used


@pytest.mark.parametrize(
    ("settings", "shapes"),
    [
        ({"keep": 0.75, "sites": ["mlp"]}, [384] * 2),
        ({"keep": 0.5, "sites": ["heads", "mlp"]}, [64, 256] * 2),
        ({"keep": 0.5, "fit_bias": True, "selector": "wanda"}, [256] * 2),
        ({"keep": 0.5, "selector": "folding", "alpha": 0.01}, [256] * 2),
        ({"keep": 0.5, "closed_loop": False}, [256] * 2),
        ({"keep": 0.5, "compensate": False, "selector": "flap"}, [256] * 2),
    ],
    ids=str,
)
def test_sites_end_as_by_compress_without_drift(llama, settings, shapes):
    model, other = llama(), llama()
    prune = GrailModifier(**settings, multiple=128)
    oneshot(model=model, dataset=loader(uneven()), recipe=[prune])
    folding = {"exact_folding": False} if settings.get("selector") == "folding" else {}
    report = grail.compress(
        other, uneven(), **settings, **folding, multiple=128, drift_correction=0, progress=False
    )
    assert [row.kept for row in prune.rows] == shapes
    first = [row for row in prune.rows if row.block == 0]
    for own, row in zip(first, report.sites, strict=False):
        assert (own.name, own.kept, own.tokens) == (row.name, row.kept, row.tokens)
        assert row.error is None or own.error == pytest.approx(row.error, rel=1e-4)
    # The second block's selection may turn on the last bits of the first one's outputs.
    for own, row in zip(prune.rows, report.sites, strict=True):
        assert row.error is None or own.error == pytest.approx(row.error, rel=0.05)


def test_restored_is_nearer_to_the_dense_network_than_pruned(llama):
    errors = {}
    for compensate in (True, False):
        model = llama()
        prune = GrailModifier(keep=0.5, selector="wanda", compensate=compensate, multiple=128)
        oneshot(model=model, dataset=loader(uneven(24)), recipe=[prune])
        with torch.no_grad():
            model.lm_head.weight.copy_(llama().lm_head.weight)
        errors[compensate] = distance(logits(model), logits(llama()))
    assert errors[True] < errors[False]


def test_masked_tokens_do_not_count_and_bf16_stays_bf16(llama):
    batches = uneven()
    batches[0]["attention_mask"][:, 20:] = 0
    model = llama(torch.bfloat16)
    prune = GrailModifier(keep=0.5, multiple=128)
    oneshot(model=model, dataset=loader(batches), recipe=[prune])
    expected = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert {row.tokens for row in prune.rows} == {expected}
    assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16


def test_a_model_that_is_offloaded_is_pruned_and_one_that_is_not_stays_so(llama):
    plain, offloaded = llama(), llama()
    set_onload_device(offloaded, "cpu")
    for model in (plain, offloaded):
        oneshot(
            model=model, dataset=loader(uneven()), recipe=[GrailModifier(keep=0.5, fit_bias=True)]
        )
    assert torch.equal(logits(plain), logits(offloaded))


def test_a_failure_leaves_the_model_as_it_was(monkeypatch, llama):
    """In the second block, after the first one is narrow, with biases that were added."""
    for offload in (False, True):
        model = llama()
        if offload:
            set_onload_device(model, "cpu")
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        config = model.config.to_dict()
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
        before["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
        with pytest.raises(NonFiniteError):
            oneshot(
                model=model,
                dataset=loader(uneven()),
                recipe=[GrailModifier(keep=0.5, fit_bias=True), GPTQModifier(**W4)],
            )
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(
            torch.equal(after[name].nan_to_num(), before[name].nan_to_num()) for name in before
        )
        assert model.config.to_dict() == config
        assert ("forward" in vars(model.model.layers[0].mlp.up_proj)) == offload
        assert not model.model.layers[0].mlp.down_proj._forward_pre_hooks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 1.5}, "keep"),
        ({"kept": 0.5}, "unknown setting 'kept'.*keep"),
        ({"keep": 0.5, "storage": "cpu"}, "unknown setting 'storage'"),
        ({"selector": "greedi"}, "greedy"),
        ({"recipe": "papre"}, "paper"),
        ({"drift_correction": 0.5}, "drift_correction needs the dense network"),
        ({"correct_attention": True}, "correct_attention needs the dense"),
        ({"repair": True}, "repair needs the dense network"),
        ({"selector": "wanda-plus"}, "wanda\\+\\+|wanda-plus|selector"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_at_once(settings, message):
    with pytest.raises(InputError, match=message):
        GrailModifier(**settings)


def refused(model, recipe, error, message, dataset=True):
    data = {"dataset": loader(uneven(4))} if dataset else {}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        oneshot(model=model, recipe=recipe, **data)
    after = model.state_dict()  # where experts may be stored otherwise
    assert all(torch.equal(after[name], before[name]) for name in before.keys() & after.keys())


def test_a_width_that_the_quantiser_refuses_is_said_before_the_run(monkeypatch, llama, folders):
    def ran(*_):
        raise AssertionError("calibrated")

    monkeypatch.setattr(_llmcompressor_prune, "_run_pipeline", ran)
    recipe = [GrailModifier(keep=0.7), GPTQModifier(**W4)]
    refused(llama(), recipe, InputError, r"down_proj would read 360 channels.*multiple=128")
    recipe = [GrailModifier(keep=0.7), QuantizationModifier(**W4)]
    refused(llama(), recipe, InputError, r"groups of 128 of QuantizationModifier")
    odd = saved(folders / "odd", transformers.LlamaConfig, hidden_size=192)
    recipe = [GrailModifier(keep=0.75, multiple=128), GPTQModifier(**W4)]
    message = r"q_proj would read 192 channels.*ignore, or choose other groups"
    refused(AutoModelForCausalLM.from_pretrained(odd), recipe, InputError, message)


def test_a_width_that_no_group_reads_is_allowed(llama):
    model = llama()
    recipe = [GrailModifier(keep=0.7), QuantizationModifier(**W4 | {"scheme": "W8A8"})]
    oneshot(model=model, dataset=loader(uneven(4)), recipe=recipe)
    assert model.config.intermediate_size == 360


def test_its_place_in_the_recipe_is_the_first_and_only_one(llama):
    prune, again = GrailModifier(keep=0.5), GrailModifier(keep=0.5)
    refused(llama(), [GPTQModifier(**W4), prune], InputError, "GPTQModifier is before Grail")
    refused(llama(), [prune, again], InputError, "several GrailModifiers")
    model = llama()
    oneshot(model=model, dataset=loader(uneven(4)), recipe=[QuantizationModifier(**W4)])
    with pytest.raises(InputError, match="quantised already"):
        oneshot(model=model, dataset=loader(uneven(4)), recipe=[GrailModifier(keep=0.5)])


def test_models_that_cannot_be_pruned_here_are_refused_by_name(llama, mixtral, folders):
    refused(mixtral(), [GrailModifier(keep=0.5)], ModelError, "holds experts in llm-compressor's")
    sites = [
        grail.Site(
            producers=["model.layers.0.mlp.up_proj"], consumers=["model.layers.0.mlp.down_proj"]
        )
    ]
    refused(llama(), [GrailModifier(keep=0.5, sites=sites)], ModelError, "are named")
    refused(llama(), [GrailModifier(keep={"mlp": [0.5, 0.7]})], InputError, "could not be loaded")
    refused(llama(), [GrailModifier(keep=0.5)], EmptyCalibrationError, "a dataset", dataset=False)
    unknown = transformers.MambaConfig
    folder = saved(folders / "mamba", unknown, state_size=8)
    model = AutoModelForCausalLM.from_pretrained(folder)
    refused(model, [GrailModifier(keep=0.5)], ModelError, "no sites are known")


def test_a_layer_that_is_wrapped_is_refused_by_name(llama):
    model = llama()
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.down_proj)
    with pytest.raises(ModelError, match=r"layers.0.mlp.down_proj computes its weight"):
        oneshot(model=model, dataset=loader(uneven(4)), recipe=[GrailModifier(keep=0.5)])


def pruned_in_a_process(number, folder, settings):
    """Prunes a model in one of two processes, each with its own half of the batches."""
    logger.remove()
    model, prune = one_layer(folder), GrailModifier(**settings)
    oneshot(model=model, dataset=loader(uneven(12)[number::2]), recipe=[prune, GPTQModifier(**W4)])
    dist.barrier()
    return [(row.kept, row.tokens, row.error) for row in prune.rows], logits(model)


def test_two_processes_prune_alike_by_the_tokens_of_both(folders, llama):
    settings = {"keep": 0.75, "multiple": 128, "alpha": 0.01, "selector": "wanda"}
    results = processes.run(2, pruned_in_a_process, folders / "llama", settings)
    assert all(isinstance(result, tuple) for result in results), results
    alone = GrailModifier(**settings)
    oneshot(model=one_layer(folders / "llama"), dataset=loader(uneven(12)), recipe=[alone])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][0] == results[1][0]
    kept, tokens, error = results[0][0][0]
    row = alone.rows[0]
    assert (kept, tokens) == (row.kept, row.tokens)
    assert error == pytest.approx(row.error, rel=1e-4)
