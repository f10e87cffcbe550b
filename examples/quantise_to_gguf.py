"""Prunes, restores and quantises a model in one run, and writes a GGUF file for llama.cpp.

    python examples/quantise_to_gguf.py --keep 0.75 --format q4_1 --output out-gguf/

Each block is restored, then its matrices are rounded by GPTQ, and the next block is fitted on the
outputs of the rounded one. Stock llama.cpp loads the file. The defaults need no network after
`make environment`.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grail


def smollm2_and_texts(folder: Path) -> tuple[Path, Path, Path]:
    """A GGUF file, and the files of the texts for calibration and evaluation."""
    sys.path.append(str(Path(__file__).parents[1]))  # bench is of this clone, not installed
    from bench.tools.assets import python_reference, smollm2, split_topics, write_texts

    calibration, heldout = write_texts("python", split_topics(python_reference()), folder)
    return smollm2(), calibration, heldout


def main(arguments: Iterable[str] | None = None) -> Any:
    """Returns the description of the GGUF file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="GGUF file of a Llama, Mistral, Qwen2 or Qwen3 model")
    parser.add_argument("--text", help="calibration text, a file or dataset")
    parser.add_argument("--heldout", help="text to evaluate on")
    parser.add_argument("--tokens", type=int, default=4096, help="of each text (%(default)s)")
    parser.add_argument("--length", type=int, default=512, help="of a sequence (%(default)s)")
    parser.add_argument("--keep", type=float, default=0.75, help="share of channels (%(default)s)")
    parser.add_argument("--format", default="q4_1", choices=["q4_1", "q8_0"], help="of weights")
    parser.add_argument("--output", type=Path, default=Path("out-gguf"), help="folder to create")
    options = parser.parse_args(None if arguments is None else list(arguments))

    given = [options.model, options.text, options.heldout]
    if None in given:
        usual = smollm2_and_texts(options.output / "texts")
        given = [a or str(b) for a, b in zip(given, usual, strict=True)]
    source, text, heldout = given
    how = {"tokens": options.tokens, "sequence_length": options.length}
    report = grail.compress_checkpoint(
        source,
        options.output / "model",
        grail.Text(text, **how),
        evaluate=grail.Text.held_out(heldout, **how),
        keep=options.keep,
        quantize=options.format,
    )
    for name, row in report.evaluation.items():
        print(f"{name}: perplexity {row.perplexity:.2f}, {row.bytes / 1e6:.1f} MB")
    file = grail.export_gguf(options.output / "model", options.output / "small.gguf")
    checked = "as the folder in llama.cpp" if file.comparison else "llama.cpp is not installed"
    print(f"{file.path}: {file.architecture}, {file.dtype}, {file.bytes / 1e6:.1f} MB, {checked}")
    return file


if __name__ == "__main__":
    main()
