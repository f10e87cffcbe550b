"""The job of `make demo`: a real language model with 80% and with 50% of its MLP channels.

    python -m bench.report.demo                      writes models and pages into demo-out
    python -m bench.report.demo --output /tmp/demo   elsewhere

SmolLM2-135M-Instruct (Apache-2.0) is pruned and compensated at two shares, a usable one and one
that is not. Calibration and held-out text are disjoint halves of the Python language reference; a
second held-out text, of another kind, is source code of the standard library. Both are part of
CPython (PSF licence). Each share is a `grail compress --keep`.
"""

import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import grail
from bench.tools import texts
from bench.tools.assets import python_reference, smollm2, split_topics, write_texts
from bench.tools.commandline import CommandLine
from grail.commands.console import print_table
from grail.report.formatting import format_seconds
from grail.report.report import Report
from grail.report.summary import evaluation_table, labelled, verdict
from grail.report.texts import text_table
from grail.run.workflow import started_by

KEEPS = (0.8, 0.5)
# Each share takes three compressions, of 1.5 to 2.5 forward passes over the calibration, and four
# evaluations: together within 10 minutes on 2 cores.
CALIBRATION_TOKENS = 6 * 1024
HELDOUT_TOKENS = 4 * 1024
BATCH_SIZE = 2


def main() -> None:
    """Writes the texts, compresses at each share, and prints one table of all models."""
    parser = CommandLine(
        __doc__,
        "output",
        writes="models, pages and reports into --output, texts into --texts",
        takes="up to 10 minutes on 2 cores",
        output={"default": Path("demo-out"), "help": "replaced if there (default %(default)s)"},
    )
    parser.add_argument("--texts", type=Path, default=Path(".assets"), help="folder for the texts")
    arguments = parser.read()
    calibration, heldout = written(arguments.texts)
    _replace(arguments.output)
    start = time.perf_counter()
    reports = compressed(smollm2(), calibration, heldout, arguments.output)
    dense, *_ = reports.values()
    rows = {"dense": dense.evaluation["dense"]}
    for keep, report in reports.items():
        narrow = {role: row for role, row in report.evaluation.items() if role != "dense"}
        rows |= labelled(narrow, f"keep {keep:g}: ")
    print_table(*text_table(rows), words=2)
    print_table(*evaluation_table(rows))
    for report in reports.values():
        print(verdict(report))
    for keep in reports:
        print(f"keep {keep:g}  {folder(arguments.output, keep)}: model, report.html, README.md")
    print(f"time      {format_seconds(time.perf_counter() - start)}")


def written(folder: Path) -> tuple[Path, list[Path]]:
    """Writes the texts; returns that of the calibration, and those held out, its own kind first."""
    calibration, heldout = write_texts("python", split_topics(python_reference()), folder)
    _, other = write_texts("source", texts.TEXTS["source"].halves(folder), folder)
    return calibration, [heldout, other]


def compressed(
    model: Path, calibration: Path, heldout: Sequence[Path], output: Path
) -> dict[float, Report]:
    """By share, the report of the model that was written there."""
    held_out = [
        grail.Text.held_out(str(text), tokens=HELDOUT_TOKENS, batch_size=BATCH_SIZE)
        for text in heldout
    ]
    with started_by(shlex.join(["python", "-m", "bench.report.demo", *sys.argv[1:]])):
        return {
            keep: grail.compress_checkpoint(
                model,
                folder(output, keep),
                grail.Text(str(calibration), CALIBRATION_TOKENS, batch_size=BATCH_SIZE),
                evaluate=held_out,
                keep=keep,
                sites="mlp",
            )
            for keep in KEEPS
        }


def folder(output: Path, keep: float) -> Path:
    """The folder of the model of a share."""
    return output / f"keep-{keep:g}"


def _replace(output: Path) -> None:
    """Deletes the output of an earlier demo, and nothing else."""
    for keep in KEEPS:
        if (folder(output, keep) / "report.json").is_file():
            shutil.rmtree(folder(output, keep))
    output.mkdir(parents=True, exist_ok=True)


if __name__ == "__main__":
    main()
