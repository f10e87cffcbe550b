"""Settings and texts that recover a compressed SmolLM2-135M, in the domain and off it.

    python -m bench.quality.levers                          every lever that is not in the CSV
    python -m bench.quality.levers --calibration passages   of one calibration
    python -m bench.quality.levers --show                   only the table

A lever is the defaults with one setting changed, or another calibration text of as many tokens.
Each is compared with the defaults on the same sequences.
Results are bench/results/levers.csv, row by row. A killed run resumes. The calibrations and levers
are described in docs/benches.md.
"""

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

import grail
from bench.quality.endtoend import MODELS, Subject
from bench.tools.commandline import CommandLine
from bench.tools.measuring import Row, Table
from bench.tools.tables import aligned
from bench.tools.texts import LENGTH
from grail.report._evaluate import DenseReference, evaluate
from grail.report.paired import Estimate, difference, is_worse, share, weighted
from grail.report.report import Evaluation

KEY = ("calibration", "sequences", "lever", "sites", "keep", "text")
TEXTS = ("passages", "brown")
# Of some calibrations also other texts.
NEAR_AND_FAR = {
    "documentation": ("documentation", "source", "licences", "brown"),
    "technical": ("technical", "brown"),
}
HELD_OUT = 8  # sequences of each text

# The texts of each calibration, in equal parts.
CALIBRATIONS: dict[str, tuple[str, ...]] = {
    **{text: (text,) for text in ("passages", "brown", "documentation", "technical")},
    "passages and brown": ("passages", "brown"),
    "general": ("documentation", "source", "licences", "scripture", "manuals", "essays"),
    "written": ("written",),
    "passages and written": ("passages", "written"),
}
DEFAULTS, PRUNED, DENSE = "defaults", "pruned", "dense"
UNEVEN = "uneven widths"  # how the names of such levers begin
BROAD = "selected on general"
OWN_TOO = "selected on passages and written"
ATTENTION = {"correct_attention": True}
# The consumers of heads that all stay are refitted to the drift.
OUTPUT = {"keep": {"mlp": 0.5, "heads": 1.0}, "sites": ("mlp", "heads")}
LEVERS: dict[str, dict[str, Any]] = {
    PRUNED: MODELS["pruned"],
    "paper": MODELS["paper"],
    DEFAULTS: {},
    "wanda": {"selector": "wanda"},
    "queries, keys, values": ATTENTION,
    "o_proj": OUTPUT,
    "queries, keys, values, o_proj": ATTENTION | OUTPUT,
    "producers": {"refit_producers": 3},
    "producers, 8 steps": {"refit_producers": 8},
    "producers; queries, keys, values": {"refit_producers": 3} | ATTENTION,
    "uneven widths": {},
    "uneven widths, producers": {"refit_producers": 3},
    "guard text": {},
    "selected on brown": {},
    "selected on passages": {},
    BROAD: {},
    "selected on written": {},
    OWN_TOO: {},
    "selected on general, producers": {"refit_producers": 3},
    "uneven widths, selected on general": {},
    "uneven widths, selected on general, producers": {"refit_producers": 3},
    f"{UNEVEN}, {OWN_TOO}, producers": {"refit_producers": 3},
}
BEST = "uneven widths, producers"
SENSED = 16  # sequences on which widths are measured
# The argument of other text, its calibration, and sequences of it.
OTHERS: dict[str, tuple[str, str, int]] = {
    "guard text": ("guard", "brown", 4),
    "selected on brown": ("select_on", "brown", 16),
    "selected on passages": ("select_on", "passages", 16),
    "selected on written": ("select_on", "written", 16),
} | {
    lever: ("select_on", text, count)
    for name, text, count in ((BROAD, "general", 18), (OWN_TOO, "passages and written", 32))
    for lever in LEVERS
    if name in lever
}


class Cell(NamedTuple):
    """Levers that are measured with one calibration and one keep ratio, in this order."""

    calibration: str
    sequences: int
    levers: tuple[str, ...]
    sites: tuple[str, ...] = ("mlp",)
    keep: float = 0.5


_OWN = (PRUNED, "paper", DEFAULTS, BEST)
CELLS: tuple[Cell, ...] = (
    Cell("passages", 16, tuple(lever for lever in LEVERS if lever != "selected on passages")),
    *(Cell(name, 16, (DEFAULTS,)) for name in ("written", "passages and written")),
    # As many tokens of passages as above, and as many again that the model has written.
    Cell("passages and written", 32, _OWN),
    Cell("passages and written", 32, (PRUNED, DEFAULTS), keep=0.8),
    Cell("passages", 64, (*_OWN, UNEVEN, "producers")),
    Cell("passages", 64, _OWN, keep=0.75),
    Cell("brown", 16, (PRUNED, DEFAULTS, "selected on passages")),
    Cell("brown", 32, _OWN),
    Cell("brown", 32, _OWN, ("mlp", "heads"), 0.7),
    Cell("general", 256, (PRUNED, BEST)),
    Cell("documentation", 48, (PRUNED, DEFAULTS, BEST)),
    Cell("technical", 64, (PRUNED, DEFAULTS, BEST)),
    Cell("passages and brown", 16, (PRUNED, DEFAULTS, "producers", UNEVEN)),
    Cell("general", 64, (PRUNED, DEFAULTS, BEST)),
    *(
        Cell("passages", 16, (*_OWN[:3], BROAD, OWN_TOO), keep=keep)
        for keep in (0.9, 0.8, 0.7, 0.6, 0.4, 0.3)
    ),
)


class Bench:
    """The dense model, its outputs on the held-out texts, and the table of results."""

    def __init__(self, path: Path) -> None:
        self.table = Table(path, KEY)
        self._subject: Subject | None = None
        self._references: dict[str, DenseReference] = {}

    @property
    def subject(self) -> Subject:
        """The dense model, loaded once it is needed."""
        if self._subject is None:
            self._subject = Subject()
        return self._subject

    def heldout(self, text: str) -> list[Tensor]:
        """Returns the held-out sequences of a text."""
        return self.subject.batches(text, "heldout", HELD_OUT * LENGTH)

    def reference(self, text: str) -> DenseReference:
        """Returns the dense model's outputs on a text."""
        if text not in self._references:
            made = DenseReference(self.subject.model, self.heldout(text), progress=False)
            self._references[text] = made
        return self._references[text]

    def calibration(self, name: str, sequences: int) -> list[Tensor]:
        """Returns sequences of a calibration: of each text in equal parts, mixed.

        A run holds out every fifth sequence, so they are in no regular order.
        """
        names = CALIBRATIONS[name]
        each = -(-sequences // len(names))
        parts = [self.subject.batches(text, "calibration", each * LENGTH) for text in names]
        rows = [part[number] for number in range(each) for part in parts][:sequences]
        if len(names) > 1:
            random.Random(0).shuffle(rows)
        return rows

    def measure(self, cell: Cell, lever: str) -> None:
        """Adds the rows of a lever, one a text, unless they are there."""
        key = {
            "calibration": cell.calibration,
            "sequences": cell.sequences,
            "lever": lever,
            "sites": ",".join(cell.sites),
            "keep": cell.keep,
        }
        texts = NEAR_AND_FAR.get(cell.calibration, TEXTS)
        missing = [text for text in texts if not self.table.measured(*key.values(), text)]
        if not missing:
            return
        settings: dict[str, Any] = {"keep": cell.keep, "sites": cell.sites} | LEVERS[lever]
        batches = self.calibration(cell.calibration, cell.sequences)
        selecting = batches
        if lever in OTHERS:
            argument, other, count = OTHERS[lever]
            settings[argument] = self.calibration(other, count)
            selecting = settings.get("select_on", batches)
        if lever.startswith(UNEVEN):
            cost = grail.sensitivity(
                *(self.subject.model, selecting[:SENSED], cell.keep, cell.sites), progress=False
            )
            settings["keep"] = cost.shares()
        model, report = self.subject.compressed(batches, **settings)
        for text in missing:
            found = evaluate(
                model, self.heldout(text), against=self.reference(text), progress=False
            )
            self.table.add(key | _scores(text, found, report.seconds["total"]))

    def measure_dense(self) -> None:
        """Adds the rows of the dense model."""
        key = {"calibration": "", "sequences": 0, "lever": DENSE, "sites": "", "keep": 1.0}
        for text in dict.fromkeys([*TEXTS, *itertools.chain(*NEAR_AND_FAR.values())]):
            if not self.table.measured(*key.values(), text):
                self.table.add(key | _scores(text, self.reference(text).evaluation, None))


def _scores(text: str, found: Evaluation, seconds: float | None) -> dict[str, Any]:
    return {
        "text": text,
        "perplexity": round(found.perplexity, 4),
        "kl": "" if found.kl is None else round(found.kl, 5),
        "top1": "" if found.top1 is None else round(found.top1, 5),
        "losses": _joined(found.losses),
        "divergences": _joined(found.divergences),
        "agreements": _joined(found.agreements),
        "seconds": "" if seconds is None else round(seconds, 1),
        "heldout_tokens": found.tokens,
    }


def _joined(values: Iterable[float]) -> str:
    return " ".join(f"{value:.6f}" for value in values)


def comparisons(rows: list[Row]) -> Iterator[dict[str, Any]]:
    """Yields for each row the share that it recovers, and its gain over the defaults in nats.

    Both are of the same calibration, on which plain pruning depends as well: without its row there
    is no share, nor is it known whether a row is "worse" than pruning beyond 2 standard errors.
    "kl" and "top1" get their standard errors from the "divergences" and "agreements" of sequences,
    which rows of earlier versions do not have.
    """
    losses = {tuple(row[k] for k in KEY): _each(row, "losses") for row in rows}
    for row in rows:
        calibration, sequences, lever, *cell, text = (row[k] for k in KEY)
        if lever == DENSE:
            continue
        own = losses[(calibration, sequences, lever, *cell, text)]
        base = losses["", "0", DENSE, "", "1.0", text]
        plain, default = (
            losses.get((calibration, sequences, name, *cell, text)) for name in (PRUNED, DEFAULTS)
        )
        yield {
            **row,
            "kl": _distance(row, "kl", "divergences"),
            "top1": _distance(row, "top1", "agreements"),
            "share": None if plain is None else share(base, plain, own),
            "gain": None if default is None else difference(default, own),
            "worse": None if plain is None else is_worse(own, plain),
        }


def _each(row: Row, column: str) -> list[float]:
    return [float(value) for value in (row.get(column) or "").split()]


def _distance(row: Row, measure: str, column: str) -> Estimate:
    """Returns a measure of a row; its error is None where single sequences are not known.

    All sequences have `LENGTH` tokens, so each counts alike.
    """
    each = _each(row, column)
    error = weighted(each, [1] * len(each)).error if each else None
    return Estimate(float(row[measure]), error)


def table(
    rows: Iterable[dict[str, Any]], columns: Sequence[str] = KEY[:-1], gains: bool = True
) -> tuple[list[str], list[list[str]]]:
    """Returns header and rows of a table, a row for each lever, the texts side by side.

    Args:
        rows: of `comparisons`.
        columns: what names a row.
        gains: whether the gain over the defaults is shown.
    """
    named = ["perplexity", "share", *["gain, nats"] * gains, "KL", "top-1"]
    found: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for row in rows:
        cells = [f"{float(row['perplexity']):.1f}", percent(row["share"])]
        cells += [signed(row["gain"])] * gains
        cells += [nats(row["kl"]), percent(row["top1"])]
        found.setdefault(tuple(row[name] for name in columns), {})[row["text"]] = cells
    read = {text for cells in found.values() for text in cells}
    texts = [*TEXTS, *sorted(read - {*TEXTS})]
    header = list(columns)
    for text in texts:
        header += [f"{text}: {named[0]}", *named[1:]]
    unknown = ["–"] * len(named)
    return header, [
        [*key, *(cell for text in texts for cell in cells.get(text, unknown))]
        for key, cells in found.items()
    ]


def nats(estimate: Estimate) -> str:
    """Formats a divergence and its standard error."""
    error = "" if estimate.error is None else f" ± {estimate.error:.3f}"
    return f"{estimate.value:.2f}" if not error else f"{estimate.value:.3f}{error}"


def percent(estimate: Estimate | None) -> str:
    """Formats a share or an agreement and its standard error."""
    if estimate is None:
        return "–"
    error = "" if estimate.error is None else f" ± {estimate.error:.1%}"
    return f"{estimate.value:.1%}{error}"


def signed(estimate: Estimate | None) -> str:
    """Formats a gain and its standard error."""
    if estimate is None:
        return "–"
    error = "" if estimate.error is None else f" ± {estimate.error:.3f}"
    return f"{estimate.value:+.3f}{error}"


def main() -> None:
    """Measures what is missing, and prints the table."""
    parser = CommandLine(__doc__, rows="levers", takes="two hours on 2 cores")
    parser.add_argument("--calibration", choices=CALIBRATIONS, help="default: all")
    parser.add_argument("--sequences", type=int, help="of 1024 tokens; default: all sizes")
    parser.add_argument("--keep", type=float, help="default: all")
    parser.add_argument("--lever", choices=LEVERS, help="default: all")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    options = parser.read()
    bench = Bench(options.output)
    if not options.show:
        bench.measure_dense()
        for cell in CELLS:
            asked = options.calibration in (None, cell.calibration)
            if asked and options.sequences in (None, cell.sequences):
                for lever in cell.levers:
                    if options.lever in (None, lever) and options.keep in (None, cell.keep):
                        bench.measure(cell, lever)
    print(aligned(*table(comparisons(bench.table.rows)), words=len(KEY) - 1))


if __name__ == "__main__":
    main()
