"""Configuration objects: a narrowed model gets its own, since another may share the old one.

transformers gives one object to every module of a model, to every model that is made from it, and
to the configuration of a composite model (a language model with a vision tower) as a part.
"""

import copy
import gc
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from grail.algebra.width import Width
from grail.runtime.transaction import Transaction


def own_configuration(model: nn.Module, transaction: Transaction) -> None:
    """Gives a model, its modules, and the models that contain it copies of shared configurations.

    Of a composite model only the parts that this model reads, and their owners, are copied.
    """
    memo: dict[int, Any] = {}
    copy.deepcopy(getattr(model, "config", None), memo)
    copies = {key: part for key, part in memo.items() if _is_configuration(part)}
    for module in [*model.modules(), *_composites(model)]:
        for name, config in _parts(module):
            own = _with_copies(config, copies)
            if own is not config:
                transaction.set_attribute(module, name, own)


def has_configuration(model: nn.Module) -> bool:
    """Returns whether a model, or one inside it, has a configuration of transformers."""
    return any(map(_parts, model.modules()))


def not_held(kind: str, widths: Sequence[Width], where: str = "block") -> str | None:
    """Returns the reason why a configuration cannot hold the widths of sites of a kind.

    Args:
        widths: the distinct ones of those sites.
        where: the unit by which several differ.

    Returns:
        None where no site is narrower than before.
    """
    if all(width.kept == width.channels for width in widths):
        return None
    why = f"the configuration cannot hold {widths[0]}"
    if len(widths) > 1:
        why = f"widths differ by {where}, which the configuration cannot hold"
    return f"{kind}: {why}"


def _with_copies(config: Any, copies: dict[int, Any]) -> Any:
    """Returns the configuration with its parts replaced by copies, or itself without such parts.

    Args:
        copies: by id of the original; new copies are added.
    """
    if id(config) in copies:
        return copies[id(config)]
    parts = {name: (part, _with_copies(part, copies)) for name, part in _parts(config)}
    changed = {name: own for name, (part, own) in parts.items() if own is not part}
    if not changed:
        return config
    own = copy.copy(config)
    vars(own).update(changed)
    copies[id(config)] = own
    return own


def _parts(owner: Any) -> list[tuple[str, Any]]:
    """Returns the configurations that a module or configuration holds, by name."""
    return [(name, value) for name, value in vars(owner).items() if _is_configuration(value)]


def _is_configuration(value: Any) -> bool:
    return hasattr(type(value), "model_type") and hasattr(value, "to_dict")


def _composites(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the modules that contain `model`, from the inside out.

    A module has no reference to its owner; the garbage collector lists all of them.
    """
    modules = [found for found in gc.get_objects() if issubclass(type(found), nn.Module)]
    held, seen = [model], {id(model)}
    while held:
        inside = {id(module) for module in held}
        held = [
            module
            for module in modules
            if id(module) not in seen
            and not inside.isdisjoint(map(id, vars(module).get("_modules", {}).values()))
        ]
        seen.update(map(id, held))
        yield from held
