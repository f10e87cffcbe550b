"""Tokens that a model draws itself, each sequence by random numbers of its own."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isinf, log
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from grail.arguments import is_number, require_seed, require_whole
from grail.errors import InputError, ModelError
from grail.files.text import CALIBRATION_TOKENS
from grail.runtime.settings import documented, setting
from grail.runtime.transaction import eval_no_grad
from grail_kernels import check_kind

_MOST = 1 << 31  # of a batch, or tokens of a sequence


@documented
@dataclass(frozen=True)
class Sampling:
    """Settings of text that a model writes itself. Wrong values raise InputError."""

    tokens: int = setting(
        CALIBRATION_TOKENS,
        "Tokens to write, such as 65536, 64k or 1M, as the tokenizer reads them back.",
        metavar="COUNT",
    )
    temperature: float = setting(
        1.0, "Divisor of the logits, > 0; less than 1 favours likely tokens.", metavar="FLOAT"
    )
    top_p: float = setting(
        0.98,
        "Draw from the likeliest tokens that have this share of the probability, in (0, 1].",
        metavar="SHARE",
    )
    seed: int = setting(0, "Seed of the draws, of which each sequence has its own.")
    begin: str | None = setting(
        None,
        "Token that begins each sequence, such as <|endoftext|>.",
        shown="the tokenizer's begin-of-text token, else its end-of-text token",
        metavar="TOKEN",
    )
    prompt_tokens: int = setting(
        32, "Tokens of each prompt.", least=1, most=_MOST, panel="Reading text"
    )
    sequence_length: int | None = setting(
        None,
        "Tokens per sequence, the prompt included.",
        shown="1024, or all that the model has positions for",
        least=2,
        most=_MOST,
        panel="Running",
    )
    batch_size: int = setting(
        16, "Sequences written at once.", least=1, most=_MOST, panel="Running"
    )

    def __post_init__(self) -> None:
        for name in ("tokens", "prompt_tokens", "batch_size"):
            require_whole(name, getattr(self, name), 1)
        if self.sequence_length is not None:
            require_whole("sequence_length", self.sequence_length, 2)
        require_seed(self.seed)
        check_kind("begin", self.begin, (str, NoneType), "the text of a token")
        for name, most in (("temperature", inf), ("top_p", 1.0)):
            value = getattr(self, name)
            if not is_number(value) or not 0 < value <= most or isinf(value):
                upper = "" if isinf(most) else " and ≤ 1"
                raise InputError(f"{name} must be a number > 0{upper}; got {value!r}")


def uniforms(seed: int, sequences: Sequence[int], count: int) -> Tensor:
    """Returns random numbers in [0, 1), fp64 [sequences, count], the same for the same sequence."""
    drawn = []
    for sequence in sequences:
        digest = hashlib.sha256(f"{seed} {sequence}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        drawn.append(torch.rand(count, dtype=torch.float64, generator=generator))
    return torch.stack(drawn)


def draw(logits: Tensor, numbers: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draws a token for each sequence from its nucleus, by the inverse of its distribution.

    The nucleus is the fewest likeliest tokens whose probabilities add up to `top_p` (Holtzman et
    al., 2020).

    Args:
        logits: [sequences, tokens].
        numbers: uniform in [0, 1), fp64 [sequences].
        temperature: divides the logits.
        top_p: share of the probability in the nucleus.

    Returns:
        int64 [sequences].

    Raises:
        ModelError: a logit is NaN, or +Inf.
    """
    logits = logits.float() / temperature
    total = logits.logsumexp(-1, keepdim=True)
    if not bool(total.isfinite().all()):
        raise ModelError(
            "the model's logits are NaN or Inf while it writes; check its weights, or use a wider "
            "dtype (--dtype float32)"
        )
    # All tokens less likely than this have less than 1 - top_p together: none is in the nucleus.
    least = total + log((1 - top_p) / (2 * logits.shape[-1])) if top_p < 1 else -inf
    ordered, tokens = logits.topk(int((logits >= least).sum(-1).max()))
    mass = (ordered.double() - total.double()).exp().cumsum(-1)
    last = (mass < top_p).sum(-1, keepdim=True).clamp(max=mass.shape[-1] - 1)
    drawn = numbers.to(mass)[:, None] * mass.gather(-1, last)
    place = torch.searchsorted(mass, drawn, right=True)
    return tokens.gather(-1, torch.minimum(place, last)).squeeze(-1)


class _Draws:
    """Leaves one token of each sequence possible: the one that its next random number draws."""

    def __init__(self, numbers: Tensor, how: Sampling, advance: Callable[[int], None]):
        self._numbers, self._how, self._advance = numbers, how, advance
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        numbers = self._numbers[:, self._step]
        chosen = draw(scores, numbers, self._how.temperature, self._how.top_p)
        self._step += 1
        self._advance(len(scores))
        return torch.full_like(scores, -inf).scatter_(1, chosen[:, None], 0.0)


def continuations(
    model: Any,
    starts: Tensor,
    numbers: Tensor,
    how: Sampling,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Tensor:
    """Lets a model continue sequences by transformers' `generate`.

    An end-of-text token does not end a sequence: the model begins another document after it, as
    documents follow one another in a calibration. `generate` is greedy among what `draw` leaves, so
    that no sequence depends on the others of its batch.

    Args:
        model: a causal language model.
        starts: token ids [sequences, length].
        numbers: uniform in [0, 1), fp64 [sequences, new].
        how: temperature and nucleus.
        advance: called with the number of tokens written in a step.

    Returns:
        int64 [sequences, length + new], on the CPU.

    Raises:
        ModelError: see `draw`.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    draws = LogitsProcessorList([_Draws(numbers, how, advance)])
    # The model's own settings may sample, or penalise repetition.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with eval_no_grad(model):
            whole: Tensor = model.generate(
                starts.to(model.device),
                attention_mask=torch.ones_like(starts).to(model.device),
                do_sample=False,
                max_new_tokens=numbers.shape[1],
                pad_token_id=0,
                logits_processor=draws,
            )
    finally:
        model.generation_config = own
    return whole.cpu()
