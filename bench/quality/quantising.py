"""SmolLM2-135M with half of each MLP, quantised with Grams: perplexity beside rounding to nearest.

    python -m bench.quality.quantising                 all texts
    python -m bench.quality.quantising --text brown    one

For each text the model is compressed and restored, then rounded to nearest, quantised by
`grail.quantize`, and quantised in the run that compresses it (`quantize="q4_1"`). Rows are
perplexity on the held-out half of the text, in torch with the values that a GGUF file holds, and
bits a weight of that file. Results are bench/results/quantising.csv. A killed run resumes.
"""

import copy
import time
from collections.abc import Callable
from typing import Any

import grail
from bench.quality.endtoend import LENGTH, Subject
from bench.tools.commandline import CommandLine
from bench.tools.measuring import Table
from grail.algebra.grids import FORMATS
from grail.files.grids import stored_bytes
from grail.networks import find
from grail.run.quantizer import round_all
from grail.runtime.transaction import Transaction

# Calibration and held-out tokens.
TOKENS = {"brown": (8 * LENGTH, 8 * LENGTH), "python": (16 * LENGTH, 8 * LENGTH)}
KEEP = 0.5
KEY = ("text", "model", "format")


class Measurement:
    """The models of one text, each made when a row of it is missing."""

    def __init__(self, text: str, subject: Subject):
        own, heldout = TOKENS[text]
        self._subject = subject
        self.calibration = subject.batches(text, "calibration", own)
        self.heldout = subject.batches(text, "heldout", heldout)
        self._halved: Any = None

    def dense(self, _: str) -> Any:
        """Returns the dense model."""
        return self._subject.model

    def restored(self, _: str) -> Any:
        """Returns the compressed model in fp32."""
        if self._halved is None:
            made = self._subject.compressed(self.calibration, keep=KEEP, multiple=32)
            self._halved = made[0]
        return self._halved

    def nearest(self, name: str) -> Any:
        """Returns the compressed model, rounded to nearest."""
        model = copy.deepcopy(self.restored(name))
        with Transaction() as transaction:
            round_all(model, find(model), FORMATS[name], transaction)
        return model

    def quantised(self, name: str) -> Any:
        """Returns the compressed model, quantised by GPTQ."""
        model = copy.deepcopy(self.restored(name))
        grail.quantize(model, self.calibration, name, progress=False)  # type: ignore[arg-type]
        return model

    def at_once(self, name: str) -> Any:
        """Returns the model that one run compresses and quantises."""
        return self._subject.compressed(self.calibration, keep=KEEP, quantize=name)[0]


MODELS: dict[str, Callable[[Measurement, str], Any]] = {
    "dense": Measurement.dense,
    "restored": Measurement.restored,
    "rounded to nearest": Measurement.nearest,
    "GPTQ": Measurement.quantised,
    "GPTQ in the run that compresses": Measurement.at_once,
}


def measure(text: str, out: Table, subject: Callable[[], Subject]) -> None:
    """Adds the missing rows of a text."""
    rows = [(name, "fp32") for name in list(MODELS)[:2]]
    rows += [(name, kind) for kind in FORMATS for name in list(MODELS)[2:]]
    missing = [row for row in rows if not out.measured(text, *row)]
    if not missing:
        return
    of = Measurement(text, subject())
    for name, kind in missing:
        start = time.process_time()
        model = MODELS[name](of, kind)
        seconds = time.process_time() - start
        found = grail.evaluate(model, of.heldout, progress=False)
        weights = sum(p.numel() for p in model.parameters())
        out.add(
            {
                "text": text,
                "model": name,
                "format": kind,
                "keep": 1.0 if name == "dense" else KEEP,
                "perplexity": round(found.perplexity, 4),
                "bits": round(8 * stored_bytes(model) / weights, 2),
                "cpu_seconds": round(seconds, 1),
                "calibration_tokens": sum(batch.numel() for batch in of.calibration),
                "heldout_tokens": found.tokens,
            }
        )


def main() -> None:
    """Measures the texts that are named."""
    parser = CommandLine(__doc__, rows="quantising", takes="half an hour on 2 cores")
    parser.add_argument("--text", choices=list(TOKENS), help="this one alone")
    made: list[Subject] = []

    def subject() -> Subject:
        if not made:
            made.append(Subject())
        return made[0]

    options = parser.read()
    for text in TOKENS if options.text is None else [options.text]:
        measure(text, Table(options.output, KEY), subject)


if __name__ == "__main__":
    main()
