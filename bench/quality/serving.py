"""SmolLM2-135M, compressed, as files of llama.cpp: logits, perplexity, bytes and tokens per second.

    make serving                                              the environment, once
    .serving/env/bin/python -m bench.quality.serving          all steps
    .serving/env/bin/python -m bench.quality.serving --only speed --again

Steps: `models` compresses, `files` exports and quantises, `quality` compares each file with its
folder and computes perplexity in llama.cpp, `speed` measures all files of a format in turns.
Results are bench/results/serving.csv, a row for each model and format. What is there is not done
again. Columns are described in docs/benches.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

import grail
from bench.quality.endtoend import LENGTH, TEXTS, Subject
from bench.tools import assets, texts
from bench.tools.commandline import CommandLine
from bench.tools.measuring import ROOT, Row, machine, read_rows, write_rows
from grail.serving.gguf_writing import check_gguf

HOME = ROOT / ".serving" / "models"
TEXT = "brown"
HELDOUT = 8 * LENGTH  # tokens
STOCK = ("Q8_0", "Q4_1", "Q4_K_M")  # by llama-quantize
OWN = {"Q8_0 by grail": "q8_0", "Q4_1 by grail": "q4_1"}  # by grail export --quantize
FORMATS = ("F32", *STOCK, *OWN)
NEW, BATCHES = 64, (1, 8)  # tokens that are decoded, and sequences


@dataclass(frozen=True)
class Model:
    """A compressed model.

    Args:
        name: of the row, and of the files.
        keep: share of the channels of each MLP, or on average.
        heads: share of the groups of query heads.
        uneven: widths by the measured loss of narrowing each block.
    """

    name: str
    keep: float = 1.0
    heads: float = 1.0
    uneven: bool = False

    @property
    def folder(self) -> Path:
        """The folder that `grail.export` writes."""
        return HOME / self.name.replace(" ", "-")

    def file(self, kind: str) -> Path:
        """The file of a format."""
        return HOME / f"{self.name}-{kind}.gguf".replace(" ", "-").lower()


# Two of three groups of query heads stay.
MODELS = (
    Model("dense"),
    *(
        model
        for keep in (0.5, 0.75)
        for model in (
            Model(f"even {keep}", keep),
            Model(f"uneven {keep}", keep, uneven=True),
            Model(f"heads {keep}", keep, heads=2 / 3),
        )
    ),
)


class Bench:
    """The dense model, the texts and the rows, which all steps use.

    Args:
        path: of the CSV.
        threads: of llama.cpp.
        tokens: of the calibration.
        heldout: tokens whose perplexity is measured.
    """

    def __init__(self, path: Path, threads: int, tokens: int, heldout: int = HELDOUT):
        self.path, self.threads, self.tokens, self.heldout = path, threads, tokens, heldout
        self._rows = read_rows(path) if path.exists() else []

    @cached_property
    def subject(self) -> Subject:
        """The dense model and texts."""
        return Subject()

    def row(self, model: Model, kind: str) -> Row | None:
        """Returns the row of a model in a format; None if it is not there."""
        keys = (model.name, kind)
        return next((row for row in self._rows if (row["model"], row["format"]) == keys), None)

    def put(self, model: Model, kind: str, values: dict[str, Any]) -> None:
        """Writes columns of a row at once; what it had in others stays."""
        row = self.row(model, kind)
        if row is None:
            row = {"model": model.name, "format": kind}
            self._rows.append(row)
        row.update({name: str(value) for name, value in values.items()})
        order = [(m.name, k) for k in FORMATS for m in MODELS]
        self._rows.sort(key=lambda row: order.index((row["model"], row["format"])))
        partial = self.path.with_suffix(".partial")
        write_rows(partial, self._rows)
        partial.replace(self.path)
        print(", ".join(f"{name}={value}" for name, value in row.items()), flush=True)


def models(bench: Bench, wanted: Sequence[Model]) -> None:
    """Compresses: one folder a model."""
    for model in wanted:
        if not model.folder.exists():
            print(f"{model.name}: compressing …", flush=True)
            compress(model, bench.subject, bench.tokens)


def compress(model: Model, subject: Subject, tokens: int) -> None:
    """Writes the folder of a model, calibrated on so many tokens."""
    model.folder.parent.mkdir(parents=True, exist_ok=True)
    if model.keep == 1:
        grail.export(subject.model, subject.tokenizer, model.folder)
        return
    calibration = subject.batches(TEXT, "calibration", tokens)
    keep: dict[str, float] = {"mlp": model.keep}
    if model.heads < 1:
        keep["heads"] = model.heads
    kinds = tuple(keep)
    if model.uneven:
        keep = grail.sensitivity(
            subject.model, calibration, model.keep, kinds, progress=False
        ).shares()
    network, report = subject.compressed(calibration, keep=keep, sites=kinds)
    uneven = bool(report.model["beyond_configuration"])
    grail.export(network, subject.tokenizer, model.folder, report, uneven=uneven)


def files(bench: Bench, wanted: Sequence[Model], kinds: Iterable[str]) -> None:
    """Exports and quantises: a file for each model and format."""
    template = assets.smollm2()
    for model in wanted:
        plain = model.file("F32")
        if not plain.exists():
            print(f"{model.name}: exporting …", flush=True)
            grail.export_gguf(model.folder, plain, template)
        for kind in kinds:
            if not model.file(kind).exists():
                print(f"{model.name}: {kind} …", flush=True)
                quantise(bench, model, kind, template)


def quantise(bench: Bench, model: Model, kind: str, template: Path) -> None:
    """Writes the file of a format."""
    target = model.file(kind)
    partial = target.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    if kind in STOCK:
        tool = Path(sys.executable).with_name("llama-quantize")
        command = [str(tool), str(model.file("F32")), str(partial), kind, str(bench.threads)]
    else:
        assets.write_texts(TEXT, texts.TEXTS[TEXT].halves(TEXTS), TEXTS)
        command = [sys.executable, "-m", "grail", "export", str(model.folder)]
        command += ["--gguf", str(partial), "--like", str(template), "--quantize", OWN[kind]]
        command += ["--calibration", str(TEXTS / f"{TEXT}-calibration.txt")]
        command += ["--tokens", str(bench.tokens), "--sequence-length", str(LENGTH)]
    _said(command)
    partial.rename(target)


def quality(bench: Bench, wanted: Sequence[Model], kinds: Iterable[str], again: bool) -> None:
    """Compares each file with its folder, and computes its perplexity in llama.cpp."""
    tokens = torch.cat(bench.subject.batches(TEXT, "heldout", bench.heldout)).int().numpy()
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "tokens.npy"
        np.save(given, tokens)
        for kind in kinds:
            for model in wanted:
                row = bench.row(model, kind)
                if again or row is None or not row.get("perplexity"):
                    bench.put(model, kind, measured(bench, model, kind, given))


def measured(bench: Bench, model: Model, kind: str, tokens: Path) -> dict[str, Any]:
    """Returns the columns of a file that are not of its speed."""
    import gguf

    file = model.file(kind)
    comparison = check_gguf(model.folder, file)
    assert comparison is not None  # llama.cpp is installed
    reader = gguf.GGUFReader(file)
    architecture = reader.fields["general.architecture"].contents()
    widths = reader.fields[f"{architecture}.feed_forward_length"].contents()
    widths = widths if isinstance(widths, list) else [widths]
    command = [sys.executable, "-m", "bench.quality.llama_perplexity"]
    found = json.loads(_said([*command, str(file), str(tokens), str(bench.threads)]))
    return {
        "architecture": architecture,
        "widths": f"{min(widths)}-{max(widths)}" if len(set(widths)) > 1 else widths[0],
        "bytes": file.stat().st_size,
        "difference": f"{comparison.share:.2e}",
        "agreement": round(comparison.agreement, 4),
        "perplexity": round(found["perplexity"], 4),
        "text": TEXT,
        "heldout_tokens": found["tokens"],
        "calibration_tokens": _calibration_tokens(model),
        "runtime": comparison.runtime,
        **{name: machine("cpu")[name] for name in ("device", "torch", "commit", "date")},
    }


def _calibration_tokens(model: Model) -> int:
    """Returns how many tokens a folder was calibrated with; 0 for the dense one."""
    report = model.folder / "report.json"
    if not report.exists():
        return 0
    return int(json.loads(report.read_text(encoding="utf-8"))["calibration"]["tokens"])


def speed(
    bench: Bench,
    wanted: Sequence[Model],
    kinds: Iterable[str],
    again: bool,
    rounds: int,
    prompt: int,
) -> None:
    """Measures all files of a format in turns, beside the dense one; those by grail as well."""
    for kind in kinds:
        if kind in OWN:  # with the files of its format
            continue
        formats = (kind, *(own for own in OWN if own.startswith(f"{kind} ")))
        chosen = [(m, k) for k in formats for m in wanted if m.file(k).exists()]
        rows = [bench.row(*each) or {} for each in chosen]
        if chosen and (again or not all(row.get("decode_1") for row in rows)):
            for model, form, columns in timed(bench, chosen, rounds, prompt):
                bench.put(model, form, columns)


def timed(
    bench: Bench, chosen: Sequence[tuple[Model, str]], rounds: int, prompt: int
) -> Iterator[tuple[Model, str, dict[str, Any]]]:
    """Measures files beside the first; returns model, format and columns of each.

    Tokens per second are of CPU seconds on one thread, else of the clock.
    """
    by_file = {str(model.file(kind)): (model, kind) for model, kind in chosen}
    rows = grail.measure_speed(
        list(by_file),
        next(iter(by_file)),
        prompt=prompt,
        new=NEW,
        batches=BATCHES,
        rounds=rounds,
        threads=bench.threads,
    )
    conditions = {name: machine("cpu")[name] for name in ("load", "commit", "date")}
    conditions |= {"threads": str(bench.threads), "rounds": str(rounds), "prompt": str(prompt)}
    for file, (model, kind) in by_file.items():
        columns: dict[str, Any] = {}
        for row in (row for row in rows if row.file == file):
            seconds = row.cpu if row.threads == 1 else row.wall
            name = f"{row.phase}_{row.batch}"
            columns[name] = f"{row.count / float(np.median(seconds)):.4g}"
            columns[f"{name}_ratio"] = f"{row.ratio:.3f}"
        yield model, kind, columns | {f"speed_{k}": value for k, value in conditions.items()}


def _said(command: Sequence[str]) -> str:
    """Runs a command in the checkout, and returns what it prints; its errors end this process."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows for the page: a file a row; speeds as multiples of the dense file's."""
    header = ["format", "model", "size", "perplexity", "prefill", "decode, batch 1", "batch 8"]
    speeds = ("prefill_1_ratio", "decode_1_ratio", "decode_8_ratio")
    found = []
    for row in rows:
        ratios = (f"{float(row[name]):.2f}×" if row.get(name) else "–" for name in speeds)
        size, loss = f"{int(row['bytes']) / 1e6:.1f} MB", f"{float(row['perplexity']):.2f}"
        found.append([row["format"], row["model"], size, loss, *ratios])
    return header, found


def read(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the options."""
    parser = CommandLine(
        __doc__,
        rows="serving",
        writes="bench/results/serving.csv or --output; models in .serving/models (6 GB)",
        takes="two hours on 2 cores, of which speed is one",
    )
    steps = ("models", "files", "quality", "speed")
    parser.add_argument("--only", action="append", choices=steps, help="may be repeated")
    names = [model.name for model in MODELS]
    parser.add_argument("--model", action="append", choices=names, help="may be repeated")
    parser.add_argument("--format", action="append", choices=FORMATS, help="may be repeated")
    parser.add_argument("--again", action="store_true", help="measure rows that are there")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prefill (256)")
    parser.add_argument("--rounds", type=int, default=5, help="of the speed (default %(default)s)")
    parser.add_argument(
        "--tokens",
        type=int,
        default=texts.TEXTS[TEXT].calibration,
        help="of the calibration (%(default)s)",
    )
    parser.add_argument(
        "--heldout", type=int, default=HELDOUT, help="tokens of the perplexity (%(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, help="of llama.cpp (default 1)")
    options = parser.read(arguments)
    if find_spec("llama_cpp") is None:
        parser.error("llama-cpp-python is not here: make serving, then .serving/env/bin/python")
    options.only = options.only or steps
    options.model = [m for m in MODELS if options.model is None or m.name in options.model]
    options.format = options.format or FORMATS
    return options


def main(arguments: list[str] | None = None) -> None:
    """Runs the steps."""
    options = read(arguments)
    bench = Bench(options.output, options.threads, options.tokens, options.heldout)
    wanted, kinds, again = options.model, options.format, options.again
    if "models" in options.only:
        models(bench, wanted)
    if "files" in options.only:
        files(bench, wanted, kinds)
    if "quality" in options.only:
        quality(bench, wanted, kinds, again)
    if "speed" in options.only:
        speed(bench, wanted, kinds, again, options.rounds, options.prompt)


if __name__ == "__main__":
    main()
