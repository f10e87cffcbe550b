"""The predicted peak of a run against torch's allocator, and what the prediction is made of."""

import gc
from dataclasses import replace
from functools import partial

import pytest
import torch

import grail
import grail_kernels as gk
from bench.tools.allocations import peak_bytes
from grail import select
from grail.algebra.width import ChannelWidth, HeadWidth
from grail.calibrate.stream import Stream
from grail.errors import InputError
from grail.networks import find
from grail.recipe import Recipe
from grail.run import peak_memory
from grail.run.block import BlockCompressor
from grail.runtime import memory
from grail.runtime.clock import Clock
from grail.runtime.transaction import Transaction, eval_no_grad
from tests import convnets
from tests.run.test_compress import assert_untouched, fingerprint

CPU = torch.device("cpu")
# Big enough that hidden states, Grams and solves all show.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
}
OWN_SIZES = {
    "gpt2": {"n_inner": 384},
    "qwen2_moe": {"moe_intermediate_size": 192, "shared_expert_intermediate_size": 256},
}
CONVNETS = {"resnet": convnets.Basic, "efficientnet": convnets.MBConv}
PAPER = {"selector": "wanda", "alpha": 1e-3, "toward": "zero", "drift_correction": 0}
PRUNE = {"selector": "wanda", "compensate": False}
TWO_KINDS = {"sites": ("mlp", "heads")}


def network(family, tiny_model):
    if family in CONVNETS:
        torch.manual_seed(0)
        return convnets.randomised(convnets.Net(CONVNETS[family], width=32))
    model = tiny_model(family.removesuffix("-bf16"), **{**SIZES, **OWN_SIZES.get(family, {})})
    return model.bfloat16() if family.endswith("bf16") else model


def calibration(family, tiny_batches, count=6):
    if family in CONVNETS:
        return convnets.images(count, rows=8, size=32)
    if family == "vit":
        generator = torch.Generator().manual_seed(0)
        return [
            {"pixel_values": torch.randn(16, 3, 16, 16, generator=generator)} for _ in range(count)
        ]
    batches = tiny_batches(count=count, rows=4, length=64)
    if family != "bert":
        return batches
    masks = [torch.ones_like(batch).index_fill(1, torch.arange(50, 64), 0) for batch in batches]
    return [{"input_ids": b, "attention_mask": m} for b, m in zip(batches, masks, strict=True)]


def predicted(model, batches, onload=None, **settings):
    recipe = Recipe(**{"keep": 0.5, **settings})
    architecture = find(model, recipe.sites)
    device = CPU if onload is None else torch.device(onload)
    with eval_no_grad(model), Transaction() as transaction:
        if recipe.fit_bias:
            architecture.ensure_biases(recipe.all_sites(architecture), transaction)
        stream = Stream(model, architecture.blocks, batches, device=device)
        onloads = onload is not None
        found = peak_memory.predict(architecture, recipe, stream, Clock(CPU), onloads=onloads)
        transaction.undo()
    return found


def assert_within_a_tenth(model, batches, **settings):
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict().items()}
    found = predicted(model, batches, **settings)
    assert model.state_dict().keys() == before.keys()
    for name, tensor in model.state_dict().items():
        own, copy = before[name]
        assert tensor.data_ptr() == own.data_ptr()
        assert torch.equal(tensor, copy)
    del before, own, copy, tensor
    gc.collect()  # else what is freed meanwhile would count
    settings = {"keep": 0.5, "progress": False, **settings}
    used = peak_bytes(lambda: grail.compress(model, batches, **settings))
    # What brings blocks is another thread, of which the profiler reports nothing.
    assert found.total(hidden_states=True) - found.blocks == pytest.approx(used, rel=0.1)


@pytest.mark.parametrize("settings", [{}, PAPER, PRUNE], ids=["default", "paper", "prune"])
@pytest.mark.parametrize(
    "family",
    ["llama", "llama-bf16", "gpt2", "mixtral", "qwen2_moe", "bert", "vit", *CONVNETS],
)
def test_the_predicted_peak_is_within_a_tenth_of_what_torch_allocates(
    family, settings, tiny_model, tiny_batches
):
    batches = calibration(family, tiny_batches)
    assert_within_a_tenth(network(family, tiny_model), batches, **settings)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"closed_loop": False}),
        ("llama", {**TWO_KINDS, "closed_loop": False}),
        ("llama", TWO_KINDS),
        ("llama", {"sites": ("heads",)}),
        ("llama", {**TWO_KINDS, "keep": {"mlp": 0.5, "heads": 1.0}}),
        ("llama", {"keep": {"mlp": [0.3, 0.8, 0.5]}}),
        ("llama", {**TWO_KINDS, "correct_attention": True}),
        ("llama", {"correct_attention": True}),
        ("llama", {"refit_producers": 2}),
        ("llama", {**TWO_KINDS, "refit_producers": 1, "drift_correction": 0}),
        ("llama", {"dense_share": 0.5}),
        ("llama", {"dense_share": 0.1, "sites": ("mlp", "heads")}),
        ("llama", {"selector": "slimgpt"}),
        ("llama", {"selector": "cholesky"}),
        ("llama", {"selector": "wanda++"}),
        ("llama", {"selector": "flap", "compensate": False, "fit_bias": True}),
        ("llama", {"fit_bias": True}),
        ("llama", {"quantize": "q4_1"}),
        ("llama", {"quantize": "q8_0", "keep": 1.0}),
        ("llama", {**TWO_KINDS, "onload": "cpu"}),
        ("llama", {"selector": "folding"}),
        ("llama", {"selector": "folding", "drift_correction": 0}),
        ("llama", {"selector": "folding", "exact_folding": False}),
        ("llama", {"selector": "folding-kmeans", "exact_folding": False}),
        ("qwen2_moe", {"closed_loop": False}),
        ("qwen2_moe", {"sites": ("heads", "shared_experts", "experts")}),
        ("bert", {"refit_producers": 2}),
        ("bert", {**TWO_KINDS, "correct_attention": True}),
        ("resnet", {"closed_loop": False}),
        ("resnet", {"per_tap": False}),
        ("resnet", {"selector": "folding"}),
        ("resnet", {"repair": True}),
        ("resnet", {"refit_producers": 2}),
    ],
    ids=str,
)
def test_the_peak_is_predicted_for_every_recipe(family, settings, tiny_model, tiny_batches):
    batches = calibration(family, tiny_batches)
    assert_within_a_tenth(network(family, tiny_model), batches, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sites": ("mlp", "heads"), "correct_attention": True},
        {"selector": "folding"},
        {"fit_bias": True},
        {"keep": {"mlp": [0.3, 0.8, 0.5]}},
        {"onload": "cpu"},
    ],
    ids=str,
)
def test_the_peak_that_an_inspection_shows_is_the_one_in_the_report(
    settings, tiny_model, tiny_batches, monkeypatch
):
    monkeypatch.setattr(memory, "in_use", lambda _: 0)  # it is another a moment later
    model, batches = tiny_model("llama", **SIZES), tiny_batches(count=6, rows=4, length=32)
    settings = {"keep": 0.5, **settings}
    onload = settings.pop("onload", None)
    shown = grail.inspect(
        model,
        recipe=Recipe(**{"sites": ("mlp",), **settings}),
        tokens=6 * 4 * 32,
        sequence_length=32,
        batch_size=4,
        onload=onload,
    )
    report = grail.compress(model, batches, progress=False, onload=onload, **settings)
    assert shown.memory["peak"] == report.memory["predicted_peak"] > 0


def test_hidden_states_grow_with_the_tokens_and_nothing_else_does(tiny_model, tiny_batches):
    model = tiny_model("llama", **SIZES)
    few, many = (
        predicted(model, calibration("llama", tiny_batches, count)).parts(hidden_states=True)
        for count in (20, 40)
    )
    # The stream, the dense one, the block's output without its MLP, and what that reads last.
    assert few["hidden states"] == (20 * 4 * 64) * (3 * 128 + 384) * 4
    assert many == {**few, "hidden states": 2 * few["hidden states"]}


def test_narrowed_layers_of_other_blocks_are_counted(tiny_model, tiny_batches):
    batches = calibration("llama", tiny_batches)
    for layers in (2, 4):
        model = tiny_model("llama", **{**SIZES, "num_hidden_layers": layers})
        parts = predicted(model, batches).parts(hidden_states=True)
        # All but the last block's, which are in use only once it is done.
        assert parts["weights"] == (layers - 1) * 3 * 192 * 128 * 4


def test_of_brought_blocks_the_peak_does_not_grow_with_their_number(tiny_model, tiny_batches):
    batches = calibration("llama", tiny_batches)
    models = [tiny_model("llama", **{**SIZES, "num_hidden_layers": n}) for n in (3, 6)]
    few, many = (predicted(model, batches, "cpu").parts(hidden_states=False) for model in models)
    assert few == many
    assert few["blocks"] == 2 * sum(p.nbytes for p in models[0].model.layers[0].parameters())
    assert few["hidden states"] == few["weights"] == 0


def test_blocks_of_one_shape_are_rehearsed_once(tiny_model, tiny_batches, monkeypatch):
    rehearsed = []
    compress = BlockCompressor.compress
    monkeypatch.setattr(
        BlockCompressor,
        "compress",
        lambda compressor, n, advance: rehearsed.append(n) or compress(compressor, n, advance),
    )
    batches = calibration("llama", tiny_batches)
    predicted(tiny_model("llama", **{**SIZES, "num_hidden_layers": 5}), batches)
    assert len(rehearsed) == 1
    rehearsed.clear()
    predicted(network("resnet", tiny_model), calibration("resnet", tiny_batches))
    assert len(rehearsed) == 3  # two stages, of which the second begins with a shortcut


def test_a_rehearsal_that_is_refused_predicts_nothing(tiny_model, tiny_batches, monkeypatch):
    def refuse(*_):
        raise InputError("no")

    monkeypatch.setattr(BlockCompressor, "compress", refuse)
    model = tiny_model("llama")
    before = fingerprint(model)
    assert predicted(model, tiny_batches()) is None
    assert_untouched(model, before)


def test_a_selector_of_ones_own_states_what_its_search_takes(tiny_model, tiny_batches):
    def choose(view):
        raise AssertionError("a rehearsal does not search")

    model, batches = tiny_model("llama"), tiny_batches()
    base = predicted(model, batches, selector=choose)
    choose.peak_bytes = lambda view: 10**9 * view.width.kept
    more = predicted(model, batches, selector=choose).parts(hidden_states=True)
    assert more["working set"] > base.parts(hidden_states=True)["working set"]
    assert more["working set"] >= 10**9 * 40


@pytest.mark.parametrize(
    ("device", "inputs", "spare", "held", "expected"),
    [
        ("cuda", True, 1, 0, ("cuda", True)),
        ("cuda", True, -1, 0, ("cuda", False)),
        ("cuda", False, 1, 0, ("cuda", False)),
        ("cuda", False, -1, 0, ("cpu", False)),
        ("cuda", False, -1, 2, ("cuda", False)),
        ("cpu", True, 1, 0, ("cpu", True)),
        ("mps", True, 1, 0, ("cpu", False)),
    ],
    ids=[
        "room for all",
        "no room for inputs",
        "room for the others",
        "no room",
        "part is there already",
        "no GPU",
        "whose memory nobody tells",
    ],
)
def test_hidden_states_wait_on_the_gpu_where_the_run_fits_beside_them(
    device, inputs, spare, held, expected, tiny_llama, tiny_batches, monkeypatch
):
    found = predicted(tiny_llama(), tiny_batches())
    needed = found.total(True, inputs)
    assert found.total(True, True) - found.total(True, False) == 80 * 3 * 2 * 16 * 4
    monkeypatch.setattr(peak_memory, "GPU_SHARE", 1.0)
    monkeypatch.setattr(memory, "free", lambda _: needed + spare)
    place = peak_memory.waiting_place(found, torch.device(device), held)
    assert place == (torch.device(expected[0]), expected[1])


def test_without_a_prediction_hidden_states_wait_on_the_host():
    assert peak_memory.waiting_place(None, torch.device("cuda"), 0) == (CPU, False)


def test_a_meter_counts_what_is_allocated_and_freed():
    old = torch.ones(1000)
    with memory.Meter(CPU) as meter:
        first = torch.ones(2000)
        first.add_(1)
        view = first[:10], old[:10], old.view(10, 100)
        assert meter.use == 8000
        torch.ones(500).sum()
        assert (meter.use, meter.peak) == (8000, 10000 + 4)
        del first
        assert meter.use == 8000  # a view holds it
        del view
        assert meter.use == 0
        meter.restart()
        assert meter.peak == 0


def test_a_meter_sees_into_our_kernels():
    packed, (gate, up) = torch.zeros(gk.packed_numel(64)), torch.randn(2, 1000, 64)
    call = partial(gk.gram_swiglu_, packed, gate, up)
    call()  # what threads keep for later calls is allocated here
    with memory.Meter(CPU) as meter:
        call()
    assert meter.peak == pytest.approx(peak_bytes(call), rel=0.01)
    assert meter.peak >= gate.nbytes  # silu(gate)·up is formed before the product


@pytest.mark.parametrize("name", ["llama", "resnet"])
def test_a_meter_counts_a_block_as_the_profiler_does(name, tiny_model, tiny_batches):
    model, batches = network(name, tiny_model), calibration(name, tiny_batches, 2)
    architecture = find(model, None)
    with eval_no_grad(model):
        stream = Stream(model, architecture.blocks, batches)
        with memory.Meter(CPU) as meter:
            stream.run(0, 0)
        used = peak_bytes(lambda: stream.run(0, 0))
    assert meter.peak == pytest.approx(used, rel=0.1)


SEARCHES = [name for name in select.names() if getattr(select.get(name), "peak_bytes", None)]


@pytest.mark.parametrize("sizes", [(400, 40, 150), (300, 500, 240)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_states_its_peak_within_a_tenth(name, dtype, sizes):
    channels, outputs, kept = sizes
    generator = torch.Generator().manual_seed(0)
    gram = grail.Gram(channels)
    gram.update(torch.randn(700, channels, generator=generator))
    weights = (
        torch.randn(rows, columns, generator=generator).to(dtype)
        for rows, columns in ((channels, 128), (outputs, channels))
    )
    producer, consumer = weights
    view = select.View(
        (producer, producer),
        consumer,
        gram,
        ChannelWidth(channels, kept),
        torch.Generator(),
    )
    stated = select.get(name).peak_bytes(view)
    gc.collect()
    assert peak_bytes(lambda: select.get(name)(view)) == pytest.approx(stated, rel=0.1)
    if name == "greedy":
        heads = replace(view, width=HeadWidth(4, 5, channels // 20, 2, 5))
        used = peak_bytes(lambda: select.get(name)(heads))
        assert used == pytest.approx(select.get(name).peak_bytes(heads), rel=0.1)
