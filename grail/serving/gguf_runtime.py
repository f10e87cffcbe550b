"""Computes the logits of a GGUF file by llama-cpp-python; a program for a process of its own.

`python -m grail.serving.gguf_runtime FILE TOKENS.npy LOGITS.npy`, tokens [sequences, tokens] and
logits [sequences, tokens, vocabulary]. A crash of llama.cpp ends this process alone.
"""

import importlib
import sys
from typing import Any

import numpy as np

_F32 = 0  # ggml's number of the type


def main(path: str, given: str, result: str) -> None:
    """Writes the logits."""
    llama_cpp: Any = importlib.import_module("llama_cpp")
    tokens = np.load(given)
    rows, length = tokens.shape
    model = llama_cpp.Llama(
        model_path=path,
        n_ctx=length,
        n_batch=length,
        n_gpu_layers=0,
        logits_all=True,
        flash_attn=False,
        type_k=_F32,  # its default rounds keys and values to 16 bits
        type_v=_F32,
        verbose=True,
    )
    logits = np.lib.format.open_memmap(
        result, mode="w+", dtype=np.float32, shape=(rows, length, model.n_vocab())
    )
    for row, sequence in enumerate(tokens):
        model.reset()
        model.eval(sequence.tolist())
        logits[row] = model.scores[:length]
    logits.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
