"""SmolLM2-135M, compressed and restored: perplexity, by keep ratio, text length and ridge.

    python -m bench.quality.endtoend table          keep × sites: dense, pruned, the paper's, ours
    python -m bench.quality.endtoend calibration    calibration length × alpha, on two domains

Results are bench/results/smollm2_{table,calibration}.csv. A killed run resumes. The texts are
described in docs/benches.md.
"""

import copy
import sys
from pathlib import Path
from typing import Any

import torch

import grail
from bench.tools import assets, texts
from bench.tools.commandline import CommandLine
from bench.tools.measuring import Table
from grail.files.load import load_model
from grail.files.packing import token_batches
from grail.report._evaluate import evaluate
from grail.report.report import Evaluation, Report

TEXTS = Path(".assets")
LENGTH = texts.LENGTH
WRITTEN = "written"  # text by the dense model itself, from the token between documents
WRITTEN_TOKENS = 16 * LENGTH
BEGIN = "<|endoftext|>"  # between the documents on which SmolLM2 was trained
# In the order of measuring.
CELLS = [
    *((text, "mlp", 0.5) for text in ("documentation", "technical", "passages")),
    *(("brown", sites, 0.5) for sites in ("mlp", "heads", "mlp,heads")),
    *((text, "mlp", 0.75) for text in ("documentation", "technical", "passages")),
    *(("brown", sites, 0.7) for sites in ("mlp", "heads", "mlp,heads")),
    *(("brown", "mlp", keep) for keep in (0.9, 0.8, 0.6)),
]
# The paper's selector, target and ridge; the defaults.
PAPER: dict[str, Any] = {"selector": "wanda", "alpha": 1e-3, "drift_correction": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    "pruned": {"selector": "wanda", "compensate": False},
    "paper": PAPER,
    "restored": {},
}
# Of some cells also: widths by the measured cost of narrowing each block; a setting.
UNEVEN = "restored, uneven widths"
_MEASURED = (
    *(("technical", "mlp", 0.5), ("passages", "mlp", 0.5), ("passages", "mlp", 0.75)),
    *(("technical", "mlp", 0.75), ("brown", "mlp", 0.5), ("brown", "mlp,heads", 0.7)),
)
OTHERS: dict[tuple[str, str, float], dict[str, dict[str, Any]]] = {
    cell: {UNEVEN: {}} for cell in _MEASURED
}
OTHERS["passages", "mlp", 0.5]["restored, tokens weighted"] = {"token_weights": True}
LENGTHS, ALPHAS = (8192, 32768, 131072), (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)


class Subject:
    """The dense model, and batches of a text's calibration or held-out half."""

    def __init__(self) -> None:
        self._on_disk: set[str] = set()
        self.model, self.tokenizer = load_model(assets.smollm2())

    def batches(self, text: str, half: str, tokens: int) -> list[torch.Tensor]:
        """Returns sequences of `LENGTH` tokens, one a batch; `WRITTEN` has a calibration half."""
        if text == WRITTEN:
            return self._by_itself(tokens)
        if text not in self._on_disk:
            assets.write_texts(text, texts.TEXTS[text].halves(TEXTS), TEXTS)
            self._on_disk.add(text)
        return token_batches(
            TEXTS / f"{text}-{half}.txt",
            self.tokenizer,
            tokens=tokens,
            sequence_length=LENGTH,
            batch_size=1,
            seed=texts.TEXTS[text].seed,
        )

    def _by_itself(self, tokens: int) -> list[torch.Tensor]:
        """Returns sequences that the dense model has written, once."""
        path = TEXTS / f"{WRITTEN}.jsonl"
        grail.generate_calibration(
            assets.smollm2(), path, tokens=WRITTEN_TOKENS, begin=BEGIN, progress=False
        )
        return token_batches(
            path, self.tokenizer, tokens=tokens, sequence_length=LENGTH, batch_size=1
        )

    def compressed(self, calibration: list[torch.Tensor], **settings: Any) -> tuple[Any, Report]:
        """A compressed copy and its report."""
        model = copy.deepcopy(self.model)
        return model, grail.compress(model, calibration, progress=sys.stderr.isatty(), **settings)


def table(folder: Path) -> None:
    """Every model of every cell, on held-out text."""
    out = Table(folder / "smollm2_table.csv", ("text", "sites", "keep", "model"))
    subject = Subject()
    for text, sites, keep in CELLS:
        models = MODELS | OTHERS.get((text, sites, keep), {})
        missing = [name for name in models if not out.measured(text, sites, keep, name)]
        dense_missing = not out.measured(text, "", 1.0, "dense")
        if not (missing or dense_missing):  # nor is its text to be fetched and cut
            continue
        of = texts.TEXTS[text]
        calibration = subject.batches(text, "calibration", of.calibration)
        heldout = subject.batches(text, "heldout", of.heldout)
        if dense_missing:
            dense = evaluate(subject.model, heldout, progress=False)
            out.add(_table_row(text, "", 1.0, "dense", dense, None))
        for name in missing:
            kinds = tuple(sites.split(","))
            chosen = {"keep": keep, "sites": kinds, **models[name]}
            if name == UNEVEN:
                cost = grail.sensitivity(subject.model, calibration, keep, kinds, progress=False)
                chosen["keep"] = cost.shares()
            model, report = subject.compressed(calibration, **chosen)
            result = evaluate(model, heldout, progress=False)
            out.add(_table_row(text, sites, keep, name, result, report))


def _table_row(
    text: str, sites: str, keep: float, name: str, result: Evaluation, report: Report | None
) -> dict[str, Any]:
    errors = [site.error for site in report.sites] if report else []
    settings = report.settings if report else {}
    return {
        "text": text,
        "sites": sites,
        "keep": keep,
        "model": name,
        "perplexity": round(result.perplexity, 4),
        "parameters": result.parameters,
        "bytes": result.bytes,
        **{k: settings.get(k, "") for k in ("selector", "alpha", "drift_correction", "toward")},
        "widths": " ".join(f"{k}={v}" for k, v in report.model["widths"]["after"].items())
        if report
        else "",
        "mean_error": round(sum(errors) / len(errors), 5) if errors else "",
        "calibration_tokens": report.calibration["tokens"] if report else "",
        "heldout_tokens": result.tokens,
    }


def calibration(folder: Path, keep: float = 0.5, heldout_tokens: int = 8 * LENGTH) -> None:
    """MLP at one keep ratio: how much text and which ridge, on the text's domain and another."""
    out = Table(folder / "smollm2_calibration.csv", ("calibration_tokens", "alpha", "toward"))
    subject = Subject()
    heldout = {t: subject.batches(t, "heldout", heldout_tokens) for t in ("brown", "python")}
    todo = [(n, a, "baseline") for n in LENGTHS for a in ALPHAS]
    todo += [(LENGTHS[1], a, "zero") for a in ALPHAS[3:]]
    for tokens, alpha, toward in todo:
        if out.measured(tokens, alpha, toward):
            continue
        batches = subject.batches("brown", "calibration", tokens)
        settings = {**PAPER, "keep": keep, "alpha": alpha, "toward": toward}
        model, report = subject.compressed(batches, **settings)
        row = {
            "calibration_tokens": tokens,
            "alpha": alpha,
            "toward": toward,
            "sites": "mlp",
            "keep": keep,
            "selector": report.settings["selector"],
        }
        for text, held in heldout.items():
            row[f"perplexity_{text}"] = round(evaluate(model, held, progress=False).perplexity, 4)
        out.add({**row, "heldout_tokens": heldout_tokens})


def main() -> None:
    """Measures one part."""
    parser = CommandLine(__doc__, rows="smollm2_*", takes="hours on 2 cores")
    parts = {"table": table, "calibration": calibration}
    parser.add_argument("part", choices=parts, help="the experiment to run")
    options = parser.read()
    parts[options.part](options.output)


if __name__ == "__main__":
    main()
