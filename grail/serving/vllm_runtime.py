"""Computes log-probabilities and greedy tokens of a folder by vLLM; for a process of its own.

`python -m grail.serving.vllm_runtime FOLDER TOKENS.npy RESULT.npz IMPLEMENTATION COUNT`: tokens
[sequences, tokens]; of each but the first, ids and log-probabilities [sequences, tokens − 1, k] of
the k most likely ones; COUNT tokens [sequences, COUNT] that follow, each the most likely one; the
name of vLLM's class.
"""

import importlib
import sys
from typing import Any

import numpy as np

_MOST = 20  # log-probabilities for each position: what vLLM gives by default


def main(folder: str, given: str, result: str, implementation: str, count: str) -> None:
    """Writes the result."""
    vllm: Any = importlib.import_module("vllm")
    tokens = np.load(given)
    rows, length = tokens.shape
    model = vllm.LLM(
        folder,
        dtype="float32",
        trust_remote_code=True,  # grail compared the code with what it generates
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=length + int(count),
        max_num_seqs=rows,
        model_impl=implementation,
    )
    settings = vllm.SamplingParams(
        temperature=0,
        max_tokens=int(count),
        ignore_eos=True,
        prompt_logprobs=_MOST,
        detokenize=False,
    )
    found = model.generate([{"prompt_token_ids": row} for row in tokens.tolist()], settings)
    likely = [[_ranked(at) for at in answer.prompt_logprobs[1:]] for answer in found]
    np.savez(
        result,
        ids=[[[token for token, _ in at] for at in row] for row in likely],
        values=[[[value for _, value in at] for at in row] for row in likely],
        generated=[answer.outputs[0].token_ids for answer in found],
        form=model.apply_model(_form)[0],
    )


def _ranked(at: dict[int, Any]) -> list[tuple[int, float]]:
    """Returns tokens and their log-probabilities, the most likely first.

    vLLM adds the token that is there, of any rank.
    """
    found = sorted((entry.rank, token, entry.logprob) for token, entry in at.items())
    return [(token, logprob) for rank, token, logprob in found if rank <= _MOST]


def _form(model: Any) -> str:
    return type(model).__name__


if __name__ == "__main__":
    main(*sys.argv[1:])
