"""Models whose weights wait on another device, as compressed-tensors offloads them.

An offloaded module has a cache instead of its dictionaries of parameters and buffers, and a forward
of its own. A value of the same shape that is assigned is written into the old tensor.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from grail.adapters import _llmcompressor_library as library
from grail.runtime.transaction import Transaction


class OffloadTransaction(Transaction):
    """A transaction that keeps offloaded tensors where they wait, and never writes into them."""

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Sets `owner.name = value`, see `Transaction.set_attribute`."""
        cache = _cache_of(owner, name)
        if cache is None:
            super().set_attribute(owner, name, value)
            return
        place = id(owner), name
        old = cache.offloaded_values.pop(name)
        if place not in self._undo:
            self._undo[place] = lambda: cache.offloaded_values.update({name: old})
        setattr(owner, name, value)
        self.changes.append((owner, name))


def _cache_of(owner: Any, name: str) -> Any:
    """Returns the cache that holds an attribute; None if it is not offloaded."""
    for place in ("_parameters", "_buffers"):
        cache = vars(owner).get(place) if isinstance(owner, nn.Module) else None
        if isinstance(cache, library.OffloadCache) and name in cache:
            return cache
    return None


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Takes back the offloading that happens inside, of modules that had none.

    Yields:
        A function whose context gives offloaded modules the forward of their class.
    """
    plain = [module for module in model.modules() if not _is_offloaded(module)]
    own = {module for module in plain if "forward" in vars(module)}
    try:
        yield lambda: _own_forwards(model)
    finally:
        for module in plain:
            if _is_offloaded(module):
                library.remove_module_offload(module)
                if module not in own:
                    vars(module).pop("forward", None)


@contextmanager
def _own_forwards(model: nn.Module) -> Iterator[None]:
    forwards = {m: vars(m).pop("forward") for m in model.modules() if _is_offloaded(m)}
    try:
        yield
    finally:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward


def _is_offloaded(module: nn.Module) -> bool:
    return isinstance(module._parameters, library.OffloadCache)
