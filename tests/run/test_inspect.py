import weakref

import pytest
import torch

import grail
from bench.tools.allocations import peak_bytes
from grail.calibrate.stream import Stream
from grail.networks import find
from grail.recipe import Recipe
from grail.run import _inspect as plan
from grail.run._compress import _sizes
from grail.runtime import memory
from grail.runtime.transaction import Transaction
from grail_kernels.tuning import BUFFER_TOKENS
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


def test_demand_follows_the_sizes_it_is_made_of(tiny_llama):
    architecture = find(tiny_llama())
    options = Recipe(keep=0.5, sites=("mlp", "heads"), alpha=1e-3, drift_correction=0)
    once, twice = (plan.demand(architecture, options, tokens, 16) for tokens in (1000, 2000))
    assert once["hidden states"] == 1000 * 48 * 4 * 2  # the MLP's attention output is kept as well
    assert twice["hidden states"] == 2 * once["hidden states"]
    assert {**twice, "hidden states": 0} == {**once, "hidden states": 0}
    # Heads: 3 of 6, as 3 groups of 1 → q 24, k and v 24 rows, o 24 columns; MLP: 40 of 80.
    assert once["weights"] == 2 * 4 * 48 * (4 * 24 + 3 * 40)
    assert once["statistics"] == 4 * 80 * 80


def test_drift_and_held_out_sequences_are_counted(tiny_llama):
    architecture = find(tiny_llama())
    base, full = (
        plan.demand(architecture, Recipe(keep=0.5, sites=("mlp", "heads"), **rest), 1000, 16)
        for rest in ({"alpha": 1e-3, "drift_correction": 0}, {})
    )
    # The dense stream, and what it holds between attention and MLP.
    assert full["hidden states"] == 2 * base["hidden states"]
    # Two Grams, each with a cross moment [48, 80].
    assert full["statistics"] == 2 * (base["statistics"] + 4 * 48 * 80)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"alpha": 1e-3, "drift_correction": 0},
        {"closed_loop": False},
        {"keep": {"mlp": 0.5, "heads": 1.0}},
        {"correct_attention": True},
        {"sites": ("mlp",), "correct_attention": True},
        {"selector": "cholesky", "alpha": 1e-3, "drift_correction": 0},
        {"selector": "folding", "sites": ("mlp",), "exact_folding": False},
    ],
    ids=[
        "default",
        "paper",
        "open",
        "full heads",
        "attention",
        "attention, mlp",
        "cholesky",
        "folding",
    ],
)
def test_the_predicted_peak_is_within_a_tenth_of_what_torch_allocates(
    settings, tiny_llama, tiny_batches
):
    # Big enough that hidden states, Grams and solves all show.
    model = tiny_llama(
        hidden_size=256,
        intermediate_size=2048,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_hidden_layers=3,
    )
    batches = tiny_batches(count=40, rows=4, length=128)
    settings = {"keep": 0.5, "sites": ("mlp", "heads"), **settings}
    options = Recipe(**settings)
    predicted = sum(plan.demand(find(model), options, 40 * 4 * 128, 4 * 128).values())
    used = peak_bytes(lambda: grail.compress(model, batches, progress=False, **settings))
    assert predicted == pytest.approx(used, rel=0.1)


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


@pytest.mark.parametrize(
    ("device", "spare", "held", "expected"),
    [
        ("cuda", 1, 0, "cuda"),
        ("cuda", -1, 0, "cpu"),
        ("cuda", -1, 2, "cuda"),
        ("cpu", 1, 0, "cpu"),
        ("mps", 1, 0, "cpu"),
    ],
    ids=["room", "no room", "part is there already", "no GPU", "whose memory nobody tells"],
)
def test_hidden_states_wait_on_the_gpu_where_the_run_fits_beside_them(
    device, spare, held, expected, tiny_llama, monkeypatch
):
    architecture, options = find(tiny_llama()), Recipe(keep=0.5)
    monkeypatch.setattr(type(architecture), "device", torch.device(device))
    needed = sum(plan.demand(architecture, options, 256, 16, device).values())
    monkeypatch.setattr(plan, "ROOM", 1.0)
    monkeypatch.setattr(memory, "free", lambda _: needed + spare)
    place = plan.waiting_place(architecture, options, 256, 16, held)
    assert place == torch.device(expected)


@pytest.mark.parametrize(("dtype", "laid"), [(torch.float32, 6), (torch.bfloat16, 0)])
def test_what_fp32_is_taken_apart_into_on_a_gpu_counts(dtype, laid, tiny_llama, monkeypatch):
    architecture = find(tiny_llama().to(dtype))
    batch = 10**6  # so many tokens that activations are the most of all
    here, there = (
        plan.demand(architecture, Recipe(keep=0.5), batch, batch, onload=onload)["working set"]
        for onload in (None, torch.device("cuda"))
    )
    assert there - here == laid * BUFFER_TOKENS * 80


def test_tokens_that_do_not_count_take_room(tiny_llama, tiny_batches):
    model = tiny_llama()
    batches = [
        {"input_ids": tokens, "attention_mask": (tokens > 40).long().index_fill(1, first, 1)}
        for tokens in tiny_batches(count=2) + tiny_batches(count=1, rows=3)
        for first in [torch.tensor([0])]
    ]
    stream = Stream(model, find(model).blocks, batches)
    assert stream.own_tokens < 7 * 16
    assert _sizes(stream) == (7 * 16, 3 * 16)


@pytest.mark.parametrize(("share", "more"), [(0.5, 2), (0, 2), (1, 0), ("auto", 0)])
def test_what_a_folded_block_is_to_hold_counts(share, more, tiny_llama):
    architecture = find(tiny_llama())
    exact, plain = (
        plan.demand(
            architecture,
            Recipe(keep=0.5, selector="folding", sites=("mlp", "heads"), **rest),
            1000,
            16,
        )["hidden states"]
        for rest in (
            {"drift_correction": share},
            {"drift_correction": share, "exact_folding": False},
        )
    )
    assert exact - plain == more * 1000 * 48 * 4
