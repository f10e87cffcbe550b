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

from torch import Tensor

from grail.algebra.reduction import Reduction
from grail.algebra.width import Width
from grail.arguments import did_you_mean
from grail.errors import InputError, NonFiniteError
from grail.select.view import View

__all__ = [
    "PeakBytes",
    "Registered",
    "Selector",
    "View",
    "canonical",
    "get",
    "highest",
    "names",
    "needs_gradient",
    "register",
]

Selector = Callable[[View], Reduction | Tensor | Sequence[int]]
PeakBytes = Callable[[View], int]
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

    def __call__(self, view: View) -> Reduction:
        if self.needs_gradient and view.gradient is None:
            raise InputError(
                f"selector {self.name!r} needs the gradient of the block's output; run it through "
                "grail.compress, or fill View.gradient"
            )
        chosen = self.choose(view)
        if isinstance(chosen, Reduction):
            return chosen
        return highest(chosen, view.width, f"selector {self.name!r}")

    @property
    def extra(self) -> bool:
        """Whether another selector of the same kind ranks higher in the benchmarks."""
        return self.choose.__module__.startswith(_EXTRA)


def register(
    name: str,
    *,
    needs_gradient: bool = False,
    peak_bytes: PeakBytes | None = None,
    folds: bool = False,
) -> Callable[[_Choice], _Choice]:
    """Registers a function from `View` to scores [H], or to a `Reduction`, as selector `name`.

    Args:
        needs_gradient: whether it reads `View.gradient`.
        peak_bytes: the peak memory of its search, without the view.
        folds: whether it returns a `Folding`.
    """

    def decorate(choose: _Choice) -> _Choice:
        _registry[name] = Registered(name, choose, needs_gradient, peak_bytes, folds)
        return choose

    return decorate


def highest(scores: Tensor, width: Width, what: str) -> Reduction:
    """Returns the selection of a width with the highest scores [H].

    Args:
        what: names the selector in errors.

    Raises:
        InputError: scores of another shape.
        NonFiniteError: a score that is NaN.
    """
    if tuple(scores.shape) != (width.channels,):
        raise InputError(
            f"{what} must score each of {width.channels} channels; got {tuple(scores.shape)}"
        )
    if bool(scores.isnan().any()):
        bad = scores.isnan()
        raise NonFiniteError(f"scores of {what}", bad.nonzero()[:, 0].tolist(), int(bad.sum()))
    return width.best(scores)


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
    raise InputError(f"unknown selector {name!r}; {meant}choose one of {', '.join(names())}")


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
