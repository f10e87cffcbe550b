"""Greedy completions of held-out text, and how much they repeat themselves.

Perplexity alone does not show that a narrowed model is unusable: a model that repeats one sentence
for ever can have a low perplexity. The share of repeated 4-grams in greedy completions shows it.
Small dense models repeat themselves as well, so both shares are compared.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grail.runtime.transaction import eval_no_grad

PROMPTS = 24  # completions on which repetition is measured
SHOWN = 3  # completions in the report
PROMPT_TOKENS = 32
NEW_TOKENS = 48
_GRAM = 4  # tokens of a sequence that counts as repeated


def prompts(heldout: Sequence[Tensor]) -> Tensor:
    """Cuts prompts from the held-out text, spread evenly over it.

    Args:
        heldout: batches [sequences, length].

    Returns:
        [prompts, tokens]: at most 24 prompts of at most 32 tokens, half a sequence if those are
        shorter.
    """
    rows = torch.cat(list(heldout))
    size = min(PROMPT_TOKENS, max(1, rows.shape[1] // 2))
    pieces = rows[:, : rows.shape[1] // size * size].reshape(-1, size)
    count = min(PROMPTS, len(pieces))
    return pieces[torch.arange(count) * len(pieces) // count]


def complete(model: Any, starts: Tensor, new: int = NEW_TOKENS) -> Tensor:
    """Returns greedy completions [prompts, new] of `starts` [prompts, tokens].

    The end-of-text token does not end them, so that all have the same length.
    """
    from transformers import GenerationConfig

    positions = getattr(model.config, "max_position_embeddings", None)
    new = min(new, (positions or starts.shape[1] + new) - starts.shape[1])
    # The model's own settings may sample, or penalise repetition.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with eval_no_grad(model):
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


def repetition(completions: Tensor) -> tuple[float, float | None] | None:
    """Measures the share of 4-grams of tokens that occur earlier in the same completion.

    Args:
        completions: [completions, tokens].

    Returns:
        The mean over completions, in [0, 1), and its standard error, None for one completion; None
        if completions are shorter than two 4-grams.
    """
    rows = completions.tolist()
    grams = [[tuple(row[i : i + _GRAM]) for i in range(len(row) - _GRAM + 1)] for row in rows]
    if not grams or len(grams[0]) < 2:
        return None
    shares = [1 - len(set(of_row)) / len(of_row) for of_row in grams]
    mean, count = statistics.mean(shares), len(shares)
    return mean, statistics.stdev(shares) / math.sqrt(count) if count > 1 else None
