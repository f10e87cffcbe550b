"""Greedy completions of held-out text, and how much they repeat themselves.

Perplexity alone does not show that a narrowed model has become unusable: a model that repeats one
sentence for ever can have a low one. The share of repeated 4-grams of greedy completions shows it,
beside that of the dense model, since small dense models repeat themselves as well.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grail.transaction import steady

PROMPTS = 8  # completions that repetition is measured on
SHOWN = 3  # of them are shown
PROMPT_TOKENS = 32
NEW_TOKENS = 40
_GRAM = 4  # tokens of a sequence that counts as repeated


def prompts(heldout: Sequence[Tensor]) -> Tensor:
    """The first tokens of sequences that are spread evenly over the held-out text.

    Args:
        heldout: batches [sequences, length].

    Returns:
        [prompts, tokens]: at most 8 prompts of at most 32 tokens, half a sequence if those are
        shorter.
    """
    rows = torch.cat(list(heldout))
    count = min(PROMPTS, len(rows))
    chosen = torch.arange(count) * len(rows) // count
    return rows[chosen, : min(PROMPT_TOKENS, max(1, rows.shape[1] // 2))]


def complete(model: Any, starts: Tensor, new: int = NEW_TOKENS) -> Tensor:
    """Greedy completions [prompts, new] of `starts` [prompts, tokens].

    The end-of-text token does not end them, so that all have the same length.
    """
    from transformers import GenerationConfig

    positions = getattr(model.config, "max_position_embeddings", None)
    new = min(new, (positions or starts.shape[1] + new) - starts.shape[1])
    # A sampling model's own settings must not get in: it would draw, or punish repetition.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with steady(model):
            whole = model.generate(
                starts.to(model.device),
                attention_mask=torch.ones_like(starts).to(model.device),
                do_sample=False,
                max_new_tokens=new,
                pad_token_id=0,
            )
    finally:
        model.generation_config = own
    return whole[:, starts.shape[1] :].cpu()


def repetition(completions: Tensor) -> float | None:
    """The share of 4-grams of tokens that occur earlier in the same completion.

    Args:
        completions: [completions, tokens].

    Returns:
        In [0, 1); None if completions are shorter than two 4-grams.
    """
    rows = completions.tolist()
    grams = [[tuple(row[i : i + _GRAM]) for i in range(len(row) - _GRAM + 1)] for row in rows]
    total = sum(map(len, grams))
    if total < 2 * len(grams) or not total:
        return None
    return 1 - sum(len(set(of_row)) for of_row in grams) / total
