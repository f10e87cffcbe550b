"""What a run is asked to do, checked before any work starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grail import select
from grail.errors import InputError
from grail.fit import Toward, check_ridge
from grail.sites import Architecture
from grail.width import Width, check_keep

# From bench/results/smollm2_calibration.csv: the best or within 2% of it at 8k, 32k and 128k
# tokens, on the calibration's text and on another.
ALPHA = 1e-3


@dataclass(frozen=True)
class Options:
    """The arguments of `grail.compress` that say what to do. Wrong values raise InputError."""

    keep: float | Mapping[str, float] = 0.7
    sites: Sequence[str] = ("mlp",)
    selector: str | select.Selector = "wanda"
    compensate: bool = True
    alpha: float = ALPHA
    toward: Toward = "baseline"
    closed_loop: bool = True
    multiple: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.sites, str):
            object.__setattr__(self, "sites", tuple(s.strip() for s in self.sites.split(",")))
        for kind in self.sites:
            check_keep(self.keep_of(kind))
        check_ridge(self.alpha, self.toward)
        select.get(self.selector)

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

    def as_dict(self) -> dict[str, Any]:
        """For the report: JSON-ready."""
        name = self.selector if isinstance(self.selector, str) else repr(self.selector)
        keep = dict(self.keep) if isinstance(self.keep, Mapping) else self.keep
        return {**vars(self), "keep": keep, "sites": list(self.sites), "selector": name}
