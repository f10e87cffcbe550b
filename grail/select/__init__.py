"""Selectors: each chooses the channels of a site from its statistics and weights.

A selector is one file in this folder that registers a function of a `View` under a name:

    @register("magnitude")
    def magnitude(view: View) -> Tensor: ...       # scores [H] of the channels; the highest stay

    @register("folding")
    def folding(view: View) -> Reduction: ...      # or the whole reduction

The selectors of `grail.select.extra` rank below another one of the same kind, by the mean over the
networks and widths of bench/results/selectors_*.csv. They are usable by name, so that every
committed figure can be measured again, and are listed last.

Any function of either form can be passed to `grail.compress(selector=...)`; it may also return the
index [K] or the mask [H] of the channels that stay. A selector that reads `view.gradient`, for
which a run has to go backwards through every block, has the attribute `needs_gradient`. One whose
search takes memory registers `peak_bytes`; without it the selector must be cheap.
"""

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from grail.algebra.reduction import Reduction, Selection
from grail.algebra.width import HeadWidth, Width
from grail.arguments import did_you_mean
from grail.errors import InputError, NonFiniteError
from grail.select.view import View

__all__ = [
    "PeakBytes",
    "Registered",
    "Selector",
    "View",
    "answers",
    "canonical",
    "get",
    "highest",
    "names",
    "needs_gradient",
    "register",
]

Selector = Callable[[View], Reduction | Tensor | Sequence[int]]
PeakBytes = Callable[[View], int]
BatchChoice = Callable[[Sequence[View]], Sequence[Reduction]]
_Choice = TypeVar("_Choice", bound=Callable[[View], Reduction | Tensor])

_EXTRA = f"{__name__}.extra"
_registry: dict[str, "Registered"] = {}


@dataclass(frozen=True)
class Registered:
    """A selector by name; of scores [H] the highest stay. Its fields: see `register`."""

    name: str
    choose: Callable[[View], Reduction | Tensor]
    needs_gradient: bool = False
    peak_bytes: PeakBytes | None = None
    folds: bool = False
    choose_batch: BatchChoice | None = None

    def __call__(self, view: View) -> Reduction:
        return self.batch([view])[0]

    def batch(self, views: Sequence[View]) -> list[Reduction]:
        """Returns the choice for each of several sites of equal sizes.

        Scores of channels are read from a GPU together.
        """
        if self.choose_batch is not None and len(views) > 1:
            return list(self.choose_batch(views))
        chosen = [self._chosen(view) for view in views]
        scores = [given for given in chosen if isinstance(given, Tensor)]
        if not scores:
            return [given for given in chosen if isinstance(given, Reduction)]
        return _highest(scores, views[0].width, f"selector {self.name!r}")

    def _chosen(self, view: View) -> Reduction | Tensor:
        if self.needs_gradient and view.gradient is None:
            raise InputError(
                f"selector {self.name!r} needs the gradient of the block's output; run it through "
                "grail.compress, or fill View.gradient"
            )
        return self.choose(view)

    @property
    def extra(self) -> bool:
        """Whether another selector of the same kind ranks higher in the benchmarks."""
        return str(self.choose.__module__).startswith(_EXTRA)  # None in code that is executed


def register(
    name: str,
    *,
    needs_gradient: bool = False,
    peak_bytes: PeakBytes | None = None,
    folds: bool = False,
    choose_batch: BatchChoice | None = None,
) -> Callable[[_Choice], _Choice]:
    """Registers a function from `View` to scores [H], or to a `Reduction`, as selector `name`.

    Args:
        needs_gradient: whether it reads `View.gradient`.
        peak_bytes: the peak memory of its search, without the view.
        folds: whether it returns a `Folding`.
        choose_batch: the same choice for several sites of equal sizes, such as the experts of a
            layer, as one batch of matrices.
    """

    def decorate(choose: _Choice) -> _Choice:
        _registry[name] = Registered(name, choose, needs_gradient, peak_bytes, folds, choose_batch)
        return choose

    return decorate


def answers(
    selector: Selector, views: Sequence[View]
) -> Sequence[Reduction | Tensor | Sequence[int]]:
    """Returns a selector's answer for each of several sites of equal sizes."""
    if isinstance(selector, Registered):
        return selector.batch(views)
    return [selector(view) for view in views]


def highest(scores: Tensor, width: Width, what: str) -> Reduction:
    """Returns the selection of a width with the highest scores [H].

    Args:
        what: names the selector in errors.

    Raises:
        InputError: scores of another shape.
        NonFiniteError: a score that is NaN.
    """
    return _highest([scores], width, what)[0]


def _highest(scores: Sequence[Tensor], width: Width, what: str) -> list[Reduction]:
    """Returns what `highest` does for the scores [H] of several sites, by one read of a GPU."""
    for each in scores:
        if tuple(each.shape) != (width.channels,):
            raise InputError(
                f"{what} must score each of {width.channels} channels; got {tuple(each.shape)}"
            )
    together = torch.stack(list(scores)).cpu()
    bad = together.isnan()
    if bool(bad.any()):
        raise NonFiniteError(
            f"scores of {what}", bad.any(0).nonzero()[:, 0].tolist(), int(bad.sum())
        )
    if isinstance(width, HeadWidth):
        return [width.best(each) for each in together]
    order = together.argsort(dim=1, descending=True, stable=True)[:, : width.kept]
    return [Selection(index, width.channels) for index in order.sort(1).values]


def names() -> list[str]:
    """Returns the names of all selectors, those of `grail.select.extra` last."""
    _load()
    return sorted(_registry, key=lambda name: (_registry[name].extra, name))


def get(selector: str | Selector) -> Selector:
    """Returns the selector of a name; a function is returned unchanged.

    Raises:
        InputError: an unknown name.
    """
    return selector if callable(selector) else _registry[canonical(selector)]


def canonical(name: str) -> str:
    """Returns the registered form of a name, given in any case, "_" for "-".

    Raises:
        InputError: an unknown name; the message names the nearest known one.
    """
    known = {registered.lower(): registered for registered in names()}
    asked = str(name).strip().lower().replace("_", "-")
    if asked in known:
        return known[asked]
    meant = did_you_mean(asked, known)
    raise InputError(
        f"unknown selector {name!r}; {meant}choose one of {', '.join(names())}",
        page="docs/reference/selectors.md",
    )


def needs_gradient(selector: str | Selector) -> bool:
    """Returns whether a selector reads `View.gradient`.

    Raises:
        InputError: an unknown name.
    """
    return bool(getattr(get(selector), "needs_gradient", False))


def _load() -> None:
    """Imports every file of this folder and its subfolders; each registers its selectors."""
    for module in pkgutil.walk_packages(__path__, f"{__name__}."):
        importlib.import_module(module.name)
