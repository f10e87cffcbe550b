"""A channel selector of your own, compared with built-in ones.

    python examples/own_selector.py --selectors wanda,one-shot,greedy --keep 0.5

The new one, "one-shot", keeps the channels whose removal alone costs most once the others
compensate for it: ‖w_h‖² / [(G + λI)⁻¹]_hh, the saliency of the Optimal Brain Surgeon (Hassibi,
Stork 1992). Each selector prunes the same model, without and with compensation. The defaults need
no network after `make environment`.
"""

import argparse
import copy
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import grail


@grail.select.register("one-shot")
def one_shot(view: grail.select.View) -> Tensor:
    """Scores [H]; the highest stay. `view` has the Gram [H, H] and the consumer's weight [O, H]."""
    gram = view.gram.matrix().double()
    damping = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    inverse = torch.linalg.inv(gram + damping)
    return view.consumer.double().square().sum(0) / inverse.diagonal()


def smollm2_and_texts() -> tuple[Path, list[str], list[str]]:
    """A GGUF file, and documents for calibration and evaluation."""
    sys.path.append(str(Path(__file__).parents[1]))  # bench is of this clone, not installed
    from bench.tools.assets import python_reference, smollm2, split_topics

    return smollm2(), *split_topics(python_reference())


def main(arguments: Iterable[str] | None = None) -> dict[str, tuple[float, float]]:
    """Returns the perplexities without and with compensation by selector."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder, hub name or GGUF file; default: SmolLM2-135M")
    parser.add_argument("--text", help="calibration text, a file or dataset")
    parser.add_argument("--heldout", help="text to evaluate on")
    parser.add_argument("--tokens", type=int, default=4096, help="of each text (%(default)s)")
    parser.add_argument("--length", type=int, default=512, help="of a sequence (%(default)s)")
    parser.add_argument("--keep", type=float, default=0.5, help="share of channels (%(default)s)")
    parser.add_argument(
        "--selectors", default="magnitude,wanda,one-shot,greedy", help="names (%(default)s)"
    )
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
    print(f"dense: perplexity {grail.evaluate(model, unseen, progress=False).perplexity:.2f}")

    found = {}
    for selector in options.selectors.split(","):
        scores = []
        for compensate in (False, True):
            narrow = copy.deepcopy(model)
            settings = {"selector": selector, "compensate": compensate, "progress": False}
            grail.compress(narrow, batches, options.keep, **settings)
            scores.append(grail.evaluate(narrow, unseen, progress=False).perplexity)
        found[selector] = scores[0], scores[1]
        print(f"{selector}: pruned {scores[0]:.2f}, compensated {scores[1]:.2f}")
    return found


if __name__ == "__main__":
    main()
