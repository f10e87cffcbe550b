"""Operators of `torch.ops.grail` whose first call does not wait for the import of torch._dynamo."""

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# By name, the functions that operators run: a tool that watches torch's operations sees into them.
OPERATOR_FUNCTIONS: dict[str, Callable[..., Any]] = {}

_C: Any = torch._C

# The types and the dispatch keys of tensors in memory of a CPU or a GPU that nothing wraps, views
# as negated or watches.
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def _plain_keys() -> frozenset[int]:
    key, every = _C.DispatchKey, []
    for device in ("CPU", "CUDA"):
        own = _C.DispatchKeySet(getattr(key, device))
        autograd = _C.DispatchKeySet(key.ADInplaceOrView) | _C.DispatchKeySet(
            getattr(key, f"Autograd{device}")
        )
        autocast = _C.DispatchKeySet(getattr(key, f"Autocast{device}"))
        every += [own, own | autograd, own | autocast, own | autograd | autocast]
    return frozenset(keys.raw_repr() for keys in every)


_PLAIN_KEYS = _plain_keys()


def needs_operator(tensors: Iterable[Any], written: Iterable[Any]) -> bool:
    """Returns whether a call has to go through its operator, not straight to the kernel.

    It has to where torch compiles, traces or transforms the call or a mode watches it, and for
    tensors of other kinds or written ones that require gradients. The operator takes 50 µs.
    """
    if torch.compiler.is_compiling():
        return True
    if _C._len_torch_dispatch_stack() or _C._len_torch_function_stack():
        return True
    if _C._functorch.peek_interpreter_stack() is not None or _C._get_tracing_state() is not None:
        return True
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in _PLAIN_TYPES
            or _C._dispatch_keys(tensor).raw_repr() not in _PLAIN_KEYS
        ):
            return True
    return any(tensor is not None and tensor.requires_grad for tensor in written)


def mark_written(tensors: Iterable[Tensor | None]) -> None:
    """Tells autograd that those tensors were changed, as operators do."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def operator(
    name: str, *, mutates_args: tuple[str, ...], schema: str
) -> Callable[[Callable[..., Any]], Any]:
    """Decorates a kernel as `torch.library.custom_op` does.

    That runs kernels where Dynamo does not compile them, and imports Dynamo to do so: more than a
    second of the first call of a process. For CPU and GPU the kernel is registered once more, to be
    guarded only where something else has imported Dynamo.

    What an operator writes must have no default in its schema: torch 2.11 cannot do without it.
    """

    def register(kernel: Callable[..., Any]) -> Any:
        OPERATOR_FUNCTIONS[name] = kernel
        defined = torch.library.custom_op(name, kernel, mutates_args=mutates_args, schema=schema)

        @functools.cache
        def guarded() -> Callable[..., Any]:
            return torch.compiler.disable(kernel)

        @torch.library.impl(name, ("cpu", "cuda"))
        def run(*arguments: Any) -> Any:
            if "torch._dynamo" in sys.modules:
                return guarded()(*arguments)
            return kernel(*arguments)

        return defined

    return register
