"""Perplexity against a plain fp64 computation, and sizes against a saved checkpoint."""

import copy
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file

from grail import DenseReference, evaluate
from grail.errors import EmptyCalibrationError, InputError, ModelError
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


def divergences(model, dense, batches):
    """Mean KL(dense‖model) and top-1 agreement from all logits at once, in fp64."""
    kl, same = [], []
    for tokens in batches:
        own, other = (
            copy.deepcopy(network).double()(tokens).logits[:, :-1].log_softmax(-1)
            for network in (model, dense)
        )
        kl.append((other.exp() * (other - own)).sum(-1).flatten())
        same.append((own.argmax(-1) == other.argmax(-1)).flatten())
    return torch.cat(kl).mean().item(), torch.cat(same).double().mean().item()


def pair(tiny_model, family="llama", **config):
    """A network, and another that differs from it in one matrix."""
    dense = tiny_model(family, **config)
    model = copy.deepcopy(dense)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 5
        model.model.layers[0].self_attn.o_proj.weight *= -3
    return model, dense


FAMILIES = pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("granite", {"logits_scaling": 0.1}),
        ("gemma2", {"final_logit_softcapping": 1.0, "query_pre_attn_scalar": 8}),
    ],
    ids=["untied", "tied", "granite", "gemma2"],
)


@FAMILIES
def test_divergence_from_a_dense_network_equals_fp64(tiny_model, tiny_batches, family, config):
    model, dense = pair(tiny_model, family, **config)
    batches = tiny_batches()
    expected, same = divergences(model, dense, batches)
    for against in (dense, DenseReference(dense, batches, progress=False)):
        found = evaluate(model, batches, against=against, progress=False)
        # Rounding of fp32 log-probabilities, as for the loss; their differences are of size 0.1.
        assert found.kl == pytest.approx(expected, abs=TOLERANCE, rel=1e-3)
        assert found.top1 == same
        alone = evaluate(model, batches, progress=False)
        assert (found.perplexity, found.losses) == (alone.perplexity, alone.losses)
        assert (alone.kl, alone.top1) == (None, None)
    assert expected > 0.001
    assert same < 1


@FAMILIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_network_is_no_distance_from_itself(tiny_model, tiny_batches, family, config, dtype):
    model, batches = tiny_model(family, **config).to(dtype), tiny_batches()
    reference = DenseReference(model, batches, progress=False)
    found = evaluate(model, batches, against=reference, progress=False)
    assert (found.kl, found.top1) == (0.0, 1.0)
    assert not reference.runs_model
    assert reference.evaluation.losses == found.losses
    assert reference.evaluation.perplexity == found.perplexity


@FAMILIES
def test_a_reference_outlives_changes_of_its_network(tiny_model, tiny_batches, family, config):
    dense, batches = tiny_model(family, **config), tiny_batches()
    model = copy.deepcopy(dense)
    reference = DenseReference(dense, batches, progress=False)
    with torch.no_grad():  # as narrowing and rounding do
        dense.lm_head.weight.mul_(2)
        dense.model.layers[0].mlp.down_proj.weight.zero_()
    found = evaluate(model, batches, against=reference, progress=False)
    assert (found.kl, found.top1) == (0.0, 1.0)
    assert not reference.runs_model
    tokens, width, vocabulary = 3 * 2 * 16, dense.config.hidden_size, dense.config.vocab_size
    # fp32 hidden states and output layer, int64 targets.
    assert reference.nbytes == 4 * width * (tokens + vocabulary) + 8 * 3 * 2 * 15


def test_a_network_whose_logits_need_more_runs_again(tiny_llama, tiny_batches):
    class Shifted(torch.nn.Linear):
        """An output layer that a copy of its weights is not."""

        def forward(self, x):
            return super().forward(x) + 1

    model, batches = tiny_llama(), tiny_batches()
    head = Shifted(*reversed(model.lm_head.weight.shape), bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    reference = DenseReference(model, batches, progress=False)
    assert reference.runs_model
    assert evaluate(model, batches, against=reference, progress=False).kl == 0


def test_losses_are_means_of_sequences(tiny_llama, tiny_batches):
    model, batches = tiny_llama(), tiny_batches()
    mask = torch.ones_like(batches[0])
    mask[0, 1:] = 0  # nothing to predict: no loss
    mask[1, 9:] = 0
    inputs = [{"input_ids": batches[0], "attention_mask": mask}, *batches[1:]]
    found = evaluate(model, inputs, progress=False)
    rows = [
        (batches[0][1:2, :9], None),
        *((b[i : i + 1], None) for b in batches[1:] for i in (0, 1)),
    ]
    expected = [reference_loss(model, [row]) for row, _ in rows]
    assert found.losses == pytest.approx(expected, abs=TOLERANCE)
    assert found.tokens == 8 + 4 * 15


def test_distances_of_sequences_and_their_errors_equal_fp64(tiny_model, tiny_batches):
    dense = tiny_model("llama")
    model = copy.deepcopy(dense)
    with torch.no_grad():  # the likeliest token agrees in some places
        head = model.lm_head.weight
        head += 0.4 * head.std() * torch.randn(head.shape, generator=torch.manual_seed(0))
    batches = tiny_batches()
    mask = torch.ones_like(batches[0])
    mask[0, 1:] = 0  # nothing to predict: no distance
    mask[1, 9:] = 0
    inputs = [{"input_ids": batches[0], "attention_mask": mask}, *batches[1:]]
    found = evaluate(model, inputs, against=dense, progress=False)
    rows = [batches[0][1:2, :9], *(b[i : i + 1] for b in batches[1:] for i in (0, 1))]
    expected, same = zip(*(divergences(model, dense, [row]) for row in rows), strict=True)
    assert found.predicted == [8, 15, 15, 15, 15]
    assert found.divergences == pytest.approx(expected, abs=TOLERANCE, rel=1e-3)
    assert found.agreements == pytest.approx(same)
    for name, each in (("kl", expected), ("top1", same)):
        value, error = getattr(found, name), getattr(found, f"{name}_error")
        whole = sum(n * v for n, v in zip(found.predicted, each, strict=True))
        assert value == pytest.approx(whole / 68, abs=TOLERANCE)
        without = [(whole - n * v) / (68 - n) for n, v in zip(found.predicted, each, strict=True)]
        variance = 4 / 5 * sum((w - sum(without) / 5) ** 2 for w in without)
        assert error == pytest.approx(math.sqrt(variance), rel=1e-2)
        assert error > 0, each
    alone = evaluate(model, inputs, progress=False)
    assert (alone.predicted, alone.losses) == (found.predicted, found.losses)
    assert (alone.kl_error, alone.top1_error) == (None, None)
    assert alone.divergences == alone.agreements == []


def test_one_sequence_has_a_distance_without_an_error(tiny_model, tiny_batches):
    model, dense = pair(tiny_model)
    (batch,) = tiny_batches(count=1, rows=1)
    found = evaluate(model, [batch], against=dense, progress=False)
    assert found.divergences == [pytest.approx(found.kl)]
    assert (found.kl_error, found.top1_error) == (None, None)


def test_hidden_tokens_do_not_diverge(tiny_model, tiny_batches):
    model, dense = pair(tiny_model)
    batches = tiny_batches(count=1)
    mask = torch.ones_like(batches[0])
    mask[:, 10:] = 0
    inputs = [{"input_ids": batches[0], "attention_mask": mask}]
    found = evaluate(model, inputs, against=dense, progress=False)
    expected, same = divergences(model, dense, [batches[0][:, :10]])
    assert found.kl == pytest.approx(expected, abs=TOLERANCE, rel=1e-3)
    assert found.top1 == same


def test_tokens_that_cannot_come_add_nothing_to_the_divergence(tiny_model, tiny_batches):
    model, dense = pair(tiny_model)
    for network in (model, dense):
        network.lm_head.bias = torch.nn.Parameter(torch.zeros(network.config.vocab_size))
        network.lm_head.bias.data[-3:] = -math.inf  # as padded rows of a vocabulary
    batches = [tokens % 8 for tokens in tiny_batches()]
    assert 0 < evaluate(model, batches, against=dense, progress=False).kl < 10


def test_chunks_of_a_comparison_are_bounded(tiny_llama, tiny_batches):
    model = tiny_llama(vocab_size=1 << 18, num_hidden_layers=1, tie_word_embeddings=True)
    batches = tiny_batches(count=1, rows=5, length=16)
    reference = DenseReference(model, batches, progress=False)
    logits = []
    model.lm_head.register_forward_hook(lambda *call: logits.append(call[2].numel()))
    assert evaluate(model, batches, against=reference, progress=False).kl == 0
    assert logits[4:] == [64 << 18, 11 << 18]


def test_a_reference_refuses_other_batches(tiny_llama, tiny_batches):
    model, batches = tiny_llama(), tiny_batches()
    reference = DenseReference(model, batches[:2], progress=False)
    evaluate(model, batches[:1], against=reference, progress=False)
    for others in (batches[1:], batches):
        with pytest.raises(InputError, match="not the one of the dense reference"):
            evaluate(model, others, against=reference, progress=False)


def test_refuses_a_reference_of_another_vocabulary(tiny_llama, tiny_batches):
    batches = [tokens % 8 for tokens in tiny_batches()]
    other = tiny_llama(vocab_size=8)
    with pytest.raises(InputError, match="compare models of one vocabulary"):
        evaluate(tiny_llama(), batches, against=other, progress=False)
    with pytest.raises(InputError, match=r"against must be .*; got list"):
        evaluate(other, batches, against=[other], progress=False)
