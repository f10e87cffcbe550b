"""Passes of the calibration set through blocks, outside of a run."""

import torch
from transformers import T5Config, T5ForConditionalGeneration

import grail
from grail.calibrate.stream import Stream
from grail.networks import find
from grail.recipe import Recipe
from grail.run.blocks import Blocks
from grail.runtime.clock import Clock


def test_learning_the_order_of_tokens_is_time_of_forward_passes(monkeypatch):
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1}
    config = T5Config(**sizes, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[0, 4:] = 0
    batch = {
        "input_ids": torch.randint(3, 97, (3, 7)),
        "attention_mask": mask,
        "decoder_input_ids": torch.randint(3, 97, (3, 5)),
    }
    layer = "decoder.block.0.layer.2.DenseReluDense"
    recipe = Recipe(keep=0.5, sites=[grail.Site([f"{layer}.wi"], [f"{layer}.wo"])])
    architecture = find(model, recipe.sites)
    clock = Clock(torch.device("cpu"))
    phases = []
    changed = Stream.run_changed

    def run_changed(*arguments):
        phases.append(clock.phase)
        return changed(*arguments)

    monkeypatch.setattr(Stream, "run_changed", run_changed)
    with torch.no_grad():
        stream = Stream(model, architecture.blocks, [batch])
        blocks = Blocks(architecture, recipe, stream, clock)
        blocks.learn_orders()
    assert len(phases) > 2  # a decoder: its own inputs are changed as well
    assert set(phases) == {"forward"}
