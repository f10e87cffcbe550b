"""Perplexity against a plain fp64 computation, and sizes against a saved checkpoint."""

import copy
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file

from grail import evaluate
from grail.errors import EmptyCalibrationError, ModelError
from grail.report._evaluate import bfloat16_bytes, measure_size, require_causal
from tests.conftest import DECODERS, MIXTURES

# The loss is a mean of fp32 log-probabilities of size ~10, each within a few hundred roundings
# (one per layer, channel and vocabulary sum) of 6e-8 relative: 1e-4 absolute is never reached by
# rounding, and one prediction dropped, shifted or counted twice changes it by 1e-2 or more.
TOLERANCE = 1e-4


def reference_loss(model, batches, masks=None):
    """Mean loss from all logits at once, in fp64."""
    double = copy.deepcopy(model).double()
    losses = []
    for index, tokens in enumerate(batches):
        mask = torch.ones_like(tokens) if masks is None else masks[index]
        logits = double(tokens, attention_mask=mask).logits
        picked = logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
        losses.append(-picked[mask[:, 1:].bool()])
    return torch.cat(losses).mean().item()


# Granite divides and Gemma 2 caps the logits after the output layer.
@pytest.mark.parametrize(
    ("family", "config"),
    [("llama", {}), ("qwen3", {}), ("granite", {"logits_scaling": 4.0}), ("gemma2", {})],
    ids=["llama", "qwen3", "granite", "gemma2"],
)
def test_perplexity_equals_fp64_reference(tiny_model, tiny_batches, family, config):
    if family == "gemma2":
        config = {"final_logit_softcapping": 1.0, "query_pre_attn_scalar": 8}
    model, batches = tiny_model(family, **config), tiny_batches()
    found = evaluate(model, batches, progress=False)
    assert math.log(found.perplexity) == pytest.approx(
        reference_loss(model, batches), abs=TOLERANCE
    )
    assert found.tokens == 3 * 2 * 15


def test_chunks_change_nothing_and_bound_the_logits(tiny_llama, tiny_batches):
    model = tiny_llama(vocab_size=1 << 18, num_hidden_layers=1, tie_word_embeddings=True)
    (batch,) = batches = tiny_batches(count=1, rows=5, length=16)
    logits = []
    model.lm_head.register_forward_hook(lambda *call: logits.append(call[2].numel()))
    chunked = evaluate(model, batches, progress=False)
    # The first four calls are probes: two of causality, two of layout. Then 75 predictions in rows
    # of 2^18 logits, of which 64 MiB are 64.
    assert logits[4:] == [64 << 18, 11 << 18]
    with torch.no_grad():
        rows = model(batch).logits[:, :-1].flatten(0, 1)
    whole = torch.nn.functional.cross_entropy(rows, batch[:, 1:].flatten()).item()
    assert math.log(chunked.perplexity) == pytest.approx(whole, abs=TOLERANCE)


def test_masked_tokens_do_not_count(tiny_llama, tiny_batches):
    model, batches = tiny_llama(), tiny_batches()
    masks = [torch.ones_like(tokens) for tokens in batches]
    for mask in masks:
        mask[0, 10:] = 0
    inputs = [
        {"input_ids": tokens, "attention_mask": mask}
        for tokens, mask in zip(batches, masks, strict=True)
    ]
    found = evaluate(model, inputs, progress=False)
    assert found.tokens == 3 * (9 + 15)
    assert math.log(found.perplexity) == pytest.approx(
        reference_loss(model, batches, masks), abs=TOLERANCE
    )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_size_is_what_a_checkpoint_holds(tiny_llama, tmp_path, tied):
    model = tiny_llama(tie_word_embeddings=tied).bfloat16()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors").values()
    expected = (sum(t.numel() for t in stored), sum(t.nbytes for t in stored))
    assert measure_size(model) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_size_in_bfloat16_is_that_of_such_a_checkpoint(tiny_llama, dtype, tied):
    model = tiny_llama(tie_word_embeddings=tied).to(dtype)
    half = copy.deepcopy(model).bfloat16()
    model.register_buffer("counts", torch.arange(7))
    assert bfloat16_bytes(model) == measure_size(half)[1] + 7 * 8


def test_leaves_training_mode_and_random_state(tiny_llama, tiny_batches):
    model, state = tiny_llama(attention_dropout=0.5).train(), torch.get_rng_state()
    evaluate(model, tiny_batches(), progress=False)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("length", [None, 1], ids=["no batch", "one token"])
def test_refuses_batches_without_a_prediction(tiny_llama, tiny_batches, length):
    batches = [] if length is None else tiny_batches(length=length)
    with pytest.raises(EmptyCalibrationError, match="2 or more"):
        evaluate(tiny_llama(), batches, progress=False)


def test_refuses_a_model_that_answers_nan(tiny_llama, tiny_batches):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="NaN or Inf"):
        evaluate(model, tiny_batches(), progress=False)


def test_a_loss_beyond_what_can_be_exponentiated_is_an_infinite_perplexity(
    tiny_llama, tiny_batches
):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight *= 3000
    assert evaluate(model, tiny_batches(), progress=False).perplexity == math.inf


@pytest.mark.parametrize("length", [2, 3, 11])
@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "camembert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_sees_what_it_should_predict_is_refused(tiny_model, family, length, dtype):
    config = tiny_model(family).config
    tokens = torch.arange(3 * length).view(3, length) + 5

    def model(**settings):
        torch.manual_seed(0)
        own = copy.deepcopy(config)
        own.update(settings)
        return transformers.AutoModelForCausalLM.from_config(own).to(dtype).eval()

    with pytest.raises(ModelError, match=r"sees the tokens that it should predict.*is_decoder"):
        evaluate(model(is_decoder=False), [tokens], progress=False)
    evaluate(model(is_decoder=True), [tokens], progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [*DECODERS, *MIXTURES])
def test_no_decoder_is_taken_for_one_that_looks_ahead(tiny_model, tiny_batches, family, dtype):
    model = tiny_model(family).to(dtype)
    for tokens in tiny_batches(count=5, length=13):
        require_causal(model, tokens)
