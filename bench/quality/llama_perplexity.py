"""Perplexity of a GGUF file in llama.cpp; a program for a process of its own.

    python -m bench.quality.llama_perplexity small.gguf tokens.npy 2     a file, tokens, threads

Tokens are [sequences, tokens], int32. Prints JSON: the perplexity over every token but the first of
each sequence, as `grail.evaluate` computes it. Keys and values are fp32.
"""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from bench.tools.commandline import CommandLine

_F32 = 0  # ggml's number of the type


def main() -> None:
    """Prints the perplexity."""
    parser = CommandLine(__doc__, writes="one line to the screen", takes="seconds to minutes")
    parser.add_argument("file", type=Path, help="a GGUF file")
    parser.add_argument("tokens", type=Path, help="TOKENS.npy")
    parser.add_argument("threads", type=int, help="of llama.cpp")
    options = parser.read()
    llama_cpp: Any = importlib.import_module("llama_cpp")
    tokens = np.load(options.tokens)
    length = tokens.shape[1]
    model = llama_cpp.Llama(
        model_path=str(options.file),
        n_ctx=length,
        n_batch=length,
        n_threads=options.threads,
        n_threads_batch=options.threads,
        n_gpu_layers=0,
        logits_all=True,
        flash_attn=False,
        type_k=_F32,
        type_v=_F32,
        verbose=False,
    )
    loss = 0.0
    for sequence in tokens:
        model.reset()
        model.eval(sequence.tolist())
        for logits, following in zip(model.scores[: length - 1], sequence[1:], strict=True):
            top = float(logits.max())
            loss += top + math.log(np.exp(logits - top, dtype=np.float32).sum(dtype=np.float64))
            loss -= float(logits[following])
    count = tokens.shape[0] * (length - 1)
    print(json.dumps({"perplexity": math.exp(loss / count), "tokens": count}))


if __name__ == "__main__":
    main()
