"""Changes to a model that can be undone: a failed run leaves it as it was.

Old tensors are kept by reference, never copied; undoing puts the same objects back.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Transaction:
    """Records every change made through it; an exception through the block undoes them.

    `changes`: owner and name of every attribute that was set, in order. Undoing puts back the value
    before the first change.
    """

    def __init__(self) -> None:
        self._undo: dict[tuple[int, str], Callable[[], None]] = {}
        self.changes: list[tuple[Any, str]] = []

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Sets `owner.name = value`; undoing removes a name that was not there."""
        place = id(owner), name  # the function that undoes it keeps the owner alive
        if place not in self._undo:
            if hasattr(owner, name):
                old = getattr(owner, name)
                self._undo[place] = lambda: setattr(owner, name, old)
            else:
                self._undo[place] = lambda: delattr(owner, name)
        setattr(owner, name, value)
        self.changes.append((owner, name))

    def set_parameter(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Gives a parameter a new value, cast and moved to where the old one was."""
        old = getattr(module, name)
        new = nn.Parameter(
            value.detach().to(device=old.device, dtype=old.dtype).contiguous(),
            requires_grad=old.requires_grad,
        )
        self.set_attribute(module, name, new)

    def set_buffer(self, module: Any, name: str, value: Tensor) -> None:
        """Gives a buffer a new tensor, cast and moved to where the old one was."""
        self.set_attribute(module, name, value.detach().to(getattr(module, name)).contiguous())

    def undo(self) -> None:
        """Undoes every change so far, the last one first."""
        while self._undo:
            self._undo.popitem()[1]()

    def __enter__(self) -> "Transaction":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None:
            self.undo()
        self._undo.clear()


@contextmanager
def eval_no_grad(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's training flag is put back.

    torch's fused encoder layers are off inside: they call none of their own layers, and turn padded
    batches into nested tensors.
    """
    training = [module for module in model.modules() if module.training]
    fused = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module in training:
            module.training = True
