"""What a run is asked to do, checked before any work starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grail import select
from grail.errors import InputError
from grail.fit import Auto, Toward, check_settings
from grail.sites import Architecture, Site
from grail.width import Width, check_keep

# From bench/results/smollm2_calibration.csv: the best or within 2% of it at 8k, 32k and 128k
# tokens, on the calibration's text and on another.
ALPHA = 1e-3


@dataclass(frozen=True)
class Options:
    """The arguments of `grail.compress` that say what to do. Wrong values raise InputError."""

    keep: float | Mapping[str, float] = 0.7
    sites: Sequence[str] = ("mlp",)
    selector: str | select.Selector = "greedy"
    compensate: bool = True
    alpha: float | Auto = "auto"
    toward: Toward = "baseline"
    drift_correction: float | Auto = "auto"
    closed_loop: bool = True
    multiple: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.sites, str):
            object.__setattr__(self, "sites", tuple(s.strip() for s in self.sites.split(",")))
        for kind in self.sites:
            check_keep(self.keep_of(kind))
        check_settings(self.alpha, self.toward, self.drift_correction)
        if self.drift_correction not in ("auto", 0) and not self.closed_loop:
            raise InputError(
                "drift_correction needs the closed loop: an open one sees no drift to correct"
            )
        select.get(self.selector)

    @property
    def follows_drift(self) -> bool:
        """Whether the dense network's stream is carried beside the compressed one's."""
        return self.compensate and self.closed_loop and self.drift_correction != 0

    @property
    def holds_out(self) -> bool:
        """Whether something is chosen by held-out tokens."""
        automatic = self.alpha == "auto" or (self.follows_drift and self.drift_correction == "auto")
        return self.compensate and automatic

    def keep_of(self, kind: str) -> float:
        """The share of that kind's channels that stays."""
        if not isinstance(self.keep, Mapping):
            return self.keep
        if kind not in self.keep:
            raise InputError(f"keep names {', '.join(self.keep)}, but not the site kind {kind!r}")
        return self.keep[kind]

    def widths(self, architecture: Architecture) -> dict[str, Width]:
        """The feasible width of each kind, which all blocks share."""
        first = architecture.sites(self.sites)[0]
        return {site.kind: site.width(self.keep_of(site.kind), self.multiple) for site in first}

    def active(self, sites: Sequence[Site], widths: Mapping[str, Width]) -> list[Site]:
        """The sites of a block that a run works on, in order: those that become narrower.

        Where drift is followed the others join them: a consumer of full width can undo it, too.
        """
        narrowed = [site for site in sites if widths[site.kind].kept < site.channels]
        return list(sites) if narrowed and self.follows_drift else narrowed

    def as_dict(self) -> dict[str, Any]:
        """For the report: JSON-ready."""
        name = self.selector if isinstance(self.selector, str) else repr(self.selector)
        keep = dict(self.keep) if isinstance(self.keep, Mapping) else self.keep
        return {**vars(self), "keep": keep, "sites": list(self.sites), "selector": name}
