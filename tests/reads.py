"""Counts what a GPU would be asked for, and what it would be told, by a run on a CPU."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

# Operators whose result depends on values: on a GPU they wait for it.
_WAITING = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "_unique2",
    "unique_dim",
}


class Reads(TorchDispatchMode):
    """Counts reads of values and operators that compute, inside `with Reads() as reads`.

    What was there before counts as a GPU's, and so does what is made of it. What `cpu` returns is
    the host's, and so is what is made of that alone.

    `count`: reads of a GPU's values: by an operator that waits, an index of bool, `tolist`, `cpu`.
    `operators`: how often each operator ran on such tensors, views left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count, self.operators = 0, dict[str, int]()
        self._patch, self._of_host = pytest.MonkeyPatch(), WeakTensorKeyDictionary()

    def __enter__(self) -> "Reads":
        for name in ("tolist", "cpu"):  # neither is an operator on a CPU
            self._patch.setattr(Tensor, name, self._counted(getattr(Tensor, name)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patch.undo()
        super().__exit__(*error)

    def _counted(self, method: Any) -> Any:
        def call(tensor: Tensor) -> Any:
            self.count += tensor not in self._of_host
            with _disable_current_modes():
                found = method(tensor)
                if isinstance(found, Tensor):
                    found = found.clone()
                    self._of_host[found] = True
            return found

        return call

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        of_host = all(tensor in self._of_host for tensor in given)
        name = func.overloadpacket.__name__
        if not of_host:
            indices = args[1] if name.startswith("index") and len(args) > 1 else ()
            by_mask = isinstance(indices, (list, tuple)) and any(
                isinstance(index, Tensor) and index.dtype == torch.bool for index in indices
            )
            self.count += name in _WAITING or by_mask
            if not func.is_view:
                self.operators[name] = self.operators.get(name, 0) + 1
        found = func(*args, **kwargs)
        for result in tree_leaves(found):
            if isinstance(result, Tensor):
                if of_host:
                    self._of_host[result] = True
                else:
                    self._of_host.pop(result, None)
        return found
