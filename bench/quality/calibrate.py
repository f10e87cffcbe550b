"""A whole compression of a model's shape by phase, against bare forward passes of the same tokens.

    python -m bench.quality.calibrate      SmolLM2-135M on a CPU, Llama-2-7B on a GPU
    python -m bench.quality.calibrate --model smollm2-135m --tokens 32768 --sites mlp,heads
    python -m bench.quality.calibrate --blocks 2 --tokens 1024      a trial of seconds

Weights and tokens are random: time and memory do not depend on them. How to read the table:
docs/benches.md.
"""

import argparse
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import grail
from bench.kernels import cases
from bench.quality.shapes import LLAMAS
from bench.tools.commandline import CommandLine, save
from bench.tools.measuring import Row, bare_seconds, percentiles, quantiles
from bench.tools.tables import aligned
from grail.report.report import Report

MODELS: dict[str, dict[str, Any]] = {
    "smollm2-135m": LLAMAS["smollm2-135m"] | {"vocab_size": 49152, "tie_word_embeddings": True},
    "llama-2-7b": LLAMAS["llama-2-7b"] | {"vocab_size": 32000},
}
# By device: the model, its dtype, tokens, sequence length.
DEFAULTS = {
    "cpu": ("smollm2-135m", torch.float32, 8192, 1024),
    "cuda": ("llama-2-7b", torch.bfloat16, 128 * 2048, 2048),
}
PHASES = ("bare forward", "forward", "gram", "select", "solve", "absorb", "other", "total")


@dataclass(frozen=True)
class Round:
    """Seconds by phase and peak memory in bytes of one round."""

    seconds: dict[str, float]
    predicted_peak: int
    measured_peak: int


def build(shape: dict[str, Any], options: argparse.Namespace) -> Any:
    """A decoder of that shape with random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**shape, max_position_embeddings=options.sequence_length)
    with torch.device(options.device):
        return AutoModelForCausalLM.from_config(config, dtype=options.dtype).eval()


def run_round(shape: dict[str, Any], batches: list[Tensor], options: argparse.Namespace) -> Round:
    """Builds a model, times its bare passes, compresses it.

    Raises:
        ArithmeticError: a site that is worse off than without compensation.
    """
    model = build(shape, options)
    bare = bare_seconds(model, batches, options.device)
    report = grail.compress(
        model,
        batches,
        keep=options.keep,
        sites=options.sites,
        selector=options.selector,
        progress=sys.stderr.isatty(),
    )
    check(report)
    seconds = {phase: report.seconds.get(phase, 0.0) for phase in PHASES}
    return Round({**seconds, "bare forward": bare}, **report.memory)


def check(report: Report) -> None:
    """Refuses a run in which compensation hurt: toward the baseline it cannot.

    Raises:
        ArithmeticError: it did, or an error is not finite.
    """
    for row in report.sites:
        # Weights are rounded to their dtype, which a bf16 error of 2^-8 bounds generously.
        assert row.error is not None
        assert row.baseline_error is not None
        if not row.error <= row.baseline_error * (1 + 2**-8):
            raise ArithmeticError(f"{row.name}: error {row.error}, pruned {row.baseline_error}")


def show(rounds: list[Round]) -> str:
    """The rounds as text."""
    times = {phase: quantiles([r.seconds[phase] for r in rounds]) for phase in PHASES}
    bare = times["bare forward"][1]
    lines = [
        [phase, *(f"{value:.3f}" for value in seconds), f"{100 * seconds[1] / bare:.1f}"]
        for phase, seconds in times.items()
    ]
    last = rounds[-1]
    return (
        aligned(("", "p20", "p50", "p80", "% of bare"), lines)
        + f"\npeak  predicted {last.predicted_peak / 1e6:.0f} MB, "
        + f"measured {last.measured_peak / 1e6:.0f} MB"
    )


def records(rounds: list[Round]) -> list[Row]:
    """A record a number; seconds and bytes."""
    rows = [
        {"metric": phase, "unit": "s"} | percentiles([r.seconds[phase] for r in rounds])
        for phase in PHASES
    ]
    rows += [
        {"metric": metric, "unit": "B", "p50": str(getattr(rounds[-1], metric))}
        for metric in ("predicted_peak", "measured_peak")
    ]
    return [{"kernel": "calibrate"} | row for row in rows]


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints, saves; the exit code is 1 if a result was wrong."""
    options = parse(arguments)
    shape = dict(MODELS[options.model])
    shape["num_hidden_layers"] = options.blocks or shape["num_hidden_layers"]
    generator = torch.Generator().manual_seed(0)
    size = (options.batch_size, options.sequence_length)
    count = -(-options.tokens // (size[0] * size[1]))
    batches = [torch.randint(shape["vocab_size"], size, generator=generator) for _ in range(count)]
    of = {
        "model": options.model,
        "blocks": str(shape["num_hidden_layers"]),
        "dtype": str(options.dtype).removeprefix("torch."),
        "tokens": str(count * size[0] * size[1]),
        "batch": "x".join(map(str, size)),
        "sites": "+".join(options.sites),
        "selector": options.selector,
        "keep": str(options.keep),
    }
    print(", ".join(f"{name} {value}" for name, value in of.items()), end=", ")
    cases.announce(options.device)
    try:
        rounds = [run_round(shape, batches, options) for _ in range(options.repeats)]
    except ArithmeticError as wrong:
        print(wrong)
        return 1
    print(show(rounds))
    save(options, [row | of for row in records(rounds)])
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, with defaults filled in."""
    parser = CommandLine(
        __doc__,
        *("keep", "device", "threads", "repeats", "write"),
        takes="about 4 minutes on 2 cores with the defaults",
        results="calibrate{device}",
        repeats={"default": 3, "help": "rounds (default 3)"},
    )
    parser.add_argument("--model", choices=[*MODELS], help="default: by device")
    parser.add_argument("--blocks", type=int, help="fewer blocks than the model has")
    parser.add_argument("--tokens", type=int, help="default: 8192 on a CPU, 262144 on a GPU")
    parser.add_argument("--sequence-length", type=int, help="default: 1024 on a CPU, 2048 on a GPU")
    parser.add_argument("--batch-size", type=int, default=1, help="sequences a batch (default 1)")
    parser.add_argument("--sites", default="mlp", help="mlp, heads or mlp,heads (default mlp)")
    parser.add_argument("--selector", default="greedy", help="see grail.select (default greedy)")
    options = parser.read(arguments)
    model, options.dtype, tokens, length = DEFAULTS[options.device]
    options.model = options.model or model
    options.tokens = options.tokens or tokens
    options.sequence_length = options.sequence_length or min(length, options.tokens)
    options.sites = tuple(options.sites.split(","))
    numbers = (options.tokens, options.sequence_length, options.batch_size, options.blocks or 1)
    if min(numbers) < 1:
        parser.error("sizes are at least 1")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
