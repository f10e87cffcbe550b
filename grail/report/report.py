"""The `Report` that `grail.compress` returns, and its JSON."""

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from grail.report.formatting import format_count, format_number

SCHEMA = 7


def recovered(dense: float, pruned: float, restored: float) -> float | None:
    """Returns the share of the lost log-perplexity recovered, ln(pruned/restored)/ln(pruned/dense).

    Returns:
        1 if the restored model is as good as the dense one, 0 if as bad as the pruned one, negative
        if worse; None if plain pruning lost nothing, or a perplexity is not finite.
    """
    if not dense < pruned or not all(map(math.isfinite, (dense, pruned, restored))):
        return None
    return math.log(pruned / restored) / math.log(pruned / dense)


def recovered_in_words(share: float) -> str:
    """Formats a share of `recovered`: "64% recovered", or "12% worse than pruning"."""
    if round(share, 2) < 0:
        return f"{-share:.0%} worse than pruning"
    return f"{max(share, 0.0):.0%} recovered"


def fitted_parts(compensate: bool, fit_bias: bool) -> str | None:
    """Returns the fitted part of the consumers: "weights", "bias" or "both"; None is nothing."""
    if compensate:
        return "both" if fit_bias else "weights"
    return "bias" if fit_bias else None


def strict_json(value: Any) -> str:
    """Returns indented JSON of `value`; a number that is not finite, unknown to JSON, is null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class SiteReport:
    """One site: its widths, and the error of its consumer's output."""

    name: str  # "model.layers.3.mlp"
    kind: str  # "mlp", "heads", "experts", …
    block: int
    channels: int  # before
    kept: int  # after
    tokens: int  # calibration tokens in the Gram
    alpha: float | None  # ridge strength, given or chosen by held-out tokens; None: plain pruning
    drift_correction: float  # share of the drift from the dense network that is corrected
    damping: float  # λ of the factorisation, in the Gram's units; 0 if not compensated
    retries: int  # how often λ had to grow before the Cholesky held
    # ‖T − W'RX‖ / ‖T‖ as written into the model; None without a Gram. T is the consumer's output
    # WX, plus its drift from the dense network where that is followed.
    # With `repair` it is the error before the block's batch norms were reset.
    error: float | None
    baseline_error: float | None  # the same for plain pruning or folding
    guard_error: float | None = None  # both errors on guard text; None without
    guard_baseline_error: float | None = None
    guard_share: float | None = None  # of the fitted change that stays, so that neither is worse


@dataclass
class InputReport:
    """The attention of a block, and how much its input differs from the dense network's."""

    name: str  # "model.layers.3.self_attn"
    block: int
    layers: list[str]  # its projections to queries, keys and values
    tokens: int
    alpha: float | None  # None: left as they are, because no correction helped
    drift_correction: float  # share of the drift that a linear map corrects
    error: float  # ‖x − M x̃‖ / ‖x‖: x the dense network's, x̃ the compressed one's
    baseline_error: float  # ‖x − x̃‖ / ‖x‖


@dataclass
class LayerReport:
    """A matrix that was rounded to a grid of GGUF, and the error of its layer's output."""

    name: str  # of the layer: "model.layers.3.mlp.down_proj"
    block: int | None  # None: embedding or output matrix
    format: str  # "q4_1", "q8_0"
    # ‖(W − Q) X‖ / ‖W X‖, X what the layer reads in the quantised network; `nearest_error` is the
    # same of rounding to nearest. None: rounded to nearest, and not measured.
    error: float | None
    nearest_error: float | None


def mean_errors(layers: Sequence[LayerReport]) -> tuple[float, float] | None:
    """Returns the mean errors of rounded layers, by GPTQ and to nearest; None if none has one."""
    pairs = [(row.error, row.nearest_error) for row in layers]
    known = [(own, nearest) for own, nearest in pairs if own is not None and nearest is not None]
    if not known:
        return None
    own, nearest = (statistics.fmean(errors) for errors in zip(*known, strict=True))
    return own, nearest


@dataclass
class TextScore:
    """The scores of a model on one held-out text."""

    perplexity: float
    tokens: int  # that were predicted
    text: str = field(default="", kw_only=True)  # its name
    # Against the dense model; None: not measured. Mean of KL(dense‖model) in nats, and share of
    # predictions whose most likely token is the dense model's; their standard errors over
    # sequences, None of one sequence.
    kl: float | None = field(default=None, kw_only=True)
    kl_error: float | None = field(default=None, kw_only=True)
    top1: float | None = field(default=None, kw_only=True)
    top1_error: float | None = field(default=None, kw_only=True)
    # Share of the log-perplexity lost by the row "pruned" that this row recovers, and its standard
    # error over sequences; None: not known.
    recovered: float | None = field(default=None, kw_only=True)
    recovered_error: float | None = field(default=None, kw_only=True)
    # Loss above that of the row "pruned" in nats a token, paired by sequence, and its standard
    # error; positive: worse than plain pruning. None: not known.
    over_pruned: float | None = field(default=None, kw_only=True)
    over_pruned_error: float | None = field(default=None, kw_only=True)
    # Of each sequence, in the text's order: mean −log p, mean KL(dense‖model), share of predictions
    # that agree with the dense model's, and predicted tokens. Empty: not measured.
    losses: list[float] = field(default_factory=list, kw_only=True, repr=False)
    divergences: list[float] = field(default_factory=list, kw_only=True, repr=False)
    agreements: list[float] = field(default_factory=list, kw_only=True, repr=False)
    predicted: list[int] = field(default_factory=list, kw_only=True, repr=False)


@dataclass
class Evaluation(TextScore):
    """One model on held-out text: dense, or narrowed by `selector` and `compensation`.

    Its own score is that of the first text; `others` has those of further texts.
    """

    parameters: int
    bytes: int  # of the weights in the model's dtype, as safetensors stores them
    selector: str | None = None  # None: nothing was removed
    compensation: str | None = None  # "weights", "bias", "both"; None: plain pruning
    uneven: bool = False  # blocks keep different shares
    # The format of a quantised model's matrices, whose `bytes` are those of a GGUF file.
    quantized: str | None = None
    to_nearest: bool = False  # rounded to nearest; otherwise by GPTQ
    repetition: float | None = None  # share of repeated 4-grams in greedy completions
    repetition_error: float | None = None  # its standard error over completions
    others: list[TextScore] = field(default_factory=list, kw_only=True)

    @property
    def scores(self) -> list[TextScore]:
        """The scores on all texts, in the order in which these were given."""
        return [self, *self.others]

    @property
    def label(self) -> str:
        """The name of a row: "dense", "pruned (wanda)", "compensated (greedy, uneven)"."""
        if self.selector is None:
            return "dense"
        done = {None: "pruned", "bias": "bias compensated"}.get(self.compensation, "compensated")
        label = f"{done} ({self.selector}{', uneven' if self.uneven else ''})"
        if self.quantized is None:
            return label
        return f"{label} + {self.quantized} ({'to nearest' if self.to_nearest else 'GPTQ'})"


@dataclass(repr=False)
class Report:
    """Decisions and measurements of a run. Seconds are wall time, sizes are bytes.

    `evaluation` has up to six rows: "dense"; "pruned", without compensation; "compensated", with
    compensation and the selector of "pruned", if the model of this report has another selector;
    "restored", the model of this report; and if that is quantised, "unquantised", of a run without,
    and "rounded", which is "unquantised" rounded to nearest. A report is read back by
    `Report.from_json`.
    """

    settings: dict[str, Any]  # the recipe, `grail.Recipe.as_dict`
    # name, class, dtype, device; parameters, widths, bytes {before, after}; beyond_configuration,
    # the widths that its configuration cannot hold, in words
    model: dict[str, Any]
    calibration: dict[str, Any]  # source, tokens, sequences, sequence_length
    sites: list[SiteReport] = field(default_factory=list)
    inputs: list[InputReport] = field(default_factory=list)  # of attention, where it was corrected
    quantized: list[LayerReport] = field(default_factory=list)  # matrices on a grid of GGUF
    seconds: dict[str, float] = field(default_factory=dict)  # forward, gram, select, solve, total
    memory: dict[str, int] = field(default_factory=dict)  # predicted_peak, measured_peak
    evaluation: dict[str, Evaluation] = field(default_factory=dict)
    # By stage of the command and in "total", {predicted, measured} seconds.
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    # Greedy completions of held-out text: {prompt, dense, pruned, restored}.
    samples: list[dict[str, str]] = field(default_factory=list)
    # Of a resumed run: blocks that were done "after" which it resumed, "of" how many, and "seconds"
    # of the earlier runs; `seconds` and the stage "compressing" count those as well.
    resumed: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)  # see `grail.files.provenance`
    # Of the folder that the report was written into: {bytes, sha256} of each safetensors file.
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # for a person: rounding, fallbacks
    versions: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    def share(self, role: str) -> float | None:
        """Returns the share of the log-perplexity lost by row "pruned" that row `role` recovers."""
        if not self.evaluation.keys() >= {"dense", "pruned", role}:
            return None
        return recovered(*(self.evaluation[row].perplexity for row in ("dense", "pruned", role)))

    @property
    def same_choice(self) -> str | None:
        """The compensated row whose selector is that of the "pruned" row, if there is one."""
        pruned = self.evaluation.get("pruned")
        roles = ("compensated", "unquantised", "restored")
        rows = {role: self.evaluation.get(role) for role in roles}
        found = (role for role, row in rows.items() if row and pruned)
        return next((role for role in found if _same_selector(rows[role], pruned)), None)

    @property
    def rounding_recovered(self) -> float | None:
        """The share of the log-perplexity lost by rounding to nearest that GPTQ recovers."""
        if not self.evaluation.keys() >= {"unquantised", "rounded", "restored"}:
            return None
        rows = ("unquantised", "rounded", "restored")
        return recovered(*(self.evaluation[row].perplexity for row in rows))

    @property
    def recovered(self) -> float | None:
        """The share of the lost log-perplexity that compensation recovers, selector unchanged.

        None without rows of a dense, a pruned and a compensated model of one selector.
        """
        return None if self.same_choice is None else self.share(self.same_choice)

    def __repr__(self) -> str:
        return f"Report({', '.join(self._facts())})"

    def _repr_html_(self) -> str:
        """Returns a compact table for notebooks: sites by kind, and the evaluated models."""
        kinds = dict.fromkeys(site.kind for site in self.sites)
        rows = [("sites", "kept", "median error: pruned → compensated")]
        for kind in kinds:
            sites = [site for site in self.sites if site.kind == kind]
            kept, channels = (sum(getattr(s, n) for s in sites) for n in ("kept", "channels"))
            rows.append((f"{len(sites)} {kind}", f"{kept:,} of {channels:,}", _errors(sites)))
        if self.evaluation:
            texts = [score.text for score in next(iter(self.evaluation.values())).scores]
            names = f" ({', '.join(texts)})" if len(texts) > 1 else ""
            rows.append(("model", "parameters", f"perplexity{names}"))
        for row in self.evaluation.values():
            values = ", ".join(format_number(score.perplexity) for score in row.scores)
            rows.append((row.label, format_count(row.parameters), values))
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
            for cells in rows
        )
        title = escape(" · ".join(self._facts()))
        return f"<table><caption>GRAIL: {title}</caption><tbody>{body}</tbody></table>"

    def _facts(self) -> list[str]:
        facts = [str(self.model.get("name") or self.model.get("class") or "model")]
        parameters = self.model.get("parameters") or {}
        if parameters:
            facts.append(" → ".join(map(format_count, parameters.values())) + " parameters")
        facts.append(f"{len(self.sites)} sites")
        if "selector" in self.settings:
            facts.append(str(self.settings["selector"]))
        if self.recovered is not None:
            facts.append(recovered_in_words(self.recovered))
        return facts

    def to_json(self) -> str:
        """Returns the report as text, see `strict_json`."""
        return strict_json(dataclasses.asdict(self)) + "\n"

    def save(self, path: str | Path) -> None:
        """Writes the JSON to `path`."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Reads a report from the text of `to_json`; a perplexity of null was infinite."""
        data = json.loads(text)
        for row in data["evaluation"].values():
            row.pop("tokens_per_second", None)  # of schema 3
            for score in (row, *row.get("others", [])):
                if score["perplexity"] is None:
                    score["perplexity"] = math.inf
            row["others"] = [TextScore(**score) for score in row.get("others", [])]
        data["sites"] = [SiteReport(**site) for site in data["sites"]]
        data["inputs"] = [InputReport(**place) for place in data.get("inputs", [])]
        data["quantized"] = [LayerReport(**layer) for layer in data.get("quantized", [])]
        data["evaluation"] = {k: Evaluation(**v) for k, v in data["evaluation"].items()}
        return cls(**data)


def _same_selector(one: Evaluation | None, other: Evaluation | None) -> bool:
    if one is None or other is None:
        return False
    return (one.selector, one.uneven) == (other.selector, other.uneven)


def _errors(sites: Sequence[SiteReport]) -> str:
    """Formats median errors of sites without and with compensation, as far as they are known."""
    pairs = [(s.baseline_error, s.error) for s in sites if s.error is not None]
    known = [tuple(e for e in column if e is not None) for column in zip(*pairs, strict=True)]
    return " → ".join(f"{statistics.median(column):.3f}" for column in known if column) or "–"
