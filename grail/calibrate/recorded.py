"""Arguments of a model's blocks that are recorded once and used for every pass.

A pass must see the arguments that the pass before it saw. Key/value caches, iterators and other
objects that a block changes while it runs break that without an error: attention would also see
the keys that earlier passes wrote. So caches are switched off while arguments are recorded, and
the state of every argument is compared before and after each call.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from grail.errors import ModelError

_VALUES = (type(None), bool, int, float, complex, str, bytes)
# Other objects that cannot change, or whose changes are not the arguments'.
_FIXED = (
    torch.dtype,
    torch.device,
    type,
    FunctionType,
    MethodType,
    BuiltinFunctionType,
    nn.Module,
)


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Switches off the key/value cache in every configuration of a model's modules."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        for name in ("config", "generation_config"):
            config = getattr(module, name, None)
            if getattr(config, "use_cache", None):
                configs[id(config)] = config
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs.values():
            config.use_cache = True


def state_of(argument: Any) -> Any:
    """Returns what is equal for two states of an argument if it did not change between them.

    Tensors are compared by identity and by how often they were written to, other objects by their
    attributes and items.

    Raises:
        ModelError: an argument that is used up by reading it.
    """
    return _state(argument, set())


def _state(value: Any, above: set[int]) -> Any:
    if isinstance(value, Tensor):
        return id(value), 0 if value.is_inference() else value._version
    if isinstance(value, _VALUES):
        return repr(value)
    if isinstance(value, _FIXED):
        return id(value)
    if isinstance(value, Iterator | torch.Generator):
        raise ModelError(
            f"a block gets a {type(value).__name__} as an argument, which is used up by the first "
            "of several passes; pass a list or a tensor in its place"
        )
    if id(value) in above:  # an object that refers to itself
        return id(value)
    above = above | {id(value)}
    parts: list[Any] = []
    if isinstance(value, Mapping):
        parts += [(key, _state(item, above)) for key, item in value.items()]
    elif isinstance(value, Sequence | Set):
        parts += [_state(item, above) for item in value]
    parts += [(key, _state(item, above)) for key, item in _attributes(value)]
    return type(value), parts


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    yield from getattr(value, "__dict__", {}).items()
    slots = itertools.chain(*(getattr(kind, "__slots__", ()) for kind in type(value).__mro__))
    yield from ((name, getattr(value, name)) for name in slots if hasattr(value, name))
