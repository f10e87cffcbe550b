"""A block that ends from what was kept ends where the narrowed block does."""

import copy
from functools import partial

import numpy as np
import pytest
import torch

import grail
from grail.calibrate.stream import Stream
from grail.networks import find
from grail.recipe import Recipe
from grail.run.block import BlockCompressor
from grail.run.blocks import Blocks
from grail.run.finishing import BlockFinisher
from grail.runtime.clock import Clock
from grail.runtime.transaction import Transaction, eval_no_grad
from grail.statistics.collector import ignore
from tests.run.test_compress import rebuilt, seen_by

PAPER = {"alpha": 1e-3, "toward": "zero", "selector": "wanda", "drift_correction": 0}
# Blocks that end with an additive residual, and others: norms after the consumer, a multiplier.
ADDITIVE = ["llama", "gpt2", "opt", "phi", "cohere", "gpt_neox", "qwen3"]
OTHERS = ["gemma2", "olmo2", "granite"]


@pytest.fixture
def splits(monkeypatch):
    """Whether each block had a split that held, in the order in which the blocks end."""
    held = []
    finish = BlockFinisher._finish_split

    def recorded(self, *args):
        held.append(finish(self, *args))
        return held[-1]

    monkeypatch.setattr(BlockFinisher, "_finish_split", recorded)
    return held


def compressed(model, batches, **settings):
    """Compresses all blocks but the last; returns the streams at its entry."""
    recipe = Recipe(**{"keep": 0.5, **settings})
    architecture = find(model, recipe.sites)
    with eval_no_grad(model), Transaction() as transaction:
        if recipe.fit_bias:
            architecture.ensure_biases(recipe.all_sites(architecture), transaction)
        stream = Stream(model, architecture.blocks, batches)
        blocks = Blocks(architecture, recipe, stream, Clock(stream.device))
        compressor = BlockCompressor(blocks, transaction)
        for block in range(len(blocks) - 1):
            compressor.compress(block, ignore)
        return compressor.streams(len(blocks) - 1)


def entries(model, batches):
    """What the last block of a model reads in plain forward passes."""
    seen = []

    def keep(_, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = find(model).blocks[-1].register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return seen


@pytest.mark.parametrize("family", [*ADDITIVE, *OTHERS])
@pytest.mark.parametrize("settings", [PAPER, {}], ids=["paper", "default"])
def test_the_stream_moves_to_the_outputs_of_the_narrowed_blocks(
    family, settings, splits, tiny_model, tiny_batches
):
    model, batches = tiny_model(family, num_hidden_layers=3), tiny_batches(count=6)
    stream, *_ = compressed(model, batches, **settings)
    assert splits == ([True] * 2 if family in ADDITIVE else [])
    for found, expected in zip(stream.hidden, entries(model, batches), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fitted_biases_move_with_the_stream(family, splits, tiny_model, tiny_batches):
    model, batches = tiny_model(family, num_hidden_layers=3), tiny_batches(count=6)
    stream, *_ = compressed(model, batches, fit_bias=True)
    assert splits == [True] * 2
    for found, expected in zip(stream.hidden, entries(model, batches), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_16_bits_it_rounds_as_the_block_does(family, splits, tiny_model, tiny_batches):
    model, batches = tiny_model(family, num_hidden_layers=2).bfloat16(), tiny_batches(count=6)
    stream, *_ = compressed(model, batches, **PAPER)
    assert splits == [True]
    same = [f == e for f, e in zip(stream.hidden, entries(model, batches), strict=True)]
    # Bitwise, but where a product of another shape rounded a channel of x otherwise.
    assert torch.cat(same).float().mean() > 0.98


def test_no_block_runs_again(tiny_llama, tiny_batches):
    model, batches = tiny_llama(num_hidden_layers=3), tiny_batches(count=6)
    layer, ran = model.model.layers[1], []
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        count = partial(lambda name, *_: ran.append(name), name)
        layer.get_submodule(name).register_forward_pre_hook(count)
    compressed(model, batches, **PAPER)
    assert ran.count("self_attn.q_proj") == 6
    assert ran.count("mlp.up_proj") == 6 + 1  # the narrowed block runs on the first batch


def test_a_block_that_was_narrowed_wrongly_runs_on_all_batches(
    splits, tiny_llama, tiny_batches, monkeypatch
):
    from grail.networks.layers import Producer

    narrow = Producer.narrow

    def elsewhere(self, reductions, transaction):
        index = reductions["channels"].index
        rolled = {"channels": grail.Selection((index + 1) % 80, 80)}
        narrow(self, rolled if self.name.endswith("up_proj") else reductions, transaction)

    monkeypatch.setattr(Producer, "narrow", elsewhere)
    model, batches = tiny_llama(num_hidden_layers=3), tiny_batches(count=6)
    stream, *_ = compressed(model, batches, **PAPER)
    assert splits == [False, False]
    for found, expected in zip(stream.hidden, entries(model, batches), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"selector": "folding"}, {"selector": "folding", "exact_folding": False}, {"sites": "heads"}],
    ids=str,
)
def test_foldings_and_sites_within_a_block_run_it_again(settings, splits, tiny_llama, tiny_batches):
    model, batches = tiny_llama(num_hidden_layers=3), tiny_batches(count=6)
    stream, *_ = compressed(model, batches, **settings)
    assert not splits
    for found, expected in zip(stream.hidden, entries(model, batches), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_selector_that_folds_unannounced_runs_the_block_again(splits, tiny_llama, tiny_batches):
    def fold(view):
        return grail.Folding([h % view.width.kept for h in range(view.width.channels)])

    model, batches = tiny_llama(num_hidden_layers=3), tiny_batches(count=6)
    stream, *_ = compressed(model, batches, selector=fold)
    assert not splits
    for found, expected in zip(stream.hidden, entries(model, batches), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sites", [("mlp",), ("mlp", "heads")], ids="+".join)
def test_the_dense_stream_begins_at_the_first_narrowed_block(sites, tiny_llama, tiny_batches):
    model, batches = tiny_llama(num_hidden_layers=4), tiny_batches(count=6)
    dense = entries(model, batches)
    ran = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: ran.append(0))
    keep = {"mlp": [1.0, 0.5, 0.5, 0.5], "heads": 1.0}
    streams = compressed(model, batches, keep=keep, sites=sites)
    assert len(ran) == 6 + 6  # once for the stream, and once recording it
    for found, expected in zip(streams[1].hidden, dense, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for found, expected in zip(streams[0].hidden, entries(model, batches), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_dense_stream_runs_on_its_share_of_the_batches(tiny_llama, tiny_batches):
    model, batches = tiny_llama(num_hidden_layers=3), tiny_batches(count=20, rows=1)
    dense, ran = entries(model, batches), []
    model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda *_: ran.append(0))
    _, followed = compressed(model, batches, dense_share=0.25)
    chosen = followed.batches
    # Batch 4, 9, … of one sequence is held out.
    assert chosen == [0, 4, 5, 10, 15]
    assert len(ran) == 20 + len(chosen)
    for batch in chosen:
        torch.testing.assert_close(followed.hidden[batch], dense[batch], rtol=1e-4, atol=1e-5)


def test_the_drift_of_a_share_counts_for_all_tokens(tiny_llama, tiny_batches):
    model, batches = tiny_llama(num_hidden_layers=2), tiny_batches(count=20, rows=1)
    frozen = copy.deepcopy(model)
    settings = {"alpha": 1e-2, "toward": "zero", "drift_correction": 0.7, "selector": "magnitude"}
    grail.compress(model, batches, 0.5, progress=False, dense_share=0.25, **settings)
    layer, dense = model.model.layers[1], frozen.model.layers[1]
    # The second block before it was narrowed, in the network whose first block is.
    wide = copy.deepcopy(model)
    wide.model.layers[1] = copy.deepcopy(dense)
    x, here = (seen_by(wide, m, batches, **o) for m, o in reads(wide.model.layers[1]))
    _, there = (seen_by(frozen, m, batches, **o) for m, o in reads(dense))
    # All is by batch: the share's drift at its batches, scaled to the number of all tokens.
    share = np.isin(np.arange(20), [0, 4, 5, 10, 15]).repeat(16)
    drift = 0.7 * np.where(share[:, None], there - here, 0) * (share.size / share.sum())
    weights = [m.weight for m in (dense.mlp.gate_proj, dense.mlp.up_proj)]
    scores = sum(w.double().square().sum(1) for w in weights)
    kept = np.sort(scores.argsort(descending=True)[:40].numpy())
    expected = rebuilt(dense.mlp.down_proj.weight.detach().double().numpy(), x, kept, drift)
    found = layer.mlp.down_proj.weight.detach().double().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def reads(layer):
    """What the MLP's last layer of a block reads, and what the block returns."""
    return (layer.mlp.down_proj, {}), (layer, {"output": True})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sites": ("heads",)},  # tokens are weighted by the dense stream, or by its own
        {"sites": ("mlp", "heads"), "correct_attention": True},
        {"selector": "folding"},
        {"selector": "folding", "drift_correction": 0.5},
    ],
    ids=str,
)
def test_a_share_of_the_dense_stream_serves_every_way_of_correcting_drift(
    settings, tiny_llama, tiny_batches
):
    batches = tiny_batches(count=40, rows=1, length=32)
    (held_out,) = tiny_batches(count=1, rows=8, length=32, seed=1)
    errors = {}
    with torch.no_grad():
        for name, given in {
            "none": {"drift_correction": 0, "correct_attention": False},
            "half": {"dense_share": 0.5},
            "whole": {},
        }.items():
            model = tiny_llama(num_hidden_layers=4)
            dense = model.model(held_out).last_hidden_state
            grail.compress(model, batches, 0.5, progress=False, **{**settings, **given})
            errors[name] = (model.model(held_out).last_hidden_state - dense).norm().item()
    # Tiny random networks gain little by it, some nothing.
    assert errors["half"] < 1.05 * max(errors["none"], errors["whole"])
    assert errors["half"] not in (errors["none"], errors["whole"])
