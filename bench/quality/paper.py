"""The paper's experiments in kind, as far as no other bench measures them.

    python -m bench.quality.paper resnet18     L1, with and without the residual stream; references
    python -m bench.quality.paper clip         the MLPs of a CLIP's vision tower
    python -m bench.quality.paper cost         seconds and peak memory of ResNet-18, ViT and CLIP
    python -m bench.quality.paper cells        SmolLM2, MLP and heads: the paper's table
    python -m bench.quality.paper alphas       SmolLM2, MLP and heads at 0.6: strengths of the ridge
    python -m bench.quality.paper samples      the same: calibration sequences of documentation
    python -m bench.quality.paper others       SmolLM2, MLP and heads at 0.7: all other selectors

Results are bench/results/paper_{resnet18,clip,cost,smollm2,samples}.csv; `python -m
bench.report.paper` puts them beside the paper's. A killed run resumes.
"""

import copy
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import grail
from bench.quality import captions, networks, scores
from bench.quality.endtoend import LENGTH, TEXTS
from bench.quality.endtoend import Subject as LanguageModel
from bench.quality.sweep import (
    AS_PUBLISHED,
    FIRST,
    PAPER,
    SUBJECTS,
    VARIANTS,
    Bench,
    Choice,
    StudyRow,
    Subject,
    fashion,
)
from bench.quality.train import epoch_batches, recipe, train_epoch
from bench.tools import assets
from bench.tools.commandline import CommandLine
from bench.tools.measuring import Table, machine
from grail import select
from grail.report._evaluate import evaluate
from grail.runtime import memory

SHOWN = ("own", "grail", "ours")
# The paper prunes MLPs and heads, and gives perplexities of these selectors.
SITES = ("mlp", "heads")
SELECTORS = ("wanda", "flap", "slimgpt", "wanda++")
CELLS = (0.8, 0.7, 0.5, 0.6, 0.4, 0.3)
SWEPT = ("wanda", "flap")
ALPHAS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
SWEPT_AT = 0.6
OTHERS_AT = 0.7
# Its 128 sequences of 2048 tokens are 24 tokens for each channel of an MLP of 11008; these are 21
# for each of 1536.
SEQUENCES = 32
SIZES = (4, 8, 16, 64, 128, 256)
CALIBRATED, FAR = "technical", "brown"
READ = (CALIBRATED, FAR)  # held-out text of the same kind, and another kind
SIZED = "documentation"  # has text enough for the largest of `SIZES`
HELDOUT = 8 * LENGTH
RESNET_KEEPS = (0.5, 0.35, 0.3)
TRAINED_AT = 0.5
STREAM = ", with the stream"
EPOCHS = 5
L1, TRAINED = "magnitude-l1", f"own, {EPOCHS} epochs"
CLIP_KEEPS, CLIP_SELECTORS = (0.5, 0.3), ("magnitude", "wanda", "folding-kmeans", "greedy")
ROUNDS = 3
DESIGNS = {"paper": {"recipe": "paper"}, "default": {}}
COST_KEEP = 0.5
# The paper's phases: forward passes with their Grams, and all that follows from these.
PHASES = {"calibrate": ("forward", "gram", "other"), "compensate": ("select", "solve", "absorb")}


def language(calibrated: str) -> Subject:
    """SmolLM2, scored on held-out text of the calibration's kind and on `FAR`."""
    model = LanguageModel()
    heldout = {text: model.batches(text, "heldout", HELDOUT) for text in (calibrated, FAR)}

    def score(narrow: Any) -> dict[str, float]:
        return {
            f"perplexity_{text}": evaluate(narrow, batches, progress=False).perplexity
            for text, batches in heldout.items()
        }

    return Subject(
        model.model,
        lambda samples: model.batches(calibrated, "calibration", samples * LENGTH),
        score,
        SEQUENCES,
        SITES,
    )


def cells() -> Iterator[StudyRow]:
    """The rows of the paper's table, then the sparsities at which it reports losses."""
    for keep, selector, variant in itertools.product(CELLS, SELECTORS, SHOWN):
        yield selector, keep, variant, settings_of(selector, variant), 0


def settings_of(selector: str, variant: str) -> dict[str, Any]:
    """The settings of a variant; alone a selector is as its authors describe it."""
    own = AS_PUBLISHED.get(selector, VARIANTS["own"])
    return own if variant == "own" else VARIANTS[variant]


def alphas() -> Iterator[StudyRow]:
    """Strengths of the ridge toward zero, as in the paper, between pruned and the defaults."""
    for selector in SWEPT:
        yield selector, SWEPT_AT, "own", settings_of(selector, "own"), 0
        for alpha in ALPHAS:
            yield selector, SWEPT_AT, f"alpha={alpha:g}", {**PAPER, "alpha": alpha}, 0
        yield selector, SWEPT_AT, "ours", {}, 0


def samples() -> Iterator[StudyRow]:
    """Numbers of calibration sequences, with the paper's selector and with the defaults."""
    for count in (SEQUENCES, *SIZES):
        yield "wanda", SWEPT_AT, f"alpha={ALPHAS[0]:g}", {**PAPER, "alpha": ALPHAS[0]}, count
        yield "greedy", SWEPT_AT, "ours", {}, count


def others() -> Iterator[StudyRow]:
    """Every selector for which the paper has no perplexity."""
    left = (n for n in (*FIRST, *select.names()) if n not in SELECTORS)
    for selector, variant in itertools.product(dict.fromkeys(left), SHOWN):
        yield selector, OTHERS_AT, variant, settings_of(selector, variant), 0


PARTS: dict[str, Callable[[], Iterator[StudyRow]]] = {
    "cells": cells,
    "alphas": alphas,
    "samples": samples,
    "others": others,
}


def measure_language(part: str, choice: Choice) -> None:
    """The rows of one part."""
    text, file = (SIZED, "samples") if part == "samples" else (CALIBRATED, "smollm2")
    bench = Bench(language(text), choice.folder / f"paper_{file}.csv")
    for row in choice.of(PARTS[part]()):
        bench.measure(*row)


def resnet18(choice: Choice) -> None:
    """Compensation, REPAIR and fine-tuning after pruning by the L1 norm."""
    subject = SUBJECTS["resnet18"]()
    bench = Bench(subject, choice.folder / "paper_resnet18.csv")
    stream = grail.trace(subject.network, streams=True, example=subject.calibration(1)[0])
    for selector, keep, variant, settings, _ in choice.of(resnet_rows()):
        sites = stream if variant.endswith(STREAM) else subject.sites
        trained = finetune if TRAINED in variant else None
        bench.measure(selector, keep, variant, {**settings, "sites": sites}, after=trained)


def resnet_rows() -> Iterator[StudyRow]:
    """Those without training first; the settings are without their sites."""
    rows = [*itertools.product(RESNET_KEEPS, ("", STREAM), references().items())]
    rows += [(TRAINED_AT, suffix, (TRAINED, VARIANTS["own"])) for suffix in (STREAM, "")]
    for keep, suffix, (variant, settings) in rows:
        yield L1, keep, variant + suffix, settings, 0


def references() -> dict[str, dict[str, Any]]:
    """The variants without training."""
    repaired = {**VARIANTS["own"], "repair": True}
    return {
        **{name: VARIANTS[name] for name in SHOWN},
        "grail, open loop": {**PAPER, "closed_loop": False},
        "own, REPAIR": repaired,
        "grail, REPAIR": {**PAPER, "repair": True},
    }


def finetune(network: torch.nn.Module, epochs: int = EPOCHS) -> None:
    """Trains a narrow network on all labelled images: what compensation does without.

    With the optimiser and schedule of `bench.quality.train`, at a fifth of its rates.
    """
    data = assets.fashion_mnist(TEXTS)
    steps = epochs * sum(1 for _ in epoch_batches(data.train_images, data.train_labels, 0, 1, 2))
    pairs = recipe("resnet18", network, steps, scale=0.2)
    for epoch in range(1, epochs + 1):
        batches = epoch_batches(data.train_images, data.train_labels, 0, epoch, 2)
        train_epoch(network, batches, pairs)
    network.eval()


def vision_tower(folder: Path = TEXTS) -> Subject:
    """The vision tower of a CLIP, scored by its accuracy among captions it was trained with."""
    clip = captions.clip_fashion()
    classifier = captions.Captioned(clip).eval()
    subject = fashion(clip.vision_model, ("mlp",), lambda images: {"pixel_values": images}, folder)
    data = assets.fashion_mnist(folder)
    test, labels = networks.fashion_inputs(data.test_images[:2000]), data.test_labels[:2000].long()

    def score(tower: Any) -> dict[str, float]:
        classifier.clip.vision_model = tower
        return {"accuracy": scores.accuracy(classifier, test, labels)}

    return replace(subject, score=score)


def clip(choice: Choice) -> None:
    """The MLPs of the vision tower."""
    bench = Bench(vision_tower(), choice.folder / "paper_clip.csv")
    for row in choice.of(clip_rows()):
        bench.measure(*row)


def clip_rows() -> Iterator[StudyRow]:
    """A selector of each sort, at the sparsities where they differ."""
    for keep, selector, variant in itertools.product(CLIP_KEEPS, CLIP_SELECTORS, SHOWN):
        yield selector, keep, variant, settings_of(selector, variant), 0


COSTED: dict[str, Callable[[], Subject]] = {
    "resnet18": SUBJECTS["resnet18"],
    "vit": SUBJECTS["vit"],
    "clip": vision_tower,
}


def cost(choice: Choice) -> None:
    """Seconds of calibration and compensation, and the peak of memory, in the paper's terms."""
    out = Table(choice.folder / "paper_cost.csv", ("network", "design"))
    for name, make in COSTED.items():
        if all(out.measured(name, design) for design in DESIGNS):
            continue
        subject = make()
        batches = subject.calibration(subject.samples)
        runs: dict[str, list[dict[str, float]]] = {design: [] for design in DESIGNS}
        for _, design in itertools.product(range(ROUNDS), DESIGNS):
            runs[design].append(run(subject, batches, DESIGNS[design]))
        for design, of in runs.items():
            if (name, design) not in out:
                conditions = {key: machine("cpu")[key] for key in ("device", "load")}
                row = {"network": name, "design": design, **median(of), **held(subject, batches)}
                out.add(row | conditions)


def run(subject: Subject, batches: list[Any], design: dict[str, Any]) -> dict[str, float]:
    """One compression: seconds of the paper's two phases, and bytes beyond those in use before."""
    network = copy.deepcopy(subject.network)
    before = memory.in_use(torch.device("cpu"))
    settings = {"keep": COST_KEEP, "sites": subject.sites, **subject.settings, **design}
    report = grail.compress(network, batches, progress=False, **settings)
    seconds = {
        f"{name}_s": sum(report.seconds[phase] for phase in phases)
        for name, phases in PHASES.items()
    }
    return seconds | {f"added_{k}_bytes": v - before for k, v in report.memory.items()}


def median(runs: list[dict[str, float]]) -> dict[str, float]:
    """The median of each number over runs."""
    return {key: round(statistics.median(of[key] for of in runs), 4) for key in runs[0]}


def held(subject: Subject, batches: list[Any]) -> dict[str, Any]:
    """The bytes that a run has before it starts: of weights and of calibration inputs."""
    tensors = (x for batch in batches for x in tree_leaves(batch) if isinstance(x, Tensor))
    return {
        "weights_bytes": sum(p.nbytes for p in subject.network.parameters()),
        "inputs_bytes": sum(x.nbytes for x in tensors),
        "samples": subject.samples,
        "keep": COST_KEEP,
    }


def main(arguments: list[str] | None = None) -> None:
    """Measures one part."""
    parts: dict[str, Callable[[Choice], None]] = {
        **{name: functools.partial(measure_language, name) for name in PARTS},
        **{of.__name__: of for of in (resnet18, clip, cost)},
    }
    parser = CommandLine(
        __doc__,
        rows="paper_*",
        takes="on one core half an hour for resnet18, minutes for clip and cost, about five "
        "minutes for each of the 72, 14, 14 and 36 rows of SmolLM2",
    )
    parser.add_argument("part", choices=parts, help="the experiment to run")
    Choice.ask(parser)
    options = parser.read(arguments)
    choice = Choice.read(options)
    if options.part == "cost" and any(choice[1:]):
        parser.error("cost has no --only, --keep or --variant: it measures each network once")
    torch.manual_seed(0)
    parts[options.part](choice)


if __name__ == "__main__":
    main()
