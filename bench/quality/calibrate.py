"""A whole compression by phase and recipe, against bare forward passes of the same tokens.

    python -m bench.quality.calibrate      SmolLM2-135M on a CPU, Llama-2-7B on a GPU
    python -m bench.quality.calibrate --designs paper,default --tokens 32768 --sites mlp,heads
    python -m bench.quality.calibrate --blocks 2 --tokens 1024      a trial of seconds

The designs take turns in every round, each on a copy of the same model. SmolLM2 has its real
weights and reads Python's language reference; Llama-2-7B is a shape with random weights and tokens.
How to read the table: docs/benches.md.
"""

import argparse
import copy
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import grail
from bench.kernels import cases
from bench.quality.shapes import LLAMAS
from bench.tools import assets
from bench.tools.commandline import CommandLine, save
from bench.tools.measuring import Row, bare_seconds, percentiles, quantiles
from bench.tools.tables import aligned
from grail.report.report import Report

MODELS: dict[str, dict[str, Any] | None] = {
    "smollm2-135m": None,  # real, as installed
    "llama-2-7b": LLAMAS["llama-2-7b"] | {"vocab_size": 32000},
}
# By device: the model, its dtype, tokens, sequence length.
DEFAULTS = {
    "cpu": ("smollm2-135m", torch.float32, 16384, 1024),
    "cuda": ("llama-2-7b", torch.bfloat16, 128 * 2048, 2048),
}
# What `grail.compress` is called with, by name: one stream, two streams, one and a half.
DESIGNS: dict[str, dict[str, Any]] = {
    "paper": {"recipe": "paper"},
    "default": {"recipe": "default"},
    "half": {"recipe": "default", "dense_share": 0.5},
}
BARE = "bare forward"
PHASES = ("forward", "gram", "select", "solve", "absorb", "other", "total")


@dataclass(frozen=True)
class Round:
    """Seconds by phase and peak memory in bytes of one compression."""

    seconds: dict[str, float]
    predicted_peak: int
    measured_peak: int


def build(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model with as many blocks as asked for and its tokenizer, if it is more than a shape."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = MODELS[options.model]
    if shape is None:
        model, tokenizer = grail.load_model(assets.smollm2())
        if options.blocks:
            model.model.layers = model.model.layers[: options.blocks]
            model.config.num_hidden_layers = options.blocks
        return model.to(options.device), tokenizer
    shape = dict(shape)
    shape["num_hidden_layers"] = options.blocks or shape["num_hidden_layers"]
    config = LlamaConfig(**shape, max_position_embeddings=options.sequence_length)
    with torch.device(options.device):
        return AutoModelForCausalLM.from_config(config, dtype=options.dtype).eval(), None


def batches_of(tokenizer: Any, options: argparse.Namespace) -> list[Tensor]:
    """Token ids [B, L] of a text for the real model, random ones for a shape."""
    shape, length = MODELS[options.model], options.sequence_length
    count = -(-options.tokens // (options.batch_size * length))
    if shape is not None:
        generator = torch.Generator().manual_seed(0)
        size = (count * options.batch_size, length)
        ids = torch.randint(shape["vocab_size"], size, generator=generator)
        return list(ids.split(options.batch_size))
    return list(
        grail.token_batches(
            assets.python_reference().values(),
            tokenizer,
            tokens=count * options.batch_size * length,
            sequence_length=length,
            batch_size=options.batch_size,
        )
    )


def run_round(
    model: Any, batches: list[Tensor], design: dict[str, Any], options: argparse.Namespace
) -> Round:
    """Compresses a copy of the model.

    Raises:
        ArithmeticError: a site that is worse off than without compensation.
    """
    report = grail.compress(
        copy.deepcopy(model),
        batches,
        keep=options.keep,
        sites=options.sites,
        progress=sys.stderr.isatty(),
        **design,
    )
    check(report)
    seconds = {phase: report.seconds.get(phase, 0.0) for phase in PHASES}
    return Round(seconds, **report.memory)


def check(report: Report) -> None:
    """Refuses a run in which compensation hurt: toward the baseline it cannot.

    Raises:
        ArithmeticError: it did, or an error is not finite.
    """
    if report.settings["toward"] != "baseline":
        return
    for row in report.sites:
        # Weights are rounded to their dtype, which a bf16 error of 2^-8 bounds generously.
        assert row.error is not None
        assert row.baseline_error is not None
        if not row.error <= row.baseline_error * (1 + 2**-8):
            raise ArithmeticError(f"{row.name}: error {row.error}, pruned {row.baseline_error}")


def show(bare: list[float], rounds: dict[str, list[Round]]) -> str:
    """The rounds as text: seconds, and percent of the bare forward."""
    whole = quantiles(bare)
    lines = [["", BARE, *(f"{value:.3f}" for value in whole), "100.0"]]
    for design, of_design in rounds.items():
        for phase in PHASES:
            seconds = quantiles([r.seconds[phase] for r in of_design])
            share = 100 * seconds[1] / whole[1]
            lines.append([design, phase, *(f"{value:.3f}" for value in seconds), f"{share:.1f}"])
    peaks = (
        f"{design}: peak predicted {of_design[-1].predicted_peak / 1e6:.0f} MB, "
        f"measured {of_design[-1].measured_peak / 1e6:.0f} MB"
        for design, of_design in rounds.items()
    )
    return "\n".join([aligned(("", "", "p20", "p50", "p80", "% of bare"), lines), *peaks])


def records(bare: list[float], rounds: dict[str, list[Round]]) -> list[Row]:
    """A record a number; seconds and bytes."""
    rows: list[Row] = [{"design": "", "metric": BARE, "unit": "s"} | percentiles(bare)]
    for design, of_design in rounds.items():
        rows += [
            {"design": design, "metric": phase, "unit": "s"}
            | percentiles([r.seconds[phase] for r in of_design])
            for phase in PHASES
        ]
        rows += [
            {"design": design, "metric": metric, "unit": "B", "p50": str(peak)}
            for metric, peak in (
                ("predicted_peak", of_design[-1].predicted_peak),
                ("measured_peak", of_design[-1].measured_peak),
            )
        ]
    return [{"kernel": "calibrate"} | row for row in rows]


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints, saves; the exit code is 1 if a result was wrong."""
    options = parse(arguments)
    model, tokenizer = build(options)
    batches = batches_of(tokenizer, options)
    of = {
        "model": options.model,
        "blocks": str(model.config.num_hidden_layers),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "tokens": str(sum(batch.numel() for batch in batches)),
        "batch": f"{options.batch_size}x{options.sequence_length}",
        "sites": "+".join(options.sites),
        "keep": str(options.keep),
    }
    print(", ".join(f"{name} {value}" for name, value in of.items()), end=", ")
    cases.announce(options.device)
    bare: list[float] = []
    rounds: dict[str, list[Round]] = {design: [] for design in options.designs}
    try:
        for _ in range(options.repeats):
            bare.append(bare_seconds(model, batches, options.device))
            for design, of_design in rounds.items():
                of_design.append(run_round(model, batches, DESIGNS[design], options))
    except ArithmeticError as wrong:
        print(wrong)
        return 1
    print(show(bare, rounds))
    save(options, [row | of for row in records(bare, rounds)])
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, with defaults filled in."""
    parser = CommandLine(
        __doc__,
        *("keep", "device", "threads", "repeats"),
        takes="about 15 minutes on 2 cores with the defaults",
        results="calibrate{device}",
        repeats={"default": 3, "help": "rounds (default 3)"},
    )
    parser.add_argument("--model", choices=[*MODELS], help="default: by device")
    parser.add_argument(
        "--designs", default=",".join(DESIGNS), help="some of %(default)s (default all)"
    )
    parser.add_argument("--blocks", type=int, help="fewer blocks than the model has")
    parser.add_argument("--tokens", type=int, help="default: 16384 on a CPU, 262144 on a GPU")
    parser.add_argument("--sequence-length", type=int, help="default: 1024 on a CPU, 2048 on a GPU")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences a batch (default 1)")
    parser.add_argument("--sites", default="mlp", help="mlp, heads or mlp,heads (default mlp)")
    options = parser.read(arguments)
    model, options.dtype, tokens, length = DEFAULTS[options.device]
    options.model = options.model or model
    options.tokens = options.tokens or tokens
    options.sequence_length = options.sequence_length or min(length, options.tokens)
    options.sites = tuple(options.sites.split(","))
    options.designs = options.designs.split(",")
    if unknown := [name for name in options.designs if name not in DESIGNS]:
        parser.error(f"--designs: {unknown[0]!r} is none of {', '.join(DESIGNS)}")
    numbers = (options.tokens, options.sequence_length, options.batch_size, options.blocks or 1)
    if min(numbers) < 1:
        parser.error("sizes are at least 1")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
