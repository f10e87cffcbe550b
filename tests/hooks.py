"""The hooks that a module has, which torch has no public name for."""

from collections.abc import Callable
from typing import Any

from torch import nn


def hooks_of(module: nn.Module) -> list[Callable[..., Any]]:
    """Returns the hooks on a module's forward pass."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
