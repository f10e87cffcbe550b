"""Every selector, pruned and compensated, on real networks.

    python -m bench.quality.sweep resnet18            selector × {pruned, + GRAIL, …} × sparsity
    python -m bench.quality.sweep vit --studies       calibration size, α, the loop, folding
    python -m bench.quality.sweep smollm2 --only wanda,greedy --keep 0.5

Results are bench/results/selectors_NETWORK.csv and studies_NETWORK.csv. A killed run resumes.
Networks, scores and variants are described in docs/benches.md.
"""

import argparse
import copy
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import grail
from bench.quality import networks, scores
from bench.quality.endtoend import LENGTH, TEXTS
from bench.quality.endtoend import Subject as LanguageModel
from bench.tools import assets
from bench.tools.commandline import CommandLine
from bench.tools.measuring import RESULTS, Table
from grail import select
from grail.errors import InputError
from grail.recipe import PRESETS
from grail.report._evaluate import evaluate
from grail.run import budget
from grail.select.flap import flap as flap_scores

KEEPS = (0.5, 0.7, 0.3, 0.9, 0.8, 0.6, 0.4)
# In the order of measuring; the other selectors come last.
FIRST = (
    *("magnitude", "wanda", "greedy", "folding-kmeans", "flap", "slimgpt", "random", "gram"),
    *("cholesky", "wanda++", "backward", "folding-agglomerative", "folding"),
)
# The paper's way with any selector.
PAPER = {name: value for name, value in PRESETS["paper"].items() if name != "selector"}
VARIANTS: dict[str, dict[str, Any]] = {
    "own": {"compensate": False},
    "grail": PAPER,
    "both": {**PAPER, "fit_bias": True},
    "ours": {},
}
AS_PUBLISHED: dict[str, dict[str, Any]] = {
    "flap": {"compensate": False, "fit_bias": True, "drift_correction": 0.0, "alpha": 1e-3},
    "slimgpt": {"alpha": 0.01, "toward": "baseline", "drift_correction": 0.0},
}
SAMPLES = (16, 32, 64, 128, 256, 512, 1024, 2048)
SEQUENCES = (4, 16, 64)  # of 1024 tokens, for the language model
REFITS = (3, 8)  # steps
ALPHAS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
# Variants of a mixture: the gain of correcting the drift of the residual stream at experts.
MIXED: dict[str, dict[str, Any]] = {
    "own": VARIANTS["own"],
    "grail": PAPER,
    "ours, no drift": {"drift_correction": 0.0},
    "ours": {},
}
# Folding's variants: REPAIR resets the statistics of batch norms, for the baseline and for GRAIL.
FOLDINGS: dict[str, dict[str, Any]] = {
    "folded": {"compensate": False},
    "folded + REPAIR": {"compensate": False, "repair": True},
    "grail": PAPER,
    "grail + REPAIR": {**PAPER, "repair": True},
    "exact": {**PAPER, "exact_folding": True, "per_tap": True},
    "exact + REPAIR": {**PAPER, "exact_folding": True, "per_tap": True, "repair": True},
    "ours": {},
    "ours + REPAIR": {"repair": True},
}


# Selector, keep, variant, its settings, and samples or 0 for the subject's own number.
StudyRow = tuple[str, float, str, dict[str, Any], int]


@dataclass(frozen=True)
class Subject:
    """A network with its data.

    `calibration`: from a number of samples to batches; `score`: by name, the first the one that
    tables show; `each`: by name of a measure, its value for each test sample, [N]; `keeps`,
    `studied`: of the table and of the studies.
    """

    network: Any
    calibration: Callable[[int], list[Any]]
    score: Callable[[Any], dict[str, float]]
    samples: int
    sites: tuple[str, ...]
    _: KW_ONLY
    keeps: tuple[float, ...] = KEEPS
    studied: tuple[float, ...] = (0.5, 0.3)
    variants: tuple[str, ...] = ("own", "grail", "ours")
    settings: dict[str, Any] = field(default_factory=dict)
    each: Callable[[Any], dict[str, Tensor]] | None = None


def fashion(
    network: Any,
    sites: tuple[str, ...],
    kind: Callable[[Tensor], Any],
    folder: Path = TEXTS,
) -> Subject:
    """A network of Fashion-MNIST, scored by its accuracy.

    Args:
        kind: from images [N, 1, 28, 28] to a batch.
        folder: the cache of the data set.
    """
    data = assets.fashion_mnist(folder)
    test = networks.fashion_inputs(data.test_images[:2000])
    labels = data.test_labels[:2000].long()

    def calibration(samples: int) -> list[Any]:
        images = networks.fashion_inputs(data.train_images[:samples])
        return [kind(part) for part in images.split(128)]

    def score(model: Any) -> dict[str, float]:
        return {"accuracy": scores.accuracy(model, test, labels)}

    @functools.cache
    def dense() -> Tensor:
        return scores.log_probabilities(network, test)

    def each(model: Any) -> dict[str, Tensor]:
        return scores.distances(scores.log_probabilities(model, test), dense(), labels)

    own = {"variants": tuple(VARIANTS), "settings": {"multiple": 1}, "each": each}
    return Subject(network, calibration, score, 512, sites, **own)


def _efficientnet() -> Subject:
    network = networks.efficientnet_lite0()
    first, test = assets.photographs(TEXTS, crops=4)
    # Small batches, whose activations stay in the caches, are twice as fast as large ones here.
    dense = scores.log_probabilities(network, test, batch=16)

    def score(model: Any) -> dict[str, float]:
        return {"agreement": scores.accuracy(model, test, dense.argmax(-1), batch=16)}

    def each(model: Any) -> dict[str, Tensor]:
        return scores.distances(scores.log_probabilities(model, test, batch=16), dense)

    def calibration(samples: int) -> list[Any]:
        crops = -(-4 * samples // len(first))  # more of the same photographs where they run out
        images = first if crops <= 4 else assets.photographs(TEXTS, crops)[0]
        return list(images[:samples].split(16))

    return Subject(network, calibration, score, 256, ("conv",), studied=(0.5,), each=each)


def _minilm() -> Subject:
    encoder = networks.minilm()
    halves = assets.split_genres(assets.brown(TEXTS))
    batches = networks.sentence_batches(assets.sentences(halves[1], 256))
    dense = scores.embed(encoder, batches)

    def calibration(samples: int) -> list[Any]:
        return networks.sentence_batches(assets.sentences(halves[0], samples))

    def score(model: Any) -> dict[str, float]:
        embeddings = scores.embed(model, batches)
        return {
            "cosine": scores.mean_cosine(embeddings, dense),
            "rank_correlation": scores.rank_correlation(embeddings, dense),
        }

    def each(model: Any) -> dict[str, Tensor]:
        return {"cosine": (scores.embed(model, batches).double() * dense.double()).sum(-1)}

    return Subject(encoder, calibration, score, 512, ("mlp",), each=each)


def _language(sites: tuple[str, ...], made: Callable[[Any], Any]) -> Subject:
    subject = LanguageModel()
    heldout = subject.batches("technical", "heldout", 8 * LENGTH)

    def score(model: Any) -> dict[str, float]:
        return {"perplexity": evaluate(model, heldout, progress=False).perplexity}

    return Subject(
        made(subject.model),
        lambda samples: subject.batches("technical", "calibration", samples * LENGTH),
        score,
        16,
        sites,
        keeps=(0.5, 0.8, 0.65),
        studied=(0.5,),
    )


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "resnet18": lambda: fashion(networks.resnet18_fashion(), ("conv",), lambda images: images),
    "vit": lambda: fashion(networks.vit_fashion(), ("mlp",), lambda x: {"pixel_values": x}),
    "efficientnet": _efficientnet,
    "minilm": _minilm,
    "smollm2": lambda: _language(("mlp",), lambda model: model),
    "mixture": lambda: _language(("experts",), networks.upcycled),
}


class Choice(NamedTuple):
    """The folder of the CSV files and what is measured: all, where nothing is named."""

    folder: Path = RESULTS
    selectors: tuple[str, ...] = ()
    keeps: tuple[float, ...] = ()
    variants: tuple[str, ...] = ()
    samples: tuple[int, ...] = ()

    def of(self, rows: Iterable[StudyRow]) -> Iterator[StudyRow]:
        """Yields the rows that are chosen; where there are none, a line says so."""
        is_any = False
        for row in rows:
            selector, keep, variant, _, samples = row
            named = zip(self[1:], (selector, keep, variant, samples), strict=True)
            if all(value in wanted for wanted, value in named if wanted):
                is_any = True
                yield row
        if not is_any and any(self[1:]):
            wanted = " and ".join("one of " + repr(of) for of in self[1:] if of)
            print(f"no row has {wanted}", flush=True)

    @staticmethod
    def ask(parser: CommandLine) -> None:
        """Adds the options of a choice."""
        parser.add_argument("--only", default="", help="selectors, separated by commas")
        ratios = {"type": _ratios, "metavar": "KEEP", "help": "ratios, separated by commas"}
        parser.add_argument("--keep", dest="keeps", default=(), **ratios)
        parser.add_argument("--variant", action="append", default=[], help="may be repeated")

    @classmethod
    def read(cls, options: argparse.Namespace) -> "Choice":
        """Returns the choice of a command line."""
        selectors = tuple(filter(None, options.only.split(",")))
        return cls(options.output, selectors, options.keeps, tuple(options.variant))


def _ratios(text: str) -> tuple[float, ...]:
    """Reads keep ratios with commas between; a ValueError is argparse's to report."""
    keeps = tuple(map(float, text.split(",")))
    if not all(0 < keep <= 1 for keep in keeps):
        raise ValueError(text)
    return keeps


class Bench:
    """Measures one subject's rows into a table."""

    def __init__(self, subject: Subject, path: Path):
        self.subject = subject
        self._batches = functools.cache(self.subject.calibration)
        self.out = Table(path, ("selector", "keep", "variant", "samples"))
        if not self.out.measured("", 1.0, "dense", 0):
            self._add("", 1.0, "dense", 0, self.subject.network, None)

    def __contains__(self, cell: tuple[str, float, str]) -> bool:
        return (*cell, self.subject.samples) in self.out

    def shares(self, selector: str, keep: float) -> dict[str, float]:
        """The share of each site by the measured cost of narrowing it."""
        return grail.sensitivity(
            self.subject.network,
            self._batches(self.subject.samples),
            keep,
            self.subject.sites,
            selector,
            progress=False,
            **self.subject.settings,
        ).shares()

    def measure(
        self,
        selector: str,
        keep: float,
        variant: str,
        settings: dict[str, Any],
        samples: int = 0,
        after: Callable[[Any], None] | None = None,
    ) -> None:
        """One row, unless it is there. `after`: what is done to the network before its score."""
        samples = samples or self.subject.samples
        if self.out.measured(selector, keep, variant, samples):
            return
        network, report = self.compressed(selector, keep, settings, samples)
        if after:
            after(network)
        self._add(selector, keep, variant, samples, network, report)

    def compressed(
        self, selector: str, keep: float, settings: dict[str, Any], samples: int = 0
    ) -> tuple[Any, Any]:
        """Returns a compressed copy of the network, and its report."""
        network = copy.deepcopy(self.subject.network)
        chosen = {"keep": keep, "sites": self.subject.sites, **self.subject.settings, **settings}
        batches = self._batches(samples or self.subject.samples)
        report = grail.compress(network, batches, selector=selector, progress=False, **chosen)
        return network, report

    def note(self, selector: str, keep: float, variant: str, network: Any, report: Any) -> None:
        """Adds the row of a network that `compressed` returned, unless it is there."""
        if (selector, keep, variant) not in self:
            self._add(selector, keep, variant, self.subject.samples, network, report)

    def scores(self, of: Callable[[select.View], Tensor]) -> list[Tensor]:
        """A selector's scores of every site of the dense network."""
        found: list[Tensor] = []

        def listen(view: select.View) -> Any:
            found.append(of(view))
            return view.width.best(found[-1])

        grail.compress(
            copy.deepcopy(self.subject.network),
            self._batches(self.subject.samples),
            keep=0.5,
            sites=self.subject.sites,
            selector=listen,
            compensate=False,
            closed_loop=False,
            drift_correction=0.0,
            progress=False,
        )
        return found

    def _add(
        self, selector: str, keep: float, variant: str, samples: int, network: Any, report: Any
    ) -> None:
        start = time.perf_counter()
        found = self.subject.score(network)
        # None is that of an expert which saw no token.
        errors = [row.error for row in report.sites if row.error is not None] if report else []
        self.out.add(
            {
                "selector": selector,
                "keep": keep,
                "variant": variant,
                "samples": samples,
                **{name: round(value, 5) for name, value in found.items()},
                "parameters": sum(p.numel() for p in network.parameters()),
                "mean_error": round(sum(errors) / len(errors), 5) if errors else "",
                "compress_seconds": round(report.seconds["total"], 2) if report else "",
                "score_seconds": round(time.perf_counter() - start, 2),
            }
        )


def table(name: str, choice: Choice) -> None:
    """Selector × variant × sparsity."""
    if unknown := [variant for variant in choice.variants if variant not in VARIANTS]:
        raise InputError(f"no variant {unknown[0]!r}; the table has {', '.join(VARIANTS)}")
    bench = Bench(SUBJECTS[name](), choice.folder / f"selectors_{name}.csv")
    others = tuple(n for n in select.names() if n not in FIRST)
    selectors = choice.selectors or (*FIRST, *others)
    for keep, selector in itertools.product(choice.keeps or bench.subject.keeps, selectors):
        for variant in choice.variants or bench.subject.variants:
            settings = VARIANTS[variant]
            if variant == "own":
                settings = AS_PUBLISHED.get(selector, settings)
            bench.measure(selector, keep, variant, settings)


def studies(name: str, choice: Choice) -> None:
    """Calibration size, α, the loop, folding and budgets, at half of the channels and often 0.3."""
    bench = Bench(SUBJECTS[name](), choice.folder / f"studies_{name}.csv")
    for keep in choice.keeps or bench.subject.studied:
        for row in choice.of(_mixed(keep) if name == "mixture" else _studies(name, keep)):
            bench.measure(*row)
        if choice.variants:  # not the widths that are measured first
            continue
        if name != "mixture":
            for row in choice.of(_uneven(bench, keep)):
                bench.measure(*row)
        if name == "smollm2":
            for row in choice.of(_budgets(bench, keep)):
                bench.measure(*row)


def _uneven(bench: "Bench", keep: float) -> Iterator[StudyRow]:
    """The same share of all parameters, with widths by the measured cost of narrowing each site."""
    for selector in ("wanda", "greedy"):
        variant = "ours, uneven widths"
        yield selector, keep, "ours", {}, 0
        if (selector, keep, variant) not in bench:
            yield selector, keep, variant, {"keep": bench.shares(selector, keep)}, 0


def _budgets(bench: "Bench", keep: float) -> Iterator[StudyRow]:
    """FLAP's and SlimGPT's uneven widths, alone and with grail's defaults."""
    blocks = bench.subject.network.config.num_hidden_layers
    shares = {
        "flap": budget.flap(bench.scores(flap_scores), keep),
        "slimgpt": budget.slimgpt(blocks, keep),
    }
    for selector, even in AS_PUBLISHED.items():
        uneven = {"keep": {"mlp": shares[selector]}}
        yield selector, keep, "own", even, 0
        yield selector, keep, "own, its budget", {**even, **uneven}, 0
        yield selector, keep, "ours", {}, 0
        yield selector, keep, "ours, its budget", uneven, 0


def _mixed(keep: float) -> Iterator[StudyRow]:
    for selector, (variant, settings) in itertools.product(("wanda", "greedy"), MIXED.items()):
        yield selector, keep, variant, settings, 0


def _studies(name: str, keep: float) -> Iterator[StudyRow]:
    default = 0
    convolutional = name in ("resnet18", "efficientnet")
    for samples in SEQUENCES if name == "smollm2" else SAMPLES:
        for variant in ("grail", "ours"):
            yield "wanda", keep, variant, VARIANTS[variant], samples
    for alpha in ALPHAS:
        yield "wanda", keep, f"alpha={alpha:g}", {**PAPER, "alpha": alpha}, default
        settings = {**PAPER, "alpha": alpha, "toward": "baseline"}
        yield "wanda", keep, f"alpha={alpha:g} toward baseline", settings, default
    yield "wanda", keep, "open loop", {**PAPER, "closed_loop": False}, default
    if convolutional:
        yield "wanda", keep, "per tap", {**PAPER, "per_tap": True}, default
    yield "wanda", keep, "drift", {**PAPER, "per_tap": True, "drift_correction": 1.0}, default
    yield "wanda", keep, "ours, both", {"fit_bias": True}, default
    if not convolutional:
        outputs = {"sites": ("mlp", "heads"), "keep": {"mlp": keep, "heads": 1.0}}
        yield "wanda", keep, "ours, attention's outputs refitted, too", outputs, default
        for selector in ("wanda", "greedy", "random"):
            yield selector, keep, "ours", {}, default
            yield selector, keep, "ours, tokens weighted", {"token_weights": True}, default
            corrected: dict[str, Any] = {"correct_attention": True}
            yield selector, keep, "ours, attention corrected", corrected, default
            corrected = {**corrected, "token_weights": True}
            yield selector, keep, "ours, attention corrected, tokens weighted", corrected, default
    for variant, settings in FOLDINGS.items():
        if name == "resnet18" or "REPAIR" not in variant:
            yield "folding-kmeans", keep, variant, settings, default
    for steps in REFITS:
        yield "greedy", keep, *refitted(steps), default


def refitted(steps: int) -> tuple[str, dict[str, Any]]:
    """The defaults with producers refitted: the variant and its settings."""
    return f"ours, producers refitted, {steps} steps", {"refit_producers": steps}


def main() -> None:
    """Measures the table or the studies of a network."""
    parser = CommandLine(
        __doc__,
        rows="*",
        writes="selectors_NETWORK.csv or studies_NETWORK.csv, row by row",
        takes="one to twelve hours on one core for a table, up to three for the studies",
    )
    parser.add_argument("network", choices=SUBJECTS)
    parser.add_argument("--studies", action="store_true", help="the studies, not the table")
    Choice.ask(parser)
    options = parser.read()
    if options.network == "mixture" and not options.studies:
        parser.error("the mixture has studies and no table: add --studies")
    torch.manual_seed(0)
    measure = studies if options.studies else table
    measure(options.network, Choice.read(options))


if __name__ == "__main__":
    main()
