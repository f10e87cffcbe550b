"""What a compression did, as data: the `Report` that `grail.compress` returns, and its JSON."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 3


def recovered(dense: float, pruned: float, restored: float) -> float | None:
    """The share of the lost log-perplexity that came back, ln(pruned/restored)/ln(pruned/dense).

    Returns:
        1 when the restored model is as good as the dense one, 0 when as bad as the pruned one,
        negative when worse; None when plain pruning lost nothing, or a perplexity is not finite.
    """
    if not dense < pruned or not all(map(math.isfinite, (dense, pruned, restored))):
        return None
    return math.log(pruned / restored) / math.log(pruned / dense)


def strict_json(value: Any) -> str:
    """Indented JSON of `value`; a number that is not finite, which JSON cannot hold, is null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class SiteReport:
    """One site: how wide it was and is, and how well its consumer's output is rebuilt."""

    name: str  # "model.layers.3.mlp"
    kind: str  # "mlp", "heads", "experts", …
    block: int
    channels: int  # before
    kept: int  # after
    tokens: int  # calibration tokens behind the Gram
    alpha: float | None  # ridge strength, given or chosen by held-out tokens; None: plain pruning
    drift_correction: float  # share of the drift from the dense stream that the fit undoes
    damping: float  # λ of the factorisation, in the Gram's units; 0 if not compensated
    retries: int  # how often λ had to grow before the Cholesky held
    # ‖T − W'RX‖ / ‖T‖ as written into the model; None without a Gram. T is what the dense network's
    # stream asks of the consumer where drift is followed, else the consumer's own output WX.
    error: float | None
    baseline_error: float | None  # the same for plain pruning or folding


@dataclass
class InputReport:
    """The attention of a block, and how near what it reads is to what the dense network's does."""

    name: str  # "model.layers.3.self_attn"
    block: int
    layers: list[str]  # its projections to queries, keys and values
    tokens: int
    alpha: float | None  # None: they were left as they are, because nothing helped
    drift_correction: float  # share of the drift that a linear map undoes
    error: float  # ‖x − M x̃‖ / ‖x‖: x the dense network's, x̃ the compressed one's
    baseline_error: float  # ‖x − x̃‖ / ‖x‖


@dataclass
class Evaluation:
    """One model on the held-out text."""

    perplexity: float
    tokens: int  # predicted tokens behind the perplexity
    parameters: int
    bytes: int  # of the weights in the model's dtype, as safetensors stores them
    tokens_per_second: float


@dataclass
class Report:
    """Everything a run decided and measured. Seconds are wall time, sizes are bytes."""

    settings: dict[str, Any]  # keep, sites, selector, alpha, toward, compensate, closed_loop, ...
    model: dict[str, Any]  # name, class, dtype, device; parameters, widths {before, after}
    calibration: dict[str, Any]  # source, tokens, sequences, sequence_length
    sites: list[SiteReport] = field(default_factory=list)
    inputs: list[InputReport] = field(default_factory=list)  # of attention, where it was corrected
    seconds: dict[str, float] = field(default_factory=dict)  # forward, gram, select, solve, total
    memory: dict[str, int] = field(default_factory=dict)  # predicted_peak, measured_peak
    evaluation: dict[str, Evaluation] = field(default_factory=dict)  # dense, pruned, restored
    notes: list[str] = field(default_factory=list)  # what a person should know: rounding, fallbacks
    versions: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def recovered(self) -> float | None:
        """The share of the lost log-perplexity that came back; None without all three rows."""
        if not self.evaluation.keys() >= {"dense", "pruned", "restored"}:
            return None
        return recovered(
            *(self.evaluation[row].perplexity for row in ("dense", "pruned", "restored"))
        )

    def to_json(self) -> str:
        """The report as text, see `strict_json`."""
        return strict_json(dataclasses.asdict(self)) + "\n"

    def save(self, path: str | Path) -> None:
        """Writes the JSON to `path`."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The inverse of `to_json`; a perplexity of null was infinite."""
        data = json.loads(text)
        for row in data["evaluation"].values():
            if row["perplexity"] is None:
                row["perplexity"] = math.inf
        data["sites"] = [SiteReport(**site) for site in data["sites"]]
        data["inputs"] = [InputReport(**place) for place in data.get("inputs", [])]
        data["evaluation"] = {k: Evaluation(**v) for k, v in data["evaluation"].items()}
        return cls(**data)
