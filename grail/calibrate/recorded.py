"""Arguments of a model's blocks, recorded once and used for every pass.

Every pass must see the same arguments. Key/value caches, iterators and other objects that a block
changes while it runs break that without an error: attention would also see the keys that earlier
passes wrote. Caches are therefore off while arguments are recorded, and the state of every argument
is compared before and after each call.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from grail.calibrate.batches import on_device
from grail.errors import ModelError

_VALUES = (type(None), bool, int, float, complex, str, bytes)
# Other objects that cannot change, or whose changes are not those of an argument.
_FIXED = (torch.dtype, torch.device, type, FunctionType, MethodType, BuiltinFunctionType, nn.Module)


@dataclass(frozen=True)
class Call:
    """The arguments of one block for one batch, without the hidden states.

    `key`: the name under which hidden states are passed; None is the first position. `state`: of
    the arguments when they were recorded.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    key: str | None = None
    state: Any = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "state", self.state_now())

    def state_now(self) -> Any:
        """Returns the state of the arguments, which no pass may change."""
        return state_of((self.args, self.kwargs))

    def to(self, device: torch.device) -> "Call":
        """Returns the same call with its tensors on a device."""
        return Call(on_device(self.args, device), on_device(self.kwargs, device), self.key)

    def equals(self, other: "Call") -> bool:
        """Returns True if another call has equal arguments."""
        return _equal((self.args, self.kwargs, self.key), (other.args, other.kwargs, other.key))


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """Splits a block's arguments into hidden states, its first tensor that is no mask, and rest."""
    if args:
        return args[0], Call(args[1:], kwargs)
    tensors = [name for name, value in kwargs.items() if isinstance(value, Tensor)]
    key = next((name for name in tensors if "mask" not in name), tensors[0])
    rest = {name: value for name, value in kwargs.items() if name != key}
    return kwargs[key], Call((), rest, key)


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
    """Returns a value that stays equal as long as an argument does not change.

    Of a tensor it is the identity and the count of in-place changes, of another object its
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
            "of several passes; pass a list or a tensor instead"
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


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return a is b or (type(a) is type(b) and isinstance(a, (int, float, bool, str)) and a == b)
