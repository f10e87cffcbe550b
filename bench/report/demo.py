"""The job of `make demo`: a real language model with 80% and with 50% of its MLP channels.

SmolLM2-135M-Instruct (Apache-2.0) is pruned and compensated at two shares, a usable one and one
that is not. Calibration and held-out text are disjoint halves of the Python language reference,
which is part of CPython (PSF licence). Each share is a `grail compress --keep`; the network is
loaded, and the dense one measured, once.
"""

import copy
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from bench.tools.assets import python_reference, smollm2, split_topics, write_texts
from bench.tools.commandline import CommandLine
from grail.commands.console import print_table
from grail.files.load import length_of_sequences, load_model
from grail.files.packing import token_batches
from grail.files.provenance import provenance
from grail.recipe import Recipe
from grail.report.formatting import format_seconds
from grail.report.report import Report
from grail.report.summary import evaluation_table, labelled, verdict
from grail.run.study import LOADING, Study, attribute, text_of
from grail.run.workflow import page_or_note
from grail.runtime.clock import Stages

KEEPS = (0.8, 0.5)
# Each share takes three compressions, of 1.5 to 2.5 forward passes over the calibration, and three
# evaluations: together within 10 minutes on 2 cores.
CALIBRATION_TOKENS = 6 * 1024
HELDOUT_TOKENS = 4 * 1024
BATCH_SIZE = 2

Row = TypeVar("Row")


def main() -> None:
    """Writes the texts, compresses at each share, and prints one table of all models."""
    parser = CommandLine(
        "Compresses SmolLM2-135M at two shares.",
        "output",
        writes="models, pages and reports into --output, texts into --texts",
        takes="up to 10 minutes on 2 cores",
        output={"default": Path("demo-out"), "help": "replaced if there (default %(default)s)"},
    )
    parser.add_argument("--texts", type=Path, default=Path(".assets"), help="folder for the texts")
    arguments = parser.read()
    halves = split_topics(python_reference())
    texts = write_texts("python", halves, arguments.texts)
    _replace(arguments.output)
    start = time.perf_counter()
    reports = compressed(smollm2(), texts, arguments.output)
    dense, *_ = reports.values()
    rows = {"dense": dense.evaluation["dense"]}
    for keep, report in reports.items():
        narrow = {role: row for role, row in report.evaluation.items() if role != "dense"}
        rows |= labelled(narrow, f"keep {keep:g}: ")
    print_table(*evaluation_table(rows))
    for report in reports.values():
        print(verdict(report))
    for keep in reports:
        print(f"keep {keep:g}  {folder(arguments.output, keep)}: model, report.html, README.md")
    print(f"time      {format_seconds(time.perf_counter() - start)}")


def compressed(model: Path, texts: Sequence[Path], output: Path) -> dict[float, Report]:
    """By share, the report of the model that was written there."""
    _say(f"Loading {model} …")
    dense, tokenizer = load_model(model)
    cut = partial(
        token_batches,
        tokenizer=tokenizer,
        sequence_length=length_of_sequences(dense),
        batch_size=BATCH_SIZE,
    )
    calibration = cut(texts[0], tokens=CALIBRATION_TOKENS, seed=0)
    heldout = cut(texts[1], tokens=HELDOUT_TOKENS)
    origin = provenance(
        shlex.join(["python", "-m", "bench.report.demo", *sys.argv[1:]]), str(model)
    )
    origin["calibration"] = text_of(str(texts[0]), calibration)
    origin["evaluation"] = text_of(str(texts[1]), heldout)
    fresh = partial(copy.deepcopy, dense)
    first = Study(None, fresh, tokenizer, calibration, heldout, Stages(), say=_say)
    reports = {}
    for keep in KEEPS:
        # The dense model is measured with the first share.
        known = {"rows": _dense(first.rows), "completions": _dense(first.completions)}
        study = replace(first, network=None, stages=Stages(), **known)
        reports[keep] = _one(study, Recipe(keep, "mlp"), folder(output, keep), origin, model.name)
        first = study
    return reports


def _one(study: Study, options: Recipe, output: Path, origin: dict[str, Any], name: str) -> Report:
    with study.stages(LOADING):
        study.network = study.fresh()
    prediction = study.predict(options, compare=True, uneven=False)
    _say(f"keep {options.keep:g}: {format_seconds(prediction.total)} predicted")
    if "dense" not in study.rows:
        study.measure("dense")
    study.compare(options)
    _say("Compressing …")
    report = study.run(options)
    attribute(report, name, origin)
    study.write(report, prediction, output, page_or_note)
    return report


def folder(output: Path, keep: float) -> Path:
    """The folder of the model of a share."""
    return output / f"keep-{keep:g}"


def _dense(rows: Mapping[str, Row]) -> dict[str, Row]:
    return {role: row for role, row in rows.items() if role == "dense"}


def _replace(output: Path) -> None:
    """Deletes the output of an earlier demo, and nothing else."""
    for keep in KEEPS:
        if (folder(output, keep) / "report.json").is_file():
            shutil.rmtree(folder(output, keep))
    output.mkdir(parents=True, exist_ok=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
