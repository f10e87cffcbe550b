"""Selectors: a site's statistics and weights in, a `Reduction` out.

A selector is one file in this folder that registers itself under a name:

    @scores("magnitude")                       # a score for each channel [H]; the highest stay
    def magnitude(view: View) -> Tensor: ...

    @reduces("folding")                        # or the whole reduction
    def folding(view: View) -> Reduction: ...

Anything callable of the second form can be passed to `grail.compress(selector=...)` directly.
"""

import importlib
import pkgutil
from collections.abc import Callable

from torch import Tensor

from grail.errors import InputError
from grail.reduction import Reduction
from grail.select.view import View

__all__ = ["Selector", "View", "get", "names", "reduces", "scores"]

Selector = Callable[[View], Reduction]

_registry: dict[str, Selector] = {}


def reduces(name: str) -> Callable[[Selector], Selector]:
    """Registers a function from `View` to `Reduction` as selector `name`."""

    def register(selector: Selector) -> Selector:
        _registry[name] = selector
        return selector

    return register


def scores(name: str) -> Callable[[Callable[[View], Tensor]], Callable[[View], Tensor]]:
    """Registers a function from `View` to channel scores [H] (higher stays) as selector `name`."""

    def register(score: Callable[[View], Tensor]) -> Callable[[View], Tensor]:
        _registry[name] = lambda view: view.width.best(score(view))
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
    if callable(selector):
        return selector
    _load()
    if selector not in _registry:
        raise InputError(f"unknown selector {selector!r}; choose one of {', '.join(names())}")
    return _registry[selector]


def _load() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
