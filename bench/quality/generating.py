"""Measures of text that a compressed language model writes: greedy, and sampled.

All is deterministic: samples come from seeded random numbers, the same for every model, so that
models are compared prompt by prompt.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.quality.tasks import Question, answers
from grail.runtime.transaction import eval_no_grad

_GRAM = 4
TOP_P = 0.95


def first_divergence(
    model: Any,
    prompts: Tensor,  # [prompts, tokens]
    greedy: Tensor,  # [prompts, new]
) -> list[int]:
    """Counts greedy tokens of `model` until the first that differs from the dense model's.

    Until then both models read the same tokens, so one pass over the dense model's text shows all.

    Args:
        prompts: token ids.
        greedy: the dense model's greedy continuations.

    Returns:
        For each prompt a number from 0 to `new`; `new` if no token differs.
    """
    questions = [
        Question(tuple(prompt), (tuple(text),))
        for prompt, text in zip(prompts.tolist(), greedy.tolist(), strict=True)
    ]
    found = [0] * len(questions)
    for index, _, likeliest in answers(model, questions):
        found[index] = int(likeliest[0].long().cumprod(0).sum())
    return found


def sample(
    model: Any,
    prompts: Tensor,  # [prompts, tokens]
    new: int,
    *,
    top_p: float = TOP_P,
    seed: int = 0,
) -> Tensor:  # [prompts, new]
    """Draws a continuation of each prompt, one random number a token, the same for every model.

    The end-of-text token ends none, so that all have the same length.

    Args:
        prompts: token ids, int64.
        new: tokens of a continuation.
        top_p: drawn from the fewest tokens whose probabilities sum to this (nucleus sampling,
            Holtzman et al. 2020, arXiv 1904.09751).
        seed: of the random numbers.
    """
    generator = random.Random(seed)
    drawn, tokens, cache = [], prompts.to(model.device), None
    with eval_no_grad(model), torch.inference_mode():
        for _ in range(new):
            read = model(input_ids=tokens, past_key_values=cache, use_cache=True)
            cache = read.past_key_values
            chances = torch.tensor([generator.random() for _ in prompts], dtype=torch.float64)
            tokens = pick(read.logits[:, -1].cpu(), chances, top_p)[:, None].to(model.device)
            drawn.append(tokens.cpu())
    return torch.cat(drawn, 1)


def pick(
    logits: Tensor,  # [rows, vocabulary]
    chances: Tensor,  # [rows] in [0, 1)
    top_p: float,
) -> Tensor:  # [rows]
    """Picks a token of each row: of the likeliest ones that make up `top_p`, the one at `chances`.

    Sorted by falling probability, a token takes the interval of its probability; `chances` is the
    place in the sum of the kept intervals.
    """
    probabilities, order = logits.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
    ends = probabilities.cumsum(-1)
    kept = (ends - probabilities < top_p).sum(-1, keepdim=True)  # at least one
    place = chances[:, None] * ends.gather(-1, kept - 1)
    return order.gather(-1, (ends <= place).sum(-1, keepdim=True).minimum(kept - 1))[:, 0]


def distinct(texts: Sequence[Sequence[int]]) -> list[float]:
    """Share of different ones among the 4-grams of each text; 1 where none comes twice."""
    shares = []
    for text in texts:
        grams = [tuple(text[i : i + _GRAM]) for i in range(len(text) - _GRAM + 1)]
        shares.append(len(set(grams)) / len(grams))
    return shares


def surprise(model: Any, prompts: Tensor, texts: Tensor) -> list[float]:
    """Mean −log p of the tokens of each text after its prompt, in nats, of `model`.

    Args:
        prompts: token ids [prompts, tokens].
        texts: token ids [prompts, new].
    """
    questions = [
        Question(tuple(prompt), (tuple(text),))
        for prompt, text in zip(prompts.tolist(), texts.tolist(), strict=True)
    ]
    found = [0.0] * len(questions)
    for index, logs, _ in answers(model, questions):
        found[index] = -float(logs[0].mean())
    return found
