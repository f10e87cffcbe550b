"""Where a model's sites are. A family of architectures is one file in this folder."""

from torch import nn

from grail.errors import ModelError
from grail.sites import llama
from grail.sites.site import Architecture, Site

__all__ = ["Architecture", "Site", "find", "supported"]

_FAMILIES = (llama,)


def supported() -> list[str]:
    """The `model_type`s whose sites are known."""
    return sorted(name for family in _FAMILIES for name in family.MODEL_TYPES)


def find(model: nn.Module) -> Architecture:
    """The architecture of `model`: its blocks and their sites.

    Raises:
        ModelError: a model of no known family, or one whose modules are not what its family
            promises.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    for family in _FAMILIES:
        if model_type in family.MODEL_TYPES:
            return family.architecture(model)
    name = f"model_type {model_type!r}" if model_type else type(model).__name__
    raise ModelError(f"no sites are known for {name}; supported are {', '.join(supported())}")
