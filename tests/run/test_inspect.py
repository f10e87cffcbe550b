import weakref

import pytest
import torch

import grail
from grail.recipe import Recipe
from grail.runtime import memory
from grail.runtime.transaction import Transaction
from tests.run.test_compress import assert_untouched, fingerprint

PHASES = {"forward", "gram", "select", "solve", "absorb"}


def inspected(model, **settings) -> grail.Inspection:
    return grail.inspect(model, tokens=256, sequence_length=16, **settings)


@pytest.mark.parametrize("kinds", [("mlp",), ("heads",), ("mlp", "heads")], ids="+".join)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_predicted_savings_are_what_a_run_leaves(family, kinds, tiny_model, tiny_batches):
    biased = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    model = tiny_model(family, tie_word_embeddings=True, **biased)
    saving = inspected(model, recipe=Recipe(sites=kinds), keeps=[0.5]).savings[0]
    report = grail.compress(model, tiny_batches(), keep=0.5, sites=kinds, progress=False)
    assert saving.parameters == report.model["parameters"]["after"]
    assert saving.bytes == sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("compensate", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("fit_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_biases_that_a_run_adds_are_part_of_the_prediction(
    family, compensate, fit_bias, tiny_model, tiny_batches
):
    model = tiny_model(family)
    recipe = Recipe(0.5, ("mlp",), compensate=compensate, fit_bias=fit_bias)
    before = fingerprint(model)
    found = inspected(model, recipe=recipe, keeps=[0.5])
    assert_untouched(model, before)
    report = grail.compress(model, tiny_batches(), recipe=recipe, progress=False)
    assert found.savings[0].parameters == report.model["parameters"]["after"]


@pytest.mark.parametrize("layers", [2, 12])
def test_an_uneven_model_is_inspected_by_kind(layers, tiny_llama, tiny_batches):
    model = tiny_llama(num_hidden_layers=layers)
    keep = {"mlp": [0.25, 0.75] * (layers // 2)}
    grail.compress(model, tiny_batches(), keep, multiple=1, compensate=False, progress=False)
    found = inspected(model, recipe=Recipe(0.5, ("mlp", "heads"), multiple=2), keeps=[0.5, 1.0])
    assert [(s.kind, s.count) for s in found.sites] == [("heads", layers), ("mlp", layers)]
    assert found.sites[1].structure == "20–60 channels, 40 on average"
    half, whole = (saving.widths for saving in found.savings)
    assert half["mlp"] == "10–30 of 20–60 channels, 50% of all"
    assert whole["mlp"] == "20–60 of 20–60 channels, 100% of all"
    assert half["heads"].startswith("3 of 6 heads")


def test_savings_of_shares_by_name_are_what_a_run_leaves(tiny_llama, tiny_batches):
    model, keep = tiny_llama(), {"mlp": [0.5, 0.8], "heads": 0.7}
    found = grail.inspect(model, keeps=[keep], keep=keep, sites="mlp,heads", tokens=32)
    report = grail.compress(model, tiny_batches(), keep, "mlp,heads", progress=False)
    assert found.savings[0].parameters == report.model["parameters"]["after"]
    assert found.savings[0].keep == found.keep == keep


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_the_cost_of_named_sites_is_predicted_where_token_ids_are_all_that_is_read(
    kind, tiny_llama
):
    transformers = pytest.importorskip("transformers")
    if kind == "LlamaForCausalLM":
        model, writes, reads = tiny_llama(), ["gate_proj", "up_proj"], "down_proj"
        mlp = "model.layers.0.mlp"
    else:
        config = transformers.T5Config(
            vocab_size=97, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
        )
        model, writes, reads = transformers.T5ForConditionalGeneration(config), ["wi"], "wo"
        mlp = "encoder.block.0.layer.1.DenseReluDense"
    site = grail.Site([f"{mlp}.{name}" for name in writes], [f"{mlp}.{reads}"])
    found = grail.inspect(model, sites=[site], tokens=64, sequence_length=16)
    assert bool(found.memory) == bool(found.seconds) == (kind == "LlamaForCausalLM")


def test_inspecting_changes_nothing(tiny_llama):
    model = tiny_llama().train()
    before, state = fingerprint(model), torch.random.get_rng_state()
    inspected(model)
    assert_untouched(model, before)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_inspection_runs_no_longer_sequences_than_there_are_positions_for(tiny_model):
    model = tiny_model("gpt2", n_positions=16)
    found = grail.inspect(model, tokens=256)  # by default sequences are longer
    assert found.seconds.keys() == PHASES | {"total"}


def test_an_inspection_names_sites_and_predicts_every_phase(tiny_llama):
    found = inspected(tiny_llama())
    assert [(s.kind, s.count) for s in found.sites] == [("heads", 2), ("mlp", 2)]
    assert found.sites[0].structure == "6 heads of 8 in 3 key/value groups of 2"
    assert found.sites[1].structure == "80 channels"
    assert found.seconds.keys() == PHASES | {"total"}
    assert all(seconds > 0 for seconds in found.seconds.values())
    parts = {name: size for name, size in found.memory.items() if name != "peak"}
    assert found.memory["peak"] == sum(parts.values())


def test_keeping_everything_costs_nothing(tiny_llama):
    assert inspected(tiny_llama(), recipe=Recipe(keep=1.0)).seconds["total"] < 0.1


def test_peak_sees_memory_that_is_gone_by_the_end():
    size = 512 << 20  # more than the allocator may have kept of earlier tests
    with memory.Peak(torch.device("cpu")) as peak:
        before = memory.in_use(torch.device("cpu"))
        torch.ones(size, dtype=torch.uint8)
    assert peak.bytes - before == pytest.approx(size, rel=0.2)


def test_a_transaction_puts_back_the_very_objects():
    linear = torch.nn.Linear(4, 3)
    weight, bias = linear.weight, linear.bias

    def fails() -> None:
        with Transaction() as transaction:
            for rows in (2, 1):
                transaction.set_parameter(linear, "weight", torch.ones(rows, 4))
                transaction.set_parameter(linear, "bias", torch.ones(rows))
                transaction.set_attribute(linear, "out_features", rows)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert linear.weight is weight
    assert linear.bias is bias
    assert (linear.in_features, linear.out_features) == (4, 3)


def test_what_is_set_twice_leaves_its_second_value_behind():
    linear = torch.nn.Linear(4, 3)
    with Transaction() as transaction:
        transaction.set_parameter(linear, "weight", torch.ones(3, 4))
        between = weakref.ref(linear.weight)
        transaction.set_parameter(linear, "weight", torch.ones(2, 4))
        assert between() is None


def test_a_transaction_that_succeeds_keeps_its_changes():
    linear = torch.nn.Linear(4, 3, dtype=torch.bfloat16)
    linear.weight.requires_grad_(False)
    with Transaction() as transaction:
        transaction.set_parameter(linear, "weight", torch.ones(2, 4))
    assert linear.weight.shape == (2, 4)
    assert linear.weight.dtype == torch.bfloat16
    assert not linear.weight.requires_grad
