"""The sites of a network: of known families, by form, by name or by a trace."""

import itertools
from collections.abc import Sequence

import torch
from torch import nn

from grail.errors import InputError, ModelError
from grail.networks import convnets, decoders, encoders, structure
from grail.networks.named import Fused, Named, Part, Site
from grail.networks.site import (
    AnyPoint,
    Architecture,
    AttentionInput,
    BoundSite,
    CalibrationPoint,
    ResidualProbe,
    grouped,
)
from grail.networks.traced import trace
from grail.networks.wrappers import refuse_wrapped

__all__ = [
    "AnyPoint",
    "Architecture",
    "AttentionInput",
    "BoundSite",
    "CalibrationPoint",
    "Fused",
    "Part",
    "ResidualProbe",
    "Site",
    "find",
    "grouped",
    "supported",
    "trace",
]

_FAMILIES = (decoders, encoders, structure, convnets)


def supported() -> list[str]:
    """Returns the names of the known architectures."""
    return sorted(name for family in _FAMILIES for name in family.LAYOUTS)


def find(model: nn.Module, sites: Sequence[str | Site] | None = None) -> Architecture:
    """Returns the architecture of `model`: its blocks and their sites.

    Args:
        sites: kinds of sites of a known family, or sites by the names of their layers.

    Raises:
        ModelError: a model of no known family, one whose modules differ from its family's, one
            inside a wrapper, or one in float64.
        InputError: sites of both forms.
    """
    architecture = _found(model, sites)
    for site in itertools.chain(*architecture.sites(architecture.default)):
        for name, module in site.modules().items():
            if any(p.dtype == torch.float64 for p in module.parameters(recurse=False)):
                raise ModelError(
                    f"{name} computes in float64; a model must compute in float32, float16 or "
                    "bfloat16: call model.float() first"
                )
    return architecture


def _found(model: nn.Module, sites: Sequence[str | Site] | None) -> Architecture:
    refuse_wrapped(model)
    named = [site for site in sites or () if isinstance(site, Site)]
    if named:
        if len(named) < len(sites or ()):
            raise InputError("sites are either kinds, such as 'mlp', or all of them grail.Site")
        return Named(model, named)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    name = f"model_type {model_type!r}" if model_type else type(model).__name__
    way_out = (
        "let a trace find the sites, sites=grail.trace(model), or name them: "
        "sites=[grail.Site(producers=[…], consumers=[…])]"
    )
    for family in _FAMILIES:
        try:
            architecture = family.architecture(model)
        except structure.NotRecognisedError as error:
            raise ModelError(
                f"no sites are known for {name}: {error}; {way_out}", page="docs/families.md"
            ) from error
        if architecture is not None:
            return architecture
    raise ModelError(
        f"no sites are known for {name}; grail.networks.supported() lists the families that are "
        f"known; for another network {way_out}",
        page="docs/families.md",
    )
