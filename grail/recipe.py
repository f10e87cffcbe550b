"""What a run is asked to do, checked before any work starts."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from grail import select
from grail.algebra._fit import Auto, Damping, Toward, check_settings
from grail.algebra.gram import NonFinite, check_non_finite
from grail.algebra.width import Width, check_keep
from grail.arguments import plain, require_seed, require_switches
from grail.errors import InputError, ModelError
from grail.networks import Architecture, BoundSite, Site
from grail_kernels import check_kind, kind_of

# From bench/results/smollm2_calibration.csv: the best or within 2% of it at 8k, 32k and 128k
# tokens, on the calibration's text and on another.
ALPHA = 1e-3

Compensation = Literal["weights", "bias", "both"]
TokenWeights = bool | Auto
Keep = float | Mapping[str, float | Sequence[float]]


@dataclass(frozen=True)
class Recipe:
    """The arguments of `grail.compress` that say what to do. Wrong values raise InputError."""

    keep: Keep = 0.7
    sites: Sequence[str | Site] | None = None
    selector: str | select.Selector = "greedy"
    compensate: bool | Compensation = True
    alpha: float | Auto = "auto"
    toward: Toward = "baseline"
    damping: Damping = "site"
    drift_correction: float | Auto = "auto"
    correct_attention: bool = False
    token_weights: TokenWeights = "auto"
    closed_loop: bool = True
    multiple: int | None = None
    seed: int = 0
    per_tap: bool = True
    exact_folding: bool = True
    repair: bool = False
    non_finite: NonFinite = "refuse"

    def __post_init__(self) -> None:
        for name in ("alpha", "drift_correction", "multiple", "seed"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        object.__setattr__(self, "keep", _plain_shares(self.keep))
        if isinstance(self.sites, str):
            kinds = self.sites.lower().replace(",", " ").split()
            object.__setattr__(self, "sites", tuple(dict.fromkeys(kinds)))
        elif isinstance(self.sites, Site):
            object.__setattr__(self, "sites", (self.sites,))
        if self.sites is not None:
            check_kind("sites", self.sites, Iterable, "a list of kinds or of grail.Site")
            object.__setattr__(self, "sites", tuple(self.sites))
        if odd := [site for site in self.sites or () if not isinstance(site, (str, Site))]:
            raise InputError(f"sites must be kinds, such as 'mlp', or grail.Site; got {odd[0]!r}")
        keeps: Any = self.keep.values() if isinstance(self.keep, Mapping) else ([self.keep],)
        for keep in keeps:
            for share in keep if _are_several(keep) else (keep,):
                check_keep(share)
        if not isinstance(self.compensate, bool) and self.compensate not in get_args(Compensation):
            raise InputError(
                f"compensate must be True, False or one of {', '.join(get_args(Compensation))}; "
                f"got {self.compensate!r}"
            )
        check_settings(self.alpha, self.toward, self.drift_correction, self.damping)
        if self.drift_correction not in ("auto", 0) and not self.closed_loop:
            raise InputError(
                "drift_correction needs the closed loop: an open one sees no drift to correct"
            )
        if self.token_weights not in (True, False, "auto"):
            raise InputError(
                f"token_weights must be True, False or 'auto'; got {self.token_weights!r}"
            )
        if self.token_weights is True and (self.shifts_bias or not self.follows_drift):
            raise InputError(
                "token_weights needs the dense network's stream, which is followed where drift is "
                "corrected, and no bias to be fitted"
            )
        if self.correct_attention and not self.follows_drift:
            raise InputError(
                "correct_attention needs the dense network's stream, which is followed where drift "
                "is corrected"
            )
        if self.repair and not self.closed_loop:
            raise InputError("repair needs the closed loop: an open one runs no narrowed block")
        check_non_finite(self.non_finite)
        if self.repair and self.non_finite == "drop":
            raise InputError("repair counts every pixel, so it cannot drop those that hold NaN")
        require_switches(
            correct_attention=self.correct_attention,
            closed_loop=self.closed_loop,
            per_tap=self.per_tap,
            exact_folding=self.exact_folding,
            repair=self.repair,
        )
        require_seed(self.seed)
        if not (isinstance(self.selector, str) or callable(self.selector)):
            raise InputError(f"selector must be a name or a function; got {kind_of(self.selector)}")
        if isinstance(self.selector, str):
            object.__setattr__(self, "selector", select.canonical(self.selector))

    @property
    def fits_weights(self) -> bool:
        """Whether consumers are fitted, not only narrowed."""
        return self.compensate in (True, "weights", "both")

    @property
    def shifts_bias(self) -> bool:
        """Whether a consumer's bias takes up the mean of what is lost."""
        return self.compensate in ("bias", "both")

    @property
    def follows_drift(self) -> bool:
        """Whether the dense network's stream is carried beside the compressed one's."""
        return self.fits_weights and self.closed_loop and self.drift_correction != 0

    @property
    def weighs_tokens(self) -> bool:
        """Whether a token's error counts relative to the size of the stream where it lands.

        Else the drift of a few tokens of enormous size drowns that of all others. SmolLM2's heads
        alone (Brown, 32k tokens): perplexity 52.7 for 74.6 at 0.7, 77.2 for 75.4 at 0.5. Heads and
        MLPs at 0.7: 81.3 for 69.1, with weights at the heads only 74.6.
        """
        if self.token_weights == "auto":
            heads_alone = list(self.sites or ()) == ["heads"]
            return heads_alone and self.follows_drift and not self.shifts_bias
        return bool(self.token_weights)

    @property
    def folds_exactly(self) -> bool:
        """Whether a folding is fitted to what the folded block writes."""
        return self.exact_folding and self.fits_weights and self.closed_loop

    @property
    def needs_gradient(self) -> bool:
        """Whether the selector wants gradients of each block's output."""
        return select.needs_gradient(select.get(self.selector))

    @property
    def holds_out(self) -> bool:
        """Whether something is chosen by held-out tokens."""
        automatic = self.alpha == "auto" or (self.follows_drift and self.drift_correction == "auto")
        return self.fits_weights and automatic

    def sites_of(self, architecture: Architecture) -> list[list[BoundSite]]:
        """For each block the sites to be narrowed, in the order in which they run."""
        sites = architecture.default if self.sites is None else self.sites
        kinds = [site for site in sites if isinstance(site, str)]
        if len(kinds) < len(sites):
            return architecture.sites(architecture.kinds)  # they were named; there are no others
        architecture.check_kinds(kinds)
        return architecture.sites(kinds)

    @staticmethod
    def _require_own_weights(architecture: Architecture, sites: Sequence[BoundSite]) -> None:
        """Raises ModelError where a weight is another site's, or runs as two blocks'."""
        if len(set(architecture.blocks)) < len(architecture.blocks):
            raise ModelError(
                f"{architecture.name} runs one block several times: a site is narrowed for what "
                "its own layers see, so give each its own copy"
            )
        for role in ("producers", "consumers"):
            owners: dict[int, str] = {}
            for site in sites:
                for layer in getattr(site, role):
                    owner = owners.setdefault(id(layer.module.weight), layer.name)
                    if owner != layer.name:
                        raise ModelError(
                            f"{layer.name} has the weight of {owner}: a site is narrowed for what "
                            "its own layers see, so give each its own copy"
                        )

    def all_sites(self, architecture: Architecture) -> list[BoundSite]:
        """The sites of all blocks, in the order in which they run."""
        return list(itertools.chain(*self.sites_of(architecture)))

    def keep_of(self, site: BoundSite) -> float:
        """The share of that site's channels that stays."""
        if not isinstance(self.keep, Mapping):
            return self.keep
        keep = self.keep.get(site.name, self.keep.get(site.kind))
        if keep is None:
            raise InputError(
                f"keep names {', '.join(self.keep)}, but not the site kind {site.kind!r}"
            )
        if not isinstance(keep, Sequence):
            return keep
        if site.block >= len(keep):
            raise InputError(
                f"keep gives {len(keep)} shares for {site.kind}, one for each block; {site.name} "
                f"is in block {site.block}"
            )
        return keep[site.block]

    def widths(self, architecture: Architecture) -> dict[str, Width]:
        """The feasible width of each site, by its name."""
        sites = self.all_sites(architecture)
        self._require_own_weights(architecture, sites)
        self._check_keep_names(architecture, sites)
        return {site.name: site.width(self.keep_of(site), self.multiple) for site in sites}

    def _check_keep_names(self, architecture: Architecture, sites: Sequence[BoundSite]) -> None:
        """Raises InputError for shares of what is no kind, no site of the run and no block."""
        keep = self.keep if isinstance(self.keep, Mapping) else {}
        known = {*architecture.kinds, *(site.name for site in sites)}
        if unknown := [name for name in keep if name not in known]:
            raise InputError(
                f"keep names {', '.join(map(str, unknown))}; there are the kinds "
                f"{', '.join(architecture.kinds)} and the sites "
                f"{', '.join(site.name for site in sites[:2])}, …"
            )
        blocks = len(architecture.blocks)
        for name, shares in keep.items():
            if isinstance(shares, Sequence) and len(shares) > blocks:
                raise InputError(
                    f"keep gives {len(shares)} shares for {name}, one for each block; there are "
                    f"{blocks} blocks"
                )

    def active(self, sites: Sequence[BoundSite], widths: Mapping[str, Width]) -> list[BoundSite]:
        """The sites of a block that a run works on, in order: those that become narrower.

        Where drift is followed the others join them: a consumer of full width can undo it, too.
        """
        narrowed = [site for site in sites if widths[site.name].kept < site.channels]
        return list(sites) if narrowed and self.follows_drift else narrowed

    def as_dict(self) -> dict[str, Any]:
        """For the report: JSON-ready."""
        name = self.selector if isinstance(self.selector, str) else repr(self.selector)
        keep: Any = self.keep
        if isinstance(keep, Mapping):
            keep = {k: list(v) if isinstance(v, Sequence) else v for k, v in keep.items()}
        sites = None if self.sites is None else [str(site) for site in self.sites]
        return {**vars(self), "keep": keep, "sites": sites, "selector": name}


def _plain_shares(keep: Any) -> Any:
    """Shares of channels in Python's numbers."""
    if isinstance(keep, Mapping):
        return {name: _plain_shares(shares) for name, shares in keep.items()}
    keep = plain(keep)
    return [plain(share) for share in keep] if _are_several(keep) else keep


def _are_several(keep: object) -> bool:
    """Whether shares of channels are one for each block."""
    return isinstance(keep, Sequence) and not isinstance(keep, (str, bytes))
