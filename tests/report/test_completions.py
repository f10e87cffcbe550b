"""Completions are greedy whatever the model asks for, and repetition is counted as written."""

import pytest
import torch
from transformers import GenerationConfig

from grail.report import completions


def reference(model, starts, new):
    """Greedy completions by whole forward passes, without a cache."""
    rows = starts
    with torch.no_grad():
        for _ in range(new):
            rows = torch.cat([rows, model(rows).logits[:, -1:].argmax(-1)], 1)
    return rows[:, starts.shape[1] :]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_completions_are_greedy_whatever_the_model_asks_for(family, tiny_model, tiny_batches):
    model, starts = tiny_model(family), tiny_batches()[0][:, :7]
    expected = reference(model, starts, 11)
    own = GenerationConfig(
        do_sample=True,
        temperature=5.0,
        repetition_penalty=3.0,
        eos_token_id=expected[0, 2].item(),
        pad_token_id=5,
        max_length=9,
    )
    model.generation_config = own
    model.train()
    state = torch.get_rng_state()
    assert torch.equal(completions.complete(model, starts, 11), expected)
    assert model.generation_config is own
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_completions_end_where_positions_do(tiny_model, tiny_batches):
    model = tiny_model("gpt2", max_position_embeddings=16)
    assert completions.complete(model, tiny_batches()[0][:, :7], 40).shape == (2, 9)


@pytest.mark.parametrize(
    ("rows", "share"),
    [
        ([[1, 2, 3, 4, 5, 6, 7]], 0.0),
        # 1212, 2121, 1212, 2121, 1212: two of five are new.
        ([[1, 2, 1, 2, 1, 2, 1, 2]], 0.6),
        ([[5] * 9], 5 / 6),
        # Seven in all, of one row 0 of 4 again, of the other 3 of 4; rows do not count together.
        ([[1, 2, 3, 4, 5, 6, 7], [5] * 7], 3 / 8),
        ([[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7]], 0.0),
        ([[1, 1, 1, 1]], None),
        ([[1, 1]], None),
    ],
)
def test_repetition_is_the_share_of_4_grams_seen_before(rows, share):
    found = completions.repetition(torch.tensor(rows))
    if share is None:
        assert found is None
    else:
        assert found[0] == pytest.approx(share)


def test_the_standard_error_of_repetition_is_that_of_a_mean_over_completions():
    rows = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [5] * 7, [1, 2, 1, 2, 1, 2, 1]])
    shares = torch.tensor([0, 3 / 4, 2 / 4], dtype=torch.float64)
    mean, error = completions.repetition(rows)
    assert mean == pytest.approx(shares.mean().item())
    assert error == pytest.approx(shares.std().item() / 3**0.5)
    assert completions.repetition(rows[:1])[1] is None


@pytest.mark.parametrize(("rows", "length"), [(1, 50), (3, 50), (8, 64), (21, 1024), (1, 1)])
def test_prompts_are_pieces_that_are_spread_over_the_heldout_text(rows, length):
    text = torch.arange(rows * length).view(rows, length)
    found = completions.prompts(text.split(3))
    size = min(32, max(1, length // 2))
    pieces = rows * (length // size)
    assert found.shape == (min(pieces, completions.PROMPTS), size)
    assert torch.equal(found, found[:, :1] + torch.arange(size))  # contiguous, within a row
    gaps = found[:, 0].diff()
    assert (gaps > 0).all()
    # Evenly, within one piece and the rest of a sequence that holds no whole one.
    assert gaps.numel() == 0 or gaps.max() - gaps.min() < 3 * size
