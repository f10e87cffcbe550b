"""Wrappers that hide a model's layers, or their inputs, from hooks."""

from collections.abc import Iterator

import torch
from torch import nn

from grail.errors import ModelError

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def refuse_wrapped(model: nn.Module) -> None:
    """Raises ModelError for a model that is wrapped, or holds a module that is, with the remedy."""
    for name, module in model.named_modules():
        if reason := next(_reasons(module), None):
            raise ModelError(f"{name or type(model).__name__} {reason}")


def _reasons(module: nn.Module) -> Iterator[str]:
    kind = type(module)
    if hasattr(module, "_orig_mod"):  # torch.compile(module)
        yield (
            "is compiled, and compiled layers do not show what they read: compress the model that "
            "was given to torch.compile (its _orig_mod), then compile it"
        )
    if getattr(module, "_compiled_call_impl", None) is not None:  # module.compile()
        yield (
            "was compiled, and compiled layers do not show what they read: compress the model "
            "first, then compile it"
        )
    if isinstance(module, torch.jit.ScriptModule):
        yield "is a TorchScript module, whose layers cannot be rewritten: give the eager model"
    if isinstance(module, _PARALLEL) or kind.__name__ == "FullyShardedDataParallel":
        yield f"is wrapped in {kind.__name__}: give the model inside, model.module"
    if any(base.__module__.partition(".")[0] == "peft" for base in kind.__mro__):
        yield (
            f"holds adapters of peft ({kind.__name__}), which add to what its layers compute: "
            "merge them first, model = model.merge_and_unload()"
        )
