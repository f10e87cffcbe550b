"""`Recipe`: all that determines the result of a run, as data that is checked before work starts."""

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Container, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from grail import select
from grail.algebra._fit import ALPHA, Auto, Toward, check_settings
from grail.algebra.gram import NonFinite, check_non_finite
from grail.algebra.grids import BLOCK, format_of
from grail.algebra.targets import Multiple, as_multiple, in_words
from grail.algebra.width import Width, check_keep
from grail.arguments import (
    as_path,
    did_you_mean,
    is_number,
    plain,
    require_seed,
    require_switches,
    require_whole,
)
from grail.errors import InputError, ModelError, one_line
from grail.networks import Architecture, BoundSite, Fused, Part, Site
from grail.runtime.settings import (
    Runtime,
    as_runtime,
    changed,
    documented,
    refuse_unknown,
    setting,
)
from grail_kernels import check_kind, kind_of

Keep = float | Mapping[str, float | Sequence[float]]
Sites = Sequence[str | Site] | None
Quantize = Literal["q4_1", "q8_0"]

Made = TypeVar("Made", Site, Fused, Part)

RECIPE = "recipe.json"  # in every output folder
_MOST_SEED = (1 << 63) - 1
_FORMATS = (".json", ".yaml", ".yml")

# What each differs in from the defaults, "default".
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    # GRAIL as published: its formula W G Rᵀ (A + λI)⁻¹, uncentred, on the network's own output.
    "paper": {
        "selector": "wanda",
        "alpha": 1e-3,
        "toward": "zero",
        "drift_correction": 0.0,
        "token_weights": False,
        "per_tap": False,
        "exact_folding": False,
    },
    "prune": {"selector": "wanda", "compensate": False},
    "flap": {"selector": "flap", "compensate": False, "fit_bias": True},
    "slimgpt": {"selector": "slimgpt", "alpha": 0.01, "drift_correction": 0.0},
}


@documented
@dataclass(frozen=True)
class Recipe:
    """All that determines the result of a run but model and calibration.

    Wrong values raise InputError. The same recipe and calibration give the same bits.
    """

    keep: Keep = setting(
        0.7,
        "Share of each site's channels that stays, in (0, 1]. The nearest width that the structure "
        "allows is used and reported. In Python and in a recipe file also one share for each kind "
        'or site, {"mlp": 0.5, "heads": 0.7}, or for each block of a kind, {"mlp": [0.9, 0.8, …]}.',
        metavar="SHARE",
    )
    sites: Sites = setting(
        None,
        "Kinds of sites to narrow: mlp, heads, experts, shared_experts, conv; several as "
        "mlp,heads. In Python and in a recipe file also a grail.Site, which names layers.",
        shown="experts of mixtures, conv of convolutional networks, else mlp",
        metavar="KINDS",
    )
    selector: str | select.Selector = setting(
        "greedy",
        f"Channel selection method: {', '.join(select.names())}. In Python also a function from "
        "grail.select.View to a Reduction.",
        metavar="NAME",
    )
    compensate: bool = setting(
        True,
        "Refit the layers that read a site, its consumers, to the channels that stay. Without: "
        "plain pruning or folding.",
        panel="Restoring",
    )
    fit_bias: bool = setting(
        False,
        "Also fit output biases to the mean of the removed signal; a model without biases gets "
        "them. Without compensate biases alone are fitted, as FLAP does.",
        panel="Restoring",
    )
    alpha: float | Auto = setting(
        "auto",
        "Ridge strength, relative to the mean diagonal of the kept channels' Gram. auto chooses it "
        f"for each site on held-out sequences (every fifth), and is {ALPHA:g} if there are none.",
        metavar="FLOAT|auto",
        panel="Restoring",
    )
    toward: Toward = setting(
        "baseline",
        "What a strong ridge shrinks to: baseline (plain pruning or folding) or zero (the paper).",
        panel="Restoring",
    )
    drift_correction: float | Auto = setting(
        "auto",
        "Share in [0, 1] of the drift from the dense network, accumulated in the blocks before, "
        "that each consumer also corrects. 0 is the paper; auto chooses it on held-out sequences. "
        "Costs a pass of the dense blocks.",
        metavar="FLOAT|auto",
        panel="Restoring",
    )
    dense_share: float = setting(
        1.0,
        "Share in (0, 1] of the calibration batches on which the dense network runs for drift "
        "correction. 0.5 saves 0.4 forward passes, raises the error of the output by 1.5% and "
        "keeps 70% of the gain of drift correction.",
        metavar="SHARE",
        panel="Restoring",
    )
    correct_attention: bool = setting(
        False,
        "Also correct drift in the projections to queries, keys and values; their widths stay. "
        "Needs drift correction. Improves text encoders; measure it for decoders.",
        panel="Restoring",
    )
    token_weights: bool | Auto = setting(
        "auto",
        "Weight each token's error by the inverse size of the dense residual stream, as norms do; "
        "the paper weights all tokens alike. Needs drift correction, and excludes fit_bias.",
        shown="where heads alone are narrowed",
        panel="Restoring",
    )
    refit_producers: int = setting(
        0,
        "Steps of conjugate gradients by which the layers that write a site are fitted, too, "
        "through the activation, toward what its consumer's output lacks; 0 leaves them. For MLPs "
        "and convolutions. 3 recover more, on the calibration's kind of text and on another, in "
        "two to four times the time.",
        metavar="STEPS",
        panel="Restoring",
        least=0,
    )
    closed_loop: bool = setting(
        True,
        "Closed: calibrate each block on the outputs of the compressed blocks before it. Open: on "
        "those of the dense model.",
        flag="--closed-loop/--open-loop",
        panel="Restoring",
    )
    multiple: Multiple | None = setting(
        None,
        "Round widths to a multiple of so many channels, or of what a target needs: "
        f"{in_words()}. Heads stay whole and are not rounded.",
        shown="256 from 4096 channels up, 32 from 1024, 8 from 64, else 1",
        metavar="COUNT|TARGET",
    )
    quantize: Quantize | None = setting(
        None,
        "Also round the matrices of each block to the grid of a GGUF format, by GPTQ, once the "
        "block is restored: q4_1 (5 bits a weight) or q8_0 (8.5). Embedding and output matrix are "
        "rounded to nearest in q8_0. Widths are multiples of 32 unless multiple says otherwise. "
        "grail export --gguf then writes these codes.",
        panel="Quantising",
    )
    seed: int = setting(
        0,
        "Seed of selectors that draw at random; on the command line and in "
        "grail.compress_checkpoint also of the choice of calibration sequences.",
        most=_MOST_SEED,
        panel="Running",
    )
    per_tap: bool = setting(
        True,
        "Fit every tap of a convolution separately. Without: as in the paper, one map of channels "
        "for all taps, which needs less data.",
        flag=None,  # the command line narrows language models
    )
    exact_folding: bool = setting(
        True,
        "Fit a folding to the outputs of the folded layers, at the cost of one more pass. "
        "Without: to the folded dense activations, as in the paper.",
        panel="Restoring",
    )
    repair: bool = setting(
        False,
        "Reset the batch norms of each block to statistics of their new inputs, as REPAIR does.",
        flag=None,
    )
    non_finite: NonFinite = setting(
        "refuse",
        "Calibration tokens with NaN or Inf: refuse the run, or drop and count them.",
        panel="Running",
    )

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, plain(value))
        self._check_channels()
        switches = [field.name for field in dataclasses.fields(self) if field.type is bool]
        require_switches(**{name: getattr(self, name) for name in switches})
        check_settings(self.alpha, self.toward, self.drift_correction)
        self._check_drift()
        self._check_refit()
        if self.repair and not self.closed_loop:
            raise InputError("repair needs the closed loop: an open one runs no narrowed block")
        check_non_finite(self.non_finite)
        if self.repair and self.non_finite == "drop":
            raise InputError("repair counts every pixel, so it cannot drop those that hold NaN")
        self._check_quantize()
        if self.multiple is not None:
            object.__setattr__(self, "multiple", as_multiple(self.multiple))
        require_seed(self.seed)

    def __hash__(self) -> int:
        """Of all settings but `keep`, which may be a mapping."""
        return hash(tuple(value for name, value in vars(self).items() if name != "keep"))

    def _check_quantize(self) -> None:
        """Checks the format; blocks of it determine the multiple of widths where none is given."""
        if self.quantize is None:
            return
        object.__setattr__(self, "quantize", format_of(self.quantize).name)
        if not self.closed_loop:
            raise InputError(
                "quantize needs the closed loop: an open one runs no narrowed block, whose Grams "
                "rounding needs"
            )
        if self.multiple is None:
            object.__setattr__(self, "multiple", BLOCK)

    def _check_channels(self) -> None:
        """Checks keep, sites and selector, and converts them to one form."""
        object.__setattr__(self, "keep", _checked_shares(self.keep))
        if self.sites is not None:
            object.__setattr__(self, "sites", _checked_sites(self.sites))
        if not (isinstance(self.selector, str) or callable(self.selector)):
            raise InputError(f"selector must be a name or a function; got {kind_of(self.selector)}")
        if isinstance(self.selector, str):
            object.__setattr__(self, "selector", select.canonical(self.selector))

    def _check_drift(self) -> None:
        """Raises InputError for settings that need the drift to be followed where it is not."""
        if self.drift_correction not in ("auto", 0) and not self.closed_loop:
            raise InputError(
                "drift_correction needs the closed loop: an open one sees no drift to correct"
            )
        if not (isinstance(self.token_weights, bool) or self.token_weights == "auto"):
            raise InputError(
                f"token_weights must be True, False or 'auto'; got {self.token_weights!r}"
            )
        if self.token_weights is True and (self.fit_bias or not self.follows_drift):
            raise InputError(
                "token_weights needs the dense network's stream, which is followed where drift is "
                "corrected, and no bias to be fitted"
            )
        if not (is_number(self.dense_share) and 0 < self.dense_share <= 1):
            raise InputError(f"dense_share must be a share in (0, 1]; got {self.dense_share!r}")
        if self.dense_share != 1 and not self.follows_drift:
            raise InputError(
                "dense_share is of the dense network's stream, which is followed where drift is "
                "corrected; leave it out"
            )
        if self.correct_attention and not self.follows_drift:
            raise InputError(
                "correct_attention needs the dense network's stream, which is followed where drift "
                "is corrected"
            )

    def _check_refit(self) -> None:
        """Raises InputError for settings with which producers are not refitted."""
        steps = self.refit_producers
        require_whole("refit_producers", steps, 0)
        if not steps:
            return
        refused = {
            "closed_loop=False": not self.closed_loop,
            "compensate=False": not self.compensate,
            "fit_bias=True": self.fit_bias,
            "token_weights=True": self.token_weights is True,
            "non_finite='drop'": self.non_finite == "drop",
            f"dense_share={self.dense_share}": self.dense_share != 1,
            f"selector={self.selector!r}, which folds": self._folds,
        }
        if clashes := [name for name, clashing in refused.items() if clashing]:
            raise InputError(
                f"refit_producers={steps} does not go with {', '.join(clashes)}; choose one of them"
            )

    @property
    def _folds(self) -> bool:
        return bool(getattr(select.get(self.selector), "folds", False))

    @classmethod
    def named(cls, name: str) -> "Recipe":
        """Returns a preset: default, paper, prune, flap or slimgpt.

        Raises:
            InputError: an unknown name; the message has the nearest known one.
        """
        check_kind("recipe", name, str, "the name of one")
        if name not in PRESETS:
            raise InputError(
                f"unknown recipe {name!r}; {did_you_mean(str(name), PRESETS)}choose one of "
                f"{', '.join(PRESETS)}, or give the path of a {', '.join(_FORMATS)} file"
            )
        return cls(**PRESETS[name])

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Recipe":
        """Returns the recipe that `as_dict` described; settings left out have their defaults.

        Raises:
            InputError: an unknown setting, with the nearest known one; a value that is not allowed.
        """
        check_kind("a recipe", data, Mapping, "a mapping of settings")
        refuse_unknown(data, settings())
        values = dict(data)
        if isinstance(values.get("sites"), Sequence) and not isinstance(values["sites"], str):
            values["sites"] = [_site(site) for site in values["sites"]]
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """Reads a recipe file, JSON or YAML by its suffix.

        Raises:
            InputError: no such file, another suffix, damaged text, YAML without PyYAML; as
                `from_dict`.
        """
        path = _recipe_file(path)
        try:
            text = path.read_text(encoding="utf-8-sig")  # editors of Windows begin with a mark
            return cls.from_dict(_parsed(text, path.suffix.lower()))
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such recipe file") from error
        except OSError as error:
            raise InputError(f"{path} cannot be read: {one_line(error)}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is no text in UTF-8: {one_line(error)}") from error
        except InputError as error:
            raise InputError(f"{path}: {error}", page=error.page) from error

    def save(self, path: str | Path) -> None:
        """Writes the recipe for `load`, JSON or YAML by its suffix.

        Raises:
            InputError: a selector that is a function, another suffix, YAML without PyYAML, a file
                that cannot be written.
        """
        path = _recipe_file(path)
        text = self._text(path.suffix.lower())
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path} cannot be written: {one_line(error)}") from error

    def _text(self, suffix: str) -> str:
        """The text of a recipe file."""
        if not isinstance(self.selector, str):
            raise InputError(
                f"selector is {self.selector!r}, and no file holds a function; a recipe can be "
                "saved with the name of a selector"
            )
        data = self.as_dict()
        if suffix == ".json":
            return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
        return str(_yaml().safe_dump(data, sort_keys=False, allow_unicode=True))

    def as_dict(self) -> dict[str, Any]:
        """Returns all settings as JSON-ready data; a selector that is a function as its repr."""
        name = self.selector if isinstance(self.selector, str) else repr(self.selector)
        return {**{key: _data(value) for key, value in vars(self).items()}, "selector": name}

    @property
    def follows_drift(self) -> bool:
        """Whether the dense network's stream is carried along with the compressed one's."""
        return self.compensate and self.closed_loop and self.drift_correction != 0

    @property
    def weighs_tokens(self) -> bool:
        """Whether a token's error counts relative to the size of the residual stream.

        Otherwise a few tokens of huge norm dominate the fit. SmolLM2's heads alone (Brown, 32k
        tokens): perplexity 52.7 instead of 74.6 at 0.7, 77.2 instead of 75.4 at 0.5. Heads and MLPs
        at 0.7: 81.3 instead of 69.1, with weights at the heads only 74.6.
        """
        if self.token_weights == "auto":
            heads_alone = list(self.sites or ()) == ["heads"]
            return heads_alone and self.follows_drift and not self.fit_bias
        return bool(self.token_weights)

    @property
    def folds_exactly(self) -> bool:
        """Whether a folding is fitted to the output of the folded producers."""
        return self.exact_folding and self.compensate and self.closed_loop

    @property
    def needs_gradient(self) -> bool:
        """Whether the selector reads gradients of each block's output."""
        return select.needs_gradient(select.get(self.selector))

    @property
    def holds_out(self) -> bool:
        """Whether something is chosen by held-out tokens."""
        automatic = self.alpha == "auto" or (self.follows_drift and self.drift_correction == "auto")
        return self.compensate and automatic

    def sites_of(self, architecture: Architecture) -> list[list[BoundSite]]:
        """Returns for each block the sites to narrow, in the order in which they run."""
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
        """Returns the sites of all blocks, in the order in which they run."""
        return list(itertools.chain(*self.sites_of(architecture)))

    def keep_of(self, site: BoundSite) -> float:
        """Returns the share of that site's channels that stays."""
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
        """Returns the feasible width of each site, by its name."""
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
        """Returns the sites of a block that a run works on, in order: those to narrow.

        With drift correction also the others: a consumer of full width can correct drift, too.
        """
        narrowed = [site for site in sites if widths[site.name].kept < site.channels]
        return list(sites) if narrowed and self.follows_drift else narrowed


AnyRecipe = str | Path | Recipe  # a recipe, the name of a preset, or the path of a file


def settings() -> list[str]:
    """Returns the names of a recipe's settings."""
    return [field.name for field in dataclasses.fields(Recipe)]


def as_recipe(recipe: AnyRecipe) -> Recipe:
    """Returns a recipe as it is, the preset of a name, or what a file holds.

    Raises:
        InputError: an unknown name; as `Recipe.load`.
    """
    if isinstance(recipe, Recipe):
        return recipe
    check_kind("recipe", recipe, (str, Path), "a grail.Recipe, the name of one, or a path")
    is_file = Path(recipe).suffix.lower() in _FORMATS or os.path.isfile(recipe)
    if str(recipe) in PRESETS or not is_file:
        return Recipe.named(str(recipe))
    return Recipe.load(recipe)


def merged(
    recipe: AnyRecipe,
    runtime: Runtime | None,
    overrides: Mapping[str, Any],
    *,
    reads: Container[str] | None = None,
    **explicit: Any,
) -> tuple[Recipe, Runtime]:
    """Returns the recipe and the runtime of a call, those settings replaced that it names.

    Args:
        recipe: see `as_recipe`.
        runtime: None is the default one.
        overrides: values of settings of either, by name.
        reads: settings of a recipe that the call reads; others in `overrides` are refused.
        explicit: as `overrides`, but None gives none.

    Raises:
        InputError: an unknown setting, with the nearest known one; one that is not read; a value
            that is not allowed.
    """
    recipe, runtime = as_recipe(recipe), as_runtime(runtime)
    given = {name: value for name, value in explicit.items() if value is not None}
    given |= overrides
    of_runtime = [field.name for field in dataclasses.fields(Runtime)]
    refuse_unknown(given, [*settings(), *of_runtime])
    for name in given:
        if reads is not None and name not in reads and name not in of_runtime:
            raise InputError(f"{name} is a setting of grail.compress that is not read here")
    return changed(recipe, given), changed(runtime, given)


def save_beside(settings_of_run: Mapping[str, Any], folder: Path) -> None:
    """Writes the recipe of a report's settings as recipe.json, which `Recipe.load` reads.

    Nothing is written of settings that no recipe has, nor where the selector is a function.
    """
    if settings_of_run.keys() == set(settings()) and settings_of_run["selector"] in select.names():
        text = Recipe.from_dict(settings_of_run)._text(".json")
        (folder / RECIPE).write_text(text, encoding="utf-8")


def _recipe_file(path: str | Path) -> Path:
    path = as_path("path", path)
    if path.suffix.lower() not in _FORMATS:
        raise InputError(f"{path}: a recipe file ends in {', '.join(_FORMATS)}; rename it")
    return path


def _parsed(text: str, suffix: str) -> Any:
    yaml = None if suffix == ".json" else _yaml()
    faults = () if yaml is None else (yaml.YAMLError,)
    try:
        if yaml is None:
            return json.loads(text, object_pairs_hook=_each_once)
        return yaml.load(text, _yaml_loader(yaml))
    except InputError:
        raise
    except (ValueError, RecursionError, *faults) as error:
        raise InputError(f"no {suffix[1:].upper()}: {one_line(error)}") from error


def _each_once(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    """The mapping of names and values, refused where it gives one twice."""
    for number, (name, _) in enumerate(pairs):
        if name in [earlier for earlier, _ in pairs[:number]]:
            raise InputError(f"{name!r} is given twice; leave one out")
    return dict(pairs)


def _yaml_loader(yaml: Any) -> Any:
    """PyYAML's safe loader, which refuses keys given twice and reads 1e-3 as a number, too."""

    def construct_mapping(self: Any, node: Any, deep: bool = False) -> Any:
        _each_once([(str(key.value), None) for key, _ in node.value])
        return yaml.SafeLoader.construct_mapping(self, node, deep)

    loader: Any = type("Loader", (yaml.SafeLoader,), {"construct_mapping": construct_mapping})
    number = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
    loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return loader


def _yaml() -> Any:
    """Returns the YAML library, which comes with transformers."""
    try:
        import yaml
    except ImportError as error:
        raise InputError(
            "a YAML recipe needs PyYAML: pip install pyyaml, or give a .json file"
        ) from error
    return yaml


def _data(value: Any) -> Any:
    """JSON's form of a setting."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _data(vars(value))
    if isinstance(value, Mapping):
        return {key: _data(item) for key, item in value.items()}
    return [_data(item) for item in value] if _are_several(value) else value


def _site(data: Any) -> Any:
    """Returns a site of a recipe file: a kind, or a `grail.Site` by its fields."""
    if not isinstance(data, Mapping):
        return data
    layers = {
        role: list(map(_layer, data[role])) if _are_several(data[role]) else data[role]
        for role in ("producers", "consumers", "along")
        if role in data
    }
    return _made(Site, {"producers": (), "consumers": (), **data, **layers})


def _layer(data: Any) -> Any:
    """Returns a layer of a site in a recipe file: a name, or a `Part` or `Fused` by its fields."""
    if not isinstance(data, Mapping):
        return data
    if data.keys() & {"ranges", "axis"}:
        return _made(Part, {"name": None, **data})
    return _made(Fused, {"name": None, **data})


def _made(kind: type[Made], data: Mapping[str, Any]) -> Made:
    refuse_unknown(data, [field.name for field in dataclasses.fields(kind)])
    return kind(**data)


def _checked_shares(keep: Any) -> Any:
    """Shares of channels in Python's numbers, one or by name, each one or one for each block."""
    if not isinstance(keep, Mapping):
        check_keep(keep)
        return keep
    if odd := [name for name in keep if not isinstance(name, str)]:
        raise InputError(f"keep must name kinds, such as 'mlp', or sites; got {odd[0]!r}")
    found = {str(name): plain(shares) for name, shares in keep.items()}
    for name, shares in found.items():
        several = _are_several(shares)
        found[name] = [plain(share) for share in shares] if several else shares
        for share in found[name] if several else (shares,):
            check_keep(share)
    if not found or [] in found.values():
        raise InputError(f"keep must give shares, such as {{'mlp': 0.5}}; got {keep!r}")
    return found


def _checked_sites(sites: Any) -> tuple[str | Site, ...]:
    """Kinds in lower case, each once, or sites that name layers."""
    if isinstance(sites, str):
        sites = sites.replace(",", " ").split()
    elif isinstance(sites, Site):
        sites = [sites]
    elif isinstance(sites, Set):  # which is in no order
        sites = sorted(sites, key=str)
    if isinstance(sites, Mapping) or not isinstance(sites, Iterable):
        raise InputError(f"sites must be a list of kinds or of grail.Site; got {kind_of(sites)}")
    sites = tuple(sites)
    if odd := [site for site in sites if not isinstance(site, (str, Site))]:
        raise InputError(f"sites must be kinds, such as 'mlp', or grail.Site; got {odd[0]!r}")
    kinds = [site.strip().lower() if isinstance(site, str) else site for site in sites]
    return tuple(kinds if any(isinstance(site, Site) for site in sites) else dict.fromkeys(kinds))


def _are_several(keep: object) -> bool:
    """Returns True for a sequence of shares, one for each block."""
    return isinstance(keep, Sequence) and not isinstance(keep, (str, bytes))
