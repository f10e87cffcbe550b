"""Selectors: a site's statistics and weights in, a `Reduction` out.

A selector is one file in this folder that registers itself under a name:

    @scores("magnitude")                       # a score for each channel [H]; the highest stay
    def magnitude(view: View) -> Tensor: ...

    @reduces("folding")                        # or the whole reduction
    def folding(view: View) -> Reduction: ...

Anything callable of either form can be passed to `grail.compress(selector=...)` directly; it may
also return the index [K] or the mask [H] of the channels that stay. A selector that reads
`view.gradient`, for which a run has to go backwards through every block, says so:
`@scores(name, needs_gradient=True)`, or an attribute `needs_gradient` of its own. One whose search
takes memory registers how much, `peak_bytes=`, a function of the `View`; without it the selector
must be cheap, since the prediction of a run's memory calls it.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from grail.algebra.reduction import Reduction
from grail.algebra.width import Width
from grail.errors import InputError, NonFiniteError
from grail.select.view import View

__all__ = [
    "Selector",
    "View",
    "canonical",
    "get",
    "highest",
    "names",
    "needs_gradient",
    "reduces",
    "scores",
]

Selector = Callable[[View], Reduction | Tensor | Sequence[int]]
PeakBytes = Callable[[View], int]

_registry: dict[str, Selector] = {}


@dataclass(frozen=True)
class _Scored:
    """A selector that keeps the channels of highest score [H]."""

    name: str
    score: Callable[[View], Tensor]
    needs_gradient: bool
    peak_bytes: PeakBytes | None = None

    def __call__(self, view: View) -> Reduction:
        if self.needs_gradient and view.gradient is None:
            raise InputError(
                f"selector {self.name!r} needs the gradient of the block's output; run it through "
                "grail.compress, or fill View.gradient"
            )
        return highest(self.score(view), view.width, f"selector {self.name!r}")


def highest(scores: Tensor, width: Width, what: str) -> Reduction:
    """The best selection of a width, by scores [H] that a selector, named by `what`, gave.

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


def reduces(
    name: str, *, peak_bytes: PeakBytes | None = None, folds: bool = False
) -> Callable[[Selector], Selector]:
    """Registers a function from `View` to `Reduction` as selector `name`.

    Args:
        peak_bytes: the most memory that its search takes beside the view.
        folds: whether it returns a `Folding`.
    """

    def register(selector: Selector) -> Selector:
        vars(selector).update(peak_bytes=peak_bytes, folds=folds)
        _registry[name] = selector
        return selector

    return register


def scores(
    name: str, *, needs_gradient: bool = False, peak_bytes: PeakBytes | None = None
) -> Callable[[Callable[[View], Tensor]], Callable[[View], Tensor]]:
    """Registers a function from `View` to channel scores [H] (higher stays) as selector `name`."""

    def register(score: Callable[[View], Tensor]) -> Callable[[View], Tensor]:
        _registry[name] = _Scored(name, score, needs_gradient, peak_bytes)
        return score

    return register


def names() -> list[str]:
    """The names that `get` knows."""
    _load()
    return sorted(_registry)


def get(selector: str | Selector) -> Selector:
    """The selector of that name; a callable is returned as it is.

    Raises:
        InputError: an unknown name.
    """
    return selector if callable(selector) else _registry[canonical(selector)]


def canonical(name: str) -> str:
    """The name under which a selector is registered, given it in any case, "_" for "-".

    Raises:
        InputError: an unknown name; the message has the nearest known one.
    """
    known = {registered.lower(): registered for registered in names()}
    asked = str(name).strip().lower().replace("_", "-")
    if asked in known:
        return known[asked]
    near = difflib.get_close_matches(asked, known, n=1)
    meant = f"did you mean {known[near[0]]!r}? " if near else ""
    raise InputError(f"unknown selector {name!r}; {meant}choose one of {', '.join(names())}")


def needs_gradient(selector: str | Selector) -> bool:
    """Whether that selector reads `View.gradient`.

    Raises:
        InputError: an unknown name.
    """
    return bool(getattr(get(selector), "needs_gradient", False))


def _load() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
