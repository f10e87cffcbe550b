"""Compresses a language model and lets the dense and the narrow one continue the same prompt.

    python examples/compress_and_generate.py --keep 0.75 --output out/

The defaults need no network after `make environment`: SmolLM2-135M, half of the Python language
reference to calibrate with, the other half held out.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import grail


def smollm2_and_texts() -> tuple[Path, list[str], list[str]]:
    """A GGUF file, and documents for calibration and evaluation."""
    sys.path.append(str(Path(__file__).parents[1]))  # bench is of this clone, not installed
    from bench.tools.assets import python_reference, smollm2, split_topics

    return smollm2(), *split_topics(python_reference())


def continued(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """The prompt and the likeliest tokens after it."""
    given = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        written = model.generate(given, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(written[0], skip_special_tokens=True)


def main(arguments: Iterable[str] | None = None) -> None:
    """Loads, measures, compresses, measures again, and writes a folder that transformers loads."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder, hub name or GGUF file; default: SmolLM2-135M")
    parser.add_argument("--text", help="calibration text, a file or dataset")
    parser.add_argument("--heldout", help="text to evaluate on")
    parser.add_argument("--tokens", type=int, default=4096, help="of calibration (%(default)s)")
    parser.add_argument("--length", type=int, default=512, help="of a sequence (%(default)s)")
    parser.add_argument("--keep", type=float, default=0.75, help="share of channels (%(default)s)")
    parser.add_argument("--prompt", default="In Python, a function is defined by")
    parser.add_argument("--new", type=int, default=40, help="tokens to generate (%(default)s)")
    parser.add_argument("--output", default="out", help="folder to create (%(default)s)")
    options = parser.parse_args(None if arguments is None else list(arguments))

    source: Any = options.model
    calibration: Any = options.text
    heldout: Any = options.heldout
    if None in (source, calibration, heldout):
        usual = smollm2_and_texts()
        given = (source, calibration, heldout)
        source, calibration, heldout = (a or b for a, b in zip(given, usual, strict=True))

    model, tokenizer = grail.load_model(source)
    batches, unseen = (
        grail.token_batches(text, tokenizer, tokens=options.tokens, sequence_length=options.length)
        for text in (calibration, heldout)
    )
    dense = grail.DenseReference(model, unseen)  # its outputs, to compare with
    print("dense:  ", continued(model, tokenizer, options.prompt, options.new))

    report = grail.compress(model, batches, keep=options.keep)  # in place

    print("narrow: ", continued(model, tokenizer, options.prompt, options.new))
    narrow = grail.evaluate(model, unseen, against=dense)
    print(f"parameters {dense.evaluation.parameters:,} → {narrow.parameters:,}")
    print(f"perplexity {dense.evaluation.perplexity:.2f} → {narrow.perplexity:.2f}")
    print(f"same best token as the dense model: {narrow.top1:.0%}")
    grail.export(model, tokenizer, options.output, report)
    print(f"{options.output}: AutoModelForCausalLM.from_pretrained reads it")


if __name__ == "__main__":
    main()
