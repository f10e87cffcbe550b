"""Hooks into modules: the input of a call, a forward that is replaced or that ends early."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from grail.errors import ModelError


class Stop(Exception):  # noqa: N818, it is no error
    """Ends a forward early, because the rest of it is not needed."""


def input_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Returns the first tensor that a layer is called with.

    Raises:
        ModelError: there is none.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise ModelError(f"{name} is called without a tensor, so what it reads cannot be seen")


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Lets a module run another function instead of its forward."""
    had = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if had is None:
            del module.forward
        else:
            module.forward = had
