"""Operators of `torch.ops.grail` whose first call does not wait for the import of torch._dynamo."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

# By name, the functions that operators run: a tool that watches torch's operations sees into them.
OPERATOR_FUNCTIONS: dict[str, Callable[..., Any]] = {}


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
